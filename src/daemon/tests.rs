use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::config::RawConfig;

/// The port is closed: every probe fails at once, and no room needs a clean-up.
const SETTINGS: &str = r#"
projects.acme = { url = "ws://127.0.0.1:1", api_key = "key", api_secret = "secret" }
targets.early = { agent_name = "early" }
targets.late = { agent_name = "late", schedule.cron = "*/5 * * * *" }
"#;

async fn daemon() -> (Daemon, TempDir) {
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
        history: History::open(&config.daemon.history).unwrap(),
        read_config: Box::new({
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
