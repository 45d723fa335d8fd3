//! The ticks of a cron expression on the wall clock of a time zone.
//!
//! croner parses the expression and decides which days match. Its own search is not used, for two reasons: in a repeated
//! hour it can return a time before the start of the search, and it never treats an expression with several times as one
//! of fixed times. Zones change their offset by whole minutes, so this search proceeds minute by minute: an expression
//! matches certain minutes, and the same seconds within each of them.

use std::ops::Range;
use std::time::Duration;

use chrono::{
    DateTime, Datelike, NaiveDate, NaiveDateTime, NaiveTime, Offset, TimeDelta, TimeZone, Timelike,
    Utc,
};
use chrono_tz::Tz;
use croner::Cron;
use croner::errors::CronError;

const MINUTE: TimeDelta = TimeDelta::minutes(1);
const DAY: TimeDelta = TimeDelta::days(1);
/// The next 29th of February on a given weekday can be 40 years away; a day that doesn't match in that time never does.
const HORIZON: TimeDelta = TimeDelta::days(40 * 366);

/// The shortest and the longest gap between ticks in a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gaps {
    pub(crate) shortest: Duration,
    pub(crate) longest: Duration,
}

pub(super) struct WallClock<'a> {
    expression: &'a Cron,
    zone: Tz,
    hours: NumberSet,
    minutes: NumberSet,
    seconds: NumberSet,
    /// Neither hour nor minute contains a `*`: each time ticks exactly once per day, even if the clock skips or repeats it.
    fixed_times: bool,
}

/// A period of at most a day in which the zone keeps its UTC offset.
struct OffsetPeriod {
    begin: DateTime<Utc>,
    /// By how much the wall clock is ahead of UTC.
    ahead: TimeDelta,
    /// The wall-clock times to match; with fixed times, without those that the clock shows for the second time.
    wall: Range<NaiveDateTime>,
    /// The wall-clock times that the change at `begin` skipped; only with fixed times.
    skipped: Option<Range<NaiveDateTime>>,
}

impl OffsetPeriod {
    fn end(&self) -> DateTime<Utc> {
        (self.wall.end - self.ahead).and_utc()
    }

    fn instant(&self, wall: NaiveDateTime) -> DateTime<Utc> {
        (wall - self.ahead).and_utc()
    }

    /// The wall-clock times to match, from the instant `from`.
    fn wall_from(&self, from: DateTime<Utc>) -> Range<NaiveDateTime> {
        self.wall.start.max(from.naive_utc() + self.ahead)..self.wall.end
    }
}

impl<'a> WallClock<'a> {
    pub(super) fn new(expression: &'a Cron, zone: Tz) -> Self {
        let pattern = &expression.pattern;
        Self {
            expression,
            zone,
            hours: NumberSet::of(24, |hour| pattern.hour_match(hour)),
            minutes: NumberSet::of(60, |minute| pattern.minute_match(minute)),
            seconds: NumberSet::of(60, |second| pattern.second_match(second)),
            fixed_times: !pattern.hours.from_wildcard && !pattern.minutes.from_wildcard,
        }
    }

    pub(super) fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let this = minute_of(after);
        let left = self.seconds.first_from(after.second() + 1);
        let from = if left.is_some() { this } else { this + MINUTE };
        let minute = self.next_minute(from)?;
        let second = left
            .filter(|_| minute == this)
            .or(self.seconds.first_from(0))?;
        Some(minute + seconds(second))
    }

    /// The number of ticks from `begin` (included) to `end` (excluded). Both must be full minutes.
    pub(super) fn ticks_in(&self, begin: DateTime<Utc>, end: DateTime<Utc>) -> u64 {
        let periods = self.periods(begin);
        let minutes: u64 = periods
            .take_while(|period| period.begin < end)
            .map(|period| {
                let mut wall = period.wall_from(begin);
                wall.end = wall.end.min(end.naive_utc() + period.ahead);
                let made_up = self.makes_up(&period, begin) && {
                    // A tick that is due in that minute anyway merges with the made-up one.
                    let first = period.wall.start;
                    self.first_in(first..first + MINUTE).is_none()
                };
                self.matches_in(wall) + u64::from(made_up)
            })
            .sum();
        minutes * self.seconds.len()
    }

    /// The gaps that begin before `until`, and the wait from `from` to the first tick.
    pub(super) fn gaps(&self, from: DateTime<Utc>, until: DateTime<Utc>) -> Option<Gaps> {
        let first = self.next_after(from)?;
        let [begin, end] = [self.seconds.first_from(0)?, self.seconds.last()?].map(seconds);
        let longest = distance(from, first);
        let mut found: Vec<Duration> = Vec::new();
        if first < until {
            found.extend(
                self.seconds
                    .gaps()
                    .map(|gap| Duration::from_secs(gap.into())),
            );
        }
        // Step by minutes: a schedule that ticks every second has 604,800 ticks per week.
        let mut minute = minute_of(first);
        while minute + end < until {
            let next = self.next_minute(minute + MINUTE)?;
            found.push(distance(minute + end, next + begin));
            minute = next;
        }
        Some(Gaps {
            shortest: found.iter().copied().min().unwrap_or(longest),
            longest: found.iter().copied().fold(longest, Duration::max),
        })
    }

    /// The first minute with ticks at or after `from`, which must be a full minute.
    fn next_minute(&self, from: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.periods(from)
            .take_while(|period| period.begin <= from + HORIZON)
            .find_map(|period| {
                if self.makes_up(&period, from) {
                    return Some(period.begin);
                }
                let found = self.first_in(period.wall_from(from))?;
                Some(period.instant(found))
            })
    }

    /// Whether ticks that the clock change skipped are made up as the period begins.
    fn makes_up(&self, period: &OffsetPeriod, from: DateTime<Utc>) -> bool {
        let skipped = period.skipped.clone();
        period.begin >= from && skipped.is_some_and(|skipped| self.first_in(skipped).is_some())
    }

    /// The periods that end after `from`. The scan starts a day earlier, because `from` may be within the repeated hour of
    /// a clock change.
    fn periods(&self, from: DateTime<Utc>) -> impl Iterator<Item = OffsetPeriod> {
        let mut begin = from - DAY;
        let mut before = self.ahead_at(begin);
        std::iter::repeat_with(move || {
            let ahead = self.ahead_at(begin);
            let end = self.next_change(begin, begin + DAY);
            let mut period = OffsetPeriod {
                begin,
                ahead,
                wall: begin.naive_utc() + ahead..end.naive_utc() + ahead,
                skipped: None,
            };
            if self.fixed_times {
                let unchanged = begin.naive_utc() + before;
                if before < ahead {
                    period.skipped = Some(unchanged..period.wall.start);
                }
                // Times that the clock shows again have already ticked.
                period.wall.start = period.wall.start.max(unchanged);
            }
            begin = end;
            before = ahead;
            period
        })
        .skip_while(move |period| period.end() <= from)
    }

    fn ahead_at(&self, instant: DateTime<Utc>) -> TimeDelta {
        let offset = self.zone.offset_from_utc_datetime(&instant.naive_utc());
        TimeDelta::seconds(offset.fix().local_minus_utc().into())
    }

    /// The next change of the zone's offset after `from`; `until` if the offset doesn't change before.
    fn next_change(&self, from: DateTime<Utc>, until: DateTime<Utc>) -> DateTime<Utc> {
        let ahead = self.ahead_at(from);
        if self.ahead_at(until) == ahead {
            return until;
        }
        let (mut unchanged, mut changed) = (from, until);
        while changed - unchanged > MINUTE {
            let middle = minute_of(unchanged + (changed - unchanged) / 2);
            if self.ahead_at(middle) == ahead {
                unchanged = middle;
            } else {
                changed = middle;
            }
        }
        changed
    }

    fn first_in(&self, wall: Range<NaiveDateTime>) -> Option<NaiveDateTime> {
        let first_day = wall.start.date();
        let found = days(&wall).find_map(|day| {
            let earliest = if day == first_day {
                wall.start.time()
            } else {
                NaiveTime::MIN
            };
            let time = self
                .first_time(earliest)
                .filter(|_| self.day_matches(day))?;
            Some(day.and_time(time))
        });
        found.filter(|found| *found < wall.end)
    }

    /// The first matching time of a day at or after `earliest`, which must be a full minute.
    fn first_time(&self, earliest: NaiveTime) -> Option<NaiveTime> {
        let (hour, minute) = (earliest.hour(), earliest.minute());
        let in_this_hour = self.minutes.first_from(minute);
        let (hour, minute) = match in_this_hour.filter(|_| self.hours.has(hour)) {
            Some(minute) => (hour, minute),
            None => (
                self.hours.first_from(hour + 1)?,
                self.minutes.first_from(0)?,
            ),
        };
        NaiveTime::from_hms_opt(hour, minute, 0)
    }

    /// The number of matching minutes in this range.
    fn matches_in(&self, wall: Range<NaiveDateTime>) -> u64 {
        if wall.is_empty() {
            return 0;
        }
        let all = self.hours.len() * self.minutes.len();
        let before = |time: NaiveTime| {
            let in_this_hour = if self.hours.has(time.hour()) {
                self.minutes.below(time.minute())
            } else {
                0
            };
            self.hours.below(time.hour()) * self.minutes.len() + in_this_hour
        };
        days(&wall)
            .filter(|day| self.day_matches(*day))
            .map(|day| {
                let end = if day == wall.end.date() {
                    before(wall.end.time())
                } else {
                    all
                };
                let begin = if day == wall.start.date() {
                    before(wall.start.time())
                } else {
                    0
                };
                end - begin
            })
            .sum()
    }

    fn day_matches(&self, day: NaiveDate) -> bool {
        let pattern = &self.expression.pattern;
        let month = pattern.month_match(day.month());
        month.is_ok_and(|matches| matches)
            && pattern
                .day_match(day.year(), day.month(), day.day())
                .is_ok_and(|matches| matches)
    }
}

/// A set of numbers below 64, as bits.
#[derive(Clone, Copy)]
struct NumberSet(u64);

impl NumberSet {
    fn of(size: u32, matches: impl Fn(u32) -> Result<bool, CronError>) -> Self {
        let members = (0..size).filter(|number| matches(*number).is_ok_and(|matches| matches));
        Self(members.fold(0, |set, number| set | 1 << number))
    }

    fn has(self, number: u32) -> bool {
        self.first_from(number) == Some(number)
    }

    fn first_from(self, number: u32) -> Option<u32> {
        let rest = self.0 & u64::MAX.checked_shl(number)?;
        (rest != 0).then(|| rest.trailing_zeros())
    }

    fn last(self) -> Option<u32> {
        self.0.checked_ilog2()
    }

    fn below(self, number: u32) -> u64 {
        (self.0 & !(u64::MAX << number)).count_ones().into()
    }

    fn len(self) -> u64 {
        self.0.count_ones().into()
    }

    /// The distances between neighbouring members.
    fn gaps(self) -> impl Iterator<Item = u32> {
        let next = move |member: &u32| self.first_from(member + 1);
        let members = std::iter::successors(self.first_from(0), next);
        members.filter_map(move |member| Some(self.first_from(member + 1)? - member))
    }
}

/// Every day from the start of the range to the day on which it ends.
fn days(wall: &Range<NaiveDateTime>) -> impl Iterator<Item = NaiveDate> {
    let last = wall.end.date();
    wall.start
        .date()
        .iter_days()
        .take_while(move |day| *day <= last)
}

fn minute_of(instant: DateTime<Utc>) -> DateTime<Utc> {
    let minute = instant
        .with_second(0)
        .and_then(|minute| minute.with_nanosecond(0));
    minute.expect("UTC shows every second")
}

fn seconds(count: u32) -> TimeDelta {
    TimeDelta::seconds(count.into())
}

fn distance(from: DateTime<Utc>, to: DateTime<Utc>) -> Duration {
    (to - from).to_std().expect("ticks follow each other")
}
