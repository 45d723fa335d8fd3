//! What a failure means: every function that returns a [`Failure`] of the server API, the signal connection or the agent.

use std::time::Duration;

use livekit_protocol::DisconnectReason;

use super::reason::{Evidence, Failure, LimitKind, Reason};
use crate::livekit::wire::api::ApiError;
use crate::livekit::wire::connect::ConnectError;
use crate::livekit::wire::request::HttpRejection;
use crate::livekit::wire::signal::SignalError;

/// Longest quote of a server's words in a `detail`; the evidence keeps more.
const QUOTE: usize = 200;

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

    fn of_refused_call(step: Step, refusal: &HttpRejection) -> Self {
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

    fn of_refused_join(refusal: &HttpRejection) -> Self {
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

    fn limit(kind: LimitKind, detail: &str, refusal: &HttpRejection) -> Self {
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
    fn keep(&mut self, refusal: &HttpRejection) {
        self.http_status = Some(refusal.status);
        self.twirp_code.clone_from(&refusal.twirp_code);
        self.answer = Some(refusal.message.clone());
        self.retry_after_seconds = refusal.retry_after.as_ref().map(Duration::as_secs_f64);
    }
}

/// The limit that a refused API call names. Only what the service said is a limit.
fn api_limit(refusal: &HttpRejection) -> Option<LimitKind> {
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
fn names_node_limit(refusal: &HttpRejection) -> bool {
    let text = refusal.message.to_lowercase();
    let words = [
        "node has exceeded its configured limit",
        "reached configured limit for node",
    ];
    words.iter().any(|words| text.contains(words))
}

/// A refusal in one line: `HTTP 404 (not_found): requested room does not exist`.
fn said(refusal: &HttpRejection) -> String {
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
mod tests;
