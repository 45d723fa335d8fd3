//! The one outcome of a probe: the closed set of reasons, who is at fault, and the evidence.

use serde::Serialize;

#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Ok,
    /// We were told to stop; never a failure.
    Aborted,
    Failed(Failure),
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
    Other,
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
    /// Anything else worth knowing, one sentence each.
    pub notes: Vec<String>,
}
