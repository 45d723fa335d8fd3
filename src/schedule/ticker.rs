//! Delivers ticks when they are due, on the wall clock.
//!
//! [`TickTable`] decides which ticks are due and never waits. [`Heartbeat`] waits, by one one-shot job of
//! tokio-cron-scheduler at a time. The job is due at the next tick of all targets, and after a second at the latest. The
//! same job therefore proves that the scheduler is alive: without it no tick could be delivered.
//!
//! The scheduler checks its jobs every 500 ms and counts whole seconds. Waits are rounded down here, so a tick is at most
//! 500 ms late. The scheduler compares with its own wall clock: after that clock is set back, the job does not run in
//! time, and a new one replaces it after [`JOB_TIMEOUT`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use super::calendar::{next_tick, offset};
use crate::config::Schedule;

/// Upper bound of the wait of one job, so that the scheduler shows at least once per second that it is alive.
const MAX_BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A job that has not run after this time is replaced by a new one.
const JOB_TIMEOUT: Duration = Duration::from_secs(3);
/// After this time of waiting for a beat in vain, the scheduler counts as stopped. Only time in which this process ran
/// counts.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// The most that one try counts as silence: a job that can't be added, and then doesn't run. A try that took longer was
/// interrupted: the process was stopped, or its machine was suspended. So each gap leaves the scheduler another try.
const MAX_TRY: Duration = JOB_TIMEOUT.saturating_mul(2);
/// A target has at most one tick in the channel, so only more targets than this can fill it.
const CHANNEL_CAPACITY: usize = 1024;

/// A batch of a target is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tick {
    pub(crate) target: String,
    /// When the tick was due. After a suspend or a forward clock jump, only the first missed tick is delivered, with its
    /// original time.
    pub(crate) due: DateTime<Utc>,
    /// How late the tick was delivered, on the wall clock.
    pub(crate) late: Duration,
    /// Number of ticks of this target that were dropped since the previous delivered tick, because that tick was not yet
    /// [handled](Ticker::handled) or the channel was full. The receiver must count them as skipped for overlap.
    pub(crate) dropped: u64,
}

/// tokio-cron-scheduler did not start.
#[derive(Debug, thiserror::Error)]
#[error("can't start the scheduler")]
pub(crate) struct StartError(#[from] JobSchedulerError);

/// Delivers the ticks of all targets until it is dropped. The scheduler's own tasks run until the runtime ends.
pub(crate) struct Ticker {
    table: Arc<Mutex<TickTable>>,
    /// Wakes the heartbeat: a changed schedule may be due before the current job.
    changed: Arc<Notify>,
    /// Cancelled when the heartbeat has ended.
    ended: CancellationToken,
    clock: TimeSource,
    _heartbeat: AbortOnDropHandle<()>,
}

/// The wall clock; tests replace it.
type TimeSource = Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>;

impl Ticker {
    /// Starts the scheduler without any target; `clock` returns the wall-clock time.
    ///
    /// A slow receiver never blocks the scheduler. A tick that the channel can't take is dropped and counted in
    /// [`Tick::dropped`]. If a tick waited for its receiver instead, its batch would start at a time that is not in the
    /// schedule, and the following batches in a burst.
    ///
    /// # Errors
    /// tokio-cron-scheduler does not start.
    pub(crate) async fn start(
        clock: impl Fn() -> DateTime<Utc> + Send + Sync + 'static,
    ) -> Result<(Self, mpsc::Receiver<Tick>), StartError> {
        let scheduler = JobScheduler::new().await?;
        scheduler.start().await?;
        Ok(Self::on(scheduler, Arc::new(clock)))
    }

    fn on(scheduler: JobScheduler, clock: TimeSource) -> (Self, mpsc::Receiver<Tick>) {
        let (ticks, receiver) = mpsc::channel(CHANNEL_CAPACITY);
        let ended = CancellationToken::new();
        let table = Arc::new(Mutex::new(TickTable::new(clock(), ticks)));
        let changed = Arc::new(Notify::new());
        let heartbeat = Heartbeat {
            scheduler,
            clock: Arc::clone(&clock),
            table: Arc::clone(&table),
            changed: Arc::clone(&changed),
            _ended: ended.clone().drop_guard(),
        };
        let ticker = Self {
            table,
            changed,
            ended,
            clock,
            _heartbeat: AbortOnDropHandle::new(tokio::spawn(heartbeat.run())),
        };
        (ticker, receiver)
    }

    /// Adds a target or changes its schedule. A target that already has this schedule is not disturbed.
    ///
    /// The first tick is the schedule's first one after now and at or after `first_not_before`.
    pub(crate) fn set(&self, target: &str, schedule: &Schedule, first_not_before: DateTime<Utc>) {
        let now = (self.clock)();
        lock(&self.table).set(target, schedule, now, first_not_before);
        self.changed.notify_one();
    }

    /// Adds a target. With an interval, its first tick is at `first`, so that a long interval does not begin with a long
    /// silence. The ticks of the grid follow, except for one within half an interval of the first. A cron expression names
    /// the times that its author wants, so its first tick is the first one from `first` on.
    pub(crate) fn start_target(&self, target: &str, schedule: &Schedule, first: DateTime<Utc>) {
        let now = (self.clock)();
        lock(&self.table).start_target(target, schedule, now, first);
        self.changed.notify_one();
    }

    /// Ends the ticks of `target`. A tick that was already sent may still be in the channel.
    pub(crate) fn remove(&self, target: &str) {
        lock(&self.table).entries.remove(target);
    }

    /// When the next batch of `target` is due. The time is in the past while a delivered tick is not handled.
    pub(crate) fn next(&self, target: &str) -> Option<DateTime<Utc>> {
        let table = lock(&self.table);
        let entry = table.entries.get(target)?;
        entry.unhandled.or(entry.next)
    }

    /// Confirms that the batch of this tick was started or skipped. Until then its target gets no other tick.
    pub(crate) fn handled(&self, tick: &Tick) {
        if let Some(entry) = lock(&self.table).entries.get_mut(&tick.target)
            && entry.unhandled == Some(tick.due)
        {
            entry.unhandled = None;
        }
    }

    /// Resolves when the scheduler has run no job for 30 s in which this process ran. After that, no tick is delivered.
    pub(crate) async fn stopped(&self) {
        self.ended.cancelled().await;
    }
}

fn lock(table: &Mutex<TickTable>) -> MutexGuard<'_, TickTable> {
    table
        .lock()
        .expect("no code panics while it holds this lock")
}

/// The next tick of every target.
struct TickTable {
    entries: BTreeMap<String, TickEntry>,
    ticks: mpsc::Sender<Tick>,
    /// The wall-clock time of the last check; a later check with an earlier time means that the clock was set back.
    last_check: DateTime<Utc>,
}

struct TickEntry {
    schedule: Schedule,
    offset: Duration,
    /// `None` if the schedule has no further tick.
    next: Option<DateTime<Utc>>,
    /// When `next` was computed; the difference is the usual wait of this target.
    planned_at: DateTime<Utc>,
    /// The tick that was delivered and is not handled yet.
    unhandled: Option<DateTime<Utc>>,
    dropped: u64,
    /// The least time from a first tick that is not on the grid to the next one; zero after it.
    gap_after_first: Duration,
}

impl TickTable {
    fn new(now: DateTime<Utc>, ticks: mpsc::Sender<Tick>) -> Self {
        Self {
            entries: BTreeMap::new(),
            ticks,
            last_check: now,
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
                    gap_after_first: Duration::ZERO,
                }
            }
        };
        self.entries.insert(target.to_owned(), entry);
    }

    fn start_target(
        &mut self,
        target: &str,
        schedule: &Schedule,
        now: DateTime<Utc>,
        first: DateTime<Utc>,
    ) {
        self.set(target, schedule, now, first);
        if let (Schedule::Every(every), Some(entry)) = (schedule, self.entries.get_mut(target)) {
            entry.next = Some(first.max(now));
            entry.gap_after_first = *every / 2;
        }
    }

    /// Sends the tick of each target that is due. Several ticks that were missed since the last check become one.
    fn emit_due(&mut self, now: DateTime<Utc>) {
        let set_back = now < self.last_check;
        self.last_check = now;
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

    /// The time until the next tick is due.
    fn until_next(&self, now: DateTime<Utc>) -> Duration {
        let nearest = self.entries.values().filter_map(|entry| entry.next).min();
        nearest.map_or(MAX_BEAT_INTERVAL, |nearest| {
            (nearest - now).to_std().unwrap_or(Duration::ZERO)
        })
    }
}

impl TickEntry {
    fn plan(&mut self, now: DateTime<Utc>) {
        let gap = std::mem::take(&mut self.gap_after_first);
        self.next = next_tick(&self.schedule, self.offset, now + gap);
        self.planned_at = now;
    }

    /// Decides what a backward clock jump means for the next tick.
    ///
    /// Ticks that already ran are not repeated, as in vixie cron, if that makes the wait at most twice as long as planned.
    /// That covers a correction by seconds, and a nightly batch. Otherwise the target would pause for as long as the clock
    /// was set back, so its next tick follows the new time at once.
    fn clock_was_set_back(&mut self, now: DateTime<Utc>) {
        if let Some(next) = self.next
            && next - now > (next - self.planned_at) * 2
        {
            self.plan(now);
        }
    }
}

/// For how long the scheduler has shown no sign of life.
#[derive(Debug, Default)]
struct Silence(Duration);

impl Silence {
    fn add_try(&mut self, took: Duration) {
        self.0 += took.min(MAX_TRY);
    }
}

/// Keeps one job scheduled, and sends the ticks that are due whenever it runs.
struct Heartbeat {
    scheduler: JobScheduler,
    clock: TimeSource,
    table: Arc<Mutex<TickTable>>,
    changed: Arc<Notify>,
    _ended: DropGuard,
}

impl Heartbeat {
    /// Runs until the scheduler has shown no sign of life for [`SILENCE_TIMEOUT`].
    async fn run(self) {
        let (fired, mut firing) = watch::channel(0_u64);
        let mut serial = 0;
        let mut silence = Silence::default();
        while silence.0 < SILENCE_TIMEOUT {
            let tried_at = Instant::now();
            let wait = {
                let mut table = lock(&self.table);
                let now = (self.clock)();
                table.emit_due(now);
                table.until_next(now).min(MAX_BEAT_INTERVAL)
            };
            serial += 1;
            // If the scheduler's tasks have died, `add` never returns.
            let scheduled = timeout(JOB_TIMEOUT, self.schedule(wait, serial, fired.clone())).await;
            if let Ok(Err(error)) = scheduled {
                tracing::warn!("can't schedule the next check for due batches: {error}");
            }
            tokio::select! {
                beat = timeout(JOB_TIMEOUT, firing.wait_for(|latest| *latest == serial)) => {
                    if let Ok(Ok(_)) = beat {
                        silence = Silence::default();
                        continue;
                    }
                }
                () = self.changed.notified() => {}
            }
            silence.add_try(tried_at.elapsed());
        }
        tracing::error!("the scheduler has stopped: no further batches start");
    }

    /// Schedules a job that reports `serial`. A replaced job that runs late has a lower serial and changes nothing.
    async fn schedule(
        &self,
        wait: Duration,
        serial: u64,
        fired: watch::Sender<u64>,
    ) -> Result<(), JobSchedulerError> {
        let whole_seconds = Duration::from_secs(wait.as_secs());
        let job = Job::new_one_shot(whole_seconds, move |_, _| {
            fired.send_if_modified(|latest| {
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
