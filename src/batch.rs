//! The rooms opened for one tick: the ramp, the hold and the caps.
//!
//! It knows no metrics and no HTTP.

use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::livekit::RoomName;
use crate::probe::driver::Context;
use crate::probe::{Progress, Report};

/// Everything that one batch found out.
#[derive(Debug, Clone)]
pub struct BatchReport {
    pub batch_id: String,
    pub target: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    /// In the order of opening.
    pub probes: Vec<ProbeReport>,
    /// Rooms of the batch that never opened, and why.
    pub not_opened: Option<NotOpened>,
}

#[derive(Debug, Clone)]
pub struct ProbeReport {
    pub report: Report,
    /// Wall clock of the probe's start, for display.
    pub started_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotOpened {
    pub rooms: usize,
    pub why: String,
}

/// What a batch tells while it runs.
#[derive(Debug, Clone)]
pub enum BatchEvent {
    Opened { index: usize, room: RoomName },
    Progress { index: usize, progress: Progress },
    Ended { index: usize, report: Box<Report> },
}

/// Runs one batch to its end; a cancelled `abort` ends it early, every probe `aborted`, every room deleted.
pub async fn run(
    _target: &str,
    _context: Context,
    _abort: CancellationToken,
    _events: mpsc::Sender<BatchEvent>,
) -> BatchReport {
    todo!("batch")
}
