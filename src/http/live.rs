//! The batches that are running: their rooms for the page of a batch, and each change for the open streams.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::broadcast;

use crate::probe::{Milestone, Outcome, ProbeEvent, ProbeReport, Span, Timeline};

/// The changes that a reader of a stream may be behind.
pub(super) const MAX_BEHIND: usize = 1024;

/// How far a batch is: sent when a room changes its stage, and when the batch has ended. The names of the fields are keys of the
/// API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct BatchProgress {
    pub(super) batch_id: String,
    pub(super) target: String,
    pub(super) purpose: &'static str,
    /// Rooms that have opened so far.
    pub(super) opened: usize,
    /// How the rooms whose outcome is known did.
    pub(super) ok: usize,
    pub(super) failed: usize,
    pub(super) aborted: usize,
    /// The room that has just changed. `None` if the batch has ended.
    pub(super) room: Option<RoomProgress>,
    /// `None` while the batch runs.
    pub(super) result: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RoomProgress {
    pub(super) room: String,
    pub(super) stage: Stage,
    /// `None` until it is known, as are the next two.
    pub(super) outcome: Option<&'static str>,
    pub(super) reason: Option<&'static str>,
    pub(super) join_delay_seconds: Option<f64>,
}

/// What a call has reached, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    Opened,
    /// The agent is in the room.
    Joined,
    Spoke,
    /// The outcome is known. The room is still to be deleted.
    Decided,
    /// The room is deleted, or its deletion failed.
    Closed,
}

/// A batch that is running.
#[derive(Debug, Clone)]
pub(super) struct RunningBatch {
    pub(super) target: String,
    pub(super) purpose: &'static str,
    pub(super) started_at: DateTime<Utc>,
    /// In the order in which they opened.
    pub(super) rooms: Vec<RunningRoom>,
}

#[derive(Debug, Clone)]
pub(super) struct RunningRoom {
    pub(super) room: String,
    pub(super) opened_at: DateTime<Utc>,
    pub(super) stage: Stage,
    pub(super) timeline: Timeline,
    /// `None` until it is known.
    pub(super) outcome: Option<Outcome>,
}

impl RunningRoom {
    fn new(room: &str) -> Self {
        Self {
            room: room.to_owned(),
            opened_at: Utc::now(),
            stage: Stage::Opened,
            timeline: Timeline::default(),
            outcome: None,
        }
    }

    /// The reason, or the outcome if there is none. `None` until it is known.
    pub(super) fn verdict(&self) -> Option<&'static str> {
        let outcome = self.outcome.as_ref()?;
        let failure = outcome.failure();
        Some(failure.map_or(outcome.label(), |failure| failure.reason.label()))
    }

    fn progress(&self) -> RoomProgress {
        let failure = self.outcome.as_ref().and_then(Outcome::failure);
        let join = self.timeline.span(Span::AgentJoin);
        RoomProgress {
            room: self.room.clone(),
            stage: self.stage,
            outcome: self.outcome.as_ref().map(Outcome::label),
            reason: failure.map(|failure| failure.reason.label()),
            join_delay_seconds: join.map(|delay| delay.as_secs_f64()),
        }
    }

    /// Returns whether the room has reached another stage.
    fn advance(&mut self, event: &ProbeEvent) -> bool {
        let stage = match event {
            ProbeEvent::Reached { milestone, at } => {
                self.timeline.mark(*milestone, *at);
                match milestone {
                    Milestone::AgentJoined => Stage::Joined,
                    Milestone::AgentSpoke => Stage::Spoke,
                    _ => return false,
                }
            }
            ProbeEvent::OutcomeDecided { outcome, .. } => {
                self.outcome = Some(outcome.clone());
                Stage::Decided
            }
            ProbeEvent::TurnStarted { .. } | ProbeEvent::JoinDecided { .. } => return false,
        };
        let is_later = stage > self.stage;
        self.stage = self.stage.max(stage);
        is_later
    }
}

/// The progress of all running batches. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LiveProgress {
    running: Arc<Mutex<BTreeMap<String, RunningBatch>>>,
    changes: broadcast::Sender<Arc<BatchProgress>>,
}

impl Default for LiveProgress {
    fn default() -> Self {
        Self {
            running: Arc::default(),
            changes: broadcast::Sender::new(MAX_BEHIND),
        }
    }
}

impl LiveProgress {
    /// Adds a batch. It is removed when what this returns is dropped.
    pub(crate) fn start(&self, batch_id: &str, target: &str, purpose: &'static str) -> LiveBatch {
        let batch = RunningBatch {
            target: target.to_owned(),
            purpose,
            started_at: Utc::now(),
            rooms: Vec::new(),
        };
        self.lock().insert(batch_id.to_owned(), batch);
        LiveBatch {
            live: self.clone(),
            batch_id: batch_id.to_owned(),
        }
    }

    pub(super) fn running(&self, batch_id: &str) -> Option<RunningBatch> {
        self.lock().get(batch_id).cloned()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<BatchProgress>> {
        self.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, RunningBatch>> {
        // Each change leaves the map consistent, whatever panics elsewhere.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The progress of one batch.
#[derive(Debug)]
pub(crate) struct LiveBatch {
    live: LiveProgress,
    batch_id: String,
}

impl LiveBatch {
    pub(crate) fn room_opened(&self, room: &str) {
        self.change(|batch| {
            batch.rooms.push(RunningRoom::new(room));
            batch.rooms.len().checked_sub(1)
        });
    }

    /// `index` counts the rooms in the order in which they opened.
    pub(crate) fn probe_advanced(&self, index: usize, event: &ProbeEvent) {
        self.change(|batch| {
            let has_changed = batch.rooms.get_mut(index)?.advance(event);
            has_changed.then_some(index)
        });
    }

    pub(crate) fn room_closed(&self, index: usize, report: &ProbeReport) {
        self.change(|batch| {
            let room = batch.rooms.get_mut(index)?;
            room.timeline = report.timeline.clone();
            room.outcome = Some(report.outcome.clone());
            room.stage = Stage::Closed;
            Some(index)
        });
    }

    pub(crate) fn ended(&self, result: &'static str) {
        let batches = self.live.lock();
        if let Some(batch) = batches.get(&self.batch_id) {
            self.send(batch, None, Some(result));
        }
    }

    /// Sends the progress if `change` names a room that has reached another stage.
    fn change(&self, change: impl FnOnce(&mut RunningBatch) -> Option<usize>) {
        let mut batches = self.live.lock();
        let Some(batch) = batches.get_mut(&self.batch_id) else {
            return;
        };
        if let Some(index) = change(batch) {
            self.send(batch, batch.rooms.get(index), None);
        }
    }

    fn send(&self, batch: &RunningBatch, room: Option<&RunningRoom>, result: Option<&'static str>) {
        let count = |is_counted: fn(&Outcome) -> bool| {
            let outcomes = batch.rooms.iter().filter_map(|room| room.outcome.as_ref());
            outcomes.filter(|outcome| is_counted(outcome)).count()
        };
        let progress = BatchProgress {
            batch_id: self.batch_id.clone(),
            target: batch.target.clone(),
            purpose: batch.purpose,
            opened: batch.rooms.len(),
            ok: count(|outcome| matches!(outcome, Outcome::Ok)),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            aborted: count(|outcome| matches!(outcome, Outcome::Aborted)),
            room: room.map(RunningRoom::progress),
            result,
        };
        // Fails if no stream is open, which is no error.
        self.live.changes.send(Arc::new(progress)).ok();
    }
}

impl Drop for LiveBatch {
    fn drop(&mut self) {
        self.live.lock().remove(&self.batch_id);
    }
}
