use std::sync::atomic::{AtomicI64, Ordering};

use tokio::sync::mpsc::error::TryRecvError;

use super::*;

const QUARTER: Duration = Duration::from_mins(15);

fn at(rfc3339: &str) -> DateTime<Utc> {
    rfc3339.parse().unwrap()
}

/// A table whose receiver handles every tick at once, on a clock that the test sets.
struct Simulation {
    table: TickTable,
    ticks: mpsc::Receiver<Tick>,
    now: DateTime<Utc>,
}

impl Simulation {
    fn at(now: &str) -> Self {
        let (sender, ticks) = mpsc::channel(4);
        Self {
            table: TickTable::new(at(now), sender),
            ticks,
            now: at(now),
        }
    }

    fn set(&mut self, target: &str, schedule: &Schedule) {
        self.table.set(target, schedule, self.now, self.now);
    }

    /// Sets the clock and checks once for due ticks.
    fn jump_to(&mut self, now: &str) -> Vec<Tick> {
        self.now = at(now);
        self.check()
    }

    fn check(&mut self) -> Vec<Tick> {
        self.table.emit_due(self.now);
        let mut taken = Vec::new();
        while let Ok(tick) = self.ticks.try_recv() {
            let entry = self.table.entries.get_mut(&tick.target).unwrap();
            entry.unhandled = None;
            taken.push(tick);
        }
        taken
    }

    /// Lets this time pass, with a check every second. Returns the time of day of each tick.
    fn run(&mut self, time: Duration) -> Vec<String> {
        let mut due = Vec::new();
        for _ in 0..time.as_secs() {
            self.now += TimeDelta::seconds(1);
            due.extend(
                self.check()
                    .iter()
                    .map(|tick| tick.due.format("%H:%M").to_string()),
            );
        }
        due
    }

    fn next(&self, target: &str) -> DateTime<Utc> {
        self.table.entries[target].next.unwrap()
    }
}

/// A schedule that ticks at the quarters of the hour, and a target whose offset is zero.
fn quarters() -> (String, Schedule) {
    let schedule = Schedule::Every(QUARTER);
    let mut names = (0..10_000).map(|number| format!("t{number}"));
    let name = names.find(|name| offset(name, &schedule) == Duration::ZERO);
    (name.unwrap(), schedule)
}

fn nightly() -> Schedule {
    Schedule::Cron {
        expression: "0 3 * * *".parse().map(Box::new).unwrap(),
        zone: chrono_tz::UTC,
    }
}

#[test]
fn tick_is_delivered_once_when_it_is_due() {
    let mut simulation = Simulation::at("2026-11-24T10:00:00Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    assert_eq!(simulation.jump_to("2026-11-24T10:14:59.9Z"), []);
    let expected = Tick {
        target: target.clone(),
        due: at("2026-11-24T10:15:00Z"),
        late: Duration::from_millis(400),
        dropped: 0,
    };
    assert_eq!(simulation.jump_to("2026-11-24T10:15:00.4Z"), [expected]);
    assert_eq!(simulation.jump_to("2026-11-24T10:15:01Z"), []);
    assert_eq!(simulation.next(&target), at("2026-11-24T10:30:00Z"));
}

/// A suspended process sees a forward jump of the clock.
#[test]
fn forward_clock_jump_delivers_one_missed_tick_per_target() {
    let mut simulation = Simulation::at("2026-11-24T10:14:00Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    simulation.set("nightly", &nightly());
    let ticks = simulation.jump_to("2026-11-24T12:14:00Z");
    let [tick] = &ticks[..] else {
        panic!("{ticks:?}");
    };
    assert_eq!(tick.due, at("2026-11-24T10:15:00Z"));
    assert_eq!(tick.late, Duration::from_mins(119));
    assert_eq!(
        tick.dropped, 0,
        "ticks that were never due while the process ran are not dropped"
    );
    assert_eq!(
        simulation.run(Duration::from_mins(32)),
        ["12:15", "12:30", "12:45"]
    );
    let ticks = simulation.jump_to("2026-11-28T12:50:00Z");
    assert_eq!(ticks.len(), 2, "{ticks:?}");
    assert_eq!(simulation.next("nightly"), at("2026-11-29T03:00:00Z"));
}

#[test]
fn target_follows_the_new_time_if_the_clock_is_set_back_by_hours() {
    let mut simulation = Simulation::at("2026-11-24T11:40:00Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    assert_eq!(simulation.run(Duration::from_mins(21)), ["11:45", "12:00"]);
    assert_eq!(simulation.jump_to("2026-11-24T10:01:00Z"), []);
    let ticks = simulation.run(Duration::from_hours(1));
    assert_eq!(ticks, ["10:15", "10:30", "10:45", "11:00"]);
}

#[test]
fn clock_corrected_by_seconds_repeats_no_tick() {
    let mut simulation = Simulation::at("2026-11-24T11:50:00Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    assert_eq!(simulation.run(Duration::from_mins(10)), ["12:00"]);
    simulation.now += TimeDelta::seconds(5);
    assert_eq!(simulation.jump_to("2026-11-24T11:59:55Z"), []);
    assert_eq!(simulation.run(Duration::from_mins(16)), ["12:15"]);
}

#[test]
fn nightly_tick_is_not_repeated_if_the_clock_is_set_back_by_hours() {
    let mut simulation = Simulation::at("2026-11-24T02:59:00Z");
    simulation.set("nightly", &nightly());
    assert_eq!(simulation.run(Duration::from_mins(31)), ["03:00"]);
    assert_eq!(simulation.jump_to("2026-11-24T01:30:00Z"), []);
    assert_eq!(
        simulation.run(Duration::from_hours(2)),
        Vec::<String>::new()
    );
    assert_eq!(simulation.next("nightly"), at("2026-11-25T03:00:00Z"));
}

#[test]
fn clock_that_was_years_ahead_at_the_start_does_not_stop_the_ticks() {
    let mut simulation = Simulation::at("2036-11-24T10:00:00Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    simulation.set("nightly", &nightly());
    simulation.jump_to("2026-11-24T10:01:00Z");
    assert_eq!(simulation.next(&target), at("2026-11-24T10:15:00Z"));
    assert_eq!(simulation.next("nightly"), at("2026-11-25T03:00:00Z"));
}

#[test]
fn started_target_ticks_once_off_the_grid_and_then_on_it() {
    for (first, ticks) in [
        // The tick of 12:15 would be too close to the first one.
        ("2026-11-24T12:09:00Z", &["12:09", "12:30", "12:45"][..]),
        (
            "2026-11-24T12:07:00Z",
            &["12:07", "12:15", "12:30", "12:45"],
        ),
        ("2026-11-24T12:15:00Z", &["12:15", "12:30", "12:45"]),
    ] {
        let mut run = Simulation::at("2026-11-24T12:06:00Z");
        let (target, schedule) = quarters();
        run.table
            .start_target(&target, &schedule, run.now, at(first));
        assert_eq!(run.run(Duration::from_mins(39)), ticks, "{first}");
    }
}

#[test]
fn started_target_with_a_cron_expression_waits_for_its_times() {
    let mut run = Simulation::at("2026-11-24T02:30:00Z");
    let first = run.now + Duration::from_mins(1);
    run.table
        .start_target("nightly", &nightly(), run.now, first);
    assert_eq!(run.run(Duration::from_hours(1)), ["03:00"]);
}

#[test]
fn first_tick_is_not_before_the_requested_time() {
    let mut simulation = Simulation::at("2026-11-24T10:14:30Z");
    let (target, schedule) = quarters();
    let now = simulation.now;
    for (not_before, first) in [
        ("2026-11-24T10:15:00Z", "2026-11-24T10:15:00Z"),
        ("2026-11-24T10:15:30Z", "2026-11-24T10:30:00Z"),
        // In the past.
        ("2026-11-24T09:00:00Z", "2026-11-24T10:15:00Z"),
    ] {
        simulation
            .table
            .set(&target, &schedule, now, at(not_before));
        assert_eq!(
            simulation.next(&target),
            at(first),
            "not before {not_before}"
        );
        simulation.table.entries.clear();
    }
}

#[test]
fn only_another_schedule_moves_a_target_that_is_set_again() {
    let mut simulation = Simulation::at("2026-11-24T10:14:30Z");
    let (target, schedule) = quarters();
    simulation.set(&target, &schedule);
    let later = at("2026-11-24T20:00:00Z");
    let now = simulation.now;
    simulation.table.set(&target, &schedule, now, later);
    assert_eq!(simulation.next(&target), at("2026-11-24T10:15:00Z"));
    simulation.table.set(&target, &nightly(), now, now);
    assert_eq!(simulation.next(&target), at("2026-11-25T03:00:00Z"));
}

#[test]
fn ticks_during_an_unhandled_one_are_dropped_and_counted_with_the_next() {
    let (sender, mut ticks) = mpsc::channel(4);
    let mut table = TickTable::new(at("2026-11-24T10:00:00Z"), sender);
    let (target, schedule) = quarters();
    table.set(&target, &schedule, table.last_check, table.last_check);
    for time in ["10:15", "10:30", "10:45"] {
        table.emit_due(at(&format!("2026-11-24T{time}:00Z")));
    }
    let first = ticks.try_recv().unwrap();
    assert_eq!(first.due, at("2026-11-24T10:15:00Z"));
    assert_eq!(ticks.try_recv(), Err(TryRecvError::Empty));
    table.entries.get_mut(&target).unwrap().unhandled = None;
    table.emit_due(at("2026-11-24T11:00:00Z"));
    let next = ticks.try_recv().unwrap();
    assert_eq!((next.due, next.dropped), (at("2026-11-24T11:00:00Z"), 2));
}

#[test]
fn full_channel_drops_and_counts_ticks_without_blocking() {
    let mut simulation = Simulation::at("2026-11-24T02:59:59Z");
    // The channel has capacity for four.
    let targets = ["a", "b", "c", "d", "e"];
    for target in targets {
        simulation.set(target, &nightly());
    }
    assert_eq!(simulation.jump_to("2026-11-24T03:00:00Z").len(), 4);
    let dropped = targets.map(|target| simulation.table.entries[target].dropped);
    assert_eq!(dropped, [0, 0, 0, 0, 1]);
    assert_eq!(simulation.next("e"), at("2026-11-25T03:00:00Z"));
    simulation.ticks.close();
    assert_eq!(simulation.jump_to("2026-11-25T03:00:00Z"), []);
}

/// A number of seconds, and a wall clock that is shifted by it.
fn changed_clock() -> (Arc<AtomicI64>, impl Fn() -> DateTime<Utc> + Send + Sync) {
    let change = Arc::new(AtomicI64::new(0));
    let seconds = Arc::clone(&change);
    let clock = move || Utc::now() + TimeDelta::seconds(seconds.load(Ordering::Relaxed));
    (change, clock)
}

#[tokio::test]
async fn ticks_are_delivered_one_by_one() {
    let (ticker, mut ticks) = Ticker::start(Utc::now).await.unwrap();
    ticker.set("a", &Schedule::Every(Duration::from_secs(1)), Utc::now());
    let first = ticks.recv().await.unwrap();
    assert_eq!(
        ticker.next("a"),
        Some(first.due),
        "the tick is not handled yet"
    );
    ticker.handled(&first);
    assert!(ticker.next("a") > Some(first.due));
    let second = ticks.recv().await.unwrap();
    assert!(second.due > first.due);
    // Confirming an older tick again must not confirm the current one.
    ticker.handled(&first);
    assert_eq!(ticker.next("a"), Some(second.due));
    ticker.remove("a");
    assert_eq!(ticker.next("a"), None);
    ticker.handled(&second);
}

#[tokio::test]
async fn clock_change_is_noticed_between_ticks() {
    let month = TimeDelta::days(30);
    let (change, clock) = changed_clock();
    let (ticker, mut ticks) = Ticker::start(clock).await.unwrap();
    ticker.set("a", &Schedule::Every(month.to_std().unwrap()), Utc::now());
    let next = ticker.next("a").unwrap();
    change.store((month * 2).num_seconds(), Ordering::Relaxed);
    let tick = ticks.recv().await.unwrap();
    assert_eq!(tick.due, next);
    ticker.handled(&tick);
    assert_eq!(ticker.next("a"), Some(next + month * 2));
    change.store(0, Ordering::Relaxed);
    ticker.set("b", &Schedule::Every(Duration::from_secs(1)), Utc::now());
    ticks.recv().await.unwrap();
    assert_eq!(
        ticker.next("a"),
        Some(next),
        "the next tick follows the new time"
    );
}

#[tokio::test]
async fn finished_jobs_are_removed() {
    let scheduler = JobScheduler::new().await.unwrap();
    scheduler.start().await.unwrap();
    let context = scheduler.context();
    let (ticker, mut ticks) = Ticker::on(scheduler, Arc::new(Utc::now));
    ticker.set(
        "a",
        &Schedule::Every(Duration::from_millis(200)),
        Utc::now(),
    );
    for _ in 0..4 {
        let tick = ticks.recv().await.unwrap();
        ticker.handled(&tick);
    }
    let jobs = context.metadata_storage.write().await.list_next_ticks();
    let jobs = jobs.await.unwrap();
    assert!(jobs.len() <= 3, "{jobs:?}");
}

/// A stopped process or a suspended machine: the clock went on, but nothing could run.
#[test]
fn gap_of_any_length_leaves_the_scheduler_another_try() {
    let mut silence = Silence::default();
    silence.add_try(Duration::from_hours(10));
    assert!(silence.0 < SILENCE_TIMEOUT, "{silence:?}");
    let tries = (1..100).find(|_| {
        silence.add_try(JOB_TIMEOUT);
        silence.0 >= SILENCE_TIMEOUT
    });
    assert!(tries >= Some(2), "{tries:?}");
}

#[tokio::test(start_paused = true)]
async fn scheduler_that_runs_no_job_counts_as_stopped_after_30_s() {
    let begun = Instant::now();
    // This scheduler is never started.
    let scheduler = JobScheduler::new().await.unwrap();
    let (ticker, _ticks) = Ticker::on(scheduler, Arc::new(Utc::now));
    ticker.stopped().await;
    assert!(begun.elapsed() >= SILENCE_TIMEOUT);
}
