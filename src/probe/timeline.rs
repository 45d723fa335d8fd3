//! Milestones, spans and turns: when each thing was first seen, on one monotonic clock.

use std::time::Duration;

use tokio::time::Instant;

/// A first-seen mark. They come in no fixed order: an agent can join before the dispatch call returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Milestone {
    Started,
    RoomCreated,
    SignalConnected,
    /// Both transports are up.
    MediaConnected,
    EchoPublished,
    /// Just before the request that makes LiveKit dispatch.
    DispatchSent,
    DispatchAccepted,
    AgentJoined,
    AgentListening,
    AgentTrackSubscribed,
    /// The first RTP packet of the agent's audio.
    AgentFirstAudio,
    AgentSpoke,
    Left,
    RoomDeleted,
}

/// A named time between two milestones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Span {
    RoomCreate,
    Signal,
    Media,
    Publish,
    Dispatch,
    AgentJoin,
    AgentTrack,
    FirstAudio,
    FirstSpeech,
    /// The first turn's reply delay; the only span that comes from a turn.
    Reply,
}

#[derive(Debug, Clone, Default)]
pub struct Timeline {}

/// An utterance of the agent, its echo, and the reply.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turn {
    pub agent_started: Option<Instant>,
    pub agent_ended: Option<Instant>,
    pub echo_started: Option<Instant>,
    pub echo_ended: Option<Instant>,
    pub replied: Option<Instant>,
    /// The agent spoke while its echo played; such a turn has no reply delay.
    pub overlap: bool,
}

impl Turn {
    /// From the end of the echo to the reply; `None` where either is missing, they are reversed, or speech overlapped.
    pub fn reply_delay(&self) -> Option<Duration> {
        todo!("probe")
    }
}
