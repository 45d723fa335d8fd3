//! Runs the product's binary as a user would, and reads what it printed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use chrono::{DateTime, Utc};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tempfile::TempDir;
use toml::{Table, Value};

use crate::order::Order;
use crate::stack::{AGENT, SECRET, Site, wait_for};

/// Longest that any run of the product may take.
const LIMIT: Duration = Duration::from_mins(3);

/// The client stack that joins; the binary must be built with it.
pub fn engine() -> &'static str {
    static ENGINE: LazyLock<String> =
        LazyLock::new(|| std::env::var("ENGINE").unwrap_or_else(|_| "native".to_owned()));
    &ENGINE
}

/// A config file in the making: one project, one target.
pub struct Settings {
    project: Table,
    target: Table,
}

impl Settings {
    /// One room with the site's ordinary agent, held just long enough for a greeting and its echo.
    pub fn new(site: &Site) -> Self {
        let settings = Self {
            project: Table::new(),
            target: Table::new(),
        };
        settings
            .project("url", site.url.as_str())
            .project("api_key", site.key.as_str())
            .project("api_secret", site.secret.as_str())
            .set("agent_name", AGENT)
            .set("engine", engine())
            .set("batch.rooms", 1)
            .set("batch.hold", site.hold)
            .set("deadlines.join", "15s")
    }

    pub fn project(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.project.insert(key.to_owned(), value.into());
        self
    }

    /// Sets a key of the target, dotted: `batch.rooms`.
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut keys: Vec<_> = path.split('.').collect();
        let last = keys.pop().unwrap_or_default();
        let mut table = &mut self.target;
        for key in keys {
            table = table
                .entry(key)
                .or_insert_with(|| Table::new().into())
                .as_table_mut()
                .expect("a scenario sets tables before their keys");
        }
        table.insert(last.to_owned(), value.into());
        self
    }

    /// Sets an attribute of the echo participant; its name may hold dots.
    pub fn attribute(mut self, name: &str, value: &str) -> Self {
        let attributes = self.target.entry("attributes");
        let attributes = attributes.or_insert_with(|| Table::new().into());
        let attributes = attributes.as_table_mut().expect("attributes are a table");
        attributes.insert(name.to_owned(), value.into());
        self
    }

    /// Whom to call, and what it is to do.
    pub fn order(self, order: &Order) -> Self {
        self.set("agent_name", order.agent)
            .set("dispatch.metadata", order.metadata())
    }

    pub fn without(mut self, key: &str) -> Self {
        self.target.remove(key);
        self
    }

    /// The file.
    pub fn text(&self) -> String {
        let mut file = Table::new();
        let named = |name: &str, table: &Table| {
            let mut outer = Table::new();
            outer.insert(name.to_owned(), table.clone().into());
            Value::Table(outer)
        };
        file.insert("projects".to_owned(), named("main", &self.project));
        file.insert("targets".to_owned(), named("scenario", &self.target));
        file.to_string()
    }

    /// Starts `once` with these settings.
    pub fn once(&self) -> anyhow::Result<Running> {
        Canary::once().config(&self.text())?.start()
    }

    /// Runs `once` to its end.
    pub fn run(&self) -> anyhow::Result<Finished> {
        self.once()?.finish()
    }
}

/// One command line of the product, with nothing of our own environment.
pub struct Canary {
    command: Command,
    dir: TempDir,
}

impl Canary {
    pub fn new(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_livekit-canary"));
        command.args(arguments).env_clear().stdin(Stdio::null());
        Ok(Self {
            command,
            dir: tempfile::tempdir()?,
        })
    }

    pub fn once() -> Self {
        let arguments = ["once", "--format", "json", "--engine", engine()];
        Self::new(&arguments).expect("there is room for a temporary folder")
    }

    pub fn config(mut self, text: &str) -> anyhow::Result<Self> {
        let path = self.dir.path().join("canary.toml");
        fs::write(&path, text)?;
        self.command.arg("--config").arg(path);
        Ok(self)
    }

    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// A site's URL and key pair, in the environment.
    pub fn on(mut self, site: &Site) -> Self {
        self.command
            .env("LIVEKIT_URL", &site.url)
            .env("LIVEKIT_API_KEY", &site.key)
            .env("LIVEKIT_API_SECRET", &site.secret);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn start(mut self) -> anyhow::Result<Running> {
        let stdout = self.dir.path().join("stdout");
        let stderr = self.dir.path().join("stderr");
        let child = self
            .command
            .stdout(fs::File::create(&stdout)?)
            .stderr(fs::File::create(&stderr)?)
            .spawn()?;
        Ok(Running {
            child,
            stdout,
            stderr,
            _dir: self.dir,
        })
    }
}

/// The product at work.
pub struct Running {
    pub child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    _dir: TempDir,
}

impl Running {
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits for its end. Every output of every scenario passes here, and is searched for credentials.
    pub fn finish(mut self) -> anyhow::Result<Finished> {
        let waited = wait_for("livekit-canary to end", LIMIT, || {
            Ok(self.child.try_wait()?)
        });
        let read = |path: &Path| Ok::<_, anyhow::Error>(fs::read_to_string(path)?);
        let (stdout, stderr) = (read(&self.stdout)?, read(&self.stderr)?);
        let status = waited.with_context(|| stderr.clone())?;
        let finished = Finished {
            code: status.code(),
            stdout,
            stderr,
        };
        for output in [&finished.stdout, &finished.stderr] {
            expect_no_secret(output)?;
        }
        Ok(finished)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fail only where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Neither the secret nor a token is in what the product said.
pub fn expect_no_secret(output: &str) -> anyhow::Result<()> {
    ensure!(!output.contains(SECRET), "the secret is in {output}");
    ensure!(!has_token(output), "a token is in {output}");
    Ok(())
}

/// Whether there is a JWT in `text`, or the beginning of one: base64 of `{"`, and more. A server's random ids are shorter.
fn has_token(text: &str) -> bool {
    const LONGER_THAN_AN_ID: usize = 16;
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let mut beginnings = text.split("eyJ").skip(1);
    beginnings.any(|rest| rest.bytes().take_while(base64).count() >= LONGER_THAN_AN_ID)
}

/// What a run of the product left.
pub struct Finished {
    /// `None`: ended by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn batch(&self) -> anyhow::Result<Batch> {
        serde_json::from_str(&self.stdout).with_context(|| self.all())
    }

    /// All it said, for a failed scenario's message.
    pub fn all(&self) -> String {
        format!(
            "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.code, self.stdout, self.stderr
        )
    }
}

/// The JSON of `once`, as far as scenarios look at it.
#[derive(Debug, Deserialize)]
pub struct Batch {
    pub ended_at: DateTime<Utc>,
    pub probes: Vec<Probe>,
}

#[derive(Debug, Deserialize)]
pub struct Probe {
    pub room: String,
    pub position: String,
    pub outcome: String,
    pub reason: Option<String>,
    pub origin: Option<String>,
    pub limit: Option<String>,
    pub detail: Option<String>,
    pub evidence: Evidence,
    pub started_at: DateTime<Utc>,
    pub join_delay_seconds: Option<f64>,
    pub join_upper_bound: bool,
    pub reply_delay_seconds: Option<f64>,
    /// Of the one that counts.
    pub agent: Option<AgentSeen>,
    /// Seconds since its start; null where it was never reached.
    pub milestones: BTreeMap<String, Option<f64>>,
    pub audio: Audio,
    pub transcript: Option<Vec<Said>>,
}

#[derive(Debug, Deserialize)]
pub struct AgentSeen {
    pub identity: String,
    pub name: Option<String>,
    /// The server's stamp of its join, Unix milliseconds.
    pub joined_at_ms: f64,
}

#[derive(Debug, Deserialize)]
pub struct Evidence {
    /// Everybody seen besides the canary, one line each.
    pub participants: Vec<String>,
    pub notes: Vec<String>,
    pub agent_metrics: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub struct Said {
    pub at: f64,
    pub speaker: String,
    pub text: String,
    pub r#final: bool,
}

#[derive(Debug, Deserialize)]
pub struct Audio {
    pub packets: u64,
    pub lost: u64,
    pub jitter_seconds: Option<f64>,
}

impl Probe {
    /// When a milestone was reached, in Unix seconds.
    pub fn at(&self, milestone: &str) -> anyhow::Result<f64> {
        Ok(unix_seconds(self.started_at) + self.seconds(milestone)?)
    }

    /// When a milestone was reached, in seconds since the probe's start.
    pub fn seconds(&self, milestone: &str) -> anyhow::Result<f64> {
        self.milestones
            .get(milestone)
            .copied()
            .flatten()
            .with_context(|| format!("{}: never reached {milestone}", self.room))
    }
}

/// A wall clock, as agents and logs print it.
#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of this century fit"
)]
pub fn unix_seconds(at: DateTime<Utc>) -> f64 {
    at.timestamp_micros() as f64 / 1e6
}
