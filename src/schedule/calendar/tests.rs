use std::collections::{BTreeMap, BTreeSet, HashSet};

use chrono::{Datelike, NaiveDateTime, Timelike};
use chrono_tz::{Africa, America, Australia, Europe, Tz};
use fastrand::Rng;

use super::*;
use crate::config::RawConfig;

/// The schedule that the settings read from this expression, or the error message.
fn read(expression: &str, zone: Tz) -> Result<Schedule, String> {
    let key = |key: &str| format!("LIVEKIT_CANARY__{key}").into();
    let variables = [
        (key("projects__p__url"), "ws://a.example".into()),
        (key("projects__p__api_key"), "k".into()),
        (key("projects__p__api_secret"), "s".into()),
        (key("targets__t__agent_name"), "a".into()),
        (key("targets__t__schedule__cron"), expression.into()),
        (key("targets__t__schedule__time_zone"), zone.name().into()),
    ];
    let config = RawConfig::read(None, variables).unwrap().validate();
    let config = config.map_err(|problems| problems.to_string())?;
    Ok(config.targets["t"].schedule.clone())
}

fn cron(expression: &str, zone: Tz) -> Schedule {
    read(expression, zone).unwrap()
}

fn at(rfc3339: &str) -> DateTime<Utc> {
    rfc3339.parse().unwrap()
}

/// The ticks from `from` on, as RFC 3339 in the zone; seconds of zero are omitted.
fn ticks(schedule: &Schedule, from: &str, count: usize) -> Vec<String> {
    let Schedule::Cron { zone, .. } = schedule else {
        panic!("not a cron expression");
    };
    let mut after = at(from) - TimeDelta::seconds(1);
    let mut ticks = Vec::new();
    for _ in 0..count {
        after = next_tick(schedule, Duration::ZERO, after).unwrap();
        let shown = after.with_timezone(zone).to_rfc3339();
        ticks.push(shown.replace(":00+", "+").replace(":00-", "-"));
    }
    ticks
}

fn every(seconds: u64) -> Schedule {
    Schedule::Every(Duration::from_secs(seconds))
}

#[test]
fn interval_ticks_on_the_same_grid_whatever_the_time_of_the_query() {
    let offset = Duration::from_secs(421);
    let mut after = at("2026-11-24T10:00:00.25Z");
    let first = next_tick(&every(900), offset, after).unwrap();
    assert_eq!(first, at("2026-11-24T10:07:01Z"));
    while after < first {
        assert_eq!(next_tick(&every(900), offset, after), Some(first));
        after += TimeDelta::milliseconds(999);
    }
    let second = next_tick(&every(900), offset, first);
    assert_eq!(second, Some(first + TimeDelta::minutes(15)));
}

#[test]
fn interval_that_does_not_divide_a_day_stays_regular_over_midnight_and_before_the_epoch() {
    let offset = Duration::from_millis(700);
    for begin in ["2026-11-24T23:59:50Z", "1969-12-31T23:59:50Z"] {
        let mut tick = next_tick(
            &Schedule::Every(Duration::from_millis(7300)),
            offset,
            at(begin),
        );
        for _ in 0..5 {
            let next = next_tick(
                &Schedule::Every(Duration::from_millis(7300)),
                offset,
                tick.unwrap(),
            );
            assert_eq!(next.unwrap() - tick.unwrap(), TimeDelta::milliseconds(7300));
            tick = next;
        }
    }
}

#[test]
fn interval_of_zero_has_no_ticks() {
    let now = at("2026-11-24T10:00:00Z");
    assert_eq!(next_tick(&every(0), Duration::ZERO, now), None);
    assert_eq!(ticks_on(&every(0), Duration::ZERO, now.date_naive()), 0);
}

#[test]
fn offsets_are_the_same_in_every_version() {
    let every = Duration::from_mins(15);
    let of = |target| offset(target, &Schedule::Every(every)).as_secs();
    assert_eq!(["support", "sales", "a", "b"].map(of), [232, 855, 196, 829]);
}

#[test]
fn offsets_spread_the_targets_over_their_interval() {
    let every = Duration::from_mins(15);
    let offsets: Vec<Duration> = (0..60)
        .map(|n| offset(&format!("target-{n}"), &Schedule::Every(every)))
        .collect();
    let distinct: BTreeSet<_> = offsets.iter().collect();
    assert!(distinct.len() >= 55, "{distinct:?}");
    for third in 0..3 {
        let part = every / 3 * third..every / 3 * (third + 1);
        let within = offsets
            .iter()
            .filter(|offset| part.contains(*offset))
            .count();
        assert!((10..=30).contains(&within), "{within} of 60 in {part:?}");
    }
}

#[test]
fn offset_of_a_short_interval_is_shorter() {
    let of = |every| offset("support", &Schedule::Every(every));
    assert_eq!(of(Duration::from_secs(1)), Duration::ZERO);
    assert_eq!(of(Duration::from_millis(300)), Duration::ZERO);
    assert!(of(Duration::from_secs(20)) < Duration::from_secs(20));
}

#[test]
fn next_tick_is_strictly_after_the_given_time() {
    let schedule = cron("*/15 * * * *", Tz::UTC);
    let next = |after| next_tick(&schedule, Duration::ZERO, at(after)).unwrap();
    assert_eq!(next("2026-11-24T09:59:59.999Z"), at("2026-11-24T10:00:00Z"));
    assert_eq!(next("2026-11-24T10:00:00Z"), at("2026-11-24T10:15:00Z"));
    assert_eq!(next("2026-11-24T10:00:00.001Z"), at("2026-11-24T10:15:00Z"));
}

#[test]
fn six_fields_start_with_the_second() {
    let schedule = cron("5,50 59 23 31 dec *", Tz::UTC);
    let expected = [
        "2026-12-31T23:59:05+00:00",
        "2026-12-31T23:59:50+00:00",
        "2027-12-31T23:59:05+00:00",
    ];
    assert_eq!(ticks(&schedule, "2026-11-24T10:00:00Z", 3), expected);
}

#[test]
fn leap_day_ticks_every_fourth_year() {
    let schedule = cron("30 12 29 2 *", Europe::Berlin);
    let expected = ["2028-02-29T12:30+01:00", "2032-02-29T12:30+01:00"];
    assert_eq!(ticks(&schedule, "2026-11-24T10:00:00Z", 2), expected);
    // 2100 is not a leap year.
    assert_eq!(
        ticks(&schedule, "2096-03-01T00:00:00Z", 1),
        ["2104-02-29T12:30+01:00"]
    );
    let last = cron("0 0 L 2 *", Tz::UTC);
    let expected = ["2027-02-28T00:00+00:00", "2028-02-29T00:00+00:00"];
    assert_eq!(ticks(&last, "2026-11-24T10:00:00Z", 2), expected);
}

#[test]
fn either_day_field_is_enough_if_both_are_restricted() {
    // The 13th is a Sunday, the Fridays are 4, 11, 18 and 25.
    let schedule = cron("0 9 13 12 fri", Tz::UTC);
    let expected = [4, 11, 13, 18, 25].map(|day| format!("2026-12-{day:02}T09:00+00:00"));
    assert_eq!(ticks(&schedule, "2026-12-01T00:00:00Z", 5), expected);
}

/// crontab(5): a field that contains a `*` is not restricted.
#[test]
fn both_day_fields_must_match_if_one_contains_a_star() {
    let odd_mondays = cron("0 9 */2 12 mon", Tz::UTC);
    let expected = [
        "2026-12-07T09:00+00:00",
        "2026-12-21T09:00+00:00",
        "2027-12-13T09:00+00:00",
    ];
    assert_eq!(ticks(&odd_mondays, "2026-12-01T00:00:00Z", 3), expected);
    let first_if_even_weekday = cron("0 9 1 * */2", Tz::UTC);
    let expected = ["2026-12-01T09:00+00:00", "2027-04-01T09:00+00:00"];
    assert_eq!(
        ticks(&first_if_even_weekday, "2026-11-30T00:00:00Z", 2),
        expected
    );
}

/// The zones change their clocks in different ways: by an hour at 01:00 UTC, by an hour at 02:00 local time, and by half
/// an hour.
#[test]
fn fixed_time_that_a_clock_change_skips_ticks_at_the_change() {
    for (zone, expression, from, expected) in [
        (
            Europe::Berlin,
            "30 2 * * *",
            "2026-03-28T00:00:00Z",
            [
                "2026-03-28T02:30+01:00",
                "2026-03-29T03:00+02:00",
                "2026-03-30T02:30+02:00",
            ],
        ),
        (
            America::New_York,
            "30 2 * * *",
            "2026-03-07T05:00:00Z",
            [
                "2026-03-07T02:30-05:00",
                "2026-03-08T03:00-04:00",
                "2026-03-09T02:30-04:00",
            ],
        ),
        (
            Australia::Lord_Howe,
            "15 2 * * *",
            "2026-10-02T15:00:00Z",
            [
                "2026-10-03T02:15+10:30",
                "2026-10-04T02:30+11:00",
                "2026-10-05T02:15+11:00",
            ],
        ),
        // Several skipped times become one tick, which merges with a tick that is due then anyway.
        (
            Europe::Berlin,
            "0,30 2-3 * * *",
            "2026-03-29T00:00:00Z",
            [
                "2026-03-29T03:00+02:00",
                "2026-03-29T03:30+02:00",
                "2026-03-30T02:00+02:00",
            ],
        ),
        // A day that starts at one o'clock still matches.
        (
            America::Santiago,
            "30 0 6 9 *",
            "2026-09-05T00:00:00Z",
            [
                "2026-09-06T01:00-03:00",
                "2027-09-06T00:30-03:00",
                "2028-09-06T00:30-03:00",
            ],
        ),
        // The made-up tick has the seconds of the expression.
        (
            Europe::Berlin,
            "15,45 30 2 * * *",
            "2026-03-29T00:00:00Z",
            [
                "2026-03-29T03:00:15+02:00",
                "2026-03-29T03:00:45+02:00",
                "2026-03-30T02:30:15+02:00",
            ],
        ),
    ] {
        let schedule = cron(expression, zone);
        assert_eq!(
            ticks(&schedule, from, 3),
            expected,
            "{expression} in {zone}"
        );
    }
}

#[test]
fn fixed_time_that_the_clock_shows_twice_ticks_only_the_first_time() {
    for (zone, expression, from, expected) in [
        (
            Europe::Berlin,
            "30 2 * * *",
            "2026-10-24T12:00:00Z",
            ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"],
        ),
        (
            America::New_York,
            "30 1 * * *",
            "2026-10-31T12:00:00Z",
            ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"],
        ),
        (
            Australia::Lord_Howe,
            "45 1 * * *",
            "2026-04-04T12:00:00Z",
            ["2026-04-05T01:45+11:00", "2026-04-06T01:45+10:30"],
        ),
        // The query starts in the repeated hour.
        (
            Europe::Berlin,
            "0,30 2-3 * * *",
            "2026-10-25T01:10:00Z",
            ["2026-10-25T03:00+01:00", "2026-10-25T03:30+01:00"],
        ),
    ] {
        let schedule = cron(expression, zone);
        assert_eq!(
            ticks(&schedule, from, 2),
            expected,
            "{expression} in {zone}"
        );
    }
}

#[test]
fn expression_with_a_star_follows_the_clock_without_a_pause() {
    for (zone, expression, from, expected) in [
        (
            Europe::Berlin,
            "*/30 * * * *",
            "2026-03-29T00:30:00Z",
            ["01:30+01:00", "03:00+02:00", "03:30+02:00", "04:00+02:00"],
        ),
        (
            Europe::Berlin,
            "*/30 * * * *",
            "2026-10-25T00:00:00Z",
            ["02:00+02:00", "02:30+02:00", "02:00+01:00", "02:30+01:00"],
        ),
        (
            America::New_York,
            "0 * * * *",
            "2026-11-01T05:00:00Z",
            ["01:00-04:00", "01:00-05:00", "02:00-05:00", "03:00-05:00"],
        ),
        (
            Australia::Lord_Howe,
            "*/20 * * * *",
            "2026-04-04T14:30:00Z",
            ["01:40+11:00", "01:40+10:30", "02:00+10:30", "02:20+10:30"],
        ),
        (
            Australia::Lord_Howe,
            "*/20 * * * *",
            "2026-10-03T15:05:00Z",
            ["01:40+10:30", "02:40+11:00", "03:00+11:00", "03:20+11:00"],
        ),
    ] {
        let ticks = ticks(&cron(expression, zone), from, 4);
        let times: Vec<&str> = ticks
            .iter()
            .map(|tick| tick.split_once('T').unwrap().1)
            .collect();
        assert_eq!(times, expected, "{expression} in {zone} from {from}");
    }
    let hour_that_is_skipped = cron("*/30 2 * * *", Europe::Berlin);
    assert_eq!(
        ticks(&hour_that_is_skipped, "2026-03-29T00:00:00Z", 1),
        ["2026-03-30T02:00+02:00"]
    );
}

/// A random field with no number above `highest`, and the numbers that it matches as bits.
fn field(random: &mut Rng, least: u32, most: u32, highest: u32) -> (String, u64) {
    let number = random.u32(least..=highest);
    let to = random.u32(number..=highest);
    let step = random.u32(2..=7);
    let bits = |from: u32, to: u32, step: u32| {
        let numbers = (from..=to).step_by(step as usize);
        numbers.fold(0, |bits, number| bits | 1 << number)
    };
    match random.u32(0..8) {
        0..=2 => ("*".to_owned(), bits(least, most, 1)),
        3 => (format!("*/{step}"), bits(least, most, step)),
        4 => (format!("{number}-{to}"), bits(number, to, 1)),
        5 => (format!("{number}-{to}/{step}"), bits(number, to, step)),
        6 => (format!("{to},{number}"), 1 << to | 1 << number),
        _ => (number.to_string(), 1 << number),
    }
}

/// Evaluates an expression minute by minute, by the rules of crontab(5).
struct Oracle {
    text: String,
    fields: [u64; 5],
    either_day: bool,
    fixed_times: bool,
}

impl Oracle {
    fn random(random: &mut Rng) -> Self {
        // Half of the expressions use the hours in which clocks change.
        let highest_hour = if random.bool() { 3 } else { 23 };
        let ranges = [
            (0, 59, 59),
            (0, 23, highest_hour),
            (1, 31, 31),
            (1, 12, 12),
            (0, 6, 6),
        ];
        let fields = ranges.map(|(least, most, highest)| field(random, least, most, highest));
        let star = |index: usize| fields[index].0.contains('*');
        Self {
            text: fields.each_ref().map(|(text, _)| text.as_str()).join(" "),
            either_day: !star(2) && !star(4),
            fixed_times: !star(0) && !star(1),
            fields: fields.each_ref().map(|(_, bits)| *bits),
        }
    }

    fn matches(&self, shown: [u32; 5]) -> bool {
        let [minute, hour, day, month, weekday] =
            std::array::from_fn(|index| self.fields[index] >> shown[index] & 1 == 1);
        minute
            && hour
            && month
            && if self.either_day {
                day || weekday
            } else {
                day && weekday
            }
    }

    /// Every minute with a tick among these consecutive minutes.
    fn ticks(&self, minutes: &[Minute]) -> Vec<DateTime<Utc>> {
        let mut seen = HashSet::new();
        let mut before = minutes[0].wall;
        let mut ticks = Vec::new();
        for minute in minutes {
            let mut due = self.matches(minute.shown);
            if self.fixed_times {
                due = due && seen.insert(minute.wall);
                let mut skipped = before + TimeDelta::minutes(1);
                while skipped < minute.wall {
                    due |= self.matches(shown(skipped));
                    skipped += TimeDelta::minutes(1);
                }
            }
            before = minute.wall;
            if due {
                ticks.push(minute.instant);
            }
        }
        ticks
    }
}

struct Minute {
    instant: DateTime<Utc>,
    wall: NaiveDateTime,
    shown: [u32; 5],
}

/// The values of a wall-clock time in the order of the fields.
fn shown(wall: NaiveDateTime) -> [u32; 5] {
    let weekday = wall.weekday().num_days_from_sunday();
    [
        wall.minute(),
        wall.hour(),
        wall.day(),
        wall.month(),
        weekday,
    ]
}

fn minutes_of_2026(zone: Tz) -> Vec<Minute> {
    let begin = at("2026-01-01T00:00:00Z");
    let instants = (0..365 * 24 * 60).map(|minute| begin + TimeDelta::minutes(minute));
    instants
        .map(|instant| {
            let wall = instant.with_timezone(&zone).naive_local();
            Minute {
                instant,
                wall,
                shown: shown(wall),
            }
        })
        .collect()
}

/// Some of these clocks change by half an hour, at midnight, or for a month of the Islamic calendar.
const ZONES: [Tz; 6] = [
    Europe::Berlin,
    America::New_York,
    America::Santiago,
    Australia::Lord_Howe,
    Africa::Cairo,
    Africa::Casablanca,
];

/// Expressions with more ticks would only make the test slow.
const MAX_TICKS: usize = 10_000;

#[test]
fn every_match_of_a_year_is_a_tick_and_nothing_else_is() {
    let mut random = Rng::with_seed(20_261_124);
    for zone in ZONES {
        let minutes = minutes_of_2026(zone);
        let [begin, last] = [0, minutes.len() - 1].map(|index| minutes[index].instant);
        for _ in 0..8 {
            let oracle = Oracle::random(&mut random);
            let what = format!("{} in {zone}", oracle.text);
            let expected = oracle.ticks(&minutes);
            if expected.len() > MAX_TICKS {
                continue;
            }
            let schedule = match read(&oracle.text, zone) {
                Ok(schedule) => schedule,
                Err(problem) => {
                    assert!(
                        problem.contains("it matches no day of any year"),
                        "{what}: {problem}"
                    );
                    assert!(expected.is_empty(), "{what}");
                    continue;
                }
            };
            let next = |after: &DateTime<Utc>| {
                let next = next_tick(&schedule, Duration::ZERO, *after)?;
                assert!(next > *after, "{what}: {next} after {after}");
                (next <= last).then_some(next)
            };
            let first = next(&(begin - TimeDelta::nanoseconds(1)));
            let ticks: Vec<_> = std::iter::successors(first, next).collect();
            let wrong = std::iter::zip(&ticks, &expected).find(|(tick, expected)| tick != expected);
            assert_eq!(wrong, None, "{what}");
            assert_eq!(ticks.len(), expected.len(), "{what}");
            counts_and_gaps_agree(&schedule, &expected, &what);
        }
    }
}

fn counts_and_gaps_agree(schedule: &Schedule, ticks: &[DateTime<Utc>], what: &str) {
    let mut of_day = BTreeMap::<NaiveDate, u64>::new();
    for tick in ticks {
        *of_day.entry(tick.date_naive()).or_default() += 1;
    }
    for day in at("2026-01-01T00:00:00Z")
        .date_naive()
        .iter_days()
        .take(365)
    {
        let expected = of_day.get(&day).copied().unwrap_or(0);
        assert_eq!(
            ticks_on(schedule, Duration::ZERO, day),
            expected,
            "{what} on {day}"
        );
    }
    let week = TimeDelta::days(7);
    for (index, from) in ticks.iter().enumerate().step_by(ticks.len() / 20 + 1) {
        let until = *from + week;
        let pairs = ticks[index..].windows(2).take_while(|pair| pair[0] < until);
        let distances = pairs.map(|pair| (pair[1] - pair[0]).to_std().unwrap());
        let distances: Vec<Duration> = distances.collect();
        // If the year ends first, the last gap is unknown.
        if ticks[ticks.len() - 1] < until {
            continue;
        }
        let gaps = gaps(schedule, *from, week.to_std().unwrap()).unwrap();
        assert_eq!(
            Some(&gaps.longest),
            distances.iter().max(),
            "{what} from {from}"
        );
        // The wait for the first tick doesn't count as a shortest gap.
        let shortest = distances[1..].iter().min().unwrap_or(&gaps.shortest);
        assert_eq!(gaps.shortest, *shortest, "{what} from {from}");
    }
}

#[test]
fn mean_interval_includes_nights_and_weekends() {
    let monday = at("2026-01-05T00:00:00Z").date_naive();
    let office = cron("*/15 8-17 * * mon-fri", Tz::UTC);
    assert_eq!(
        mean_interval(&office, monday),
        Some(Duration::from_hours(7 * 24) / 200)
    );
    let every = Schedule::Every(Duration::from_secs(7));
    assert_eq!(mean_interval(&every, monday), Some(Duration::from_secs(7)));
    let yearly = cron("0 0 1 6 *", Tz::UTC);
    assert_eq!(mean_interval(&yearly, monday), None);
}
