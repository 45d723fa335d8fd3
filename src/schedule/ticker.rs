//! Ticks as they come, on the wall clock.
//!
//! [`TickTable`] decides, without waiting for anything; tokio-cron-scheduler carries the waiting: a one-shot job at a time,
//! armed at the nearest tick of all targets, or for a second where none is nearer. So the same job is the heartbeat: if
//! it comes no more, no tick would.
//!
//! The scheduler looks at its jobs every 500 ms and counts in whole seconds, always rounded down here, so that a tick is
//! at most those 500 ms late. It compares with its own wall clock: where that was set back, its job stays away, and is
//! armed anew after [`JOB_TIMEOUT`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tokio_util::task::AbortOnDropHandle;

use super::calendar::{next_tick, offset};
use crate::config::Schedule;

/// Longest time from one beat of the scheduler to the next.
const MAX_BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A job that has not come after so long won't: it is armed anew.
const JOB_TIMEOUT: Duration = Duration::from_secs(3);
/// A scheduler without a beat for so long is given up.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// A target has one tick on its way at most, so that only more targets than this could fill the channel.
const CHANNEL_CAPACITY: usize = 1024;

/// A batch is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tick {
    pub target: String,
    /// When it was due. After a suspend or a forward jump of the clock: the first that was missed, and the only one that
    /// is caught up with.
    pub due: DateTime<Utc>,
    /// How much later than that it was, on the wall clock.
    pub late: Duration,
    /// Ticks of this target since the one before that came while that one was not [handled](Ticker::handled), or found
    /// the channel full. Nobody else tells of them: they are skipped for overlap.
    pub dropped: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("can't start the scheduler")]
pub struct StartError(#[from] JobSchedulerError);

/// Delivers the ticks of all targets. Dropping it ends them; the scheduler's own tasks last as long as the runtime.
pub struct Ticker {
    table: Arc<Mutex<TickTable>>,
    /// What is armed may be too late by now.
    changed: Arc<Notify>,
    beats: watch::Receiver<Instant>,
    clock: TimeSource,
    _heartbeat: AbortOnDropHandle<()>,
}

type TimeSource = Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>;

impl Ticker {
    /// Starts the scheduler, without any target, on the wall clock that `clock` tells.
    ///
    /// The scheduler is never held up: what a slow reader of the channel can't take is dropped and counted, as
    /// [`Tick::dropped`] has it. A tick that waited for its reader would start a batch at some other time than the
    /// schedule says, and those after it in a burst.
    ///
    /// # Errors
    /// The scheduler doesn't start.
    pub async fn start(
        clock: impl Fn() -> DateTime<Utc> + Send + Sync + 'static,
    ) -> Result<(Self, mpsc::Receiver<Tick>), StartError> {
        let scheduler = JobScheduler::new().await?;
        scheduler.start().await?;
        Ok(Self::on(scheduler, Arc::new(clock)))
    }

    fn on(scheduler: JobScheduler, clock: TimeSource) -> (Self, mpsc::Receiver<Tick>) {
        let (ticks, receiver) = mpsc::channel(CHANNEL_CAPACITY);
        let (beat, beats) = watch::channel(Instant::now());
        let table = Arc::new(Mutex::new(TickTable::new(clock(), ticks)));
        let changed = Arc::new(Notify::new());
        let heartbeat = Heartbeat {
            scheduler,
            clock: Arc::clone(&clock),
            table: Arc::clone(&table),
            changed: Arc::clone(&changed),
            beat,
        };
        let ticker = Self {
            table,
            changed,
            beats,
            clock,
            _heartbeat: AbortOnDropHandle::new(tokio::spawn(heartbeat.run())),
        };
        (ticker, receiver)
    }

    /// Adds a target, or gives it another schedule; one that has this schedule already goes on undisturbed.
    ///
    /// Its first tick is the schedule's first that comes after now and not before `first_not_before`.
    pub fn set(&self, target: &str, schedule: &Schedule, first_not_before: DateTime<Utc>) {
        let now = (self.clock)();
        lock(&self.table).set(target, schedule, now, first_not_before);
        self.changed.notify_one();
    }

    /// From now on `target` has no ticks; one that was delivered may still stand in the channel.
    pub fn remove(&self, target: &str) {
        lock(&self.table).entries.remove(target);
    }

    /// When the next batch of `target` is due; in the past while a tick that was delivered is not handled.
    pub fn next(&self, target: &str) -> Option<DateTime<Utc>> {
        let table = lock(&self.table);
        let entry = table.entries.get(target)?;
        entry.unhandled.or(entry.next)
    }

    /// Tells that the batch of this tick was started, or skipped for a reason. Until then no other comes for its target.
    pub fn handled(&self, tick: &Tick) {
        if let Some(entry) = lock(&self.table).entries.get_mut(&tick.target)
            && entry.unhandled == Some(tick.due)
        {
            entry.unhandled = None;
        }
    }

    /// When the scheduler last showed that it is alive. It does at least every two seconds.
    pub fn last_beat(&self) -> Instant {
        *self.beats.borrow()
    }

    /// Resolves when the scheduler has shown no life for 30 s: no tick will ever come again.
    pub async fn stopped(&self) {
        let mut beats = self.beats.clone();
        while beats.changed().await.is_ok() {}
    }
}

fn lock(table: &Mutex<TickTable>) -> MutexGuard<'_, TickTable> {
    table.lock().expect("nobody panics with the table in hand")
}

/// Which ticks are due, and which come next.
struct TickTable {
    entries: BTreeMap<String, TickEntry>,
    ticks: mpsc::Sender<Tick>,
    /// The wall clock as it was last seen; never set back but by a clock that was.
    seen: DateTime<Utc>,
}

struct TickEntry {
    schedule: Schedule,
    offset: Duration,
    /// `None` where the schedule has no tick any more.
    next: Option<DateTime<Utc>>,
    /// When `next` was set: so long a wait is usual for this target.
    planned_at: DateTime<Utc>,
    /// The tick that was delivered and not handled.
    unhandled: Option<DateTime<Utc>>,
    dropped: u64,
}

impl TickTable {
    fn new(now: DateTime<Utc>, ticks: mpsc::Sender<Tick>) -> Self {
        Self {
            entries: BTreeMap::new(),
            ticks,
            seen: now,
        }
    }

    fn set(
        &mut self,
        target: &str,
        schedule: &Schedule,
        now: DateTime<Utc>,
        first_not_before: DateTime<Utc>,
    ) {
        let former = self.entries.remove(target);
        let entry = match former {
            Some(former) if former.schedule == *schedule => former,
            former => {
                let offset = offset(target, schedule);
                let just_before = first_not_before - TimeDelta::nanoseconds(1);
                TickEntry {
                    next: next_tick(schedule, offset, now.max(just_before)),
                    schedule: schedule.clone(),
                    offset,
                    planned_at: now,
                    unhandled: former.as_ref().and_then(|former| former.unhandled),
                    dropped: former.map_or(0, |former| former.dropped),
                }
            }
        };
        self.entries.insert(target.to_owned(), entry);
    }

    /// Delivers what is due, each target's tick once, however many came while nobody looked.
    fn emit_due(&mut self, now: DateTime<Utc>) {
        let set_back = now < self.seen;
        self.seen = now;
        for (target, entry) in &mut self.entries {
            if set_back {
                entry.clock_was_set_back(now);
            }
            let Some(due) = entry.next.filter(|due| *due <= now) else {
                continue;
            };
            let tick = Tick {
                target: target.clone(),
                due,
                late: (now - due)
                    .to_std()
                    .expect("what is due is not in the future"),
                dropped: entry.dropped,
            };
            if entry.unhandled.is_none() && self.ticks.try_send(tick).is_ok() {
                entry.unhandled = Some(due);
                entry.dropped = 0;
            } else {
                entry.dropped += 1;
            }
            entry.plan(now);
        }
    }

    /// How long nothing is due.
    fn until_next(&self, now: DateTime<Utc>) -> Duration {
        let nearest = self.entries.values().filter_map(|entry| entry.next).min();
        nearest.map_or(MAX_BEAT_INTERVAL, |nearest| {
            (nearest - now).to_std().unwrap_or(Duration::ZERO)
        })
    }
}

impl TickEntry {
    fn plan(&mut self, now: DateTime<Utc>) {
        self.next = next_tick(&self.schedule, self.offset, now);
        self.planned_at = now;
    }

    /// Ticks that have been don't come again, as in vixie cron, where that makes the wait at most twice as long as it was
    /// to be: a clock put right by seconds, or a nightly batch. Otherwise the target would fall silent for as long as
    /// the clock was set back, and goes by the new time at once: what then comes at a time that was seen before is a
    /// batch of its own.
    fn clock_was_set_back(&mut self, now: DateTime<Utc>) {
        if let Some(next) = self.next
            && next - now > (next - self.planned_at) * 2
        {
            self.plan(now);
        }
    }
}

/// Keeps a job armed, and looks at the table when it comes.
struct Heartbeat {
    scheduler: JobScheduler,
    clock: TimeSource,
    table: Arc<Mutex<TickTable>>,
    changed: Arc<Notify>,
    beat: watch::Sender<Instant>,
}

impl Heartbeat {
    /// Ends when the scheduler is given up.
    async fn run(self) {
        let (came, mut coming) = watch::channel(0_u64);
        let mut serial = 0;
        while self.beat.borrow().elapsed() < SILENCE_TIMEOUT {
            let wait = {
                let mut table = lock(&self.table);
                let now = (self.clock)();
                table.emit_due(now);
                table.until_next(now).min(MAX_BEAT_INTERVAL)
            };
            serial += 1;
            // Its tasks may be dead, and then it never answers.
            let armed = timeout(JOB_TIMEOUT, self.arm(wait, serial, came.clone())).await;
            if let Ok(Err(error)) = armed {
                tracing::warn!("the scheduler took no job: {error}");
            }
            tokio::select! {
                beat = timeout(JOB_TIMEOUT, coming.wait_for(|latest| *latest == serial)) => {
                    if let Ok(Ok(_)) = beat {
                        self.beat.send_replace(Instant::now());
                    }
                }
                () = self.changed.notified() => {}
            }
        }
        tracing::error!("the scheduler has stopped");
    }

    /// An earlier job that still comes has a lower serial and changes nothing.
    async fn arm(
        &self,
        wait: Duration,
        serial: u64,
        came: watch::Sender<u64>,
    ) -> Result<(), JobSchedulerError> {
        let whole_seconds = Duration::from_secs(wait.as_secs());
        let job = Job::new_one_shot(whole_seconds, move |_, _| {
            came.send_if_modified(|latest| {
                let newer = *latest < serial;
                *latest = serial.max(*latest);
                newer
            });
        })?;
        self.scheduler.add(job).await.map(drop)
    }
}

#[cfg(test)]
mod tests;
