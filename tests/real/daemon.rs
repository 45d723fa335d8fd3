//! Scenarios of the daemon: what it counts through an outage, what a killed one leaves, what Prometheus makes of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use chrono::{DateTime, Utc};
use rusqlite::Connection;
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::Instant;

use crate::canary::{Probe, Settings};
use crate::home::{Daemon, Home, Http, Recorded, SOON, Sample, Samples, many_targets};
use crate::order::Order;
use crate::scenarios::Ground;
use crate::stack::{AGENT, Agent, Process, Site, command, free_ports, wait_for};

/// Seconds from tick to tick where a scenario counts them.
const EVERY: f64 = 4.0;
/// Moments at which a daemon is killed.
const KILLS: usize = 3;
/// Seconds of agent time that a room of theirs asks for: sessions are billed by the minute.
const ROOM: f64 = 60.0;
/// Batches after which the metrics are checked once more.
const MANY: f64 = 200.0;
const TARGETS: usize = 8;

/// Compares counters since zero with the history, one by one.
fn agree(samples: &Samples, target: &str, batches: &[Recorded]) -> anyhow::Result<()> {
    let probes: Vec<_> = batches.iter().flat_map(|batch| &batch.probes).collect();
    let expect = |name: &str, labels: &[(&str, &str)], kept: u64| {
        let labels = [labels, &[("target", target)]].concat();
        let counted = samples.sum(name, &labels)?;
        #[expect(clippy::cast_precision_loss, reason = "counts of a minute")]
        let kept = kept as f64;
        let same = (counted - kept).abs() < 0.5;
        ensure!(same, "{name} {labels:?}: {counted} counted, {kept} kept");
        anyhow::Ok(())
    };
    let probes_with = |wanted: &dyn Fn(&Probe) -> bool| {
        let found = probes.iter().filter(|probe| wanted(probe));
        found.count() as u64
    };
    for result in ["ok", "degraded", "failed", "limited", "aborted"] {
        let kept = batches.iter().filter(|batch| batch.result == result);
        expect("batches_total", &[("result", result)], kept.count() as u64)?;
    }
    let aborted = probes_with(&|probe| probe.outcome == "aborted");
    expect("probes_aborted_total", &[], aborted)?;
    expect("probes_total", &[], probes.len() as u64 - aborted)?;
    let failed = probes_with(&|probe| probe.reason.is_some());
    expect("probe_failures_total", &[], failed)?;
    for reason in probes.iter().filter_map(|probe| probe.reason.as_deref()) {
        let kept = probes_with(&|probe| probe.reason.as_deref() == Some(reason));
        expect("probe_failures_total", &[("reason", reason)], kept)?;
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

/// A short greeting, so that a batch is short.
fn order() -> Order {
    Order::greets().with("seconds", 0.3)
}

// --- an outage ---

fn freeze(worker: &Process) -> anyhow::Result<DateTime<Utc>> {
    worker.signal(Signal::STOP)?;
    Ok(Utc::now())
}

/// Wakes the worker, and waits until it takes jobs again.
fn thaw(site: &Site) -> anyhow::Result<DateTime<Utc>> {
    site.workers[0].signal(Signal::CONT)?;
    for attempt in 0..20 {
        let room = format!("awake-{attempt}");
        site.api
            .dispatch(&room, AGENT, r#"{"behaviour": "nothing"}"#)?;
        let came = site.wait_for_event("a job", Duration::from_secs(2), |event| {
            event.room() == room
        });
        site.api.delete_room(&room)?;
        if came.is_ok() {
            return Ok(Utc::now());
        }
    }
    bail!("the worker never woke\n{}", site.logs())
}

/// Every room of the canary's that the server's log tells of.
fn rooms_of_log(site: &Site) -> anyhow::Result<BTreeSet<String>> {
    let log = site.server.log()?;
    let rooms = log.split("\"room\": \"").skip(1);
    let rooms = rooms.filter_map(|rest| rest.split('"').next());
    let ours = rooms.filter(|room| room.starts_with("canary-"));
    Ok(ours.map(str::to_owned).collect())
}

/// So many batches have ended in all.
fn wait_for_batches(daemon: &Daemon, count: f64, limit: Duration) -> anyhow::Result<()> {
    wait_for("more batches", limit, || {
        let ended = daemon.metrics()?.sum("batches_total", &[])?;
        Ok((ended >= count).then_some(()))
    })
}

pub fn outage_fails_the_batches_within_it_and_no_other(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &order())?;
    let home = Home::new()?;
    let settings = Settings::new(site)
        .order(&order())
        .set("schedule.every", format!("{EVERY}s"))
        .set("batch.rooms", 2)
        .set("batch.hold", "1s")
        .set("batch.ramp", "interval")
        .set("deadlines.join", "6s")
        .set("late_agent_window", "5s");
    home.write(&settings.text())?;
    let daemon = home.start()?;
    let target = [("target", "scenario")];
    let first = daemon
        .metrics()?
        .sum("next_batch_timestamp_seconds", &target)?;

    wait_for_batches(&daemon, 2.0, SOON)?;
    let before = daemon.metrics()?.sum("batches_total", &target)?;
    let begin = freeze(&site.workers[0])?;
    // The batch under way may be on the edge; one more lies within.
    wait_for_batches(&daemon, before + 2.0, Duration::from_mins(1))?;
    let last = Utc::now();
    let end = thaw(site)?;
    // The batch under way, and two that begin after it.
    let before = daemon.metrics()?.sum("batches_total", &target)?;
    wait_for_batches(&daemon, before + 3.0, Duration::from_mins(1))?;
    daemon.pause()?;

    let metrics = daemon.metrics()?;
    let batches = daemon.all_batches("scenario")?;
    agree(&metrics, "scenario", &batches)?;
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
        ensure!(as_wanted, "{begin} to {end}: {wanted:?} and not {batch:?}");
    }
    ensure!(
        within >= 1 && outside >= 3,
        "{within} within, {outside} outside"
    );

    let run = metrics.sum("batches_total", &target)?;
    let skipped = metrics.sum("batches_skipped_total", &target)?;
    let latest = metrics.sum("last_tick_timestamp_seconds", &target)?;
    let ticks = (latest - first) / EVERY + 1.0;
    ensure!(
        (ticks - run - skipped).abs() < 0.5,
        "{ticks} ticks, {run} run, {skipped} skipped"
    );

    daemon.http.post("/api/v1/targets/scenario/resume")?;
    wait_for("rooms in flight", SOON, || {
        let rooms = daemon.metrics()?.sum("rooms_in_flight", &target)?;
        Ok((rooms > 0.0).then_some(()))
    })?;
    let finished = daemon.terminate()?;
    ensure!(finished.code == Some(0), "{}", finished.all());
    let left = site.api.rooms()?;
    ensure!(left.is_empty(), "left on the server: {left:?}");

    let book = Book::read(&home.database())?;
    let opened: BTreeSet<_> = book.rooms.iter().map(|row| row.room.clone()).collect();
    let server = rooms_of_log(site)?;
    ensure!(
        server == opened,
        "the server saw {server:?}, the journal {opened:?}"
    );
    ensure!(
        book.left().is_empty(),
        "still in the journal: {:?}",
        book.left()
    );
    for batch in &batches {
        for probe in batch.probes.iter().filter(|probe| probe.outcome == "ok") {
            let joined = site
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

/// What is in a daemon's database.
struct Book {
    rooms: Vec<Row>,
    batches: i64,
}

#[derive(Debug)]
struct Row {
    room: String,
    /// Seconds of agent time that the budget counts.
    counted: i64,
    gone: bool,
}

impl Book {
    /// Of a killed daemon, from a copy: whoever opens the original repairs it.
    fn of_killed(database: &Path) -> anyhow::Result<Self> {
        let copy = tempfile::tempdir()?;
        let folder = database.parent().context("it lies in a folder")?;
        for file in fs::read_dir(folder)? {
            let file = file?;
            fs::copy(file.path(), copy.path().join(file.file_name()))?;
        }
        let name = database.file_name().context("it has a name")?;
        Self::read(&copy.path().join(name))
    }

    /// # Errors
    /// Also where the file is damaged, or a batch lacks some of its probes.
    fn read(database: &Path) -> anyhow::Result<Self> {
        let database = Connection::open(database)?;
        let one = |query| database.query_row(query, [], |row| row.get::<_, i64>(0));
        let checked: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        ensure!(checked == "ok", "{checked}");
        let torn = one("SELECT count(*) FROM batches WHERE ok + failed + aborted <>
             (SELECT count(*) FROM probes WHERE batch = batches.id)")?;
        ensure!(torn == 0, "{torn} batches lack probes");
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

    /// Rooms that nobody vouched for.
    fn left(&self) -> Vec<&str> {
        let left = self.rooms.iter().filter(|row| !row.gone);
        left.map(|row| &*row.room).collect()
    }
}

pub fn killed_daemon_loses_no_ledger_and_the_next_deletes_its_rooms(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &order())?;
    let home = Home::new()?;
    let budget = toml::Table::from_iter([("agent_time_per_day".to_owned(), "20h".into())]);
    let settings = Settings::new(site)
        .order(&order())
        .project("budget", budget)
        .set("schedule.every", "5s")
        .set("batch.rooms", 2)
        .set("batch.hold", "1s")
        .set("late_agent_window", "5s");
    home.write(&settings.text())?;
    let mut daemon = home.start()?;
    let (mut left, mut moments) = (BTreeSet::new(), Vec::new());
    for _ in 0..KILLS {
        let (book, moment) = kill_within_a_batch(daemon, site, &home)?;
        left.extend(book.left().into_iter().map(str::to_owned));
        moments.push(moment.as_millis());
        daemon = home.start()?;
        expect_restored(&daemon, &book)?;
        wait_for("the sweep of what the killed one left", SOON, || {
            let there = site.api.rooms()?;
            let swept = !book
                .left()
                .iter()
                .any(|left| there.iter().any(|room| room == left));
            Ok(swept.then_some(()))
        })?;
    }
    daemon.pause()?;
    // A late agent would bring a room back, so each is watched for a while.
    wait_for("the journal to be empty", Duration::from_mins(1), || {
        let book = Book::read(&home.database())?;
        Ok(book.left().is_empty().then_some(()))
    })?;
    let finished = daemon.terminate()?;
    ensure!(finished.code == Some(0), "{}", finished.all());
    let there = site.api.rooms()?;
    ensure!(there.is_empty(), "left on the server: {there:?}");
    Ok(format!(
        "killed {moments:?} ms into a batch, {} rooms swept, ledger whole",
        left.len()
    ))
}

/// A daemon knows what the one before it had on disk.
fn expect_restored(daemon: &Daemon, book: &Book) -> anyhow::Result<()> {
    let metrics = daemon.metrics()?;
    ensure!(metrics.number("history_degraded")? < 0.5, "degraded");
    let kept = i64::try_from(daemon.batches("scenario")?.len())?;
    ensure!(
        kept >= book.batches,
        "{kept} batches kept of {}",
        book.batches
    );
    let used = metrics.sum("agent_budget_used_seconds", &[("period", "day")])?;
    ensure!(
        used >= seconds(book.counted()),
        "{used} s counted after a restart, {} s before",
        book.counted()
    );
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "at most the seconds of a day")]
fn seconds(counted: i64) -> f64 {
    counted as f64
}

/// Kills a daemon at a random moment of a batch. What it left, and how long after the batch's start that was.
fn kill_within_a_batch(
    daemon: Daemon,
    site: &Site,
    home: &Home,
) -> anyhow::Result<(Book, Duration)> {
    wait_for("a batch to begin", SOON, || {
        let running = daemon.targets()?.into_iter().find_map(|now| now.running);
        Ok(running)
    })?;
    let begun = Instant::now();
    // Two rooms, each until its agent joined, the hold, two deletions: some three seconds.
    let moment = Duration::from_millis(fastrand::u64(0..3500));
    let mut told = 0.0_f64;
    while begun.elapsed() < moment {
        let metrics = daemon.metrics()?;
        told = metrics.sum("agent_budget_used_seconds", &[("period", "day")])?;
        thread::sleep(Duration::from_millis(20));
    }
    daemon.running.signal(Signal::KILL)?;
    daemon.running.finish()?;

    let book = Book::of_killed(&home.database())?;
    // What a room may use is told as soon as it is asked for, and the room opens once the disk has it. One is asked for at a
    // time.
    ensure!(
        seconds(book.counted()) >= told - ROOM,
        "{} s in the ledger, {told} s told before the kill",
        book.counted()
    );
    let journalled = |room: &str| book.rooms.iter().find(|row| row.room == room);
    for room in site.api.rooms()? {
        ensure!(
            journalled(&room).is_some(),
            "{room} is open and in no journal"
        );
    }
    for event in site.events()? {
        if event.name() == "connected" && event.room().starts_with("canary-") {
            let row = journalled(event.room()).with_context(|| event.room().to_owned())?;
            ensure!(seconds(row.counted) >= ROOM, "an agent came, but {row:?}");
        }
    }
    Ok((book, moment))
}

// --- Prometheus ---

/// A Prometheus that scrapes one daemon every second.
struct Prometheus {
    http: Http,
    _process: Process,
}

impl Prometheus {
    fn start(dir: &Path, daemon: u16) -> anyhow::Result<Self> {
        let port = free_ports()?;
        let config = dir.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
- job_name: canary
  static_configs:
  - targets: ['127.0.0.1:{daemon}']
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
        let http = Http::new(port);
        wait_for("Prometheus to be ready", SOON, || {
            Ok(http.get("/-/ready").ok())
        })?;
        Ok(Self {
            http,
            _process: process,
        })
    }

    /// All that it last saw of the daemon.
    fn samples(&self) -> anyhow::Result<Samples> {
        // {job="canary"}
        let answer: Value = self
            .http
            .json("/api/v1/query?query=%7Bjob%3D%22canary%22%7D")?;
        let result = answer["data"]["result"].as_array().context("no result")?;
        let samples = result.iter().map(|one| {
            let labels = one["metric"].as_object().context("no labels")?;
            let name = labels["__name__"].as_str().context("no name")?;
            let labels: Vec<_> = labels
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            let value = one["value"][1].as_str().context("no value")?;
            Ok(Sample {
                series: format!("{name}{{{}}}", labels.join(",")),
                value: value.parse()?,
            })
        });
        Ok(Samples(samples.collect::<anyhow::Result<_>>()?))
    }
}

/// What `promtool` has to say to metrics: nothing, where they are as they should be.
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
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(
        output.status.success() && said.is_empty(),
        "promtool: {said}"
    );
    Ok(())
}

pub fn prometheus_holds_what_the_history_holds(_: &Ground) -> anyhow::Result<String> {
    let home = Home::new()?;
    let dir = tempfile::tempdir()?;
    let sandbox = Site::sandbox(AGENT, &[])?;
    home.write(&many_targets(&sandbox, TARGETS, "1s"))?;
    let daemon = home.start()?;
    lint(&daemon.http.get("/metrics")?)?;
    let prometheus = Prometheus::start(dir.path(), home.port)?;

    wait_for_batches(&daemon, MANY / 2.0, Duration::from_mins(2))?;
    for targets in [TARGETS + 1, TARGETS, TARGETS + 1, TARGETS] {
        home.write(&many_targets(&sandbox, targets, "1s"))?;
        daemon.http.post("/-/reload")?;
        lint(&daemon.http.get("/metrics")?)?;
    }
    wait_for_batches(&daemon, MANY, Duration::from_mins(2))?;
    lint(&daemon.http.get("/metrics")?)?;
    daemon.pause()?;

    let mut probes = 0;
    for target in daemon.targets()? {
        let batches = daemon.all_batches(&target.name)?;
        agree(&daemon.metrics()?, &target.name, &batches)?;
        probes += batches
            .iter()
            .map(|batch| batch.probes.len())
            .sum::<usize>();
        let mut seen = Ok(());
        let scraped = wait_for("a scrape of the end", Duration::from_secs(10), || {
            seen = agree(&prometheus.samples()?, &target.name, &batches);
            Ok(seen.is_ok().then_some(()))
        });
        if scraped.is_err() {
            seen.context("Prometheus")?;
        }
    }
    let finished = daemon.terminate()?;
    ensure!(finished.code == Some(0), "{}", finished.all());
    Ok(format!(
        "{probes} probes of {TARGETS} targets, promtool content"
    ))
}
