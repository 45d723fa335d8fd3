//! The guard rails of a project against the sandbox: the journal, the billed agent time, and the back-off after a plan limit.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::Utc;
use futures_util::future::join_all;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::batch::{self, Access, BatchEvent};
use crate::config::{self, Config, Period, RawConfig};
use crate::guard::Guard;
use crate::history::tests::{print_to_parent, run_and_kill};
use crate::history::{BatchFilter, History};
use crate::janitor::{CleanupResult, Janitor};
use crate::livekit::RoomName;
use crate::livekit::event::MediaPath;
use crate::livekit::wire::api::Api;
use crate::livekit::wire::connect::Endpoint;
use crate::livekit::wire::token::Keys;
use crate::probe::driver::Context;
use crate::probe::{Outcome, Reason};
use crate::report::{BatchReport, Purpose};
use crate::sandbox::{Handle, Sandbox, SandboxSettings};

const CONFIG: &str = r#"
[projects.sandbox]
api_timeout = "2s"
[targets.demo]
agent_name = "demo"
late_agent_window = "100ms"
[targets.demo.batch]
hold = "1s"
[targets.demo.deadlines]
signal = "2s"
media = "5s"
join = "3s"
track = "2s"
speech = "4s"
reply = "8s"
cleanup = "2s"
"#;

/// For waits that never run out.
const AMPLE: Duration = Duration::from_mins(1);

/// A sandbox, and a canary with its own state folder.
struct GuardStage {
    sandbox: Handle,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
    config: Config,
    folder: TempDir,
    history: History,
    guard: Guard,
    janitor: Janitor,
    unconfirmed: Arc<Mutex<Vec<String>>>,
}

impl GuardStage {
    async fn new(faults: &[&str]) -> Self {
        let settings = SandboxSettings {
            agent_name: "demo".to_owned(),
            faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
            ..SandboxSettings::default()
        };
        let sandbox = Sandbox::bind(settings).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = read(&sandbox.url(), folder.path());
        let handle = sandbox.handle();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(sandbox.run(shutdown.clone()));
        let history = open(folder.path());
        let guard = Guard::new("sandbox", &config.projects["sandbox"], history.clone());
        let unconfirmed = Arc::new(Mutex::new(Vec::new()));
        Self {
            sandbox: handle,
            shutdown,
            serving,
            config,
            folder,
            janitor: janitor(&history, &unconfirmed),
            history,
            guard,
            unconfirmed,
        }
    }

    async fn batch(&self, rooms: usize) -> Arc<BatchReport> {
        let mut target = self.config.targets["demo"].clone();
        target.batch.rooms = rooms;
        let context = context(&self.config, target, self.janitor.clone());
        let abort = CancellationToken::new();
        batch::run(
            batch::new_id(),
            "demo",
            Purpose::Scheduled,
            context,
            Access::Queue(self.guard.clone()),
            abort,
            |_| {},
        )
        .await
    }

    fn used_minutes(&self) -> u64 {
        self.guard.used(Period::Day).as_secs() / 60
    }

    async fn close(self) -> TempDir {
        let rooms = self.janitor.close(Instant::now() + AMPLE).await;
        assert_eq!(rooms, []);
        assert_eq!(*self.unconfirmed.lock().unwrap(), [""; 0]);
        assert!(self.history.close(Instant::now() + AMPLE).await);
        self.shutdown.cancel();
        self.serving.await.unwrap();
        self.folder
    }
}

fn read(url: &str, folder: &Path) -> Config {
    let file = folder.join("canary.toml");
    std::fs::write(&file, CONFIG).unwrap();
    let variables = [
        ("LIVEKIT_URL", url),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", "secret"),
    ];
    let variables = variables.map(|(name, value)| (name.into(), value.into()));
    RawConfig::read(Some(&file), variables)
        .and_then(RawConfig::validate)
        .unwrap()
}

fn open(folder: &Path) -> History {
    let settings = config::HistorySettings {
        dir: folder.join("state"),
        ..config::HistorySettings::default()
    };
    History::open(&settings).unwrap()
}

fn janitor(history: &History, unconfirmed: &Arc<Mutex<Vec<String>>>) -> Janitor {
    let (history, unconfirmed) = (history.clone(), Arc::clone(unconfirmed));
    Janitor::start_with(Arc::new(
        move |room: &RoomName, result: CleanupResult<'_>| match result {
            CleanupResult::Gone => history.gone(room),
            CleanupResult::Unconfirmed { why } => {
                unconfirmed.lock().unwrap().push(format!("{room}: {why}"));
            }
        },
    ))
}

fn access(config: &Config) -> (Endpoint, Api) {
    let endpoint = Endpoint::new(&config.projects["sandbox"].url, None).unwrap();
    let keys = Keys::new("devkey", "secret").unwrap();
    let api = Api::new(endpoint.clone(), keys, Duration::from_secs(2));
    (endpoint, api)
}

fn context(config: &Config, target: config::Target, janitor: Janitor) -> Context {
    let (endpoint, api) = access(config);
    Context {
        project: Arc::new(config.projects["sandbox"].clone()),
        target: Arc::new(target),
        endpoint,
        api,
        janitor,
        stalls: crate::stall::tests::manual().0,
        recordings: None,
        agent_known: false,
        fault: None,
    }
}

fn limit(report: &BatchReport) -> &'static str {
    match &report.probes[0].outcome {
        Outcome::Failed(failure) => match failure.reason {
            Reason::PlanLimit(limit) => limit.label(),
            other => panic!("{}: {}", other.label(), failure.detail),
        },
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_room_of_a_batch_is_in_the_journal_billed_and_confirmed_gone() {
    let stage = GuardStage::new(&[]).await;
    let report = stage.batch(2).await;
    assert_eq!(report.result().label(), "ok");
    let (target, project) = (
        &stage.config.targets["demo"],
        &stage.config.projects["sandbox"],
    );
    stage.history.record(&report, target, project);
    assert_eq!(stage.used_minutes(), 2, "one started minute per room");
    let folder = stage.close().await;

    let history = open(folder.path());
    assert_eq!(history.orphan_rooms(), []);
    assert_eq!(history.used("sandbox").month, Duration::from_mins(2));
    let counts = history.counts("demo").await.unwrap();
    assert_eq!((counts.rooms, counts.probes["ok"]), (2, 2));
    let filter = BatchFilter {
        limit: 9,
        ..BatchFilter::default()
    };
    let heads = history.batches(filter).await.unwrap();
    let head: Value = serde_json::from_str(heads[0].document.get()).unwrap();
    assert_eq!(head["batch_id"], report.batch_id.as_str());
    let room = report.probes[0].room.clone();
    let probe = history.probe(room.0.clone()).await.unwrap().unwrap();
    let probe: Value = serde_json::from_str(probe.get()).unwrap();
    assert_eq!(
        (&probe["room"], &probe["outcome"]),
        (&room.0.into(), &"ok".into())
    );
    assert!(history.has_seen_agent("demo", Some("demo")).await.unwrap());
}

#[tokio::test]
async fn poisoned_worker_is_known_by_its_rooms_and_so_are_node_region_path_and_version() {
    let faults = [
        "worker2:silent_track",
        "worker2:version=1.5.0",
        "room1:node=ND_1",
        "region=eu",
    ];
    let mut stage = GuardStage::new(&faults).await;
    let target = stage.config.targets.get_mut("demo").unwrap();
    target.deadlines.speech = Duration::from_secs(2);
    target.expect.reply = false;
    let report = stage.batch(4).await;
    let rooms = report.probes.iter().map(|probe| {
        let circumstances = &probe.circumstances;
        let worker = circumstances.worker.as_deref().unwrap_or("unknown");
        let version = circumstances.agent_version.as_deref();
        assert_eq!(circumstances.region.as_deref(), Some("eu"));
        assert_eq!(circumstances.media_path, Some(MediaPath::Udp));
        (probe.outcome.label(), worker, version)
    });
    let (well, silent) = (
        ("ok", "AW_sandbox1", None),
        ("failed", "AW_sandbox2", Some("1.5.0")),
    );
    assert_eq!(rooms.collect::<Vec<_>>(), [well, silent, well, silent]);
    let nodes = report.probes.iter().map(|probe| {
        let node = probe.circumstances.node.as_deref();
        node == Some("ND_1")
    });
    assert_eq!(nodes.collect::<Vec<_>>(), [true, false, false, false]);
    stage.close().await;
}

#[tokio::test]
async fn server_that_cannot_list_jobs_leaves_the_worker_unknown_and_the_probe_ok() {
    for fault in ["list_dispatch=500", "list_dispatch=hang"] {
        let mut stage = GuardStage::new(&[fault]).await;
        stage.config.targets.get_mut("demo").unwrap().expect.reply = false;
        let report = stage.batch(1).await;
        let probe = &report.probes[0];
        assert_eq!(probe.outcome, Outcome::Ok, "{fault}");
        assert_eq!(probe.circumstances.worker, None, "{fault}");
        stage.close().await;
    }
}

#[tokio::test]
async fn room_without_an_agent_is_billed_nothing() {
    let mut stage = GuardStage::new(&["never_accepts"]).await;
    let target = stage.config.targets.get_mut("demo").unwrap();
    target.deadlines.join = Duration::from_millis(500);
    let report = stage.batch(1).await;
    assert_eq!(report.result().label(), "failed");
    assert_eq!(stage.used_minutes(), 0);
    let folder = stage.close().await;
    assert_eq!(open(folder.path()).orphan_rooms(), []);
}

#[tokio::test]
async fn each_plan_limit_that_livekit_names_stops_the_batch_and_starts_a_backoff() {
    let cases = [
        ("create_room=429,retry_after=90s", "api_rate", 90..=90),
        ("create_room=429", "api_rate", 60..=75),
        ("upgrade=429,retry_after=90s", "connections", 90..=90),
        ("upgrade=503", "node", 60..=75),
        ("before_join=leave", "room", 60..=75),
        (
            "create_dispatch=resource_exhausted",
            "agent_sessions",
            60..=75,
        ),
    ];
    let all = cases.map(|(fault, named, backoff)| expect_backoff(fault, named, backoff));
    join_all(all).await;
}

/// A batch with this fault meets the limit, and the next batch opens no room. `backoff` is in seconds.
async fn expect_backoff(fault: &str, named: &str, backoff: RangeInclusive<i64>) {
    let stage = GuardStage::new(&[fault]).await;
    let report = stage.batch(3).await;
    assert_eq!(limit(&report), named, "{fault}");
    assert_eq!(report.probes.len(), 1, "{fault}: no further room");
    assert_eq!(report.not_opened.as_ref().unwrap().rooms, 2, "{fault}");
    let ended = Utc::now();
    let until = stage.guard.backoff_until().unwrap();
    // The back-off began when the limit was known, a little before the end of the batch.
    let left = (until - ended).num_seconds();
    assert!(
        left <= *backoff.end() && left >= backoff.start() - 15,
        "{fault}: {left} s"
    );

    let next = stage.batch(3).await;
    assert_eq!(next.probes.len(), 0, "{fault}");
    let denial = next.not_opened.as_ref().unwrap().denial.as_ref().unwrap();
    assert_eq!(denial.label(), "backoff", "{fault}");
    stage.close().await;
}

/// Names the state folder and the server of the child process.
const CHILD: [&str; 2] = ["CANARY_TEST_FOLDER", "CANARY_TEST_SERVER"];

#[tokio::test]
#[ignore = "the child of the test below, which kills it"]
async fn child() {
    let [folder, url] = CHILD.map(|name| std::env::var(name).unwrap());
    let folder = Path::new(&folder);
    let mut config = read(&url, folder);
    let mut target = config.targets.remove("demo").unwrap();
    target.batch.hold = AMPLE;
    let history = open(folder);
    let guard = Guard::new("sandbox", &config.projects["sandbox"], history.clone());
    let janitor = janitor(&history, &Arc::default());
    let context = context(&config, target, janitor);
    let abort = CancellationToken::new();
    let print = |event: &BatchEvent| print_to_parent(&format!("{event:?}"));
    let id = batch::new_id();
    let purpose = Purpose::Scheduled;
    batch::run(
        id,
        "demo",
        purpose,
        context,
        Access::Queue(guard),
        abort,
        print,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rooms_of_a_killed_process_were_reserved_and_the_next_process_sweeps_them() {
    // The first line is the start of the batch. The numbers reach from before the first room to after the last join.
    for lines in [2, 4, 9, 21, 37] {
        let stage = GuardStage::new(&[]).await;
        assert!(stage.history.close(Instant::now() + AMPLE).await);
        let url = &stage.config.projects["sandbox"].url;
        let values = [stage.folder.path().as_os_str(), url.as_str().as_ref()];
        let variables = [(CHILD[0], values[0]), (CHILD[1], values[1])];
        tokio::task::block_in_place(|| {
            run_and_kill("guard::sandbox_tests::child", lines, &variables)
        });

        let history = open(stage.folder.path());
        let orphans: Vec<RoomName> = history
            .orphan_rooms()
            .into_iter()
            .map(|orphan| orphan.room)
            .collect();
        let open = stage.sandbox.rooms();
        for room in &open {
            assert!(
                orphans.iter().any(|orphan| orphan.0 == *room),
                "{room} is not in {orphans:?}"
            );
        }
        let reserved = history.used("sandbox").day;
        assert!(
            reserved >= Duration::from_mins(orphans.len() as u64),
            "{reserved:?}"
        );

        let janitor = janitor(&history, &Arc::default());
        let swept = janitor
            .sweep(&access(&stage.config).1, orphans.clone())
            .await;
        assert_eq!((swept.deleted, swept.unconfirmed), (orphans, Vec::new()));
        assert_eq!(stage.sandbox.rooms(), [""; 0], "after {lines} events");
        stage.shutdown.cancel();
    }
}
