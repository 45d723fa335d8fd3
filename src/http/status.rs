//! What the daemon tells HTTP of itself, and what HTTP asks of the daemon.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::oneshot;

use crate::history::LastBatch;

/// A moment of the daemon: the page shows it, and `/api/v1/targets` is it.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    pub version: &'static str,
    pub started_at: DateTime<Utc>,
    pub stage: Stage,
    pub targets: Vec<TargetStatus>,
    pub projects: Vec<ProjectStatus>,
    /// `None` until the first reload: what the daemon started with isn't one.
    pub last_reload: Option<LastReload>,
}

/// Only [`Stage::Running`] is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Starting,
    Running,
    Draining,
}

#[derive(Debug, Clone, Serialize)]
pub struct TargetStatus {
    pub name: String,
    pub project: String,
    /// Of the project; without credentials.
    pub url: String,
    /// `None`: any agent, with automatic dispatch.
    pub agent_name: Option<String>,
    pub dispatch: &'static str,
    /// As the config has it, such as `every 15m`.
    pub schedule: String,
    pub paused: bool,
    /// The batch that is open now.
    pub running: Option<String>,
    pub next_batch_at: Option<DateTime<Utc>>,
    pub last_tick_at: Option<DateTime<Utc>>,
    pub last_batch: Option<LastBatch>,
    /// Why a batch would not open now: back-off or budget, as a sentence.
    pub held_back: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ProjectStatus {
    pub name: String,
    /// Without credentials.
    pub url: String,
    pub max_rooms: usize,
    pub rooms_in_flight: usize,
    pub backoff_until: Option<DateTime<Utc>>,
    pub budgets: Vec<BudgetStatus>,
}

/// Agent time of one period, as LiveKit bills it.
#[derive(Debug, Clone, Serialize)]
pub struct BudgetStatus {
    /// `day` or `month`, both in UTC.
    pub period: &'static str,
    pub used_seconds: u64,
    /// `None`: no limit is set.
    pub limit_seconds: Option<u64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct LastReload {
    pub at: DateTime<Utc>,
    pub ok: bool,
    /// The problems of the file that was refused.
    pub error: Option<String>,
}

/// What a POST asks of the daemon, which answers each once it has decided. A reply that is dropped is answered as a
/// fault of ours.
#[derive(Debug)]
pub enum Control {
    /// Read the settings again, all or nothing.
    Reload {
        reply: oneshot::Sender<Result<(), ReloadRefused>>,
    },
    /// Open a batch of `target` now, beside its schedule; the answer is the batch's id.
    RunBatch {
        target: String,
        reply: oneshot::Sender<Result<String, BatchRefused>>,
    },
    SetPaused {
        target: String,
        paused: bool,
        reply: oneshot::Sender<Result<(), NoSuchTarget>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReloadRefused {
    /// The new settings have problems, told in full; the old ones go on.
    #[error("{0}")]
    Invalid(String),
    #[error("the canary is shutting down")]
    ShuttingDown,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchRefused {
    #[error("batch {batch_id} of this target is still running")]
    Busy { batch_id: String },
    /// A guard rail: budget or back-off.
    #[error("{text}")]
    Refused {
        text: String,
        retry_after: Option<Duration>,
    },
    #[error("no target has this name; /api/v1/targets lists them")]
    NoSuchTarget,
    #[error("the canary is shutting down")]
    ShuttingDown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no target has this name; /api/v1/targets lists them")]
pub struct NoSuchTarget;
