//! One room, from creation to deletion: a timeline and one outcome.
//!
//! `machine` decides, as a plain state machine: answers and room events in, actions out. It performs no I/O; [`driver`]
//! carries its actions out.

use tokio::time::Instant;

use crate::livekit::RoomName;
use crate::livekit::engine::{Agent, AudioStats};

pub mod driver;
mod machine;
mod outcome;
mod timeline;
mod turns;

pub use machine::longest_verdict;
pub use outcome::{Evidence, Failure, LimitKind, Origin, Outcome, Reason};
pub use timeline::{Milestone, Span, Timeline, Turn};

/// Whether the room was the first of its batch: a cold start hides there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    First,
    Later,
}

/// Everything that one probe found out.
#[derive(Debug, Clone)]
pub struct Report {
    pub room: RoomName,
    pub room_sid: Option<String>,
    pub position: Position,
    pub outcome: Outcome,
    pub evidence: Evidence,
    pub timeline: Timeline,
    pub turns: Vec<Turn>,
    pub agent: Option<Agent>,
    pub audio: AudioStats,
    /// The agent was dispatched before we were in the room, and already in the join response: the join delay is an
    /// upper bound.
    pub join_upper_bound: bool,
}

impl Report {
    /// A report of nothing seen yet.
    pub(crate) fn new(room: RoomName, position: Position, outcome: Outcome) -> Self {
        Self {
            room,
            room_sid: None,
            position,
            outcome,
            evidence: Evidence::default(),
            timeline: Timeline::default(),
            turns: Vec::new(),
            agent: None,
            audio: AudioStats::default(),
            join_upper_bound: false,
        }
    }
}

/// What a probe tells while it runs, for live progress and for the ramp.
#[derive(Debug, Clone)]
pub enum Progress {
    Reached {
        milestone: Milestone,
        at: Instant,
    },
    /// The agent's join is decided, one way or the other: joined, deadline passed, or the probe failed before.
    JoinSettled {
        joined: bool,
    },
    /// The outcome is final; leaving and deleting follow.
    Settled(Outcome),
}

impl Progress {
    /// The most that one probe tells: each milestone once, the join, the outcome.
    pub const MOST: usize = Milestone::ALL.len() + 2;
}
