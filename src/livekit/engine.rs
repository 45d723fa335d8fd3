//! What puts a participant into a room: an actor that joins, publishes the echo track, listens to the agent, and says
//! what it sees. A failed join is an event, and a panic in one participant harms no other.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::audio::rtp::RtpReceiver;
use super::event::{AudioStats, EndReason, RoomEvent, RoomEventKind};
use super::join::JoinRequest;
#[cfg(feature = "libwebrtc")]
use super::libwebrtc;
use super::native::participant;
use crate::config::Engine;

/// Events that may wait to be read. A busy call has some tens; who falls behind this far no longer reads.
const MAX_QUEUED_EVENTS: usize = 256;

/// A running participant. Dropping it ends the actor without ceremony.
pub struct Participant {
    pub events: mpsc::Receiver<RoomEvent>,
    leave: CancellationToken,
    _actor: AbortOnDropHandle<()>,
}

/// Starts a participant and returns at once; must be called on a Tokio runtime.
pub fn join(engine: Engine, request: JoinRequest) -> Participant {
    let (sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
    let leave = CancellationToken::new();
    let actor = tokio::spawn(supervise(engine, request, sender, leave.clone()));
    Participant {
        events,
        leave,
        _actor: AbortOnDropHandle::new(actor),
    }
}

impl Participant {
    /// Asks the actor to leave; `RoomEventKind::Ended` follows on `events` within the actor's own short deadline.
    pub fn leave(&self) {
        self.leave.cancel();
    }
}

/// Runs the actor and sends its last event, whatever becomes of it.
async fn supervise(
    engine: Engine,
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    leave: CancellationToken,
) {
    // A place for the last event, kept from the start: it must not depend on how far the reader is.
    let Ok(last) = events.clone().reserve_owned().await else {
        return;
    };
    let (why, audio) = match engine {
        Engine::Native => {
            let mut voice = RtpReceiver::default();
            let actor = participant::run(request, events, leave, &mut voice);
            (catch_panic(Box::pin(actor)).await, voice.stats())
        }
        #[cfg(feature = "libwebrtc")]
        Engine::Libwebrtc => {
            let mut voice = libwebrtc::InboundTotals::default();
            let actor = libwebrtc::run(request, events, leave, &mut voice);
            (catch_panic(Box::pin(actor)).await, voice.stats())
        }
        // The settings refuse it.
        #[cfg(not(feature = "libwebrtc"))]
        Engine::Libwebrtc => {
            let why = "the engine libwebrtc is not in this binary".to_owned();
            (EndReason::Internal(why), AudioStats::default())
        }
    };
    last.send(RoomEvent {
        at: Instant::now(),
        kind: RoomEventKind::Ended { reason: why, audio },
    });
}

/// Only the counters of the voice outlive a panic, and they are plain numbers.
async fn catch_panic(actor: impl Future<Output = EndReason>) -> EndReason {
    AssertUnwindSafe(actor)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| {
            let text = panic_message(panic.as_ref()).unwrap_or("without a text");
            EndReason::Internal(format!("the participant panicked: {text}"))
        })
}

/// What a panic said, where it said it in words.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> Option<&str> {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::livekit::join;
    use crate::livekit::wire::connect::Endpoint;
    use crate::livekit::wire::signal::SignalError;

    fn request(port: u16) -> JoinRequest {
        let url = format!("ws://127.0.0.1:{port}").parse().unwrap();
        join::request(Endpoint::new(&url, None).unwrap())
    }

    /// The events up to the end of the channel.
    async fn all(mut participant: Participant) -> Vec<RoomEventKind> {
        let mut seen = Vec::new();
        while let Some(event) = participant.events.recv().await {
            seen.push(event.kind);
        }
        seen
    }

    #[tokio::test]
    async fn failed_join_is_an_event_and_the_last() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let seen = all(join(Engine::Native, request(port))).await;
        assert!(
            matches!(
                &seen[..],
                [RoomEventKind::Ended {
                    reason: EndReason::Signal(SignalError::Unreachable(_)),
                    ..
                }]
            ),
            "{seen:?}"
        );
    }

    #[tokio::test]
    async fn leave_before_the_server_answers_ends_the_actor() {
        // It takes connections and says nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut participant = join(Engine::Native, request(port));
        let first = participant.events.recv().await.unwrap();
        assert!(matches!(first.kind, RoomEventKind::SignalRequested));
        participant.leave();
        let seen = all(participant).await;
        assert!(
            matches!(
                seen[..],
                [RoomEventKind::Ended {
                    reason: EndReason::Left,
                    ..
                }]
            ),
            "{seen:?}"
        );
    }

    #[tokio::test]
    async fn dropped_participant_lets_go_of_its_connection() {
        use tokio::io::AsyncReadExt;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let participant = join(Engine::Native, request(port));
        let (mut connection, _) = listener.accept().await.unwrap();
        drop(participant);
        let mut sent = Vec::new();
        connection.read_to_end(&mut sent).await.unwrap();
    }

    #[tokio::test]
    async fn panic_in_the_actor_is_its_end() {
        let actor = async {
            tokio::task::yield_now().await;
            panic!("a fault of ours")
        };
        let why = catch_panic(actor).await;
        assert!(
            matches!(&why, EndReason::Internal(text) if text.contains("a fault of ours")),
            "{why:?}"
        );
    }
}
