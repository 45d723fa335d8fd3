//! The instants at which a schedule ticks, and what they add up to per day and on average; pure functions of the schedule.

use std::hash::Hasher;
use std::time::Duration;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, TimeDelta, Utc};
use fnv::FnvHasher;

use super::wall_clock::{Gaps, WallClock};
use crate::config::Schedule;

/// The first tick after `after`; never `after` itself.
///
/// The ticks of an interval lie on a fixed grid, counted from the Unix epoch plus `offset`, so that a restart doesn't
/// move them. A cron expression has no offset: it matches the wall clock of its zone, and where that clock is changed,
/// vixie cron's rule holds. An expression of particular times, without a `*` in hour or minute, ticks once for every
/// time that it names: what the change skips comes at the moment of the change, all of it as one tick, and what the
/// change repeats comes the first time only. An expression with a `*` there just follows the clock: it has nothing in
/// the hour that is skipped, and ticks through the repeated hour twice, so that it never falls silent.
///
/// `None` where nothing comes in the next 40 years.
pub fn next_tick(
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

/// How far the grid of an interval is shifted for this target: whole seconds, less than the interval. Zero for a cron
/// expression, which has no grid.
///
/// It spreads targets of the same interval over it. It depends on the name alone, by FNV-1a, so that it is the same in
/// every version and on every machine.
pub fn offset(target: &str, schedule: &Schedule) -> Duration {
    let Schedule::Every(every) = schedule else {
        return Duration::ZERO;
    };
    let mut hasher = FnvHasher::default();
    hasher.write(target.as_bytes());
    Duration::from_secs(hasher.finish() % every.as_secs().max(1))
}

/// How many ticks a UTC day has.
pub fn ticks_on(schedule: &Schedule, offset: Duration, day: NaiveDate) -> u64 {
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

/// The gaps that begin in the `window` after `from`, each in full, and the wait from `from` to the first tick as one of
/// the longest.
///
/// That wait is a gap too, with the tick just handled as `from`, and where a schedule rests for months, it is the one
/// that matters. `None` where no tick comes.
pub fn gaps(schedule: &Schedule, from: DateTime<Utc>, window: Duration) -> Option<Gaps> {
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

/// Days for which the intervals of a schedule are looked at.
const DAYS: u64 = 7;

/// The same as a time: what the daemon tells of, and what alert rules are made for.
pub const AHEAD: Duration = Duration::from_hours(DAYS * 24);

/// The interval itself; of a cron expression [`AHEAD`], of which `day` is the first, by the number of ticks in it, and
/// `None` where there are none.
pub fn mean_interval(schedule: &Schedule, day: NaiveDate) -> Option<Duration> {
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

/// The instants `offset + n * every` since the epoch, in nanoseconds.
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

    /// How many ticks lie from `begin` to before `end`.
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
