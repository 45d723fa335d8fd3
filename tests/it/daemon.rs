//! `run` against the sandbox, as an operator sees it: its signals, its settings file, what HTTP answers, and its log.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use livekit_canary::sandbox::Settings;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::sandbox::Stage;
use crate::{Run, canary};

/// Of what always comes, however busy the machine is.
const GIVE_UP: Duration = Duration::from_secs(90);
/// No other text has this in it.
const SECRET: &str = "a-secret-of-the-sandbox-alone";

/// A tick comes only where a test asks for it.
const SETTINGS: &[(&str, &str)] = &[
    ("http.listen", "127.0.0.1:0"),
    ("lifetime.startup_delay", "0s"),
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
    ("targets.demo.deadlines.track", "4s"),
    ("targets.demo.deadlines.speech", "8s"),
    ("targets.demo.deadlines.cleanup", "3s"),
];

/// A sandbox, and the folder that holds the canary's settings and state.
struct Site {
    sandbox: Stage,
    folder: TempDir,
    settings: BTreeMap<String, String>,
}

impl Site {
    fn new(faults: &[&str], settings: &[(&str, &str)]) -> Self {
        let sandbox = Stage::with(Settings {
            api_secret: SECRET.into(),
            faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
            ..Settings::default()
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), SECRET).unwrap();
        let url = ("projects.main.url", sandbox.url.as_str());
        let all = SETTINGS.iter().chain([&url]).chain(settings);
        let settings = all.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let site = Self {
            settings: settings.collect(),
            sandbox,
            folder,
        };
        site.write();
        site
    }

    fn set(&mut self, key: &str, value: &str) {
        self.settings.insert(key.to_owned(), value.to_owned());
        self.write();
    }

    fn write(&self) {
        let lines = self.settings.iter().map(|(key, value)| {
            if value.parse::<u32>().is_ok() {
                format!("{key} = {value}\n")
            } else {
                format!("{key} = {value:?}\n")
            }
        });
        let text: String = lines.collect();
        std::fs::write(self.folder.path().join("canary.toml"), text).unwrap();
    }

    /// Once it is ready.
    fn run(&self) -> Daemon {
        Daemon::start(self.folder.path())
    }

    /// Of one that can't start.
    fn refused(&self) -> Run {
        canary(self.folder.path(), ["run", "--config", "canary.toml"], &[])
    }

    fn wait_for_a_room(&self) {
        until("a room", || self.sandbox.handle.rooms().pop());
    }
}

/// A daemon in a process of its own, killed when this is dropped.
struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<thread::JoinHandle<()>>,
    address: String,
    client: ureq::Agent,
}

impl Daemon {
    fn start(folder: &Path) -> Self {
        Self::start_with(folder, &[])
    }

    fn start_with(folder: &Path, variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_livekit-canary"))
            .current_dir(folder)
            .args(["run", "--config", "canary.toml"])
            .env_clear()
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let written = Arc::clone(&log);
        let reader = thread::spawn(move || {
            for line in lines {
                written.lock().unwrap().push(line.unwrap());
            }
        });
        let client = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(GIVE_UP))
            .build();
        let mut daemon = Self {
            child,
            log,
            reader: Some(reader),
            address: String::new(),
            client: client.into(),
        };
        daemon.address = until("its address", || {
            let line = daemon.logged("listening on ").pop()?;
            Some(line["address"].as_str().unwrap().to_owned())
        });
        until("readiness", || {
            (daemon.get("/-/ready").0 == 200).then_some(())
        });
        daemon
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut answer = self.client.get(self.url(path)).call().unwrap();
        let body = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), body)
    }

    fn post(&self, path: &str) -> (u16, Value) {
        let mut answer = self.client.post(self.url(path)).send_empty().unwrap();
        let body = answer.body_mut().read_to_string().unwrap();
        (
            answer.status().as_u16(),
            serde_json::from_str(&body).unwrap(),
        )
    }

    fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    fn scrape(&self) -> Scrape {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        Scrape(text)
    }

    /// Begins a batch and gives its id.
    fn begin(&self, target: &str) -> String {
        let (status, body) = self.post(&format!("/api/v1/targets/{target}/batches"));
        assert_eq!(status, 202, "{body}");
        body["batch_id"].as_str().unwrap().to_owned()
    }

    /// A batch from its beginning to its end, as the history has it.
    fn batch(&self, target: &str) -> Value {
        self.recorded(&self.begin(target))
    }

    fn recorded(&self, batch_id: &str) -> Value {
        let path = format!("/api/v1/batches/{batch_id}");
        let ended = || (self.target("demo")["running"] != batch_id).then_some(());
        until("the batch's end", ended);
        until("the batch in the history", || {
            let (status, body) = self.get(&path);
            (status == 200).then(|| serde_json::from_str(&body).unwrap())
        })
    }

    /// Null where there is none of this name.
    fn target(&self, name: &str) -> Value {
        let status = self.json("/api/v1/targets");
        let targets = status["targets"].as_array().unwrap();
        let found = targets.iter().find(|target| target["name"] == name);
        found.cloned().unwrap_or_default()
    }

    /// Until it is told to stop and has no batch under way any more; it still answers for as long as it lingers.
    fn wait_for_drained(&self) {
        until("the end of the drain", || {
            let status = self.json("/api/v1/targets");
            let mut targets = status["targets"].as_array().unwrap().iter();
            let drained =
                status["stage"] == "draining" && targets.all(|target| target["running"].is_null());
            drained.then_some(())
        });
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The lines of the log with this text in their message.
    fn logged(&self, text: &str) -> Vec<Value> {
        let lines = self.lines();
        let with_text = lines
            .into_iter()
            .filter(|line| line["message"].as_str().unwrap().contains(text));
        with_text.collect()
    }

    fn lines(&self) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter()
            .map(|line| {
                assert!(!line.contains(SECRET) && !line.contains("eyJ"), "{line}");
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            })
            .collect()
    }

    /// Its exit status, and its whole log.
    fn exit(&mut self) -> (Option<i32>, Vec<Value>) {
        let exit = until("its exit", || self.child.try_wait().unwrap());
        self.reader.take().unwrap().join().unwrap();
        (exit.code(), self.lines())
    }

    fn terminate(mut self) -> (Option<i32>, Vec<Value>) {
        self.signal(Signal::TERM);
        self.exit()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().unwrap();
        if thread::panicking() {
            tell(&self.log.lock().unwrap().join("\n"));
        }
    }
}

#[expect(clippy::print_stderr, reason = "what a failed test needs to know")]
fn tell(text: &str) {
    eprintln!("{text}");
}

/// Looks until there is something.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + GIVE_UP;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < limit, "no sight of {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An answer of /metrics.
struct Scrape(String);

impl Scrape {
    /// The sum of the series of this name that have all of these labels.
    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let series = self.0.lines().filter_map(|line| {
            let rest = line.strip_prefix("livekit_canary_")?.strip_prefix(name)?;
            let (found, value) = rest.strip_prefix('{')?.rsplit_once("} ")?;
            let wanted = labels.iter().all(|label| {
                let (key, value) = label.split_once('=').unwrap();
                found.contains(&format!("{key}=\"{value}\""))
            });
            wanted.then(|| value.parse::<f64>().unwrap())
        });
        let values: Vec<f64> = series.collect();
        assert!(!values.is_empty(), "no {name} with {labels:?}");
        values.iter().sum()
    }

    /// A count of the one target that most tests have.
    fn count(&self, name: &str, labels: &[&str]) -> u64 {
        let labels: Vec<&str> = labels.iter().copied().chain(["target=demo"]).collect();
        whole(self.sum(name, &labels))
    }

    /// Of the process, and 0 or 1.
    fn flag(&self, name: &str) -> bool {
        let line = |value| format!("\nlivekit_canary_{name} {value}\n");
        let up = self.0.contains(&line(1));
        assert!(up || self.0.contains(&line(0)), "no {name}");
        up
    }

    fn names(&self, target: &str) -> bool {
        self.0.contains(&format!("target=\"{target}\""))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count, which is asserted"
)]
fn whole(value: f64) -> u64 {
    assert!(value >= 0.0 && value.fract() == 0.0, "{value} is no count");
    value as u64
}

#[test]
fn raw_counters_of_scheduled_batches_equal_the_history_and_the_rooms_that_the_server_saw() {
    let settings = [
        ("lifetime.startup_delay", "2s"),
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.schedule.every", "2s"),
        ("targets.demo.batch.rooms", "2"),
        ("targets.demo.batch.hold", "1s"),
    ];
    let site = Site::new(&["room2:no_track"], &settings);
    let mut daemon = site.run();
    let first = daemon
        .scrape()
        .sum("next_batch_timestamp_seconds", &["target=demo"]);
    until("two batches and a skipped tick", || {
        let scrape = daemon.scrape();
        let enough = scrape.count("batches_total", &[]) >= 2
            && scrape.count("batches_skipped_total", &["cause=overlap"]) >= 1;
        enough.then_some(())
    });
    daemon.signal(Signal::TERM);
    daemon.wait_for_drained();

    let scrape = daemon.scrape();
    let run = scrape.count("batches_total", &[]);
    // The history is written behind it.
    let batches = until("as many batches in the history", || {
        let listed = daemon.json("/api/v1/batches?limit=199");
        let batches = listed["batches"].as_array().unwrap().clone();
        (batches.len() as u64 == run).then_some(batches)
    });
    let total = |key: &str| -> u64 {
        let of_each = batches
            .iter()
            .map(|batch| batch["summary"][key].as_u64().unwrap());
        of_each.sum()
    };
    let (ok, failed, aborted) = (total("ok"), total("failed"), total("aborted"));
    assert_eq!(scrape.count("probes_total", &[]), ok + failed);
    assert_eq!(scrape.count("probes_aborted_total", &[]), aborted);
    assert_eq!(site.sandbox.handle.rooms_seen(), ok + failed + aborted);
    assert_eq!((failed, aborted), (1, 0));
    let failures = scrape.count("probe_failures_total", &["reason=agent_no_track"]);
    assert_eq!(failures, failed);
    for sli in ["availability", "join", "first_speech", "service"] {
        let sli = format!("sli={sli}");
        assert_eq!(scrape.count("slo_eligible_total", &[&sli]), ok + failed);
    }
    for sli in ["sli=availability", "sli=service"] {
        assert_eq!(scrape.count("slo_good_total", &[sli]), ok);
    }
    // What is due next moves once a tick is handled.
    let next = scrape.sum("next_batch_timestamp_seconds", &["target=demo"]);
    let skipped = scrape.count("batches_skipped_total", &[]);
    assert_eq!(whole((next - first) / 2.0), run + skipped);

    assert_eq!(daemon.exit().0, Some(0));
    assert_eq!(site.sandbox.handle.rooms(), [""; 0]);
}

#[test]
fn draining_daemon_is_not_ready_and_answers_until_it_has_lingered() {
    let site = Site::new(&[], &[("lifetime.shutdown_linger", "3s")]);
    let mut daemon = site.run();
    assert_eq!(daemon.get("/-/ready").0, 200);
    daemon.signal(Signal::TERM);
    until("503", || (daemon.get("/-/ready").0 == 503).then_some(()));
    assert_eq!(daemon.get("/-/healthy").0, 200);
    for path in ["/-/reload", "/api/v1/targets/demo/batches"] {
        let (status, body) = daemon.post(path);
        assert_eq!(status, 503, "{path}");
        assert_eq!(body["error"], "the canary is shutting down", "{path}");
    }
    daemon.scrape();
    assert_eq!(daemon.exit().0, Some(0));
}

#[test]
fn second_signal_ends_at_once_with_the_rooms_deleted() {
    let site = Site::new(&[], &[("targets.demo.batch.hold", "10m")]);
    let mut daemon = site.run();
    daemon.begin("demo");
    site.wait_for_a_room();
    daemon.signal(Signal::TERM);
    until("the drain", || daemon.logged("stopping").pop());
    daemon.signal(Signal::TERM);
    let (code, log) = daemon.exit();
    assert_eq!(code, Some(1));
    assert_eq!(site.sandbox.handle.rooms(), [""; 0]);
    assert!(log.iter().all(|line| line["level"] != "ERROR"), "{log:?}");
}

#[test]
fn running_probe_ends_well_within_the_grace() {
    let settings = [
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.batch.hold", "1s"),
    ];
    let site = Site::new(&[], &settings);
    let mut daemon = site.run();
    let batch_id = daemon.begin("demo");
    site.wait_for_a_room();
    daemon.signal(Signal::TERM);
    daemon.wait_for_drained();
    let scrape = daemon.scrape();
    assert_eq!(scrape.count("batches_total", &["result=ok"]), 1);
    assert_eq!(scrape.count("probes_aborted_total", &[]), 0);
    assert_eq!(daemon.recorded(&batch_id)["result"], "ok");
    assert_eq!(daemon.exit().0, Some(0));
}

#[test]
fn probe_that_outlasts_the_grace_is_aborted_and_no_failure() {
    let settings = [
        ("lifetime.drain_grace", "0s"),
        ("lifetime.shutdown_linger", "2s"),
        ("targets.demo.batch.hold", "10m"),
    ];
    let site = Site::new(&[], &settings);
    let mut daemon = site.run();
    let batch_id = daemon.begin("demo");
    site.wait_for_a_room();
    daemon.signal(Signal::TERM);
    daemon.wait_for_drained();
    let scrape = daemon.scrape();
    assert_eq!(scrape.count("probes_aborted_total", &[]), 1);
    assert_eq!(scrape.count("batches_total", &["result=aborted"]), 1);
    assert_eq!(scrape.count("probes_total", &[]), 0);
    assert_eq!(scrape.count("probe_failures_total", &[]), 0);
    assert_eq!(scrape.count("slo_eligible_total", &[]), 0);
    assert_eq!(daemon.recorded(&batch_id)["result"], "aborted");
    assert_eq!(daemon.exit().0, Some(0));
    assert_eq!(site.sandbox.handle.rooms(), [""; 0]);
}

#[test]
fn broken_settings_are_refused_with_the_reason_and_the_old_ones_go_on() {
    let mut site = Site::new(&[], &[]);
    let daemon = site.run();
    let success = "config_last_reload_successful";
    assert!(daemon.scrape().flag(success));
    site.settings.remove("projects.main.api_secret_file");
    site.set("projects.main.api_secret", SECRET);
    site.set("targets.demo.batch.rooms", "no number");
    site.set("targets.other.agent_name", "other");

    let (status, body) = daemon.post("/-/reload");
    let why = body["error"].as_str().unwrap();
    assert_eq!(status, 422, "{why}");
    assert!(why.contains("batch.rooms"), "{why}");
    assert!(!why.contains(SECRET), "{why}");
    daemon.signal(Signal::HUP);
    let refusals = || daemon.logged("settings not reloaded").len();
    until("two refusals", || (refusals() == 2).then_some(()));
    assert!(!daemon.scrape().flag(success));
    assert!(!daemon.scrape().names("other"));
    let targets = daemon.get("/api/v1/targets").1;
    assert!(!targets.contains(SECRET), "{targets}");
    assert_eq!(daemon.batch("demo")["result"], "ok");

    site.set("targets.demo.batch.rooms", "2");
    daemon.signal(Signal::HUP);
    until("the new target", || {
        daemon.scrape().names("other").then_some(())
    });
    assert!(daemon.scrape().flag(success));
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn removed_target_has_no_series_any_more_though_its_batch_runs_on() {
    let mut site = Site::new(&[], &[("targets.demo.batch.hold", "3s")]);
    let daemon = site.run();
    let batch_id = daemon.begin("demo");
    site.wait_for_a_room();
    let renamed = std::mem::take(&mut site.settings).into_iter();
    let renamed = renamed.map(|(key, value)| (key.replace("targets.demo", "targets.other"), value));
    site.settings = renamed.collect();
    site.set("targets.other.batch.hold", "100ms");
    assert_eq!(daemon.post("/-/reload").0, 200);

    let scrape = daemon.scrape();
    assert!(!scrape.names("demo"));
    for counter in [
        "probes_total",
        "batches_total",
        "batches_skipped_total",
        "probe_failures_total",
        "slo_eligible_total",
    ] {
        assert_eq!(whole(scrape.sum(counter, &["target=other"])), 0);
    }
    assert_eq!(daemon.post("/api/v1/targets/demo/batches").0, 404);
    assert_eq!(daemon.recorded(&batch_id)["result"], "ok");
    assert!(!daemon.scrape().names("demo"));
    assert_eq!(daemon.batch("other")["result"], "ok");
    let scrape = daemon.scrape();
    assert!(!scrape.names("demo"));
    assert_eq!(whole(scrape.sum("probes_total", &["target=other"])), 1);

    site.set("targets.demo.agent_name", "demo");
    assert_eq!(daemon.post("/-/reload").0, 200);
    assert_eq!(daemon.target("demo")["last_batch"]["batch_id"], batch_id);
    assert_eq!(daemon.scrape().count("probes_total", &[]), 0);
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn target_that_was_removed_and_is_back_has_no_second_batch_beside_its_first() {
    let mut site = Site::new(&[], &[("targets.demo.batch.hold", "10m")]);
    let daemon = site.run();
    let batch_id = daemon.begin("demo");
    site.wait_for_a_room();
    let with_it = site.settings.clone();
    site.settings
        .retain(|key, _| !key.starts_with("targets.demo"));
    site.set("targets.other.agent_name", "other");
    assert_eq!(daemon.post("/-/reload").0, 200);
    site.settings = with_it;
    site.write();
    assert_eq!(daemon.post("/-/reload").0, 200);
    assert_eq!(daemon.target("demo")["running"], batch_id);
    assert_eq!(daemon.post("/api/v1/targets/demo/batches").0, 409);
}

#[test]
fn changed_target_keeps_its_counters_and_a_rotated_secret_is_read_again() {
    let mut site = Site::new(&[], &[]);
    let secret = site.folder.path().join("secret");
    std::fs::write(&secret, "the secret before").unwrap();
    let daemon = site.run();
    assert_eq!(daemon.batch("demo")["result"], "failed");
    let rejected = &["reason=auth_rejected"];
    assert_eq!(daemon.scrape().count("probe_failures_total", rejected), 1);

    std::fs::write(&secret, SECRET).unwrap();
    site.set("targets.demo.batch.rooms", "2");
    daemon.signal(Signal::HUP);
    until("the reload", || daemon.logged("settings reloaded").pop());
    assert_eq!(daemon.batch("demo")["summary"]["ok"], 2);
    let scrape = daemon.scrape();
    assert_eq!(scrape.count("probe_failures_total", rejected), 1);
    assert_eq!(scrape.count("probes_total", &[]), 3);
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn batch_by_post_stands_in_the_history_under_the_id_that_was_given() {
    let site = Site::new(&[], &[("targets.demo.batch.hold", "1s")]);
    let daemon = site.run();
    assert_eq!(daemon.post("/api/v1/targets/demo/pause").0, 200);
    assert_eq!(daemon.scrape().count("target_paused", &[]), 1);
    // A pause holds back the schedule alone.
    let batch_id = daemon.begin("demo");
    let (status, body) = daemon.post("/api/v1/targets/demo/batches");
    assert_eq!(status, 409);
    assert!(body["error"].as_str().unwrap().contains(&batch_id));
    assert_eq!(daemon.recorded(&batch_id)["batch_id"], batch_id);
    assert_eq!(daemon.post("/api/v1/targets/demo/resume").0, 200);
    assert_eq!(daemon.scrape().count("target_paused", &[]), 0);
    for path in ["pause", "resume", "batches"] {
        let path = format!("/api/v1/targets/nobody/{path}");
        assert_eq!(daemon.post(&path).0, 404, "{path}");
    }
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn tick_that_opens_nothing_is_counted_under_its_cause() {
    let settings = [
        ("targets.demo.schedule.every", "1s"),
        ("targets.demo.batch.hold", "3s"),
        ("projects.main.budget.agent_time_per_day", "1m"),
    ];
    let site = Site::new(&[], &settings);
    let daemon = site.run();
    let skipped = |cause: &str| {
        let cause = format!("cause={cause}");
        until(&cause, || {
            let count = daemon.scrape().count("batches_skipped_total", &[&cause]);
            (count > 0).then_some(())
        });
    };
    skipped("overlap");
    skipped("budget");
    let (status, body) = daemon.post("/api/v1/targets/demo/batches");
    assert_eq!(status, 429, "{body}");
    assert_eq!(body["error"], daemon.target("demo")["held_back"]);
    daemon.post("/api/v1/targets/demo/pause");
    skipped("paused");
    let scrape = daemon.scrape();
    assert_eq!(scrape.count("batches_total", &["result=ok"]), 1);
    assert_eq!(scrape.count("plan_limit_rejections_total", &[]), 0);
    assert_eq!(site.sandbox.handle.rooms_seen(), 1);
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn plan_limit_is_counted_under_its_kind_and_the_project_rests_as_told() {
    let told = Some(3000.0);
    thread::scope(|scope| {
        for (fault, limit, rest) in [
            ("upgrade=429,retry_after=50m", "connections", told),
            ("upgrade=429", "connections", None),
            ("upgrade=503", "node", None),
            ("create_room=429,retry_after=50m", "api_rate", told),
            ("create_room=429,html", "api_rate", None),
            ("create_dispatch=resource_exhausted", "agent_sessions", None),
            ("before_join=leave", "room", None),
            ("inference_error", "inference", None),
        ] {
            scope.spawn(move || rests_after(fault, limit, rest));
        }
    });
}

/// `told`: so many seconds, by `Retry-After`.
fn rests_after(fault: &str, limit: &str, told: Option<f64>) {
    // The agent joins before its inference fails, and the next room opens by then.
    let rooms = if limit == "inference" { "1" } else { "3" };
    let settings = [
        ("projects.main.backoff.first", "10m"),
        ("targets.demo.batch.rooms", rooms),
        ("targets.demo.schedule.every", "1s"),
    ];
    let site = Site::new(&[fault], &settings);
    let daemon = site.run();
    until("a tick held back", || {
        let count = daemon
            .scrape()
            .count("batches_skipped_total", &["cause=backoff"]);
        (count > 0).then_some(())
    });
    let scrape = daemon.scrape();
    let ended = scrape.sum("last_batch_completed_timestamp_seconds", &["target=demo"]);
    let until = scrape.sum("backoff_until_timestamp_seconds", &["project=main"]);
    // The room is deleted in between.
    let rest = until - ended;
    match told {
        Some(told) => assert!(
            (told - 60.0..=told + 1.0).contains(&rest),
            "{fault}: {rest}"
        ),
        None => assert!((200.0..1300.0).contains(&rest), "{fault}: {rest}"),
    }
    let limit = format!("limit={limit}");
    let counted = |name: &str, labels: &[&str]| scrape.count(name, labels);
    assert_eq!(counted("plan_limit_rejections_total", &[&limit]), 1);
    assert_eq!(counted("plan_limit_rejections_total", &[]), 1, "{fault}");
    assert_eq!(counted("batches_total", &["result=limited"]), 1, "{fault}");
    assert_eq!(counted("batches_total", &[]), 1, "{fault}");
    for sli in ["availability", "join", "first_speech"] {
        let sli = format!("sli={sli}");
        assert_eq!(counted("slo_eligible_total", &[&sli]), 0, "{fault}");
    }
    let service = &["sli=service"];
    assert_eq!(counted("slo_eligible_total", service), 1, "{fault}");
    assert_eq!(counted("slo_good_total", service), 0, "{fault}");
    assert_eq!(site.sandbox.handle.rooms_seen(), 1, "{fault}");
    assert_eq!(daemon.post("/api/v1/targets/demo/batches").0, 429);
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn rooms_of_a_killed_daemon_are_swept_by_the_next_and_their_agent_time_is_kept() {
    let mut site = Site::new(&[], &[]);
    let sandbox = site.sandbox.handle.clone();
    let daemon = site.run();
    daemon.batch("demo");
    let completed = "last_batch_completed_timestamp_seconds";
    let last = daemon.scrape().sum(completed, &["target=demo"]);
    assert_eq!(daemon.terminate().0, Some(0));

    site.set("targets.demo.batch.hold", "10m");
    site.set("targets.demo.batch.rooms", "3");
    let mut random = fastrand::Rng::with_seed(5);
    let mut left = 0;
    for _ in 0..5 {
        let mut daemon = site.run();
        let scrape = daemon.scrape();
        let restored = scrape.sum(completed, &["target=demo"]);
        assert!((restored - last).abs() < 0.01, "{restored} is not {last}");
        let used = scrape.sum("agent_budget_used_seconds", &["period=day"]);
        // A minute of the first batch; of each room since, the hold at the least.
        let known = 60 + (sandbox.rooms_seen() - 1) * 600;
        assert!(whole(used) >= known, "{used} is less than {known}");
        until("the sweep", || {
            let swept = daemon.scrape().count("rooms_swept_total", &[]);
            (swept >= left && sandbox.rooms().is_empty()).then_some(())
        });
        daemon.begin("demo");
        // The moment of the kill, not a wait for anything.
        thread::sleep(Duration::from_millis(random.u64(0..1200)));
        daemon.signal(Signal::KILL);
        assert_eq!(daemon.exit().0, None);
        left = sandbox.rooms().len() as u64;
    }
    let daemon = site.run();
    until("the last sweep", || {
        sandbox.rooms().is_empty().then_some(())
    });
    let listed = daemon.json("/api/v1/batches");
    assert_eq!(listed["batches"].as_array().unwrap().len(), 1);
    assert!(!daemon.scrape().flag("history_degraded"));
}

#[test]
fn second_process_on_the_same_history_exits_2_and_names_the_folder() {
    let site = Site::new(&[], &[]);
    let _daemon = site.run();
    let run = site.refused();
    assert_eq!(run.code, Some(2), "{}", run.output());
    let said = "another livekit-canary uses the folder";
    assert!(run.stderr.contains(said), "{}", run.output());
}

#[test]
fn settings_without_a_target_exit_2() {
    let mut site = Site::new(&[], &[]);
    site.settings.retain(|key, _| !key.starts_with("targets"));
    site.write();
    let run = site.refused();
    assert_eq!(run.code, Some(2), "{}", run.output());
    let said = "no target is configured: there is nothing to watch";
    assert!(run.stderr.contains(said), "{}", run.output());
}

#[test]
fn port_in_use_exits_1_and_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let site = Site::new(&[], &[("http.listen", &address)]);
    let run = site.refused();
    assert_eq!(run.code, Some(1), "{}", run.output());
    let said = format!("can't listen on {address}: Address already in use");
    assert!(run.stderr.contains(&said), "{}", run.output());
}

#[test]
fn broken_web_config_exits_2_and_names_the_key() {
    let site = Site::new(&[], &[("http.web_config_file", "web.yml")]);
    let file = site.folder.path().join("web.yml");
    std::fs::write(file, "basic_auth_user:\n  ops: x\n").unwrap();
    let run = site.refused();
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(run.stderr.contains("basic_auth_user"), "{}", run.output());
}

#[test]
fn folder_that_cannot_be_written_degrades_the_history_and_probing_goes_on() {
    let site = Site::new(&[], &[]);
    std::fs::write(site.folder.path().join("state"), "a file").unwrap();
    let daemon = site.run();
    daemon.begin("demo");
    let scrape = until("the batch", || {
        let scrape = daemon.scrape();
        (scrape.count("batches_total", &[]) == 1).then_some(scrape)
    });
    assert_eq!(scrape.count("batches_total", &["result=ok"]), 1);
    assert_eq!(scrape.count("probes_total", &[]), 1);
    assert!(scrape.flag("history_degraded"));
    assert_eq!(daemon.logged("the history is degraded").len(), 1);
    assert_eq!(daemon.get("/-/ready").0, 200);
    assert_eq!(daemon.terminate().0, Some(0));
}

#[test]
fn corrupt_history_is_moved_aside_with_one_line_and_the_new_one_is_written() {
    let site = Site::new(&[], &[]);
    let state = site.folder.path().join("state");
    assert_eq!(site.run().terminate().0, Some(0));
    let file = std::fs::read_dir(&state).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let database = std::fs::read(&path).unwrap().starts_with(b"SQLite format");
        database.then_some(path)
    });
    std::fs::write(file.unwrap(), "no database at all").unwrap();

    let daemon = site.run();
    assert_eq!(daemon.logged("is corrupt").len(), 1);
    assert_eq!(daemon.batch("demo")["result"], "ok");
    assert!(!daemon.scrape().flag("history_degraded"));
    assert_eq!(daemon.terminate().0, Some(0));
    let aside = std::fs::read_dir(&state).unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().contains(".corrupt-")
    });
    assert!(aside);
}

#[test]
fn log_on_a_pipe_is_json_with_one_line_a_batch_and_one_a_failed_probe() {
    let settings = [("targets.demo.batch.rooms", "2")];
    let site = Site::new(&["room2:no_track"], &settings);
    let daemon = site.run();
    let batch = daemon.batch("demo");
    let (code, log) = daemon.terminate();
    assert_eq!(code, Some(0));
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
}

#[test]
fn service_manager_is_told_of_readiness_reloads_life_and_the_end() {
    let site = Site::new(&[], &[]);
    let path = site.folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(GIVE_UP)).unwrap();
    let variables = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "200000"),
    ];
    let mut daemon = Daemon::start_with(site.folder.path(), &variables);
    // Reads on to the next message that has this in it.
    let told = |what: &str| {
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).unwrap();
            let message = std::str::from_utf8(&buffer[..length]).unwrap();
            if message.contains(what) {
                return message.to_owned();
            }
        }
    };
    told("READY=1");
    told("WATCHDOG=1");
    daemon.signal(Signal::HUP);
    assert!(told("RELOADING=1").contains("MONOTONIC_USEC="));
    told("READY=1");
    daemon.signal(Signal::TERM);
    told("STOPPING=1");
    // What it still tells has a reader.
    let (code, _) = daemon.exit();
    assert_eq!(code, Some(0));
}

#[test]
fn health_is_asked_for_as_a_container_does() {
    let site = Site::new(&[], &[]);
    let mut daemon = site.run();
    let ask = |url: &str| canary(site.folder.path(), ["health", url], &[]);
    let healthy = ask(&daemon.url("/-/healthy"));
    assert_eq!(healthy.code, Some(0), "{}", healthy.output());
    let unknown = ask(&daemon.url("/-/nothing"));
    assert_eq!(unknown.code, Some(1), "{}", unknown.output());
    for (query, code) in [("limit=1", 0), ("limit=none", 1)] {
        let asked = ask(&daemon.url(&format!("/api/v1/batches?{query}")));
        assert_eq!(asked.code, Some(code), "{query}: {}", asked.output());
    }
    daemon.signal(Signal::TERM);
    daemon.exit();
    let gone = ask(&daemon.url("/-/healthy"));
    assert_eq!(gone.code, Some(1));
    assert!(gone.stderr.contains("refused"), "{}", gone.output());
    assert_eq!(ask("https://127.0.0.1:1/").code, Some(2));
}
