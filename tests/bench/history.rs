//! How long the pages and lists of a daemon with a large history take.

use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, params};
use serde_json::{Value, json};
use support::daemon::{DaemonDir, many_targets};
use support::stack::{AGENT, Stack};
use tokio::time::Instant;

/// 100,000 probes of three targets in 30 days.
const BATCHES: i64 = 33_334;
const ROOMS: i64 = 3;
const TARGETS: i64 = 3;
const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;
const SPAN: i64 = 30 * DAY;
/// Bytes of a probe's document.
const DOCUMENT: usize = 2800;
const REQUESTS: usize = 30;

/// The paths, from what people open to the worst case of a filter: one that nothing matches.
const PATHS: [&str; 9] = [
    "/",
    "/api/v1/statistics",
    "/api/v1/batches",
    "/api/v1/batches?target=t1&result=limited&purpose=scheduled",
    "/api/v1/batches?node=ND_none",
    "/api/v1/probes",
    "/api/v1/probes?outcome=failed&target=t1",
    "/api/v1/probes?node=ND_none",
    "/api/v1/probes?format=csv&limit=199",
];

pub(crate) struct Latency {
    path: &'static str,
    /// In milliseconds, ascending.
    times: Vec<f64>,
}

pub(crate) fn measure() -> anyhow::Result<Vec<Latency>> {
    println!("history: {} probes", BATCHES * ROOMS);
    let sandbox = Stack::sandbox(AGENT, &[])?;
    let daemon_dir = DaemonDir::new()?;
    daemon_dir.write(&many_targets(&sandbox, usize::try_from(TARGETS)?, "1h"))?;
    // The first run creates the file.
    daemon_dir.start()?.terminate()?;
    fill(&Connection::open(daemon_dir.database())?)?;
    let daemon = daemon_dir.start()?;
    daemon.pause()?;
    let latency = |path| {
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let start = Instant::now();
            daemon.http.text(path)?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(Latency { path, times })
    };
    let latencies = PATHS.into_iter().map(latency);
    let latencies = latencies.collect::<anyhow::Result<_>>()?;
    daemon.terminate()?;
    Ok(latencies)
}

/// Fills a history of format 3 with batches, probes and statistics of the last 30 days.
fn fill(file: &Connection) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = i64::try_from(now.as_millis())?;
    let start = now - SPAN;
    file.execute_batch("BEGIN")?;
    let mut batches = file.prepare(
        "INSERT INTO batches (id, target, project, started_at, ended_at, result, ok, failed, aborted, head, purpose)
         VALUES (?1, ?2, 'main', ?3, ?3 + 40000, ?4, ?5, ?6, 0, ?7, 'scheduled')",
    )?;
    let mut probes = file.prepare(
        "INSERT INTO probes (room, batch, place, outcome, reason, started_at, document, node, worker, media_path,
                             target, purpose)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'udp', ?10, 'scheduled')",
    )?;
    let document = probe_document();
    for number in 0..BATCHES {
        let at = start + number * (SPAN / BATCHES);
        // Sorts by time, as the ids of the canary do.
        let (id, target) = (
            format!("{at:016}-0a1b2-c3d4"),
            format!("t{}", number % TARGETS),
        );
        let failed = i64::from(number % 17 == 0);
        let result = if failed > 0 { "degraded" } else { "ok" };
        let head = batch_document(&id, &target, result, failed);
        batches.execute(params![
            id,
            target,
            at,
            result,
            ROOMS - failed,
            failed,
            head
        ])?;
        for place in 0..ROOMS {
            let is_failed = place < failed;
            probes.execute(params![
                format!("canary-0a1b2-{number:08}{place:04}"),
                id,
                place,
                if is_failed { "failed" } else { "ok" },
                is_failed.then_some("agent_silent"),
                at + place * 1000,
                document,
                format!("ND_{:08x}", (number + place) % 5),
                format!("AW_{:010x}", (number + place) % 12),
                target,
            ])?;
        }
    }
    fill_statistics(file, start, now)?;
    file.execute_batch("COMMIT")?;
    Ok(())
}

/// As many rooms and classes of delays as the probes would have given.
fn fill_statistics(file: &Connection, start: i64, now: i64) -> anyhow::Result<()> {
    let mut statistics = file.prepare(
        "INSERT INTO statistics (width, start, target, ok, failed, join_delays, first_speech_delays, reply_delays)
         VALUES (?1, ?2, ?3, ?4, 1, ?5, ?5, ?5)",
    )?;
    for (width, classes) in [(HOUR, 38), (DAY, 180)] {
        let rooms = BATCHES * ROOMS * width / SPAN / TARGETS;
        let mut delays = String::new();
        for class in 0..classes {
            let comma = if class == 0 { "" } else { "," };
            write!(
                delays,
                "{comma}\"{}\":{}",
                256 + 8 * class,
                (rooms / classes).max(1)
            )?;
        }
        let delays = format!("{{{delays}}}");
        for span in start / width..=now / width {
            for target in 0..TARGETS {
                let target = format!("t{target}");
                statistics.execute(params![width, span * width, target, rooms, delays])?;
            }
        }
    }
    Ok(())
}

fn batch_document(id: &str, target: &str, result: &str, failed: i64) -> String {
    json!({
        "batch_id": id, "target": target, "project": "main", "purpose": "scheduled",
        "started_at": "2026-09-21T14:13:20.123456Z", "ended_at": "2026-09-21T14:14:00.123456Z",
        "result": result, "deployment": null, "ramp": "after_join", "not_opened": null,
        "summary": {"ok": ROOMS - failed, "failed": failed, "aborted": 0,
                    "join_delay": {"p50": 0.5, "p90": 0.6, "max": 0.6}},
    })
    .to_string()
}

fn probe_document() -> String {
    let mut document = json!({
        "room": "canary-0a1b2-000000000000", "room_sid": "RM_1", "started_at": "2026-09-21T14:13:20.123456Z",
        "position": "first", "outcome": "ok", "reason": null, "origin": null, "limit": null, "detail": null,
        "join_delay_seconds": 0.512, "join_upper_bound": false, "first_speech_delay_seconds": 0.69,
        "reply_delay_seconds": 1.25, "turns": [], "transcript": null,
        "evidence": {"notes": [null]},
    });
    let rest = DOCUMENT.saturating_sub(document.to_string().len());
    document["evidence"]["notes"][0] = "x".repeat(rest).into();
    document.to_string()
}

impl Latency {
    fn median(&self) -> f64 {
        self.times[self.times.len() / 2]
    }

    fn max(&self) -> f64 {
        self.times.last().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "bench": "history",
            "probes": BATCHES * ROOMS,
            "path": self.path,
            "requests": self.times.len(),
            "median_ms": self.median(),
            "max_ms": self.max(),
        })
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (median, max) = (self.median(), self.max());
        write!(f, "{}: median {median:.1} ms, max {max:.1} ms", self.path)
    }
}
