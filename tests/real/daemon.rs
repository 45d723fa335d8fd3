//! Scenarios of the daemon: what it counts during an outage, what a killed daemon leaves, and what Prometheus scrapes.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use chrono::{DateTime, Utc};
use rusqlite::Connection;
use rustix::process::Signal;
use serde_json::Value;
use support::behaviour::Behaviour;
use support::daemon::{Daemon, DaemonDir, many_targets};
use support::http::HttpClient;
use support::process::{Process, command, free_ports};
use support::report::{Batch, Probe};
use support::scrape::{Sample, Scrape};
use support::settings::{Settings, TARGET};
use support::stack::{AGENT, Agent, Stack};
use support::{SHORT_TIMEOUT, wait_for};
use tokio::time::Instant;

use crate::fixture::Fixture;

/// Seconds between the ticks of the scenario that counts them.
const INTERVAL: f64 = 4.0;
/// How many daemons the scenario kills.
const KILLS: usize = 3;
/// Seconds of agent time that LiveKit bills at least for a session.
const MIN_BILLED: f64 = 60.0;
/// The most that one of their rooms reserves: its join and that of the next room, its hold, a turn under way, and its deletion.
const MAX_RESERVED: f64 = 180.0;
/// Batches after which the metrics are checked again.
const MANY_BATCHES: f64 = 200.0;
const TARGETS: usize = 8;

/// The counters of a daemon that started without a history are equal to its history.
fn expect_equal(scrape: &Scrape, target: &str, batches: &[Batch]) -> anyhow::Result<()> {
    let probes: Vec<_> = batches.iter().flat_map(|batch| &batch.probes).collect();
    let expect = |name: &str, labels: &[(&str, &str)], recorded: u64| {
        let labels = [labels, &[("target", target)]].concat();
        let counted = scrape.count(name, &labels)?;
        let same = counted == recorded;
        ensure!(
            same,
            "{name} {labels:?}: {counted} counted, {recorded} recorded"
        );
        anyhow::Ok(())
    };
    let probes_with = |wanted: &dyn Fn(&Probe) -> bool| {
        let found = probes.iter().filter(|probe| wanted(probe));
        found.count() as u64
    };
    for result in ["ok", "degraded", "failed", "limited", "aborted"] {
        let recorded = batches.iter().filter(|batch| batch.result == result);
        let recorded = recorded.count() as u64;
        expect("batches_total", &[("result", result)], recorded)?;
    }
    let aborted = probes_with(&|probe| probe.outcome == "aborted");
    expect("probes_aborted_total", &[], aborted)?;
    expect("probes_total", &[], probes.len() as u64 - aborted)?;
    let failed = probes_with(&|probe| probe.reason.is_some());
    expect("probe_failures_total", &[], failed)?;
    for reason in probes.iter().filter_map(|probe| probe.reason.as_deref()) {
        let recorded = probes_with(&|probe| probe.reason.as_deref() == Some(reason));
        expect("probe_failures_total", &[("reason", reason)], recorded)?;
    }
    let ok = probes_with(&|probe| probe.outcome == "ok");
    let blamed =
        probes_with(&|probe| matches!(probe.origin.as_deref(), Some("agent" | "undetermined")));
    let availability = [("sli", "availability")];
    expect("slo_good_total", &availability, ok)?;
    expect("slo_eligible_total", &availability, ok + blamed)?;
    let joined = probes_with(&|probe| probe.join_delay_seconds.is_some());
    expect("agent_join_delay_seconds_count", &[], joined)?;
    let packets = probes.iter().map(|probe| probe.audio.packets).sum();
    expect("agent_audio_packets_total", &[], packets)
}

// --- an outage ---

fn freeze(worker: &Process) -> anyhow::Result<DateTime<Utc>> {
    worker.signal(Signal::STOP)?;
    Ok(Utc::now())
}

/// Lets the worker run again, and waits until it accepts jobs.
fn thaw(stack: &Stack) -> anyhow::Result<DateTime<Utc>> {
    stack.workers[0].signal(Signal::CONT)?;
    for attempt in 0..20 {
        let room = format!("thawed-{attempt}");
        stack
            .api
            .dispatch(&room, AGENT, r#"{"behaviour": "nothing"}"#)?;
        let arrived = stack.wait_for_event("a job", Duration::from_secs(2), |event| {
            event.room() == room
        });
        stack.api.delete_room(&room)?;
        if arrived.is_ok() {
            return Ok(Utc::now());
        }
    }
    bail!("the worker accepts no job\n{}", stack.logs())
}

/// The rooms of the canary in the log of the server.
fn rooms_in_log(stack: &Stack) -> anyhow::Result<BTreeSet<String>> {
    let log = stack.server.log()?;
    let rooms = log.split("\"room\": \"").skip(1);
    let rooms = rooms.filter_map(|rest| rest.split('"').next());
    let ours = rooms.filter(|room| room.starts_with("canary-"));
    Ok(ours.map(str::to_owned).collect())
}

/// Waits until the daemon has counted this many batches in total.
fn wait_for_batches(daemon: &Daemon, count: f64, limit: Duration) -> anyhow::Result<()> {
    wait_for("more batches", limit, || {
        let ended = daemon.scrape()?.sum("batches_total", &[])?;
        Ok((ended >= count).then_some(()))
    })
}

pub(crate) fn outage_fails_only_the_batches_within_it(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(
        &[Agent::named(AGENT).in_processes()],
        &Behaviour::greets_briefly(),
    )?;
    let dir = DaemonDir::new()?;
    let settings = Settings::new(stack)
        .behaviour(&Behaviour::greets_briefly())
        .set("schedule.every", format!("{INTERVAL}s"))
        .set("batch.rooms", 2)
        .set("batch.hold", "1s")
        .set("batch.ramp", "interval")
        .set("deadlines.join", "6s")
        .set("late_agent_window", "5s");
    dir.write(&settings.text())?;
    let daemon = dir.start()?;
    let target = [("target", "scenario")];
    let first = daemon
        .scrape()?
        .sum("next_batch_timestamp_seconds", &target)?;

    wait_for_batches(&daemon, 2.0, SHORT_TIMEOUT)?;
    let before = daemon.scrape()?.sum("batches_total", &target)?;
    let begin = freeze(&stack.workers[0])?;
    // The current batch may be partly within the outage. The next one is entirely.
    wait_for_batches(&daemon, before + 2.0, Duration::from_mins(1))?;
    let last = Utc::now();
    let end = thaw(stack)?;
    // The current batch, and two that begin after it.
    let before = daemon.scrape()?.sum("batches_total", &target)?;
    wait_for_batches(&daemon, before + 3.0, Duration::from_mins(1))?;
    daemon.pause()?;

    let metrics = daemon.scrape()?;
    let batches = daemon.all_batches("scenario")?;
    expect_equal(&metrics, TARGET, &batches)?;
    let (mut within, mut outside) = (0, 0);
    for batch in &batches {
        let verdicts = batch.probes.iter().map(|probe| probe.reason.as_deref());
        let wanted = if batch.started_at > begin && batch.ended_at < last {
            within += 1;
            Some("dispatch_unanswered")
        } else if batch.ended_at < begin || batch.started_at > end {
            outside += 1;
            None
        } else {
            continue;
        };
        let as_wanted = verdicts.clone().all(|verdict| verdict == wanted);
        ensure!(
            as_wanted,
            "{begin} to {end}: expected {wanted:?}, seen {batch:?}"
        );
    }
    ensure!(
        within >= 1 && outside >= 3,
        "{within} within, {outside} outside"
    );

    let run = metrics.sum("batches_total", &target)?;
    let skipped = metrics.sum("batches_skipped_total", &target)?;
    let latest = metrics.sum("last_tick_timestamp_seconds", &target)?;
    let ticks = (latest - first) / INTERVAL + 1.0;
    ensure!(
        (ticks - run - skipped).abs() < 0.5,
        "{ticks} ticks, {run} run, {skipped} skipped"
    );

    let resumed = daemon.http.post("/api/v1/targets/scenario/resume")?;
    resumed.success()?;
    wait_for("rooms in flight", SHORT_TIMEOUT, || {
        let rooms = daemon.scrape()?.sum("rooms_in_flight", &target)?;
        Ok((rooms > 0.0).then_some(()))
    })?;
    daemon.terminate()?;
    let left = stack.api.rooms()?;
    ensure!(left.is_empty(), "left on the server: {left:?}");

    let database = Database::read(&dir.database())?;
    let opened: BTreeSet<_> = database.rooms.iter().map(|row| row.room.clone()).collect();
    let server = rooms_in_log(stack)?;
    ensure!(
        server == opened,
        "rooms of the server {server:?}, of the journal {opened:?}"
    );
    ensure!(
        database.unconfirmed().is_empty(),
        "not deleted by the journal: {:?}",
        database.unconfirmed()
    );
    for batch in &batches {
        for probe in batch.probes.iter().filter(|probe| probe.outcome == "ok") {
            let joined = stack
                .events()?
                .iter()
                .any(|event| event.room() == probe.room && event.name() == "connected");
            ensure!(joined, "no agent reported that it joined {}", probe.room);
        }
    }
    Ok(format!(
        "{within} within, {outside} outside, {ticks:.0} ticks = {run} run + {skipped} skipped, {} rooms",
        opened.len()
    ))
}

// --- a kill ---

/// The contents of a daemon's database.
struct Database {
    rooms: Vec<Row>,
    batches: i64,
}

#[derive(Debug)]
struct Row {
    room: String,
    /// Seconds of agent time that the budget counts.
    counted: i64,
    /// Whether the room is known to be deleted.
    gone: bool,
}

impl Database {
    /// Reads a copy of the database of a killed daemon: opening the original would repair it.
    fn of_killed(database: &Path) -> anyhow::Result<Self> {
        let copy = tempfile::tempdir()?;
        let folder = database.parent().context("it has a folder")?;
        for file in fs::read_dir(folder)? {
            let file = file?;
            fs::copy(file.path(), copy.path().join(file.file_name()))?;
        }
        let name = database.file_name().context("it has a name")?;
        Self::read(&copy.path().join(name))
    }

    /// # Errors
    /// Also if the file is damaged, or if a batch lacks some of its probes.
    fn read(database: &Path) -> anyhow::Result<Self> {
        let database = Connection::open(database)?;
        let one = |query| database.query_row(query, [], |row| row.get::<_, i64>(0));
        let check: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        ensure!(check == "ok", "{check}");
        let incomplete = one("SELECT count(*) FROM batches WHERE ok + failed + aborted <>
             (SELECT count(*) FROM probes WHERE batch = batches.id)")?;
        ensure!(incomplete == 0, "{incomplete} batches lack probes");
        let mut rooms = database
            .prepare("SELECT room, coalesce(settled, reserved), gone_at IS NOT NULL FROM rooms")?;
        let rooms = rooms.query_map([], |row| {
            Ok(Row {
                room: row.get(0)?,
                counted: row.get(1)?,
                gone: row.get(2)?,
            })
        })?;
        Ok(Self {
            rooms: rooms.collect::<Result<_, _>>()?,
            batches: one("SELECT count(*) FROM batches")?,
        })
    }

    /// Seconds of agent time that the budget counts.
    fn counted(&self) -> i64 {
        self.rooms.iter().map(|row| row.counted).sum()
    }

    /// The rooms that may still be on the server.
    fn unconfirmed(&self) -> Vec<&str> {
        let unconfirmed = self.rooms.iter().filter(|row| !row.gone);
        unconfirmed.map(|row| &*row.room).collect()
    }
}

pub(crate) fn killed_daemon_keeps_its_ledger_and_the_next_daemon_deletes_its_rooms(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets_briefly())?;
    let dir = DaemonDir::new()?;
    let budget = toml::Table::from_iter([("agent_time_per_day".to_owned(), "20h".into())]);
    let settings = Settings::new(stack)
        .behaviour(&Behaviour::greets_briefly())
        .project("budget", budget)
        .set("schedule.every", "5s")
        .set("batch.rooms", 2)
        .set("batch.hold", "1s")
        .set("late_agent_window", "5s");
    dir.write(&settings.text())?;
    let mut daemon = dir.start()?;
    let (mut swept, mut moments) = (BTreeSet::new(), Vec::new());
    for _ in 0..KILLS {
        let (database, moment) = kill_within_a_batch(daemon, stack, &dir)?;
        let left = database.unconfirmed();
        swept.extend(left.iter().map(|room| (*room).to_owned()));
        moments.push(moment.as_millis());
        daemon = dir.start()?;
        expect_restored(&daemon, &database)?;
        wait_for(
            "the sweep of the rooms of the killed daemon",
            SHORT_TIMEOUT,
            || {
                let rooms = stack.api.rooms()?;
                let remains = rooms.iter().any(|room| left.contains(&room.as_str()));
                Ok((!remains).then_some(()))
            },
        )?;
    }
    daemon.pause()?;
    // The janitor checks for a while whether a late agent has created a room again.
    wait_for("the journal to be empty", Duration::from_mins(1), || {
        let database = Database::read(&dir.database())?;
        Ok(database.unconfirmed().is_empty().then_some(()))
    })?;
    daemon.terminate()?;
    let left = stack.api.rooms()?;
    ensure!(left.is_empty(), "left on the server: {left:?}");
    Ok(format!(
        "killed {moments:?} ms into a batch, {} rooms swept, ledger complete",
        swept.len()
    ))
}

/// A daemon has read what the daemon before it had written.
fn expect_restored(daemon: &Daemon, database: &Database) -> anyhow::Result<()> {
    let metrics = daemon.scrape()?;
    ensure!(!metrics.flag("history_degraded")?, "degraded");
    let batches = i64::try_from(daemon.batches(TARGET)?.len())?;
    ensure!(
        batches >= database.batches,
        "{batches} batches of {}",
        database.batches
    );
    let used = counted(&metrics)?;
    ensure!(
        used >= seconds(database.counted()),
        "{used} s counted after a restart, {} s before",
        database.counted()
    );
    Ok(())
}

/// The agent time of today, in seconds: used and reserved.
fn counted(metrics: &Scrape) -> anyhow::Result<f64> {
    let today = |name| metrics.sum(name, &[("period", "day")]);
    Ok(today("agent_budget_used_seconds")? + today("agent_budget_reserved_seconds")?)
}

#[expect(clippy::cast_precision_loss, reason = "at most the seconds of a day")]
fn seconds(counted: i64) -> f64 {
    counted as f64
}

/// Kills a daemon at a random moment of a batch. Returns its database, and the time since the start of the batch.
fn kill_within_a_batch(
    daemon: Daemon,
    stack: &Stack,
    dir: &DaemonDir,
) -> anyhow::Result<(Database, Duration)> {
    wait_for("a batch to begin", SHORT_TIMEOUT, || {
        let mut targets = daemon.targets()?.into_iter();
        Ok(targets.find_map(|target| target.running))
    })?;
    let begun = Instant::now();
    // A batch takes about three seconds: two joins, the hold, two deletions.
    let moment = Duration::from_millis(fastrand::u64(0..3500));
    let mut reported = 0.0_f64;
    while begun.elapsed() < moment {
        let metrics = daemon.scrape()?;
        reported = counted(&metrics)?;
        thread::sleep(Duration::from_millis(20));
    }
    daemon.signal(Signal::KILL)?;
    daemon.finish()?;

    let database = Database::of_killed(&dir.database())?;
    // The metrics count a reservation as soon as it is requested. The room opens after the reservation is on the disk. The daemon
    // requests one reservation at a time.
    ensure!(
        seconds(database.counted()) >= reported - MAX_RESERVED,
        "{} s in the ledger, {reported} s reported before the kill",
        database.counted()
    );
    let journalled = |room: &str| database.rooms.iter().find(|row| row.room == room);
    for room in stack.api.rooms()? {
        ensure!(
            journalled(&room).is_some(),
            "{room} is open and not in the journal"
        );
    }
    for event in stack.events()? {
        if event.name() == "connected" && event.room().starts_with("canary-") {
            let row = journalled(event.room()).with_context(|| event.room().to_owned())?;
            ensure!(
                seconds(row.counted) >= MIN_BILLED,
                "an agent joined, but {row:?}"
            );
        }
    }
    Ok((database, moment))
}

// --- Prometheus ---

/// A Prometheus that scrapes one daemon every second.
struct Prometheus {
    http: HttpClient,
    _process: Process,
}

impl Prometheus {
    fn start(dir: &Path, daemon: SocketAddr) -> anyhow::Result<Self> {
        let port = free_ports()?;
        let config = dir.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
- job_name: canary
  static_configs:
  - targets: ['{daemon}']
"
        );
        fs::write(&config, text)?;
        let mut prometheus = command("prometheus");
        prometheus
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::spawn("prometheus", prometheus, dir)?;
        let http = HttpClient::new(([127, 0, 0, 1], port).into());
        wait_for("Prometheus to be ready", SHORT_TIMEOUT, || {
            Ok(http.text("/-/ready").ok())
        })?;
        Ok(Self {
            http,
            _process: process,
        })
    }

    /// The last samples of the daemon.
    fn last_scrape(&self) -> anyhow::Result<Scrape> {
        // {job="canary"}
        let response: Value = self
            .http
            .json("/api/v1/query?query=%7Bjob%3D%22canary%22%7D")?;
        let result = response["data"]["result"].as_array().context("no result")?;
        let samples = result.iter().map(|one| {
            let labels = one["metric"].as_object().context("no labels")?;
            let name = labels["__name__"].as_str().context("no name")?;
            let value = one["value"][1].as_str().context("no value")?;
            let labels = labels.iter().map(|(label, value)| {
                let value = value.as_str().context("not a string")?;
                Ok((label.clone(), value.to_owned()))
            });
            Ok(Sample {
                name: name.to_owned(),
                labels: labels.collect::<anyhow::Result<_>>()?,
                value: value.to_owned(),
            })
        });
        Ok(Scrape {
            families: Vec::new(),
            samples: samples.collect::<anyhow::Result<_>>()?,
        })
    }
}

/// `promtool` finds nothing wrong with these metrics.
fn lint(metrics: &str) -> anyhow::Result<()> {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool")?;
    let mut input = promtool.stdin.take().context("piped")?;
    input.write_all(metrics.as_bytes())?;
    drop(input);
    let output = promtool.wait_with_output()?;
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    ensure!(
        output.status.success() && printed.is_empty(),
        "promtool: {printed}"
    );
    Ok(())
}

pub(crate) fn prometheus_has_the_same_counts_as_the_history(_: &Fixture) -> anyhow::Result<String> {
    let dir = DaemonDir::new()?;
    let prometheus_dir = tempfile::tempdir()?;
    let sandbox = Stack::sandbox(AGENT, &[])?;
    dir.write(&many_targets(&sandbox, TARGETS, "1s"))?;
    let daemon = dir.start()?;
    lint(&daemon.http.text("/metrics")?)?;
    let prometheus = Prometheus::start(prometheus_dir.path(), daemon.http.address)?;

    wait_for_batches(&daemon, MANY_BATCHES / 2.0, Duration::from_mins(2))?;
    for targets in [TARGETS + 1, TARGETS, TARGETS + 1, TARGETS] {
        dir.write(&many_targets(&sandbox, targets, "1s"))?;
        daemon.http.post("/-/reload")?.success()?;
        lint(&daemon.http.text("/metrics")?)?;
    }
    wait_for_batches(&daemon, MANY_BATCHES, Duration::from_mins(2))?;
    lint(&daemon.http.text("/metrics")?)?;
    daemon.pause()?;

    let mut probes = 0;
    for target in daemon.targets()? {
        let batches = daemon.all_batches(&target.name)?;
        expect_equal(&daemon.scrape()?, &target.name, &batches)?;
        probes += batches
            .iter()
            .map(|batch| batch.probes.len())
            .sum::<usize>();
        let mut equal = Ok(());
        let scraped = wait_for(
            "a scrape after the last batch",
            Duration::from_secs(10),
            || {
                equal = expect_equal(&prometheus.last_scrape()?, &target.name, &batches);
                Ok(equal.is_ok().then_some(()))
            },
        );
        if scraped.is_err() {
            equal.context("Prometheus")?;
        }
    }
    daemon.terminate()?;
    Ok(format!(
        "{probes} probes of {TARGETS} targets, promtool found nothing"
    ))
}

// --- a frozen canary ---

/// Longer than every deadline, and than the scheduler may be silent.
const FREEZE: Duration = Duration::from_secs(33);

pub(crate) fn frozen_daemon_blames_itself_and_goes_on(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets_briefly())?;
    let dir = DaemonDir::new()?;
    let settings = Settings::new(stack)
        .behaviour(&Behaviour::greets_briefly())
        .set("schedule.every", "30d")
        .set("batch.hold", "8s")
        .set("late_agent_window", "20s");
    dir.write(&settings.text())?;
    let daemon = dir.start()?;
    let batch_id = daemon.start_batch(TARGET)?;
    daemon.wait_for("the room", || Ok(stack.api.rooms()?.pop()))?;
    daemon.signal(Signal::STOP)?;
    thread::sleep(FREEZE);
    daemon.signal(Signal::CONT)?;
    let batch = daemon.wait_for_batch(&batch_id)?;
    let probe = &batch["probes"][0];
    let (reason, detail) = (&probe["reason"], &probe["detail"]);
    ensure!(reason == "internal", "{probe}");
    let detail = detail.as_str().unwrap_or_default();
    ensure!(detail.contains("did not run for 3"), "{detail}");
    ensure!(probe["join_delay_seconds"].is_null(), "{probe}");
    let metrics = daemon.scrape()?;
    let eligible = metrics.count("slo_eligible_total", &[("target", TARGET)])?;
    ensure!(eligible == 0, "{eligible} probes count");
    // The scheduler lives: a schedule of a few seconds starts the next batch.
    let settings = settings.set("schedule.every", "3s");
    dir.write(&settings.text())?;
    daemon.http.post("/-/reload")?.success()?;
    wait_for_batches(&daemon, 2.0, Duration::from_mins(2))?;
    daemon.pause()?;
    let next = daemon.all_batches(TARGET)?.pop().context("no batch")?;
    ensure!(next.result == "ok", "{next:?}");
    wait_for("the rooms to be gone", Duration::from_mins(1), || {
        Ok(stack.api.rooms()?.is_empty().then_some(()))
    })?;
    daemon.terminate()?;
    Ok(format!("{detail}; then ok"))
}

// --- a server that crashes ---

/// The agent's SDK connects again to a server that is back within seconds, with a token that creates the missing room.
pub(crate) fn room_that_an_agent_re_creates_after_a_server_crash_is_deleted(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets_briefly())?;
    let dir = DaemonDir::new()?;
    let settings = Settings::new(stack)
        .behaviour(&Behaviour::greets_briefly())
        .set("schedule.every", "30d")
        .set("batch.rooms", 3)
        .set("batch.hold", "40s")
        .without("late_agent_window");
    dir.write(&settings.text())?;
    let daemon = dir.start()?;
    let batch_id = daemon.start_batch(TARGET)?;
    let greeted = |count: usize| {
        wait_for("the greetings", SHORT_TIMEOUT, || {
            let events = stack.events()?;
            let greeted = events.iter().filter(|event| event.name() == "greeted");
            Ok((greeted.count() >= count).then_some(()))
        })
    };
    greeted(3)?;
    stack.server.signal(Signal::KILL)?;
    let _server = stack.restarted_server()?;
    let batch = daemon.wait_for_batch(&batch_id)?;
    let probes = batch["probes"].as_array().context("no probes")?;
    let lost = probes.iter().all(|probe| probe["reason"] == "signal_lost");
    ensure!(lost, "{batch}");
    // As long as LiveKit's SDK tries to connect again, and some more.
    let end = Instant::now() + Duration::from_secs(75);
    let mut returned = BTreeSet::new();
    while Instant::now() < end {
        returned.extend(stack.api.rooms()?);
        thread::sleep(Duration::from_millis(250));
    }
    let left = stack.api.rooms()?;
    ensure!(left.is_empty(), "{left:?} of {returned:?} are left");
    let leaked = daemon
        .scrape()?
        .sum("rooms_leaked_total", &[("target", TARGET)])?;
    ensure!(leaked < 0.5, "{leaked} rooms leaked");
    daemon.terminate()?;
    Ok(format!(
        "3 signal_lost, {} rooms came back, none is left",
        returned.len()
    ))
}
