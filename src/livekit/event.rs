//! What an engine reports about its room: plain types, with the time at which the engine received each event. The module
//! knows no engine and no transport.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::wire::request::sanitize;
use super::wire::signal::SignalError;

/// The error of a [`RoomEventKind::SubscriptionFailed`] whose track's owner does not permit the canary to subscribe.
/// The others are those of the protobufs' `SubscriptionError`.
pub(crate) const NOT_PERMITTED: &str = "NOT_PERMITTED";

/// The attribute in which an agent reports its own version. LiveKit and livekit-agents set none: `livekit-agents` sends its
/// version only to the server, which shows it to no client. So the agent's author sets this one, when the worker accepts
/// the job (`JobRequest.accept`) or later (`LocalParticipant.set_attributes`).
pub(crate) const AGENT_VERSION: &str = "agent.version";

/// Something that happened in the room.
///
/// `at` is the time of the first receipt: the kernel's timestamp for media, and our code's for everything else.
#[derive(Debug, Clone)]
pub(crate) struct RoomEvent {
    pub(crate) at: Instant,
    pub(crate) kind: RoomEventKind,
}

#[derive(Debug, Clone)]
pub(crate) enum RoomEventKind {
    /// The connection is up, TLS included, and the WebSocket's upgrade request is about to be written.
    SignalRequested,
    SignalConnected {
        room_sid: String,
        server_version: String,
        region: String,
        node: String,
    },
    /// An address at which the server receives media, such as `UDP 192.0.2.1:7882`. Each address is reported once.
    MediaAddress(String),
    /// Both peer connections are up. An engine that cannot tell the path has none.
    MediaConnected {
        path: Option<MediaPath>,
    },
    /// How the media of both peer connections runs now. It replaces the last report.
    MediaConnections(Vec<MediaConnection>),
    /// Media runs on another path, although direct UDP was tried first.
    UdpBlocked,
    /// What else a person should know of the media's path, such as a TURN server that failed and why.
    MediaNote(String),
    /// The server acknowledged the echo track.
    CallerPublished,
    AgentJoined {
        agent: Agent,
        in_join_response: bool,
    },
    /// An agent without a name attribute. Its job shows whether it is the target's.
    NamelessAgent {
        identity: String,
    },
    /// The agent's own connection is established. An agent that is removed before this joins again about 15 s later.
    AgentConnected,
    /// The agent's `lk.agent.state` attribute changed.
    AgentState(String),
    /// The agent's attribute [`AGENT_VERSION`] changed.
    AgentVersion(String),
    AgentTrackSubscribed,
    /// The agent's audio is on a track of another source than MICROPHONE: this one. It comes before the subscription.
    AgentVoiceSource(&'static str),
    /// All audio of the agent is end-to-end encrypted, by this method.
    AgentEncrypted(&'static str),
    /// A participant other than the canary published a track, or changed it.
    TrackChanged(RemoteTrackInfo),
    /// LiveKit could not subscribe the canary to this track.
    SubscriptionFailed {
        track_sid: String,
        error: &'static str,
    },
    /// The first RTP packet of the agent's audio.
    AgentFirstAudio,
    /// The agent began to speak; `at` is the time of the utterance's first sound. It is reported up to 1.2 s later.
    SpeechStarted,
    /// The agent stopped speaking; `at` is the arrival of the utterance's last frame with speech.
    SpeechEnded,
    /// The level of the agent's speech so far in dBFS; sent with each start and end of an utterance.
    SpeechLevel(f32),
    /// The first packet of what the caller says was sent.
    CallerStarted(CallerTurn),
    /// The last packet of it was sent; `sent` counts the packets of the caller's track so far.
    CallerEnded {
        sent: u64,
    },
    /// LiveKit's receiver reports for the caller's track.
    UplinkReported(UplinkReport),
    AgentLeft {
        reason: String,
    },
    /// A participant's `AgentSession` reported this.
    Session {
        identity: String,
        event: SessionEvent,
    },
    /// Part of a transcript. `speaker` is the canary if the transcribed track is ours, whichever participant the sender
    /// names.
    Transcribed {
        speaker: Speaker,
        segment: TranscriptSegment,
    },
    /// A second agent with the target's agent name.
    AgentDuplicate {
        identity: String,
    },
    /// A participant that is neither the canary nor the agent.
    OtherJoined {
        identity: String,
        kind: String,
        agent_name: Option<String>,
    },
    /// Always the last event.
    Ended {
        reason: EndReason,
        audio: AudioStats,
    },
}

/// The transport of the canary's media, the plainest first. Of its two peer connections, the less plain one counts.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    strum::EnumString,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum MediaPath {
    Udp,
    /// Over a TURN server that is reached over UDP.
    RelayUdp,
    Tcp,
    RelayTcp,
    RelayTls,
}

impl MediaPath {
    pub const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// Whether a TURN server is on the path.
    pub(crate) fn is_relayed(self) -> bool {
        matches!(self, Self::RelayUdp | Self::RelayTcp | Self::RelayTls)
    }

    /// `udp`, `relay_tls`, …
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// How one of the canary's two peer connections reaches LiveKit. The names of the fields are keys of the API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MediaConnection {
    /// `publisher` or `subscriber`.
    pub connection: &'static str,
    pub path: MediaPath,
    /// Host and port of the TURN server on the path.
    pub via: Option<String>,
    /// The mean round trip of the ICE checks on the path; `None` until it is measured.
    pub round_trip_seconds: Option<f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Agent {
    pub identity: String,
    pub sid: String,
    pub name: Option<String>,
    /// The join time on the server's clock, in Unix milliseconds.
    pub joined_at_ms: i64,
    /// The join time on our clock, at the latest when the agent was first seen. `None` if the server sent no join time,
    /// or if its clock is not known yet.
    ///
    /// The server reports a participant that neither publishes nor changes an attribute only every three seconds. The
    /// agent can therefore be seen up to three seconds after it joined.
    pub joined: Option<Instant>,
}

/// A track that a participant other than the canary publishes, in the words of the protobufs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteTrackInfo {
    pub(crate) sid: String,
    pub(crate) identity: String,
    /// `AUDIO`, `VIDEO` or `DATA`.
    pub(crate) kind: &'static str,
    pub(crate) source: &'static str,
    pub(crate) name: String,
    pub(crate) muted: bool,
    /// `NONE`, or the method of end-to-end encryption.
    pub(crate) encryption: &'static str,
}

/// Who spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaker {
    Agent,
    /// The canary.
    Caller,
}

/// What the caller says now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CallerTurn {
    /// The line of the script, from 0.
    pub(crate) line: Option<usize>,
    /// It speaks into a reply of the agent on purpose.
    pub(crate) interrupts: bool,
}

impl CallerTurn {
    /// The longest echo: longer speech of the agent is not recorded.
    pub(crate) const MAX_ECHO: Duration = Duration::from_secs(30);

    /// An agent that speaks on for longer than this after the end of an interruption has not yielded to it.
    pub(crate) const MAX_YIELD_AFTER: Duration = Duration::from_secs(1);
}

/// What LiveKit received of the caller's track, by its RTCP receiver reports (RFC 3550, section 6.4.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct UplinkReport {
    /// The report covers this many packets, counted from the first one that was sent.
    pub(crate) covered: u64,
    /// How many of these were lost.
    pub(crate) lost: u64,
}

/// What an `AgentSession` reports to every participant (`livekit_agent_session.proto`).
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum SessionEvent {
    /// An error; the agent may recover from it.
    Error(String),
    /// `lk.agent.state`, or the state as the session reports it.
    AgentState(String),
    /// The session noticed that the caller speaks, or that it stopped.
    CallerSpeaks(bool),
    /// What it understood of the caller so far.
    CallerTranscribed {
        text: TranscriptText,
        is_final: bool,
    },
    /// A message was added to the conversation, after it was spoken.
    Message(SessionMessage),
    /// It called this tool.
    ToolStarted(String),
    ToolExecuted {
        name: String,
        is_error: bool,
    },
    /// Another agent of the session took over; the id of its class.
    Handoff(String),
    /// It paused its speech for something that was no interruption.
    FalseInterruption {
        resumed: bool,
    },
}

/// A message of the conversation, as the session adds it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SessionMessage {
    pub(crate) speaker: Speaker,
    pub(crate) text: TranscriptText,
    /// The agent was interrupted.
    pub(crate) interrupted: bool,
    /// `None` if nothing was measured, as for a fixed text that the agent was asked to speak.
    pub(crate) metrics: Option<TurnMetrics>,
}

/// What an `AgentSession` measured in one turn (`MetricsReport` in livekit-agents' `llm/chat_context.py`). A turn of the
/// caller has the delays of its transcription; a turn of the agent has the delays of the answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TurnMetrics {
    pub speaker: Speaker,
    /// The agent was interrupted.
    pub interrupted: bool,
    /// From the end of the caller's speech to its transcript.
    pub transcription_delay_seconds: Option<f64>,
    /// From the end of the caller's speech to the decision that the turn is over.
    pub end_of_turn_delay_seconds: Option<f64>,
    /// Time spent in the agent's own `on_user_turn_completed` callback.
    pub on_user_turn_completed_delay_seconds: Option<f64>,
    /// Until the first token of the LLM.
    pub llm_ttft_seconds: Option<f64>,
    /// Until the LLM's first sentence, as the TTS receives it.
    pub llm_ttfs_seconds: Option<f64>,
    pub llm_tokens_per_second: Option<f64>,
    /// From the first text to the first audio of the TTS.
    pub tts_ttfb_seconds: Option<f64>,
    /// From the end of the caller's speech to the start of the answer.
    pub e2e_latency_seconds: Option<f64>,
}

impl TurnMetrics {
    /// Those of a turn in which nothing was measured.
    pub(crate) fn none(speaker: Speaker) -> Self {
        Self {
            speaker,
            interrupted: false,
            transcription_delay_seconds: None,
            end_of_turn_delay_seconds: None,
            on_user_turn_completed_delay_seconds: None,
            llm_ttft_seconds: None,
            llm_ttfs_seconds: None,
            llm_tokens_per_second: None,
            tts_ttfb_seconds: None,
            e2e_latency_seconds: None,
        }
    }
}

/// Rounds seconds to microseconds. Anything finer is noise of the scheduler.
pub(crate) fn to_microseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

/// Why a participant is no longer in its room.
#[derive(Debug, Clone)]
pub(crate) enum EndReason {
    /// The canary left because it was asked to.
    Left,
    Signal(SignalError),
    /// The server sent `Leave` with this reason: `ROOM_DELETED`, `PARTICIPANT_REMOVED`, `DUPLICATE_IDENTITY`, …
    Removed {
        reason: String,
    },
    /// A permission that our token granted was revoked during the call (`UpdateParticipant`).
    Revoked(MediaPermission),
    /// The server refused the echo track or did not acknowledge it.
    PublishFailed(String),
    /// ICE or DTLS did not come up, or it failed later.
    MediaFailed {
        transport: &'static str,
        detail: String,
    },
    /// A fault of the canary itself, including a panic.
    Internal(String),
}

/// A permission that a probe needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MediaPermission {
    Publish,
    Subscribe,
}

/// Statistics of the agent's audio from its RTP packets. `jitter` is `None` if no packet arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AudioStats {
    pub packets: u64,
    pub lost: u64,
    /// Interarrival jitter (RFC 3550, 6.4.1).
    pub jitter: Option<Duration>,
}

/// One segment of a transcript, as complete as the agent has sent it so far.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TranscriptSegment {
    /// The participant that spoke, according to the sender.
    pub(crate) identity: String,
    /// The track that was transcribed.
    pub(crate) track: Option<String>,
    /// The segment's id. A later event with the same id replaces the earlier text.
    pub(crate) segment: String,
    pub(crate) text: TranscriptText,
    /// No further update of this segment follows.
    pub(crate) is_final: bool,
    /// When its first part arrived.
    pub(crate) began: Instant,
    /// Received as a `Transcription` packet, the form before text streams.
    pub(crate) older: bool,
}

/// Transcribed speech: at most 1 KiB on one line. It may hold personal data, so `Debug` shows only its length.
#[derive(Clone, PartialEq, Eq)]
pub struct TranscriptText(String);

impl TranscriptText {
    pub(crate) fn new(text: &str) -> Self {
        Self(sanitize(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for TranscriptText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}
