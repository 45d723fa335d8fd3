//! Starts and supervises the chosen engine: one actor per participant, which joins the room, publishes the caller's track,
//! listens to the agent and reports events. A failed join is an event, too, and a panic ends only its own participant.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::audio::recording::CallSound;
use super::audio::rtp::RtpReceiver;
#[cfg(not(feature = "libwebrtc"))]
use super::event::AudioStats;
use super::event::{EndReason, RoomEvent, RoomEventKind};
use super::join::{Adoption, JoinRequest};
#[cfg(feature = "libwebrtc")]
use super::libwebrtc;
use super::native::participant;
use crate::config::Engine;

/// Events that may wait to be read. A busy call queues some tens; a reader that is this far behind has stopped reading.
const MAX_QUEUED_EVENTS: usize = 256;

/// A running participant. Dropping it aborts the actor without leaving the room first.
pub(crate) struct Participant {
    pub(crate) events: mpsc::Receiver<RoomEvent>,
    sound: oneshot::Receiver<CallSound>,
    leave: CancellationToken,
    adopted: watch::Sender<Option<String>>,
    _actor: AbortOnDropHandle<()>,
}

/// Starts a participant and returns at once; must be called on a Tokio runtime.
pub(crate) fn join(engine: Engine, request: JoinRequest) -> Participant {
    let (sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
    let leave = CancellationToken::new();
    let (adopted, adoption) = watch::channel(None);
    let adoption = Adoption::new(adoption);
    let (sound_tx, sound) = oneshot::channel();
    let actor = supervise(engine, request, sender, sound_tx, leave.clone(), adoption);
    let actor = tokio::spawn(actor);
    Participant {
        events,
        sound,
        leave,
        adopted,
        _actor: AbortOnDropHandle::new(actor),
    }
}

impl Participant {
    /// Asks the actor to leave. `RoomEventKind::Ended` follows on `events` within the actor's own short deadline.
    pub(crate) fn leave(&self) {
        self.leave.cancel();
    }

    /// The call's audio, once: after `RoomEventKind::Ended`.
    pub(crate) fn take_sound(&mut self) -> Option<CallSound> {
        self.sound.try_recv().ok()
    }

    /// Treats this participant, an agent without a name attribute, as the target's agent from now on.
    pub(crate) fn adopt(&self, identity: String) {
        self.adopted.send_replace(Some(identity));
    }
}

/// Runs the actor and always sends its last event, even if the actor panics.
async fn supervise(
    engine: Engine,
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    sound_tx: oneshot::Sender<CallSound>,
    leave: CancellationToken,
    adoption: Adoption,
) {
    // Reserved at the start: the last event must reach the reader even if the queue is full by then.
    let Ok(last) = events.clone().reserve_owned().await else {
        return;
    };
    let mut sound = CallSound::new(request.record);
    let (reason, audio) = match engine {
        Engine::Native => {
            let mut voice = RtpReceiver::default();
            let actor = participant::run(request, events, leave, adoption, &mut voice, &mut sound);
            (catch_panic(Box::pin(actor)).await, voice.stats())
        }
        #[cfg(feature = "libwebrtc")]
        Engine::Libwebrtc => {
            let mut voice = libwebrtc::InboundTotals::default();
            let actor = libwebrtc::run(request, events, leave, adoption, &mut voice, &mut sound);
            (catch_panic(Box::pin(actor)).await, voice.stats())
        }
        // The settings reject this engine before a probe starts.
        #[cfg(not(feature = "libwebrtc"))]
        Engine::Libwebrtc => {
            let why = "this binary was built without the libwebrtc engine".to_owned();
            (EndReason::Internal(why), AudioStats::default())
        }
    };
    // If the reader is gone, nothing can use it.
    drop(sound_tx.send(sound));
    last.send(RoomEvent {
        at: Instant::now(),
        kind: RoomEventKind::Ended { reason, audio },
    });
}

/// Turns a panic of the actor into its end.
///
/// The actor may be asserted unwind-safe: only the audio counters and the call's audio outlive a panic, and they are plain data.
async fn catch_panic(actor: impl Future<Output = EndReason>) -> EndReason {
    AssertUnwindSafe(actor)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| {
            let text = panic_message(panic.as_ref()).unwrap_or("no message");
            EndReason::Internal(format!("the participant panicked: {text}"))
        })
}

/// The message of a panic, if it is a text.
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
    async fn remaining_events(mut participant: Participant) -> Vec<RoomEventKind> {
        let mut events = Vec::new();
        while let Some(event) = participant.events.recv().await {
            events.push(event.kind);
        }
        events
    }

    #[tokio::test]
    async fn failed_join_is_reported_as_the_last_event() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let events = remaining_events(join(Engine::Native, request(port))).await;
        assert!(
            matches!(
                &events[..],
                [RoomEventKind::Ended {
                    reason: EndReason::Signal(SignalError::Unreachable(_)),
                    ..
                }]
            ),
            "{events:?}"
        );
    }

    #[tokio::test]
    async fn leaving_before_the_server_answers_ends_the_actor() {
        // Accepts connections and sends nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut participant = join(Engine::Native, request(port));
        let first = participant.events.recv().await.unwrap();
        assert!(matches!(first.kind, RoomEventKind::SignalRequested));
        participant.leave();
        let events = remaining_events(participant).await;
        assert!(
            matches!(
                events[..],
                [RoomEventKind::Ended {
                    reason: EndReason::Left,
                    ..
                }]
            ),
            "{events:?}"
        );
    }

    #[tokio::test]
    async fn dropped_participant_closes_its_connection() {
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
    async fn panic_in_the_actor_ends_it_with_an_internal_error() {
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
