//! The state of a target: what its rooms show of the agent and of LiveKit, and when the canary must look again.
//!
//! Pure: it knows no clock, no batch and no disk. Each room and each turn of the daemon's loop gives it the time. It is stored
//! as JSON, so that a restart continues where the last run ended. `simulation` plays years of it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::config::Confirm;
use crate::probe::{Origin, Outcome};
use crate::report::{Fault, TargetState};

/// A shorter fault is a blip and no outage. A room that opens this long after the first failure was known can't fail for it.
const MIN_OUTAGE: TimeDelta = TimeDelta::seconds(30);
/// A failure within this time after the end of an incident continues it.
const CONTINUED_WITHIN: TimeDelta = TimeDelta::minutes(15);
/// This many more bad rooms than good ones, after the first bad one, are an outage. With one less, independent failures of 5 %
/// of the rooms page 15 times per year, by the simulation.
const FAILING_LEAD: i32 = 3;
/// Bad rooms that opened [`MIN_OUTAGE`] after the first failure was known.
const MIN_CONFIRMING_FAILURES: u32 = 2;
/// This many good rooms in a row end a suspicion.
const DISMISSING_ROOMS: u32 = 2;
/// This many good rooms in a row end an outage in which every room failed.
const RECOVERED_ROOMS: u32 = 3;
/// If good and bad rooms mix, more are needed, because an outage of half of the rooms has three good ones in a row within
/// minutes. The run must be this unlikely within the outage, or have this length.
const CHANCE_OF_RUN: f64 = 0.002;
const MAX_RECOVERED_ROOMS: u32 = 10;
/// The interval of confirmations at the start of an outage.
const FAILING_INTERVAL: TimeDelta = TimeDelta::minutes(1);
/// The interval is at least the age of the outage divided by this, so that an outage of an hour is still looked at every minute.
const OUTAGE_LOOKS: i32 = 60;
/// Maximum time from a good room to the next confirmation in an outage.
const RECOVERY_INTERVAL: TimeDelta = TimeDelta::seconds(15);

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

    /// Whether the room failed; `None` if it shows nothing.
    pub(crate) fn failed(self) -> Option<bool> {
        match self {
            Self::Good => Some(false),
            Self::Bad(_) => Some(true),
            Self::None => None,
        }
    }

    pub(crate) fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Good,
            Outcome::Aborted => Self::None,
            Outcome::Failed(failure) => Self::of_failure(failure.reason.origin()),
        }
    }

    /// What a failed room shows.
    pub(crate) fn of_failure(origin: Origin) -> Self {
        match origin {
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
    /// A target whose state was unknown has a verdict: it is healthy, or its open incident goes on.
    Found,
    /// The outage is over.
    Recovered,
    /// No verdict for too long, since the last one or since the target is known.
    Lost { since: DateTime<Utc> },
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
    /// When this run of the program continued with the state of an earlier one.
    #[serde(skip)]
    restarted_at: Option<DateTime<Utc>>,
    last_bad_at: Option<DateTime<Utc>>,
    /// Good rooms that opened after the last bad one was known.
    good_in_a_row: u32,
    doubt: Option<Doubt>,
    /// The open incident. It stays open while the state is unknown.
    outage: Option<Outage>,
    /// The incident before it.
    ended: Option<EndedOutage>,
    /// The end of the last confirmation batch since the first failure, or the time at which it was denied.
    last_attempt_at: Option<DateTime<Utc>>,
    /// Confirmation batches since the first failure.
    attempts: u32,
}

/// What the rooms showed since one failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Doubt {
    first_bad_at: DateTime<Utc>,
    /// Bad rooms minus good ones, without the first.
    lead: i32,
    confirming_failures: u32,
    confirming_good_in_a_row: u32,
    agent_failures: u32,
    service_failures: u32,
    good: u32,
}

/// An incident, with the rooms that tell how unlikely a run of good rooms is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Outage {
    fault: Fault,
    bad: u32,
    /// Good rooms that bad ones followed.
    good: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct EndedOutage {
    at: DateTime<Utc>,
    outage: Outage,
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
            good: 0,
        };
        doubt.blame(fault);
        doubt
    }

    fn blame(&mut self, fault: Fault) {
        let failures = match fault {
            Fault::Agent => &mut self.agent_failures,
            Fault::Service => &mut self.service_failures,
        };
        *failures = failures.saturating_add(1);
    }

    fn bad(&mut self, opened_at: DateTime<Utc>, fault: Fault) {
        self.blame(fault);
        self.lead = self.lead.saturating_add(1);
        self.confirming_good_in_a_row = 0;
        if opened_at - self.first_bad_at >= MIN_OUTAGE {
            self.confirming_failures = self.confirming_failures.saturating_add(1);
        }
    }

    fn good(&mut self, opened_at: DateTime<Utc>) {
        self.good = self.good.saturating_add(1);
        // A good room before the next failure proves little against an outage of some of the rooms.
        self.lead = self.lead.saturating_sub(1).max(0);
        if opened_at >= self.first_bad_at {
            self.confirming_good_in_a_row += 1;
        }
    }

    fn is_outage(&self) -> bool {
        self.lead >= FAILING_LEAD && self.confirming_failures >= MIN_CONFIRMING_FAILURES
    }

    fn outage(&self) -> Outage {
        Outage {
            fault: if self.service_failures > self.agent_failures {
                Fault::Service
            } else {
                Fault::Agent
            },
            bad: self.agent_failures.saturating_add(self.service_failures),
            good: self.good,
        }
    }
}

impl Outage {
    /// The good rooms in a row that end it.
    fn recovered_rooms(&self) -> u32 {
        // Laplace's rule: a few rooms that all failed don't prove that every room fails.
        let good =
            (f64::from(self.good) + 1.0) / (f64::from(self.good) + f64::from(self.bad) + 2.0);
        let mut chance = 1.0;
        let mut rooms = 0;
        while chance >= CHANCE_OF_RUN && rooms < MAX_RECOVERED_ROOMS {
            chance *= good;
            rooms += 1;
        }
        rooms.max(RECOVERED_ROOMS)
    }
}

impl StateMachine {
    pub(crate) fn new(now: DateTime<Utc>) -> Self {
        Self {
            state: TargetState::Unknown,
            since: now,
            last_verdict_at: None,
            restarted_at: None,
            last_bad_at: None,
            good_in_a_row: 0,
            doubt: None,
            outage: None,
            ended: None,
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
        self.outage.map(|outage| outage.fault)
    }

    /// A room has ended at `now`. It opened at `opened_at`.
    pub(crate) fn room(
        &mut self,
        opened_at: DateTime<Utc>,
        now: DateTime<Utc>,
        verdict: Verdict,
    ) -> Option<Transition> {
        self.forget_the_future(now);
        if verdict != Verdict::None {
            self.last_verdict_at = Some(now);
        }
        match verdict {
            Verdict::None => None,
            Verdict::Good => self.good(opened_at, now),
            Verdict::Bad(fault) => self.bad(opened_at, now, fault),
        }
    }

    fn good(&mut self, opened_at: DateTime<Utc>, now: DateTime<Utc>) -> Option<Transition> {
        if self.last_bad_at.is_none_or(|bad| opened_at >= bad) {
            self.good_in_a_row = self.good_in_a_row.saturating_add(1);
        }
        if let Some(outage) = self.outage {
            if self.good_in_a_row >= outage.recovered_rooms() {
                return Some(self.recover(outage, now));
            }
            return self.resume(now);
        }
        match self.state {
            TargetState::Unknown => {
                self.enter(TargetState::Healthy, now);
                Some(Transition::Found)
            }
            TargetState::Suspect => {
                let doubt = self.doubt.as_mut()?;
                doubt.good(opened_at);
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
        let good_before = std::mem::take(&mut self.good_in_a_row);
        self.last_bad_at = Some(now);
        if let Some(outage) = &mut self.outage {
            outage.bad = outage.bad.saturating_add(1);
            outage.good = outage.good.saturating_add(good_before);
            return self.resume(now);
        }
        let Some(doubt) = &mut self.doubt else {
            // A confirmation that ended after the last suspicion did is none of this one.
            self.forget_doubt();
            self.doubt = Some(Doubt::new(now, fault));
            self.enter(TargetState::Suspect, now);
            return Some(Transition::Suspected);
        };
        doubt.bad(opened_at, fault);
        let doubt = *doubt;
        doubt.is_outage().then(|| self.fail(doubt, now))
    }

    /// After a time without verdicts, the open incident goes on.
    fn resume(&mut self, now: DateTime<Utc>) -> Option<Transition> {
        if self.state == TargetState::Failing {
            return None;
        }
        self.enter(TargetState::Failing, now);
        Some(Transition::Found)
    }

    fn fail(&mut self, doubt: Doubt, now: DateTime<Utc>) -> Transition {
        let mut outage = doubt.outage();
        let continued = self
            .ended
            .filter(|ended| doubt.first_bad_at - ended.at < CONTINUED_WITHIN);
        if let Some(ended) = continued {
            outage.bad = outage.bad.saturating_add(ended.outage.bad);
            outage.good = outage.good.saturating_add(ended.outage.good);
        }
        self.enter(TargetState::Failing, now);
        self.outage = Some(outage);
        self.forget_doubt();
        self.last_attempt_at = Some(now);
        Transition::Failed {
            began_at: doubt.first_bad_at,
            fault: outage.fault,
            continues: continued.is_some(),
        }
    }

    fn recover(&mut self, mut outage: Outage, now: DateTime<Utc>) -> Transition {
        self.enter(TargetState::Healthy, now);
        outage.good = outage.good.saturating_add(self.good_in_a_row);
        self.outage = None;
        self.ended = Some(EndedOutage { at: now, outage });
        self.forget_doubt();
        Transition::Recovered
    }

    /// A new run of the program continues with this state. The time between the runs is no silence of the target.
    pub(crate) fn restart(&mut self, now: DateTime<Utc>) {
        self.restarted_at = Some(now);
    }

    /// Time has passed. Without a verdict for `silence`, the state is unknown.
    pub(crate) fn elapse(&mut self, now: DateTime<Utc>, silence: Duration) -> Option<Transition> {
        self.forget_the_future(now);
        if self.state == TargetState::Unknown || !self.is_silent(now, silence) {
            return None;
        }
        let since = self.last_verdict_at.unwrap_or(self.since);
        self.enter(TargetState::Unknown, now);
        self.good_in_a_row = 0;
        self.forget_doubt();
        Some(Transition::Lost { since })
    }

    /// Whether this run of the program has had no verdict for `silence`, in this state.
    pub(crate) fn is_silent(&self, now: DateTime<Utc>, silence: Duration) -> bool {
        // `None` is less than any time.
        let last = self.last_verdict_at.max(self.restarted_at);
        let last = last.unwrap_or(self.since).max(self.since);
        (now - last).to_std().is_ok_and(|time| time >= silence)
    }

    /// The target is paused. Returns whether an incident was open: it ends without a recovery.
    pub(crate) fn pause(&mut self, now: DateTime<Utc>) -> bool {
        let was_open = self.outage.is_some();
        *self = Self::new(now);
        was_open
    }

    /// The next confirmation batch; `None` if there is nothing to confirm, or confirmations are off.
    pub(crate) fn next_confirmation(&self, confirm: &Confirm) -> Option<DueConfirmation> {
        if confirm.rooms == 0 {
            return None;
        }
        let after = time_delta(confirm.after);
        let longest = time_delta(confirm.longest);
        match (self.state, &self.doubt, self.outage) {
            (TargetState::Suspect, Some(doubt), _) => {
                let wait = match self.attempts {
                    0 => after,
                    attempts => (after * 2_i32.pow((attempts - 1).min(16))).min(longest.max(after)),
                };
                Some(DueConfirmation {
                    at: self.last_attempt_at.unwrap_or(doubt.first_bad_at) + wait,
                    rooms: confirm.rooms,
                })
            }
            (TargetState::Failing, _, Some(outage)) => {
                let last = self.last_attempt_at.unwrap_or(self.since);
                if self.good_in_a_row > 0 {
                    let missing = outage.recovered_rooms().saturating_sub(self.good_in_a_row);
                    let missing = usize::try_from(missing).unwrap_or(usize::MAX);
                    return Some(DueConfirmation {
                        at: last + after.min(RECOVERY_INTERVAL),
                        rooms: missing.clamp(1, confirm.rooms),
                    });
                }
                let lasted = last - self.since;
                let interval = (lasted / OUTAGE_LOOKS).min(longest).max(FAILING_INTERVAL);
                Some(DueConfirmation {
                    at: last + interval,
                    rooms: 1,
                })
            }
            _ => None,
        }
    }

    /// A confirmation batch has ended, or was denied.
    pub(crate) fn confirmation_attempted(&mut self, now: DateTime<Utc>) {
        self.forget_the_future(now);
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

    /// After a backward clock jump, no time of the past is later than now. Otherwise the state could not change until the clock
    /// reaches that time again.
    fn forget_the_future(&mut self, now: DateTime<Utc>) {
        self.since = self.since.min(now);
        let optional = [
            &mut self.last_verdict_at,
            &mut self.restarted_at,
            &mut self.last_bad_at,
            &mut self.last_attempt_at,
        ];
        for at in optional.into_iter().flatten() {
            *at = (*at).min(now);
        }
        if let Some(doubt) = &mut self.doubt {
            doubt.first_bad_at = doubt.first_bad_at.min(now);
        }
        if let Some(ended) = &mut self.ended {
            ended.at = ended.at.min(now);
        }
    }
}

fn time_delta(duration: Duration) -> TimeDelta {
    // A time that chrono can add to any date.
    const MAX: TimeDelta = TimeDelta::days(366);
    TimeDelta::from_std(duration).map_or(MAX, |delta| delta.min(MAX))
}

#[cfg(test)]
mod tests;
