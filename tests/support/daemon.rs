//! A daemon in a process of its own, with its folder and a client of its HTTP.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::canary::{Canary, Finished, Running, engine};
use crate::http::HttpClient;
use crate::report::Batch;
use crate::scrape::Scrape;
use crate::stack::{AGENT, Stack};
use crate::wait_for;

/// The limit for everything that a daemon does at once or after a short batch, on a machine that may be busy.
const TIMEOUT: Duration = Duration::from_mins(2);

/// The shutdown of most daemons: immediate.
pub const NO_LINGER: &str = "lifetime.shutdown_linger = \"0s\"";

/// The settings file and the state of a daemon. They outlive it.
pub struct DaemonDir(TempDir);

impl DaemonDir {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn database(&self) -> PathBuf {
        self.path().join("state/history.sqlite3")
    }

    /// Writes settings of these targets with their projects.
    pub fn write(&self, targets: &str) -> anyhow::Result<()> {
        self.write_with(NO_LINGER, targets)
    }

    /// Writes settings of these targets. `lifetime` are the settings of the shutdown. No batch starts by itself unless a
    /// target has a schedule.
    pub fn write_with(&self, lifetime: &str, targets: &str) -> anyhow::Result<()> {
        let startup_delay = if targets.contains("schedule") {
            "2s"
        } else {
            "1h"
        };
        self.write_file(&format!(
            "http.listen = \"127.0.0.1:0\"
history.dir = \"state\"
lifetime.startup_delay = \"{startup_delay}\"
{lifetime}
{targets}"
        ))
    }

    /// Writes a whole settings file. It must listen on port 0.
    pub fn write_file(&self, text: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.path().join("canary.toml"), text)?)
    }

    fn run_command(&self) -> Canary {
        Canary::new(["run", "--config", "canary.toml"]).current_dir(self.path())
    }

    /// Starts a daemon, and waits until it is ready.
    pub fn start(&self) -> anyhow::Result<Daemon> {
        self.start_with(&[])
    }

    /// Starts a daemon with these environment variables, and waits until it is ready.
    pub fn start_with(&self, variables: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        let mut running = self.run_command().envs(variables).start()?;
        let listening = wait_for("the daemon to listen", TIMEOUT, || {
            let ended = running.has_ended()?;
            let address = logged(&running, "listening on ")?.pop();
            Ok((ended || address.is_some()).then_some(address))
        })?;
        let Some(listening) = listening else {
            bail!("the daemon ended: {}", running.finish()?.output());
        };
        let address = listening["address"].as_str().context("no address")?;
        let daemon = Daemon {
            http: HttpClient::new(address.parse()?),
            running,
        };
        daemon.wait_for("readiness", || {
            let ready = daemon.http.get("/-/ready")?;
            Ok((ready.status == 200).then_some(()))
        })?;
        Ok(daemon)
    }

    /// Runs a daemon whose start fails.
    pub fn run_refused(&self) -> anyhow::Result<Finished> {
        self.run_command().run()
    }
}

/// A running daemon. Dropping it kills the process.
pub struct Daemon {
    pub running: Running,
    pub http: HttpClient,
}

impl Daemon {
    /// Waits as [`wait_for`] does. The error contains the log.
    pub fn wait_for<T>(
        &self,
        what: &str,
        ask: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let found = wait_for(what, TIMEOUT, ask);
        found.with_context(|| self.running.stderr().unwrap_or_default())
    }

    pub fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::parse(&self.http.text("/metrics")?)
    }

    /// The status of all targets.
    pub fn targets(&self) -> anyhow::Result<Vec<TargetStatus>> {
        #[derive(Deserialize)]
        struct Status {
            targets: Vec<TargetStatus>,
        }
        Ok(self.http.json::<Status>("/api/v1/targets")?.targets)
    }

    /// Starts a batch, and returns its id.
    pub fn start_batch(&self, target: &str) -> anyhow::Result<String> {
        let path = format!("/api/v1/targets/{target}/batches");
        let response = self.http.post(&path)?;
        ensure!(response.status == 202, "{response:?}");
        let id = response.json()?["batch_id"].as_str().map(str::to_owned);
        id.with_context(|| response.body)
    }

    /// Waits until a batch has ended and is in the history, and returns its JSON.
    pub fn wait_for_batch(&self, batch_id: &str) -> anyhow::Result<Value> {
        self.wait_for("the end of the batch", || {
            let targets = self.targets()?;
            let mut running = targets.iter().filter_map(|target| target.running.as_ref());
            Ok((!running.any(|id| id == batch_id)).then_some(()))
        })?;
        let path = format!("/api/v1/batches/{batch_id}");
        self.wait_for("the batch in the history", || {
            // The history is written a moment after the end.
            let response = self.http.get(&path)?;
            (response.status == 200)
                .then(|| response.json())
                .transpose()
        })
    }

    /// Pauses all targets, and waits until no batch runs.
    pub fn pause(&self) -> anyhow::Result<()> {
        for target in self.targets()? {
            let path = format!("/api/v1/targets/{}/pause", target.name);
            self.http.post(&path)?.success()?;
        }
        self.wait_for("the batches to end", || {
            let idle = self
                .targets()?
                .iter()
                .all(|target| target.running.is_none());
            Ok(idle.then_some(()))
        })
    }

    /// All batches that an idle daemon has counted, the oldest first.
    pub fn all_batches(&self, target: &str) -> anyhow::Result<Vec<Batch>> {
        let scrape = self.scrape()?;
        let counted = scrape.count("batches_total", &[("target", target)])?;
        // The history is written a moment after the counters.
        self.wait_for("all batches in the history", || {
            let batches = self.batches(target)?;
            Ok((batches.len() as u64 >= counted).then_some(batches))
        })
    }

    /// The batches of a target in the history, the oldest first.
    pub fn batches(&self, target: &str) -> anyhow::Result<Vec<Batch>> {
        #[derive(Deserialize)]
        struct Page {
            batches: Vec<Head>,
            next_before: Option<String>,
        }
        #[derive(Deserialize)]
        struct Head {
            batch_id: String,
        }
        let mut batches = Vec::new();
        let mut before = String::new();
        loop {
            let path = format!("/api/v1/batches?target={target}&limit=100{before}");
            let page: Page = self.http.json(&path)?;
            for head in page.batches {
                let path = format!("/api/v1/batches/{}", head.batch_id);
                batches.push(self.http.json(&path)?);
            }
            let Some(next) = page.next_before else { break };
            before = format!("&before={next}");
        }
        batches.reverse();
        Ok(batches)
    }

    /// The lines of the log whose message contains this text.
    pub fn logged(&self, text: &str) -> anyhow::Result<Vec<Value>> {
        logged(&self.running, text)
    }

    /// As [`logged`](Self::logged), once there is such a line. A thread of its own writes the log, so a response may come before
    /// the line about it.
    pub fn wait_for_log(&self, text: &str) -> anyhow::Result<Vec<Value>> {
        self.wait_for(text, || {
            let lines = self.logged(text)?;
            Ok((!lines.is_empty()).then_some(lines))
        })
    }

    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.running.signal(signal)
    }

    /// Waits until the daemon has ended.
    pub fn finish(self) -> anyhow::Result<Finished> {
        self.running.finish()
    }

    /// Sends SIGTERM, and waits until the daemon has ended with exit status 0.
    pub fn terminate(self) -> anyhow::Result<Finished> {
        self.signal(Signal::TERM)?;
        self.finish()?.expect_code(0)
    }
}

fn logged(running: &Running, text: &str) -> anyhow::Result<Vec<Value>> {
    let log = running.log()?.into_iter();
    let has_text = |line: &Value| {
        let message = line["message"].as_str();
        message.is_some_and(|message| message.contains(text))
    };
    Ok(log.filter(has_text).collect())
}

#[derive(Debug, Deserialize)]
pub struct TargetStatus {
    pub name: String,
    pub state: String,
    /// The id of the open incident.
    pub incident: Option<String>,
    /// The id of the batch that runs.
    pub running: Option<String>,
    pub last_batch: Option<LastBatch>,
}

#[derive(Debug, Deserialize)]
pub struct LastBatch {
    pub batch_id: String,
}

/// Settings of `count` targets on one project, each with one short room.
pub fn many_targets(stack: &Stack, count: usize, every: &str) -> String {
    let Stack {
        url, key, secret, ..
    } = stack;
    let project = format!(
        "[projects.main]
url = \"{url}\"
api_key = \"{key}\"
api_secret = \"{secret}\"
max_rooms = 20
"
    );
    let targets = (0..count).map(|number| {
        format!(
            "[targets.t{number}]
agent_name = \"{AGENT}\"
engine = \"{}\"
schedule.every = \"{every}\"
batch.rooms = 1
batch.hold = \"100ms\"
caller.silence = \"100ms\"
confirm.rooms = 0
expect.reply = false
",
            engine()
        )
    });
    project + &targets.collect::<String>()
}
