//! When the next room of a batch opens, and what stops a ramp. A plain state machine that opens no room itself.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::{self, Stay};
use crate::probe::{Failure, Outcome, Reason};
use crate::report::{Denial, NotOpened};

/// The settings of a ramp.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) rooms: usize,
    /// Turns of the caller in each room.
    pub(super) turns: u32,
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
    /// Its agent has joined, or its outcome is final. The next room may open.
    Decided,
    Ended,
}

/// Decides when the next room opens.
///
/// - `after_join` with rooms that stay `together`: when the join of the room before is decided.
/// - `after_join` with rooms `one_by_one`: when the room before is gone. So at most one is open, as a plan with one
///   concurrent session requires.
/// - `interval` and `burst`: independently of the room before. Everything that stops a ramp stops `interval`, too.
///
/// A missed join deadline alone does not open the next room. The probe's outcome follows at once and does; it may be a
/// rejection, after which no room may open.
#[derive(Debug)]
pub(super) struct Ramp {
    pub(super) plan: Plan,
    pub(super) rooms: Vec<RoomState>,
    /// When the last room opened.
    opened: Option<Instant>,
    /// Rooms without an agent since the last room with one.
    no_shows: usize,
    stopped: Option<RampStop>,
    /// Rooms that wait for their admission must not open either.
    pub(super) halted: bool,
}

#[derive(Debug)]
struct RampStop {
    why: String,
    denial: Option<Denial>,
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

    /// If the next room may open now, counts it as open and returns its index.
    pub(super) fn open_next(&mut self, now: Instant) -> Option<usize> {
        let index = self.rooms.len();
        if !self.has_more() || !self.is_ready(now) {
            return None;
        }
        // Rooms that stay together close only after the ramp, so a wait for a permit would never end.
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

    /// When the next room opens, if only time has to pass.
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
                1 => "no agent joined a room".to_owned(),
                n => format!("no agent joined {n} rooms in a row"),
            });
        }
    }

    pub(super) fn ended(&mut self, index: usize, outcome: &Outcome) {
        self.outcome_decided(index, outcome);
        self.rooms[index] = RoomState::Ended;
    }

    /// The first reason is final.
    fn stop(&mut self, why: String) {
        self.stopped.get_or_insert(RampStop { why, denial: None });
    }

    pub(super) fn halt(&mut self, why: String) {
        self.stop(why);
        self.halted = true;
    }

    pub(super) fn denied(&mut self, denial: Denial) {
        self.stopped.get_or_insert(RampStop {
            why: denial.to_string(),
            denial: Some(denial),
        });
        self.halted = true;
    }

    /// No further room opens, and every join is decided.
    pub(super) fn is_over(&self) -> bool {
        !self.has_more() && !self.rooms.contains(&RoomState::Joining)
    }

    pub(super) fn not_opened(self) -> Option<NotOpened> {
        let rooms = self.plan.rooms - self.rooms.len();
        (rooms > 0).then(|| {
            let stop = self.stopped;
            let stop = stop.expect("a ramp ends early only if it was stopped");
            NotOpened {
                rooms,
                why: stop.why,
                denial: stop.denial,
            }
        })
    }
}

/// Why a failure stops the batch, or `None` if it does not. After a rejection, further rooms would only repeat it and cost
/// the project more refused calls. The probe's own failure has the detail.
fn stops_the_batch(failure: &Failure) -> Option<&'static str> {
    Some(match failure.reason {
        Reason::PlanLimit(_) => "plan limit reached",
        Reason::AuthRejected => "LiveKit rejected the credentials",
        Reason::ConfigRejected => "LiveKit rejected a setting",
        Reason::Unreachable => "the server is unreachable",
        _ => return None,
    })
}
