//! One room, from creation to deletion: a timeline and one outcome.
//!
//! `machine` decides, as a plain state machine: answers and room events in, actions out. It performs no I/O; [`driver`]
//! carries its actions out.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::livekit::RoomName;
use crate::livekit::event::{Agent, AudioStats};

pub mod driver;
mod machine;
mod reason;
mod timeline;
mod transcript;
mod turns;
mod verdict;

pub use machine::longest_verdict;
pub use reason::{AgentTurn, Evidence, Failure, LimitKind, Origin, Outcome, Reason};
pub use timeline::{Milestone, Span, Timeline, Turn};
pub use transcript::Said;

/// Whether the room was the first of its batch: a cold start hides there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    First,
    Later,
}

impl Position {
    pub const ALL: [Self; 2] = [Self::First, Self::Later];

    /// The label value in metrics and the `position` in output.
    pub fn label(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Later => "later",
        }
    }
}

/// Everything that one probe found out.
#[derive(Debug, Clone)]
pub struct ProbeReport {
    /// Wall clock of [`Milestone::Started`], in whole microseconds; for display.
    pub started_at: DateTime<Utc>,
    pub room: RoomName,
    pub room_sid: Option<String>,
    pub position: Position,
    pub outcome: Outcome,
    pub evidence: Evidence,
    pub timeline: Timeline,
    pub turns: Vec<Turn>,
    /// What was said, in the agent's own writing; `None` where the target doesn't want to know.
    pub transcript: Option<Vec<Said>>,
    pub agent: Option<Agent>,
    /// Agents of the target that came too late to count, or as a second one: each is a session that LiveKit bills.
    pub other_agents: u32,
    pub audio: AudioStats,
    /// The agent was dispatched before we were in the room, and already in the join response: the join delay is an
    /// upper bound.
    pub join_upper_bound: bool,
}

impl ProbeReport {
    /// A report of nothing seen yet.
    pub(crate) fn new(
        room: RoomName,
        position: Position,
        started_at: DateTime<Utc>,
        outcome: Outcome,
    ) -> Self {
        Self {
            started_at,
            room,
            room_sid: None,
            position,
            outcome,
            evidence: Evidence::default(),
            timeline: Timeline::default(),
            turns: Vec::new(),
            transcript: None,
            agent: None,
            other_agents: 0,
            audio: AudioStats::default(),
            join_upper_bound: false,
        }
    }

    /// The agent time that LiveKit bills for this room: from the agent's join to the room's end, in whole minutes; a
    /// minute for each other agent, on whose sight the room ends. `None` where no agent came.
    ///
    /// An agent that left before the room ended cost less; a budget is better told too much than too little. Strays of
    /// another name aren't known well enough to count.
    pub fn billed(&self) -> Option<Duration> {
        let others = whole_minutes(Duration::ZERO) * self.other_agents;
        match self.agent_session() {
            Some(session) => Some(whole_minutes(session) + others),
            None if self.other_agents > 0 => Some(others),
            None => None,
        }
    }

    fn agent_session(&self) -> Option<Duration> {
        let joined = self.timeline.get(Milestone::AgentJoined)?;
        let last_seen = || self.timeline.marks().map(|(_, at)| at).max();
        // Its job may outlast our leaving, but not the room. Where the deletion failed, the agent left after us.
        let ended = [Milestone::RoomDeleted, Milestone::Left]
            .into_iter()
            .find_map(|end| self.timeline.get(end))
            .or_else(last_seen)?;
        Some(ended.saturating_duration_since(joined))
    }
}

/// Agent time as LiveKit bills it: each minute that has begun, and one for a session of no length.
pub fn whole_minutes(session: Duration) -> Duration {
    const MINUTE: Duration = Duration::from_mins(1);
    let whole = session.as_nanos().div_ceil(MINUTE.as_nanos()).max(1);
    MINUTE.saturating_mul(u32::try_from(whole).unwrap_or(u32::MAX))
}

/// What a probe emits while it runs, for live progress and for the ramp.
#[derive(Debug, Clone)]
pub enum ProbeEvent {
    Reached {
        milestone: Milestone,
        at: Instant,
    },
    /// The agent's join is decided, one way or the other: joined, deadline passed, or the probe failed before.
    JoinDecided {
        joined: bool,
    },
    /// The outcome is final; leaving and deleting follow.
    OutcomeDecided {
        outcome: Outcome,
        /// What the answer asked for that ended the probe.
        retry_after: Option<Duration>,
    },
}

impl ProbeEvent {
    /// Each milestone once, the join, the outcome.
    pub const MAX_PER_PROBE: usize = Milestone::ALL.len() + 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A probe whose marks are seconds after its start.
    fn report(marks: &[(Milestone, u64)]) -> ProbeReport {
        let room = RoomName("canary-0a1b2-1c3d4e5f6g7h8".to_owned());
        let mut report = ProbeReport::new(room, Position::First, Utc::now(), Outcome::Ok);
        let base = Instant::now();
        report.timeline.mark(Milestone::Started, base);
        for (milestone, seconds) in marks {
            let at = base + Duration::from_secs(*seconds);
            report.timeline.mark(*milestone, at);
        }
        report
    }

    fn billed_minutes(marks: &[(Milestone, u64)]) -> Option<u64> {
        report(marks).billed().map(|billed| {
            assert_eq!(billed.as_millis() % 60_000, 0, "{billed:?}");
            billed.as_secs() / 60
        })
    }

    #[test]
    fn begun_minutes_are_billed_from_the_agents_join_to_the_rooms_end() {
        use Milestone::{AgentJoined, Left, RoomDeleted};
        let ends = |left, deleted| {
            billed_minutes(&[(AgentJoined, 30), (Left, left), (RoomDeleted, deleted)])
        };
        assert_eq!(ends(45, 46), Some(1));
        assert_eq!(ends(89, 90), Some(1));
        assert_eq!(ends(90, 91), Some(2));
        assert_eq!(ends(209, 211), Some(4));
    }

    #[test]
    fn without_a_deletion_our_leaving_ends_the_bill_and_else_what_was_seen_last() {
        use Milestone::{AgentJoined, AgentSpoke, Left};
        assert_eq!(billed_minutes(&[(AgentJoined, 1), (Left, 62)]), Some(2));
        assert_eq!(
            billed_minutes(&[(AgentJoined, 1), (AgentSpoke, 63)]),
            Some(2)
        );
        assert_eq!(billed_minutes(&[(AgentJoined, 1)]), Some(1));
    }

    #[test]
    fn agent_that_is_late_or_a_second_one_costs_a_minute_of_its_own() {
        let mut late = report(&[(Milestone::Left, 31), (Milestone::RoomDeleted, 32)]);
        late.other_agents = 1;
        assert_eq!(late.billed(), Some(Duration::from_mins(1)));
        let mut twice = report(&[(Milestone::AgentJoined, 1), (Milestone::RoomDeleted, 62)]);
        twice.other_agents = 2;
        assert_eq!(twice.billed(), Some(Duration::from_mins(4)));
    }

    #[test]
    fn room_without_an_agent_costs_nothing() {
        use Milestone::{DispatchAccepted, Left, RoomDeleted};
        let marks = [(DispatchAccepted, 1), (Left, 31), (RoomDeleted, 32)];
        assert_eq!(billed_minutes(&marks), None);
    }

    #[test]
    fn session_of_no_length_costs_a_minute_and_a_boundless_one_does_not_overflow() {
        assert_eq!(whole_minutes(Duration::ZERO), Duration::from_mins(1));
        assert_eq!(
            whole_minutes(Duration::from_mins(3)),
            Duration::from_mins(3)
        );
        let just_over = Duration::from_mins(3) + Duration::from_nanos(1);
        assert_eq!(whole_minutes(just_over), Duration::from_mins(4));
        assert!(whole_minutes(Duration::MAX) > Duration::from_hours(24 * 365));
    }
}
