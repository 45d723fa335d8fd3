//! The fault matrix: every fault by its name, how each stack causes it, and what the daemon must make of it.
//!
//! Each fault runs one batch in a daemon. The checks use what an operator has: the record of the batch and `/metrics`. The run
//! fails if a reason or a kind of limit has no fault.

use anyhow::{Context as _, bail, ensure};
use livekit_canary::probe::{LimitKind, Origin, Reason};
use rustix::process::Signal;
use support::canary::expect_no_secret;
use support::daemon::{Daemon, DaemonDir, NO_LINGER};
use support::report::{Batch, Probe, unix_seconds};
use support::scrape::Scrape;
use support::settings::{Settings, TARGET};
use support::stack::{Stack, StackKind};

use crate::fixture::Fixture;

mod conversation;
mod faults;

pub(crate) use faults::FAULTS;

/// A row of the matrix.
pub(crate) struct Fault {
    pub name: &'static str,
    expected: Expected,
    /// The origin of the failure; `None` if there is none. It decides in which service levels the probe may count.
    origin: Option<Origin>,
    /// What availability, join, first speech, service and reply count: `+` good, `-` bad, `.` nothing.
    slis: &'static str,
    /// The limit from the start of the batch to its end, in seconds.
    within: u32,
    /// Texts that the JSON of the probe must contain, because an on-call engineer needs them.
    evidence: &'static [&'static str],
    sandbox: OnStack,
    real: OnStack,
    /// On upstream's mock, which has only an API and signalling.
    mock: Option<Inject>,
}

/// Causes the fault, and returns what the daemon made of it.
pub(crate) type Inject = fn(&Fixture) -> anyhow::Result<Observation>;

pub(crate) enum OnStack {
    Can(Inject),
    /// Why the stack can't cause the fault.
    Cannot(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Ok,
    Aborted,
    Failed(Reason),
}

const SLIS: [&str; 5] = ["availability", "join", "first_speech", "service", "reply"];

/// A verdict that is as expected.
pub(crate) struct FaultVerdict {
    pub summary: String,
    /// From the start of the batch to its end.
    pub seconds: f64,
}

impl Fault {
    pub(crate) fn on(&self, stack: StackKind) -> Option<Result<Inject, &'static str>> {
        let on_stack = match stack {
            StackKind::Sandbox => &self.sandbox,
            StackKind::Real => &self.real,
            StackKind::Mock => return self.mock.map(Ok),
        };
        Some(match on_stack {
            OnStack::Can(inject) => Ok(*inject),
            OnStack::Cannot(why) => Err(why),
        })
    }

    /// Whether the service level of replies counts its room.
    pub(crate) fn expects_reply(&self) -> bool {
        !self.slis.ends_with('.')
    }

    /// The expectation as text, for the table.
    pub(crate) fn expected(&self) -> String {
        let verdict = self.expected.text();
        let origin = self.origin.map(|origin| format!(" ({})", origin.label()));
        let origin = origin.unwrap_or_default();
        format!("{verdict}{origin} {} within {} s", self.slis, self.within)
    }

    /// Causes the fault, and checks the result.
    pub(crate) fn run(&self, inject: Inject, fixture: &Fixture) -> anyhow::Result<FaultVerdict> {
        let seen = inject(fixture)?;
        let verdict = self.check(&seen);
        verdict.with_context(|| format!("{}\n{:?}", seen.record, seen.batch))
    }

    fn check(&self, seen: &Observation) -> anyhow::Result<FaultVerdict> {
        let batch = &seen.batch;
        let [probe] = batch.probes.as_slice() else {
            bail!("{} rooms opened, expected one", batch.probes.len());
        };
        self.check_verdict(probe, seen)?;
        for text in self.evidence {
            ensure!(seen.record.contains(text), "no {text} in the record");
        }
        self.check_counters(probe, seen)?;
        let seconds = unix_seconds(batch.ended_at) - unix_seconds(batch.started_at);
        ensure!(
            seconds < f64::from(self.within),
            "the verdict took {seconds:.1} s, expected at most {}",
            self.within
        );
        let verdict = verdict_of(probe);
        let by = seen
            .reason_by_jobs
            .map_or("", |_| ", as the server lists its jobs");
        let detail = probe.detail.as_deref().unwrap_or("no detail");
        Ok(FaultVerdict {
            summary: format!("{verdict}{by}: {detail}"),
            seconds,
        })
    }

    fn check_verdict(&self, probe: &Probe, seen: &Observation) -> anyhow::Result<()> {
        let verdict = verdict_of(probe);
        let by_jobs = seen.reason_by_jobs.map(str::to_owned);
        let expected = by_jobs.unwrap_or_else(|| self.expected.text());
        ensure!(verdict == expected, "{verdict}, expected {expected}");
        if seen.reason_by_jobs.is_none() {
            let origin = self.origin.map(Origin::label);
            ensure!(
                probe.origin.as_deref() == origin,
                "{:?}, expected {origin:?}",
                probe.origin
            );
        }
        let expected = match self.expected {
            Expected::Ok => "ok",
            Expected::Aborted => "aborted",
            Expected::Failed(Reason::PlanLimit(_)) => "limited",
            Expected::Failed(_) => "failed",
        };
        let result = &seen.batch.result;
        ensure!(
            result == expected,
            "the batch is {result}, expected {expected}"
        );
        Ok(())
    }

    /// Checks every counter that the outcome of a probe increases. No other of them may have increased.
    fn check_counters(&self, probe: &Probe, seen: &Observation) -> anyhow::Result<()> {
        let expect = |name: &str, labels: &[(&str, &str)], expected: bool| {
            let labels = [labels, &[("target", TARGET)]].concat();
            let counted = seen.scrape.count(name, &labels)?;
            let expected = u64::from(expected);
            ensure!(
                counted == expected,
                "{name} {labels:?} is {counted}, expected {expected}"
            );
            anyhow::Ok(())
        };
        let aborted = self.expected == Expected::Aborted;
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
        for (sli, counts) in SLIS.into_iter().zip(self.slis.chars()) {
            expect("slo_eligible_total", &[("sli", sli)], counts != '.')?;
            expect("slo_good_total", &[("sli", sli)], counts == '+')?;
        }
        Ok(())
    }

    /// Whether the probe counts in the agent's service levels: it is ok, or the agent may be responsible.
    fn concerns_agent(&self) -> bool {
        let responsible = matches!(
            self.origin,
            Some(Origin::Agent | Origin::Undetermined) | None
        );
        responsible && self.expected != Expected::Aborted
    }
}

impl Expected {
    /// As [`verdict_of`] writes it.
    fn text(self) -> String {
        match self {
            Self::Ok => "ok".to_owned(),
            Self::Aborted => "aborted".to_owned(),
            Self::Failed(Reason::PlanLimit(kind)) => format!("plan_limit/{}", kind.label()),
            Self::Failed(reason) => reason.label().to_owned(),
        }
    }
}

/// The verdict of a probe with the kind of limit, if there is one.
fn verdict_of(probe: &Probe) -> String {
    match &probe.limit {
        Some(limit) => format!("{}/{limit}", probe.verdict()),
        None => probe.verdict().to_owned(),
    }
}

/// How many faults count in which service levels, for the reader of the table.
pub(crate) fn summary() -> String {
    let count = |start: &str| {
        let faults = FAULTS.iter().filter(|fault| fault.slis.starts_with(start));
        faults.count()
    };
    format!(
        "{} faults count in the agent's service levels, {} in none of them",
        count("-"),
        count("...")
    )
}

/// The problems of the table itself: a reason or a limit without a fault, or a fault that counts in the wrong service levels.
pub(crate) fn gaps() -> Vec<String> {
    let covered = |expected: Expected| {
        let text = expected.text();
        FAULTS.iter().any(|fault| fault.expected.text() == text)
    };
    let reasons = Reason::ALL.into_iter();
    let reasons = reasons.filter(|reason| !matches!(reason, Reason::PlanLimit(_)));
    let limits = LimitKind::ALL.into_iter().map(Reason::PlanLimit);
    let failures = reasons.chain(limits).map(Expected::Failed);
    let verdicts = failures.chain([Expected::Ok, Expected::Aborted]);
    let missing = verdicts.filter(|verdict| !covered(*verdict));
    let mut gaps: Vec<_> = missing
        .map(|verdict| format!("the matrix has no {}", verdict.text()))
        .collect();
    for fault in FAULTS {
        // First speech does not count if the caller speaks first.
        let counted = fault.slis.chars().take(2).all(|sli| sli != '.');
        let not_counted = fault.slis.starts_with("...");
        let right = if fault.concerns_agent() {
            counted
        } else {
            not_counted
        };
        if !right {
            gaps.push(format!("{}: counts as {}", fault.name, fault.slis));
        }
    }
    gaps
}

// --- one batch in a daemon ---

/// A daemon with the one batch that it runs.
pub(crate) struct DaemonBatch {
    daemon: Daemon,
    batch_id: String,
    _dir: DaemonDir,
}

/// The result of the batch.
pub(crate) struct Observation {
    batch: Batch,
    /// The JSON of its first probe.
    record: String,
    scrape: Scrape,
    /// The reason that the server's list of jobs calls for, if the server may list the job or not.
    reason_by_jobs: Option<&'static str>,
}

impl DaemonBatch {
    pub(crate) fn start(settings: &Settings) -> anyhow::Result<Self> {
        Self::start_with(settings, NO_LINGER, &[])
    }

    /// With settings of the daemon's shutdown, and with environment variables.
    pub(crate) fn start_with(
        settings: &Settings,
        lifetime: &str,
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let dir = DaemonDir::new()?;
        dir.write_with(lifetime, &settings.text())?;
        let daemon = dir.start_with(variables)?;
        let batch_id = daemon.wait_for("the first batch", || {
            let target = daemon.targets()?.pop().context("no target")?;
            let ended = target.last_batch.map(|batch| batch.batch_id);
            Ok(target.running.or(ended))
        })?;
        Ok(Self {
            batch_id,
            daemon,
            _dir: dir,
        })
    }

    /// Waits for the end of the batch.
    pub(crate) fn verdict(&self) -> anyhow::Result<Observation> {
        let record = self.daemon.wait_for_batch(&self.batch_id)?;
        let text = record.to_string();
        let metrics = self.daemon.http.text("/metrics")?;
        for output in [&text, &metrics] {
            expect_no_secret(output)?;
        }
        Ok(Observation {
            record: record["probes"][0].to_string(),
            batch: serde_json::from_value(record).with_context(|| text.clone())?,
            scrape: Scrape::parse(&metrics)?,
            reason_by_jobs: None,
        })
    }

    /// Waits until no room of the batch is left on the server, and ends the daemon.
    pub(crate) fn end(self, stack: &Stack, seen: &Observation) -> anyhow::Result<()> {
        // A server that was killed has no rooms.
        if stack.api.rooms().is_ok() {
            self.daemon.wait_for("the rooms to be deleted", || {
                Ok(rooms_left(stack, seen)?.is_empty().then_some(()))
            })?;
        }
        self.daemon.terminate()?;
        Ok(())
    }

    /// Waits for the end of the batch, and ends the daemon.
    pub(crate) fn finish(self, stack: &Stack) -> anyhow::Result<Observation> {
        let seen = self.verdict()?;
        self.end(stack, &seen)?;
        Ok(seen)
    }

    /// Stops the daemon while the batch runs. The daemon must linger, so that it still responds after the end of the batch.
    pub(crate) fn stop(self, stack: &Stack) -> anyhow::Result<Observation> {
        self.daemon.signal(Signal::TERM)?;
        let seen = self.verdict()?;
        let left = rooms_left(stack, &seen)?;
        ensure!(left.is_empty(), "left on the server: {left:?}");
        self.daemon.finish()?.expect_code(0)?;
        Ok(seen)
    }
}

/// The rooms of the batch that are still on the server.
fn rooms_left(stack: &Stack, seen: &Observation) -> anyhow::Result<Vec<String>> {
    let is_ours = |room: &String| seen.batch.probes.iter().any(|probe| probe.room == *room);
    Ok(stack.api.rooms()?.into_iter().filter(is_ours).collect())
}

impl Observation {
    /// The daemon reports no room that may be left behind.
    fn expect_no_leak(&self) -> anyhow::Result<()> {
        let leaked = self.scrape.count("rooms_leaked_total", &[])?;
        let warned = self.record.contains("not deleted");
        ensure!(leaked == 0 && !warned, "{leaked} leaked: {}", self.record);
        Ok(())
    }

    /// The same with the reason that the server's list of jobs calls for.
    #[must_use]
    pub(crate) fn with_reason_by_jobs(mut self, reason: &'static str) -> Self {
        self.reason_by_jobs = Some(reason);
        self
    }
}
