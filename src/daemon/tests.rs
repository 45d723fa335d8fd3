use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::TimeDelta;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::config::RawConfig;
use crate::probe::{Position, ProbeReport, Reason};
use crate::report::sample;

/// The port is closed: every probe fails at once, and no room needs a clean-up.
const SETTINGS: &str = r#"
projects.acme = { url = "ws://127.0.0.1:1", api_key = "key", api_secret = "secret" }
targets.early = { agent_name = "early" }
targets.late = { agent_name = "late", schedule.cron = "*/5 * * * *" }
"#;

async fn daemon() -> (Daemon, TempDir) {
    daemon_with(|settings| History::open(settings).unwrap()).await
}

async fn daemon_with(
    history: impl FnOnce(&config::HistorySettings) -> History,
) -> (Daemon, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("canary.toml");
    std::fs::write(&file, SETTINGS).unwrap();
    let mut config = RawConfig::read(Some(&file), [])
        .unwrap()
        .validate()
        .unwrap();
    config.daemon.history.dir = folder.path().join("state");
    let build = Build {
        version: "1".to_owned(),
        revision: "2".to_owned(),
        rustc: "3".to_owned(),
        engine: "4".to_owned(),
    };
    let options = DaemonOptions {
        web: WebConfig::load(&config.daemon.http).unwrap(),
        history: history(&config.daemon.history),
        read_config: Arc::new({
            let config = config.clone();
            move || Ok(config.clone())
        }),
        config,
        listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        build,
        fault: None,
        drill: false,
        observer: None,
    };
    (Daemon::start(options).await.unwrap(), folder)
}

impl Daemon {
    /// Delivers a tick to every target, and waits until its batches have ended.
    async fn run_tick(&mut self, due: DateTime<Utc>) {
        let names: Vec<String> = self.targets.keys().cloned().collect();
        for target in names {
            self.tick(&Tick {
                target,
                due,
                late: Duration::ZERO,
                dropped: 0,
            });
        }
        while let Some(ended) = self.batches.join_next_with_id().await {
            self.batch_ended(ended);
        }
    }

    /// The counts that a leak would increase: running batches, their tasks, room permits, and series.
    fn size(&self) -> [usize; 4] {
        let guard = &self.projects["acme"].guard;
        let series = self.metrics.render().lines().count();
        [
            self.running.len(),
            self.batches.len(),
            guard.rooms_held(),
            series,
        ]
    }
}

/// A hanging file system, such as an NFS server that is gone.
#[tokio::test(start_paused = true)]
async fn reload_that_hangs_fails_and_neither_blocks_the_loop_nor_starts_a_second_read() {
    let (mut daemon, _folder) = daemon().await;
    let (unblock, blocked) = std::sync::mpsc::channel::<()>();
    let (blocked, reads) = (
        std::sync::Mutex::new(blocked),
        Arc::new(AtomicUsize::new(0)),
    );
    let counted = Arc::clone(&reads);
    let config = daemon.config.clone();
    daemon.read_config = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let _end = blocked.lock().unwrap().recv();
        Ok(config.clone())
    });
    let request = |daemon: &mut Daemon| {
        let (reply, answer) = oneshot::channel();
        daemon.request_reload(Some(reply));
        answer
    };
    let (first, second) = (request(&mut daemon), request(&mut daemon));
    while reads.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    // A paused clock does not advance while a thread blocks, so the test moves it.
    let read = settings::next_read(&mut daemon.reload);
    let (read, ()) = tokio::join!(read, tokio::time::advance(Duration::from_secs(10)));
    daemon.settings_read(read).await;
    let third = request(&mut daemon);
    for (answer, why) in [
        (first, "within 10s: a file system hangs"),
        (second, "an earlier reload still waits"),
        (third, "an earlier reload still waits"),
    ] {
        let refused = answer.await.unwrap().unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    assert_eq!(reads.load(Ordering::Relaxed), 1);
    drop(unblock);
    let read = settings::next_read(&mut daemon.reload).await;
    daemon.settings_read(read).await;
    let answer = request(&mut daemon);
    let read = settings::next_read(&mut daemon.reload).await;
    daemon.settings_read(read).await;
    assert_eq!(answer.await.unwrap(), Ok(Vec::new()));
    assert_eq!(reads.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn day_of_batches_leaks_no_task_no_series_and_no_room_permit() {
    let (mut daemon, _folder) = daemon().await;
    let midnight = Utc::now();
    daemon.run_tick(midnight).await;
    let (size, tasks) = (daemon.size(), Handle::current().metrics().num_alive_tasks());
    for minutes in (5..24 * 60).step_by(5) {
        daemon
            .run_tick(midnight + Duration::from_mins(minutes))
            .await;
        assert_eq!(daemon.size(), size, "after {minutes} minutes");
    }
    let settled = async {
        while Handle::current().metrics().num_alive_tasks() > tasks {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_mins(1), settled)
        .await
        .expect("there are more tasks than after one batch");
    assert!(
        daemon
            .history
            .close(Instant::now() + Duration::from_mins(1))
            .await
    );
    let counts = daemon.history.counts("early").await.unwrap();
    assert_eq!(counts.batches["failed"], 24 * 60 / 5, "{counts:?}");
}

#[tokio::test]
async fn target_has_its_series_although_the_read_for_another_one_failed() {
    // It has no file, so each read fails.
    let (daemon, _folder) = daemon_with(|_| History::in_memory(Arc::new(Utc::now))).await;
    let text = daemon.metrics.render();
    for target in ["early", "late"] {
        let open = format!("livekit_canary_incident_open{{fault=\"agent\",target=\"{target}\"}} 0");
        assert!(text.lines().any(|line| line == open), "{open} in {text}");
    }
}

#[tokio::test]
async fn target_that_a_reload_adds_links_to_the_address_that_the_daemon_started_with() {
    let (mut daemon, _folder) = daemon().await;
    let mut config = daemon.config.clone();
    let added = config.targets["early"].clone();
    config.targets.insert("added".to_owned(), added);
    config.daemon.http.external_url = Some("https://new.example.com/".parse().unwrap());
    let access = settings::access(&config).unwrap();
    daemon.apply(config, access);
    let detector = daemon.targets["added"].detector.clone();
    let now = Utc::now();
    for (number, seconds) in [0, 40, 40, 40].into_iter().enumerate() {
        let report = ProbeReport::new(
            RoomName(format!("canary-{number}")),
            Position::First,
            now + TimeDelta::seconds(seconds),
            sample::failed(Reason::AgentSilent, "as scripted"),
        );
        detector.room("batch", Purpose::Scheduled, &report);
    }
    assert!(detector.open_incident().is_some());
    let text = daemon.metrics.render();
    let mut lines = text.lines();
    let info = lines.find(|line| line.starts_with("livekit_canary_incident_info{"));
    assert!(
        info.is_some_and(|info| info.contains("url=\"\"")),
        "{info:?}"
    );
}

#[tokio::test]
async fn confirmation_of_a_target_that_is_back_is_still_a_confirmation() {
    let (mut daemon, _folder) = daemon().await;
    daemon.start_confirmation("early", 1);
    let running = daemon.targets["early"].confirmation.clone();
    assert!(running.is_some());
    let config = daemon.config.clone();
    let mut without = config.clone();
    without.targets.remove("early");
    for config in [without, config] {
        let access = settings::access(&config).unwrap();
        daemon.apply(config, access);
    }
    let early = &daemon.targets["early"];
    assert_eq!((&early.running, &early.confirmation), (&None, &running));
    while let Some(ended) = daemon.batches.join_next_with_id().await {
        daemon.batch_ended(ended);
    }
    let early = &daemon.targets["early"];
    assert_eq!(early.confirmation, None);
    assert!(early.last_batch.is_none(), "{:?}", early.last_batch);
}

#[tokio::test]
async fn confirmation_starts_only_if_the_limit_of_the_day_is_enough_for_all_its_rooms() {
    let (mut daemon, _folder) = daemon().await;
    let target = daemon.targets.get_mut("early").unwrap();
    let project = &daemon.projects["acme"].settings;
    let [one, two] = [1, 2].map(|rooms| {
        let settings = target.settings.confirming(rooms);
        worst_cases(&settings, project).sum::<Duration>()
    });
    let settings = Arc::make_mut(&mut target.settings);
    settings.confirm.agent_time_per_day = Some((one + two) / 2);
    daemon.start_confirmation("early", 2);
    assert_eq!(daemon.targets["early"].confirmation, None);
    daemon.start_confirmation("early", 1);
    assert!(daemon.targets["early"].confirmation.is_some());
}
