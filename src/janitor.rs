//! Owns every room name until its room is gone: after success, failure, timeout, cancel and panic alike.
//!
//! It knows rooms and dispatches, and nothing about outcomes.
//!
//! A deletion is not the end of a room. Three things bring a room back; all were seen on livekit-server 1.13.5:
//!
//! - A request that was in flight when its probe was dropped: `CreateRoom`, `CreateDispatch` or a join. Each of them
//!   creates a missing room.
//! - A late agent: the target's, or the project's unnamed agent, which LiveKit sends to every room. `DeleteDispatch`
//!   makes the worker end the job. A livekit-agents 1.8.9 worker still lets the entrypoint run for another 15 s. If the
//!   entrypoint connects in that time, it re-creates the room with default settings, and that room stays for 5 minutes
//!   after the agent has left. An agent that is connecting while the room is deleted does the same: it tries again 15 s
//!   later. After a second deletion the room stays away, unless automatic dispatch sends another agent to it: see
//!   [`RoomCleanup::drain`].
//! - An agent that was cut off: the server was killed and is back, or the network was down. LiveKit's SDKs try to connect
//!   again for up to 50 s, with a token that creates a missing room. An agent of livekit-agents 1.8.9 then stays in it
//!   alone for more than 6 minutes. A deletion that finds no room is a sign of it: the server has lost the room.
//!   An agent that is connecting again at the moment of the deletion gives no sign, because the server keeps its
//!   participant meanwhile. It re-creates the room 0.4 s later.
//!
//! So the janitor looks for a deleted room by its exact name while an agent may still come, at least every 5 s. It looks
//! for every room that existed for 2 s at least.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::livekit::RoomName;
use crate::livekit::wire::api::{Api, ApiError, Call};

/// Smallest `late_agent_window` that outlasts every late agent: a livekit-agents worker grants an ended job 15 s, and
/// connecting takes about 2.5 s more at worst on two busy cores.
pub(crate) const MIN_SAFE_WINDOW: Duration = Duration::from_secs(20);

/// For how long a deleted room is re-checked although its agents were connected: one of them may have been connecting again.
const RECONNECT_WINDOW: Duration = Duration::from_secs(2);

/// Time for running deletions at exit, when nothing else is waited for.
pub(crate) const FINAL_DELETION_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause before the first retry of a call; it doubles with each retry.
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Bound for one deletion of a sweep, retries included.
const SWEEP_DELETION_TIMEOUT: Duration = Duration::from_secs(10);

/// Nothing waits for a sweep, so a few deletions at a time are enough and stay far below the API's rate limit.
const MAX_CONCURRENT_SWEEPS: usize = 4;

/// Called once per room, when its clean-up is over. Must not block.
pub(crate) type OnCleanup = Arc<dyn Fn(&RoomName, CleanupResult<'_>) + Send + Sync>;

/// How the clean-up of a room ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CleanupResult<'a> {
    /// The room is gone for good.
    Gone,
    /// The room may still exist, or come back.
    Unconfirmed { why: &'a str },
}

/// The handle through which probes lease room names. Cheap to clone.
#[derive(Clone)]
pub struct Janitor {
    shared: Arc<JanitorShared>,
}

struct JanitorShared {
    /// Every leased room that is not confirmed to be gone. A name is removed only when its room is gone for good.
    rooms: Mutex<BTreeMap<RoomName, CleanupState>>,
    /// Notified at each change of `rooms`.
    changed: Notify,
    /// Owns the clean-up tasks. Each lease holds a token of it, so it is empty only when no room is owned any more.
    tasks: TaskTracker,
    runtime: Handle,
    on_cleanup: OnCleanup,
}

/// The right to use a room's name. When the lease is dropped, the janitor deletes the room.
pub struct RoomLease {
    /// `None` once clean-up has begun.
    cleanup: Option<RoomCleanup>,
}

/// Result of a room's deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// LiveKit confirmed the deletion, or knows no such room.
    Deleted {
        at: Instant,
    },
    NotDeleted {
        why: String,
    },
    /// The room was never created.
    NothingThere,
}

/// Result of [`Janitor::sweep`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepResult {
    /// Deleted or already gone. Their re-checks continue in the background.
    pub deleted: Vec<RoomName>,
    pub unconfirmed: Vec<UnconfirmedRoom>,
}

/// A room that may still exist, or come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnconfirmedRoom {
    pub room: RoomName,
    pub why: String,
}

impl Janitor {
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start() -> Self {
        Self::start_with(Arc::new(|_, _| {}))
    }

    /// Calls `on_cleanup` for each room whose clean-up is over, before [`Janitor::close`] returns.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_with(on_cleanup: OnCleanup) -> Self {
        let tasks = TaskTracker::new();
        tasks.close();
        Self {
            shared: Arc::new(JanitorShared {
                rooms: Mutex::default(),
                changed: Notify::new(),
                tasks,
                runtime: Handle::current(),
                on_cleanup,
            }),
        }
    }

    /// Leases a room name, before the room can exist.
    ///
    /// `deletion_timeout` bounds one deletion, retries included. If an agent may still come, the deleted room is
    /// re-checked for `late_agent_window`; see [`MIN_SAFE_WINDOW`].
    pub fn lease(
        &self,
        room: RoomName,
        api: Api,
        deletion_timeout: Duration,
        late_agent_window: Duration,
    ) -> RoomLease {
        self.shared.set_state(&room, CleanupState::Leased);
        RoomLease {
            cleanup: Some(RoomCleanup {
                shared: Arc::clone(&self.shared),
                _token: self.shared.tasks.token(),
                room,
                api,
                deletion_timeout,
                late_agent_window,
                dispatches: Vec::new(),
                agents_connected: false,
                lost_sight: false,
                not_created: false,
            }),
        }
    }

    /// Deletes rooms of runs of this program that have ended, a few at a time. A room that does not exist counts as
    /// deleted. Each room is re-checked and reported to `on_cleanup` like any other.
    ///
    /// Takes at most 10 s per four rooms. If the future is dropped, rooms whose deletion has not begun are left alone.
    pub async fn sweep(&self, api: &Api, rooms: Vec<RoomName>) -> SweepResult {
        let deletions = rooms.into_iter().map(|room| async {
            // An agent may still be on its way to the room.
            let window = MIN_SAFE_WINDOW;
            let lease = self.lease(room.clone(), api.clone(), SWEEP_DELETION_TIMEOUT, window);
            (room, lease.delete().await)
        });
        let mut deletions = stream::iter(deletions).buffered(MAX_CONCURRENT_SWEEPS);
        let mut swept = SweepResult::default();
        while let Some((room, deletion)) = deletions.next().await {
            match deletion {
                Deletion::Deleted { .. } | Deletion::NothingThere => swept.deleted.push(room),
                Deletion::NotDeleted { why } => {
                    swept.unconfirmed.push(UnconfirmedRoom { room, why });
                }
            }
        }
        swept
    }

    /// Waits until every room is gone and every re-check is over, or until `deadline`. Returns the rooms that are not
    /// confirmed to be gone.
    ///
    /// A room whose deletion failed has used its time and is not waited for. Deletions and re-checks that outlive the
    /// deadline continue for as long as the runtime does.
    pub async fn close(self, deadline: Instant) -> Vec<UnconfirmedRoom> {
        let all_decided = async {
            loop {
                let changed = self.shared.changed.notified();
                if self.shared.lock().values().all(CleanupState::is_decided) {
                    return;
                }
                changed.await;
            }
        };
        // A clean-up task that panicked never decides its room, but the tracker sees it end.
        let all_done = async {
            tokio::select! {
                () = all_decided => {}
                () = self.shared.tasks.wait() => {}
            }
        };
        // Finished or timed out: the states below describe either.
        let _elapsed = timeout_at(deadline, all_done).await;
        let now = Instant::now();
        let rooms = self.shared.lock();
        let unconfirmed = rooms.iter().map(|(room, state)| UnconfirmedRoom {
            room: room.clone(),
            why: state.describe(now),
        });
        unconfirmed.collect()
    }
}

impl RoomLease {
    /// Records that no room exists: the only request that creates it never reached LiveKit, or LiveKit refused it.
    pub fn not_created(&mut self) {
        self.cleanup().not_created = true;
    }

    /// Records a dispatch that must be deleted before the room.
    pub fn dispatched(&mut self, dispatch_id: String) {
        self.cleanup().dispatches.push(dispatch_id);
    }

    /// Records whether every agent of the target's name is in the room with its connection up. The deletion disconnects
    /// such agents, so none of them comes late unless it was connecting again at that moment.
    ///
    /// Otherwise an agent may always come: LiveKit sends the project's unnamed agent to every room that is created.
    pub fn agents_connected(&mut self, connected: bool) {
        self.cleanup().agents_connected = connected;
    }

    /// Records that an agent of the room may be cut off from the server, because the canary lost its own connection or the
    /// call failed. The deletion does not reach such an agent, and it connects again.
    pub fn lost_sight(&mut self) {
        self.cleanup().lost_sight = true;
    }

    /// Deletes the dispatches and the room, and returns the result of the deletion. Re-checks continue in the
    /// background.
    ///
    /// Takes at most the lease's `deletion_timeout`. Dropping the future stops nothing.
    pub async fn delete(mut self) -> Deletion {
        let (deletion_tx, deletion_rx) = oneshot::channel();
        if let Some(cleanup) = self.cleanup.take() {
            cleanup.spawn(Some(deletion_tx));
        }
        deletion_rx.await.unwrap_or_else(|_| Deletion::NotDeleted {
            why: "the janitor's task failed".to_owned(),
        })
    }

    fn cleanup(&mut self) -> &mut RoomCleanup {
        self.cleanup
            .as_mut()
            .expect("taken only when the lease ends")
    }
}

impl Drop for RoomLease {
    fn drop(&mut self) {
        if let Some(cleanup) = self.cleanup.take() {
            cleanup.spawn(None);
        }
    }
}

/// The state that a room would be reported in if the process ended now.
#[derive(Debug, Clone)]
enum CleanupState {
    Leased,
    Deleting,
    /// The room came back after its deletion.
    DeletingAgain,
    NotDeleted {
        why: String,
    },
    /// Deleted, and re-checked until the window ends.
    Rechecking {
        since: Instant,
        until: Instant,
    },
    /// Deleted, but the last re-check did not confirm that the room is gone.
    Unknown {
        why: String,
    },
}

impl CleanupState {
    fn is_decided(&self) -> bool {
        matches!(self, Self::NotDeleted { .. } | Self::Unknown { .. })
    }

    fn describe(&self, now: Instant) -> String {
        match self {
            Self::Leased => "its probe is still running".to_owned(),
            Self::Deleting => "its deletion is still running".to_owned(),
            Self::DeletingAgain => {
                "a late agent re-created it, and its second deletion is still running".to_owned()
            }
            Self::NotDeleted { why } => format!("not deleted: {why}"),
            Self::Rechecking { since, until } => format!(
                "deleted, but re-checked for only {} of {} s: a late agent would re-create it",
                (now - *since).as_secs(),
                (*until - *since).as_secs()
            ),
            Self::Unknown { why } => {
                format!("deleted, but a late agent may have re-created it: {why}")
            }
        }
    }
}

impl JanitorShared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RoomName, CleanupState>> {
        // Each change is a single insert or remove, so a panic elsewhere leaves the map consistent.
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, room: &RoomName, state: CleanupState) {
        self.lock().insert(room.clone(), state);
        self.changed.notify_waiters();
    }

    fn remove(&self, room: &RoomName) {
        self.lock().remove(room);
        self.changed.notify_waiters();
    }
}

/// A room, everything that its deletion needs, and a claim on the janitor's time.
struct RoomCleanup {
    shared: Arc<JanitorShared>,
    _token: TaskTrackerToken,
    room: RoomName,
    api: Api,
    deletion_timeout: Duration,
    late_agent_window: Duration,
    dispatches: Vec<String>,
    agents_connected: bool,
    lost_sight: bool,
    not_created: bool,
}

/// What a deletion found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeletedRoom {
    Existed,
    /// The server knew no such room: it has restarted, or another program deleted the room.
    Unknown,
}

impl RoomCleanup {
    /// Runs the clean-up in a task of its own, so that it survives the cancellation of the probe.
    fn spawn(self, deletion_tx: Option<oneshot::Sender<Deletion>>) {
        let shared = Arc::clone(&self.shared);
        shared.set_state(&self.room, CleanupState::Deleting);
        let task = self.run(deletion_tx);
        shared.tasks.spawn_on(task, &shared.runtime);
    }

    async fn run(self, deletion_tx: Option<oneshot::Sender<Deletion>>) {
        let dropped = deletion_tx.is_none();
        let found = if self.not_created {
            Ok(DeletedRoom::Unknown)
        } else {
            // Only `CreateDispatch` returns an id. Other dispatches are found in the list, and so is one whose answer
            // was lost.
            let list = !self.agents_connected || self.dispatches.is_empty();
            self.delete(&self.dispatches, list).await
        };
        let window = self.recheck_window(dropped, &found);
        let deleted = found.map(drop);
        if let Some(deletion_tx) = deletion_tx {
            let deletion = match &deleted {
                _ if self.not_created => Deletion::NothingThere,
                Ok(()) => Deletion::Deleted { at: Instant::now() },
                Err(why) => Deletion::NotDeleted { why: why.clone() },
            };
            if deletion_tx.send(deletion).is_err() {
                tracing::debug!(room = %self.room, "the probe did not wait for its room's deletion");
            }
        }
        // The callback runs before the state changes: `close` waits for the state, so the journal is complete by then.
        match self.recheck(window, deleted).await {
            None => {
                (self.shared.on_cleanup)(&self.room, CleanupResult::Gone);
                self.shared.remove(&self.room);
            }
            Some(state) => {
                let why = state.describe(Instant::now());
                (self.shared.on_cleanup)(&self.room, CleanupResult::Unconfirmed { why: &why });
                self.shared.set_state(&self.room, state);
            }
        }
    }

    /// For how long the room can come back.
    fn recheck_window(&self, dropped: bool, found: &Result<DeletedRoom, String>) -> Duration {
        // A failed deletion gets the same window, because the server may answer again.
        let disconnected_all =
            self.agents_connected && !self.lost_sight && found == &Ok(DeletedRoom::Existed);
        if self.not_created {
            Duration::ZERO
        } else if !disconnected_all {
            self.late_agent_window.max(self.deletion_timeout)
        } else if dropped {
            // A call that creates a missing room may have been in flight.
            self.deletion_timeout
        } else {
            RECONNECT_WINDOW.min(self.late_agent_window)
        }
    }

    /// Ends the jobs of the given dispatches, then deletes the room; takes at most `deletion_timeout`.
    ///
    /// `list` adds every dispatch that the server lists: LiveKit's own, and those whose `CreateDispatch` answer was lost.
    ///
    /// The order matters. The server forgets the dispatches of a deleted room, and a job that was not ended re-creates
    /// the room.
    async fn delete(&self, dispatches: &[String], list: bool) -> Result<DeletedRoom, String> {
        let now = Instant::now();
        self.end_dispatches(dispatches, list, now + self.deletion_timeout / 2)
            .await;
        let deadline = now + self.deletion_timeout;
        let deleted = retry_until(deadline, || self.api.delete_room(&self.room)).await;
        match deleted {
            Ok(()) => Ok(DeletedRoom::Existed),
            Err(error) if error.is_not_found() => Ok(DeletedRoom::Unknown),
            Err(error) => {
                let why = error.to_string();
                tracing::warn!(room = %self.room, why, "could not delete the room");
                Err(why)
            }
        }
    }

    /// Errors are only logged: the room's deletion follows in any case, and the re-checks find a room that an agent
    /// re-creates.
    async fn end_dispatches(&self, known: &[String], list: bool, deadline: Instant) {
        let ended = async {
            for id in known {
                self.end_dispatch(id).await?;
            }
            if list {
                let listed = self.api.list_dispatch(&self.room).await.result?;
                for dispatch in listed.iter().filter(|found| !known.contains(&found.id)) {
                    self.end_dispatch(&dispatch.id).await?;
                }
            }
            Ok::<_, ApiError>(())
        };
        match timeout_at(deadline, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(room = %self.room, %error, "could not delete the room's dispatch");
            }
            Err(_) => tracing::debug!(room = %self.room, "no time to delete the room's dispatch"),
        }
    }

    async fn end_dispatch(&self, id: &str) -> Result<(), ApiError> {
        match self.api.delete_dispatch(&self.room, id).await.result {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Looks for the room until the window ends, and deletes it each time it is found. Returns `None` if the room is
    /// gone for good.
    async fn recheck(
        &self,
        window: Duration,
        mut deleted: Result<(), String>,
    ) -> Option<CleanupState> {
        let mut schedule = RecheckSchedule::new(Instant::now(), window);
        let mut doubt = None;
        let mut returns = 0;
        while let Some(at) = schedule.next {
            self.set_rechecking(&schedule, &deleted);
            sleep_until(at).await;
            let names = std::slice::from_ref(&self.room);
            let deadline = at + self.deletion_timeout;
            let listed = retry_until(deadline, || self.api.list_rooms(names)).await;
            doubt = match listed {
                Ok(rooms) if rooms.is_empty() => {
                    deleted = Ok(());
                    schedule.room_absent(Instant::now());
                    None
                }
                Ok(_) => {
                    returns += u32::from(deleted.is_ok());
                    deleted = self.delete_again(returns, window).await;
                    schedule.room_found(Instant::now());
                    Some("it had come back at the last re-check".to_owned())
                }
                Err(error) => {
                    schedule.room_absent(Instant::now());
                    Some(format!("the last re-check failed: {error}"))
                }
            };
        }
        match (deleted, doubt) {
            (Err(why), _) => Some(CleanupState::NotDeleted { why }),
            (Ok(()), Some(why)) => Some(CleanupState::Unknown { why }),
            (Ok(()), None) => None,
        }
    }

    /// Deletes a room that exists although it was deleted, or whose deletion failed. `returns` counts how often it came
    /// back.
    async fn delete_again(&self, returns: u32, window: Duration) -> Result<(), String> {
        if returns > 0 {
            tracing::warn!(room = %self.room, returns, "a deleted room came back");
            self.shared
                .set_state(&self.room, CleanupState::DeletingAgain);
        }
        if returns > 1 {
            self.drain(window).await;
        }
        self.delete(&[], true).await.map(drop)
    }

    /// Ends the jobs of a room that keeps coming back, and leaves the room open until they are over.
    ///
    /// Each time the room is re-created, LiveKit dispatches the project's unnamed agent again. That job outlives its
    /// dispatch by 15 s. An agent that starts within 15 s would find the room deleted and re-create it, without end. If
    /// the room still exists, the agent joins it and leaves.
    async fn drain(&self, window: Duration) {
        let now = Instant::now();
        self.end_dispatches(&[], true, now + self.deletion_timeout)
            .await;
        sleep_until(now + window.min(MIN_SAFE_WINDOW)).await;
    }

    fn set_rechecking(&self, schedule: &RecheckSchedule, deleted: &Result<(), String>) {
        let state = match deleted {
            Ok(()) => CleanupState::Rechecking {
                since: schedule.since,
                until: schedule.until,
            },
            Err(why) => CleanupState::NotDeleted { why: why.clone() },
        };
        self.shared.set_state(&self.room, state);
    }
}

/// When to look for a deleted room: after 1 s, 2 s and 4 s, then every 5 s, and at the end of the window.
#[derive(Debug)]
struct RecheckSchedule {
    window: Duration,
    since: Instant,
    until: Instant,
    /// `None` when no re-check is left.
    next: Option<Instant>,
    pause: Duration,
    /// Bounds how long a room that keeps coming back can hold the janitor.
    restarts_left: u8,
}

impl RecheckSchedule {
    const FIRST_PAUSE: Duration = Duration::from_secs(1);
    /// Bounds how long a room that came back can live, and so what it can cost.
    const MAX_PAUSE: Duration = Duration::from_secs(5);
    const MAX_RESTARTS: u8 = 3;

    fn new(now: Instant, window: Duration) -> Self {
        let mut schedule = Self {
            window,
            since: now,
            until: now + window,
            next: Some(now),
            pause: Self::FIRST_PAUSE,
            restarts_left: Self::MAX_RESTARTS,
        };
        schedule.room_absent(now);
        schedule
    }

    fn room_absent(&mut self, now: Instant) {
        self.next = (now < self.until).then(|| (now + self.pause).min(self.until));
        self.pause = (self.pause * 2).min(Self::MAX_PAUSE);
    }

    /// The room was found and deleted again: its window restarts, at most three times.
    fn room_found(&mut self, now: Instant) {
        if let Some(left) = self.restarts_left.checked_sub(1) {
            self.restarts_left = left;
            self.until = now + self.window;
            self.pause = Self::FIRST_PAUSE;
        }
        self.room_absent(now);
    }
}

/// Repeats a call until it succeeds, fails permanently, or the deadline passes.
///
/// Clean-up may retry because it is not measured: the retry hides no failure of the agent or of LiveKit.
async fn retry_until<T, Fut>(deadline: Instant, call: impl Fn() -> Fut) -> Result<T, ApiError>
where
    Fut: Future<Output = Call<T>>,
{
    let started = Instant::now();
    let mut pause = FIRST_RETRY_DELAY;
    loop {
        let Ok(answer) = timeout_at(deadline, call()).await else {
            let waited = started.elapsed();
            // To the millisecond, because the message prints it.
            let waited = Duration::new(waited.as_secs(), waited.subsec_millis() * 1_000_000);
            return Err(ApiError::Timeout(waited));
        };
        let error = match answer.result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let next = Instant::now() + retry_after(&error).unwrap_or(pause);
        if !is_transient(&error) || next >= deadline {
            return Err(error);
        }
        sleep_until(next).await;
        pause *= 2;
    }
}

/// Whether the same call may succeed a moment later.
fn is_transient(error: &ApiError) -> bool {
    match error {
        ApiError::Unreachable(_) | ApiError::Timeout(_) | ApiError::Broken(_) => true,
        ApiError::Refused(refusal) => {
            !error.is_not_found() && (refusal.status == 429 || refusal.status >= 500)
        }
        ApiError::Protocol(_) => false,
    }
}

fn retry_after(error: &ApiError) -> Option<Duration> {
    match error {
        ApiError::Refused(refusal) => refusal.retry_after,
        _ => None,
    }
}

#[cfg(test)]
mod tests;
