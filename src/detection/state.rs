//! The state of a target: what its rooms show of the agent and of LiveKit, and when the canary must look again.
//!
//! Pure: it knows no clock, no batch and no disk. Each room and each turn of the daemon's loop gives it the time. It is stored
//! as JSON, so that a restart continues where the last run ended.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::config::Confirm;
use crate::probe::{Origin, Outcome};

/// A shorter fault is a blip and no outage: from the first failed room to the deciding one.
const MIN_OUTAGE: TimeDelta = TimeDelta::seconds(30);
/// A failure so soon after the end of an incident continues it.
const CONTINUED_WITHIN: TimeDelta = TimeDelta::minutes(15);
/// This many more bad rooms than good ones, after the first bad one, are an outage.
const FAILING_LEAD: i32 = 2;
/// Bad rooms that opened after the first failure was known. Rooms of one moment may fail for one cause that is over.
const MIN_CONFIRMING_FAILURES: u32 = 2;
/// This many good rooms in a row end a suspicion.
const DISMISSING_ROOMS: u32 = 2;
/// This many good rooms in a row end an outage.
const RECOVERED_ROOMS: u32 = 3;
/// How often the canary looks at the begin of an outage.
const FAILING_INTERVAL: TimeDelta = TimeDelta::minutes(1);
/// From then on it looks less often, the longer the outage lasts.
const FREQUENT_FOR: TimeDelta = TimeDelta::minutes(30);

/// What the canary knows of a target.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(crate) enum TargetState {
    /// The canary just started, the target is paused, or no room has given a verdict for 2.5 intervals.
    #[default]
    Unknown,
    /// The last rooms were good.
    Healthy,
    /// A room failed, and more rooms are to confirm it.
    Suspect,
    /// An incident is open.
    Failing,
}

impl TargetState {
    pub(crate) const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The value of the label `state`.
    pub(crate) fn label(self) -> &'static str {
        self.into()
    }
}

/// Whose fault an outage is.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Fault {
    /// The agent, or nothing proves that it is not the agent.
    Agent,
    /// LiveKit or the network.
    Service,
}

impl Fault {
    pub(crate) const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The value of the label `fault`.
    pub(crate) fn label(self) -> &'static str {
        self.into()
    }
}

/// What one room shows of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    Bad(Fault),
    /// Nothing: a plan limit, wrong settings, another user of the room, or a fault of the canary.
    None,
}

impl Verdict {
    /// Whether the room shows how the agent is.
    pub(crate) fn is_on_agent(self) -> bool {
        matches!(self, Self::Good | Self::Bad(Fault::Agent))
    }

    pub(crate) fn of(outcome: &Outcome) -> Self {
        let failure = match outcome {
            Outcome::Ok => return Self::Good,
            Outcome::Aborted => return Self::None,
            Outcome::Failed(failure) => failure,
        };
        match failure.reason.origin() {
            Origin::Agent | Origin::Undetermined => Self::Bad(Fault::Agent),
            Origin::Livekit | Origin::Network => Self::Bad(Fault::Service),
            Origin::Limit | Origin::External | Origin::Config | Origin::Canary => Self::None,
        }
    }
}

/// A change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transition {
    /// A room failed.
    Suspected,
    /// The suspicion was wrong.
    Dismissed,
    /// An outage. Its first failed room ended at `began_at`.
    Failed {
        began_at: DateTime<Utc>,
        fault: Fault,
        /// The incident before it ended a short time ago, and goes on.
        continues: bool,
    },
    /// The first good room of a target whose state was unknown.
    Found,
    /// The outage is over.
    Recovered,
    /// No verdict for too long.
    Lost,
}

/// A confirmation batch that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DueConfirmation {
    pub(crate) at: DateTime<Utc>,
    pub(crate) rooms: usize,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateMachine {
    state: TargetState,
    since: DateTime<Utc>,
    /// The last room with a verdict.
    last_verdict_at: Option<DateTime<Utc>>,
    good_in_a_row: u32,
    doubt: Option<Doubt>,
    /// An incident is open. It stays open while the state is unknown.
    fault: Option<Fault>,
    /// When the last incident ended.
    recovered_at: Option<DateTime<Utc>>,
    /// The end of the last confirmation batch since the first failure, or the time at which it was denied.
    last_attempt_at: Option<DateTime<Utc>>,
    /// Confirmation batches since the first failure.
    attempts: u32,
}

/// What was seen since a room failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Doubt {
    first_bad_at: DateTime<Utc>,
    /// Bad rooms minus good ones, without the first.
    lead: i32,
    confirming_failures: u32,
    confirming_good_in_a_row: u32,
    agent_failures: u32,
    service_failures: u32,
}

impl Doubt {
    fn new(at: DateTime<Utc>, fault: Fault) -> Self {
        let mut doubt = Self {
            first_bad_at: at,
            lead: 0,
            confirming_failures: 0,
            confirming_good_in_a_row: 0,
            agent_failures: 0,
            service_failures: 0,
        };
        doubt.blame(fault);
        doubt
    }

    fn blame(&mut self, fault: Fault) {
        match fault {
            Fault::Agent => self.agent_failures += 1,
            Fault::Service => self.service_failures += 1,
        }
    }

    fn bad(&mut self, fault: Fault, confirming: bool) {
        self.blame(fault);
        self.lead += 1;
        if confirming {
            self.confirming_failures += 1;
            self.confirming_good_in_a_row = 0;
        }
    }

    fn good(&mut self, confirming: bool) {
        self.lead -= 1;
        self.confirming_good_in_a_row += u32::from(confirming);
    }

    fn is_outage(&self, now: DateTime<Utc>) -> bool {
        self.lead >= FAILING_LEAD
            && self.confirming_failures >= MIN_CONFIRMING_FAILURES
            && now - self.first_bad_at >= MIN_OUTAGE
    }

    fn fault(&self) -> Fault {
        if self.service_failures > self.agent_failures {
            Fault::Service
        } else {
            Fault::Agent
        }
    }
}

impl StateMachine {
    pub(crate) fn new(now: DateTime<Utc>) -> Self {
        Self {
            state: TargetState::Unknown,
            since: now,
            last_verdict_at: None,
            good_in_a_row: 0,
            doubt: None,
            fault: None,
            recovered_at: None,
            last_attempt_at: None,
            attempts: 0,
        }
    }

    pub(crate) fn state(&self) -> TargetState {
        self.state
    }

    pub(crate) fn since(&self) -> DateTime<Utc> {
        self.since
    }

    /// Whose fault the open incident is; `None` if none is open.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// A room has ended at `now`. It opened at `opened_at`.
    pub(crate) fn room(
        &mut self,
        opened_at: DateTime<Utc>,
        now: DateTime<Utc>,
        verdict: Verdict,
    ) -> Option<Transition> {
        match verdict {
            Verdict::None => None,
            Verdict::Good => {
                self.last_verdict_at = Some(now);
                self.good(opened_at, now)
            }
            Verdict::Bad(fault) => {
                self.last_verdict_at = Some(now);
                self.bad(opened_at, now, fault)
            }
        }
    }

    fn good(&mut self, opened_at: DateTime<Utc>, now: DateTime<Utc>) -> Option<Transition> {
        self.good_in_a_row += 1;
        if self.fault.is_some() {
            return if self.good_in_a_row >= RECOVERED_ROOMS {
                Some(self.recover(now))
            } else if self.state == TargetState::Unknown {
                self.enter(TargetState::Failing, now);
                None
            } else {
                None
            };
        }
        match self.state {
            TargetState::Unknown => {
                self.enter(TargetState::Healthy, now);
                Some(Transition::Found)
            }
            TargetState::Suspect => {
                let doubt = self.doubt.as_mut()?;
                doubt.good(opened_at >= doubt.first_bad_at);
                if doubt.confirming_good_in_a_row < DISMISSING_ROOMS {
                    return None;
                }
                self.enter(TargetState::Healthy, now);
                self.forget_doubt();
                Some(Transition::Dismissed)
            }
            TargetState::Healthy | TargetState::Failing => None,
        }
    }

    fn bad(
        &mut self,
        opened_at: DateTime<Utc>,
        now: DateTime<Utc>,
        fault: Fault,
    ) -> Option<Transition> {
        self.good_in_a_row = 0;
        if self.fault.is_some() {
            // After a time without verdicts, the incident goes on.
            if self.state != TargetState::Failing {
                self.enter(TargetState::Failing, now);
            }
            return None;
        }
        let Some(doubt) = &mut self.doubt else {
            self.doubt = Some(Doubt::new(now, fault));
            self.enter(TargetState::Suspect, now);
            return Some(Transition::Suspected);
        };
        doubt.bad(fault, opened_at >= doubt.first_bad_at);
        let doubt = *doubt;
        doubt.is_outage(now).then(|| self.fail(doubt, now))
    }

    fn fail(&mut self, doubt: Doubt, now: DateTime<Utc>) -> Transition {
        let fault = doubt.fault();
        let continues = self
            .recovered_at
            .is_some_and(|at| doubt.first_bad_at - at < CONTINUED_WITHIN);
        self.enter(TargetState::Failing, now);
        self.fault = Some(fault);
        self.forget_doubt();
        self.last_attempt_at = Some(now);
        Transition::Failed {
            began_at: doubt.first_bad_at,
            fault,
            continues,
        }
    }

    fn recover(&mut self, now: DateTime<Utc>) -> Transition {
        self.enter(TargetState::Healthy, now);
        self.fault = None;
        self.recovered_at = Some(now);
        self.forget_doubt();
        Transition::Recovered
    }

    /// Time has passed. Without a verdict for `silence`, the state is unknown.
    pub(crate) fn elapse(&mut self, now: DateTime<Utc>, silence: Duration) -> Option<Transition> {
        let last = self.last_verdict_at.unwrap_or(self.since).max(self.since);
        let silent = (now - last).to_std().is_ok_and(|time| time >= silence);
        if !silent || self.state == TargetState::Unknown {
            return None;
        }
        self.enter(TargetState::Unknown, now);
        self.good_in_a_row = 0;
        self.forget_doubt();
        Some(Transition::Lost)
    }

    /// The target is paused. Returns whether an incident was open: it ends without a recovery.
    pub(crate) fn pause(&mut self, now: DateTime<Utc>) -> bool {
        let was_open = self.fault.is_some();
        *self = Self::new(now);
        was_open
    }

    /// The next confirmation batch; `None` if there is nothing to confirm.
    pub(crate) fn next_confirmation(&self, confirm: &Confirm) -> Option<DueConfirmation> {
        let after = time_delta(confirm.after);
        let longest = time_delta(confirm.longest);
        match (self.state, &self.doubt) {
            (TargetState::Suspect, Some(doubt)) => {
                let at = match self.last_attempt_at {
                    None => doubt.first_bad_at + after,
                    Some(last) => last + (after * 2_i32.pow(self.attempts.min(16))).min(longest),
                };
                Some(DueConfirmation {
                    at,
                    rooms: confirm.rooms,
                })
            }
            (TargetState::Failing, _) => {
                let last = self.last_attempt_at.unwrap_or(self.since);
                Some(if self.good_in_a_row > 0 {
                    let rooms = RECOVERED_ROOMS.saturating_sub(self.good_in_a_row).max(1);
                    DueConfirmation {
                        at: last + after,
                        rooms: usize::try_from(rooms).unwrap_or(1),
                    }
                } else {
                    let lasted = last - self.since;
                    let interval = FAILING_INTERVAL * i32::from(lasted < FREQUENT_FOR)
                        + (lasted / 30) * i32::from(lasted >= FREQUENT_FOR);
                    DueConfirmation {
                        at: last + interval.min(longest),
                        rooms: 1,
                    }
                })
            }
            _ => None,
        }
    }

    /// A confirmation batch has ended, or was denied.
    pub(crate) fn confirmation_attempted(&mut self, now: DateTime<Utc>) {
        self.last_attempt_at = Some(now);
        self.attempts = self.attempts.saturating_add(1);
    }

    fn enter(&mut self, state: TargetState, now: DateTime<Utc>) {
        self.state = state;
        self.since = now;
    }

    fn forget_doubt(&mut self) {
        self.doubt = None;
        self.attempts = 0;
        self.last_attempt_at = None;
    }
}

fn time_delta(duration: Duration) -> TimeDelta {
    TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX)
}
