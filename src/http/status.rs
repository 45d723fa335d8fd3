//! What the daemon publishes of itself: the page shows it, and `/api/v1/targets` serializes it.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::history::LastBatch;

/// The daemon at one moment. The names of the fields are keys of the API.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Status {
    pub(crate) version: &'static str,
    pub(crate) started_at: DateTime<Utc>,
    pub(crate) stage: DaemonStage,
    pub(crate) targets: Vec<TargetStatus>,
    pub(crate) projects: Vec<ProjectStatus>,
    /// `None` until the first reload. The start is not a reload.
    pub(crate) last_reload: Option<LastReload>,
}

impl Status {
    pub(crate) fn target(&self, name: &str) -> Option<&TargetStatus> {
        self.targets.iter().find(|target| target.name == name)
    }

    /// The target whose batch of this id is running.
    pub(super) fn of_batch(&self, id: &str) -> Option<&TargetStatus> {
        self.targets.iter().find(|target| {
            let mut running = [&target.running, &target.confirming].into_iter().flatten();
            running.any(|running| running == id)
        })
    }
}

/// The daemon is ready only while it is [`DaemonStage::Running`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DaemonStage {
    Starting,
    Running,
    Draining,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct TargetStatus {
    pub(crate) name: String,
    pub(crate) project: String,
    /// The URL of the project, without credentials.
    pub(crate) url: String,
    /// `None` if dispatch is automatic: any agent may join.
    pub(crate) agent_name: Option<String>,
    pub(crate) dispatch: &'static str,
    /// As in the settings, such as `every 15m`.
    pub(crate) schedule: String,
    /// Rooms of a batch.
    pub(crate) rooms: usize,
    /// The most agent time that all rooms of a batch can use.
    pub(crate) worst_case_seconds: u64,
    pub(crate) objectives: ObjectivesStatus,
    pub(crate) paused: bool,
    /// `unknown`, `healthy`, `suspect` or `failing`.
    pub(crate) state: &'static str,
    pub(crate) state_since: DateTime<Utc>,
    /// The id of the open incident.
    pub(crate) incident: Option<String>,
    /// The id of the batch that is running.
    pub(crate) running: Option<String>,
    /// The id of the confirmation that is running, in addition to it.
    pub(crate) confirming: Option<String>,
    pub(crate) next_batch_at: Option<DateTime<Utc>>,
    pub(crate) last_tick_at: Option<DateTime<Utc>>,
    pub(crate) last_batch: Option<LastBatch>,
    /// Why no batch could start now: a back-off or a budget, as text for people.
    pub(crate) held_back: Option<String>,
}

/// How soon an event must come to count as good.
#[derive(Debug, Clone, Serialize)]
#[expect(clippy::struct_field_names, reason = "keys of the API with their unit")]
pub(crate) struct ObjectivesStatus {
    pub(crate) join_within_seconds: f64,
    pub(crate) first_speech_within_seconds: f64,
    pub(crate) reply_within_seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ProjectStatus {
    pub(crate) name: String,
    /// Without credentials.
    pub(crate) url: String,
    pub(crate) max_rooms: usize,
    pub(crate) rooms_in_flight: usize,
    pub(crate) backoff_until: Option<DateTime<Utc>>,
    pub(crate) budgets: Vec<BudgetStatus>,
}

/// Agent time of one period, as LiveKit bills it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BudgetStatus {
    /// `day` or `month`, both in UTC.
    pub(crate) period: &'static str,
    /// By rooms that have ended.
    pub(crate) used_seconds: u64,
    /// The worst case of open rooms. Their use replaces it when they end.
    pub(crate) reserved_seconds: u64,
    /// `None` if no limit is set.
    pub(crate) limit_seconds: Option<u64>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct LastReload {
    pub(crate) at: DateTime<Utc>,
    pub(crate) ok: bool,
    /// The problems of the settings that were refused; `None` if they were applied.
    pub(crate) error: Option<String>,
}
