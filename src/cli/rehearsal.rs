//! What brings each reason about on this machine: `drill` plays one, `demo` several by turns.

use crate::config::RawConfig;
use crate::probe::{LimitKind, Reason};

/// One fault, and the reason that the canary must find.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rehearsal {
    pub(super) reason: Reason,
    /// Follows "fault:" or "fault in room 2:".
    pub(super) what: &'static str,
    pub(super) how: How,
}

/// Where the fault lies.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum How {
    /// The sandbox plays it, in the words of its `--fault`.
    Sandbox(&'static str),
    /// The daemon's settings are wrong.
    Settings(Wrong),
    /// Every probe of the canary's own panics.
    Panic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// The project's URL has a port that nobody listens on.
    Port,
    /// Its URL has a path that nothing is under.
    Path,
    Secret,
}

const fn sandbox(reason: Reason, what: &'static str, fault: &'static str) -> Rehearsal {
    Rehearsal {
        reason,
        what,
        how: How::Sandbox(fault),
    }
}

const fn limit(kind: LimitKind, what: &'static str, fault: &'static str) -> Rehearsal {
    sandbox(Reason::PlanLimit(kind), what, fault)
}

const fn settings(reason: Reason, what: &'static str, wrong: Wrong) -> Rehearsal {
    Rehearsal {
        reason,
        what,
        how: How::Settings(wrong),
    }
}

/// In the order of [`Reason::ALL`].
#[rustfmt::skip]
pub(super) const ALL: &[Rehearsal] = &[
    sandbox(Reason::AgentNoShow, "a worker accepts the job and never joins", "never_joins"),
    sandbox(Reason::DispatchUnanswered, "no worker accepts the job", "never_accepts"),
    sandbox(Reason::AgentNoTrack, "the agent joins without an audio track", "no_track"),
    sandbox(Reason::AgentSilent, "the agent joins and stays silent", "silent_track"),
    sandbox(Reason::AgentNoReply, "the agent never answers what it hears", "no_reply"),
    sandbox(Reason::AgentLeftEarly, "the agent leaves while it greets", "leaves_early=800ms"),
    sandbox(Reason::AgentDuplicate, "a second agent joins", "duplicate"),
    sandbox(Reason::RoomCreateFailed, "CreateRoom gets HTTP 500", "create_room=500"),
    sandbox(Reason::DispatchFailed, "CreateDispatch gets HTTP 500", "create_dispatch=500"),
    sandbox(Reason::SignalFailed, "the signal connection gets HTTP 500", "upgrade=500"),
    sandbox(Reason::SignalLost, "the signal connection drops", "after_join=drop"),
    sandbox(Reason::PublishFailed, "the server answers nothing after the join", "after_join=hang"),
    settings(Reason::Unreachable, "nobody listens on the server's port", Wrong::Port),
    sandbox(Reason::MediaFailed, "no media packet gets through", "no_media"),
    sandbox(Reason::Removed, "somebody removes the canary from its room", "after_join=remove"),
    limit(LimitKind::Connections, "the signal connection gets HTTP 429, Retry-After", "upgrade=429,retry_after=30s"),
    limit(LimitKind::ApiRate, "CreateRoom gets HTTP 429", "create_room=429"),
    limit(LimitKind::AgentSessions, "the plan's agent sessions are used up", "create_dispatch=resource_exhausted"),
    limit(LimitKind::Inference, "the agent's inference gets HTTP 429", "inference_error"),
    limit(LimitKind::Quota, "the plan's monthly quota is used up", "create_room=quota"),
    limit(LimitKind::Node, "the server's node is full, HTTP 503", "upgrade=503"),
    limit(LimitKind::Room, "the server turns the canary away from the room", "before_join=leave"),
    limit(LimitKind::Other, "CreateRoom meets a limit that has no name", "create_room=unnamed"),
    settings(Reason::AuthRejected, "the API secret is not the server's any more", Wrong::Secret),
    settings(Reason::ConfigRejected, "the project's URL has a wrong path", Wrong::Path),
    Rehearsal { reason: Reason::Internal, what: "the canary's own probes panic", how: How::Panic },
];

pub(super) fn of(reason: Reason) -> &'static Rehearsal {
    let mut all = ALL.iter();
    let found = all.find(|rehearsal| rehearsal.reason == reason);
    found.expect("a test looks at every reason")
}

impl Wrong {
    /// Lays the mistake over the settings of `project`, which are right for the server at `url`.
    pub(super) fn lay(self, draft: &mut RawConfig, project: &str, url: &str, closed_port: u16) {
        let (key, value) = match self {
            Self::Port => ("url", format!("ws://127.0.0.1:{closed_port}")),
            Self::Path => ("url", format!("{url}/nowhere")),
            Self::Secret => (
                "api_secret",
                "the secret before the last rotation".to_owned(),
            ),
        };
        draft.set(&["projects", project, key], value, "drill");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::fault::FaultRule;

    #[test]
    fn every_reason_and_every_limit_can_be_played() {
        let limits = LimitKind::ALL.map(Reason::PlanLimit);
        let known = Reason::ALL.into_iter().flat_map(|reason| match reason {
            Reason::PlanLimit(_) => limits.to_vec(),
            reason => vec![reason],
        });
        let played = ALL.iter().map(|rehearsal| rehearsal.reason);
        assert_eq!(played.collect::<Vec<_>>(), known.collect::<Vec<_>>());
    }

    #[test]
    fn the_sandbox_knows_every_fault_that_is_its_own() {
        for rehearsal in ALL {
            if let How::Sandbox(fault) = rehearsal.how {
                let read: Result<FaultRule, _> = fault.parse();
                assert!(read.is_ok(), "{read:?}");
            }
        }
    }
}
