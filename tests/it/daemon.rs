//! `run` against the sandbox, as an operator sees it: signals, the settings file, HTTP and the log.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use livekit_canary::sandbox::SandboxSettings;
use rustix::process::Signal;
use serde_json::Value;
use support::SECRET;
use support::daemon::{Daemon, DaemonDir};
use support::scrape::{Scrape, whole};

use crate::sandbox::SandboxThread;
use crate::{canary, in_parallel};

/// The schedule starts no batch during a test, unless the test changes it.
const SETTINGS: &[(&str, &str)] = &[
    ("http.listen", "127.0.0.1:0"),
    ("lifetime.startup_delay", "1h"),
    ("lifetime.drain_grace", "10m"),
    ("lifetime.shutdown_linger", "0s"),
    ("projects.main.api_key", "devkey"),
    ("projects.main.api_secret_file", "secret"),
    ("projects.main.api_timeout", "3s"),
    ("targets.demo.agent_name", "demo"),
    ("targets.demo.late_agent_window", "0s"),
    ("targets.demo.schedule.every", "30d"),
    ("targets.demo.batch.rooms", "1"),
    ("targets.demo.batch.hold", "100ms"),
    ("targets.demo.deadlines.signal", "5s"),
    ("targets.demo.deadlines.media", "8s"),
    ("targets.demo.deadlines.join", "8s"),
    ("targets.demo.deadlines.track", "2s"),
    ("targets.demo.deadlines.speech", "8s"),
    ("targets.demo.deadlines.cleanup", "3s"),
];

/// A sandbox, and the folder with the settings and the state of a daemon that calls it.
struct Fixture {
    sandbox: SandboxThread,
    dir: DaemonDir,
    settings: BTreeMap<String, String>,
}

impl Fixture {
    fn new(faults: &[&str], settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let sandbox = SandboxThread::start(SandboxSettings {
            api_secret: SECRET.into(),
            faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
            ..SandboxSettings::default()
        });
        let dir = DaemonDir::new()?;
        std::fs::write(dir.path().join("secret"), SECRET)?;
        let url = ("projects.main.url", sandbox.url.as_str());
        let all = SETTINGS.iter().chain([&url]).chain(settings);
        let settings = all.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let fixture = Self {
            settings: settings.collect(),
            sandbox,
            dir,
        };
        fixture.write()?;
        Ok(fixture)
    }

    fn set(&mut self, key: &str, value: &str) -> anyhow::Result<()> {
        self.settings.insert(key.to_owned(), value.to_owned());
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        let lines = self.settings.iter().map(|(key, value)| {
            if value.parse::<u32>().is_ok() {
                format!("{key} = {value}\n")
            } else {
                format!("{key} = {value:?}\n")
            }
        });
        self.dir.write_file(&lines.collect::<String>())
    }

    /// Starts a batch of one room, and waits for the room.
    fn start_batch(&self, daemon: &Daemon) -> anyhow::Result<String> {
        let batch_id = daemon.start_batch("demo")?;
        daemon.wait_for("a room", || Ok(self.sandbox.handle.rooms().pop()))?;
        Ok(batch_id)
    }

    fn expect_no_rooms(&self) {
        assert_eq!(self.sandbox.handle.rooms(), [""; 0]);
    }
}

/// Runs a batch, and returns its JSON.
fn run_batch(daemon: &Daemon, target: &str) -> anyhow::Result<Value> {
    daemon.wait_for_batch(&daemon.start_batch(target)?)
}

/// The status of a target; null if there is no such target.
fn target(daemon: &Daemon, name: &str) -> anyhow::Result<Value> {
    let status: Value = daemon.http.json("/api/v1/targets")?;
    let mut targets = status["targets"].as_array().context("no targets")?.iter();
    let target = targets.find(|target| target["name"] == name);
    Ok(target.cloned().unwrap_or_default())
}

/// Waits until a daemon that is shutting down has no batch. It still responds until the end of `shutdown_linger`.
fn wait_for_drained(daemon: &Daemon) -> anyhow::Result<()> {
    daemon.wait_for("the end of the drain", || {
        let status: Value = daemon.http.json("/api/v1/targets")?;
        let mut targets = status["targets"].as_array().context("no targets")?.iter();
        let drained =
            status["stage"] == "draining" && targets.all(|target| target["running"].is_null());
        Ok(drained.then_some(()))
    })
}

/// A count of the target `demo`.
fn count(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<u64> {
    scrape.count(name, &[&[("target", "demo")], labels].concat())
}

/// The status of a response to POST.
fn post(daemon: &Daemon, path: &str) -> anyhow::Result<u16> {
    Ok(daemon.http.post(path)?.status)
}

fn is_ready(daemon: &Daemon) -> anyhow::Result<u16> {
    Ok(daemon.http.get("/-/ready")?.status)
}

#[test]
fn only_failed_calls_are_recorded_if_the_target_says_so() -> anyhow::Result<()> {
    let settings = [
        ("targets.demo.record.audio", "failures"),
        ("targets.demo.batch.rooms", "2"),
        ("targets.demo.confirm.rooms", "0"),
        ("targets.demo.expect.reply", "false"),
    ];
    let mut fixture = Fixture::new(&["room2:silent_track"], &settings)?;
    let folder = fixture.dir.path().join("state/recordings");
    let daemon = fixture.dir.start()?;
    let batch = run_batch(&daemon, "demo")?;
    let [good, silent] = &batch["probes"].as_array().context("no probes")?[..] else {
        panic!("{batch:#?}");
    };
    assert_eq!(good["outcome"], "ok", "{batch:#?}");
    assert_eq!(silent["reason"], "agent_silent", "{batch:#?}");
    assert!(good["recording"].is_null() && good["waveform"].is_object());
    let room = silent["room"].as_str().context("no room")?;
    let recording = &silent["recording"];
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap();
        let track = name
            .strip_prefix(room)
            .and_then(|track| track.strip_suffix(".ogg"));
        let track = track.with_context(|| format!("{name} is not of room {room}"))?;
        let bytes = &recording[&track[1..]]["bytes"];
        assert_eq!(entry.metadata()?.len(), bytes.as_u64().context("no bytes")?);
        names.push(name);
    }
    assert_eq!(names.len(), 2, "{names:?}");
    let audio = |room: &Value, track: &str| {
        let path = format!(
            "/api/v1/probes/{}/audio/{track}.ogg",
            room.as_str().unwrap()
        );
        daemon.http.status(&path)
    };
    assert_eq!(audio(&silent["room"], "agent")?, 200);
    assert_eq!(audio(&silent["room"], "caller")?, 200);
    assert_eq!(audio(&good["room"], "agent")?, 404);
    daemon.terminate()?;

    // The next run keeps it, and a file without a probe goes.
    std::fs::write(folder.join("canary-orphan.agent.ogg"), "")?;
    fixture.set("targets.demo.record.audio", "never")?;
    let daemon = fixture.dir.start()?;
    daemon.wait_for("the sweep", || {
        let orphan = folder.join("canary-orphan.agent.ogg");
        Ok((!orphan.exists()).then_some(()))
    })?;
    run_batch(&daemon, "demo")?;
    assert_eq!(std::fs::read_dir(&folder)?.count(), 2);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn counters_of_scheduled_batches_equal_the_history_and_the_rooms_of_the_server()
-> anyhow::Result<()> {
    let settings = [
        ("lifetime.startup_delay", "2s"),
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.schedule.every", "2s"),
        ("targets.demo.batch.rooms", "2"),
        ("targets.demo.batch.hold", "1s"),
    ];
    let fixture = Fixture::new(&["room2:no_track"], &settings)?;
    let daemon = fixture.dir.start()?;
    let next_batch = |scrape: &Scrape| {
        let labels = [("target", "demo")];
        scrape.sum("next_batch_timestamp_seconds", &labels)
    };
    // The first tick is not on the grid. What follows it may be handled before this scrape, and is skipped then.
    let first = next_batch(&daemon.scrape()?)?;
    let (on_grid, handled) = daemon.wait_for("the first tick", || {
        let scrape = daemon.scrape()?;
        let next = next_batch(&scrape)?;
        let handled = 1 + count(&scrape, "batches_skipped_total", &[])?;
        Ok((next > first).then_some((next, handled)))
    })?;
    daemon.wait_for("two batches and a skipped tick", || {
        let scrape = daemon.scrape()?;
        let enough = count(&scrape, "batches_total", &[])? >= 2
            && count(&scrape, "batches_skipped_total", &[("cause", "overlap")])? >= 1;
        Ok(enough.then_some(()))
    })?;
    daemon.signal(Signal::TERM)?;
    wait_for_drained(&daemon)?;

    let scrape = daemon.scrape()?;
    let run = count(&scrape, "batches_total", &[])?;
    // The history is written a moment after the counters.
    let batches = daemon.wait_for("as many batches in the history", || {
        let listed: Value = daemon.http.json("/api/v1/batches?limit=199")?;
        let batches = listed["batches"].as_array().unwrap().clone();
        Ok((batches.len() as u64 == run).then_some(batches))
    })?;
    let total = |key: &str| -> u64 {
        let of_each = batches
            .iter()
            .map(|batch| batch["summary"][key].as_u64().unwrap());
        of_each.sum()
    };
    let (ok, failed, aborted) = (total("ok"), total("failed"), total("aborted"));
    assert_eq!(count(&scrape, "probes_total", &[])?, ok + failed);
    assert_eq!(count(&scrape, "probes_aborted_total", &[])?, aborted);
    assert_eq!(fixture.sandbox.handle.rooms_seen(), ok + failed + aborted);
    assert_eq!((failed, aborted), (1, 0));
    let failures = count(
        &scrape,
        "probe_failures_total",
        &[("reason", "agent_no_track")],
    )?;
    assert_eq!(failures, failed);
    for sli in ["availability", "join", "first_speech", "service"] {
        let eligible = count(&scrape, "slo_eligible_total", &[("sli", sli)])?;
        assert_eq!(eligible, ok + failed);
    }
    for sli in [("sli", "availability"), ("sli", "service")] {
        assert_eq!(count(&scrape, "slo_good_total", &[sli])?, ok);
    }
    // The next tick is announced when the one before has been handled.
    let next = next_batch(&scrape)?;
    let skipped = count(&scrape, "batches_skipped_total", &[])?;
    let ticks = whole(((next - on_grid) / 2.0).round())?;
    assert_eq!(handled + ticks, run + skipped);

    daemon.finish()?.expect_code(0)?;
    fixture.expect_no_rooms();
    Ok(())
}

#[test]
fn start_logs_version_page_and_the_first_batch_which_does_not_wait_for_the_grid()
-> anyhow::Result<()> {
    let settings = [
        ("lifetime.startup_delay", "3s"),
        ("targets.nightly.agent_name", "demo"),
        ("targets.nightly.schedule.cron", "0 3 1 1 *"),
    ];
    let fixture = Fixture::new(&[], &settings)?;
    let started = Utc::now();
    let daemon = fixture.dir.start()?;
    let line = |text: &str| -> anyhow::Result<Value> {
        daemon.wait_for_log(text)?.pop().context("it is not logged")
    };
    let start = line("is listening on")?;
    assert_eq!(start["version"], env!("CARGO_PKG_VERSION"));
    let page = format!(
        "http://{}/",
        start["address"].as_str().context("no address")?
    );
    assert_eq!(start["page"], page.as_str());
    let next = |name: &str, schedule: &str| -> anyhow::Result<DateTime<Utc>> {
        let line = line(&format!(
            "target {name} on project main: {schedule}, first batch at "
        ))?;
        Ok(line["next_batch_at"].as_str().context("no time")?.parse()?)
    };
    assert!(next("nightly", "0 3 1 1 * (UTC)")? - started > TimeDelta::minutes(1));
    // The interval is 30 days.
    let first = next("demo", "every 30days")? - started;
    assert!(
        (TimeDelta::seconds(3)..TimeDelta::minutes(1)).contains(&first),
        "{first}"
    );
    daemon.wait_for("the first batch", || {
        let batches = count(&daemon.scrape()?, "batches_total", &[("result", "ok")])?;
        Ok((batches == 1).then_some(()))
    })?;
    daemon.terminate()?;
    Ok(())
}

#[test]
fn draining_daemon_is_not_ready_but_responds_until_the_end_of_its_linger() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("lifetime.shutdown_linger", "3s")])?;
    let daemon = fixture.dir.start()?;
    assert_eq!(is_ready(&daemon)?, 200);
    daemon.signal(Signal::TERM)?;
    daemon.wait_for("status 503", || {
        Ok((is_ready(&daemon)? == 503).then_some(()))
    })?;
    assert_eq!(daemon.http.get("/-/healthy")?.status, 200);
    for path in ["/-/reload", "/api/v1/targets/demo/batches"] {
        let response = daemon.http.post(path)?;
        assert_eq!(response.status, 503, "{path}");
        let error = &response.json()?["error"];
        assert_eq!(error, "the canary is shutting down", "{path}");
    }
    daemon.scrape()?;
    daemon.finish()?.expect_code(0)?;
    Ok(())
}

#[test]
fn second_signal_ends_the_daemon_at_once_and_its_rooms_are_deleted() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("targets.demo.batch.hold", "10m")])?;
    let daemon = fixture.dir.start()?;
    fixture.start_batch(&daemon)?;
    daemon.signal(Signal::TERM)?;
    // Those within a second of the first belong to it; the next one does not.
    daemon.wait_for("the second stop", || {
        daemon.signal(Signal::TERM)?;
        Ok(daemon.logged("stop requested again")?.pop())
    })?;
    let log = daemon.finish()?.expect_code(1)?.log()?;
    fixture.expect_no_rooms();
    assert!(log.iter().all(|line| line["level"] != "ERROR"), "{log:?}");
    Ok(())
}

#[test]
fn rotated_secret_file_is_used_at_the_next_batch_without_a_reload() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[])?;
    let secret = fixture.dir.path().join("secret");
    std::fs::write(&secret, "a-secret-that-the-server-does-not-know")?;
    let daemon = fixture.dir.start()?;
    let result = || -> anyhow::Result<Value> { Ok(run_batch(&daemon, "demo")?["result"].clone()) };
    assert_eq!(result()?, "failed");
    std::fs::write(&secret, format!("{SECRET}\n"))?;
    assert_eq!(result()?, "ok");
    // A file that cannot be used changes nothing, and the log names its key.
    std::fs::write(&secret, "two\nlines")?;
    assert_eq!(result()?, "ok");
    let unusable = daemon.wait_for_log("api_secret_file: this file can't be used")?;
    assert_eq!(unusable.len(), 1);
    daemon.terminate()?;
    Ok(())
}

/// GNU `timeout` and some supervisors send two.
#[test]
fn two_signals_at_once_are_one() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("targets.demo.batch.hold", "1s")])?;
    let daemon = fixture.dir.start()?;
    fixture.start_batch(&daemon)?;
    for signal in [Signal::TERM, Signal::TERM, Signal::INT] {
        daemon.signal(signal)?;
    }
    let log = daemon.finish()?.expect_code(0)?.log()?;
    let lines = |text: &str| {
        let message = |line: &&Value| line["message"].as_str().is_some_and(|it| it.contains(text));
        log.iter().filter(message).count()
    };
    assert_eq!((lines("stopping;"), lines("stop requested again")), (1, 0));
    fixture.expect_no_rooms();
    Ok(())
}

#[test]
fn running_probe_ends_normally_within_the_drain_grace() -> anyhow::Result<()> {
    let settings = [
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.batch.hold", "1s"),
    ];
    let fixture = Fixture::new(&[], &settings)?;
    let daemon = fixture.dir.start()?;
    let batch_id = fixture.start_batch(&daemon)?;
    daemon.signal(Signal::TERM)?;
    wait_for_drained(&daemon)?;
    let scrape = daemon.scrape()?;
    assert_eq!(count(&scrape, "batches_total", &[("result", "ok")])?, 1);
    assert_eq!(count(&scrape, "probes_aborted_total", &[])?, 0);
    assert_eq!(daemon.wait_for_batch(&batch_id)?["result"], "ok");
    daemon.finish()?.expect_code(0)?;
    Ok(())
}

#[test]
fn probe_that_outlasts_the_drain_grace_is_aborted_and_is_not_a_failure() -> anyhow::Result<()> {
    let settings = [
        ("lifetime.drain_grace", "0s"),
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.batch.hold", "10m"),
    ];
    let fixture = Fixture::new(&[], &settings)?;
    let daemon = fixture.dir.start()?;
    let batch_id = fixture.start_batch(&daemon)?;
    daemon.signal(Signal::TERM)?;
    wait_for_drained(&daemon)?;
    let scrape = daemon.scrape()?;
    assert_eq!(count(&scrape, "probes_aborted_total", &[])?, 1);
    assert_eq!(
        count(&scrape, "batches_total", &[("result", "aborted")])?,
        1
    );
    assert_eq!(count(&scrape, "probes_total", &[])?, 0);
    assert_eq!(count(&scrape, "probe_failures_total", &[])?, 0);
    assert_eq!(count(&scrape, "slo_eligible_total", &[])?, 0);
    assert_eq!(daemon.wait_for_batch(&batch_id)?["result"], "aborted");
    daemon.finish()?.expect_code(0)?;
    fixture.expect_no_rooms();
    Ok(())
}

#[test]
fn invalid_settings_are_rejected_with_the_reason_and_the_old_settings_stay() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[])?;
    let daemon = fixture.dir.start()?;
    let success = "config_last_reload_successful";
    assert!(daemon.scrape()?.flag(success)?);
    fixture.settings.remove("projects.main.api_secret_file");
    fixture.set("projects.main.api_secret", SECRET)?;
    fixture.set("targets.demo.batch.rooms", "no number")?;
    fixture.set("targets.other.agent_name", "other")?;

    let response = daemon.http.post("/-/reload")?;
    let body = response.json()?;
    let error = body["error"].as_str().unwrap();
    assert_eq!(response.status, 422, "{error}");
    assert!(error.contains("batch.rooms"), "{error}");
    assert!(!error.contains(SECRET), "{error}");
    daemon.signal(Signal::HUP)?;
    daemon.wait_for("two refusals", || {
        let refusals = daemon.logged("settings not reloaded")?.len();
        Ok((refusals == 2).then_some(()))
    })?;
    assert!(!daemon.scrape()?.flag(success)?);
    assert!(!daemon.scrape()?.has_target("other"));
    let targets = daemon.http.text("/api/v1/targets")?;
    assert!(!targets.contains(SECRET), "{targets}");
    assert_eq!(run_batch(&daemon, "demo")?["result"], "ok");

    fixture.set("targets.demo.batch.rooms", "2")?;
    daemon.signal(Signal::HUP)?;
    daemon.wait_for("the new target", || {
        Ok(daemon.scrape()?.has_target("other").then_some(()))
    })?;
    assert!(daemon.scrape()?.flag(success)?);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn removed_target_has_no_series_while_its_batch_still_runs() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[("targets.demo.batch.hold", "3s")])?;
    let daemon = fixture.dir.start()?;
    let batch_id = fixture.start_batch(&daemon)?;
    let renamed = std::mem::take(&mut fixture.settings).into_iter();
    let renamed = renamed.map(|(key, value)| (key.replace("targets.demo", "targets.other"), value));
    fixture.settings = renamed.collect();
    fixture.set("targets.other.batch.hold", "100ms")?;
    assert_eq!(post(&daemon, "/-/reload")?, 200);

    let scrape = daemon.scrape()?;
    assert!(!scrape.has_target("demo"));
    for counter in [
        "probes_total",
        "batches_total",
        "batches_skipped_total",
        "probe_failures_total",
        "slo_eligible_total",
    ] {
        assert_eq!(scrape.count(counter, &[("target", "other")])?, 0);
    }
    assert_eq!(post(&daemon, "/api/v1/targets/demo/batches")?, 404);
    assert_eq!(daemon.wait_for_batch(&batch_id)?["result"], "ok");
    assert!(!daemon.scrape()?.has_target("demo"));
    assert_eq!(run_batch(&daemon, "other")?["result"], "ok");
    let scrape = daemon.scrape()?;
    assert!(!scrape.has_target("demo"));
    assert_eq!(scrape.count("probes_total", &[("target", "other")])?, 1);

    fixture.set("targets.demo.agent_name", "demo")?;
    assert_eq!(post(&daemon, "/-/reload")?, 200);
    assert_eq!(target(&daemon, "demo")?["last_batch"]["batch_id"], batch_id);
    assert_eq!(count(&daemon.scrape()?, "probes_total", &[])?, 0);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn target_that_was_removed_and_added_again_can_not_start_a_second_batch() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[("targets.demo.batch.hold", "10m")])?;
    let daemon = fixture.dir.start()?;
    let batch_id = fixture.start_batch(&daemon)?;
    let with_target = fixture.settings.clone();
    fixture
        .settings
        .retain(|key, _| !key.starts_with("targets.demo"));
    fixture.set("targets.other.agent_name", "other")?;
    assert_eq!(post(&daemon, "/-/reload")?, 200);
    fixture.settings = with_target;
    fixture.write()?;
    assert_eq!(post(&daemon, "/-/reload")?, 200);
    assert_eq!(target(&daemon, "demo")?["running"], batch_id);
    assert_eq!(post(&daemon, "/api/v1/targets/demo/batches")?, 409);
    Ok(())
}

#[test]
fn changed_target_keeps_its_counters_and_a_rotated_secret_is_read_again() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[])?;
    let secret = fixture.dir.path().join("secret");
    std::fs::write(&secret, "the-secret-before").unwrap();
    let daemon = fixture.dir.start()?;
    assert_eq!(run_batch(&daemon, "demo")?["result"], "failed");
    let rejected = &[("reason", "auth_rejected")];
    assert_eq!(
        count(&daemon.scrape()?, "probe_failures_total", rejected)?,
        1
    );

    std::fs::write(&secret, SECRET).unwrap();
    fixture.set("targets.demo.batch.rooms", "2")?;
    daemon.signal(Signal::HUP)?;
    let changed = "settings reloaded: project \"main\" changed, target \"demo\" changed";
    daemon.wait_for_log(changed)?;
    let reload = daemon.http.post("/-/reload")?.json()?;
    assert_eq!(reload["changes"], Value::Array(Vec::new()), "{reload}");
    daemon.wait_for_log("settings reloaded: nothing has changed")?;
    assert_eq!(run_batch(&daemon, "demo")?["summary"]["ok"], 2);
    let scrape = daemon.scrape()?;
    assert_eq!(count(&scrape, "probe_failures_total", rejected)?, 1);
    assert_eq!(count(&scrape, "probes_total", &[])?, 3);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn batch_by_post_is_in_the_history_under_the_returned_id() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("targets.demo.batch.hold", "1s")])?;
    let daemon = fixture.dir.start()?;
    assert_eq!(post(&daemon, "/api/v1/targets/demo/pause")?, 200);
    assert_eq!(count(&daemon.scrape()?, "target_paused", &[])?, 1);
    // A pause only stops the schedule.
    let batch_id = daemon.start_batch("demo")?;
    let refused = daemon.http.post("/api/v1/targets/demo/batches")?;
    assert_eq!(refused.status, 409);
    assert!(refused.body.contains(&batch_id), "{refused:?}");
    assert_eq!(daemon.wait_for_batch(&batch_id)?["batch_id"], batch_id);
    assert_eq!(post(&daemon, "/api/v1/targets/demo/resume")?, 200);
    assert_eq!(count(&daemon.scrape()?, "target_paused", &[])?, 0);
    for path in ["pause", "resume", "batches"] {
        let path = format!("/api/v1/targets/unknown/{path}");
        assert_eq!(post(&daemon, &path)?, 404, "{path}");
    }
    daemon.terminate()?;
    Ok(())
}

#[test]
fn skipped_tick_is_counted_under_its_cause() -> anyhow::Result<()> {
    let settings = [
        ("lifetime.startup_delay", "0s"),
        ("targets.demo.schedule.every", "1s"),
        ("targets.demo.batch.hold", "3s"),
        ("projects.main.budget.agent_time_per_day", "4m"),
    ];
    let fixture = Fixture::new(&[], &settings)?;
    let daemon = fixture.dir.start()?;
    let wait_for_skip = |cause: &str| {
        daemon.wait_for(cause, || {
            let labels = [("cause", cause)];
            let skipped = count(&daemon.scrape()?, "batches_skipped_total", &labels)?;
            Ok((skipped > 0).then_some(()))
        })
    };
    wait_for_skip("overlap")?;
    wait_for_skip("budget")?;
    let refused = daemon.http.post("/api/v1/targets/demo/batches")?;
    assert_eq!(refused.status, 429, "{refused:?}");
    let held_back = &target(&daemon, "demo")?["held_back"];
    assert_eq!(refused.json()?["error"], *held_back);
    assert_eq!(post(&daemon, "/api/v1/targets/demo/pause")?, 200);
    wait_for_skip("paused")?;
    let scrape = daemon.scrape()?;
    assert_eq!(count(&scrape, "batches_total", &[("result", "ok")])?, 1);
    assert_eq!(count(&scrape, "plan_limit_rejections_total", &[])?, 0);
    assert_eq!(fixture.sandbox.handle.rooms_seen(), 1);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn plan_limit_is_counted_under_its_kind_and_the_project_backs_off_as_requested() {
    let retry_after = Some(3000.0);
    let cases = [
        ("upgrade=429,retry_after=50m", "connections", retry_after),
        ("upgrade=429", "connections", None),
        ("upgrade=503", "node", None),
        ("create_room=429,retry_after=50m", "api_rate", retry_after),
        ("create_room=429,html", "api_rate", None),
        ("create_dispatch=resource_exhausted", "agent_sessions", None),
        ("before_join=leave", "room", None),
        ("inference_error", "inference", None),
    ];
    in_parallel(&cases, |(fault, limit, rest)| {
        expect_backoff(fault, limit, *rest).unwrap();
    });
}

/// A batch with this fault meets the limit, and the project backs off. `retry_after` are the seconds of the server's
/// `Retry-After` header.
fn expect_backoff(fault: &str, limit: &str, retry_after: Option<f64>) -> anyhow::Result<()> {
    // The agent joins before its inference fails. By then the next room would open.
    let rooms = if limit == "inference" { "1" } else { "3" };
    let settings = [
        ("projects.main.backoff.first", "10m"),
        ("targets.demo.batch.rooms", rooms),
        ("targets.demo.deadlines.speech", "5s"),
        ("lifetime.startup_delay", "0s"),
        ("targets.demo.schedule.every", "1s"),
    ];
    let fixture = Fixture::new(&[fault], &settings)?;
    let daemon = fixture.dir.start()?;
    daemon.wait_for("a skipped tick", || {
        let labels = [("cause", "backoff")];
        let skipped = count(&daemon.scrape()?, "batches_skipped_total", &labels)?;
        Ok((skipped > 0).then_some(()))
    })?;
    let scrape = daemon.scrape()?;
    let ended = scrape.sum(
        "last_batch_completed_timestamp_seconds",
        &[("target", "demo")],
    )?;
    let until = scrape.sum("backoff_until_timestamp_seconds", &[("project", "main")])?;
    // The back-off begins before the room is deleted, and the batch ends after that.
    let rest = until - ended;
    match retry_after {
        Some(seconds) => assert!(
            (seconds - 60.0..=seconds + 1.0).contains(&rest),
            "{fault}: {rest}"
        ),
        None => assert!((200.0..1300.0).contains(&rest), "{fault}: {rest}"),
    }
    for (name, labels, expected) in [
        ("plan_limit_rejections_total", &[("limit", limit)][..], 1),
        ("plan_limit_rejections_total", &[], 1),
        ("batches_total", &[("result", "limited")], 1),
        ("batches_total", &[], 1),
        ("slo_eligible_total", &[("sli", "availability")], 0),
        ("slo_eligible_total", &[("sli", "join")], 0),
        ("slo_eligible_total", &[("sli", "first_speech")], 0),
        ("slo_eligible_total", &[("sli", "reply")], 0),
        ("slo_eligible_total", &[("sli", "service")], 1),
        ("slo_good_total", &[("sli", "service")], 0),
    ] {
        let counted = count(&scrape, name, labels)?;
        assert_eq!(counted, expected, "{fault}: {name} {labels:?}");
    }
    assert_eq!(fixture.sandbox.handle.rooms_seen(), 1, "{fault}");
    assert_eq!(post(&daemon, "/api/v1/targets/demo/batches")?, 429);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn next_daemon_deletes_the_rooms_of_a_killed_daemon_and_counts_their_agent_time()
-> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[])?;
    let sandbox = fixture.sandbox.handle.clone();
    let daemon = fixture.dir.start()?;
    run_batch(&daemon, "demo")?;
    let last = target(&daemon, "demo")?["last_batch"]["batch_id"].clone();
    assert!(last.is_string(), "{last}");
    daemon.terminate()?;

    fixture.set("targets.demo.batch.hold", "10m")?;
    fixture.set("targets.demo.batch.rooms", "3")?;
    let mut random = fastrand::Rng::with_seed(5);
    let mut left = 0;
    for _ in 0..5 {
        let daemon = fixture.dir.start()?;
        assert_eq!(target(&daemon, "demo")?["last_batch"]["batch_id"], last);
        let scrape = daemon.scrape()?;
        let used = scrape.sum("agent_budget_used_seconds", &[("period", "day")])?;
        // A minute for the first batch, and at least the hold of every later room.
        let known = 60 + (sandbox.rooms_seen() - 1) * 600;
        assert!(whole(used)? >= known, "{used} is less than {known}");
        daemon.wait_for("the sweep", || {
            let swept = count(&daemon.scrape()?, "rooms_swept_total", &[])?;
            Ok((swept >= left && sandbox.rooms().is_empty()).then_some(()))
        })?;
        daemon.start_batch("demo")?;
        // A random moment for the kill; this doesn't wait for an event.
        thread::sleep(Duration::from_millis(random.u64(0..1200)));
        daemon.signal(Signal::KILL)?;
        assert_eq!(daemon.finish()?.code, None);
        left = sandbox.rooms().len() as u64;
    }
    let daemon = fixture.dir.start()?;
    daemon.wait_for("the last sweep", || {
        Ok(sandbox.rooms().is_empty().then_some(()))
    })?;
    let listed: Value = daemon.http.json("/api/v1/batches")?;
    assert_eq!(listed["batches"].as_array().unwrap().len(), 1);
    assert!(!daemon.scrape()?.flag("history_degraded")?);
    Ok(())
}

#[test]
fn second_daemon_on_the_same_history_exits_2_and_names_the_folder() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[])?;
    let _daemon = fixture.dir.start()?;
    let run = fixture.dir.run_refused()?;
    assert_eq!(run.code, Some(2), "{}", run.output());
    let message = "another livekit-canary uses the folder";
    assert!(run.stderr.contains(message), "{}", run.output());
    Ok(())
}

#[test]
fn settings_without_a_target_exit_2() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[])?;
    fixture
        .settings
        .retain(|key, _| !key.starts_with("targets"));
    fixture.write()?;
    let run = fixture.dir.run_refused()?;
    assert_eq!(run.code, Some(2), "{}", run.output());
    let message = "no target is configured, so there is nothing to watch";
    assert!(run.stderr.contains(message), "{}", run.output());
    Ok(())
}

#[test]
fn port_in_use_exits_1_and_names_the_address() -> anyhow::Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let fixture = Fixture::new(&[], &[("http.listen", &address)])?;
    let run = fixture.dir.run_refused()?;
    assert_eq!(run.code, Some(1), "{}", run.output());
    let message = format!("cannot listen on {address}: Address already in use");
    assert!(run.stderr.contains(&message), "{}", run.output());
    Ok(())
}

#[test]
fn invalid_web_config_exits_2_and_names_the_key() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("http.web_config_file", "web.yml")])?;
    let file = fixture.dir.path().join("web.yml");
    std::fs::write(file, "basic_auth_user:\n  ops: x\n").unwrap();
    let run = fixture.dir.run_refused()?;
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(run.stderr.contains("basic_auth_user"), "{}", run.output());
    Ok(())
}

#[test]
fn folder_that_cannot_be_written_degrades_the_history_and_batches_still_run() -> anyhow::Result<()>
{
    let fixture = Fixture::new(&[], &[])?;
    std::fs::write(fixture.dir.path().join("state"), "a file").unwrap();
    let daemon = fixture.dir.start()?;
    daemon.start_batch("demo")?;
    let scrape = daemon.wait_for("the batch", || {
        let scrape = daemon.scrape()?;
        Ok((count(&scrape, "batches_total", &[])? == 1).then_some(scrape))
    })?;
    assert_eq!(count(&scrape, "batches_total", &[("result", "ok")])?, 1);
    assert_eq!(count(&scrape, "probes_total", &[])?, 1);
    assert!(scrape.flag("history_degraded")?);
    let faults = scrape.count("internal_errors_total", &[("kind", "history")])?;
    assert_eq!(faults, 1, "one fault, however often the write is retried");
    assert_eq!(daemon.wait_for_log("the history is degraded")?.len(), 1);
    assert_eq!(is_ready(&daemon)?, 200);
    daemon.terminate()?;
    Ok(())
}

#[test]
fn corrupt_history_is_renamed_with_one_log_line_and_a_new_history_is_written() -> anyhow::Result<()>
{
    let fixture = Fixture::new(&[], &[])?;
    let state = fixture.dir.path().join("state");
    fixture.dir.start()?.terminate()?;
    let file = std::fs::read_dir(&state).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let database = std::fs::read(&path).unwrap().starts_with(b"SQLite format");
        database.then_some(path)
    });
    std::fs::write(file.unwrap(), "no database at all").unwrap();

    let daemon = fixture.dir.start()?;
    assert_eq!(daemon.wait_for_log("is corrupt")?.len(), 1);
    assert_eq!(run_batch(&daemon, "demo")?["result"], "ok");
    assert!(!daemon.scrape()?.flag("history_degraded")?);
    daemon.terminate()?;
    let aside = std::fs::read_dir(&state).unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().contains(".corrupt-")
    });
    assert!(aside, "no file is named .corrupt-");
    Ok(())
}

#[test]
fn log_without_a_terminal_is_json_with_one_line_per_batch_and_one_per_failed_probe()
-> anyhow::Result<()> {
    let settings = [("targets.demo.batch.rooms", "2")];
    let fixture = Fixture::new(&["room2:no_track"], &settings)?;
    let daemon = fixture.dir.start()?;
    let batch = run_batch(&daemon, "demo")?;
    let log = daemon.terminate()?.log()?;
    let of = |level: &str, field: &str| -> Vec<Value> {
        let with = |line: &&Value| line["level"] == level && !line[field].is_null();
        log.iter().filter(with).cloned().collect()
    };
    let batches = of("INFO", "batch_id");
    assert_eq!(batches.len(), 1, "{log:?}");
    assert_eq!(batches[0]["batch_id"], batch["batch_id"]);
    assert_eq!(batches[0]["result"], "degraded");
    let failures = of("WARN", "reason");
    assert_eq!(failures.len(), 1, "{log:?}");
    assert_eq!(failures[0]["reason"], "agent_no_track");
    assert_eq!(failures[0]["room"], batch["probes"][1]["room"]);
    Ok(())
}

#[test]
fn service_manager_is_notified_of_readiness_reload_watchdog_and_stop() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[])?;
    let path = fixture.dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_mins(2)))?;
    let variables = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "200000"),
    ];
    let daemon = fixture.dir.start_with(&variables)?;
    // Receives messages up to the next one that contains this text.
    let wait_for_message = |text: &str| {
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).unwrap();
            let message = std::str::from_utf8(&buffer[..length]).unwrap();
            if message.contains(text) {
                return message.to_owned();
            }
        }
    };
    wait_for_message("READY=1");
    wait_for_message("WATCHDOG=1");
    daemon.signal(Signal::HUP)?;
    assert!(wait_for_message("RELOADING=1").contains("MONOTONIC_USEC="));
    wait_for_message("READY=1");
    daemon.signal(Signal::TERM)?;
    wait_for_message("STOPPING=1");
    // The socket stays open until the end, so that every message has a receiver.
    daemon.finish()?.expect_code(0)?;
    Ok(())
}

#[test]
fn health_command_exits_0_only_if_the_daemon_is_healthy() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[])?;
    let daemon = fixture.dir.start()?;
    let ask = |url: &str| canary(fixture.dir.path(), ["health", url], &[]);
    let healthy = ask(&daemon.http.url("/-/healthy"));
    assert_eq!(healthy.code, Some(0), "{}", healthy.output());
    let unknown = ask(&daemon.http.url("/-/nothing"));
    assert_eq!(unknown.code, Some(1), "{}", unknown.output());
    for (query, code) in [("limit=1", 0), ("limit=none", 1)] {
        let asked = ask(&daemon.http.url(&format!("/api/v1/batches?{query}")));
        assert_eq!(asked.code, Some(code), "{query}: {}", asked.output());
    }
    daemon.signal(Signal::TERM)?;
    let url = daemon.http.url("/-/healthy");
    daemon.finish()?;
    let gone = ask(&url);
    assert_eq!(gone.code, Some(1));
    assert!(gone.stderr.contains("refused"), "{}", gone.output());
    assert_eq!(ask("https://127.0.0.1:1/").code, Some(1));
    assert_eq!(ask("ftp://127.0.0.1:1/").code, Some(2));
    Ok(())
}

/// SIGSTOP does to the process what `docker pause` and a stalled machine do.
#[test]
fn frozen_canary_blames_itself_and_its_next_batch_is_ok() -> anyhow::Result<()> {
    let settings = [
        ("targets.demo.batch.hold", "3s"),
        ("targets.demo.deadlines.signal", "2s"),
        ("targets.demo.deadlines.media", "4s"),
        ("targets.demo.deadlines.join", "4s"),
    ];
    let fixture = Fixture::new(&[], &settings)?;
    let daemon = fixture.dir.start()?;
    let batch_id = fixture.start_batch(&daemon)?;
    daemon.signal(Signal::STOP)?;
    // Longer than the deadline of any step in which the probe can be now.
    thread::sleep(Duration::from_secs(5));
    daemon.signal(Signal::CONT)?;
    let batch = daemon.wait_for_batch(&batch_id)?;
    let probe = &batch["probes"][0];
    assert_eq!(probe["reason"], "internal", "{probe}");
    assert_eq!(probe["origin"], "canary", "{probe}");
    let detail = probe["detail"].as_str().unwrap_or_default();
    assert!(
        detail.starts_with("the canary itself did not run for"),
        "{detail}"
    );
    assert!(probe["join_delay_seconds"].is_null(), "{probe}");
    let scrape = daemon.scrape()?;
    let errors = |kind| scrape.count("internal_errors_total", &[("kind", kind)]);
    assert!(errors("stall")? >= 1);
    assert_eq!(errors("probe")?, 1);
    assert_eq!(count(&scrape, "slo_eligible_total", &[])?, 0);
    assert_eq!(
        count(&scrape, "agent_join_delay_seconds_count", &[])?,
        0,
        "a delay that nobody measured"
    );
    assert_eq!(run_batch(&daemon, "demo")?["result"], "ok");
    daemon.terminate()?;
    fixture.expect_no_rooms();
    Ok(())
}

/// Both streams are one full pipe, as under a supervisor that has stopped to read.
#[test]
fn log_that_is_not_read_stops_neither_the_probes_nor_the_shutdown() -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};

    let mut fixture = Fixture::new(&[], &[])?;
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    fixture.set("http.listen", &address.to_string())?;
    let (unread, mut full) = std::io::pipe()?;
    // The capacity of a pipe on Linux.
    full.write_all(&vec![b'x'; 65_536])?;
    let mut child = Command::new(support::canary::binary())
        .args(["run", "--config", "canary.toml"])
        .current_dir(fixture.dir.path())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(full.try_clone()?)
        .stderr(full)
        .spawn()?;
    let limit = Duration::from_mins(1);
    let http = support::http::HttpClient::new(address);
    let started = support::wait_for("the batch's id", limit, || {
        let Ok(response) = http.post("/api/v1/targets/demo/batches") else {
            return Ok(None);
        };
        (response.status == 202)
            .then(|| response.json())
            .transpose()
    });
    let ended = started.and_then(|started| {
        let id = started["batch_id"].as_str().context("no id")?.to_owned();
        let batch = support::wait_for("the batch", limit, || {
            let response = http.get(&format!("/api/v1/batches/{id}"))?;
            (response.status == 200)
                .then(|| response.json())
                .transpose()
        })?;
        assert_eq!(batch["result"], "ok", "{batch}");
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM)?;
        support::wait_for("the end", limit, || Ok(child.try_wait()?))
    });
    child.kill().ok();
    child.wait()?;
    assert_eq!(ended?.code(), Some(0));
    drop(unread);
    Ok(())
}

#[test]
fn state_that_is_removed_in_use_is_reported_and_the_next_start_opens_no_room_unknowingly()
-> anyhow::Result<()> {
    let budget = [("projects.main.budget.agent_time_per_day", "10h")];
    let fixture = Fixture::new(&[], &budget)?;
    let daemon = fixture.dir.start()?;
    run_batch(&daemon, "demo")?;
    std::fs::remove_dir_all(fixture.dir.path().join("state"))?;
    let batch = run_batch(&daemon, "demo")?;
    assert_eq!(batch["result"], "ok");
    let logged = daemon.wait_for_log("was removed or replaced")?;
    let [line] = &logged[..] else {
        panic!("{logged:?}")
    };
    assert_eq!(line["level"], "ERROR");
    let scrape = daemon.scrape()?;
    let faults = scrape.count("internal_errors_total", &[("kind", "history")])?;
    assert_eq!(faults, 1);
    daemon.terminate()?;

    let daemon = fixture.dir.start()?;
    let refused = daemon.http.post("/api/v1/targets/demo/batches")?;
    assert_eq!(refused.status, 429, "{refused:?}");
    let error = &refused.json()?["error"];
    assert!(
        error.as_str().is_some_and(|text| text.contains("lost")),
        "{error}"
    );
    daemon.terminate()?;
    Ok(())
}

#[test]
fn fifo_in_the_settings_is_refused_at_once_and_the_daemon_goes_on() -> anyhow::Result<()> {
    let mut fixture = Fixture::new(&[], &[])?;
    let daemon = fixture.dir.start()?;
    let fifo = fixture.dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status()?;
    assert!(made.success());
    fixture.set("projects.main.api_secret_file", "fifo")?;
    let reply = daemon.http.post("/-/reload")?;
    assert_eq!(reply.status, 422, "{reply:?}");
    assert!(reply.body.contains("not a regular file"), "{reply:?}");
    assert_eq!(run_batch(&daemon, "demo")?["result"], "ok");
    daemon.terminate()?;
    Ok(())
}

/// A reload may be sent as soon as the process exists. By default, SIGHUP would end it.
#[test]
fn sighup_is_handled_before_the_settings_are_read() -> anyhow::Result<()> {
    use std::process::{Command, Stdio};

    let fixture = Fixture::new(&[], &[])?;
    let state = fixture.dir.path().join("state");
    // The test looks at a process that is starting, so it may look too late.
    for _ in 0..50 {
        if state.exists() {
            std::fs::remove_dir_all(&state)?;
        }
        let mut child = Command::new(support::canary::binary())
            .args(["run", "--config", "canary.toml"])
            .current_dir(fixture.dir.path())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut seen = false;
        while !seen && !state.exists() && child.try_wait()?.is_none() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()))?;
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            let caught = u64::from_str_radix(caught.context("no SigCgt")?.trim(), 16)?;
            // SIGHUP is signal 1, the lowest bit. The state folder is created after the settings have been read.
            seen = caught & 1 == 1 && !state.exists();
        }
        child.kill()?;
        child.wait()?;
        if seen {
            return Ok(());
        }
    }
    panic!("in 50 starts, SIGHUP was handled only after the settings had been read");
}

/// If any call lacks a descriptor, neither the network nor LiveKit nor the agent is at fault.
#[test]
fn canary_without_descriptors_blames_itself() -> anyhow::Result<()> {
    let fixture = Fixture::new(&[], &[("targets.demo.deadlines.cleanup", "300ms")])?;
    let cases: Vec<u32> = (8..26).collect();
    let results = in_parallel(&cases, |descriptors| -> anyhow::Result<bool> {
        let finished = canary_with_descriptors(&fixture, *descriptors)?;
        // With too few descriptors the process cannot start, and says so.
        let Ok(batch) = finished.batch() else {
            assert!(
                finished.stderr.contains("os error 24") || finished.stderr.contains("open files"),
                "{descriptors}: {}",
                finished.output()
            );
            return Ok(false);
        };
        let probe = batch.only_probe()?;
        assert!(
            ["ok", "internal"].contains(&probe.verdict()),
            "{descriptors}: {probe:?}"
        );
        Ok(probe.detail().contains("os error 24"))
    });
    let own_faults: Vec<bool> = results.into_iter().collect::<Result<_, _>>()?;
    let own_faults = own_faults.into_iter().filter(|own| *own).count();
    assert!(own_faults >= 2, "{own_faults} probes lacked descriptors");
    Ok(())
}

fn canary_with_descriptors(
    fixture: &Fixture,
    descriptors: u32,
) -> anyhow::Result<support::canary::Finished> {
    let arguments = ["once", "--config", "canary.toml", "--format", "json"];
    let canary = support::canary::Canary::with_descriptors(descriptors, &arguments);
    canary.current_dir(fixture.dir.path()).run()
}
