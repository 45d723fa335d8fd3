//! The instants at which a schedule ticks, their number per day and the intervals between them. All functions are pure.

use std::hash::Hasher;
use std::time::Duration;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, TimeDelta, Utc};
use fnv::FnvHasher;

use super::wall_clock::{Gaps, WallClock};
use crate::config::Schedule;

/// The first tick strictly after `after`.
///
/// The ticks of an interval lie on a fixed grid that starts at the Unix epoch plus `offset`, so a restart doesn't move
/// them. A cron expression has no offset: it matches the wall clock of its zone. When that clock changes, vixie cron's
/// rules apply:
/// - An expression without a `*` in hour and minute names fixed times and ticks once for each of them. The times that
///   the change skips become one tick at the moment of the change. Times that the clock shows twice tick the first time.
/// - An expression with a `*` in hour or minute follows the clock. It has no tick in the skipped hour and ticks in both
///   passes of the repeated hour, so that its ticks never pause.
///
/// `None` if the next 40 years have no tick.
pub(crate) fn next_tick(
    schedule: &Schedule,
    offset: Duration,
    after: DateTime<Utc>,
) -> Option<DateTime<Utc>> {
    match schedule {
        Schedule::Every(every) => {
            let grid = Grid::new(*every, offset)?;
            grid.instant(grid.ticks_until(after) + 1)
        }
        Schedule::Cron { expression, zone } => WallClock::new(expression, *zone).next_after(after),
    }
}

/// By how much the grid of an interval is shifted for this target: whole seconds, less than the interval. Zero for a
/// cron expression, which has no grid.
///
/// The offset spreads targets with the same interval over that interval. It is the FNV-1a hash of the target's name, so
/// it is the same in every version and on every machine.
pub(crate) fn offset(target: &str, schedule: &Schedule) -> Duration {
    let Schedule::Every(every) = schedule else {
        return Duration::ZERO;
    };
    let mut hasher = FnvHasher::default();
    hasher.write(target.as_bytes());
    Duration::from_secs(hasher.finish() % every.as_secs().max(1))
}

/// The number of ticks on a UTC day.
pub(crate) fn ticks_on(schedule: &Schedule, offset: Duration, day: NaiveDate) -> u64 {
    let begin = day.and_time(NaiveTime::MIN).and_utc();
    let end = begin + Days::new(1);
    match schedule {
        Schedule::Every(every) => {
            Grid::new(*every, offset).map_or(0, |grid| grid.ticks_in(begin, end))
        }
        Schedule::Cron { expression, zone } => {
            WallClock::new(expression, *zone).ticks_in(begin, end)
        }
    }
}

/// The gaps that begin in the `window` after `from`, each at its full length. The wait from `from` to the first tick
/// counts as a candidate for the longest.
///
/// `from` usually is the tick that was just handled, so that wait is a gap too. It is the one that matters if a schedule
/// pauses for months. `None` if the schedule has no further tick.
pub(crate) fn gaps(schedule: &Schedule, from: DateTime<Utc>, window: Duration) -> Option<Gaps> {
    match schedule {
        Schedule::Every(every) => Some(Gaps {
            shortest: *every,
            longest: *every,
        }),
        Schedule::Cron { expression, zone } => {
            WallClock::new(expression, *zone).gaps(from, from + window)
        }
    }
}

/// Number of days over which the intervals of a schedule are evaluated.
const DAYS: u64 = 7;

/// The same as a duration. The daemon's interval metrics and the alert rules use it.
pub(crate) const AHEAD: Duration = Duration::from_hours(DAYS * 24);

/// The mean interval between ticks. For a cron expression it is [`AHEAD`], starting with `day`, divided by the number of
/// ticks in it; `None` if that period has no tick.
pub(crate) fn mean_interval(schedule: &Schedule, day: NaiveDate) -> Option<Duration> {
    match schedule {
        Schedule::Every(every) => Some(*every),
        Schedule::Cron { expression, zone } => {
            let begin = day.and_time(NaiveTime::MIN).and_utc();
            let end = begin + Days::new(DAYS);
            let ticks = WallClock::new(expression, *zone).ticks_in(begin, end);
            let ticks = u32::try_from(ticks).ok().filter(|ticks| *ticks > 0)?;
            Some(AHEAD / ticks)
        }
    }
}

/// The instants `offset + n * every` since the Unix epoch, in nanoseconds.
struct Grid {
    every: i128,
    offset: i128,
}

impl Grid {
    /// `None` for an interval of zero, which has no ticks.
    fn new(every: Duration, offset: Duration) -> Option<Self> {
        let nanoseconds = |duration: Duration| i128::try_from(duration.as_nanos()).ok();
        Some(Self {
            every: nanoseconds(every).filter(|every| *every > 0)?,
            offset: nanoseconds(offset)?,
        })
    }

    /// The number of the last tick that is not after `instant`.
    fn ticks_until(&self, instant: DateTime<Utc>) -> i128 {
        let seconds = i128::from(instant.timestamp());
        let since_epoch = seconds * NANOSECONDS + i128::from(instant.timestamp_subsec_nanos());
        (since_epoch - self.offset).div_euclid(self.every)
    }

    /// The number of ticks from `begin` (included) to `end` (excluded).
    fn ticks_in(&self, begin: DateTime<Utc>, end: DateTime<Utc>) -> u64 {
        let before = |end| self.ticks_until(end - TimeDelta::nanoseconds(1));
        u64::try_from(before(end) - before(begin)).expect("no tick is shorter than a nanosecond")
    }

    fn instant(&self, number: i128) -> Option<DateTime<Utc>> {
        let since_epoch = number.checked_mul(self.every)?.checked_add(self.offset)?;
        DateTime::from_timestamp(
            since_epoch.div_euclid(NANOSECONDS).try_into().ok()?,
            since_epoch.rem_euclid(NANOSECONDS).try_into().ok()?,
        )
    }
}

const NANOSECONDS: i128 = 1_000_000_000;

#[cfg(test)]
mod tests;
