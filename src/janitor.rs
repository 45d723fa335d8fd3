//! The owner of every room name until that room is gone: on success, failure, timeout, cancel and panic alike.
//!
//! It knows rooms and dispatches; it knows no outcome.
//!
//! A deletion is not the end of a room. Two things bring it back, both seen on livekit-server 1.13.5:
//!
//! - A request that was in flight when its probe was dropped (`CreateRoom`, `CreateDispatch` or a join, each of which
//!   creates a missing room).
//! - A late agent, the target's or the unnamed one that LiveKit sends to every room. `DeleteDispatch` has the worker end
//!   the job, but a livekit-agents 1.8.9 worker lets the entrypoint run on for 15 s first, and an entrypoint that
//!   connects in that time re-creates the room with default settings: it stays for 5 minutes after the agent. One that
//!   was connecting when the room was deleted does the same when it tries again, 15 s later. Deleted once more, the room
//!   does not come back, unless automatic dispatch sends another agent to it: see [`RoomCleanup::drain`].
//!
//! So a deleted room in doubt is looked for by its exact name until its window is over, at most 5 s apart.

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

/// Least `late_agent_window` that outlasts the 15 s which a livekit-agents worker grants a job that was ended, and its
/// connection (about 2.5 s more at worst on two busy cores).
pub const MIN_SAFE_WINDOW: Duration = Duration::from_secs(20);

/// For deletions under way, from the moment that nothing else is waited for any more.
pub const FINAL_DELETION_TIMEOUT: Duration = Duration::from_secs(2);

/// First pause between two tries of a deletion; it doubles from there.
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(100);

/// For one deletion of the sweep, retries included.
const SWEEP_DELETION_TIMEOUT: Duration = Duration::from_secs(10);

/// Deletions of the sweep at a time: nobody waits for them.
const MAX_CONCURRENT_SWEEPS: usize = 4;

/// Told of each room when the janitor has done with it; must not block.
pub type OnCleanup = Arc<dyn Fn(&RoomName, CleanupResult<'_>) + Send + Sync>;

/// How the janitor has done with a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CleanupResult<'a> {
    /// Gone for good.
    Gone,
    /// It may stand, or come back.
    Unconfirmed { why: &'a str },
}

/// The handle through which probes hand their rooms over. Cheap to clone.
#[derive(Clone)]
pub struct Janitor {
    shared: Arc<JanitorShared>,
}

struct JanitorShared {
    /// Every room that is owned and not yet vouched for. A name leaves only when its room is gone for good.
    rooms: Mutex<BTreeMap<RoomName, CleanupState>>,
    /// Told at each change of a room's standing.
    changed: Notify,
    /// Owns the clean-up tasks; each lease holds a token of it, so that it is empty only when all is done.
    tasks: TaskTracker,
    runtime: Handle,
    on_cleanup: OnCleanup,
}

/// The right to a room's name. Dropping it, in whatever way, has the janitor delete the room.
pub struct RoomLease {
    owned: Option<RoomCleanup>,
}

/// What became of a room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// The server confirmed, or knows no such room.
    Deleted {
        at: Instant,
    },
    NotDeleted {
        why: String,
    },
    /// It had never been created.
    NothingThere,
}

/// What became of the rooms of dead runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepResult {
    /// Gone; re-checks go on.
    pub deleted: Vec<RoomName>,
    pub unconfirmed: Vec<UnconfirmedRoom>,
}

/// A room that the janitor can't vouch for.
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

    /// Tells `on_cleanup` of each room that it has done with, before [`Janitor::close`] returns.
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

    /// Takes a room name over before the room can exist.
    ///
    /// `cleanup` bounds one deletion, retries included. `late_agent_window`: how long the deleted room is re-checked
    /// where an agent may still come; see [`MIN_SAFE_WINDOW`].
    pub fn own(
        &self,
        room: RoomName,
        api: Api,
        cleanup: Duration,
        late_agent_window: Duration,
    ) -> RoomLease {
        self.shared.set_state(&room, CleanupState::Leased);
        RoomLease {
            owned: Some(RoomCleanup {
                shared: Arc::clone(&self.shared),
                _token: self.shared.tasks.token(),
                room,
                api,
                cleanup,
                late_agent_window,
                dispatches: Vec::new(),
                agents_connected: false,
                not_created: false,
            }),
        }
    }

    /// Deletes rooms that runs of this program left behind which are dead now, a few at a time; a room that isn't there is
    /// a success. Each is re-checked, and told to the on_cleanup, like any other.
    ///
    /// Takes 10 s for four rooms at most. Dropping the future leaves alone the rooms that it has not come to.
    pub async fn sweep(&self, api: &Api, rooms: Vec<RoomName>) -> SweepResult {
        let deletions = rooms.into_iter().map(|room| async {
            // An agent that was on its way may still come.
            let window = MIN_SAFE_WINDOW;
            let lease = self.own(room.clone(), api.clone(), SWEEP_DELETION_TIMEOUT, window);
            (room, lease.delete().await)
        });
        let mut deletions = stream::iter(deletions).buffered(MAX_CONCURRENT_SWEEPS);
        let mut swept = SweepResult::default();
        while let Some((room, deletion)) = deletions.next().await {
            match deletion {
                Deletion::Deleted { .. } | Deletion::NothingThere => swept.deleted.push(room),
                Deletion::NotDeleted { why } => {
                    swept.unconfirmed.push(UnconfirmedRoom { room, why })
                }
            }
        }
        swept
    }

    /// Waits until every room is gone and every re-check is over, or `deadline`; names what is left.
    ///
    /// A room whose deletion failed has had its time and is not waited for. A near deadline ends the re-checks early.
    /// What is under way then goes on for as long as the runtime does.
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
        // A clean-up task that panicked decides nothing any more, but it ends.
        let all_done = async {
            tokio::select! {
                () = all_decided => {}
                () = self.shared.tasks.wait() => {}
            }
        };
        // Whether all was done or the time is up, the on_cleanup says the same.
        let _elapsed = timeout_at(deadline, all_done).await;
        let now = Instant::now();
        let rooms = self.shared.lock();
        let left = rooms.iter().map(|(room, standing)| UnconfirmedRoom {
            room: room.clone(),
            why: standing.describe(now),
        });
        left.collect()
    }
}

impl RoomLease {
    /// Says that there is no room: the only request that would have created it never reached LiveKit or was refused.
    pub fn not_created(&mut self) {
        self.owned().not_created = true;
    }

    /// A dispatch that the room's deletion must end first.
    pub fn dispatched(&mut self, dispatch_id: String) {
        self.owned().dispatches.push(dispatch_id);
    }

    /// Whether the agent, and any other of its name, is in the room with its connection up: it will be put out with the room
    /// and can't come late.
    ///
    /// Without this one may always come: LiveKit sends the project's unnamed agent to every room that is created.
    pub fn agents_connected(&mut self, connected: bool) {
        self.owned().agents_connected = connected;
    }

    /// Deletes the dispatch and the room now and says what became of them; re-checks go on behind it.
    ///
    /// Takes `cleanup` at most. Dropping the future stops nothing.
    pub async fn delete(mut self) -> Deletion {
        let (told, deletion) = oneshot::channel();
        if let Some(owned) = self.owned.take() {
            owned.clean_up(Some(told));
        }
        deletion.await.unwrap_or_else(|_| Deletion::NotDeleted {
            why: "the janitor's own task failed".to_owned(),
        })
    }

    fn owned(&mut self) -> &mut RoomCleanup {
        self.owned.as_mut().expect("taken only when the lease ends")
    }
}

impl Drop for RoomLease {
    fn drop(&mut self) {
        if let Some(owned) = self.owned.take() {
            owned.clean_up(None);
        }
    }
}

/// What would have to be said of a room if the process ended now.
#[derive(Debug, Clone)]
enum CleanupState {
    Leased,
    Deleting,
    /// It came back after its deletion.
    DeletingAgain,
    NotDeleted {
        why: String,
    },
    /// Deleted, and looked for until the window is over.
    Watched {
        since: Instant,
        until: Instant,
    },
    /// Deleted, but the last re-check did not find it gone.
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
            Self::Leased => "its probe had not ended".to_owned(),
            Self::Deleting => "its deletion was still under way".to_owned(),
            Self::DeletingAgain => {
                "a late agent re-created it, and its deletion was still under way".to_owned()
            }
            Self::NotDeleted { why } => format!("not deleted: {why}"),
            Self::Watched { since, until } => format!(
                "deleted, but watched for only {} of {} s: a late agent would re-create it",
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
        // Each change is a single insert or remove, so a panic elsewhere leaves nothing half done.
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, room: &RoomName, standing: CleanupState) {
        self.lock().insert(room.clone(), standing);
        self.changed.notify_waiters();
    }

    fn remove(&self, room: &RoomName) {
        self.lock().remove(room);
        self.changed.notify_waiters();
    }
}

/// A room, all that its deletion needs, and the claim on the janitor's time.
struct RoomCleanup {
    shared: Arc<JanitorShared>,
    _token: TaskTrackerToken,
    room: RoomName,
    api: Api,
    cleanup: Duration,
    late_agent_window: Duration,
    dispatches: Vec<String>,
    agents_connected: bool,
    not_created: bool,
}

impl RoomCleanup {
    fn clean_up(self, told: Option<oneshot::Sender<Deletion>>) {
        let shared = Arc::clone(&self.shared);
        shared.set_state(&self.room, CleanupState::Deleting);
        let task = self.deleted_for_good(told);
        shared.tasks.spawn_on(task, &shared.runtime);
    }

    async fn deleted_for_good(self, told: Option<oneshot::Sender<Deletion>>) {
        let dropped = told.is_none();
        let deleted = if self.not_created {
            Ok(())
        } else {
            // Only `CreateDispatch` tells an id: of other dispatches, and where its answer never came, the list does.
            let list = !self.agents_connected || self.dispatches.is_empty();
            self.delete(&self.dispatches, list).await
        };
        let window = self.window(dropped, &deleted);
        if let Some(told) = told {
            let deletion = match &deleted {
                _ if self.not_created => Deletion::NothingThere,
                Ok(()) => Deletion::Deleted { at: Instant::now() },
                Err(why) => Deletion::NotDeleted { why: why.clone() },
            };
            if told.send(deletion).is_err() {
                tracing::debug!(room = %self.room, "nobody waited for the room's deletion");
            }
        }
        // Told before it is noted: whoever waits for the janitor finds the on_cleanup complete.
        match self.watch(window, deleted).await {
            None => {
                (self.shared.on_cleanup)(&self.room, CleanupResult::Gone);
                self.shared.remove(&self.room);
            }
            Some(left) => {
                let why = left.describe(Instant::now());
                (self.shared.on_cleanup)(&self.room, CleanupResult::Unconfirmed { why: &why });
                self.shared.set_state(&self.room, left);
            }
        }
    }

    /// How long the room can come back.
    fn window(&self, dropped: bool, deleted: &Result<(), String>) -> Duration {
        if self.not_created {
            Duration::ZERO
        } else if !self.agents_connected || deleted.is_err() {
            // As long for a failed deletion: the server may answer again.
            self.late_agent_window.max(self.cleanup)
        } else if dropped {
            // A call that creates a missing room may have been in flight.
            self.cleanup
        } else {
            Duration::ZERO
        }
    }

    /// Ends the jobs of the known dispatches and, if asked to, of all that the server lists (its own, and those whose
    /// answer never came), then deletes the room; that takes `cleanup` at most. In this order: the server forgets the
    /// dispatches of a deleted room, and a job that was not ended re-creates it.
    async fn delete(&self, dispatches: &[String], list: bool) -> Result<(), String> {
        let now = Instant::now();
        self.end_dispatches(dispatches, list, now + self.cleanup / 2)
            .await;
        let deleted = retry_until(now + self.cleanup, || self.api.delete_room(&self.room)).await;
        match deleted {
            Err(error) if !error.is_not_found() => {
                let why = error.to_string();
                tracing::warn!(room = %self.room, why, "the room could not be deleted");
                Err(why)
            }
            _ => Ok(()),
        }
    }

    /// Failing here is no failure: the room's deletion follows, and the re-checks find whom it doesn't stop.
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
                tracing::debug!(room = %self.room, %error, "the room's dispatch could not be deleted");
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

    /// Looks for the room until its window is over, and deletes it where it is found; says what is left in doubt.
    async fn watch(
        &self,
        window: Duration,
        mut deleted: Result<(), String>,
    ) -> Option<CleanupState> {
        let mut watch = RecheckSchedule::new(Instant::now(), window);
        let mut doubt = None;
        let mut returns = 0;
        while let Some(at) = watch.next {
            self.note(&watch, &deleted);
            sleep_until(at).await;
            let names = std::slice::from_ref(&self.room);
            let listed = retry_until(at + self.cleanup, || self.api.list_rooms(names)).await;
            doubt = match listed {
                Ok(rooms) if rooms.is_empty() => {
                    deleted = Ok(());
                    watch.checked(Instant::now());
                    None
                }
                Ok(_) => {
                    returns += u32::from(deleted.is_ok());
                    deleted = self.delete_again(returns, window).await;
                    watch.found(Instant::now());
                    Some("it had come back at the last re-check".to_owned())
                }
                Err(error) => {
                    watch.checked(Instant::now());
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

    /// Deletes the room that was found where there should be none, whoever came `returns` times and re-created it.
    async fn delete_again(&self, returns: u32, window: Duration) -> Result<(), String> {
        if returns > 0 {
            tracing::warn!(room = %self.room, returns, "a deleted room came back");
            self.shared
                .set_state(&self.room, CleanupState::DeletingAgain);
        }
        if returns > 1 {
            self.drain(window).await;
        }
        self.delete(&[], true).await
    }

    /// Ends the jobs of a room that keeps coming back, and leaves it standing until they are over.
    ///
    /// Each re-creation makes LiveKit send the project's unnamed agent anew, whose job outlives its dispatch by 15 s: an
    /// agent that starts up in less would find the room deleted and re-create it, without end. Into a room that still
    /// stands it comes and goes.
    async fn drain(&self, window: Duration) {
        let now = Instant::now();
        self.end_dispatches(&[], true, now + self.cleanup).await;
        sleep_until(now + window.min(MIN_SAFE_WINDOW)).await;
    }

    fn note(&self, watch: &RecheckSchedule, deleted: &Result<(), String>) {
        let standing = match deleted {
            Ok(()) => CleanupState::Watched {
                since: watch.since,
                until: watch.until,
            },
            Err(why) => CleanupState::NotDeleted { why: why.clone() },
        };
        self.shared.set_state(&self.room, standing);
    }
}

/// When to look for a deleted room: 1, 2 and 4 s apart, then every 5 s, and once more at the window's end.
#[derive(Debug)]
struct RecheckSchedule {
    window: Duration,
    since: Instant,
    until: Instant,
    next: Option<Instant>,
    pause: Duration,
    /// A room that keeps coming back can't hold the janitor for ever.
    restarts_left: u8,
}

impl RecheckSchedule {
    const FIRST_PAUSE: Duration = Duration::from_secs(1);
    /// Bounds how long a room that came back can live, and what it can cost.
    const MAX_PAUSE: Duration = Duration::from_secs(5);
    const MAX_RESTARTS: u8 = 3;

    fn new(now: Instant, window: Duration) -> Self {
        let mut watch = Self {
            window,
            since: now,
            until: now + window,
            next: Some(now),
            pause: Self::FIRST_PAUSE,
            restarts_left: Self::MAX_RESTARTS,
        };
        watch.checked(now);
        watch
    }

    fn checked(&mut self, now: Instant) {
        self.next = (now < self.until).then(|| (now + self.pause).min(self.until));
        self.pause = (self.pause * 2).min(Self::MAX_PAUSE);
    }

    /// The room was there and has been deleted again: its window begins anew, three times at most.
    fn found(&mut self, now: Instant) {
        if let Some(left) = self.restarts_left.checked_sub(1) {
            self.restarts_left = left;
            self.until = now + self.window;
            self.pause = Self::FIRST_PAUSE;
        }
        self.checked(now);
    }
}

/// Repeats a call until it is answered, or refused in earnest, or the deadline passes. This is clean-up, not
/// measurement: a retry hides nothing that anybody measures.
async fn retry_until<T, Fut>(deadline: Instant, call: impl Fn() -> Fut) -> Result<T, ApiError>
where
    Fut: Future<Output = Call<T>>,
{
    let started = Instant::now();
    let mut pause = FIRST_RETRY_DELAY;
    loop {
        let Ok(answer) = timeout_at(deadline, call()).await else {
            let waited = started.elapsed();
            // To the millisecond, for the message.
            let waited = Duration::new(waited.as_secs(), waited.subsec_millis() * 1_000_000);
            return Err(ApiError::Timeout(waited));
        };
        let error = match answer.result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let next = Instant::now() + pause_before_retry(&error).unwrap_or(pause);
        if !is_transient(&error) || next >= deadline {
            return Err(error);
        }
        sleep_until(next).await;
        pause *= 2;
    }
}

/// Whether the same call may fare better a moment later.
fn is_transient(error: &ApiError) -> bool {
    match error {
        ApiError::Unreachable(_) | ApiError::Timeout(_) | ApiError::Broken(_) => true,
        ApiError::Refused(refusal) => {
            !error.is_not_found() && (refusal.status == 429 || refusal.status >= 500)
        }
        ApiError::Protocol(_) => false,
    }
}

fn pause_before_retry(error: &ApiError) -> Option<Duration> {
    match error {
        ApiError::Refused(refusal) => refusal.retry_after,
        _ => None,
    }
}

#[cfg(test)]
mod tests;
