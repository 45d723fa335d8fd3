//! Which service levels a probe counts towards, and whether it was good. Pure functions, so that every output counts alike.

use std::time::Duration;

use crate::config::{CallerMode, Objectives, Target};
use crate::probe::{Milestone, Origin, Outcome, ProbeReport, TurnResult};

/// A service level indicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Sli {
    /// The agent works: the probe is ok.
    Availability,
    /// The agent joins within its threshold, whatever happens later.
    Join,
    /// The agent speaks within its threshold, whatever happens later.
    FirstSpeech,
    /// The agent answers every turn of the caller within its threshold. Only probes that expect replies count.
    Reply,
    /// A caller would have been served. Failures of LiveKit, of the network and of plan limits count too.
    Service,
}

/// How a probe counts towards one [`Sli`]. A good probe is always eligible, so there is no fourth case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliVerdict {
    NotEligible,
    Bad,
    Good,
}

impl Sli {
    pub const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The value of the label `sli`.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// The share of eligible probes that must be good.
    pub fn objective(self, objectives: &Objectives) -> f64 {
        match self {
            Self::Availability => objectives.availability,
            Self::Join => objectives.join,
            Self::FirstSpeech => objectives.first_speech,
            Self::Reply => objectives.reply,
            Self::Service => objectives.service,
        }
    }

    /// The longest good delay: after the dispatch, or after the end of the caller's speech. `None` if only the outcome matters.
    pub fn threshold(self, objectives: &Objectives) -> Option<Duration> {
        match self {
            Self::Join => Some(objectives.join_within),
            Self::FirstSpeech => Some(objectives.first_speech_within),
            Self::Reply => Some(objectives.reply_within),
            Self::Availability | Self::Service => None,
        }
    }

    /// Whether probes of this target can count. If not, the service level has neither an objective nor a threshold.
    pub fn applies_to(self, target: &Target) -> bool {
        match self {
            Self::Reply => target.expect.reply && target.caller.mode != CallerMode::PassThrough,
            // The agent's first speech is a reply if the caller speaks before it.
            Self::FirstSpeech => !target.caller.speaks_first,
            Self::Availability | Self::Join | Self::Service => true,
        }
    }

    /// Judges a probe whose outcome is final.
    pub fn judge(self, report: &ProbeReport, objectives: &Objectives) -> SliVerdict {
        let eligible = match &report.outcome {
            Outcome::Ok => true,
            Outcome::Aborted => false,
            Outcome::Failed(failure) => self.concerns(failure.reason.origin()),
        };
        if !eligible {
            return SliVerdict::NotEligible;
        }
        match self {
            Self::Availability | Self::Service if report.outcome == Outcome::Ok => SliVerdict::Good,
            Self::Availability | Self::Service => SliVerdict::Bad,
            Self::Join => {
                let verdict = judge_delay(report, Milestone::AgentJoined, objectives.join_within);
                // The agent joined before the canary did, so the measured delay is only an upper bound. If the bound is
                // above the threshold, the real delay is unknown.
                if verdict == SliVerdict::Bad && report.join_upper_bound {
                    SliVerdict::NotEligible
                } else {
                    verdict
                }
            }
            Self::Reply => judge_replies(report, objectives.reply_within),
            // The agent's first speech is a reply then.
            Self::FirstSpeech if report.timeline.caller_speaks_first() => SliVerdict::NotEligible,
            Self::FirstSpeech => judge_delay(
                report,
                Milestone::AgentSpoke,
                objectives.first_speech_within,
            ),
        }
    }

    /// Whether failures of this origin count.
    fn concerns(self, origin: Origin) -> bool {
        match self {
            Self::Service => origin.is_of_service(),
            _ => matches!(origin, Origin::Agent | Origin::Undetermined),
        }
    }
}

/// An agent that was in the room before the dispatch was in time: another dispatch had sent it.
fn judge_delay(report: &ProbeReport, milestone: Milestone, within: Duration) -> SliVerdict {
    let Some(at) = report.timeline.get(milestone) else {
        return SliVerdict::Bad;
    };
    let dispatched = report.timeline.get(Milestone::DispatchSent);
    if dispatched.is_none_or(|sent| at.saturating_duration_since(sent) <= within) {
        SliVerdict::Good
    } else {
        SliVerdict::Bad
    }
}

/// A probe counts if a reply was due, and its delay was measured or it did not come.
fn judge_replies(report: &ProbeReport, within: Duration) -> SliVerdict {
    let turns = report.turns.iter().filter(|_| report.expects_reply);
    let judged = turns.filter_map(|turn| match turn.result {
        TurnResult::Unanswered => Some(false),
        _ => Some(turn.reply_delay()? <= within),
    });
    match judged.reduce(|all, good| all && good) {
        None => SliVerdict::NotEligible,
        Some(true) => SliVerdict::Good,
        Some(false) => SliVerdict::Bad,
    }
}

#[cfg(test)]
mod tests;
