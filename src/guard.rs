//! The guard rails of a project, shared by its targets: rooms open at once, agent time, back-off after a plan limit.
//!
//! All of them are settings. When the canary's own guard denies a room, that is not a plan limit: only LiveKit's answers
//! name one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, NaiveTime, Utc};
use humantime::format_duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{Backoff, Budget, Period, Project, RampMode, Stay, Target};
use crate::history::{AgentTimeUsed, History, RESERVE_TIMEOUT, Reservation};
use crate::livekit::RoomName;
use crate::probe::{LimitKind, billable_minutes, max_overrun, max_time_to_verdict};
use crate::report::{Denial, Purpose};

/// The guard rails of one project. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Guard {
    shared: Arc<GuardShared>,
}

/// The right of one batch to hold up to `count` rooms of a project open at once. Dropping it gives the right back.
#[must_use = "dropping the permits gives them back"]
pub(crate) struct RoomPermits {
    shared: Arc<GuardShared>,
    count: usize,
    /// The project's rejections when the batch began.
    rejections: u64,
    /// Set for places that were spare.
    give_way: Option<CancellationToken>,
}

struct GuardShared {
    project: String,
    history: History,
    state: Mutex<GuardState>,
    /// Notified when a waiting batch may have reached its turn.
    queue_changed: Notify,
}

struct GuardState {
    budget: Budget,
    backoff: Backoff,
    max_rooms: usize,
    /// Rooms that batches hold permits for.
    held: usize,
    /// Tickets of the batches that wait for permits, the oldest first.
    queue: VecDeque<u64>,
    /// The holders of places that were spare, until they give way.
    spare: Vec<CancellationToken>,
    next_ticket: u64,
    /// Plan-limit rejections since the start of this process.
    rejections: u64,
    /// Back-offs since the last batch that had no rejection.
    consecutive: u32,
    backoff_until: Option<Instant>,
}

impl Guard {
    pub(crate) fn new(name: &str, project: &Project, history: History) -> Self {
        Self {
            shared: Arc::new(GuardShared {
                project: name.to_owned(),
                history,
                state: Mutex::new(GuardState {
                    budget: project.budget.clone(),
                    backoff: project.backoff.clone(),
                    max_rooms: project.max_rooms,
                    held: 0,
                    queue: VecDeque::new(),
                    spare: Vec::new(),
                    next_ticket: 0,
                    rejections: 0,
                    consecutive: 0,
                    backoff_until: None,
                }),
                queue_changed: Notify::new(),
            }),
        }
    }

    /// Applies changed settings. Rooms that are open stay open.
    pub(crate) fn configure(&self, project: &Project) {
        let mut state = self.shared.lock();
        state.budget = project.budget.clone();
        state.backoff = project.backoff.clone();
        state.max_rooms = project.max_rooms;
        drop(state);
        self.shared.queue_changed.notify_waiters();
    }

    /// Waits until this batch may hold its rooms open, or as many of them as the project may ever hold. Batches are
    /// served in the order in which they ask. Cancel-safe.
    pub(crate) async fn acquire(&self, target: &Target) -> RoomPermits {
        let wanted = max_rooms_at_once(target);
        let ticket = QueueTicket::new(&self.shared);
        loop {
            // Registered before the attempt, so that a change between the two still wakes this task.
            let changed = self.shared.queue_changed.notified();
            if let Some(permits) = ticket.try_acquire(wanted) {
                return permits;
            }
            changed.await;
        }
    }

    /// Takes up to this many places that no batch uses or waits for; `None` if there is none.
    ///
    /// `give_way` is cancelled as soon as a waiting batch needs the places. The holder then closes its rooms.
    pub(crate) fn take_spare(
        &self,
        rooms: usize,
        give_way: &CancellationToken,
    ) -> Option<RoomPermits> {
        let mut state = self.shared.lock();
        let free = state.max_rooms.saturating_sub(state.held);
        let count = rooms.min(free);
        if count == 0 || !state.queue.is_empty() {
            return None;
        }
        state.spare.retain(|token| !token.is_cancelled());
        state.spare.push(give_way.clone());
        Some(
            self.shared
                .permits(&mut state, count, Some(give_way.clone())),
        )
    }

    /// Why a room would be denied now, if it would be. Reserves nothing.
    pub(crate) fn denial(&self, worst_case: Duration) -> Option<Denial> {
        let used = self.shared.history.used(&self.shared.project);
        let now = self.shared.history.now();
        self.check_backoff(now)
            .and_then(|()| self.check_budget(&used, worst_case, now))
            .err()
    }

    /// Why a confirmation would be denied now by the target's own limit. `worst_case` is that of all its rooms: the limit is what all
    /// confirmations of a day may use. Reserves nothing.
    pub(crate) fn confirmation_denial(
        &self,
        name: &str,
        target: &Target,
        worst_case: Duration,
    ) -> Option<Denial> {
        let limit = target.confirm.daily_limit(&self.shared.lock().budget)?;
        let GuardShared {
            project, history, ..
        } = &*self.shared;
        let used = history.confirmations_used(project, name);
        confirmation_within(used, worst_case, limit, history.now()).err()
    }

    /// Reserves the agent time that a room may use and records its name in the journal, before the room can exist.
    ///
    /// # Errors
    /// The guard rails allow no room now.
    pub(crate) async fn reserve(
        &self,
        room: &RoomName,
        target: &str,
        purpose: Purpose,
        worst_case: Duration,
    ) -> Result<Reservation, Denial> {
        let GuardShared {
            project, history, ..
        } = &*self.shared;
        let admit = |used: &AgentTimeUsed, now| {
            self.check_backoff(now)?;
            self.check_budget(used, worst_case, now)
        };
        history
            .reserve(room, project, target, purpose, worst_case, admit)
            .await
    }

    /// Starts a back-off after LiveKit named a plan limit: the project opens no new room until it ends.
    ///
    /// Rooms that were already open may report the same limit. They extend the back-off only if LiveKit asks for a later
    /// time with `Retry-After`.
    pub(crate) fn record_rejection(&self, limit: LimitKind, retry_after: Option<Duration>) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        state.rejections += 1;
        let current = state.backoff_until.filter(|until| *until > now);
        let until = match (retry_after, current) {
            (Some(after), _) => now + after.min(state.backoff.longest),
            (None, None) => now + exponential(&state.backoff, state.consecutive),
            (None, Some(until)) => until,
        };
        if current.is_none() {
            state.consecutive = state.consecutive.saturating_add(1);
        }
        if current.is_none_or(|before| before < until) {
            state.backoff_until = Some(until);
            let backoff = format_duration(Duration::from_secs((until - now).as_secs())).to_string();
            tracing::warn!(
                project = self.shared.project,
                limit = limit.label(),
                "plan limit reached: no new rooms for {backoff}"
            );
        }
    }

    /// The end of the current back-off, if there is one.
    pub(crate) fn backoff_until(&self) -> Option<DateTime<Utc>> {
        self.backoff_end(self.shared.history.now())
    }

    /// Agent time of the current period: what ended rooms have used, and what open rooms have reserved.
    pub(crate) fn used_and_reserved(&self, period: Period) -> (Duration, Duration) {
        let used = self.shared.history.used(&self.shared.project);
        let reserved = used.reserved_in(period);
        (used.in_period(period).saturating_sub(reserved), reserved)
    }

    /// Rooms that batches hold permits for.
    pub(crate) fn rooms_held(&self) -> usize {
        self.shared.lock().held
    }

    pub(crate) fn limit(&self, period: Period) -> Option<Duration> {
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
        used: &AgentTimeUsed,
        worst_case: Duration,
        now: DateTime<Utc>,
    ) -> Result<(), Denial> {
        for period in Period::ALL {
            let Some(limit) = self.limit(period) else {
                continue;
            };
            // Fail closed: the remaining budget is unknown, and an overrun costs money.
            if used.ledger_unread {
                return Err(Denial::LedgerUnread);
            }
            if used.ledger_lost {
                return Err(Denial::LedgerLost);
            }
            let used = used.in_period(period);
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
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Records that the batch has ended and that none of its rooms met a plan limit. The next back-off is as short as the
    /// first one, unless another batch of the project met a limit since this batch began.
    pub(crate) fn confirm_none_rejected(&self) {
        let mut state = self.shared.lock();
        if state.rejections == self.rejections {
            state.consecutive = 0;
        }
    }
}

impl Drop for RoomPermits {
    fn drop(&mut self) {
        if let Some(give_way) = &self.give_way {
            give_way.cancel();
        }
        let mut state = self.shared.lock();
        state.held -= self.count;
        state.spare.retain(|token| !token.is_cancelled());
        drop(state);
        self.shared.queue_changed.notify_waiters();
    }
}

impl GuardShared {
    fn lock(&self) -> MutexGuard<'_, GuardState> {
        // Each change completes before anything in it can panic, so a poisoned lock still guards consistent data.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn permits(
        self: &Arc<Self>,
        state: &mut GuardState,
        count: usize,
        give_way: Option<CancellationToken>,
    ) -> RoomPermits {
        state.held += count;
        RoomPermits {
            shared: Arc::clone(self),
            count,
            rejections: state.rejections,
            give_way,
        }
    }
}

/// A batch's place in the queue for permits. Dropping it gives the place up.
struct QueueTicket<'a> {
    shared: &'a Arc<GuardShared>,
    number: u64,
}

impl<'a> QueueTicket<'a> {
    fn new(shared: &'a Arc<GuardShared>) -> Self {
        let mut state = shared.lock();
        let number = state.next_ticket;
        state.next_ticket += 1;
        state.queue.push_back(number);
        Self { shared, number }
    }

    fn try_acquire(&self, wanted: usize) -> Option<RoomPermits> {
        let mut state = self.shared.lock();
        let count = wanted.min(state.max_rooms);
        let first = state.queue.front() == Some(&self.number);
        if first && state.held + count > state.max_rooms {
            // These rooms are in addition to every schedule, so they must not delay it.
            for give_way in state.spare.drain(..) {
                give_way.cancel();
            }
        }
        if !first || state.held + count > state.max_rooms {
            return None;
        }
        Some(self.shared.permits(&mut state, count, None))
    }
}

impl Drop for QueueTicket<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.queue.retain(|number| *number != self.number);
        drop(state);
        self.shared.queue_changed.notify_waiters();
    }
}

fn confirmation_within(
    used: Duration,
    worst_case: Duration,
    limit: Duration,
    now: DateTime<Utc>,
) -> Result<(), Denial> {
    if used + worst_case <= limit {
        return Ok(());
    }
    Err(Denial::Confirmations {
        used,
        worst_case,
        limit,
        resets_at: Period::Day
            .next(now.date_naive())
            .and_time(NaiveTime::MIN)
            .and_utc(),
    })
}

/// Maximum number of rooms that a batch holds open at once.
pub(crate) fn max_rooms_at_once(target: &Target) -> usize {
    match target.batch.stay {
        Stay::Together => target.batch.rooms,
        Stay::OneByOne => 1,
    }
}

/// How long one room of a batch is held, and what that can cost at most.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RoomTime {
    /// For its hold, counted from the agent's join.
    held: Duration,
    /// For leaving and deleting it.
    cleanup: Duration,
}

impl RoomTime {
    #[cfg(test)]
    pub(crate) fn of(held: Duration) -> Self {
        let cleanup = Duration::ZERO;
        Self { held, cleanup }
    }

    /// Maximum agent time that LiveKit can bill, if the verdict takes at most this long after the agent's join.
    pub(crate) fn worst_case(&self, to_verdict: Duration) -> Duration {
        billable_minutes(self.held.max(to_verdict) + self.cleanup)
    }
}

/// The times of each room of a batch, in the order in which the rooms open.
///
/// In the worst case of a room its own agent joins at once, and the agents of all later rooms join as late as allowed.
pub(crate) fn room_times(target: &Target, project: &Project) -> impl Iterator<Item = RoomTime> {
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
    (0..rooms).map(move |index| RoomTime {
        held: ramp_after(index) + target.batch.hold + max_overrun(target),
        // Leaving and deleting may each take the whole clean-up deadline.
        cleanup: target.deadlines.cleanup * 2,
    })
}

/// Maximum agent time that LiveKit can bill for each room of a batch, in the order in which the rooms open.
pub(crate) fn worst_cases(target: &Target, project: &Project) -> impl Iterator<Item = Duration> {
    let to_verdict = max_time_to_verdict(target);
    room_times(target, project).map(move |time| time.worst_case(to_verdict))
}

/// Maximum duration of a batch, from its permits to the deletion of its last room.
pub(crate) fn max_batch_duration(target: &Target, project: &Project) -> Duration {
    let one_join = max_join_duration(target, project);
    let rooms = u32::try_from(target.batch.rooms).unwrap_or(u32::MAX);
    let held = (target.batch.hold + max_overrun(target)).max(max_time_to_verdict(target));
    let held = held + target.deadlines.cleanup * 2;
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

/// Maximum time from the opening of a room to the agent's join, or to the verdict that no agent joined.
fn max_join_duration(target: &Target, project: &Project) -> Duration {
    let deadlines = &target.deadlines;
    // Two API calls: the room's creation, and the last look at its dispatches.
    project.api_timeout * 2 + deadlines.signal + deadlines.media + deadlines.join + RESERVE_TIMEOUT
}

/// The first back-off, doubled for each earlier one, plus up to a quarter of jitter: two canaries that were rejected
/// together must not come back together.
fn exponential(backoff: &Backoff, earlier: u32) -> Duration {
    let factor = 2_u32.saturating_pow(earlier.min(31));
    let plain = backoff.first.saturating_mul(factor).min(backoff.longest);
    plain
        .mul_f64(1.0 + fastrand::f64() / 4.0)
        .min(backoff.longest)
}

#[cfg(test)]
impl Guard {
    /// Agent time used in the current period; open rooms count with their worst case.
    pub(crate) fn used(&self, period: Period) -> Duration {
        self.shared
            .history
            .used(&self.shared.project)
            .in_period(period)
    }
}

#[cfg(test)]
mod sandbox_tests;
#[cfg(test)]
mod tests;
