//! One room, from creation to deletion: a timeline and one outcome.
//!
//! `machine` is a plain state machine: answers, room events and deadlines in, actions out. It performs no I/O; [`driver`]
//! carries its actions out. `verdict` turns what went wrong into a failure. This module knows neither batches nor metrics.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use strum::VariantArray;
use tokio::time::Instant;

use crate::livekit::RoomName;
use crate::livekit::event::{Agent, AudioStats};
pub use crate::livekit::event::{MediaConnection, MediaPath};
use crate::recording::{SavedRecording, Waveform};

pub mod driver;
mod machine;
mod reason;
mod timeline;
mod transcript;
mod turns;
mod verdict;
mod words;

pub use machine::{max_overrun, max_time_to_verdict};
pub use reason::{AgentTurn, Evidence, Failure, LimitKind, Origin, Outcome, Reason, SessionEntry};
pub use timeline::{AgentStage, Milestone, Span, Timeline, Turn, TurnResult, TurnStages};
pub use transcript::TranscriptLine;
pub use verdict::USUAL_HEADER_BYTES;

/// Whether the room was the first of its batch, which is where the cold start of an agent shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Position {
    First,
    Later,
}

impl Position {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the `position` in output.
    pub fn label(self) -> &'static str {
        self.into()
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
    /// Whether every turn of the caller must be answered.
    pub expects_reply: bool,
    /// The call as the agent transcribed it; `None` unless the target keeps transcripts.
    pub transcript: Option<Vec<TranscriptLine>>,
    pub agent: Option<Agent>,
    /// Agents of the target that joined too late to count, or as a second one. LiveKit bills a session for each.
    pub other_agents: u32,
    pub audio: AudioStats,
    /// The agent was dispatched before the canary joined, and was in the room already. The join delay is an upper bound.
    pub join_upper_bound: bool,
    pub circumstances: Circumstances,
    /// `None` unless the target records a call of this outcome.
    pub recording: Option<SavedRecording>,
    /// `None` if the canary did not join.
    pub waveform: Option<Waveform>,
}

/// What may differ between two rooms of one target. A part that is not known is `None`. The names of the fields are keys of
/// the API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circumstances {
    /// The LiveKit node of the room, by the join response.
    pub node: Option<String>,
    /// The region of that node, by the join response; a server without regions has none.
    pub region: Option<String>,
    /// The id of the worker that took the job, by `ListDispatch`. A worker that registers again has a new one.
    pub worker: Option<String>,
    /// The transport of the canary's media.
    pub media_path: Option<MediaPath>,
    /// The version that the agent reports in its attribute `agent.version`.
    pub agent_version: Option<String>,
}

impl ProbeReport {
    /// A report without observations.
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
            expects_reply: false,
            transcript: None,
            agent: None,
            other_agents: 0,
            audio: AudioStats::default(),
            join_upper_bound: false,
            circumstances: Circumstances::default(),
            recording: None,
            waveform: None,
        }
    }

    /// The agent time that LiveKit bills for this room, in whole minutes: from the agent's join to the room's end, and one
    /// minute for each other agent of the target, because the room ends as soon as one is seen. `None` if no agent joined.
    ///
    /// This is an upper bound, because a budget must not be exceeded: an agent that left before the room ended costs less.
    /// Agents of another name are excluded, because too little is known about them.
    pub fn billed(&self) -> Option<Duration> {
        let others = billable_minutes(Duration::ZERO) * self.other_agents;
        match self.agent_session() {
            Some(session) => Some(billable_minutes(session) + others),
            None if self.other_agents > 0 => Some(others),
            None => None,
        }
    }

    fn agent_session(&self) -> Option<Duration> {
        let joined = self.timeline.get(Milestone::AgentJoined)?;
        let last_seen = || self.timeline.marks().map(|(_, at)| at).max();
        // The agent's job may outlast the canary's leaving, but not the room. If the deletion failed, the agent left after
        // the canary.
        let ended = [Milestone::RoomDeleted, Milestone::Left]
            .into_iter()
            .find_map(|end| self.timeline.get(end))
            .or_else(last_seen)?;
        Some(ended.saturating_duration_since(joined))
    }
}

/// Agent time as LiveKit bills it: started minutes, and at least one.
pub fn billable_minutes(session: Duration) -> Duration {
    const MINUTE: Duration = Duration::from_mins(1);
    let whole = session.as_nanos().div_ceil(MINUTE.as_nanos()).max(1);
    MINUTE.saturating_mul(u32::try_from(whole).unwrap_or(u32::MAX))
}

/// What a probe emits while it runs: for live progress, and for the ramp of its batch.
#[derive(Debug, Clone)]
pub enum ProbeEvent {
    Reached {
        milestone: Milestone,
        at: Instant,
    },
    /// The caller began to speak. From the agent's join to the verdict it takes at most this long now.
    TurnStarted {
        to_verdict: Duration,
    },
    /// The agent joined, or its deadline passed, or the probe ended before.
    JoinDecided {
        joined: bool,
    },
    /// The outcome is final. Leaving the room and deleting it follow.
    OutcomeDecided {
        outcome: Outcome,
        /// How long LiveKit asked to wait, if it named a limit.
        retry_after: Option<Duration>,
    },
}

impl ProbeEvent {
    /// The most that one probe emits: each milestone once, each turn and an interruption, the join, the outcome.
    pub fn max_per_probe(turns: u32) -> usize {
        let turns = usize::try_from(turns).unwrap_or(usize::MAX);
        Milestone::ALL.len().saturating_add(turns).saturating_add(3)
    }
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
    fn started_minutes_are_billed_from_the_agents_join_to_the_rooms_end() {
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
    fn without_a_deletion_the_canarys_leaving_or_the_last_milestone_ends_the_bill() {
        use Milestone::{AgentJoined, AgentSpoke, Left};
        assert_eq!(billed_minutes(&[(AgentJoined, 1), (Left, 62)]), Some(2));
        assert_eq!(
            billed_minutes(&[(AgentJoined, 1), (AgentSpoke, 63)]),
            Some(2)
        );
        assert_eq!(billed_minutes(&[(AgentJoined, 1)]), Some(1));
    }

    #[test]
    fn late_or_second_agent_costs_one_more_minute() {
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
    fn session_of_no_length_costs_a_minute_and_an_endless_one_does_not_overflow() {
        assert_eq!(billable_minutes(Duration::ZERO), Duration::from_mins(1));
        assert_eq!(
            billable_minutes(Duration::from_mins(3)),
            Duration::from_mins(3)
        );
        let just_over = Duration::from_mins(3) + Duration::from_nanos(1);
        assert_eq!(billable_minutes(just_over), Duration::from_mins(4));
        assert!(billable_minutes(Duration::MAX) > Duration::from_hours(24 * 365));
    }
}
