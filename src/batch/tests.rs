use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tokio::time::sleep;

use super::*;
use crate::config;
use crate::config::Period;
use crate::history::History;
use crate::probe::LimitKind;
use crate::report::sample;

type ScriptedProbe = Pin<Box<dyn Future<Output = ProbeReport> + Send>>;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);

fn plan(rooms: usize, stay: Stay) -> Plan {
    Plan {
        rooms,
        turns: 1,
        max_rooms: 10,
        ramp: config::RampMode::AfterJoin,
        interval: SECOND,
        stay,
        hold: 10 * SECOND,
        stop_after_no_shows: 2,
    }
}

fn plan_of(ramp: config::RampMode, rooms: usize) -> Plan {
    Plan {
        ramp,
        ..plan(rooms, Stay::Together)
    }
}

fn failed(reason: Reason) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        detail: "as scripted".to_owned(),
    })
}

fn report(start: &ProbeStart, outcome: Outcome) -> ProbeReport {
    ProbeReport::new(start.room.clone(), start.position, Utc::now(), outcome)
}

fn settled(outcome: Outcome) -> ProbeEvent {
    ProbeEvent::OutcomeDecided {
        outcome,
        retry_after: None,
    }
}

/// The agent joins after `delay`; the probe ends when its hold is over or the batch is aborted.
async fn joins(delay: Duration, mut start: ProbeStart) -> ProbeReport {
    let abort = start.abort.clone();
    let held = async {
        sleep(delay).await;
        let at = Instant::now();
        let milestone = Milestone::AgentJoined;
        (start.emit)(ProbeEvent::Reached { milestone, at });
        (start.emit)(ProbeEvent::JoinDecided { joined: true });
        let until = start
            .hold_until
            .wait_for(Option::is_some)
            .await
            .map(|until| *until);
        sleep_until(until.unwrap().unwrap()).await;
    };
    let outcome = tokio::select! {
        () = held => Outcome::Ok,
        () = abort.cancelled() => Outcome::Aborted,
    };
    (start.emit)(settled(outcome.clone()));
    report(&start, outcome)
}

/// No agent comes: the outcome is known after `delay`, and the room is deleted 1 s later.
async fn fails(delay: Duration, reason: Reason, start: ProbeStart) -> ProbeReport {
    sleep(delay).await;
    (start.emit)(ProbeEvent::JoinDecided { joined: false });
    sleep(Duration::from_millis(5)).await;
    (start.emit)(settled(failed(reason)));
    sleep(SECOND).await;
    report(&start, failed(reason))
}

/// When a probe was opened and when it ended, in seconds since the batch began.
type OpenedAndEnded = (u64, Option<u64>);

struct BatchRun {
    times: Vec<OpenedAndEnded>,
    outcomes: Vec<Outcome>,
    not_opened: Option<NotOpened>,
    events: Vec<BatchEvent>,
}

fn no_guard() -> Admission {
    Admission {
        guard: None,
        permits: None,
        target: "support".to_owned(),
        purpose: Purpose::Scheduled,
        name_prefix: "canary-".to_owned(),
        room_times: Vec::new(),
        max_time_to_verdict: Duration::ZERO,
    }
}

async fn run_scripted(
    plan: Plan,
    abort: CancellationToken,
    script: impl Fn(usize, ProbeStart) -> ScriptedProbe,
) -> BatchRun {
    run_guarded(plan, no_guard(), abort, script).await
}

async fn run_guarded(
    plan: Plan,
    admission: Admission,
    abort: CancellationToken,
    script: impl Fn(usize, ProbeStart) -> ScriptedProbe,
) -> BatchRun {
    let mut events = Vec::new();
    let times = Arc::new(Mutex::new(Vec::<OpenedAndEnded>::new()));
    let began = Instant::now();
    let open = |index, start| {
        times
            .lock()
            .unwrap()
            .push((began.elapsed().as_secs(), None));
        let probe = script(index, start);
        let times = Arc::clone(&times);
        async move {
            let report = probe.await;
            times.lock().unwrap()[index].1 = Some(began.elapsed().as_secs());
            report
        }
    };
    let on_event = |event: &BatchEvent| events.push(event.clone());
    let runner = BatchRunner::new(plan, admission, abort, open, on_event);
    let (probes, not_opened) = runner.run().await;
    let outcomes = probes.into_iter().map(|probe| probe.outcome);
    BatchRun {
        times: times.lock().unwrap().clone(),
        outcomes: outcomes.collect(),
        not_opened,
        events,
    }
}

fn why(ran: &BatchRun) -> (usize, &str) {
    let not_opened = ran.not_opened.as_ref().unwrap();
    (not_opened.rooms, &not_opened.why)
}

#[tokio::test(start_paused = true)]
async fn together_each_room_opens_on_the_join_before_and_all_end_hold_after_the_last_join() {
    let script = |_, start| Box::pin(joins(2 * SECOND, start)) as ScriptedProbe;
    let ran = run_scripted(plan(3, Stay::Together), CancellationToken::new(), script).await;
    assert_eq!(ran.times, [(0, Some(16)), (2, Some(16)), (4, Some(16))]);
    assert_eq!(ran.outcomes, [Outcome::Ok, Outcome::Ok, Outcome::Ok]);
    assert_eq!(ran.not_opened, None);
}

#[tokio::test(start_paused = true)]
async fn one_by_one_never_has_two_rooms_open_and_holds_each_from_its_own_join() {
    let mut plan = plan(3, Stay::OneByOne);
    plan.max_rooms = 1;
    let script = |_, start| Box::pin(joins(2 * SECOND, start)) as ScriptedProbe;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    assert_eq!(ran.times, [(0, Some(12)), (12, Some(24)), (24, Some(36))]);
    assert_eq!(ran.not_opened, None);
}

#[tokio::test(start_paused = true)]
async fn interval_opens_rooms_independently_and_holds_from_the_last_decision() {
    let script = |index, start| match index {
        1 => Box::pin(fails(9 * SECOND, Reason::AgentNoTrack, start)) as ScriptedProbe,
        _ => Box::pin(joins(5 * SECOND, start)),
    };
    let plan = plan_of(config::RampMode::Interval, 3);
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    // The second room, opened at 1, is decided last, at 10.
    assert_eq!(ran.times, [(0, Some(20)), (1, Some(11)), (2, Some(20))]);
    assert_eq!(ran.not_opened, None);
}

#[tokio::test(start_paused = true)]
async fn interval_continues_while_no_room_is_open() {
    let script =
        |_, start| Box::pin(fails(SECOND, Reason::DispatchUnanswered, start)) as ScriptedProbe;
    let mut plan = plan_of(config::RampMode::Interval, 3);
    plan.interval = 5 * SECOND;
    plan.stop_after_no_shows = 0;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    assert_eq!(ran.times, [(0, Some(2)), (5, Some(7)), (10, Some(12))]);
}

#[tokio::test(start_paused = true)]
async fn no_shows_a_rejection_the_cap_and_an_abort_stop_an_interval() {
    let no_shows =
        |_, start| Box::pin(fails(2 * SECOND, Reason::DispatchUnanswered, start)) as ScriptedProbe;
    let plan = || plan_of(config::RampMode::Interval, 9);
    let ran = run_scripted(plan(), CancellationToken::new(), no_shows).await;
    // The second no-show is known 5 ms after the fourth room opened.
    assert_eq!(why(&ran), (5, "no agent joined 2 rooms in a row"));

    let limit = Reason::PlanLimit(LimitKind::Connections);
    let rejected = move |index, start| match index {
        1 => Box::pin(fails(SECOND / 2, limit, start)) as ScriptedProbe,
        _ => Box::pin(joins(20 * SECOND, start)),
    };
    let ran = run_scripted(plan(), CancellationToken::new(), rejected).await;
    assert_eq!(why(&ran), (7, "plan limit reached"));

    let all_join = |_, start| Box::pin(joins(20 * SECOND, start)) as ScriptedProbe;
    let mut capped = plan();
    capped.max_rooms = 3;
    let ran = run_scripted(capped, CancellationToken::new(), all_join).await;
    assert_eq!(why(&ran), (6, "the project's max_rooms is 3"));

    let abort = CancellationToken::new();
    let stop = async {
        sleep(3 * SECOND / 2).await;
        abort.cancel();
    };
    let running = run_scripted(plan(), abort.clone(), all_join);
    let (ran, ()) = tokio::join!(running, stop);
    assert_eq!(ran.outcomes, [Outcome::Aborted, Outcome::Aborted]);
    assert_eq!(why(&ran), (7, "the batch was aborted"));
}

#[tokio::test(start_paused = true)]
async fn burst_opens_all_rooms_at_once_and_no_failure_can_stop_it() {
    let script = |index, start| match index {
        0 | 1 => Box::pin(fails(SECOND, Reason::DispatchUnanswered, start)) as ScriptedProbe,
        _ => Box::pin(joins(2 * SECOND, start)),
    };
    let plan = plan_of(config::RampMode::Burst, 4);
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    let (failed, held) = ((0, Some(2)), (0, Some(12)));
    assert_eq!(ran.times, [failed, failed, held, held]);
    assert_eq!(ran.not_opened, None);
}

#[tokio::test(start_paused = true)]
async fn burst_of_two_hundred_loses_no_room_and_no_event() {
    let mut plan = plan_of(config::RampMode::Burst, 200);
    plan.max_rooms = 200;
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    assert_eq!(ran.outcomes, vec![Outcome::Ok; 200]);
    let count =
        |wanted: fn(&BatchEvent) -> bool| ran.events.iter().filter(|event| wanted(event)).count();
    let emitted = |event: &BatchEvent| matches!(event, BatchEvent::Probe { .. });
    let closed = |event: &BatchEvent| matches!(event, BatchEvent::RoomClosed { .. });
    assert_eq!((count(emitted), count(closed)), (3 * 200, 200));
}

#[tokio::test(start_paused = true)]
async fn missing_agent_delays_the_next_room_only_until_the_outcome() {
    let script = |index, start| match index {
        0 => Box::pin(fails(3 * SECOND, Reason::AgentNoShow, start)) as ScriptedProbe,
        _ => Box::pin(joins(SECOND, start)),
    };
    let ran = run_scripted(plan(3, Stay::Together), CancellationToken::new(), script).await;
    assert_eq!(ran.times, [(0, Some(4)), (3, Some(15)), (4, Some(15))]);
    assert_eq!(
        ran.outcomes,
        [failed(Reason::AgentNoShow), Outcome::Ok, Outcome::Ok]
    );
}

#[tokio::test(start_paused = true)]
async fn no_shows_in_a_row_stop_the_ramp_and_a_join_restarts_the_count() {
    let script = |index, start| match index {
        1 => Box::pin(joins(SECOND, start)) as ScriptedProbe,
        _ => Box::pin(fails(SECOND, Reason::DispatchUnanswered, start)),
    };
    let ran = run_scripted(plan(7, Stay::Together), CancellationToken::new(), script).await;
    assert_eq!(ran.outcomes.len(), 4);
    assert_eq!(ran.outcomes[1], Outcome::Ok);
    assert_eq!(why(&ran), (3, "no agent joined 2 rooms in a row"));
}

#[tokio::test(start_paused = true)]
async fn no_shows_never_stop_the_ramp_if_the_limit_is_off() {
    let mut plan = plan(4, Stay::Together);
    plan.stop_after_no_shows = 0;
    let script =
        |_, start| Box::pin(fails(SECOND, Reason::DispatchUnanswered, start)) as ScriptedProbe;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    assert_eq!(ran.outcomes.len(), 4);
    assert_eq!(ran.not_opened, None);
}

#[tokio::test(start_paused = true)]
async fn after_a_rejection_no_room_opens_and_the_open_rooms_are_held_to_their_end() {
    for (reason, said) in [
        (
            Reason::PlanLimit(LimitKind::Connections),
            "plan limit reached",
        ),
        (Reason::AuthRejected, "LiveKit rejected the credentials"),
        (Reason::ConfigRejected, "LiveKit rejected a setting"),
        (Reason::Unreachable, "the server is unreachable"),
    ] {
        let script = |index, start| match index {
            1 => Box::pin(fails(SECOND, reason, start)) as ScriptedProbe,
            _ => Box::pin(joins(2 * SECOND, start)),
        };
        let ran = run_scripted(plan(5, Stay::Together), CancellationToken::new(), script).await;
        assert_eq!(ran.times, [(0, Some(13)), (2, Some(4))]);
        assert_eq!(ran.outcomes, [Outcome::Ok, failed(reason)]);
        assert_eq!(why(&ran), (3, said));
    }
}

#[tokio::test(start_paused = true)]
async fn panicking_probe_is_reported_with_its_room_and_affects_no_other() {
    async fn panics(start: ProbeStart) -> ProbeReport {
        let index = start.room.clone();
        drop(start);
        sleep(SECOND).await;
        panic!("scripted fault in {index}");
    }
    let script = |index, start: ProbeStart| match index {
        2 => Box::pin(panics(start)) as ScriptedProbe,
        _ => Box::pin(joins(SECOND, start)),
    };
    let mut ran = run_scripted(plan(5, Stay::Together), CancellationToken::new(), script).await;
    let crashed = ran.outcomes.remove(2);
    assert_eq!(ran.outcomes, vec![Outcome::Ok; 4]);
    let mut opened = Vec::new();
    let mut told = None;
    for event in ran.events {
        match event {
            BatchEvent::RoomOpened { room, .. } => opened.push(room),
            BatchEvent::RoomClosed { index: 2, report } => told = Some(report),
            _ => {}
        }
    }
    let Outcome::Failed(failure) = crashed else {
        panic!("{crashed:?}")
    };
    assert_eq!(failure.reason, Reason::Internal);
    let said = format!("scripted fault in {}", opened[2]);
    assert!(failure.detail.ends_with(&said), "{}", failure.detail);
    assert_eq!(told.unwrap().room, opened[2]);
}

#[tokio::test(start_paused = true)]
async fn abort_during_the_ramp_opens_no_further_room_and_waits_for_every_probe() {
    let abort = CancellationToken::new();
    let script = |index, start| match index {
        0 => Box::pin(fails(SECOND, Reason::AgentNoShow, start)) as ScriptedProbe,
        _ => Box::pin(joins(2 * SECOND, start)),
    };
    let stop = async {
        sleep(4 * SECOND).await;
        abort.cancel();
    };
    let running = run_scripted(plan(5, Stay::Together), abort.clone(), script);
    let (ran, ()) = tokio::join!(running, stop);
    assert_eq!(
        ran.outcomes,
        [
            failed(Reason::AgentNoShow),
            Outcome::Aborted,
            Outcome::Aborted
        ]
    );
    assert!(ran.times.iter().all(|(_, ended)| *ended <= Some(4)));
    assert_eq!(why(&ran), (2, "the batch was aborted"));
}

#[tokio::test(start_paused = true)]
async fn dropped_batch_drops_its_probes_and_their_leases() {
    let (probe_lives, mut dropped) = mpsc::channel::<()>(1);
    let open = move |_, start| {
        let alive = probe_lives.clone();
        async move {
            let report = joins(SECOND, start).await;
            drop(alive);
            report
        }
    };
    let plan = plan(3, Stay::Together);
    let running = BatchRunner::new(plan, no_guard(), CancellationToken::new(), open, |_| {});
    let cut_short = tokio::time::timeout(3 * SECOND, running.run());
    assert!(cut_short.await.is_err());
    assert_eq!(dropped.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn rooms_beyond_the_cap_are_reported_as_not_opened() {
    let mut plan = plan(5, Stay::Together);
    plan.max_rooms = 3;
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    assert_eq!(ran.outcomes, vec![Outcome::Ok; 3]);
    assert_eq!(why(&ran), (2, "the project's max_rooms is 3"));
}

/// A guard that allows `minutes` of agent time per day.
fn guard(minutes: u32) -> (Guard, History) {
    let history = History::in_memory(Arc::new(Utc::now));
    let project = Project {
        budget: config::Budget {
            agent_time_per_day: Some(minutes * MINUTE),
            ..config::Budget::default()
        },
        ..sample::project()
    };
    (Guard::new("acme", &project, history.clone()), history)
}

fn target(rooms: usize) -> config::Target {
    config::Target {
        batch: config::Batch {
            rooms,
            ..config::Batch::default()
        },
        ..config::Target::default()
    }
}

async fn admission(guard: &Guard) -> Admission {
    Admission {
        permits: Some(guard.acquire(&target(2)).await),
        guard: Some(guard.clone()),
        room_times: vec![RoomTime::of(3 * MINUTE); 10],
        ..no_guard()
    }
}

/// The agent joins, and is in the room for 70 s.
async fn is_billed(start: ProbeStart) -> ProbeReport {
    let began = Instant::now();
    let mut report = joins(SECOND, start).await;
    report.timeline.mark(Milestone::AgentJoined, began);
    let deleted = began + 70 * SECOND;
    report.timeline.mark(Milestone::RoomDeleted, deleted);
    report
}

fn used_minutes(guard: &Guard) -> u64 {
    guard.used(Period::Day).as_secs() / 60
}

#[tokio::test(start_paused = true)]
async fn denial_by_the_budget_opens_no_further_room_and_is_reported() {
    for ramp in [config::RampMode::AfterJoin, config::RampMode::Burst] {
        let (guard, _) = guard(8);
        let script = |_, start| Box::pin(is_billed(start)) as ScriptedProbe;
        let abort = CancellationToken::new();
        let ran = run_guarded(plan_of(ramp, 5), admission(&guard).await, abort, script).await;
        assert_eq!(ran.outcomes, [Outcome::Ok, Outcome::Ok], "{ramp:?}");
        let not_opened = ran.not_opened.unwrap();
        let denial = not_opened.denial.unwrap();
        assert_eq!((not_opened.rooms, denial.label()), (3, "budget"));
        assert_eq!(not_opened.why, denial.to_string());
        // Two minutes each, and nothing for the rooms that were denied.
        assert_eq!(used_minutes(&guard), 4, "{ramp:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn project_in_backoff_opens_no_room() {
    let (guard, _) = guard(100);
    guard.record_rejection(LimitKind::ApiRate, None);
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let (plan, abort) = (plan(3, Stay::Together), CancellationToken::new());
    let ran = run_guarded(plan, admission(&guard).await, abort, script).await;
    assert_eq!(ran.outcomes, []);
    let not_opened = ran.not_opened.unwrap();
    assert_eq!(not_opened.rooms, 3);
    assert_eq!(not_opened.denial.unwrap().label(), "backoff");
    assert_eq!(used_minutes(&guard), 0);
}

#[tokio::test(start_paused = true)]
async fn rejection_reaches_the_guard_at_once_and_stops_another_batch_of_the_project() {
    async fn is_rejected(start: ProbeStart) -> ProbeReport {
        sleep(SECOND).await;
        let outcome = failed(Reason::PlanLimit(LimitKind::Connections));
        let progress = ProbeEvent::OutcomeDecided {
            outcome: outcome.clone(),
            retry_after: Some(90 * SECOND),
        };
        (start.emit)(progress);
        // Its room takes long to delete.
        sleep(20 * SECOND).await;
        report(&start, outcome)
    }
    let (guard, _) = guard(100);
    let rejected = |_, start| Box::pin(is_rejected(start)) as ScriptedProbe;
    let joins = |_, start| Box::pin(joins(2 * SECOND, start)) as ScriptedProbe;
    let plan = || plan(2, Stay::Together);
    let (one, other) = (admission(&guard).await, admission(&guard).await);
    let (one, other) = tokio::join!(
        run_guarded(plan(), one, CancellationToken::new(), rejected),
        run_guarded(plan(), other, CancellationToken::new(), joins),
    );
    assert_eq!(why(&one), (1, "plan limit reached"));
    assert_eq!(other.outcomes, [Outcome::Ok]);
    let denial = other.not_opened.unwrap().denial.unwrap();
    assert_eq!(denial.label(), "backoff");
    let rest = denial.until().unwrap() - Utc::now();
    assert!(
        rest > chrono::TimeDelta::seconds(60),
        "as the answer said: {rest}"
    );
}

#[tokio::test(start_paused = true)]
async fn every_end_of_a_probe_settles_its_reservation() {
    async fn panics(_: ProbeStart) -> ProbeReport {
        sleep(SECOND).await;
        panic!("scripted")
    }
    async fn is_not_deleted(start: ProbeStart) -> ProbeReport {
        let mut report = joins(SECOND, start).await;
        report.timeline.mark(Milestone::AgentJoined, Instant::now());
        report
    }
    for (what, minutes) in [
        ("an agent for 70 s", 2),
        ("no agent", 0),
        ("a panic", 3),
        ("an agent, and no deletion", 3),
    ] {
        let (guard, history) = guard(100);
        let seen = Arc::new(Mutex::new(None));
        let script = |_, start: ProbeStart| {
            *seen.lock().unwrap() = Some(start.room.clone());
            match what {
                "an agent for 70 s" => Box::pin(is_billed(start)) as ScriptedProbe,
                "no agent" => Box::pin(fails(SECOND, Reason::AgentNoShow, start)),
                "a panic" => Box::pin(panics(start)),
                _ => Box::pin(is_not_deleted(start)),
            }
        };
        let (plan, abort) = (plan(1, Stay::Together), CancellationToken::new());
        let ran = run_guarded(plan, admission(&guard).await, abort, script).await;
        assert_eq!(ran.outcomes.len(), 1, "{what}");
        assert_eq!(used_minutes(&guard), minutes, "{what}");
        // The janitor confirms the deletion of the room, not the batch.
        let room = seen.lock().unwrap().clone().unwrap();
        assert_eq!(history.target_of(&room).unwrap(), "support");
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_batch_leaves_the_worst_case_reserved_and_returns_its_permits() {
    let (guard, _) = guard(100);
    let open = |_, start| is_billed(start);
    let (plan, abort) = (plan(2, Stay::Together), CancellationToken::new());
    let running = BatchRunner::new(plan, admission(&guard).await, abort, open, |_| {});
    let cut_short = tokio::time::timeout(3 * SECOND, running.run());
    assert!(cut_short.await.is_err());
    assert_eq!(used_minutes(&guard), 6);
    let all = target(sample::project().max_rooms);
    let _all = guard.acquire(&all).await;
}

#[tokio::test(start_paused = true)]
async fn abort_before_admission_opens_no_room_and_costs_nothing() {
    let (guard, _) = guard(100);
    let abort = CancellationToken::new();
    abort.cancel();
    let script = |_, start| Box::pin(is_billed(start)) as ScriptedProbe;
    let plan = plan_of(config::RampMode::Burst, 3);
    let ran = run_guarded(plan, admission(&guard).await, abort, script).await;
    assert_eq!(ran.outcomes, []);
    assert_eq!(why(&ran), (3, "the batch was aborted"));
    assert_eq!(used_minutes(&guard), 0);
}

#[tokio::test(start_paused = true)]
async fn abort_ends_the_wait_for_permits_and_no_room_opens() {
    let (guard, _) = guard(100);
    let project = sample::project();
    let _all = guard.acquire(&target(project.max_rooms)).await;
    let abort = CancellationToken::new();
    let stop = async {
        sleep(SECOND).await;
        abort.cancel();
    };
    let settings = target(1);
    let purpose = Purpose::Scheduled;
    let access = Access::Queue(guard);
    let waiting = Admission::wait("support", purpose, &settings, &project, access, &abort);
    let (admission, ()) = tokio::join!(waiting, stop);
    assert!(admission.permits.is_none());
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let ran = run_guarded(plan(1, Stay::Together), admission, abort, script).await;
    assert_eq!(why(&ran), (1, "the batch was aborted"));
}

#[tokio::test(start_paused = true)]
async fn batch_without_a_rejection_resets_the_backoff() {
    let (guard, _) = guard(100);
    let rest = || guard.backoff_until().unwrap() - Utc::now();
    for _ in 0..3 {
        guard.record_rejection(LimitKind::ApiRate, None);
        sleep(Duration::from_hours(1)).await;
    }
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let (plan, abort) = (plan(1, Stay::Together), CancellationToken::new());
    run_guarded(plan, admission(&guard).await, abort, script).await;
    guard.record_rejection(LimitKind::ApiRate, None);
    assert!(rest() < chrono::TimeDelta::minutes(2), "{}", rest());
}

#[tokio::test]
async fn room_is_journalled_on_disk_before_it_can_exist() {
    let dir = tempfile::tempdir().unwrap();
    let settings = config::HistorySettings {
        dir: dir.path().to_owned(),
        ..config::HistorySettings::default()
    };
    let history = History::open(&settings).unwrap();
    let guard = Guard::new("acme", &sample::project(), history);
    let file = dir.path().join("history.sqlite3");
    let journalled = Arc::new(Mutex::new(Vec::new()));
    let script = |_, start: ProbeStart| {
        let database = rusqlite::Connection::open(&file).unwrap();
        let sql = "SELECT count(*) FROM rooms WHERE room = ?1";
        let rows: i64 = database
            .query_row(sql, [&start.room.0], |row| row.get(0))
            .unwrap();
        journalled.lock().unwrap().push(rows);
        let report = report(&start, Outcome::Ok);
        Box::pin(async move {
            drop(start);
            report
        }) as ScriptedProbe
    };
    let mut plan = plan_of(config::RampMode::Burst, 3);
    // No agent joins, and two rooms may be over before the disk has the third.
    plan.stop_after_no_shows = 0;
    let abort = CancellationToken::new();
    let ran = run_guarded(plan, admission(&guard).await, abort, script).await;
    assert_eq!(ran.outcomes.len(), 3);
    assert_eq!(*journalled.lock().unwrap(), [1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn probe_emits_all_of_its_events_without_a_wait_for_the_batch() {
    let script = |_, start: ProbeStart| {
        // Before its task runs, and so before the batch reads anything.
        for milestone in Milestone::ALL {
            let at = Instant::now();
            (start.emit)(ProbeEvent::Reached { milestone, at });
        }
        (start.emit)(ProbeEvent::JoinDecided { joined: true });
        // Its turn, and an interruption.
        for _ in 0..2 {
            let to_verdict = MINUTE;
            (start.emit)(ProbeEvent::TurnStarted { to_verdict });
        }
        (start.emit)(settled(Outcome::Ok));
        let report = report(&start, Outcome::Ok);
        Box::pin(async move { report }) as ScriptedProbe
    };
    let ran = run_scripted(
        plan_of(config::RampMode::Burst, 10),
        CancellationToken::new(),
        script,
    )
    .await;
    assert_eq!(ran.outcomes, vec![Outcome::Ok; 10]);
    let kept = ran.events.iter();
    let kept = kept.filter(|event| matches!(event, BatchEvent::Probe { .. }));
    assert_eq!(kept.count(), 10 * ProbeEvent::max_per_probe(1));
    assert_eq!(
        2 + ran.events.len(),
        max_events(10, 1),
        "with start and end"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_a_probe_emits_as_it_ends_come_before_its_end() {
    let script = |_, start: ProbeStart| {
        Box::pin(async move {
            (start.emit)(ProbeEvent::JoinDecided { joined: false });
            (start.emit)(settled(Outcome::Ok));
            report(&start, Outcome::Ok)
        }) as ScriptedProbe
    };
    let mut plan = plan_of(config::RampMode::Burst, 200);
    plan.max_rooms = 200;
    plan.stop_after_no_shows = 0;
    plan.hold = Duration::ZERO;
    let ran = run_scripted(plan, CancellationToken::new(), script).await;
    let mut emitted = vec![0; 200];
    for event in ran.events {
        match event {
            BatchEvent::Probe { index, .. } => emitted[index] += 1,
            BatchEvent::RoomClosed { index, .. } => assert_eq!(emitted[index], 2, "room {index}"),
            _ => {}
        }
    }
    assert_eq!(emitted, [2; 200]);
}

#[tokio::test(start_paused = true)]
async fn progress_comes_in_order_and_before_the_end() {
    let script = |_, start| Box::pin(joins(SECOND, start)) as ScriptedProbe;
    let ran = run_scripted(plan(1, Stay::Together), CancellationToken::new(), script).await;
    let names = ran.events.into_iter().map(|event| match event {
        BatchEvent::RoomOpened { .. } => "opened",
        BatchEvent::Probe { event, .. } => match event {
            ProbeEvent::Reached { .. } => "reached",
            ProbeEvent::JoinDecided { .. } => "join decided",
            ProbeEvent::TurnStarted { .. } => "turn started",
            ProbeEvent::OutcomeDecided { .. } => "outcome decided",
        },
        BatchEvent::HoldDecided { .. } => "hold decided",
        BatchEvent::RoomClosed { .. } => "closed",
        BatchEvent::Started | BatchEvent::Ended(_) => unreachable!("of the whole batch"),
    });
    assert_eq!(
        names.collect::<Vec<_>>(),
        [
            "opened",
            "reached",
            "join decided",
            "hold decided",
            "outcome decided",
            "closed"
        ]
    );
}

#[test]
fn room_names_share_the_instance_and_nothing_else() {
    let new_room_name = || new_room_name("calls-").0;
    let (one, other) = (new_room_name(), new_room_name());
    let parts: Vec<&str> = one.split('-').collect();
    assert_eq!(parts[..2], ["calls", INSTANCE.as_str()]);
    assert_eq!((parts[1].len(), parts[2].len()), (5, 13));
    assert_ne!(one, other);
}
