//! When the next room of a batch opens, and what stops a ramp. A plain state machine: it opens no room itself.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::{self, Stay};
use crate::probe::{Failure, Outcome, Reason};
use crate::report::{Denial, NotOpened};

/// The settings that rule a ramp.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) rooms: usize,
    pub(super) max_rooms: usize,
    pub(super) ramp: config::RampMode,
    pub(super) interval: Duration,
    pub(super) stay: Stay,
    pub(super) hold: Duration,
    pub(super) stop_after_no_shows: usize,
}

/// How far an opened room has come, as far as the ramp cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RoomState {
    Joining,
    /// Its agent has joined, or its outcome is final: the next room may open beside it.
    Decided,
    Ended,
}

/// Decides when the next room opens.
///
/// `after_join`, rooms staying `together`: when the join of the room before is decided. `one_by_one`: when the room
/// before is gone, so that never more than one is open, which is what a plan of one concurrent session needs. An agent
/// that did not come decides nothing by itself: the probe's outcome does, which follows at once and may be a rejection
/// after which no room may open.
///
/// `interval` and `burst` don't look at the room before; whatever stops a ramp stops `interval` too.
#[derive(Debug)]
pub(super) struct Ramp {
    pub(super) plan: Plan,
    pub(super) rooms: Vec<RoomState>,
    /// When the last room opened.
    opened: Option<Instant>,
    /// Rooms without an agent since the last one with an agent.
    no_shows: usize,
    stopped: Option<Stop>,
    /// Rooms that were to open, but have not yet, stay shut too.
    pub(super) halted: bool,
}

#[derive(Debug)]
pub(super) struct Stop {
    why: String,
    refusal: Option<Denial>,
}

impl Ramp {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan,
            rooms: Vec::new(),
            opened: None,
            no_shows: 0,
            stopped: None,
            halted: false,
        }
    }

    /// Counts the next room as open and says its index, if it may open now.
    pub(super) fn open_next(&mut self, now: Instant) -> Option<usize> {
        let index = self.rooms.len();
        if !self.has_more() || !self.is_ready(now) {
            return None;
        }
        // Rooms that stay together only close once the ramp is over: waiting for a free place would be for ever.
        let open = self.rooms.iter().filter(|room| **room != RoomState::Ended);
        if open.count() >= self.plan.max_rooms {
            self.stop(format!(
                "the project's max_rooms is {}",
                self.plan.max_rooms
            ));
            return None;
        }
        self.rooms.push(RoomState::Joining);
        self.opened = Some(now);
        Some(index)
    }

    fn has_more(&self) -> bool {
        self.stopped.is_none() && self.rooms.len() < self.plan.rooms
    }

    fn is_ready(&self, now: Instant) -> bool {
        let Some(before) = self.rooms.last() else {
            return true;
        };
        match (self.plan.ramp, self.plan.stay) {
            (config::RampMode::AfterJoin, Stay::Together) => *before != RoomState::Joining,
            (config::RampMode::AfterJoin, Stay::OneByOne) => *before == RoomState::Ended,
            (config::RampMode::Interval, _) => self.due().is_some_and(|due| due <= now),
            (config::RampMode::Burst, _) => true,
        }
    }

    /// When the next room opens if nothing but time has to pass.
    pub(super) fn due(&self) -> Option<Instant> {
        let timed = self.plan.ramp == config::RampMode::Interval && self.has_more();
        self.opened
            .filter(|_| timed)
            .map(|opened| opened + self.plan.interval)
    }

    pub(super) fn joined(&mut self, index: usize) {
        if self.rooms[index] == RoomState::Joining {
            self.rooms[index] = RoomState::Decided;
            self.no_shows = 0;
        }
    }

    pub(super) fn outcome_decided(&mut self, index: usize, outcome: &Outcome) {
        if let Outcome::Failed(failure) = outcome
            && let Some(why) = stops_the_batch(failure)
        {
            self.halt(why.to_owned());
        }
        if self.rooms[index] != RoomState::Joining {
            return;
        }
        self.rooms[index] = RoomState::Decided;
        self.no_shows += 1;
        if self.no_shows == self.plan.stop_after_no_shows {
            self.halt(match self.no_shows {
                1 => "no agent came to a room".to_owned(),
                n => format!("no agent came to {n} rooms in a row"),
            });
        }
    }

    pub(super) fn ended(&mut self, index: usize, outcome: &Outcome) {
        self.outcome_decided(index, outcome);
        self.rooms[index] = RoomState::Ended;
    }

    /// The first reason stands.
    fn stop(&mut self, why: String) {
        self.stopped.get_or_insert(Stop { why, refusal: None });
    }

    pub(super) fn halt(&mut self, why: String) {
        self.stop(why);
        self.halted = true;
    }

    pub(super) fn refused(&mut self, refusal: Denial) {
        self.stopped.get_or_insert(Stop {
            why: refusal.to_string(),
            refusal: Some(refusal),
        });
        self.halted = true;
    }

    /// No room opens any more, and every join is decided.
    pub(super) fn is_over(&self) -> bool {
        !self.has_more() && !self.rooms.contains(&RoomState::Joining)
    }

    pub(super) fn not_opened(self) -> Option<NotOpened> {
        let rooms = self.plan.rooms - self.rooms.len();
        (rooms > 0).then(|| {
            let stop = self.stopped;
            let stop = stop.expect("a ramp ends early only where it was stopped");
            NotOpened {
                rooms,
                why: stop.why,
                refusal: stop.refusal,
            }
        })
    }
}

/// After a rejection more rooms would only meet it again, and cost the project more refused calls.
///
/// The probe's own failure holds the detail.
fn stops_the_batch(failure: &Failure) -> Option<&'static str> {
    Some(match failure.reason {
        Reason::PlanLimit(_) => "a plan limit was met",
        Reason::AuthRejected => "the credentials were rejected",
        Reason::ConfigRejected => "a setting was rejected",
        Reason::Unreachable => "the server could not be reached",
        _ => return None,
    })
}
