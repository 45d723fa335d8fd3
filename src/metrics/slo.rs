//! Which objectives a probe counts in, and whether it was good: pure, so that whoever shows SLOs counts the same.

use std::time::Duration;

use crate::config::Objectives;
use crate::probe::{Milestone, Origin, Outcome, ProbeReport};

/// What a service level is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sli {
    /// The agent does its work: the probe is ok.
    Availability,
    /// The agent joins within its threshold, whatever comes later.
    Join,
    /// The agent speaks within its threshold, whatever comes later.
    FirstSpeech,
    /// A caller would have been served: LiveKit, the network and the plan's limits count too.
    Service,
}

/// What a probe says of one [`Sli`]. A good probe is an eligible one: there is no fourth case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    NotEligible,
    Bad,
    Good,
}

impl Sli {
    pub const ALL: [Self; 4] = [
        Self::Availability,
        Self::Join,
        Self::FirstSpeech,
        Self::Service,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Availability => "availability",
            Self::Join => "join",
            Self::FirstSpeech => "first_speech",
            Self::Service => "service",
        }
    }

    /// The share of eligible probes that must be good.
    pub fn objective(self, objectives: &Objectives) -> f64 {
        match self {
            Self::Availability => objectives.availability,
            Self::Join => objectives.join,
            Self::FirstSpeech => objectives.first_speech,
            Self::Service => objectives.service,
        }
    }

    /// The longest delay that is good, from the dispatch on; `None` where only the outcome matters.
    pub fn threshold(self, objectives: &Objectives) -> Option<Duration> {
        match self {
            Self::Join => Some(objectives.join_within),
            Self::FirstSpeech => Some(objectives.first_speech_within),
            Self::Availability | Self::Service => None,
        }
    }

    /// What a probe whose outcome is final says of this.
    pub fn judge(self, report: &ProbeReport, objectives: &Objectives) -> Verdict {
        let eligible = match &report.outcome {
            Outcome::Ok => true,
            Outcome::Aborted => false,
            Outcome::Failed(failure) => self.concerns(failure.reason.origin()),
        };
        if !eligible {
            return Verdict::NotEligible;
        }
        match self {
            Self::Availability | Self::Service if report.outcome == Outcome::Ok => Verdict::Good,
            Self::Availability | Self::Service => Verdict::Bad,
            Self::Join => {
                let verdict = in_time(report, Milestone::AgentJoined, objectives.join_within);
                // The agent was there before us. Where that was too late to prove it in time, nobody knows.
                if verdict == Verdict::Bad && report.join_upper_bound {
                    Verdict::NotEligible
                } else {
                    verdict
                }
            }
            Self::FirstSpeech => in_time(
                report,
                Milestone::AgentSpoke,
                objectives.first_speech_within,
            ),
        }
    }

    /// Whether failures of this origin count against it. What somebody else did to the room, wrong settings and our own
    /// faults count against nobody.
    fn concerns(self, origin: Origin) -> bool {
        match origin {
            Origin::Agent | Origin::Undetermined => true,
            Origin::Livekit | Origin::Network | Origin::Limit => self == Self::Service,
            Origin::External | Origin::Config | Origin::Canary => false,
        }
    }
}

/// An agent that was there before it was dispatched, by another's dispatch, was in time.
fn in_time(report: &ProbeReport, milestone: Milestone, within: Duration) -> Verdict {
    let Some(at) = report.timeline.get(milestone) else {
        return Verdict::Bad;
    };
    let dispatched = report.timeline.get(Milestone::DispatchSent);
    if dispatched.is_none_or(|sent| at.saturating_duration_since(sent) <= within) {
        Verdict::Good
    } else {
        Verdict::Bad
    }
}

#[cfg(test)]
mod tests;
