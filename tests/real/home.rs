//! A daemon at work: its folder, what it watches, and a client of its HTTP.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use chrono::{DateTime, Utc};
use rustix::process::Signal;
use serde::Deserialize;
use tempfile::TempDir;

use crate::canary::{Canary, Finished, Probe, Running, engine};
use crate::stack::{AGENT, Site, free_ports, wait_for};

/// For what takes well under a second where nothing is wrong.
pub const SOON: Duration = Duration::from_secs(30);

/// A daemon and a client of its HTTP.
pub struct Daemon {
    pub running: Running,
    pub http: Http,
}

/// A client of something that listens on loopback.
pub struct Http {
    agent: ureq::Agent,
    base: String,
}

impl Http {
    pub fn new(port: u16) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(5)))
            .build();
        Self {
            agent: agent.into(),
            base: format!("http://127.0.0.1:{port}"),
        }
    }

    pub fn get(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.agent.get(format!("{}{path}", self.base)).call();
        let mut answer = answer.with_context(|| path.to_owned())?;
        Ok(answer.body_mut().read_to_string()?)
    }

    pub fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let text = self.get(path)?;
        serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))
    }

    pub fn post(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.agent.post(format!("{}{path}", self.base)).send_empty();
        let mut answer = answer.with_context(|| path.to_owned())?;
        Ok(answer.body_mut().read_to_string()?)
    }
}

/// How a daemon ends where nothing else is said.
pub const ENDING: &str = "lifetime.shutdown_linger = \"0s\"";

/// Settings of a daemon, in a folder of its own that outlives it.
pub struct Home {
    pub dir: TempDir,
    pub port: u16,
}

impl Home {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            dir: tempfile::tempdir()?,
            port: free_ports()?,
        })
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("canary.toml")
    }

    pub fn database(&self) -> PathBuf {
        self.dir.path().join("state/history.sqlite3")
    }

    /// `targets`: with their projects.
    pub fn write(&self, targets: &str) -> anyhow::Result<()> {
        self.write_with(ENDING, targets)
    }

    /// `ending`: settings of how it ends.
    pub fn write_with(&self, ending: &str, targets: &str) -> anyhow::Result<()> {
        let port = self.port;
        let text = format!(
            "http.listen = \"127.0.0.1:{port}\"
history.dir = \"state\"
lifetime.startup_delay = \"2s\"
{ending}
{targets}"
        );
        Ok(fs::write(self.file(), text)?)
    }

    /// Starts a daemon with what was written, and waits until it is ready.
    pub fn start(&self) -> anyhow::Result<Daemon> {
        self.start_with(&[])
    }

    /// The same with variables of its environment.
    pub fn start_with(&self, environment: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        let file = self.file();
        let file = file.to_str().context("a path in UTF-8")?;
        let mut canary = Canary::new(&["run", "--config", file])?;
        for (name, value) in environment {
            canary = canary.env(name, value);
        }
        let mut daemon = Daemon {
            running: canary.start()?,
            http: Http::new(self.port),
        };
        let ready = wait_for("the daemon to be ready", SOON, || {
            let ended = daemon.running.child.try_wait()?;
            Ok((ended.is_some() || daemon.http.get("/-/ready").is_ok()).then_some(ended))
        });
        if ready?.is_some() {
            bail!("the daemon ended: {}", daemon.running.finish()?.all());
        }
        Ok(daemon)
    }
}

impl Daemon {
    pub fn metrics(&self) -> anyhow::Result<Samples> {
        Samples::parse(&self.http.get("/metrics")?)
    }

    /// What targets there are and which of them run a batch.
    pub fn targets(&self) -> anyhow::Result<Vec<TargetNow>> {
        #[derive(Deserialize)]
        struct Status {
            targets: Vec<TargetNow>,
        }
        Ok(self.http.json::<Status>("/api/v1/targets")?.targets)
    }

    /// Lets no batch begin any more, and waits until none runs.
    pub fn pause(&self) -> anyhow::Result<()> {
        for target in self.targets()? {
            let path = format!("/api/v1/targets/{}/pause", target.name);
            self.http.post(&path)?;
        }
        wait_for("the batches to end", Duration::from_mins(1), || {
            let idle = self.targets()?.iter().all(|now| now.running.is_none());
            Ok(idle.then_some(()))
        })
    }

    /// All batches that an idle daemon has counted, the oldest first. The history writes a moment after the counters.
    pub fn all_batches(&self, target: &str) -> anyhow::Result<Vec<Recorded>> {
        let counted = self
            .metrics()?
            .sum("batches_total", &[("target", target)])?;
        wait_for("the history to have them all", SOON, || {
            let batches = self.batches(target)?;
            #[expect(clippy::cast_precision_loss, reason = "counts of a minute")]
            let kept = batches.len() as f64;
            Ok((kept >= counted).then_some(batches))
        })
    }

    /// The batches of a target in the history, the oldest first.
    pub fn batches(&self, target: &str) -> anyhow::Result<Vec<Recorded>> {
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
                batches.push(self.http.json::<Recorded>(&path)?);
            }
            let Some(next) = page.next_before else { break };
            before = format!("&before={next}");
        }
        batches.reverse();
        Ok(batches)
    }

    /// SIGTERM, and its end.
    pub fn terminate(self) -> anyhow::Result<Finished> {
        self.running.signal(Signal::TERM)?;
        self.running.finish()
    }
}

#[derive(Deserialize)]
pub struct TargetNow {
    pub name: String,
    pub running: Option<String>,
}

/// A batch as the history has it.
#[derive(Debug, Deserialize)]
pub struct Recorded {
    pub result: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    pub probes: Vec<Probe>,
}

/// Samples of the text format, or of a Prometheus' answer.
pub struct Samples(pub Vec<Sample>);

pub struct Sample {
    /// Its name and labels as they stand in the text.
    pub series: String,
    pub value: f64,
}

impl Samples {
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines.map(|line| {
            let (series, value) = line.rsplit_once(' ').context("no value")?;
            Ok(Sample {
                series: series.to_owned(),
                value: value.parse()?,
            })
        });
        Ok(Self(samples.collect::<anyhow::Result<_>>()?))
    }

    /// Of the one series of this name, which has no labels.
    pub fn number(&self, name: &str) -> anyhow::Result<f64> {
        let series = format!("livekit_canary_{name}");
        let found = self.0.iter().find(|sample| sample.series == series);
        Ok(found.context(series)?.value)
    }

    /// The sum over all series of this name that have these labels; a series must exist.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        let start = format!("livekit_canary_{name}{{");
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{value}\""))
            .collect();
        let found: Vec<_> = self
            .0
            .iter()
            .filter(|sample| sample.series.starts_with(&start))
            .filter(|sample| labels.iter().all(|label| sample.series.contains(label)))
            .map(|sample| sample.value)
            .collect();
        ensure!(!found.is_empty(), "no series {start} with {labels:?}");
        Ok(found.iter().sum())
    }
}

/// So many targets with a short room each on one project.
pub fn many_targets(site: &Site, count: usize, every: &str) -> String {
    let Site {
        url, key, secret, ..
    } = site;
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
echo.delay = \"100ms\"
",
            engine()
        )
    });
    project + &targets.collect::<String>()
}
