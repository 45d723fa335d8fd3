//! What is kept on disk: batches and their probes, the budget ledger, the journal of rooms.
//!
//! Decisions are made on the ledger in memory, which one thread writes down: a reservation waits until its row is
//! durable, and nothing else waits for the disk. Where the disk takes nothing, the history is degraded: probing goes
//! on, the ledger and the journal count from memory, and are written when it takes something again.
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
use crate::report::BatchReport;

mod ledger;
mod read;
mod record;
mod store;
mod writer;

use ledger::{Ledger, Loaded, Row};
use record::Record;
use store::{NotOpened, Store};
use writer::Writer;

pub use ledger::Used;
pub use read::{BatchFilter, Counts, LastBatch, MAX_BATCHES, ReadError};

/// How long a reservation waits for the disk: whoever wants more than that is degraded, and probing goes on.
pub const RESERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Batches that wait for the disk; what comes on top is dropped and counted.
const MAX_QUEUED_RECORDS: usize = 32;

/// The wall clock; another one in tests.
pub type Clock = Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>;

/// The handle to the history. Cheap to clone; with the last one the thread behind it ends.
#[derive(Clone)]
pub struct History {
    shared: Arc<Shared>,
    reader: read::Reader,
    _life: Arc<Life>,
}

/// Why the history can't be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another livekit-canary uses the folder {}: give each a history.dir of its own", .0.display())]
    Locked(PathBuf),
    #[error(
        "{} was written by a newer livekit-canary (format {found}, this one knows {known}): run that one, or set \
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

/// A room that an earlier run journalled and that nobody has vouched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrphanRoom {
    pub room: RoomName,
    pub project: String,
    pub target: String,
    pub opened_at: DateTime<Utc>,
}

/// Agent time that is set aside for one room. However it ends, it never counts less than was used: a room that opened
/// and was not settled stays at its worst case.
#[must_use = "dropped at once, it reserves nothing"]
#[derive(Debug)]
pub struct Reservation {
    shared: Arc<Shared>,
    room: RoomName,
    worst_case: Duration,
    opened: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    progress: watch::Sender<Progress>,
    dropped: AtomicU64,
    faults: AtomicU64,
    clock: Clock,
    /// This run of the program in the journal.
    boot: String,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    records: VecDeque<Arc<Record>>,
    /// Told to count from zero where the ledger is lost.
    accepted: bool,
    has_work: bool,
    closing: bool,
}

/// What the writer has come to.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// The ledger's last change that is durable.
    written: u64,
    /// The ledger's rows can't be written.
    ledger_down: bool,
    /// Something can't be written.
    degraded: bool,
    ended: bool,
}

/// Ends the writer with the last handle.
struct Life(Arc<Shared>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl History {
    /// Opens the history in its folder and begins one where there is none.
    ///
    /// Blocks on the disk. A folder that can't be written to is no error: the history is degraded then.
    ///
    /// # Errors
    /// Another process uses the folder; a newer version of this program wrote it; no thread can be started.
    pub fn open(settings: &config::HistorySettings) -> Result<Self, OpenError> {
        Self::open_with_clock(settings, Arc::new(Utc::now))
    }

    /// # Errors
    /// See [`History::open`].
    pub fn open_with_clock(
        settings: &config::HistorySettings,
        clock: Clock,
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
        clock: Clock,
    ) -> Result<(Self, Writer), OpenError> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
            dropped: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            clock,
            boot: format!("{:016x}", fastrand::u64(..)),
        });
        let store = match Store::open(&settings.dir, (shared.clock)()) {
            Ok((store, loaded)) => {
                shared.lock().load(loaded);
                Some(store)
            }
            Err(NotOpened::Refused(error)) => return Err(error),
            Err(NotOpened::Unavailable(why)) => {
                // What was used before can't be read, or not yet.
                shared.lock().ledger.lost = true;
                shared.ledger_down();
                shared.trouble(&why);
                None
            }
        };
        let history = Self {
            shared: Arc::clone(&shared),
            reader: read::Reader::new(&settings.dir),
            _life: Arc::new(Life(Arc::clone(&shared))),
        };
        Ok((history, Writer::new(shared, settings.clone(), store)))
    }

    /// Writes down what is waiting and ends the thread; says whether all of it was done before the deadline.
    ///
    /// The folder is unlocked then, and what comes later is lost.
    pub async fn close(&self, deadline: Instant) -> bool {
        self.shared.close();
        let mut progress = self.shared.progress.subscribe();
        let ended = progress.wait_for(|progress| progress.ended);
        let ended = timeout_at(deadline, ended).await.is_ok();
        let state = self.shared.lock();
        ended && state.records.is_empty() && state.ledger.unwritten().0.is_empty()
    }

    pub fn is_degraded(&self) -> bool {
        self.shared.is_degraded()
    }

    /// Batches that were not recorded.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Faults that were logged: a history that could not be written any more, a batch that did not fit into it.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// Counts a lost ledger from zero, in this run and in later ones.
    pub fn accept_lost_ledger(&self) {
        let mut state = self.shared.lock();
        state.accepted = true;
        state.ledger.lost = false;
        self.shared.wake(&mut state);
    }

    pub fn now(&self) -> DateTime<Utc> {
        (self.shared.clock)()
    }

    pub fn used(&self, project: &str) -> Used {
        let now = self.now();
        self.shared.lock().ledger.used(project, now)
    }

    /// Sets agent time aside and journals the room, before it can exist. Durable when it returns, or the history is
    /// degraded.
    ///
    /// `admit` judges by what was used so far; nobody else's reservation comes between its word and this one.
    ///
    /// # Errors
    /// What `admit` says.
    pub async fn reserve<E>(
        &self,
        room: &RoomName,
        project: &str,
        target: &str,
        worst_case: Duration,
        admit: impl FnOnce(&Used, DateTime<Utc>) -> Result<(), E>,
    ) -> Result<Reservation, E> {
        let now = self.now();
        let change = {
            let mut state = self.shared.lock();
            admit(&state.ledger.used(project, now), now)?;
            let row = Row {
                project: project.to_owned(),
                target: target.to_owned(),
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
        let reservation = Reservation {
            shared: Arc::clone(&self.shared),
            room: room.clone(),
            worst_case,
            opened: false,
        };
        self.shared.written(change).await;
        Ok(reservation)
    }

    /// The janitor vouches for the room: it is gone for good.
    pub fn gone(&self, room: &RoomName) {
        let now = self.now();
        let mut state = self.shared.lock();
        state.ledger.gone(room, now);
        self.shared.wake(&mut state);
    }

    /// The target of a room that nobody has vouched for yet.
    pub fn target_of(&self, room: &RoomName) -> Option<String> {
        let state = self.shared.lock();
        state.ledger.get(room).map(|row| row.target.clone())
    }

    /// The rooms that dead runs of this program journalled and nobody vouched for, the oldest first.
    pub fn orphan_rooms(&self) -> Vec<OrphanRoom> {
        let state = self.shared.lock();
        let left = state.ledger.left_by_others(&self.shared.boot);
        let mut left: Vec<OrphanRoom> = left
            .map(|(room, row)| OrphanRoom {
                room: room.clone(),
                project: row.project.clone(),
                target: row.target.clone(),
                opened_at: row.opened_at,
            })
            .collect();
        left.sort_by(|one, other| (one.opened_at, &one.room).cmp(&(other.opened_at, &other.room)));
        left
    }

    /// Keeps a batch. Where too many wait for the disk it is dropped and counted.
    pub fn record(&self, batch: &BatchReport, target: &Target, project: &Project) {
        let record = Arc::new(Record::of(batch, target, project));
        let mut state = self.shared.lock();
        if state.records.len() < MAX_QUEUED_RECORDS {
            state.records.push_back(record);
            self.shared.wake(&mut state);
        } else {
            drop(state);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The documents of batches, the latest first, without their probes.
    pub async fn batches(&self, filter: BatchFilter) -> Result<Vec<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::batches(connection, &filter);
        self.reader.read(query).await
    }

    /// The document of a batch, with its probes.
    pub async fn batch(&self, id: String) -> Result<Option<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::batch(connection, &id);
        self.reader.read(query).await
    }

    /// The document of a probe, by its room's name.
    pub async fn probe(&self, room: String) -> Result<Option<Box<RawValue>>, ReadError> {
        let query = move |connection: &_| read::probe(connection, &room);
        self.reader.read(query).await
    }

    pub async fn last_completed(&self, target: &str) -> Result<Option<LastBatch>, ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| read::last_completed(connection, &target);
        self.reader.read(query).await
    }

    /// Whether an agent has ever come to a room of this target; `agent_name` as it is configured.
    pub async fn has_seen_agent(
        &self,
        target: &str,
        agent_name: Option<&str>,
    ) -> Result<bool, ReadError> {
        let target = target.to_owned();
        let agent_name = agent_name.unwrap_or_default().to_owned();
        let query = move |connection: &_| read::has_seen_agent(connection, &target, &agent_name);
        self.reader.read(query).await
    }

    pub async fn counts(&self, target: &str) -> Result<Counts, ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| read::counts(connection, &target);
        self.reader.read(query).await
    }
}

impl Reservation {
    pub fn worst_case(&self) -> Duration {
        self.worst_case
    }

    /// From here on there may be a room.
    pub fn opened(&mut self) {
        self.opened = true;
    }

    /// What the room's agent time came to.
    pub fn settle(mut self, agent_time: Duration) {
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

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl State {
    fn load(&mut self, loaded: Loaded) {
        self.ledger.load(loaded);
        self.ledger.lost &= !self.accepted;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside a change would be a fault of the ledger's own; its figures are sums that stay in bounds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        state.has_work = true;
        self.work.notify_one();
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        self.wake(&mut state);
    }

    /// Waits until the ledger's change is durable, or can't be made so.
    async fn written(&self, change: u64) {
        let mut progress = self.progress.subscribe();
        let decided = progress.wait_for(|progress| {
            progress.written >= change || progress.ledger_down || progress.ended
        });
        if timeout(RESERVE_TIMEOUT, decided).await.is_err() {
            self.ledger_down();
            self.trouble(&format!("the disk took no row within {RESERVE_TIMEOUT:?}"));
        }
    }

    // The writer's side.

    /// Waits for work, `most` at most; says whether it is the last.
    fn wait_for_work(&self, most: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .work
            .wait_timeout_while(state, most, |state| !state.has_work);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.has_work = false;
        state.closing
    }

    /// The rows that are to be written, the last change in them, and whether a lost ledger was accepted.
    fn unwritten(&self) -> (Vec<(RoomName, Row)>, u64, bool) {
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

    fn ledger_down(&self) {
        let down = |progress: &mut Progress| progress.ledger_down = true;
        self.progress.send_modify(down);
    }

    fn next_record(&self) -> Option<Arc<Record>> {
        self.lock().records.front().cloned()
    }

    /// The record in front is done with.
    fn record_done(&self, kept: bool) {
        self.lock().records.pop_front();
        if !kept {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_degraded(&self) -> bool {
        self.progress.borrow().degraded
    }

    /// Something can't be written. Told once, until all is well again.
    fn trouble(&self, why: &str) {
        if self.set_degraded(true) {
            self.count_fault();
            tracing::error!(
                "the history is degraded: {why}; probing goes on, and budgets count from memory until it is written again"
            );
        }
    }

    fn count_fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    fn well(&self) {
        if self.set_degraded(false) {
            tracing::warn!("the history is written again");
        }
    }

    /// Says whether that is new.
    fn set_degraded(&self, degraded: bool) -> bool {
        self.progress.send_if_modified(|progress| {
            let new = progress.degraded != degraded;
            progress.degraded = degraded;
            new
        })
    }

    fn writer_ended(&self) {
        let closing = self.lock().closing;
        self.progress.send_modify(|progress| progress.ended = true);
        if !closing {
            self.trouble("its thread died");
        }
    }
}

/// Rounded up.
fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests;
