//! What the daemon costs: the time of a scrape while batches run, and its memory while no batch runs.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};
use support::daemon::{DaemonDir, many_targets};
use support::stack::{AGENT, Stack};
use support::{SHORT_TIMEOUT, wait_for};
use tokio::time::Instant;

use crate::{pause, status};

/// Targets whose batches run while the metrics are scraped.
const BUSY_TARGETS: usize = 50;
const SCRAPES: usize = 200;
/// The pause between two scrapes.
const SCRAPE_PAUSE: Duration = Duration::from_millis(50);
const IDLE_TARGETS: usize = 10;
/// The time without batches before the memory is measured.
const IDLE_TIME: Duration = Duration::from_secs(10);

pub(crate) struct Daemons {
    /// The times of the scrapes in milliseconds, ascending.
    scrapes: Vec<f64>,
    scrape_kb: usize,
    /// The batches that ended during the scrapes.
    batches: f64,
    idle_rss_mb: f64,
}

pub(crate) fn measure() -> anyhow::Result<Daemons> {
    let sandbox = Stack::sandbox(AGENT, &[])?;
    let mut daemons = scrape(&sandbox)?;
    daemons.idle_rss_mb = idle_rss(&sandbox)?;
    Ok(daemons)
}

fn scrape(sandbox: &Stack) -> anyhow::Result<Daemons> {
    println!("scrapes: {BUSY_TARGETS} targets");
    let daemon_dir = DaemonDir::new()?;
    daemon_dir.write(&many_targets(sandbox, BUSY_TARGETS, "10s"))?;
    let daemon = daemon_dir.start()?;
    let ended = || daemon.scrape()?.sum("batches_total", &[]);
    wait_for("the first batches", SHORT_TIMEOUT, || {
        Ok((ended()? > 0.0).then_some(()))
    })?;
    let before = ended()?;
    let (mut scrapes, mut bytes) = (Vec::new(), 0);
    for _ in 0..SCRAPES {
        let start = Instant::now();
        bytes = daemon.http.text("/metrics")?.len();
        scrapes.push(start.elapsed().as_secs_f64() * 1e3);
        pause(SCRAPE_PAUSE);
    }
    scrapes.sort_by(f64::total_cmp);
    let batches = ended()? - before;
    daemon.terminate()?;
    Ok(Daemons {
        scrapes,
        scrape_kb: bytes / 1000,
        batches,
        idle_rss_mb: f64::NAN,
    })
}

/// The memory after a batch of each target, and long before the next batch.
fn idle_rss(sandbox: &Stack) -> anyhow::Result<f64> {
    println!("idle: {IDLE_TARGETS} targets");
    let daemon_dir = DaemonDir::new()?;
    daemon_dir.write(&many_targets(sandbox, IDLE_TARGETS, "20s"))?;
    let daemon = daemon_dir.start()?;
    wait_for("a batch of each target", Duration::from_mins(1), || {
        let metrics = daemon.scrape()?;
        let ended = (0..IDLE_TARGETS).map(|number| {
            let target = format!("t{number}");
            metrics.sum("batches_total", &[("target", &target)])
        });
        let ended = ended.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(ended.iter().all(|count| *count > 0.0).then_some(()))
    })?;
    daemon.pause()?;
    pause(IDLE_TIME);
    let kb = status(&daemon.running.child.id().to_string(), "VmRSS:")?;
    daemon.terminate()?;
    Ok(kb / 1024.0)
}

impl Daemons {
    fn quantile(&self, percent: usize) -> f64 {
        self.scrapes[(self.scrapes.len() * percent).div_ceil(100).max(1) - 1]
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "bench": "daemon",
            "scrape_targets": BUSY_TARGETS,
            "scrapes": self.scrapes.len(),
            "scrape_kb": self.scrape_kb,
            "scrape_median_ms": self.quantile(50),
            "scrape_p99_ms": self.quantile(99),
            "scrape_max_ms": self.quantile(100),
            "batches_during_scrapes": self.batches,
            "idle_targets": IDLE_TARGETS,
            "idle_rss_mb": self.idle_rss_mb,
        })
    }
}

impl fmt::Display for Daemons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (median, p99, max) = (self.quantile(50), self.quantile(99), self.quantile(100));
        write!(
            f,
            "{SCRAPES} scrapes of {BUSY_TARGETS} targets, {} batches during them: median {median:.1} ms, p99 {p99:.1} \
             ms, max {max:.1} ms\nidle with {IDLE_TARGETS} targets: {:.1} MB",
            self.batches, self.idle_rss_mb
        )
    }
}
