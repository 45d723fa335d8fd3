//! The fault that causes each reason on this machine. `drill` injects one of them, `demo` several in turn.

use crate::config::RawConfig;
use crate::probe::{LimitKind, Reason};

/// A fault, and the reason that the canary must find.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CatalogueFault {
    pub(super) reason: Reason,
    /// Printed after "fault:" or "fault in room 2:".
    pub(super) description: &'static str,
    pub(super) injection: Injection,
    /// What shows the fault, in batches with and without it.
    pub(super) scene: Scene,
}

/// The settings and the agent of batches that can show a fault.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scene {
    /// Keys of the target, and their values.
    pub(super) settings: &'static [(&'static [&'static str], &'static str)],
    /// What the sandbox's agent does, in the syntax of its `--fault`.
    pub(super) agent: Option<&'static str>,
}

impl Scene {
    const PLAIN: Self = Self {
        settings: &[],
        agent: None,
    };

    /// The agent understands its caller, or not.
    const UNDERSTANDING: Self = Self {
        settings: &[(&["expect", "word_error_below"], "0.5")],
        agent: None,
    };

    /// The caller interrupts a reply that is long enough for that.
    const INTERRUPTION: Self = Self {
        settings: &[
            (&["caller", "interrupt"], "true"),
            (&["expect", "yield_within"], "2s"),
        ],
        agent: Some("long_reply"),
    };
}

/// How a fault is injected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Injection {
    /// By the sandbox, in the syntax of its `--fault`.
    Sandbox(&'static str),
    /// By a wrong setting of the daemon.
    Setting(BadSetting),
    /// By a panic in every probe.
    Panic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadSetting {
    /// The port of the project's URL is closed.
    Port,
    /// The path of the project's URL does not exist on the server.
    Path,
    Secret,
}

const fn sandbox(reason: Reason, description: &'static str, fault: &'static str) -> CatalogueFault {
    CatalogueFault {
        reason,
        description,
        injection: Injection::Sandbox(fault),
        scene: Scene::PLAIN,
    }
}

const fn staged(
    reason: Reason,
    description: &'static str,
    fault: &'static str,
    scene: Scene,
) -> CatalogueFault {
    CatalogueFault {
        reason,
        description,
        injection: Injection::Sandbox(fault),
        scene,
    }
}

const fn limit(kind: LimitKind, description: &'static str, fault: &'static str) -> CatalogueFault {
    sandbox(Reason::PlanLimit(kind), description, fault)
}

const fn setting(reason: Reason, description: &'static str, setting: BadSetting) -> CatalogueFault {
    CatalogueFault {
        reason,
        description,
        injection: Injection::Setting(setting),
        scene: Scene::PLAIN,
    }
}

/// One fault per reason and per kind of limit, in the order of [`Reason::ALL`].
#[rustfmt::skip]
pub(super) const FAULTS: &[CatalogueFault] = &[
    sandbox(Reason::AgentNoShow, "a worker accepts the job and never joins", "never_joins"),
    sandbox(Reason::DispatchUnanswered, "no worker accepts the job", "never_accepts"),
    sandbox(Reason::AgentNoTrack, "the agent joins without an audio track", "no_track"),
    sandbox(Reason::AgentSilent, "the agent joins and stays silent", "silent_track"),
    sandbox(Reason::AgentNoReply, "the agent greets and hears nothing", "deaf"),
    staged(Reason::AgentWrongReply, "the agent misunderstands the caller", "word_errors=4", Scene::UNDERSTANDING),
    staged(Reason::AgentNotYielding, "the agent speaks on when it is interrupted", "never_yields", Scene::INTERRUPTION),
    sandbox(Reason::AgentLeftEarly, "the agent leaves while it greets", "leaves_early=800ms"),
    sandbox(Reason::AgentDuplicate, "a second agent joins", "duplicate"),
    sandbox(Reason::RoomCreateFailed, "CreateRoom gets HTTP 500", "create_room=500"),
    sandbox(Reason::DispatchFailed, "CreateDispatch gets HTTP 500", "create_dispatch=500"),
    sandbox(Reason::SignalFailed, "the signal connection gets HTTP 500", "upgrade=500"),
    sandbox(Reason::SignalLost, "the signal connection drops", "after_join=drop"),
    sandbox(Reason::PublishFailed, "the server stops answering after the join", "after_join=hang"),
    setting(Reason::Unreachable, "the server's port is closed", BadSetting::Port),
    sandbox(Reason::MediaFailed, "no media packet arrives", "no_media"),
    sandbox(Reason::Removed, "another program removes the canary", "after_join=remove"),
    limit(LimitKind::Connections, "the signal connection gets HTTP 429, Retry-After", "upgrade=429,retry_after=30s"),
    limit(LimitKind::ApiRate, "CreateRoom gets HTTP 429", "create_room=429"),
    limit(LimitKind::AgentSessions, "the plan's agent sessions are used up", "create_dispatch=resource_exhausted"),
    limit(LimitKind::Inference, "the agent's inference gets HTTP 429", "inference_error"),
    limit(LimitKind::Quota, "the plan's monthly quota is used up", "create_room=quota"),
    limit(LimitKind::Node, "the server's node is full, HTTP 503", "upgrade=503"),
    limit(LimitKind::Room, "the server rejects the canary's join", "before_join=leave"),
    limit(LimitKind::Other, "CreateRoom reports an unknown limit", "create_room=unnamed"),
    setting(Reason::AuthRejected, "the server no longer accepts the API secret", BadSetting::Secret),
    setting(Reason::ConfigRejected, "the path of the project's URL is wrong", BadSetting::Path),
    CatalogueFault { reason: Reason::Internal, description: "the canary's probes panic", injection: Injection::Panic, scene: Scene::PLAIN },
];

pub(super) fn for_reason(reason: Reason) -> &'static CatalogueFault {
    let found = FAULTS.iter().find(|fault| fault.reason == reason);
    found.expect("a test checks that every reason has a fault")
}

impl BadSetting {
    /// Overwrites one setting of `project`, whose settings are right for the server at `url`.
    pub(super) fn apply(self, draft: &mut RawConfig, project: &str, url: &str, closed_port: u16) {
        let (key, value) = match self {
            Self::Port => ("url", format!("ws://127.0.0.1:{closed_port}")),
            Self::Path => ("url", format!("{url}/nowhere")),
            Self::Secret => (
                "api_secret",
                "the-secret-before-the-last-rotation".to_owned(),
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
    fn every_reason_and_every_kind_of_limit_has_a_fault() {
        let limits = LimitKind::ALL.map(Reason::PlanLimit);
        let known = Reason::ALL.into_iter().flat_map(|reason| match reason {
            Reason::PlanLimit(_) => limits.to_vec(),
            reason => vec![reason],
        });
        let in_catalogue = FAULTS.iter().map(|fault| fault.reason);
        assert_eq!(in_catalogue.collect::<Vec<_>>(), known.collect::<Vec<_>>());
    }

    #[test]
    fn the_sandbox_accepts_every_fault_that_it_injects() {
        for fault in FAULTS {
            if let Injection::Sandbox(rule) = fault.injection {
                let parsed: Result<FaultRule, _> = rule.parse();
                assert!(parsed.is_ok(), "{parsed:?}");
            }
            if let Some(agent) = fault.scene.agent {
                let parsed: Result<FaultRule, _> = agent.parse();
                assert!(parsed.is_ok(), "{parsed:?}");
            }
        }
    }
}
