//! What an engine reports of its room: plain types, stamped where they were received. It knows no engine and no transport.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::wire::request::sanitize;
use super::wire::signal::SignalError;

/// Something seen in the room, stamped on first receipt: in our code, and what came as media in the kernel.
#[derive(Debug, Clone)]
pub struct RoomEvent {
    pub at: Instant,
    pub kind: RoomEventKind,
}

#[derive(Debug, Clone)]
pub enum RoomEventKind {
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
        segment: TranscriptSegment,
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
        reason: EndReason,
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
pub enum EndReason {
    /// We left, as asked.
    Left,
    Signal(SignalError),
    /// The server's `Leave`, by its reason (`ROOM_DELETED`, `PARTICIPANT_REMOVED`, `DUPLICATE_IDENTITY`, …).
    Removed {
        reason: String,
    },
    /// A right that our token granted was taken away in mid-call (`UpdateParticipant`).
    Revoked(MediaPermission),
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
pub enum MediaPermission {
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

/// A stretch of speech in words, as far as it is known.
#[derive(Debug, Clone, PartialEq)]
pub struct TranscriptSegment {
    /// Who spoke, by the sender's word.
    pub identity: String,
    /// The track that was written down.
    pub track: Option<String>,
    /// What is told again of a segment replaces what was told before.
    pub segment: String,
    pub text: TranscriptText,
    /// Nothing more will come of it.
    pub is_final: bool,
    /// When the first of it came.
    pub began: Instant,
    /// From a packet of the older form.
    pub older: bool,
}

/// What somebody said: at most 1 KiB on one line. It may hold personal data, so `Debug` gives only its length.
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
