//! Every series that `/metrics` shows, with its buckets and its HELP.
//!
//! It measures no time: what it counts was measured before.
//!
//! Each target has a registry of its own, and so have each project and the process. So a removed target takes all of its
//! series with it, whatever still holds its handle: what that updates, nobody gathers. The `prometheus` crate's own
//! removal wants each tuple of label values, and the next update brings the series back.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use prometheus::{Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec};

use crate::config::{Objectives, Period, Project, Target};
use crate::probe::{LimitKind, Outcome, Position, ProbeReport, Reason, Span};
use crate::report::{BatchReport, BatchResult};

mod catalogue;
mod family;
mod slo;

pub use catalogue::{CATALOGUE, DELAYS, Definition, JITTERS, Kind, PREFIX};
pub use slo::{Sli, Verdict};

use family::{Families, Kept, Lines, Moving, Standard};

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What this binary is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    pub version: String,
    pub revision: String,
    pub rustc: String,
    pub engine: String,
}

/// What held a batch back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipCause {
    /// The one before still ran.
    Overlap,
    /// It could have cost more agent time than is left.
    Budget,
    /// The project rests after a plan limit.
    Backoff,
    Paused,
}

impl SkipCause {
    pub const ALL: [Self; 4] = [Self::Overlap, Self::Budget, Self::Backoff, Self::Paused];

    pub fn label(self) -> &'static str {
        match self {
            Self::Overlap => "overlap",
            Self::Budget => "budget",
            Self::Backoff => "backoff",
            Self::Paused => "paused",
        }
    }
}

/// Which part of the canary had a fault that it survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InternalError {
    /// A probe ended `internal`; [`TargetMetrics::probe`] counts it.
    Probe,
    Batch,
    Janitor,
    History,
    Http,
}

impl InternalError {
    pub const ALL: [Self; 5] = [
        Self::Probe,
        Self::Batch,
        Self::Janitor,
        Self::History,
        Self::Http,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Batch => "batch",
            Self::Janitor => "janitor",
            Self::History => "history",
            Self::Http => "http",
        }
    }
}

/// All series of this process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    standard: Standard,
    process: Arc<Kept<ProcessSeries>>,
    live: Mutex<Live>,
}

/// What is gathered, by name.
#[derive(Default)]
struct Live {
    targets: BTreeMap<String, TargetMetrics>,
    projects: BTreeMap<String, ProjectMetrics>,
}

struct ProcessSeries {
    internal_errors: IntCounterVec,
    history_dropped: IntCounter,
    history_degraded: Gauge,
    reload_successful: Gauge,
    reload_success_at: Gauge,
}

impl ProcessSeries {
    fn internal_error(&self, kind: InternalError) {
        let errors = self.internal_errors.with_label_values(&[kind.label()]);
        errors.inc();
    }
}

impl Metrics {
    pub fn new(build: &Build) -> Self {
        let families = Families::of_process();
        let internal_errors = families.counters(
            &catalogue::INTERNAL_ERRORS,
            InternalError::ALL.map(|kind| [kind.label()]),
        );
        families
            .gauges(&catalogue::BUILD_INFO)
            .with_label_values(&[
                build.version.as_str(),
                &build.revision,
                &build.rustc,
                &build.engine,
            ])
            .set(1.0);
        let history_degraded = families.gauge(&catalogue::HISTORY_DEGRADED);
        history_degraded.set(0.0);
        let process = ProcessSeries {
            internal_errors,
            history_dropped: families.counter(&catalogue::HISTORY_DROPPED),
            history_degraded,
            reload_successful: families.gauge(&catalogue::RELOAD_SUCCESSFUL),
            reload_success_at: families.gauge(&catalogue::RELOAD_SUCCESS_AT),
        };
        Self {
            inner: Arc::new(Inner {
                standard: Standard::new(),
                process: Arc::new(families.keep(process)),
                live: Mutex::default(),
            }),
        }
    }

    /// The handle of a target by these settings; all of its counters exist from now on.
    ///
    /// A target that is there already keeps its counters: this is how changed settings are told, too. One that was
    /// removed begins at zero again.
    pub fn target(
        &self,
        name: &str,
        target: &Target,
        project: &Project,
        drill: bool,
    ) -> TargetMetrics {
        let mut live = self.live();
        match live.targets.entry(name.to_owned()) {
            Entry::Occupied(there) => {
                there.get().configure(target, project, drill);
                there.get().clone()
            }
            Entry::Vacant(place) => {
                let metrics = TargetMetrics::new(name, Arc::clone(&self.inner.process));
                metrics.configure(target, project, drill);
                place.insert(metrics).clone()
            }
        }
    }

    /// The series of a target that was not removed.
    pub fn live_target(&self, name: &str) -> Option<TargetMetrics> {
        self.live().targets.get(name).cloned()
    }

    /// Takes the target's series off; its handles may live on.
    pub fn remove_target(&self, name: &str) {
        self.live().targets.remove(name);
    }

    /// The handle of a project by these settings, new or there already.
    pub fn project(&self, name: &str, project: &Project) -> ProjectMetrics {
        let mut live = self.live();
        let place = live.projects.entry(name.to_owned());
        let metrics = place.or_insert_with(|| ProjectMetrics::new(name));
        metrics.configure(project);
        metrics.clone()
    }

    /// Takes the project's series off; its handles may live on.
    pub fn remove_project(&self, name: &str) {
        self.live().projects.remove(name);
    }

    pub fn internal_error(&self, kind: InternalError) {
        self.inner.process.moving().internal_error(kind);
    }

    pub fn history_dropped(&self, records: u64) {
        self.inner.process.moving().history_dropped.inc_by(records);
    }

    pub fn history_degraded(&self, degraded: bool) {
        let process = self.inner.process.moving();
        process.history_degraded.set(flag(degraded));
    }

    /// The settings were loaded, at the start or later.
    pub fn config_loaded(&self, at: DateTime<Utc>) {
        let process = self.inner.process.moving();
        process.reload_successful.set(1.0);
        process.reload_success_at.set(timestamp(at));
    }

    /// New settings were refused; the old ones run on.
    pub fn config_refused(&self) {
        self.inner.process.moving().reload_successful.set(0.0);
    }

    /// Everything in Prometheus' text format 0.0.4: each family once, sorted by name, its series by project or target.
    ///
    /// Waits for no probe and no disk: only for series that move together, which takes them microseconds. With fifty
    /// targets that all moved it is some milliseconds of work, 1.3 MB: a server does it off the async threads.
    pub fn render(&self) -> String {
        let standard = self.inner.standard.lines();
        let (targets, projects) = {
            let live = self.live();
            let targets: Vec<_> = live.targets.values().cloned().collect();
            let projects: Vec<_> = live.projects.values().cloned().collect();
            (targets, projects)
        };
        let process = iter::once(self.inner.process.lines());
        let projects = projects.iter().map(|project| project.0.lines());
        let targets = targets.iter().map(|target| target.0.series.lines());
        let kept: Vec<_> = process.chain(projects).chain(targets).collect();
        let mut families: BTreeMap<&str, Vec<&Lines>> = BTreeMap::new();
        for lines in standard
            .iter()
            .chain(kept.iter().flat_map(|lines| lines.iter()))
        {
            families.entry(&lines.name).or_default().push(lines);
        }
        let size = families.values().flatten().map(|lines| lines.len()).sum();
        let mut text = String::with_capacity(size);
        for family in families.values() {
            text.extend(family.first().map(|lines| lines.head()));
            text.extend(family.iter().map(|lines| lines.series()));
        }
        text
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        // Each change is a single insert or remove, so a panic elsewhere leaves nothing half done.
        self.inner
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The series of one target. Cheap to clone.
#[derive(Clone)]
pub struct TargetMetrics(Arc<TargetInner>);

struct TargetInner {
    series: Kept<TargetSeries>,
    process: Arc<Kept<ProcessSeries>>,
}

struct TargetSeries {
    probes: IntCounter,
    aborted: IntCounter,
    failures: IntCounterVec,
    limits: IntCounterVec,
    eligible: IntCounterVec,
    good: IntCounterVec,
    bad_batches: IntCounterVec,
    batches: IntCounterVec,
    skipped: IntCounterVec,
    billed: IntCounter,
    packets: IntCounter,
    packets_lost: IntCounter,
    leaked: IntCounter,
    swept: IntCounter,
    join_delay: HistogramVec,
    first_speech_delay: Histogram,
    reply_delay: Histogram,
    span_duration: HistogramVec,
    jitter: Histogram,
    in_flight: Gauge,
    last_tick: Gauge,
    next_batch: Gauge,
    last_completed: Gauge,
    last_success_ratio: Gauge,
    interval: Gauge,
    shortest_interval: Gauge,
    mean_interval: Gauge,
    slo_threshold: GaugeVec,
    slo_objective: GaugeVec,
    paused: Gauge,
    info: GaugeVec,
}

/// The spans that have no histogram of their own.
fn other_spans() -> impl Iterator<Item = Span> {
    Span::ALL.into_iter().filter(|span| match span {
        Span::AgentJoin | Span::FirstSpeech | Span::Reply => false,
        Span::RoomCreate
        | Span::Signal
        | Span::Media
        | Span::Publish
        | Span::Dispatch
        | Span::AgentTrack
        | Span::FirstAudio => true,
    })
}

impl TargetMetrics {
    fn new(name: &str, process: Arc<Kept<ProcessSeries>>) -> Self {
        let families = Families::of("target", name);
        let slis = Sli::ALL.map(|sli| [sli.label()]);
        let in_flight = families.gauge(&catalogue::IN_FLIGHT);
        in_flight.set(0.0);
        let paused = families.gauge(&catalogue::PAUSED);
        paused.set(0.0);
        let series = TargetSeries {
            probes: families.counter(&catalogue::PROBES),
            aborted: families.counter(&catalogue::PROBES_ABORTED),
            failures: families.counters(
                &catalogue::FAILURES,
                Reason::ALL.map(|reason| [reason.label(), reason.origin().label()]),
            ),
            limits: families.counters(
                &catalogue::LIMITS,
                LimitKind::ALL.map(|kind| [kind.label()]),
            ),
            eligible: families.counters(&catalogue::ELIGIBLE, slis),
            good: families.counters(&catalogue::GOOD, slis),
            bad_batches: families.counters(&catalogue::BAD_BATCHES, slis),
            batches: families.counters(
                &catalogue::BATCHES,
                BatchResult::ALL.map(|result| [result.label()]),
            ),
            skipped: families.counters(
                &catalogue::SKIPPED,
                SkipCause::ALL.map(|cause| [cause.label()]),
            ),
            billed: families.counter(&catalogue::BILLED),
            packets: families.counter(&catalogue::PACKETS),
            packets_lost: families.counter(&catalogue::PACKETS_LOST),
            leaked: families.counter(&catalogue::LEAKED),
            swept: families.counter(&catalogue::SWEPT),
            join_delay: families.histograms(
                &catalogue::JOIN_DELAY,
                Position::ALL.map(|position| [position.label()]),
            ),
            first_speech_delay: families.histogram(&catalogue::FIRST_SPEECH_DELAY),
            reply_delay: families.histogram(&catalogue::REPLY_DELAY),
            span_duration: families.histograms(
                &catalogue::SPAN_DURATION,
                other_spans().map(|span| [span.label()]),
            ),
            jitter: families.histogram(&catalogue::JITTER),
            in_flight,
            last_tick: families.gauge(&catalogue::LAST_TICK),
            next_batch: families.gauge(&catalogue::NEXT_BATCH),
            last_completed: families.gauge(&catalogue::LAST_COMPLETED),
            last_success_ratio: families.gauge(&catalogue::LAST_SUCCESS_RATIO),
            interval: families.gauge(&catalogue::INTERVAL),
            shortest_interval: families.gauge(&catalogue::SHORTEST_INTERVAL),
            mean_interval: families.gauge(&catalogue::MEAN_INTERVAL),
            slo_threshold: families.gauges(&catalogue::SLO_THRESHOLD),
            slo_objective: families.gauges(&catalogue::SLO_OBJECTIVE),
            paused,
            info: families.gauges(&catalogue::TARGET_INFO),
        };
        Self(Arc::new(TargetInner {
            series: families.keep(series),
            process,
        }))
    }

    fn moving(&self) -> Moving<'_, TargetSeries> {
        self.0.series.moving()
    }

    fn configure(&self, target: &Target, project: &Project, drill: bool) {
        let series = self.moving();
        for sli in Sli::ALL {
            let label = [sli.label()];
            let objective = sli.objective(&target.objectives);
            series
                .slo_objective
                .with_label_values(&label)
                .set(objective);
            if let Some(threshold) = sli.threshold(&target.objectives) {
                let gauge = series.slo_threshold.with_label_values(&label);
                gauge.set(threshold.as_secs_f64());
            }
        }
        // The settings before have become another series.
        series.info.reset();
        series
            .info
            .with_label_values(&[
                target.project.as_str(),
                project.url.as_str(),
                target.agent_name.as_deref().unwrap_or_default(),
                target.dispatch.mode.name(),
                if drill { "true" } else { "false" },
            ])
            .set(1.0);
    }

    /// Counts a room as open for as long as the guard lives.
    pub fn room_opened(&self) -> OpenRoom {
        self.moving().in_flight.inc();
        OpenRoom(Arc::clone(&self.0))
    }

    /// Counts a probe whose outcome is final, once: no scrape sees a part of it.
    pub fn probe(&self, report: &ProbeReport, objectives: &Objectives) {
        let series = self.moving();
        series.count_outcome(&report.outcome);
        let failure = report.outcome.failure();
        if failure.is_some_and(|failure| failure.reason == Reason::Internal) {
            self.0.process.moving().internal_error(InternalError::Probe);
        }
        for sli in Sli::ALL {
            let label = [sli.label()];
            match sli.judge(report, objectives) {
                Verdict::NotEligible => continue,
                Verdict::Bad => {}
                Verdict::Good => series.good.with_label_values(&label).inc(),
            }
            series.eligible.with_label_values(&label).inc();
        }
        series.observe_delays(report);
        if let Some(billed) = report.billed() {
            series.billed.inc_by(billed.as_secs());
        }
        series.packets.inc_by(report.audio.packets);
        series.packets_lost.inc_by(report.audio.lost);
        if let Some(jitter) = report.audio.jitter {
            series.jitter.observe(jitter.as_secs_f64());
        }
    }

    /// Counts a batch that has ended; its probes are counted by themselves.
    pub fn batch(&self, report: &BatchReport, objectives: &Objectives) {
        let series = self.moving();
        for sli in Sli::ALL {
            let bad = |probe: &ProbeReport| sli.judge(probe, objectives) == Verdict::Bad;
            if report.probes.iter().any(bad) {
                let label = [sli.label()];
                series.bad_batches.with_label_values(&label).inc();
            }
        }
        let result = report.result();
        series.batches.with_label_values(&[result.label()]).inc();
        if result == BatchResult::Aborted {
            return;
        }
        series.last_completed.set(timestamp(report.ended_at));
        if let Some(ratio) = report.success_ratio() {
            series.last_success_ratio.set(ratio);
        }
    }

    /// What the history knows of a batch before a restart.
    pub fn restore_last_batch(&self, completed_at: DateTime<Utc>) {
        self.moving().last_completed.set(timestamp(completed_at));
    }

    pub fn skipped(&self, cause: SkipCause) {
        self.moving()
            .skipped
            .with_label_values(&[cause.label()])
            .inc();
    }

    pub fn tick(&self, at: DateTime<Utc>) {
        self.moving().last_tick.set(timestamp(at));
    }

    /// `None` where no batch is due any more.
    pub fn next_batch(&self, at: Option<DateTime<Utc>>) {
        self.moving().next_batch.set(at.map_or(f64::NAN, timestamp));
    }

    /// The times between two batches in the next seven days; `None` where none are due.
    pub fn intervals(
        &self,
        longest: Option<Duration>,
        shortest: Option<Duration>,
        mean: Option<Duration>,
    ) {
        let seconds = |time: Option<Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64());
        let series = self.moving();
        series.interval.set(seconds(longest));
        series.shortest_interval.set(seconds(shortest));
        series.mean_interval.set(seconds(mean));
    }

    pub fn paused(&self, paused: bool) {
        self.moving().paused.set(flag(paused));
    }

    /// Rooms that the janitor can't vouch for.
    pub fn leaked(&self, rooms: u64) {
        self.moving().leaked.inc_by(rooms);
    }

    /// Rooms of dead boots that are gone now.
    pub fn swept(&self, rooms: u64) {
        self.moving().swept.inc_by(rooms);
    }
}

impl TargetSeries {
    fn count_outcome(&self, outcome: &Outcome) {
        let failure = match outcome {
            Outcome::Aborted => return self.aborted.inc(),
            Outcome::Ok => return self.probes.inc(),
            Outcome::Failed(failure) => failure,
        };
        self.probes.inc();
        let reason = failure.reason;
        self.failures
            .with_label_values(&[reason.label(), reason.origin().label()])
            .inc();
        if let Reason::PlanLimit(kind) = reason {
            self.limits.with_label_values(&[kind.label()]).inc();
        }
    }

    /// Whatever the outcome: delays of successes alone would flatter.
    fn observe_delays(&self, report: &ProbeReport) {
        let span = |span| report.timeline.span(span);
        if let Some(delay) = span(Span::AgentJoin).filter(|_| !report.join_upper_bound) {
            let position = [report.position.label()];
            let histogram = self.join_delay.with_label_values(&position);
            histogram.observe(delay.as_secs_f64());
        }
        if let Some(delay) = span(Span::FirstSpeech) {
            self.first_speech_delay.observe(delay.as_secs_f64());
        }
        for turn in &report.turns {
            if let Some(delay) = turn.reply_delay() {
                self.reply_delay.observe(delay.as_secs_f64());
            }
        }
        for other in other_spans() {
            if let Some(duration) = span(other) {
                let histogram = self.span_duration.with_label_values(&[other.label()]);
                histogram.observe(duration.as_secs_f64());
            }
        }
    }
}

/// A room that counts as open; dropping it, in whatever way, ends that.
#[must_use = "dropping it counts the room as closed"]
pub struct OpenRoom(Arc<TargetInner>);

impl Drop for OpenRoom {
    fn drop(&mut self) {
        self.0.series.moving().in_flight.dec();
    }
}

/// The series of one project. Cheap to clone.
#[derive(Clone)]
pub struct ProjectMetrics(Arc<Kept<ProjectSeries>>);

struct ProjectSeries {
    backoff_until: Gauge,
    budget: GaugeVec,
    budget_used: GaugeVec,
}

impl ProjectMetrics {
    fn new(name: &str) -> Self {
        let families = Families::of("project", name);
        let budget_used = families.gauges(&catalogue::BUDGET_USED);
        for period in Period::ALL {
            let gauge = budget_used.with_label_values(&[period.label()]);
            gauge.set(f64::NAN);
        }
        let series = ProjectSeries {
            backoff_until: families.gauge(&catalogue::BACKOFF_UNTIL),
            budget: families.gauges(&catalogue::BUDGET),
            budget_used,
        };
        Self(Arc::new(families.keep(series)))
    }

    fn configure(&self, project: &Project) {
        let series = self.0.moving();
        for period in Period::ALL {
            let limit = project.budget.limit(period);
            let seconds = limit.map_or(f64::NAN, |limit| limit.as_secs_f64());
            let gauge = series.budget.with_label_values(&[period.label()]);
            gauge.set(seconds);
        }
    }

    /// Agent time used or reserved in the current period.
    pub fn budget_used(&self, period: Period, used: Duration) {
        let series = self.0.moving();
        let gauge = series.budget_used.with_label_values(&[period.label()]);
        gauge.set(used.as_secs_f64());
    }

    /// `None` where nothing holds batches back.
    pub fn backoff_until(&self, until: Option<DateTime<Utc>>) {
        self.0
            .moving()
            .backoff_until
            .set(until.map_or(f64::NAN, timestamp));
    }
}

fn flag(set: bool) -> f64 {
    if set { 1.0 } else { 0.0 }
}

/// Seconds since the Unix epoch.
fn timestamp(at: DateTime<Utc>) -> f64 {
    (at - DateTime::UNIX_EPOCH).as_seconds_f64()
}
