//! What puts a participant into a room: an actor that joins, publishes the echo track, listens to the agent, and says
//! what it sees. A failed join is an event, and a panic in one participant harms no other.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use secrecy::SecretString;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::RoomName;
#[cfg(feature = "libwebrtc")]
use super::libwebrtc;
use super::net::Endpoint;
use super::participant;
use super::rtp::Receiver;
use super::signal::SignalError;
use super::token::Keys;
use super::transcript::Words;
use crate::config::{Echo, Engine, Ice, Speech};

/// Events that may wait to be read. A busy call has some tens; who falls behind this far no longer reads.
const EVENTS: usize = 256;

/// All that a participant needs to know before it starts.
#[derive(Clone)]
pub struct JoinRequest {
    pub endpoint: Endpoint,
    pub keys: Keys,
    pub room: RoomName,
    pub identity: String,
    pub attributes: BTreeMap<String, String>,
    /// The target's agent name; `None` takes any agent.
    pub agent_name: Option<String>,
    /// Room settings in the token, where joining creates the room.
    pub room_config: Option<livekit_protocol::RoomConfiguration>,
    pub echo: Echo,
    pub speech: Speech,
    pub signal_timeout: Duration,
    pub ice: Ice,
    /// Whether the transcript is read.
    pub transcript: bool,
}

impl JoinRequest {
    pub(super) fn token(&self) -> Result<SecretString, Ended> {
        let token = self.keys.participant(
            &self.room,
            &self.identity,
            &self.attributes,
            self.room_config.as_ref(),
        );
        token.map_err(|error| Ended::Internal(error.to_string()))
    }
}

/// A running participant. Dropping it ends the actor without ceremony.
pub struct Participant {
    pub events: mpsc::Receiver<RoomEvent>,
    leave: CancellationToken,
    _actor: AbortOnDropHandle<()>,
}

/// Something seen in the room, stamped on first receipt: in our code, and what came as media in the kernel.
#[derive(Debug, Clone)]
pub struct RoomEvent {
    pub at: Instant,
    pub seen: Seen,
}

#[derive(Debug, Clone)]
pub enum Seen {
    /// The upgrade request of the signal socket is about to be written, after TLS.
    SignalRequested,
    SignalConnected {
        room_sid: String,
        server_version: String,
        region: String,
        node: String,
    },
    /// An address at which the server wants media, each once: `UDP 192.0.2.1:7882`.
    MediaAddress(String),
    /// Both peer connections are up.
    MediaConnected,
    /// They are up over TCP, though UDP was tried first.
    UdpBlocked,
    /// The server acknowledged the echo track.
    EchoPublished,
    AgentJoined {
        agent: Agent,
        in_join_response: bool,
    },
    /// The agent's own connection stands. Put out of the room before that, it joins anew some 15 s later.
    AgentConnected,
    /// The agent's `lk.agent.state` attribute changed.
    AgentState(String),
    AgentTrackSubscribed {
        track_sid: String,
    },
    /// The first RTP packet of the agent's audio.
    AgentFirstAudio,
    /// An utterance of the agent began; stamped at the arrival of its first frame.
    SpeechStarted,
    /// It ended; stamped at the arrival of its last speech frame.
    SpeechEnded,
    EchoStarted,
    EchoEnded,
    AgentLeft {
        reason: String,
    },
    /// A participant's `AgentSession` reported an error, in its own words.
    AgentError {
        identity: String,
        message: String,
    },
    /// A participant's `AgentSession` measured a turn.
    AgentMetrics {
        identity: String,
        metrics: TurnMetrics,
    },
    /// Words of a transcript; where they are ours, whatever participant their sender names.
    Transcribed {
        speaker: Speaker,
        words: Words,
    },
    /// A second agent of the target's name.
    AgentDuplicate {
        identity: String,
    },
    /// Somebody who is neither us nor the agent.
    OtherJoined {
        identity: String,
        kind: String,
        agent_name: Option<String>,
    },
    /// The last event, always.
    Ended {
        why: Ended,
        audio: AudioStats,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Agent {
    pub identity: String,
    pub sid: String,
    pub name: Option<String>,
    /// The server's own stamp of the join, Unix milliseconds.
    pub joined_at_ms: i64,
    /// That stamp on our clock, never later than the first sight; `None` where the server gives none, or has not yet
    /// told its clock.
    ///
    /// The server tells of a participant that neither publishes nor changes an attribute only every three seconds, so
    /// the first sight can come that much after the join.
    pub joined: Option<Instant>,
}

/// Whose turn, or whose words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaker {
    Agent,
    /// We.
    Caller,
}

/// What an `AgentSession` measured of one turn: of the caller's, how it heard it; of its own, how it came to answer
/// (`MetricsReport` in livekit-agents' `llm/chat_context.py`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TurnMetrics {
    pub speaker: Speaker,
    /// The agent was cut short.
    pub interrupted: bool,
    /// From the end of the caller's speech to its transcript.
    pub transcription_delay_seconds: Option<f64>,
    /// From the end of the caller's speech to the decision that the turn is over.
    pub end_of_turn_delay_seconds: Option<f64>,
    /// In the agent's own `on_user_turn_completed`.
    pub on_user_turn_completed_delay_seconds: Option<f64>,
    /// To the first token of the LLM.
    pub llm_ttft_seconds: Option<f64>,
    /// To its first sentence, as the TTS got it.
    pub llm_ttfs_seconds: Option<f64>,
    pub llm_tokens_per_second: Option<f64>,
    /// From the first text to the first audio of the TTS.
    pub tts_ttfb_seconds: Option<f64>,
    /// From the end of the caller's speech to the start of the answer.
    pub e2e_latency_seconds: Option<f64>,
}

/// Seconds to the microsecond: what lies below is the scheduler's noise.
pub(crate) fn to_microseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

/// Why a participant is no longer in its room.
#[derive(Debug, Clone)]
pub enum Ended {
    /// We left, as asked.
    Left,
    Signal(SignalError),
    /// The server's `Leave`, by its reason (`ROOM_DELETED`, `PARTICIPANT_REMOVED`, `DUPLICATE_IDENTITY`, …).
    Removed {
        reason: String,
    },
    /// A right that our token granted was taken away in mid-call (`UpdateParticipant`).
    Revoked(Right),
    /// The server refused or never acknowledged the echo track.
    PublishFailed(String),
    /// ICE or DTLS never came up, or broke.
    MediaFailed {
        transport: &'static str,
        detail: String,
    },
    /// A fault of ours, a panic included.
    Internal(String),
}

/// What a participant may do, as far as a probe needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Publish,
    Subscribe,
}

/// What RTP told of the agent's audio. `None` where no packet came.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AudioStats {
    pub packets: u64,
    pub lost: u64,
    /// Interarrival jitter (RFC 3550, 6.4.1).
    pub jitter: Option<Duration>,
}

/// Starts a participant and returns at once; must be called on a Tokio runtime.
pub fn join(engine: Engine, request: JoinRequest) -> Participant {
    let (sender, events) = mpsc::channel(EVENTS);
    let leave = CancellationToken::new();
    let actor = tokio::spawn(supervise(engine, request, sender, leave.clone()));
    Participant {
        events,
        leave,
        _actor: AbortOnDropHandle::new(actor),
    }
}

impl Participant {
    /// Asks the actor to leave; `Seen::Ended` follows on `events` within the actor's own short deadline.
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
            let mut voice = Receiver::default();
            let actor = participant::run(request, events, leave, &mut voice);
            (caught(Box::pin(actor)).await, voice.stats())
        }
        #[cfg(feature = "libwebrtc")]
        Engine::Libwebrtc => {
            let mut voice = libwebrtc::Tally::default();
            let actor = libwebrtc::run(request, events, leave, &mut voice);
            (caught(Box::pin(actor)).await, voice.stats())
        }
        // The settings refuse it.
        #[cfg(not(feature = "libwebrtc"))]
        Engine::Libwebrtc => {
            let why = "the engine libwebrtc is not in this binary".to_owned();
            (Ended::Internal(why), AudioStats::default())
        }
    };
    last.send(RoomEvent {
        at: Instant::now(),
        seen: Seen::Ended { why, audio },
    });
}

/// Only the counters of the voice outlive a panic, and they are plain numbers.
async fn caught(actor: impl Future<Output = Ended>) -> Ended {
    AssertUnwindSafe(actor)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| {
            let text = panic_message(panic.as_ref()).unwrap_or("without a text");
            Ended::Internal(format!("the participant panicked: {text}"))
        })
}

/// What a panic said, where it said it in words.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> Option<&str> {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

/// For tests: whom a participant of theirs waits for is `support`.
#[cfg(test)]
pub(super) fn request(endpoint: Endpoint) -> JoinRequest {
    JoinRequest {
        endpoint,
        keys: super::test_server::keys(),
        room: RoomName("room".to_owned()),
        identity: "canary-echo".to_owned(),
        attributes: BTreeMap::new(),
        agent_name: Some("support".to_owned()),
        room_config: None,
        echo: Echo::default(),
        speech: Speech::default(),
        signal_timeout: Duration::from_secs(10),
        ice: Ice::default(),
        transcript: true,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn request(port: u16) -> JoinRequest {
        let url = format!("ws://127.0.0.1:{port}").parse().unwrap();
        super::request(Endpoint::new(&url, None).unwrap())
    }

    /// The events up to the end of the channel.
    async fn all(mut participant: Participant) -> Vec<Seen> {
        let mut seen = Vec::new();
        while let Some(event) = participant.events.recv().await {
            seen.push(event.seen);
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
                [Seen::Ended {
                    why: Ended::Signal(SignalError::Unreachable(_)),
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
        assert!(matches!(first.seen, Seen::SignalRequested));
        participant.leave();
        let seen = all(participant).await;
        assert!(
            matches!(
                seen[..],
                [Seen::Ended {
                    why: Ended::Left,
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
        let why = caught(actor).await;
        assert!(
            matches!(&why, Ended::Internal(text) if text.contains("a fault of ours")),
            "{why:?}"
        );
    }
}
