//! The state machine over years of simulated batches, on a virtual clock and with a seed: how often it pages for nothing, and
//! how fast it sees an outage. `just simulate` prints the table, which `docs/operate.md` shows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Write as _;
use std::sync::LazyLock;
use std::time::Duration;

use chrono::{DateTime, Utc};
use fastrand::Rng;

use super::state::{StateMachine, Transition, Verdict};
use crate::config::Confirm;
use crate::report::Fault;

/// Milliseconds since the start of the simulation.
type Millis = i64;

const SECOND: Millis = 1000;
const MINUTE: Millis = 60 * SECOND;
const HOUR: Millis = 60 * MINUTE;
const DAY: Millis = 24 * HOUR;
const YEAR: Millis = 365 * DAY;

const MAX_ROOMS: usize = 3;
const STOP_AFTER_NO_SHOWS: usize = 2;
const JOIN: Millis = 500;
const HOLD: Millis = 15 * SECOND;

#[derive(Debug, Clone, Copy)]
struct Schedule {
    title: &'static str,
    rooms: usize,
    every: Millis,
}

const SCHEDULES: [Schedule; 3] = [
    Schedule {
        title: "1 room every 5 min",
        rooms: 1,
        every: 5 * MINUTE,
    },
    Schedule {
        title: "3 rooms every 15 min",
        rooms: 3,
        every: 15 * MINUTE,
    },
    Schedule {
        title: "1 room every 3 h",
        rooms: 1,
        every: 3 * HOUR,
    },
];

/// How a room fails, and so when that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Failing {
    /// The agent joins and does not speak.
    Silent,
    /// No agent joins.
    NoShow,
    /// LiveKit refuses the room at once.
    Refused,
}

impl Failing {
    fn known_after(self) -> Millis {
        match self {
            Self::Silent => 21 * SECOND,
            Self::NoShow => 30 * SECOND,
            Self::Refused => 200,
        }
    }

    /// When the next room of a ramp may open.
    fn decided_after(self) -> Millis {
        match self {
            Self::Silent => JOIN,
            Self::NoShow | Self::Refused => self.known_after(),
        }
    }

    fn verdict(self) -> Verdict {
        Verdict::Bad(match self {
            Self::Silent | Self::NoShow => Fault::Agent,
            Self::Refused => Fault::Service,
        })
    }
}

/// A time in which rooms fail.
#[derive(Debug, Clone, Copy)]
struct Episode {
    from: Millis,
    to: Millis,
    /// Of the rooms that open in it.
    share: f64,
    failing: Failing,
    /// Whether calls end at its start.
    breaks_calls: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Scheduled,
    /// Its number, so that the rooms of an aborted one are ignored.
    Confirmation(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    RoomEnds {
        kind: Kind,
        opened: Millis,
        failing: Option<Failing>,
    },
    BatchEnds(Kind),
    Tick,
}

/// What a run counted.
#[derive(Debug, Default, Clone)]
struct Counts {
    /// Incidents that page: one that continues another does not.
    pages: Vec<Millis>,
    continued: usize,
    recovered: Vec<Millis>,
    confirmation_minutes: u32,
}

struct World {
    schedule: Schedule,
    confirm: Confirm,
    /// The share of rooms that fail on their own.
    base_rate: f64,
    /// In the order of time.
    episodes: Vec<Episode>,
    rng: Rng,
    now: Millis,
    machine: StateMachine,
    happenings: BinaryHeap<Reverse<(Millis, Happening)>>,
    scheduled_rooms: usize,
    scheduled_batch: bool,
    confirmation_rooms: usize,
    confirmation: Option<u64>,
    confirmations: u64,
    counts: Counts,
}

fn date(at: Millis) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(1_800_000_000_000 + at).expect("a time that chrono knows")
}

impl World {
    fn new(schedule: Schedule, base_rate: f64, seed: u64) -> Self {
        Self {
            schedule,
            confirm: Confirm::default(),
            base_rate,
            episodes: Vec::new(),
            rng: Rng::with_seed(seed),
            now: 0,
            machine: StateMachine::new(date(0)),
            happenings: BinaryHeap::from([Reverse((0, Happening::Tick))]),
            scheduled_rooms: 0,
            scheduled_batch: false,
            confirmation_rooms: 0,
            confirmation: None,
            confirmations: 0,
            counts: Counts::default(),
        }
    }

    /// Runs until `end`, or until `done` after a change.
    fn run(&mut self, end: Millis, done: impl Fn(&Counts) -> bool) {
        while !done(&self.counts) {
            let next = self.happenings.peek().map_or(end, |Reverse((at, _))| *at);
            if let Some((at, rooms)) = self.due_confirmation()
                && at <= next.min(end)
            {
                self.now = at;
                self.open_confirmation(rooms);
                continue;
            }
            if next > end {
                self.now = end;
                return;
            }
            let Some(Reverse((at, happening))) = self.happenings.pop() else {
                return;
            };
            self.now = at;
            self.handle(happening);
        }
    }

    /// The confirmation that waits for its time alone.
    fn due_confirmation(&self) -> Option<(Millis, usize)> {
        if self.confirmation.is_some() {
            return None;
        }
        let due = self.machine.next_confirmation(&self.confirm)?;
        let fits = self.scheduled_rooms + due.rooms <= MAX_ROOMS;
        let at = (due.at - date(0)).num_milliseconds().max(self.now);
        fits.then_some((at, due.rooms))
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::Tick => self.tick(),
            Happening::BatchEnds(Kind::Scheduled) => self.scheduled_batch = false,
            Happening::BatchEnds(Kind::Confirmation(number)) => {
                if self.confirmation == Some(number) {
                    self.end_confirmation();
                }
            }
            Happening::RoomEnds {
                kind,
                opened,
                failing,
            } => {
                match kind {
                    Kind::Scheduled => self.scheduled_rooms -= 1,
                    Kind::Confirmation(number) if self.confirmation == Some(number) => {
                        self.confirmation_rooms -= 1;
                        let agent_came = matches!(failing, None | Some(Failing::Silent));
                        self.counts.confirmation_minutes += u32::from(agent_came);
                    }
                    Kind::Confirmation(_) => return,
                }
                let verdict = failing.map_or(Verdict::Good, Failing::verdict);
                match self.machine.room(date(opened), date(self.now), verdict) {
                    Some(Transition::Failed {
                        continues: true, ..
                    }) => self.counts.continued += 1,
                    Some(Transition::Failed { .. }) => self.counts.pages.push(self.now),
                    Some(Transition::Recovered) => self.counts.recovered.push(self.now),
                    _ => {}
                }
            }
        }
    }

    fn tick(&mut self) {
        self.happenings
            .push(Reverse((self.now + self.schedule.every, Happening::Tick)));
        let silence = Duration::from_millis((self.schedule.every * 5 / 2).unsigned_abs());
        self.machine.elapse(date(self.now), silence);
        if self.scheduled_batch {
            return;
        }
        if self.confirmation_rooms + self.schedule.rooms > MAX_ROOMS {
            // The confirmation gives way. Its agents cost a minute.
            self.counts.confirmation_minutes +=
                u32::try_from(self.confirmation_rooms).expect("few rooms");
            self.confirmation_rooms = 0;
            self.end_confirmation();
        }
        self.scheduled_batch = true;
        let mut opened = Vec::new();
        let mut at = self.now;
        let mut no_shows = 0;
        while opened.len() < self.schedule.rooms && no_shows < STOP_AFTER_NO_SHOWS {
            let failing = self.fate(at);
            opened.push((at, failing));
            at += failing.map_or(JOIN, Failing::decided_after);
            no_shows = if failing == Some(Failing::NoShow) {
                no_shows + 1
            } else {
                0
            };
        }
        self.scheduled_rooms = opened.len();
        self.open(Kind::Scheduled, &opened, at);
    }

    fn open_confirmation(&mut self, rooms: usize) {
        self.confirmations += 1;
        self.confirmation = Some(self.confirmations);
        self.confirmation_rooms = rooms;
        let opened: Vec<_> = (0..rooms)
            .map(|_| (self.now, self.fate(self.now)))
            .collect();
        let kind = Kind::Confirmation(self.confirmations);
        self.open(kind, &opened, self.now + JOIN);
    }

    fn end_confirmation(&mut self) {
        self.confirmation = None;
        self.machine.confirmation_attempted(date(self.now));
    }

    /// Rooms that stay together: the good ones end at one time.
    fn open(&mut self, kind: Kind, rooms: &[(Millis, Option<Failing>)], ramp_end: Millis) {
        let mut batch_end = self.now;
        for &(opened, mut failing) in rooms {
            let mut end = failing.map_or(ramp_end + HOLD, |failing| opened + failing.known_after());
            if let Some(broken) = self.broken_between(opened, end) {
                end = broken + SECOND;
                failing = Some(Failing::Silent);
            }
            batch_end = batch_end.max(end);
            let ends = Happening::RoomEnds {
                kind,
                opened,
                failing,
            };
            self.happenings.push(Reverse((end, ends)));
        }
        self.happenings
            .push(Reverse((batch_end, Happening::BatchEnds(kind))));
    }

    /// How a room fails that opens at this time; `None` if it is good.
    fn fate(&mut self, opened: Millis) -> Option<Failing> {
        let of_its_own = self.rng.f64() < self.base_rate;
        let own = if self.rng.bool() {
            Failing::Silent
        } else {
            Failing::NoShow
        };
        let first = self.episodes.partition_point(|one| one.to <= opened);
        let episode = self
            .episodes
            .get(first)
            .filter(|one| one.from <= opened)
            .copied();
        match episode {
            Some(episode) if self.rng.f64() < episode.share => Some(episode.failing),
            _ => of_its_own.then_some(own),
        }
    }

    /// When a fault ends a call that was open between these times.
    fn broken_between(&self, opened: Millis, end: Millis) -> Option<Millis> {
        let first = self.episodes.partition_point(|one| one.from <= opened);
        let episode = self.episodes.get(first)?;
        (episode.breaks_calls && episode.from < end).then_some(episode.from)
    }
}

fn never(_: &Counts) -> bool {
    false
}

/// What one schedule costs and shows.
struct Column {
    schedule: Schedule,
    /// Pages of each simulated year, by the share of rooms that fail on their own.
    false_pages: [(u32, Vec<usize>); 2],
    /// Agent minutes of confirmations per day while 1 % of the rooms fail.
    confirmation_minutes: f64,
    /// Pages of weekly blips, per year.
    blip_pages: Vec<usize>,
    outages: [(u32, Outages); 3],
}

const YEARS: u64 = 4;
const OUTAGES: u64 = 100;

impl Column {
    fn of(schedule: Schedule) -> Self {
        let mut confirmation_minutes = 0;
        let mut year = |percent, seed| {
            let mut world = World::new(schedule, f64::from(percent) / 100.0, seed);
            world.run(YEAR, never);
            if percent == 1 {
                confirmation_minutes += world.counts.confirmation_minutes;
            }
            world.counts.pages.len()
        };
        let mut years = |percent| {
            (
                percent,
                (0..YEARS).map(|seed| year(percent, seed)).collect(),
            )
        };
        Self {
            schedule,
            false_pages: [years(1), years(5)],
            confirmation_minutes: f64::from(confirmation_minutes) / 365.0 / as_f64(YEARS),
            blip_pages: (0..YEARS).map(|seed| blips(schedule, seed)).collect(),
            outages: [100, 50, 20].map(|percent| (percent, Outages::of(schedule, percent))),
        }
    }

    fn agent_minutes_per_day(&self) -> f64 {
        // A room of 15 s costs a minute.
        as_f64(self.schedule.rooms) * as_f64(DAY / self.schedule.every)
    }
}

fn as_f64(number: impl TryInto<u32>) -> f64 {
    number.try_into().map_or(f64::NAN, f64::from)
}

/// Pages of a year with a blip of 30 s per week, that also ends calls.
fn blips(schedule: Schedule, seed: u64) -> usize {
    let mut world = World::new(schedule, 0.01, seed);
    let blip = |week: i64| {
        let from = week * 7 * DAY + world.rng.i64(DAY..6 * DAY);
        let kinds = [Failing::Silent, Failing::NoShow, Failing::Refused];
        Episode {
            from,
            to: from + 30 * SECOND,
            share: 1.0,
            failing: kinds[world.rng.usize(..kinds.len())],
            breaks_calls: true,
        }
    };
    world.episodes = (0..52).map(blip).collect();
    world.run(YEAR, never);
    world.counts.pages.len()
}

/// Outages that last for about an hour after the page.
#[derive(Debug, Default)]
struct Outages {
    runs: usize,
    /// From the start of the outage to the page, if it was seen within a day.
    to_page: Vec<Millis>,
    /// From the start of the first scheduled batch in it.
    from_batch: Vec<Millis>,
    /// From the repair, if the incident was still open.
    to_recovery: Vec<Millis>,
    recoveries_during: usize,
    further_pages: usize,
    confirmation_minutes: u32,
}

impl Outages {
    /// Of half of them, agents stay silent; in the other half, none joins.
    fn of(schedule: Schedule, percent: u32) -> Self {
        let mut outages = Self::default();
        for seed in 0..OUTAGES {
            let failing = if seed % 2 == 0 {
                Failing::Silent
            } else {
                Failing::NoShow
            };
            outages.add(schedule, f64::from(percent) / 100.0, failing, seed);
        }
        outages
    }

    fn add(&mut self, schedule: Schedule, share: f64, failing: Failing, seed: u64) {
        self.runs += 1;
        let mut world = World::new(schedule, 0.01, seed);
        let start = schedule.every + world.rng.i64(0..schedule.every);
        world.run(start, never);
        world.counts = Counts::default();
        world.episodes.push(Episode {
            from: start + 1,
            to: Millis::MAX,
            share,
            failing,
            breaks_calls: false,
        });
        world.run(start + DAY, |counts| !counts.pages.is_empty());
        let Some(page) = world.counts.pages.first().copied() else {
            return;
        };
        self.to_page.push(page - start);
        self.from_batch
            .push(page - (start / schedule.every + 1) * schedule.every);
        world.counts = Counts::default();
        let repair = page + HOUR + world.rng.i64(0..5 * MINUTE);
        world.run(repair, never);
        self.recoveries_during += world.counts.recovered.len();
        self.further_pages += world.counts.pages.len();
        self.confirmation_minutes += world.counts.confirmation_minutes;
        if world.machine.fault().is_some() {
            world.episodes[0].to = repair;
            world.counts = Counts::default();
            world.run(repair + DAY, |counts| !counts.recovered.is_empty());
            let recovered = world.counts.recovered.first();
            self.to_recovery.extend(recovered.map(|at| at - repair));
        }
    }

    /// Per outage that was seen, so per hour.
    fn per_hour(&self, number: impl TryInto<u32>) -> f64 {
        as_f64(number) / as_f64(self.to_page.len())
    }
}

/// Minutes: the median and, in brackets, the 90th percentile; `-` without values.
fn minutes(values: &[Millis]) -> String {
    let mut values = values.to_vec();
    values.sort_unstable();
    let quantile = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100).max(1) - 1;
        let seconds = as_f64(values.get(rank)? / SECOND);
        let minutes = seconds / 60.0;
        Some(if minutes < 100.0 {
            format!("{minutes:.1}")
        } else {
            format!("{minutes:.0}")
        })
    };
    match (quantile(50), quantile(90)) {
        (Some(median), Some(most)) => format!("{median} ({most})"),
        _ => "-".to_owned(),
    }
}

fn mean(years: &[usize]) -> f64 {
    as_f64(years.iter().sum::<usize>()) / as_f64(years.len())
}

/// The table of `docs/operate.md`: a row per figure, a column per schedule.
fn table(columns: &[Column]) -> String {
    let mut table = String::new();
    let mut row = |title: &str, cell: &dyn Fn(&Column) -> String| {
        let cells: Vec<_> = columns.iter().map(cell).collect();
        let _ = writeln!(table, "| {title} | {} |", cells.join(" | "));
    };
    row("simulated", &|column| column.schedule.title.to_owned());
    row("---", &|_| "---:".to_owned());
    row("agent minutes per day, scheduled", &|column| {
        format!("{:.0}", column.agent_minutes_per_day())
    });
    row(
        "agent minutes per day, confirmations, 1 % of rooms fail",
        &|column| format!("{:.1}", column.confirmation_minutes),
    );
    for place in 0..2 {
        let percent = columns[0].false_pages[place].0;
        row(
            &format!("false pages per year, {percent} % of rooms fail"),
            &|column| format!("{:.1}", mean(&column.false_pages[place].1)),
        );
    }
    row("pages per year for a blip of 30 s per week", &|column| {
        format!("{:.1}", mean(&column.blip_pages))
    });
    for place in 0..3 {
        let rooms = match columns[0].outages[place].0 {
            100 => "all rooms fail".to_owned(),
            percent => format!("{percent} % of rooms fail"),
        };
        let mut figure = |title: &str, cell: &dyn Fn(&Outages) -> String| {
            row(&format!("{rooms}: {title}"), &|column| {
                cell(&column.outages[place].1)
            });
        };
        figure("minutes to the page", &|outages| minutes(&outages.to_page));
        if place == 0 {
            figure(
                "minutes from the start of the first failed batch",
                &|outages| minutes(&outages.from_batch),
            );
        }
        figure("outages seen within a day", &|outages| {
            let share = as_f64(outages.to_page.len()) / as_f64(outages.runs);
            format!("{:.0} %", 100.0 * share)
        });
        figure("false recoveries per hour", &|outages| {
            format!("{:.1}", outages.per_hour(outages.recoveries_during))
        });
        figure("further pages per hour", &|outages| {
            format!("{:.1}", outages.per_hour(outages.further_pages))
        });
        figure("minutes from the repair to `healthy`", &|outages| {
            minutes(&outages.to_recovery)
        });
        figure("agent minutes per hour, confirmations", &|outages| {
            format!("{:.0}", outages.per_hour(outages.confirmation_minutes))
        });
    }
    table
}

static COLUMNS: LazyLock<[Column; 3]> = LazyLock::new(|| SCHEDULES.map(Column::of));

#[test]
fn table_of_the_docs_is_the_one_of_the_simulation() {
    let table = table(&COLUMNS[..]);
    println!("{table}");
    let docs = include_str!("../../docs/operate.md");
    let (_, section) = docs.split_once("<!-- simulation -->\n").unwrap();
    let (documented, _) = section.split_once("<!-- end of simulation -->").unwrap();
    assert_eq!(
        documented.trim(),
        table.trim(),
        "`just simulate` prints the table"
    );
}

#[test]
fn false_pages_are_half_of_what_is_allowed_at_most() {
    for column in COLUMNS.iter() {
        let title = column.schedule.title;
        for (percent, years) in &column.false_pages {
            let (allowed, most) = if *percent == 1 { (1.0, 1) } else { (15.0, 15) };
            assert!(
                mean(years) <= allowed / 2.0,
                "{title}, {percent} %: {years:?}"
            );
            assert!(
                years.iter().all(|pages| *pages < most),
                "{title}, {percent} %: {years:?}"
            );
        }
    }
}

#[test]
fn blips_of_30_seconds_page_never() {
    for column in COLUMNS.iter() {
        assert_eq!(
            column.blip_pages.iter().sum::<usize>(),
            0,
            "{}",
            column.schedule.title
        );
    }
}

#[test]
fn outage_of_all_rooms_pages_once_and_its_repair_is_seen() {
    for column in COLUMNS.iter() {
        let (_, outages) = &column.outages[0];
        let title = column.schedule.title;
        assert_eq!(outages.to_page.len(), outages.runs, "{title}");
        assert_eq!(
            (outages.recoveries_during, outages.further_pages),
            (0, 0),
            "{title}"
        );
        assert_eq!(outages.to_recovery.len(), outages.runs, "{title}");
    }
}

/// Seconds from the start of the first failed batch to the page, without failures of other causes.
fn to_page(schedule: Schedule, failing: Failing) -> Millis {
    let mut world = World::new(schedule, 0.0, 1);
    world.episodes.push(Episode {
        from: schedule.every - 1,
        to: Millis::MAX,
        share: 1.0,
        failing,
        breaks_calls: false,
    });
    world.run(schedule.every + DAY, |counts| !counts.pages.is_empty());
    (world.counts.pages[0] - schedule.every) / SECOND
}

#[test]
fn three_rooms_page_within_90_seconds_and_one_room_within_150() {
    let [one, three, _] = SCHEDULES;
    for (failing, of_three, of_one) in [
        (Failing::Silent, 72, 123),
        (Failing::NoShow, 90, 150),
        (Failing::Refused, 30, 60),
    ] {
        assert_eq!(to_page(three, failing), of_three, "{failing:?}");
        assert_eq!(to_page(one, failing), of_one, "{failing:?}");
    }
}

/// Fails a share of the rooms from the repair of a first outage on.
#[test]
fn failures_of_a_tenth_of_the_rooms_after_a_repair_do_not_page_again() {
    let mut further = 0;
    for seed in 0..20 {
        let mut world = World::new(SCHEDULES[1], 0.1, seed);
        world.episodes.push(Episode {
            from: 2 * HOUR,
            to: 3 * HOUR,
            share: 1.0,
            failing: Failing::Silent,
            breaks_calls: false,
        });
        world.run(2 * HOUR, never);
        let before = world.counts.pages.len();
        world.run(3 * HOUR, never);
        assert_eq!(world.counts.pages.len() - before, 1, "seed {seed}");
        world.run(9 * HOUR, never);
        further += world.counts.pages.len() - before - 1;
        assert!(!world.counts.recovered.is_empty(), "seed {seed}");
    }
    // The rule that the burn rate, and not the state, reports such a rate: 20 times six hours.
    assert!(further <= 1, "{further} further pages");
}
