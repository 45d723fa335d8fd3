//! How the rooms of scheduled batches ended, and their delays, per target in hours and days.
//!
//! The sums are kept when a batch is written, so that reading them costs the same however many probes the file has. They also
//! outlive the probes: good batches are deleted before failed ones, so a share that is counted from the probes that are left
//! would be too low.
//!
//! Delays are kept as histograms, because hours can be merged then. Up to 128 ms a class is one millisecond wide, above that at
//! most 1.6 % of the delay, so a percentile is off by at most 0.8 %.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::read::{RoomCount, count};
use super::store::{millis, time};
use crate::probe::{Outcome, ProbeReport, Reason, Span, Turn};

const HOURS: i32 = 24;
const DAYS: i32 = 30;
const DAYS_OF_A_WEEK: i32 = 7;

/// The spans that are summed up, in milliseconds, and how long their sums are kept: longer than they are shown.
const WIDTHS: [(i64, TimeDelta); 2] = [(HOUR, TimeDelta::days(9)), (DAY, TimeDelta::days(38))];
const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

/// What the statistics need of a room with a verdict.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoomSample {
    started_at: DateTime<Utc>,
    ok: bool,
    join: Option<Duration>,
    first_speech: Option<Duration>,
    reply: Option<Duration>,
}

impl RoomSample {
    /// `None` for a room that shows nothing of the service.
    pub(super) fn of(probe: &ProbeReport) -> Option<Self> {
        let ok = match &probe.outcome {
            Outcome::Ok => true,
            Outcome::Failed(failure) if failure.reason.origin().is_of_service() => false,
            Outcome::Failed(_) | Outcome::Aborted => return None,
        };
        let join = probe.timeline.span(Span::AgentJoin);
        Some(Self {
            started_at: probe.started_at,
            ok,
            // An upper bound is no delay, so percentiles leave it out, as the summary of a batch does.
            join: join.filter(|_| !probe.join_upper_bound),
            first_speech: probe.timeline.span(Span::FirstSpeech),
            reply: probe.turns.iter().find_map(Turn::reply_delay),
        })
    }
}

/// Classes of delays and their rooms, in order. A class has the number of its lowest whole millisecond.
///
/// A list and no map, because one page merges tens of thousands of classes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Histogram(Vec<(u64, u64)>);

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

impl<'de> Deserialize<'de> for Histogram {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ClassesVisitor;

        impl<'de> Visitor<'de> for ClassesVisitor {
            type Value = Histogram;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of classes and rooms")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Histogram, A::Error> {
                let mut classes = Vec::new();
                while let Some(class) = map.next_entry()? {
                    classes.push(class);
                }
                // The migration wrote them in the order of their texts.
                classes.sort_unstable();
                Ok(Histogram(classes))
            }
        }

        deserializer.deserialize_map(ClassesVisitor)
    }
}

impl Histogram {
    /// The width of a delay's class in milliseconds, as in the migration to format 3.
    fn width(millis: u64) -> u64 {
        let bits = u64::BITS - millis.leading_zeros();
        1 << bits.saturating_sub(7).min(9)
    }

    fn add(&mut self, delay: Option<Duration>) {
        let Some(delay) = delay else { return };
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let class = millis - millis % Self::width(millis);
        match self.0.binary_search_by_key(&class, |(class, _)| *class) {
            Ok(place) => self.0[place].1 += 1,
            Err(place) => self.0.insert(place, (class, 1)),
        }
    }

    fn merge(&mut self, other: &Self) {
        let mut merged = Vec::with_capacity(self.0.len() + other.0.len());
        let (mut one, mut two) = (&self.0[..], &other.0[..]);
        while let ([first, one_rest @ ..], [second, two_rest @ ..]) = (one, two) {
            match first.0.cmp(&second.0) {
                Ordering::Less => {
                    merged.push(*first);
                    one = one_rest;
                }
                Ordering::Greater => {
                    merged.push(*second);
                    two = two_rest;
                }
                Ordering::Equal => {
                    merged.push((first.0, first.1 + second.1));
                    (one, two) = (one_rest, two_rest);
                }
            }
        }
        merged.extend(one.iter().chain(two));
        self.0 = merged;
    }

    /// The nearest rank, as the middle of its class in seconds.
    fn percentile(&self, percent: u64) -> Option<f64> {
        let rooms: u64 = self.0.iter().map(|(_, rooms)| rooms).sum();
        let rank = (rooms * percent).div_ceil(100).max(1);
        let mut below = 0;
        let (class, _) = self.0.iter().find(|(_, rooms)| {
            below += rooms;
            below >= rank
        })?;
        let twice = 2 * class + Self::width(*class) - 1;
        Some(Duration::from_micros(twice * 500).as_secs_f64())
    }

    fn percentiles(&self) -> Percentiles {
        Percentiles {
            p50: self.percentile(50),
            p90: self.percentile(90),
        }
    }
}

/// The sums of one span of one target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Tally {
    ok: u64,
    failed: u64,
    join: Histogram,
    first_speech: Histogram,
    reply: Histogram,
}

impl Tally {
    fn add(&mut self, sample: &RoomSample) {
        *(if sample.ok {
            &mut self.ok
        } else {
            &mut self.failed
        }) += 1;
        self.join.add(sample.join);
        self.first_speech.add(sample.first_speech);
        self.reply.add(sample.reply);
    }

    fn merge(&mut self, other: &Self) {
        self.ok += other.ok;
        self.failed += other.failed;
        self.join.merge(&other.join);
        self.first_speech.merge(&other.first_speech);
        self.reply.merge(&other.reply);
    }

    /// Reads the five columns from `column` on.
    fn read(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Self> {
        let count = |column| row.get::<_, i64>(column).map(i64::unsigned_abs);
        let histogram = |column| {
            let text = row.get_ref(column)?.as_str()?;
            serde_json::from_str(text).map_err(|error| {
                let kind = rusqlite::types::Type::Text;
                rusqlite::Error::FromSqlConversionFailure(column, kind, Box::new(error))
            })
        };
        Ok(Self {
            ok: count(column)?,
            failed: count(column + 1)?,
            join: histogram(column + 2)?,
            first_speech: histogram(column + 3)?,
            reply: histogram(column + 4)?,
        })
    }

    fn span(&self, from: DateTime<Utc>) -> SpanStatistics {
        SpanStatistics {
            from,
            ok: self.ok,
            failed: self.failed,
            join_delay: self.join.percentiles(),
            first_speech_delay: self.first_speech.percentiles(),
            reply_delay: self.reply.percentiles(),
        }
    }
}

const TALLY_COLUMNS: &str = "ok, failed, join_delays, first_speech_delays, reply_delays";

/// Adds the rooms of a target to the sums of their hours and days.
pub(super) fn add(
    transaction: &Transaction<'_>,
    target: &str,
    samples: impl Iterator<Item = RoomSample>,
) -> rusqlite::Result<()> {
    let mut tallies: BTreeMap<(i64, i64), Tally> = BTreeMap::new();
    for sample in samples {
        let at = millis(sample.started_at);
        for (width, _) in WIDTHS {
            let start = at - at.rem_euclid(width);
            tallies.entry((width, start)).or_default().add(&sample);
        }
    }
    let mut read = transaction.prepare(&format!(
        "SELECT {TALLY_COLUMNS} FROM statistics WHERE width = ?1 AND start = ?2 AND target = ?3"
    ))?;
    let mut write = transaction.prepare(&format!(
        "INSERT OR REPLACE INTO statistics (width, start, target, {TALLY_COLUMNS})
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"
    ))?;
    for ((width, start), mut tally) in tallies {
        let key = params![width, start, target];
        let earlier = read.query_row(key, |row| Tally::read(row, 0)).optional()?;
        tally.merge(&earlier.unwrap_or_default());
        let count = |rooms| i64::try_from(rooms).unwrap_or(i64::MAX);
        let text = |delays: &Histogram| {
            serde_json::to_string(delays).expect("a map of numbers always serializes")
        };
        write.execute(params![
            width,
            start,
            target,
            count(tally.ok),
            count(tally.failed),
            text(&tally.join),
            text(&tally.first_speech),
            text(&tally.reply),
        ])?;
    }
    Ok(())
}

/// Deletes the sums that are not shown any more, and returns their number.
pub(super) fn delete_old(
    transaction: &Transaction<'_>,
    now: DateTime<Utc>,
) -> rusqlite::Result<usize> {
    let sql = "DELETE FROM statistics WHERE width = ?1 AND start < ?2";
    let deleted = WIDTHS.map(|(width, keep)| transaction.execute(sql, [width, millis(now - keep)]));
    deleted.into_iter().sum()
}

/// The rooms of scheduled batches at one moment. The names of the fields are keys of the API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Statistics {
    pub(crate) at: DateTime<Utc>,
    /// By name; those with a room in the last 30 days.
    pub(crate) targets: Vec<TargetStatistics>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TargetStatistics {
    pub(crate) target: String,
    /// The last 60 minutes.
    pub(crate) last_hour: RoomCount,
    /// Spans of one hour, 24 hours, 7 days and 30 days.
    pub(crate) compared: [ComparedSpan; 4],
    /// The current hour and the 23 before it, the oldest first. An hour without rooms is there, too.
    pub(crate) hours: Vec<SpanStatistics>,
    /// Each is one day before the hour with its index in `hours`.
    pub(crate) hours_before: Vec<SpanStatistics>,
    /// The current UTC day and the 29 before it, the oldest first.
    pub(crate) days: Vec<SpanStatistics>,
    /// The failed rooms of the last 24 hours, the most frequent reason first.
    pub(crate) reasons: Vec<ReasonCount>,
}

impl TargetStatistics {
    /// The current hour and the 23 before it, as one span.
    pub(crate) fn last_day(&self) -> &SpanStatistics {
        &self.compared[1].now
    }

    /// The current UTC day and the six before it, as one span.
    pub(crate) fn last_week(&self) -> &SpanStatistics {
        &self.compared[2].now
    }
}

/// A span up to now beside the same hours or days before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct ComparedSpan {
    /// `1h`, `24h`, `7d` or `30d`. The current hour or day, which has not ended, is in it.
    pub(crate) span: &'static str,
    pub(crate) now: SpanStatistics,
    pub(crate) day_before: SpanStatistics,
    pub(crate) week_before: SpanStatistics,
}

/// The sums from a time on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct SpanStatistics {
    pub(crate) from: DateTime<Utc>,
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    pub(crate) join_delay: Percentiles,
    pub(crate) first_speech_delay: Percentiles,
    pub(crate) reply_delay: Percentiles,
}

/// In seconds; `None` without a delay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: Option<f64>,
    pub(crate) p90: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ReasonCount {
    /// A label of [`Reason`].
    pub(crate) reason: String,
    pub(crate) rooms: u64,
}

/// The spans of one width, by target and start.
type Tallies = BTreeMap<String, BTreeMap<DateTime<Utc>, Tally>>;

/// Of all targets, or of one.
pub(super) fn statistics(
    connection: &Connection,
    now: DateTime<Utc>,
    target: Option<&str>,
) -> rusqlite::Result<Statistics> {
    let (hour, day) = (TimeDelta::hours(1), TimeDelta::days(1));
    let current = |width| now.duration_trunc(width).unwrap_or(now);
    let first_hour = current(hour) - hour * (HOURS - 1);
    let week = TimeDelta::weeks(1);
    let first_day = current(day) - day * (DAYS - 1);
    let week_before = first_hour - week;
    let end = current(hour) + hour;
    let tallies = |width, from, to| tallies(connection, width, from, to, target);
    let hours = tallies(HOUR, first_hour - day, end)?;
    let hours_of_week_before = tallies(HOUR, week_before, week_before + day)?;
    let days = tallies(DAY, first_day - week, end)?;
    let last_hour = last_hour(connection, now)?;
    let mut reasons = reasons(connection, first_hour)?;
    let spans = |tallies: &Tallies, target: &str, from, width: TimeDelta, count| {
        let of_target = tallies.get(target);
        let starts = (0..count).map(|index| from + width * index);
        let tally = |start| of_target.and_then(|spans| spans.get(&start)).cloned();
        starts
            .map(|start| (start, tally(start).unwrap_or_default()))
            .collect::<Vec<_>>()
    };
    let sum = |spans: &[(DateTime<Utc>, Tally)]| {
        let mut sum = Tally::default();
        for (_, tally) in spans {
            sum.merge(tally);
        }
        sum.span(spans.first().map_or(now, |(from, _)| *from))
    };
    let compare = |span, spans: [&[(DateTime<Utc>, Tally)]; 3]| {
        let [now, day_before, week_before] = spans.map(sum);
        ComparedSpan {
            span,
            now,
            day_before,
            week_before,
        }
    };
    let each = |spans: &[(DateTime<Utc>, Tally)]| {
        let spans = spans.iter().map(|(start, tally)| tally.span(*start));
        spans.collect::<Vec<_>>()
    };
    let mut of_target = |target: &String| {
        let today = spans(&hours, target, first_hour, hour, HOURS);
        let yesterday = spans(&hours, target, first_hour - day, hour, HOURS);
        let last_week = spans(&hours_of_week_before, target, week_before, hour, HOURS);
        let last_days = spans(&days, target, first_day - week, day, DAYS + DAYS_OF_A_WEEK);
        let window = |count: usize, shift: usize| {
            let end = last_days.len() - shift;
            &last_days[end - count..end]
        };
        let windows = |count| [window(count, 0), window(count, 1), window(count, 7)];
        let last_hours = [&today[..], &yesterday, &last_week];
        TargetStatistics {
            target: target.clone(),
            last_hour: last_hour.get(target).copied().unwrap_or_default(),
            compared: [
                compare("1h", last_hours.map(|hours| &hours[hours.len() - 1..])),
                compare("24h", last_hours),
                compare("7d", windows(7)),
                compare("30d", windows(30)),
            ],
            hours: each(&today),
            hours_before: each(&yesterday),
            days: each(window(30, 0)),
            reasons: reasons.remove(target).unwrap_or_default(),
        }
    };
    Ok(Statistics {
        at: now,
        targets: days
            .iter()
            .filter(|(_, spans)| spans.range(first_day..).next().is_some())
            .map(|(target, _)| of_target(target))
            .collect(),
    })
}

fn tallies(
    connection: &Connection,
    width: i64,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    target: Option<&str>,
) -> rusqlite::Result<Tallies> {
    let mut statement = connection.prepare(&format!(
        "SELECT target, start, {TALLY_COLUMNS} FROM statistics
         WHERE width = ?1 AND start >= ?2 AND start < ?3 AND (?4 IS NULL OR target = ?4)"
    ))?;
    let mut rows = statement.query(params![width, millis(from), millis(to), target])?;
    let mut tallies = Tallies::new();
    while let Some(row) = rows.next()? {
        let spans = tallies.entry(row.get(0)?).or_default();
        spans.insert(time(row.get(1)?), Tally::read(row, 2)?);
    }
    Ok(tallies)
}

fn last_hour(
    connection: &Connection,
    now: DateTime<Utc>,
) -> rusqlite::Result<BTreeMap<String, RoomCount>> {
    let other = Reason::ALL
        .iter()
        .filter(|reason| !reason.origin().is_of_service());
    let other: Vec<_> = other
        .map(|reason| format!("'{}'", reason.label()))
        .collect();
    let mut statement = connection.prepare(&format!(
        "SELECT target, sum(outcome = 'ok'), sum(outcome = 'failed') FROM probes INDEXED BY probes_by_time
         WHERE started_at >= ?1 AND purpose = 'scheduled' AND coalesce(reason, '') NOT IN ({})
         GROUP BY target",
        other.join(", ")
    ))?;
    let from = millis(now - TimeDelta::hours(1));
    let counts = statement.query_map([from], |row| {
        let counts = RoomCount {
            ok: count(row, 1)?,
            failed: count(row, 2)?,
        };
        Ok((row.get(0)?, counts))
    })?;
    counts.collect()
}

fn reasons(
    connection: &Connection,
    from: DateTime<Utc>,
) -> rusqlite::Result<BTreeMap<String, Vec<ReasonCount>>> {
    let mut statement = connection.prepare(
        "SELECT target, reason, count(*) AS rooms FROM probes INDEXED BY probes_not_ok
         WHERE outcome <> 'ok' AND started_at >= ?1 AND purpose = 'scheduled' AND reason IS NOT NULL
         GROUP BY target, reason ORDER BY rooms DESC, reason",
    )?;
    let mut rows = statement.query([millis(from)])?;
    let mut reasons: BTreeMap<String, Vec<ReasonCount>> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let count = ReasonCount {
            reason: row.get(1)?,
            rooms: row.get::<_, i64>(2)?.unsigned_abs(),
        };
        reasons.entry(row.get(0)?).or_default().push(count);
    }
    Ok(reasons)
}
