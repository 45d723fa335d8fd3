//! The guard rails of a project, shared by its targets: rooms at once, agent time, rest after a plan limit.
//!
//! All are settings. A refusal of ours is no plan limit: that is only what the service said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, NaiveTime, Utc};
use humantime::format_duration;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::{Backoff, Budget, Period, Project, RampMode, Stay, Target};
use crate::history::{History, RESERVE_TIMEOUT, Reservation, Used};
use crate::livekit::RoomName;
use crate::probe::{LimitKind, billable_minutes, max_time_to_verdict};
use crate::report::Denial;

/// The guard rails of one project. Cheap to clone.
#[derive(Clone)]
pub struct Guard {
    shared: Arc<GuardShared>,
}

fn of(period: Period, used: &Used) -> Duration {
    match period {
        Period::Day => used.day,
        Period::Month => used.month,
    }
}

/// The right to hold so many rooms of a project open at once, until it is dropped.
#[must_use = "dropped at once, it is the right to nothing"]
pub struct RoomPermits {
    shared: Arc<GuardShared>,
    count: usize,
    /// The rejections that the project had met when the batch began.
    rejections: u64,
}

struct GuardShared {
    project: String,
    history: History,
    state: Mutex<GuardState>,
    /// Told at each change of the queue for places.
    queue_changed: Notify,
}

struct GuardState {
    budget: Budget,
    backoff: Backoff,
    max_rooms: usize,
    taken: usize,
    /// Who waits for places, the first to come first.
    queue: VecDeque<u64>,
    next_ticket: u64,
    /// All that were ever met.
    rejections: u64,
    /// Back-offs since the last batch that met none.
    consecutive: u32,
    backoff_until: Option<Instant>,
}

impl Guard {
    pub fn new(name: &str, project: &Project, history: History) -> Self {
        Self {
            shared: Arc::new(GuardShared {
                project: name.to_owned(),
                history,
                state: Mutex::new(GuardState {
                    budget: project.budget.clone(),
                    backoff: project.backoff.clone(),
                    max_rooms: project.max_rooms,
                    taken: 0,
                    queue: VecDeque::new(),
                    next_ticket: 0,
                    rejections: 0,
                    consecutive: 0,
                    backoff_until: None,
                }),
                queue_changed: Notify::new(),
            }),
        }
    }

    /// Takes changed settings. Rooms that are open stay so.
    pub fn configure(&self, project: &Project) {
        let mut state = self.shared.lock();
        state.budget = project.budget.clone();
        state.backoff = project.backoff.clone();
        state.max_rooms = project.max_rooms;
        drop(state);
        self.shared.queue_changed.notify_waiters();
    }

    /// Waits for the right to hold this batch's rooms open, or as many of them as the project may ever hold; whoever
    /// came first is served first. Cancel-safe.
    pub async fn acquire(&self, target: &Target) -> RoomPermits {
        let wanted = max_rooms_at_once(target);
        let turn = QueueTicket::queue(&self.shared);
        loop {
            let queue_changed = self.shared.queue_changed.notified();
            if let Some(places) = turn.take(wanted) {
                return places;
            }
            queue_changed.await;
        }
    }

    /// What would refuse a room now; nothing is reserved.
    pub fn refusal(&self, worst_case: Duration) -> Option<Denial> {
        let used = self.shared.history.used(&self.shared.project);
        let now = self.shared.history.now();
        self.check_backoff(now)
            .and_then(|()| self.check_budget(&used, worst_case, now))
            .err()
    }

    /// Reserves the agent time that a room may use and journals its name, before it can exist.
    ///
    /// # Errors
    /// No room may open now.
    pub async fn reserve(
        &self,
        room: &RoomName,
        target: &str,
        worst_case: Duration,
    ) -> Result<Reservation, Denial> {
        let GuardShared {
            project, history, ..
        } = &*self.shared;
        let admit = |used: &Used, now| {
            self.check_backoff(now)?;
            self.check_budget(used, worst_case, now)
        };
        history
            .reserve(room, project, target, worst_case, admit)
            .await
    }

    /// The service named a limit: no room of the project opens for a while.
    ///
    /// Rooms that were open already may meet it too; that makes the rest no longer unless the service says so.
    pub fn record_rejection(&self, limit: LimitKind, retry_after: Option<Duration>) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        state.rejections += 1;
        let backoff_until = state.backoff_until.filter(|until| *until > now);
        let until = match (retry_after, backoff_until) {
            (Some(after), _) => now + after.min(state.backoff.longest),
            (None, None) => now + exponential(&state.backoff, state.consecutive),
            (None, Some(until)) => until,
        };
        if backoff_until.is_none() {
            state.consecutive = state.consecutive.saturating_add(1);
        }
        if backoff_until.is_none_or(|before| before < until) {
            state.backoff_until = Some(until);
            let rest = format_duration(Duration::from_secs((until - now).as_secs())).to_string();
            tracing::warn!(
                project = self.shared.project,
                limit = limit.label(),
                "a plan limit was met: no room opens for {rest}"
            );
        }
    }

    /// `None` where the project does not rest.
    pub fn backoff_until(&self) -> Option<DateTime<Utc>> {
        self.backoff_end(self.shared.history.now())
    }

    /// Agent time used so far, open rooms counted at their worst.
    pub fn used(&self, period: Period) -> Duration {
        of(period, &self.shared.history.used(&self.shared.project))
    }

    /// Rooms that batches hold places for.
    pub fn rooms_held(&self) -> usize {
        self.shared.lock().taken
    }

    pub fn limit(&self, period: Period) -> Option<Duration> {
        self.shared.lock().budget.limit(period)
    }

    fn backoff_end(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let until = self.shared.lock().backoff_until?;
        let left = until.checked_duration_since(Instant::now())?;
        (!left.is_zero()).then(|| now + left)
    }

    fn check_backoff(&self, now: DateTime<Utc>) -> Result<(), Denial> {
        match self.backoff_end(now) {
            Some(until) => Err(Denial::Backoff { until }),
            None => Ok(()),
        }
    }

    fn check_budget(
        &self,
        used: &Used,
        worst_case: Duration,
        now: DateTime<Utc>,
    ) -> Result<(), Denial> {
        for period in Period::ALL {
            let Some(limit) = self.limit(period) else {
                continue;
            };
            if used.ledger_lost {
                return Err(Denial::LedgerLost);
            }
            let used = of(period, used);
            if used + worst_case > limit {
                return Err(Denial::Budget {
                    period,
                    used,
                    worst_case,
                    limit,
                    resets_at: period
                        .next(now.date_naive())
                        .and_time(NaiveTime::MIN)
                        .and_utc(),
                });
            }
        }
        Ok(())
    }
}

impl RoomPermits {
    pub fn count(&self) -> usize {
        self.count
    }

    /// The batch has ended, and none of its rooms met a plan limit. Where no other batch of the project met one in the
    /// meantime either, the next back-off is as short as the first.
    pub fn confirm_none_rejected(&self) {
        let mut state = self.shared.lock();
        if state.rejections == self.rejections {
            state.consecutive = 0;
        }
    }
}

impl Drop for RoomPermits {
    fn drop(&mut self) {
        self.shared.lock().taken -= self.count;
        self.shared.queue_changed.notify_waiters();
    }
}

impl GuardShared {
    fn lock(&self) -> MutexGuard<'_, GuardState> {
        // Each change is complete before anything in it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue, given up when it is dropped.
struct QueueTicket<'a> {
    shared: &'a Arc<GuardShared>,
    ticket: u64,
}

impl<'a> QueueTicket<'a> {
    fn queue(shared: &'a Arc<GuardShared>) -> Self {
        let mut state = shared.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue.push_back(ticket);
        Self { shared, ticket }
    }

    fn take(&self, wanted: usize) -> Option<RoomPermits> {
        let mut state = self.shared.lock();
        let count = wanted.min(state.max_rooms);
        let first = state.queue.front() == Some(&self.ticket);
        if !first || state.taken + count > state.max_rooms {
            return None;
        }
        state.taken += count;
        Some(RoomPermits {
            shared: Arc::clone(self.shared),
            count,
            rejections: state.rejections,
        })
    }
}

impl Drop for QueueTicket<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.queue.retain(|ticket| *ticket != self.ticket);
        drop(state);
        self.shared.queue_changed.notify_waiters();
    }
}

/// The most rooms that a batch holds open at once.
pub fn max_rooms_at_once(target: &Target) -> usize {
    match target.batch.stay {
        Stay::Together => target.batch.rooms,
        Stay::OneByOne => 1,
    }
}

/// The most agent time that each room of a batch can be billed for, in the order of opening: its agent comes at once,
/// and as late as allowed to all rooms that follow.
pub fn worst_cases(target: &Target, project: &Project) -> impl Iterator<Item = Duration> {
    let one_join = max_join_duration(target, project);
    let rooms = u32::try_from(target.batch.rooms).unwrap_or(u32::MAX);
    let ramp_after = move |index: u32| {
        let later = rooms - 1 - index;
        match (target.batch.stay, target.batch.ramp) {
            (Stay::Together, RampMode::AfterJoin) => one_join.saturating_mul(later),
            (Stay::Together, RampMode::Interval | RampMode::Burst) if rooms == 1 => Duration::ZERO,
            (Stay::Together, RampMode::Interval) => {
                target.batch.interval.saturating_mul(later) + one_join
            }
            (Stay::Together, RampMode::Burst) => one_join,
            (Stay::OneByOne, _) => Duration::ZERO,
        }
    };
    (0..rooms).map(move |index| {
        let held = (ramp_after(index) + target.batch.hold).max(max_time_to_verdict(target));
        // Leaving may take as long, and so may deleting.
        billable_minutes(held + target.deadlines.cleanup * 2)
    })
}

/// The longest that a batch runs once it has its places, its last room gone.
pub fn max_batch_duration(target: &Target, project: &Project) -> Duration {
    let one_join = max_join_duration(target, project);
    let rooms = u32::try_from(target.batch.rooms).unwrap_or(u32::MAX);
    let held = target.batch.hold.max(max_time_to_verdict(target)) + target.deadlines.cleanup * 2;
    match (target.batch.stay, target.batch.ramp) {
        (Stay::Together, RampMode::AfterJoin) => one_join.saturating_mul(rooms) + held,
        (Stay::Together, RampMode::Interval) => {
            target
                .batch
                .interval
                .saturating_mul(rooms.saturating_sub(1))
                + one_join
                + held
        }
        (Stay::Together, RampMode::Burst) => one_join + held,
        (Stay::OneByOne, _) => (one_join + held).saturating_mul(rooms),
    }
}

/// From a room's opening to the agent's join, or to the word that there is none.
fn max_join_duration(target: &Target, project: &Project) -> Duration {
    let deadlines = &target.deadlines;
    // A room's creation and a last look at its dispatches are the calls that it takes.
    project.api_timeout * 2 + deadlines.signal + deadlines.media + deadlines.join + RESERVE_TIMEOUT
}

/// Twice as long each time, and up to a quarter more, so that two canaries don't come back together.
fn exponential(backoff: &Backoff, times: u32) -> Duration {
    let factor = 2_u32.saturating_pow(times.min(31));
    let plain = backoff.first.saturating_mul(factor).min(backoff.longest);
    plain
        .mul_f64(1.0 + fastrand::f64() / 4.0)
        .min(backoff.longest)
}

#[cfg(test)]
mod tests;
