//! The data on disk: batches and their probes, the budget ledger, the journal of rooms, and outages with the messages about them.
//!
//! All decisions are made on the ledger in memory, which one thread writes to disk. A reservation waits until its row is
//! durable, and so can a message about an outage; nothing else waits for the disk. If the disk takes nothing, the history is
//! degraded: probing goes on, the ledger, the journal and the outages stay in memory, and all are written when the disk works
//! again.
//!
//! It knows no HTTP.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::{self, Project, Target};
use crate::livekit::RoomName;
use crate::recording::RecordingStore;
use crate::report::{BatchReport, Purpose};

mod events;
mod incidents;
mod kept;
mod ledger;
mod read;
mod record;
mod statistics;
mod store;
mod writer;

use incidents::Detections;
use ledger::{Ledger, LedgerRow};
use record::BatchRecord;
use store::{LoadedHistory, Store, StoreOpenError};
use writer::HistoryWriter;

pub(crate) use events::{EventFilter, HistoryEvent};
pub(crate) use incidents::{DetectionRecord, IncidentRecord, OutboxMessage};
pub(crate) use ledger::AgentTimeUsed;
pub(crate) use read::{
    BatchFilter, IncidentFilter, LastBatch, MAX_BATCHES, ProbeCursor, ProbeFilter, ReadError,
    RecentProbe, RoomCount, RoomFilter, StoredDocument,
};
pub(crate) use statistics::{
    ComparedSpan, Percentiles, SpanStatistics, Statistics, TargetStatistics,
};

/// How long a reservation or a detection waits for the disk. After that the history is degraded, and probing goes on.
pub(crate) const RESERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Batches that may wait for the disk. Further ones are dropped and counted.
const MAX_QUEUED_BATCHES: usize = 32;

/// The folder of the recordings, in that of the history.
const RECORDINGS: &str = "recordings";

/// Events that may wait for the disk.
const MAX_QUEUED_EVENTS: usize = 100;

/// The source of the wall clock; tests set their own.
pub(crate) type UtcClock = Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>;

/// The handle to the history. Cheap to clone; the writing thread ends with the last one.
#[derive(Clone)]
pub(crate) struct History {
    shared: Arc<HistoryShared>,
    reader: read::HistoryReader,
    recordings: RecordingStore,
    _close: Arc<CloseOnDrop>,
}

/// Why the history can't be used at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("another livekit-canary uses the folder {}: give each its own history.dir", .0.display())]
    Locked(PathBuf),
    #[error(
        "a newer livekit-canary wrote {} (format {found}, this version knows {known}): run that version, or set \
         another history.dir", .path.display()
    )]
    Newer {
        path: PathBuf,
        found: i64,
        known: i64,
    },
    #[error("can't start a thread for the history")]
    Thread(#[source] io::Error),
}

/// Whether an event is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventRecorded {
    Durable,
    /// The disk takes nothing now. The event is written when the disk works again, unless this run ends before.
    Waiting,
    /// Too many events wait already.
    Dropped,
}

/// A room that an earlier run recorded in the journal and that is not confirmed to be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrphanRoom {
    pub room: RoomName,
    pub project: String,
    pub target: String,
    pub opened_at: DateTime<Utc>,
}

/// Agent time that is reserved for one room.
///
/// It never counts less than the room used: a room that opened and was not settled counts with its worst case.
#[must_use = "dropping it ends the reservation"]
#[derive(Debug)]
pub(crate) struct Reservation {
    shared: Arc<HistoryShared>,
    room: RoomName,
    worst_case: Duration,
    opened: bool,
}

struct HistoryShared {
    state: Mutex<HistoryState>,
    /// Wakes the writer.
    work: Condvar,
    progress: watch::Sender<WriterProgress>,
    dropped: AtomicU64,
    faults: AtomicU64,
    clock: UtcClock,
    /// Identifies this run of the program in the journal.
    boot: String,
}

#[derive(Default)]
struct HistoryState {
    ledger: Ledger,
    /// Batches that wait for the disk.
    records: VecDeque<Arc<BatchRecord>>,
    /// Events that wait for the disk.
    events: VecDeque<HistoryEvent>,
    /// Events that were queued so far.
    queued_events: u64,
    detections: Detections,
    /// A lost ledger counts from zero.
    accepted: bool,
    has_work: bool,
    closing: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct WriterProgress {
    /// Number of the ledger's last durable change.
    written: u64,
    /// Number of the last durable change of states, incidents and messages.
    detections_written: u64,
    /// Queued events that were written, or that the disk will never take.
    events_written: u64,
    /// The ledger's rows can't be written.
    ledger_down: bool,
    /// Something can't be written.
    degraded: bool,
    ended: bool,
}

/// Ends the writer when the last handle is dropped.
struct CloseOnDrop(Arc<HistoryShared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl History {
    /// Opens the history in its folder, and creates it if there is none.
    ///
    /// Blocks on the disk. A folder that can't be written to is no error: the history is degraded instead.
    ///
    /// # Errors
    /// Another process uses the folder, a newer version of this program wrote it, or no thread can be started.
    pub(crate) fn open(settings: &config::HistorySettings) -> Result<Self, OpenError> {
        Self::open_with_clock(settings, Arc::new(Utc::now))
    }

    /// # Errors
    /// See [`History::open`].
    pub(crate) fn open_with_clock(
        settings: &config::HistorySettings,
        clock: UtcClock,
    ) -> Result<Self, OpenError> {
        let (history, writer) = Self::prepare(settings, clock)?;
        thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || writer.run())
            .map_err(OpenError::Thread)?;
        Ok(history)
    }

    fn prepare(
        settings: &config::HistorySettings,
        clock: UtcClock,
    ) -> Result<(Self, HistoryWriter), OpenError> {
        let shared = Arc::new(HistoryShared {
            state: Mutex::default(),
            work: Condvar::new(),
            progress: watch::Sender::new(WriterProgress::default()),
            dropped: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            clock,
            boot: format!("{:016x}", fastrand::u64(..)),
        });
        let store = match Store::open(&settings.dir, (shared.clock)()) {
            Ok((store, loaded)) => {
                shared.load(loaded);
                Some(store)
            }
            Err(StoreOpenError::Refused(error)) => return Err(error),
            Err(StoreOpenError::Unavailable(why)) => {
                // Earlier use can't be read, or not yet: a budget must not count from zero.
                shared.lock().ledger.unread = true;
                shared.set_ledger_down();
                shared.set_unwritable(&why);
                None
            }
        };
        let max_bytes = settings.max_recording_megabytes.saturating_mul(1_000_000);
        let recordings = RecordingStore::open(settings.dir.join(RECORDINGS), max_bytes);
        let history = Self {
            shared: Arc::clone(&shared),
            reader: read::HistoryReader::new(&settings.dir),
            recordings: recordings.clone(),
            _close: Arc::new(CloseOnDrop(Arc::clone(&shared))),
        };
        let writer = HistoryWriter::new(shared, settings.clone(), store, recordings);
        Ok((history, writer))
    }

    /// Writes what is waiting and ends the thread. Returns whether all of it was written before the deadline.
    ///
    /// The folder is unlocked then, and later changes are lost.
    pub(crate) async fn close(&self, deadline: Instant) -> bool {
        self.shared.close();
        let mut progress = self.shared.progress.subscribe();
        let ended = progress.wait_for(|progress| progress.ended);
        let ended = timeout_at(deadline, ended).await.is_ok();
        let state = self.shared.lock();
        ended
            && state.records.is_empty()
            && state.events.is_empty()
            && state.ledger.unwritten().0.is_empty()
            && state.detections.is_written()
    }

    /// The recordings of calls. The history deletes them with their probes.
    pub(crate) fn recordings(&self) -> &RecordingStore {
        &self.recordings
    }

    pub(crate) fn is_degraded(&self) -> bool {
        self.shared.is_degraded()
    }

    /// Batches that were dropped instead of recorded.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Faults that were logged: each time that the history became degraded, and each record that can't be stored.
    pub(crate) fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// Counts from zero if the ledger is lost, in this run and in later ones, and while the disk cannot be read.
    pub(crate) fn accept_lost_ledger(&self) {
        let mut state = self.shared.lock();
        state.accepted = true;
        state.ledger.lost = false;
        state.ledger.unread = false;
        self.shared.wake(&mut state);
    }

    pub(crate) fn now(&self) -> DateTime<Utc> {
        (self.shared.clock)()
    }

    pub(crate) fn used(&self, project: &str) -> AgentTimeUsed {
        let now = self.now();
        self.shared
            .lock()
            .ledger
            .used(project, &self.shared.boot, now)
    }

    /// Agent time that this target used for confirmations in the current UTC day; open rooms count with their worst case.
    pub(crate) fn confirmations_used(&self, project: &str, target: &str) -> Duration {
        let now = self.now();
        self.shared
            .lock()
            .ledger
            .confirmations(project, target, now)
    }

    /// Reserves agent time and records the room in the journal, before the room can exist. When it returns, the row is
    /// durable or the history is degraded.
    ///
    /// `admit` decides on the agent time used so far. No other reservation is made between its decision and this one.
    ///
    /// # Errors
    /// Those of `admit`.
    pub(crate) async fn reserve<E>(
        &self,
        room: &RoomName,
        project: &str,
        target: &str,
        purpose: Purpose,
        worst_case: Duration,
        admit: impl FnOnce(&AgentTimeUsed, DateTime<Utc>) -> Result<(), E>,
    ) -> Result<Reservation, E> {
        let now = self.now();
        let change = {
            let mut state = self.shared.lock();
            admit(&state.ledger.used(project, &self.shared.boot, now), now)?;
            let row = LedgerRow {
                project: project.to_owned(),
                target: target.to_owned(),
                purpose,
                boot: self.shared.boot.clone(),
                opened_at: now,
                reserved: whole_seconds(worst_case),
                settled: None,
                gone_at: None,
            };
            let change = state.ledger.open(room, row);
            self.shared.wake(&mut state);
            change
        };
        // Built before the wait: if this future is dropped while it waits, the reservation is dropped with it.
        let reservation = Reservation {
            shared: Arc::clone(&self.shared),
            room: room.clone(),
            worst_case,
            opened: false,
        };
        self.shared.wait_until_written(change).await;
        Ok(reservation)
    }

    /// Records the janitor's confirmation that the room is gone for good.
    pub(crate) fn gone(&self, room: &RoomName) {
        let now = self.now();
        let mut state = self.shared.lock();
        state.ledger.gone(room, now);
        self.shared.wake(&mut state);
    }

    /// The target of a room that is still in the journal.
    pub(crate) fn target_of(&self, room: &RoomName) -> Option<String> {
        let state = self.shared.lock();
        state.ledger.get(room).map(|row| row.target.clone())
    }

    /// Rooms of earlier runs of this program that are not confirmed to be gone, the oldest first.
    pub(crate) fn orphan_rooms(&self) -> Vec<OrphanRoom> {
        let state = self.shared.lock();
        let orphans = state.ledger.orphans(&self.shared.boot);
        let mut orphans: Vec<OrphanRoom> = orphans
            .map(|(room, row)| OrphanRoom {
                room: room.clone(),
                project: row.project.clone(),
                target: row.target.clone(),
                opened_at: row.opened_at,
            })
            .collect();
        orphans
            .sort_by(|one, other| (one.opened_at, &one.room).cmp(&(other.opened_at, &other.room)));
        orphans
    }

    /// Queues a batch for the disk. If too many batches wait already, it is dropped and counted.
    pub(crate) fn record(&self, batch: &BatchReport, target: &Target, project: &Project) {
        let record = Arc::new(BatchRecord::new(batch, target, project));
        let mut state = self.shared.lock();
        if state.records.len() < MAX_QUEUED_BATCHES {
            state.records.push_back(record);
            self.shared.wake(&mut state);
        } else {
            self.recordings.discard(record.recorded_rooms());
            self.shared.wake(&mut state);
            drop(state);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Queues an event for the disk, and waits until it is durable or the history is degraded.
    pub(crate) async fn record_event(&self, event: HistoryEvent) -> EventRecorded {
        let number = {
            let mut state = self.shared.lock();
            if state.events.len() >= MAX_QUEUED_EVENTS {
                return EventRecorded::Dropped;
            }
            state.events.push_back(event);
            state.queued_events += 1;
            self.shared.wake(&mut state);
            state.queued_events
        };
        let decided = |progress: &WriterProgress| {
            progress.events_written >= number || progress.degraded || progress.ended
        };
        self.shared.wait_until(decided).await;
        if self.shared.progress.borrow().events_written >= number {
            EventRecorded::Durable
        } else {
            EventRecorded::Waiting
        }
    }

    /// Queues a target's state, its incident and the messages about it, which are written together. It replaces what waits for
    /// the disk under the same keys.
    pub(crate) fn record_detection(&self, record: DetectionRecord) {
        let mut state = self.shared.lock();
        let given_up = state.detections.record(record);
        self.shared.wake(&mut state);
        drop(state);
        self.shared.report_given_up(given_up);
    }

    /// Waits until all detections that were recorded so far are durable, or the history is degraded: a message that is sent
    /// after that is sent again at most once.
    pub(crate) async fn detections_durable(&self) {
        let change = self.shared.lock().detections.change();
        let written = |progress: &WriterProgress| {
            progress.detections_written >= change || progress.degraded || progress.ended
        };
        self.shared.wait_until(written).await;
    }

    /// Removes a message that was delivered or given up.
    pub(crate) fn message_done(&self, id: &str) {
        let mut state = self.shared.lock();
        state.detections.message_done(id);
        self.shared.wake(&mut state);
    }

    /// The messages that earlier runs left, the oldest first, excluding those that are done meanwhile. While the history is
    /// degraded, the disk may have more.
    pub(crate) fn outbox(&self) -> Vec<OutboxMessage> {
        self.shared.lock().detections.outbox()
    }

    /// The last state of the target that was recorded in any run and is on disk.
    pub(crate) async fn target_state(&self, target: &str) -> Result<Option<String>, ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| read::target_state(connection, &target);
        self.reader.read(query).await
    }

    /// Incidents, the latest first.
    pub(crate) async fn incidents(
        &self,
        filter: IncidentFilter,
    ) -> Result<Vec<StoredDocument>, ReadError> {
        let query = move |connection: &_| read::incidents(connection, &filter);
        self.reader.read(query).await
    }

    /// The document of an incident.
    pub(crate) async fn incident(&self, id: String) -> Result<Option<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::incident(connection, &id);
        self.reader.read(query).await
    }

    /// The latest probes of a target, the newest first, at most [`MAX_BATCHES`].
    pub(crate) async fn recent_probes(
        &self,
        target: &str,
        limit: usize,
    ) -> Result<Vec<RecentProbe>, ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| read::recent_probes(connection, &target, limit);
        self.reader.read(query).await
    }

    /// The documents of batches without their probes, the latest first.
    pub(crate) async fn batches(
        &self,
        filter: BatchFilter,
    ) -> Result<Vec<StoredDocument>, ReadError> {
        let query = move |connection: &_| read::batches(connection, &filter);
        self.reader.read(query).await
    }

    /// The documents of probes with their batches' ids and targets, the latest first.
    pub(crate) async fn probes(
        &self,
        filter: ProbeFilter,
    ) -> Result<Vec<StoredDocument>, ReadError> {
        let query = move |connection: &_| read::probes(connection, &filter);
        self.reader.read(query).await
    }

    /// Events, the latest first.
    pub(crate) async fn events(&self, filter: EventFilter) -> Result<Vec<HistoryEvent>, ReadError> {
        let query = move |connection: &_| events::events(connection, &filter);
        self.reader.read(query).await
    }

    /// The rooms of scheduled batches in the hours and days before `now`, for comparison with those before: of all targets, or of
    /// one.
    pub(crate) async fn statistics(
        &self,
        now: DateTime<Utc>,
        target: Option<String>,
    ) -> Result<Statistics, ReadError> {
        let query =
            move |connection: &_| statistics::statistics(connection, now, target.as_deref());
        self.reader.read(query).await
    }

    /// The document of a batch, with its probes.
    pub(crate) async fn batch(&self, id: String) -> Result<Option<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::batch(connection, &id);
        self.reader.read(query).await
    }

    /// The document of a probe, by its room's name.
    pub(crate) async fn probe(&self, room: String) -> Result<Option<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::probe(connection, &room);
        self.reader.read(query).await
    }

    /// The target's last batch with one of these purposes that was not aborted.
    pub(crate) async fn last_completed(
        &self,
        target: &str,
        purposes: &'static [Purpose],
    ) -> Result<Option<LastBatch>, ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| read::last_completed(connection, &target, purposes);
        self.reader.read(query).await
    }

    /// Whether an agent ever joined a room of this target while it was configured with this agent name.
    pub(crate) async fn has_seen_agent(
        &self,
        target: &str,
        agent_name: Option<&str>,
    ) -> Result<bool, ReadError> {
        let target = target.to_owned();
        let agent_name = agent_name.unwrap_or_default().to_owned();
        let query = move |connection: &_| read::has_seen_agent(connection, &target, &agent_name);
        self.reader.read(query).await
    }
}

impl Reservation {
    pub(crate) fn worst_case(&self) -> Duration {
        self.worst_case
    }

    /// Lowers the worst case. A higher one changes nothing.
    pub(crate) fn shrink(&mut self, worst_case: Duration) {
        if worst_case < self.worst_case {
            self.worst_case = worst_case;
            let mut state = self.shared.lock();
            state.ledger.reserve(&self.room, whole_seconds(worst_case));
            self.shared.wake(&mut state);
        }
    }

    /// Records that the room may exist from now on.
    pub(crate) fn opened(&mut self) {
        self.opened = true;
    }

    /// Records the agent time that the room used.
    pub(crate) fn settle(mut self, agent_time: Duration) {
        self.opened = true;
        let mut state = self.shared.lock();
        state.ledger.settle(&self.room, whole_seconds(agent_time));
        self.shared.wake(&mut state);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let now = (self.shared.clock)();
        let mut state = self.shared.lock();
        let Some(row) = state.ledger.get(&self.room) else {
            return;
        };
        // The ledger ignores a second settlement, so this changes nothing after `settle`.
        if self.opened {
            let worst = row.reserved;
            state.ledger.settle(&self.room, worst);
        } else {
            state.ledger.settle(&self.room, 0);
            state.ledger.gone(&self.room, now);
        }
        self.shared.wake(&mut state);
    }
}

impl std::fmt::Debug for HistoryShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HistoryShared").finish_non_exhaustive()
    }
}

impl HistoryShared {
    fn lock(&self) -> MutexGuard<'_, HistoryState> {
        // The ledger's figures are sums that stay in bounds, so a panic elsewhere does not make them unusable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what the disk holds to what has happened since the start.
    fn load(&self, loaded: LoadedHistory) {
        let mut state = self.lock();
        state.ledger.load(loaded.ledger);
        state.ledger.lost &= !state.accepted;
        let given_up = state.detections.load(loaded.outbox);
        drop(state);
        self.report_given_up(given_up);
    }

    fn report_given_up(&self, given_up: usize) {
        if given_up > 0 {
            self.count_fault();
            tracing::error!(
                "too many incidents and messages wait to be written or delivered: the {given_up} oldest are dropped from the \
                 history"
            );
        }
    }

    fn wake(&self, state: &mut HistoryState) {
        state.has_work = true;
        self.work.notify_one();
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        self.wake(&mut state);
    }

    /// Waits until the ledger's change is durable, or can't be written.
    async fn wait_until_written(&self, change: u64) {
        let decided = |progress: &WriterProgress| {
            progress.written >= change || progress.ledger_down || progress.ended
        };
        if !self.wait_until(decided).await {
            self.set_ledger_down();
        }
    }

    /// Returns whether the writer's progress decided this in time. If not, the disk hangs, and the history is degraded.
    async fn wait_until(&self, decided: impl FnMut(&WriterProgress) -> bool) -> bool {
        let mut progress = self.progress.subscribe();
        let in_time = timeout(RESERVE_TIMEOUT, progress.wait_for(decided)).await;
        if in_time.is_err() {
            self.set_unwritable(&format!(
                "the disk stored no row within {RESERVE_TIMEOUT:?}"
            ));
        }
        in_time.is_ok()
    }

    // The writer's side.

    /// Waits for work, at most for this long. Returns whether the history is closing.
    fn wait_for_work(&self, max_wait: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .work
            .wait_timeout_while(state, max_wait, |state| !state.has_work);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.has_work = false;
        state.closing
    }

    /// The rows to write, the number of the last change in them, and whether a lost ledger was accepted.
    fn unwritten(&self) -> (Vec<(RoomName, LedgerRow)>, u64, bool) {
        let state = self.lock();
        let (rows, change) = state.ledger.unwritten();
        (rows, change, state.accepted)
    }

    fn ledger_written(&self, change: u64) {
        self.lock().ledger.written(change, &self.boot);
        self.progress.send_modify(|progress| {
            progress.written = change;
            progress.ledger_down = false;
        });
    }

    fn detections_written(&self, change: u64) {
        self.lock().detections.written(change);
        self.progress
            .send_modify(|progress| progress.detections_written = change);
    }

    fn next_event(&self) -> Option<HistoryEvent> {
        self.lock().events.front().cloned()
    }

    /// Removes the event in front.
    fn event_done(&self) {
        self.lock().events.pop_front();
        self.progress
            .send_modify(|progress| progress.events_written += 1);
    }

    fn set_ledger_down(&self) {
        self.progress
            .send_modify(|progress| progress.ledger_down = true);
    }

    fn next_record(&self) -> Option<Arc<BatchRecord>> {
        self.lock().records.front().cloned()
    }

    /// Removes the record in front, and counts it if it was not written.
    fn record_done(&self, written: bool) {
        self.lock().records.pop_front();
        if !written {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_degraded(&self) -> bool {
        self.progress.borrow().degraded
    }

    /// The history is degraded. Logged and counted once, until [`HistoryShared::set_healthy`].
    fn set_unwritable(&self, why: &str) {
        if self.set_degraded(true) {
            self.count_fault();
            tracing::error!(
                "the history is degraded: {why}. Probing goes on, and budgets count in memory until the history can be \
                 written again"
            );
        }
    }

    fn set_healthy(&self) {
        if self.set_degraded(false) {
            tracing::warn!("the history can be written again");
        }
    }

    fn count_fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns whether this is a change.
    fn set_degraded(&self, degraded: bool) -> bool {
        self.progress.send_if_modified(|progress| {
            let changed = progress.degraded != degraded;
            progress.degraded = degraded;
            changed
        })
    }

    fn writer_ended(&self) {
        let closing = self.lock().closing;
        self.progress.send_modify(|progress| progress.ended = true);
        if !closing {
            self.set_unwritable("its thread ended unexpectedly");
        }
    }
}

/// Rounded up.
fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
pub(crate) mod tests;
