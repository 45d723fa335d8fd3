//! The one outcome of a probe: the closed set of reasons, who is at fault, and the evidence.

use std::time::Duration;

use livekit_protocol::DisconnectReason;
use serde::Serialize;

use crate::livekit::event::TurnMetrics;
use crate::livekit::wire::api::ApiError;
use crate::livekit::wire::connect::{ConnectError, Refusal};
use crate::livekit::wire::signal::SignalError;

/// Longest quote of a server's words in a `detail`; the evidence keeps more.
const QUOTE: usize = 200;

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

/// A call of the server API whose failure ends the probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    CreateRoom,
    Dispatch,
}

impl Step {
    fn label(self) -> &'static str {
        match self {
            Self::CreateRoom => "create_room",
            Self::Dispatch => "dispatch",
        }
    }

    fn call(self) -> &'static str {
        match self {
            Self::CreateRoom => "CreateRoom",
            Self::Dispatch => "CreateDispatch",
        }
    }

    fn reason(self) -> Reason {
        match self {
            Self::CreateRoom => Reason::RoomCreateFailed,
            Self::Dispatch => Reason::DispatchFailed,
        }
    }
}

impl Failure {
    pub(super) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    /// What a failed call of the server API means.
    pub(super) fn of_api(step: Step, error: &ApiError, evidence: &mut Evidence) -> Self {
        evidence.step = Some(step.label());
        let call = step.call();
        match error {
            ApiError::Unreachable(error) => Self::unreachable(error),
            ApiError::Refused(refusal) => {
                evidence.keep(refusal);
                Self::of_refused_call(step, refusal)
            }
            ApiError::Timeout(limit) => {
                evidence.deadline_seconds = Some(limit.as_secs_f64());
                let detail = format!(
                    "{call} had no answer within {limit:?}: LiveKit is overloaded or hangs; check its status and load"
                );
                Self::new(step.reason(), detail)
            }
            ApiError::Broken(_) | ApiError::Protocol(_) => {
                let error = quote(&error.to_string());
                let detail =
                    format!("{call} failed: {error}; check LiveKit and any proxy in front of it");
                Self::new(step.reason(), detail)
            }
        }
    }

    fn of_refused_call(step: Step, refusal: &Refusal) -> Self {
        let said = said(refusal);
        let call = step.call();
        if let Some(kind) = api_limit(refusal) {
            return Self::limit(kind, &format!("{call} met a limit: {said}"), refusal);
        }
        match (refusal.status, refusal.twirp_code.as_deref()) {
            (401 | 403, _) | (_, Some("unauthenticated" | "permission_denied")) => {
                Self::auth_rejected(call, &said)
            }
            // The room was there a moment ago: no setting explains that it is not known.
            (_, Some("not_found")) if step == Step::Dispatch => Self::new(
                step.reason(),
                format!("{call} failed: {said}; check who deletes rooms of this project"),
            ),
            (404, _) | (_, Some("not_found" | "bad_route")) => Self::new(
                Reason::ConfigRejected,
                format!(
                    "{call} is not known there: {said}; is the project's url right, its path included?"
                ),
            ),
            _ => Self::new(
                step.reason(),
                format!("{call} was refused: {said}; check LiveKit's status and log"),
            ),
        }
    }

    /// What a signal connection that failed before the join response means.
    pub(super) fn of_join(error: &SignalError, evidence: &mut Evidence) -> Self {
        evidence.step = Some("signal");
        match error {
            SignalError::Unreachable(error) => Self::unreachable(error),
            SignalError::Refused(refusal) => {
                evidence.keep(refusal);
                Self::of_refused_join(refusal)
            }
            SignalError::JoinTimeout(limit) => {
                evidence.deadline_seconds = Some(limit.as_secs_f64());
                let detail = format!(
                    "LiveKit sent no join response within {limit:?}: check its load and any proxy that holds WebSockets back"
                );
                Self::new(Reason::SignalFailed, detail)
            }
            SignalError::LeftBeforeJoin { reason } => Self::of_leave_before_join(reason, evidence),
            SignalError::PingTimeout(_) | SignalError::Closed(_) | SignalError::Protocol(_) => {
                let error = quote(&error.to_string());
                let detail = format!("joining failed: {error}; check LiveKit's status and log");
                Self::new(Reason::SignalFailed, detail)
            }
        }
    }

    fn of_refused_join(refusal: &Refusal) -> Self {
        let said = said(refusal);
        if refusal.status == 429 {
            let detail = format!("the signal connection met a limit: {said}");
            return Self::limit(LimitKind::Connections, &detail, refusal);
        }
        if names_node_limit(refusal) {
            let detail = format!("the LiveKit node is full: {said}");
            return Self::limit(LimitKind::Node, &detail, refusal);
        }
        match refusal.status {
            401 | 403 => Self::auth_rejected("the signal connection", &said),
            404 if !refusal.message.contains("room does not exist") => Self::new(
                Reason::ConfigRejected,
                format!(
                    "no signal endpoint there: {said}; is the project's url right, its path included?"
                ),
            ),
            _ => Self::new(
                Reason::SignalFailed,
                format!(
                    "the signal connection was refused: {said}; check LiveKit's status and log"
                ),
            ),
        }
    }

    fn of_leave_before_join(reason: &str, evidence: &mut Evidence) -> Self {
        evidence.answer = Some(format!("Leave {reason}"));
        match DisconnectReason::from_str_name(reason) {
            Some(DisconnectReason::JoinFailure) => Self::new(
                Reason::PlanLimit(LimitKind::Room),
                "LiveKit turned us away from the room (Leave JOIN_FAILURE before the join response): \
                 check the limits on participants and rooms",
            ),
            _ => match Self::of_leave(reason) {
                removed if removed.reason == Reason::Removed => removed,
                _ => Self::new(
                    Reason::SignalFailed,
                    format!(
                        "LiveKit sent Leave ({reason}) before the join response: check its status and log"
                    ),
                ),
            },
        }
    }

    /// What a signal connection that broke after the join response means.
    pub(super) fn of_lost_signal(error: &SignalError, evidence: &mut Evidence) -> Self {
        evidence.step = Some("signal");
        if let SignalError::PingTimeout(limit) = error {
            evidence.deadline_seconds = Some(limit.as_secs_f64());
        }
        let error = quote(&error.to_string());
        Self::new(
            Reason::SignalLost,
            format!("{error}; check whether that LiveKit server was killed, restarted or hangs"),
        )
    }

    /// What the server's `Leave` after the join response means.
    ///
    /// The reasons are those that livekit-server gives: `CONNECTION_TIMEOUT` when a peer connection broke,
    /// `JOIN_FAILURE` when media never came up, `STATE_MISMATCH` for its own failed negotiations.
    pub(super) fn of_leave(reason: &str) -> Self {
        use DisconnectReason as D;
        match DisconnectReason::from_str_name(reason) {
            Some(D::RoomDeleted | D::RoomClosed) => Self::new(
                Reason::Removed,
                format!(
                    "the room was closed under the probe ({reason}): check who deletes rooms of this project"
                ),
            ),
            Some(D::ParticipantRemoved) => Self::new(
                Reason::Removed,
                format!(
                    "somebody removed the echo participant ({reason}): check who moderates rooms of this project"
                ),
            ),
            Some(D::DuplicateIdentity) => Self::new(
                Reason::Removed,
                format!(
                    "another participant took the echo participant's identity ({reason}): check what else joins canary rooms"
                ),
            ),
            Some(D::ConnectionTimeout | D::JoinFailure | D::MediaFailure) => Self::new(
                Reason::MediaFailed,
                format!(
                    "LiveKit lost our media connection ({reason}): check UDP and TCP between here and its media ports"
                ),
            ),
            _ => Self::new(
                Reason::SignalLost,
                format!(
                    "LiveKit ended the session ({reason}): check whether it was restarted or drained"
                ),
            ),
        }
    }

    /// What it means that the agent left with this reason where it should have stayed.
    ///
    /// A room's closing or a server's shutdown reaches the other participants in any order: the agent may be seen to
    /// leave before the server tells us the same, and it is not the agent's fault.
    pub(super) fn of_agent_leave(reason: &str, detail: String) -> Self {
        use DisconnectReason as D;
        match DisconnectReason::from_str_name(reason) {
            Some(D::RoomDeleted | D::RoomClosed | D::ServerShutdown | D::Migration) => {
                Self::of_leave(reason)
            }
            Some(D::ParticipantRemoved) => Self::new(
                Reason::Removed,
                format!(
                    "somebody removed the agent ({reason}): check who moderates rooms of this project"
                ),
            ),
            _ => Self::new(Reason::AgentLeftEarly, detail),
        }
    }

    fn unreachable(error: &ConnectError) -> Self {
        let check = match error {
            ConnectError::Dns { .. } => {
                "check the host in the project's url and this machine's resolver"
            }
            ConnectError::Tcp { .. } => "check that LiveKit runs there, the port, and firewalls",
            ConnectError::Tls { .. } => {
                "check the certificate, its host name, and ca_file where a private CA signed it"
            }
        };
        let error = quote(&error.to_string());
        Self::new(Reason::Unreachable, format!("{error}; {check}"))
    }

    fn auth_rejected(what: &str, said: &str) -> Self {
        Self::new(
            Reason::AuthRejected,
            format!(
                "{what} was refused: {said}; check the project's api_key and api_secret, and that they belong to its url"
            ),
        )
    }

    /// An agent's failure that a limit of its inference explains, by the agent's own word.
    pub(super) fn of_inference_limit(said: &str, failure: &Self) -> Self {
        Self::new(
            Reason::PlanLimit(LimitKind::Inference),
            format!(
                "the agent's inference met a limit: {}; so {}; compare the inference limits of the plan, or of the model's \
                 provider, with all that uses them",
                quote(said),
                failure.reason.label()
            ),
        )
    }

    fn limit(kind: LimitKind, detail: &str, refusal: &Refusal) -> Self {
        let retry = match refusal.retry_after {
            Some(after) => format!("retry after {after:?}"),
            None => "no retry time was given".to_owned(),
        };
        let check = match kind {
            LimitKind::Node => "add nodes or raise limits on the server",
            _ => "compare the plan's limits with all that runs on this project",
        };
        Self::new(
            Reason::PlanLimit(kind),
            format!("{detail}; {retry}; {check}"),
        )
    }
}

impl Evidence {
    fn keep(&mut self, refusal: &Refusal) {
        self.http_status = Some(refusal.status);
        self.twirp_code.clone_from(&refusal.twirp_code);
        self.answer = Some(refusal.message.clone());
        self.retry_after_seconds = refusal.retry_after.as_ref().map(Duration::as_secs_f64);
    }
}

/// The limit that a refused API call names. Only what the service said is a limit.
fn api_limit(refusal: &Refusal) -> Option<LimitKind> {
    if names_node_limit(refusal) {
        return Some(LimitKind::Node);
    }
    if refusal.status != 429 && refusal.twirp_code.as_deref() != Some("resource_exhausted") {
        return None;
    }
    let text = refusal.message.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    Some(if says(&["agent session", "concurrent agent"]) {
        LimitKind::AgentSessions
    } else if says(&["quota", "minutes"]) {
        LimitKind::Quota
    } else if refusal.status == 429 || says(&["rate limit", "too many"]) {
        LimitKind::ApiRate
    } else {
        LimitKind::Other
    })
}

/// LiveKit's inference names its quota; a model's provider answers HTTP 429, which the plugins of livekit-agents put as
/// `status_code=429` into the error.
pub(super) fn names_inference_limit(error: &str) -> bool {
    // The decimals of a timestamp, which stands in the same text, are no number of their own.
    let mut numbers = error.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
    error.contains("inference_quota_exceeded")
        || numbers.any(|number| number.trim_matches('.') == "429")
}

/// livekit-server's words for a node above its own limits: of a join with 503 (`rtc.ErrLimitExceeded`), of a call that
/// picks a room's node with 500 (`routing.ErrNodeLimitReached`).
fn names_node_limit(refusal: &Refusal) -> bool {
    let text = refusal.message.to_lowercase();
    let words = [
        "node has exceeded its configured limit",
        "reached configured limit for node",
    ];
    words.iter().any(|words| text.contains(words))
}

/// A refusal in one line: `HTTP 404 (not_found): requested room does not exist`.
fn said(refusal: &Refusal) -> String {
    let code = refusal.twirp_code.as_ref();
    let code = code
        .map(|code| format!(" ({})", quote(code)))
        .unwrap_or_default();
    match quote(&refusal.message) {
        message if message.is_empty() => format!("HTTP {}{code}", refusal.status),
        message => format!("HTTP {}{code}: {message}", refusal.status),
    }
}

/// A server's words on one line, cut to [`QUOTE`] characters.
pub(super) fn quote(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(QUOTE) {
        Some((cut, _)) => format!("{}…", &line[..cut]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(status: u16, code: Option<&str>, message: &str) -> Refusal {
        Refusal {
            status,
            twirp_code: code.map(str::to_owned),
            message: message.to_owned(),
            retry_after: None,
        }
    }

    fn api(step: Step, status: u16, code: Option<&str>, message: &str) -> Failure {
        let error = ApiError::Refused(refusal(status, code, message));
        Failure::of_api(step, &error, &mut Evidence::default())
    }

    fn join(status: u16, message: &str) -> Failure {
        let error = SignalError::Refused(refusal(status, None, message));
        Failure::of_join(&error, &mut Evidence::default())
    }

    fn connect_errors() -> [ConnectError; 3] {
        let host = || "lk.example".to_owned();
        [
            ConnectError::Dns {
                host: host(),
                error: "no such host".to_owned(),
            },
            ConnectError::Tcp {
                address: "192.0.2.1:443".to_owned(),
                error: "connection refused".to_owned(),
            },
            ConnectError::Tls {
                host: host(),
                error: "invalid peer certificate: UnknownIssuer".to_owned(),
            },
        ]
    }

    fn distinct<const N: usize>(labels: [&'static str; N]) -> bool {
        let mut labels = labels.to_vec();
        assert!(labels.iter().all(|label| {
            label
                .chars()
                .all(|char| char.is_ascii_lowercase() || char == '_')
        }));
        labels.sort_unstable();
        labels.dedup();
        labels.len() == N
    }

    #[test]
    fn labels_are_distinct_snake_case() {
        assert!(distinct(Reason::ALL.map(Reason::label)));
        assert!(distinct(Origin::ALL.map(Origin::label)));
        assert!(distinct(LimitKind::ALL.map(LimitKind::label)));
    }

    #[test]
    fn every_reason_has_the_origin_that_the_design_gives() {
        let table: Vec<_> = Reason::ALL
            .iter()
            .map(|reason| format!("{} {}", reason.label(), reason.origin().label()))
            .collect();
        insta::assert_snapshot!(table.join("\n"));
    }

    #[test]
    fn only_what_the_service_says_is_a_limit() {
        use LimitKind as L;
        let twirp = Some("resource_exhausted");
        let table = [
            (429, None, "slow down", Some(L::ApiRate)),
            (429, twirp, "rate limit exceeded", Some(L::ApiRate)),
            // A proxy may give Twirp's code another status.
            (503, twirp, "rate limit exceeded", Some(L::ApiRate)),
            (
                429,
                twirp,
                "Concurrent Agent Sessions reached",
                Some(L::AgentSessions),
            ),
            (429, twirp, "Monthly QUOTA exceeded", Some(L::Quota)),
            (429, twirp, "no participant minutes left", Some(L::Quota)),
            (
                503,
                None,
                "node has exceeded its configured limit",
                Some(L::Node),
            ),
            (
                500,
                Some("internal"),
                "reached configured limit for node",
                Some(L::Node),
            ),
            // Twirp's older servers gave the code another status, which says nothing of a rate.
            (403, twirp, "no more rooms", Some(L::Other)),
            (503, None, "no healthy upstream", None),
            (500, Some("internal"), "quota of retries used up", None),
        ];
        for (status, code, message, kind) in table {
            let failure = api(Step::CreateRoom, status, code, message);
            let expected = kind.map_or(Reason::RoomCreateFailed, Reason::PlanLimit);
            assert_eq!(failure.reason, expected, "{status} {message}");
        }
        for (status, message, kind) in [
            (429, "too many connections", Some(L::Connections)),
            (503, "node has exceeded its configured limit", Some(L::Node)),
            (500, "reached configured limit for node", Some(L::Node)),
            (503, "no healthy upstream", None),
            (500, "connection closed by media", None),
        ] {
            let expected = kind.map_or(Reason::SignalFailed, Reason::PlanLimit);
            assert_eq!(join(status, message).reason, expected, "{status} {message}");
        }
    }

    #[test]
    fn refusals_that_a_setting_explains_are_its_fault() {
        for status in [401, 403] {
            assert_eq!(
                api(Step::CreateRoom, status, None, "no").reason,
                Reason::AuthRejected
            );
            assert_eq!(join(status, "no").reason, Reason::AuthRejected);
        }
        let not_found = Some("not_found");
        let table = [
            (
                api(Step::CreateRoom, 404, None, "404 page not found"),
                Reason::ConfigRejected,
            ),
            (
                api(Step::CreateRoom, 404, Some("bad_route"), "no handler"),
                Reason::ConfigRejected,
            ),
            (
                api(Step::Dispatch, 404, None, "404 page not found"),
                Reason::ConfigRejected,
            ),
            (
                api(
                    Step::Dispatch,
                    404,
                    not_found,
                    "requested room does not exist",
                ),
                Reason::DispatchFailed,
            ),
            (join(404, "404 page not found"), Reason::ConfigRejected),
            (
                join(404, "requested room does not exist"),
                Reason::SignalFailed,
            ),
        ];
        for (failure, reason) in table {
            assert_eq!(failure.reason, reason, "{}", failure.detail);
        }
    }

    #[test]
    fn refusal_is_kept_as_evidence() {
        let mut evidence = Evidence::default();
        let error = ApiError::Refused(Refusal {
            retry_after: Some(Duration::from_millis(1500)),
            ..refusal(429, Some("resource_exhausted"), "slow\ndown")
        });
        let failure = Failure::of_api(Step::Dispatch, &error, &mut evidence);
        assert_eq!(evidence.step, Some("dispatch"));
        assert_eq!(evidence.http_status, Some(429));
        assert_eq!(evidence.twirp_code.as_deref(), Some("resource_exhausted"));
        assert_eq!(evidence.answer.as_deref(), Some("slow\ndown"));
        assert_eq!(evidence.retry_after_seconds, Some(1.5));
        assert!(failure.detail.contains("slow down"), "{}", failure.detail);
    }

    #[test]
    fn long_answer_is_cut_in_the_detail() {
        let failure = join(500, &"ä".repeat(1000));
        assert!(failure.detail.chars().count() < 400, "{}", failure.detail);
    }

    #[test]
    fn leave_reasons_are_told_apart() {
        let reasons = (0..=20)
            .filter_map(|number| DisconnectReason::try_from(number).ok())
            .map(|reason| reason.as_str_name())
            .chain(["A_REASON_OF_LATER_DAYS"])
            .map(|name| format!("{name}: {}", Failure::of_leave(name).reason.label()));
        insta::assert_snapshot!(reasons.collect::<Vec<_>>().join("\n"));
    }

    #[test]
    fn details_say_what_happened_and_what_to_check() {
        let mut evidence = Evidence::default();
        let second = Duration::from_secs(1);
        let mut failures: Vec<_> = connect_errors()
            .into_iter()
            .map(|error| Failure::of_api(Step::CreateRoom, &error.into(), &mut evidence))
            .collect();
        failures.extend([
            api(Step::CreateRoom, 401, None, "invalid token"),
            api(Step::CreateRoom, 404, None, "404 page not found"),
            api(Step::CreateRoom, 500, Some("internal"), "redis is down"),
            api(
                Step::Dispatch,
                404,
                Some("not_found"),
                "requested room does not exist",
            ),
            api(Step::Dispatch, 429, Some("resource_exhausted"), "slow down"),
            api(
                Step::Dispatch,
                503,
                None,
                "node has exceeded its configured limit",
            ),
            Failure::of_api(Step::Dispatch, &ApiError::Timeout(second), &mut evidence),
            Failure::of_api(
                Step::Dispatch,
                &ApiError::Broken("reset by peer".to_owned()),
                &mut evidence,
            ),
            join(401, "invalid API key"),
            join(404, ""),
            join(429, "too many connections"),
            join(500, "connection closed by media"),
        ]);
        let joins = [
            SignalError::JoinTimeout(second),
            SignalError::Closed("reset by peer".to_owned()),
            SignalError::LeftBeforeJoin {
                reason: "JOIN_FAILURE".to_owned(),
            },
            SignalError::LeftBeforeJoin {
                reason: "ROOM_DELETED".to_owned(),
            },
            SignalError::LeftBeforeJoin {
                reason: "SERVER_SHUTDOWN".to_owned(),
            },
        ];
        failures.extend(joins.map(|error| Failure::of_join(&error, &mut evidence)));
        failures.push(Failure::of_lost_signal(
            &SignalError::PingTimeout(15 * second),
            &mut evidence,
        ));
        let leaves = ["ROOM_DELETED", "PARTICIPANT_REMOVED", "DUPLICATE_IDENTITY"];
        failures.extend(leaves.map(Failure::of_leave));
        failures.extend(["CONNECTION_TIMEOUT", "SERVER_SHUTDOWN"].map(Failure::of_leave));
        let lines = failures
            .iter()
            .map(|failure| format!("{}: {}", failure.reason.label(), failure.detail));
        insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
    }
}
