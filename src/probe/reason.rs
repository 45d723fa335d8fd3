//! The one outcome of a probe: the closed set of reasons, who is at fault, and the evidence.

use serde::Serialize;

use crate::livekit::event::TurnMetrics;

#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Ok,
    /// We were told to stop; never a failure.
    Aborted,
    Failed(Failure),
}

impl Outcome {
    /// The `outcome` in output and history.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Aborted => "aborted",
            Self::Failed(_) => "failed",
        }
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
    /// One sentence for a person: what happened, with figures, and what to check.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    AgentNoShow,
    DispatchUnanswered,
    AgentNoTrack,
    AgentSilent,
    AgentNoReply,
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
    /// Every reason; a plan limit once, with a kind that stands for all.
    pub const ALL: [Self; 19] = [
        Self::AgentNoShow,
        Self::DispatchUnanswered,
        Self::AgentNoTrack,
        Self::AgentSilent,
        Self::AgentNoReply,
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
        match self {
            Self::AgentNoShow => "agent_no_show",
            Self::DispatchUnanswered => "dispatch_unanswered",
            Self::AgentNoTrack => "agent_no_track",
            Self::AgentSilent => "agent_silent",
            Self::AgentNoReply => "agent_no_reply",
            Self::AgentLeftEarly => "agent_left_early",
            Self::AgentDuplicate => "agent_duplicate",
            Self::RoomCreateFailed => "room_create_failed",
            Self::DispatchFailed => "dispatch_failed",
            Self::SignalFailed => "signal_failed",
            Self::SignalLost => "signal_lost",
            Self::PublishFailed => "publish_failed",
            Self::Unreachable => "unreachable",
            Self::MediaFailed => "media_failed",
            Self::Removed => "removed",
            Self::PlanLimit(_) => "plan_limit",
            Self::AuthRejected => "auth_rejected",
            Self::ConfigRejected => "config_rejected",
            Self::Internal => "internal",
        }
    }

    pub fn origin(self) -> Origin {
        match self {
            Self::AgentNoShow
            | Self::AgentNoTrack
            | Self::AgentSilent
            | Self::AgentNoReply
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

/// Who is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    pub const ALL: [Self; 8] = [
        Self::Agent,
        Self::Undetermined,
        Self::Livekit,
        Self::Network,
        Self::External,
        Self::Limit,
        Self::Config,
        Self::Canary,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Undetermined => "undetermined",
            Self::Livekit => "livekit",
            Self::Network => "network",
            Self::External => "external",
            Self::Limit => "limit",
            Self::Config => "config",
            Self::Canary => "canary",
        }
    }
}

/// Which limit of the plan or the server the service named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitKind {
    Connections,
    ApiRate,
    AgentSessions,
    Inference,
    Quota,
    Node,
    Room,
    /// The service said that something is used up, and nothing by which to tell what.
    Other,
}

impl LimitKind {
    pub const ALL: [Self; 8] = [
        Self::Connections,
        Self::ApiRate,
        Self::AgentSessions,
        Self::Inference,
        Self::Quota,
        Self::Node,
        Self::Room,
        Self::Other,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ApiRate => "api_rate",
            Self::AgentSessions => "agent_sessions",
            Self::Inference => "inference",
            Self::Quota => "quota",
            Self::Node => "node",
            Self::Room => "room",
            Self::Other => "other",
        }
    }
}

/// What was seen at and around a failure; kept for successes as well, where there is any.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Evidence {
    /// The step that failed (`create_room`, `signal`, `media`, `publish`, `dispatch`, `agent_join`, …).
    pub step: Option<&'static str>,
    pub deadline_seconds: Option<f64>,
    pub http_status: Option<u16>,
    pub twirp_code: Option<String>,
    /// First KiB of the answer, credentials removed.
    pub answer: Option<String>,
    pub retry_after_seconds: Option<f64>,
    /// What `ListDispatch` said before deletion: one line a dispatch; `None` where it was not asked.
    pub dispatches: Option<Vec<String>>,
    /// Everybody seen in the room besides us.
    pub participants: Vec<String>,
    /// What the agent's own session measured, turn by turn.
    pub agent_metrics: Vec<AgentTurn>,
    /// Anything else worth knowing, one sentence each.
    pub notes: Vec<String>,
}

/// What the agent told of one turn, once that was spoken.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AgentTurn {
    /// When it told, in seconds since the probe's start.
    pub at: f64,
    #[serde(flatten)]
    pub metrics: TurnMetrics,
}
