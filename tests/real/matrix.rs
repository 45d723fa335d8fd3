//! The fault matrix: every fault by its name, how it is made on each stack, and what the daemon must make of it.
//!
//! Each row runs a batch of a daemon's, as an operator asks for one, and is judged by what an operator has: the record of
//! the batch and `/metrics`. A reason or a kind of limit that no row covers fails the run.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use livekit_canary::probe::{LimitKind, Origin, Reason};
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::Value;

use crate::canary::{Probe, Settings, expect_no_secret, unix_seconds};
use crate::home::{Daemon, ENDING, Home, Recorded, SOON, Samples};
use crate::scenarios::Ground;
use crate::stack::{Site, Stack, wait_for};

mod faults;

pub use faults::FAULTS;

/// A row.
pub struct Fault {
    pub name: &'static str,
    pub verdict: Verdict,
    /// Who did it: what the record must say, and what decides in which service levels it may count.
    culprit: Culprit,
    /// What availability, join, first speech and service make of it: `+` good, `-` bad, `.` not counted.
    slis: &'static str,
    /// Within so many seconds of the batch's start the verdict is there.
    within: u32,
    /// Each stands in the JSON of the probe: what an on-call engineer needs to see.
    evidence: &'static [&'static str],
    sandbox: There,
    real: There,
    /// On upstream's mock, which has nothing but an API and signalling.
    mock: Option<Make>,
}

/// Makes the fault, and says what the daemon made of it.
pub type Make = fn(&Ground) -> anyhow::Result<Seen>;

pub enum There {
    Made(Make),
    /// Why it can't be made there.
    Not(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    Aborted,
    Failed(Reason),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Culprit {
    /// Nothing was wrong.
    Nobody,
    Somebody(Origin),
}

const SLIS: [&str; 4] = ["availability", "join", "first_speech", "service"];
const TARGET: &str = "scenario";

impl Fault {
    pub fn on(&self, stack: Stack) -> Option<Result<Make, &'static str>> {
        let there = match stack {
            Stack::Sandbox => &self.sandbox,
            Stack::Real => &self.real,
            Stack::Mock => return self.mock.map(Ok),
        };
        Some(match there {
            There::Made(make) => Ok(*make),
            There::Not(why) => Err(why),
        })
    }

    pub fn expected(&self) -> String {
        let (verdict, origin) = (self.verdict.text(), self.culprit.origin());
        let origin = origin.map_or(String::new(), |origin| format!(" ({origin})"));
        format!("{verdict}{origin} {} within {} s", self.slis, self.within)
    }

    /// Makes it and judges what came of it.
    pub fn run(&self, make: Make, ground: &Ground) -> anyhow::Result<Row> {
        let seen = make(ground)?;
        let row = self.judge(&seen);
        row.with_context(|| format!("{}\n{:?}", seen.record, seen.batch))
    }

    fn judge(&self, seen: &Seen) -> anyhow::Result<Row> {
        let batch = &seen.batch;
        let [probe] = batch.probes.as_slice() else {
            bail!("{} rooms opened, and not one", batch.probes.len());
        };
        self.judge_verdict(probe, seen)?;
        for words in self.evidence {
            ensure!(seen.record.contains(words), "no {words} in the record");
        }
        self.judge_counters(probe, seen)?;
        let seconds = unix_seconds(batch.ended_at) - unix_seconds(batch.started_at);
        ensure!(
            seconds < f64::from(self.within),
            "the verdict took {seconds:.1} s, and not {}",
            self.within
        );
        let text = Verdict::of(probe);
        let by = seen.wanted.map_or("", |_| ", as the server lists its jobs");
        let detail = probe.detail.as_deref().unwrap_or("no detail");
        Ok(Row {
            seen: format!("{text}{by}: {detail}"),
            seconds,
        })
    }

    fn judge_verdict(&self, probe: &Probe, seen: &Seen) -> anyhow::Result<()> {
        let text = Verdict::of(probe);
        // Where it was the server's word that decides, its word is what was wanted.
        let wanted = seen.wanted.map_or(self.verdict.text(), str::to_owned);
        ensure!(text == wanted, "{text}, and not {wanted}");
        if seen.wanted.is_none() {
            let origin = self.culprit.origin();
            ensure!(
                probe.origin.as_deref() == origin,
                "{:?}, and not {origin:?}",
                probe.origin
            );
        }
        let result = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Aborted => "aborted",
            Verdict::Failed(Reason::PlanLimit(_)) => "limited",
            Verdict::Failed(_) => "failed",
        };
        let batch = &seen.batch.result;
        ensure!(batch == result, "the batch is {batch}, and not {result}");
        Ok(())
    }

    /// Every counter that a probe's outcome moves, and none besides.
    fn judge_counters(&self, probe: &Probe, seen: &Seen) -> anyhow::Result<()> {
        let expect = |name: &str, labels: &[(&str, &str)], wanted: bool| {
            let labels = [labels, &[("target", TARGET)]].concat();
            let counted = seen.metrics.sum(name, &labels)?;
            let wanted = f64::from(u8::from(wanted));
            let same = (counted - wanted).abs() < 0.5;
            ensure!(same, "{name} {labels:?} is {counted}, and not {wanted}");
            anyhow::Ok(())
        };
        let aborted = self.verdict == Verdict::Aborted;
        expect("probes_total", &[], !aborted)?;
        expect("probes_aborted_total", &[], aborted)?;
        expect("batches_total", &[], true)?;
        expect("batches_total", &[("result", &seen.batch.result)], true)?;
        expect("probe_failures_total", &[], probe.reason.is_some())?;
        if let (Some(reason), Some(origin)) = (&probe.reason, &probe.origin) {
            let labels = [("reason", reason.as_str()), ("origin", origin)];
            expect("probe_failures_total", &labels, true)?;
        }
        expect("plan_limit_rejections_total", &[], probe.limit.is_some())?;
        if let Some(limit) = &probe.limit {
            expect("plan_limit_rejections_total", &[("limit", limit)], true)?;
        }
        for (sli, verdict) in SLIS.into_iter().zip(self.slis.chars()) {
            expect("slo_eligible_total", &[("sli", sli)], verdict != '.')?;
            expect("slo_good_total", &[("sli", sli)], verdict == '+')?;
        }
        Ok(())
    }
}

impl Verdict {
    /// As a record says it: with the kind of limit.
    fn text(self) -> String {
        match self {
            Self::Ok => "ok".to_owned(),
            Self::Aborted => "aborted".to_owned(),
            Self::Failed(Reason::PlanLimit(kind)) => format!("plan_limit/{}", kind.label()),
            Self::Failed(reason) => reason.label().to_owned(),
        }
    }

    fn of(probe: &Probe) -> String {
        let reason = probe.reason.as_deref().unwrap_or(&probe.outcome);
        match &probe.limit {
            Some(limit) => format!("{reason}/{limit}"),
            None => reason.to_owned(),
        }
    }
}

impl Culprit {
    fn origin(self) -> Option<&'static str> {
        match self {
            Self::Nobody => None,
            Self::Somebody(origin) => Some(origin.label()),
        }
    }

    /// Whether it is held against the agent: nobody but the agent may have kept it from answering a dispatch.
    fn is_the_agent(self) -> bool {
        matches!(
            self,
            Self::Somebody(Origin::Agent | Origin::Undetermined) | Self::Nobody
        )
    }
}

/// What a row saw.
pub struct Row {
    pub seen: String,
    /// From the batch's start to its verdict.
    pub seconds: f64,
}

/// How the faults of the table are shared out, for whoever reads it.
pub fn account() -> String {
    let of_agent = |fault: &&Fault| fault.slis.starts_with('-');
    let against = FAULTS.iter().filter(of_agent).count();
    let others = FAULTS.iter().filter(|fault| fault.slis.starts_with("..."));
    let others = others.count();
    format!("{against} faults count in the agent's service levels, {others} in none of them")
}

/// What is wrong with the table itself: a reason or a limit that no row covers, or a fault that would count in the agent's
/// service levels and isn't the agent's, or the other way round.
pub fn gaps() -> Vec<String> {
    let covered = |verdict: Verdict| {
        let text = verdict.text();
        FAULTS.iter().any(|fault| fault.verdict.text() == text)
    };
    let reasons = Reason::ALL.into_iter();
    let reasons = reasons.filter(|reason| !matches!(reason, Reason::PlanLimit(_)));
    let limits = LimitKind::ALL.into_iter().map(Reason::PlanLimit);
    let failures = reasons.chain(limits).map(Verdict::Failed);
    let verdicts = failures.chain([Verdict::Ok, Verdict::Aborted]);
    let missing = verdicts.filter(|verdict| !covered(*verdict));
    let mut gaps: Vec<_> = missing
        .map(|verdict| format!("the matrix has no {}", verdict.text()))
        .collect();
    for fault in FAULTS {
        let concerns_agent = fault.culprit.is_the_agent() && fault.verdict != Verdict::Aborted;
        let counted = fault.slis.chars().take(3).all(|sli| sli != '.');
        let not_counted = fault.slis.starts_with("...");
        let right = if concerns_agent { counted } else { not_counted };
        if !right {
            gaps.push(format!("{}: counts as {}", fault.name, fault.slis));
        }
    }
    gaps
}

// --- a batch of a daemon's ---

/// The daemon's answer to whoever asks for a batch.
#[derive(Deserialize)]
struct Begun {
    batch_id: String,
}

/// A daemon that runs the one batch.
pub struct Watch {
    daemon: Daemon,
    batch_id: String,
    _home: Home,
}

/// What became of the batch.
pub struct Seen {
    batch: Recorded,
    /// The JSON of its first probe.
    record: String,
    metrics: Samples,
    /// The reason that the server's own word calls for, where luck decides what it says.
    wanted: Option<&'static str>,
}

impl Watch {
    pub fn begin(settings: &Settings) -> anyhow::Result<Self> {
        Self::begin_with(settings, ENDING, &[])
    }

    /// With settings of how the daemon ends, and variables of its environment.
    pub fn begin_with(
        settings: &Settings,
        ending: &str,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let home = Home::new()?;
        home.write_with(ending, &settings.text())?;
        let daemon = home.start_with(environment)?;
        let path = format!("/api/v1/targets/{TARGET}/batches");
        let begun: Begun = serde_json::from_str(&daemon.http.post(&path)?)?;
        Ok(Self {
            daemon,
            batch_id: begun.batch_id,
            _home: home,
        })
    }

    /// Waits for the batch's end.
    pub fn verdict(&self) -> anyhow::Result<Seen> {
        let path = format!("/api/v1/batches/{}", self.batch_id);
        let record: Value = wait_for("the batch to end", Duration::from_mins(2), || {
            // Not found before its end.
            Ok(self.daemon.http.json(&path).ok())
        })?;
        let text = record.to_string();
        let metrics = self.daemon.http.get("/metrics")?;
        for output in [&text, &metrics] {
            expect_no_secret(output)?;
        }
        Ok(Seen {
            record: record["probes"][0].to_string(),
            batch: serde_json::from_value(record).with_context(|| text.clone())?,
            metrics: Samples::parse(&metrics)?,
            wanted: None,
        })
    }

    /// Ends the daemon, once the server holds none of the batch's rooms any more.
    pub fn end(self, site: &Site, seen: &Seen) -> anyhow::Result<()> {
        // A server that was killed has none.
        if site.api.rooms().is_ok() {
            wait_for("the rooms to be gone", SOON, || {
                Ok(left(site, seen)?.is_empty().then_some(()))
            })?;
        }
        let finished = self.daemon.terminate()?;
        ensure!(finished.code == Some(0), "{}", finished.all());
        Ok(())
    }

    /// The verdict, and the end.
    pub fn finish(self, site: &Site) -> anyhow::Result<Seen> {
        let seen = self.verdict()?;
        self.end(site, &seen)?;
        Ok(seen)
    }

    /// Tells the daemon to stop, with the batch under way; HTTP must be there for a while longer.
    pub fn stop(self, site: &Site) -> anyhow::Result<Seen> {
        self.daemon.running.signal(Signal::TERM)?;
        let seen = self.verdict()?;
        let left = left(site, &seen)?;
        ensure!(left.is_empty(), "left on the server: {left:?}");
        let finished = self.daemon.running.finish()?;
        ensure!(finished.code == Some(0), "{}", finished.all());
        Ok(seen)
    }
}

/// The rooms of the batch that the server still holds.
fn left(site: &Site, seen: &Seen) -> anyhow::Result<Vec<String>> {
    let is_ours = |room: &String| seen.batch.probes.iter().any(|probe| probe.room == *room);
    Ok(site.api.rooms()?.into_iter().filter(is_ours).collect())
}

impl Seen {
    /// What the server's own list of jobs calls for.
    pub fn wanted(mut self, reason: &'static str) -> Self {
        self.wanted = Some(reason);
        self
    }
}
