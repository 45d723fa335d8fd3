//! The outcome of a probe: the closed set of reasons, the party at fault, and the evidence.

use serde::Serialize;
use strum::{EnumCount, VariantArray};

use crate::livekit::event::{MediaConnection, SessionEvent, TurnMetrics};

#[derive(Debug, Clone, PartialEq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    Ok,
    /// The canary was asked to stop. Never a failure.
    Aborted,
    Failed(Failure),
}

impl Outcome {
    /// Every label.
    pub const LABELS: [&str; 3] = ["ok", "failed", "aborted"];

    /// The `outcome` in output and history.
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// Whether the service named a limit.
    pub fn is_plan_limit(&self) -> bool {
        matches!(self, Self::Failed(failure) if matches!(failure.reason, Reason::PlanLimit(_)))
    }

    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed(failure) => Some(failure),
            Self::Ok | Self::Aborted => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub reason: Reason,
    /// For a person: what happened, with figures, and what to check.
    pub detail: String,
}

/// Why a probe failed; `docs/reasons.md` explains each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::EnumCount, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Reason {
    AgentNoShow,
    DispatchUnanswered,
    AgentNoTrack,
    AgentSilent,
    AgentNoReply,
    AgentWrongReply,
    AgentNotYielding,
    AgentLeftEarly,
    AgentDuplicate,
    RoomCreateFailed,
    DispatchFailed,
    SignalFailed,
    SignalLost,
    PublishFailed,
    Unreachable,
    MediaFailed,
    Removed,
    PlanLimit(LimitKind),
    AuthRejected,
    ConfigRejected,
    Internal,
}

impl Reason {
    /// Every reason; the plan limit once, with a kind that represents all.
    pub const ALL: [Self; <Self as EnumCount>::COUNT] = [
        Self::AgentNoShow,
        Self::DispatchUnanswered,
        Self::AgentNoTrack,
        Self::AgentSilent,
        Self::AgentNoReply,
        Self::AgentWrongReply,
        Self::AgentNotYielding,
        Self::AgentLeftEarly,
        Self::AgentDuplicate,
        Self::RoomCreateFailed,
        Self::DispatchFailed,
        Self::SignalFailed,
        Self::SignalLost,
        Self::PublishFailed,
        Self::Unreachable,
        Self::MediaFailed,
        Self::Removed,
        Self::PlanLimit(LimitKind::Other),
        Self::AuthRejected,
        Self::ConfigRejected,
        Self::Internal,
    ];

    /// The label value in metrics and the `reason` in output.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub fn origin(self) -> Origin {
        match self {
            Self::AgentNoShow
            | Self::AgentNoTrack
            | Self::AgentSilent
            | Self::AgentNoReply
            | Self::AgentWrongReply
            | Self::AgentNotYielding
            | Self::AgentLeftEarly
            | Self::AgentDuplicate => Origin::Agent,
            Self::DispatchUnanswered => Origin::Undetermined,
            Self::RoomCreateFailed
            | Self::DispatchFailed
            | Self::SignalFailed
            | Self::SignalLost
            | Self::PublishFailed => Origin::Livekit,
            Self::Unreachable | Self::MediaFailed => Origin::Network,
            Self::Removed => Origin::External,
            Self::PlanLimit(_) => Origin::Limit,
            Self::AuthRejected | Self::ConfigRejected => Origin::Config,
            Self::Internal => Origin::Canary,
        }
    }
}

/// The party at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Origin {
    Agent,
    Undetermined,
    Livekit,
    Network,
    External,
    Limit,
    Config,
    Canary,
}

impl Origin {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the `origin` in output.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// Whether such a failure shows something of the service. Other users of the room, wrong settings and the canary's own faults
    /// don't.
    pub fn is_of_service(self) -> bool {
        match self {
            Self::Agent | Self::Undetermined | Self::Livekit | Self::Network | Self::Limit => true,
            Self::External | Self::Config | Self::Canary => false,
        }
    }
}

/// The limit of the plan or the server that the service named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum LimitKind {
    Connections,
    ApiRate,
    AgentSessions,
    Inference,
    Quota,
    Node,
    Room,
    /// The service reported that something is used up, but not what.
    Other,
}

impl LimitKind {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the `limit` in output.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What was seen at and around a failure. Successes have evidence, too.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Evidence {
    /// The step that failed (`create_room`, `signal`, `media`, `publish`, `dispatch`, `agent_join`, …).
    pub step: Option<&'static str>,
    pub deadline_seconds: Option<f64>,
    pub http_status: Option<u16>,
    pub twirp_code: Option<String>,
    /// The first KiB of the answer, without credentials.
    pub answer: Option<String>,
    pub retry_after_seconds: Option<f64>,
    /// What `ListDispatch` returned before the deletion: one line per dispatch; `None` if it was not called.
    pub dispatches: Option<Vec<String>>,
    /// Every other participant that was seen in the room.
    pub participants: Vec<String>,
    /// The tracks that they published: one line per track, as it was at last.
    pub tracks: Vec<String>,
    /// What the agent's own session measured, per turn.
    pub agent_metrics: Vec<AgentTurn>,
    /// What the agent's session reported: states, tools, handoffs, false interruptions.
    pub session: Vec<SessionEntry>,
    /// How the canary's two peer connections reached LiveKit; empty before both are up, and with the engine `libwebrtc`.
    pub media: Vec<MediaConnection>,
    /// The mean level of the agent's speech in dB relative to full scale, to a tenth.
    pub speech_level_dbfs: Option<f64>,
    /// Other observations, one sentence each.
    pub notes: Vec<String>,
}

/// What the agent reported about one turn after it was spoken.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AgentTurn {
    /// When the agent reported it, in seconds since the probe's start.
    pub at: f64,
    #[serde(flatten)]
    pub metrics: TurnMetrics,
}

/// Something that the agent's session reported, without any text of the conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SessionEntry {
    /// When it arrived, in seconds since the probe's start.
    pub at: f64,
    /// `agent_state`, `caller_state`, `tool_started`, `tool_executed`, `handoff`, `false_interruption`, `interrupted`.
    pub event: &'static str,
    /// The state, the tool or the agent.
    pub name: Option<String>,
    /// Whether the tool failed.
    pub is_error: Option<bool>,
}

impl SessionEntry {
    pub(super) const TOOL_EXECUTED: &'static str = "tool_executed";

    /// The entry of an event, without its time; `None` for what is recorded elsewhere.
    pub(super) fn of(event: &SessionEvent) -> Option<Self> {
        let entry = |event, name: &str| Self {
            event,
            name: Some(name.to_owned()),
            ..Self::default()
        };
        Some(match event {
            SessionEvent::AgentState(state) => entry("agent_state", state),
            SessionEvent::CallerSpeaks(true) => entry("caller_state", "speaking"),
            SessionEvent::CallerSpeaks(false) => entry("caller_state", "silent"),
            SessionEvent::ToolStarted(name) => entry("tool_started", name),
            SessionEvent::ToolExecuted { name, is_error } => Self {
                is_error: Some(*is_error),
                ..entry(Self::TOOL_EXECUTED, name)
            },
            SessionEvent::Handoff(agent) => entry("handoff", agent),
            SessionEvent::FalseInterruption { resumed } => entry(
                "false_interruption",
                if *resumed { "resumed" } else { "stopped" },
            ),
            SessionEvent::Message(message) if message.interrupted => Self {
                event: "interrupted",
                ..Self::default()
            },
            SessionEvent::Error(_)
            | SessionEvent::Message(_)
            | SessionEvent::CallerTranscribed { .. } => return None,
        })
    }
}
