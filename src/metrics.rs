//! The series that `/metrics` shows. `catalogue.rs` declares them, with their buckets and HELP texts.
//!
//! This module measures no time: it counts results that were measured before.
//!
//! Each target, each project and the process has its own registry. So the series of a removed target disappear together,
//! even if something still holds its handle: a scrape no longer gathers that registry. The `prometheus` crate could remove
//! single series only, by their label values, and the next update would create them again.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use prometheus::{Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec};

use crate::config::{Objectives, Period, Project, Target};
use crate::probe::{
    AgentStage, LimitKind, MediaPath, Outcome, Position, ProbeReport, Reason, Span, Turn,
    TurnResult,
};
use crate::report::{BatchReport, BatchResult, Fault, Purpose, TargetState};

mod catalogue;
mod family;
mod slo;

pub use catalogue::{CATALOGUE, Definition, MetricKind, PREFIX};
pub use slo::{Sli, SliVerdict};

use family::{CachedRegistry, CommonLabels, EncodedFamily, Families, ProcessMetrics, SeriesGuard};

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of the series `build_info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    pub version: String,
    pub revision: String,
    pub rustc: String,
    pub engine: String,
}

/// Labels of the series `incident_info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncidentInfo {
    /// The incident's id.
    pub incident: String,
    /// The most frequent reason of its failed rooms.
    pub reason: Option<String>,
    /// Failed rooms.
    pub failed: u32,
    /// Rooms with a verdict since it began.
    pub rooms: u32,
    /// What differs between failed and good rooms; empty if nothing is known to differ.
    pub differs: String,
    /// The address of its page.
    pub url: Option<String>,
}

impl IncidentInfo {
    /// In whole percent: each other text is a new series, and most outages stay at 100 %. Rounded, but never to 0 % or 100 %.
    fn share(&self) -> String {
        let (failed, rooms) = (u64::from(self.failed), u64::from(self.rooms));
        if rooms == 0 {
            return String::new();
        }
        let rounded = (200 * failed + rooms) / (2 * rooms);
        let percent = if failed == 0 || failed >= rooms {
            rounded
        } else {
            rounded.clamp(1, 99)
        };
        format!("{percent} %")
    }
}

/// Why a tick of the schedule started no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum SkipCause {
    /// The batch before is still running.
    Overlap,
    /// The batch could use more agent time than the budget has left.
    Budget,
    /// The project backs off after a plan limit.
    Backoff,
    Paused,
}

impl SkipCause {
    pub const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The value of the label `cause`.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The component of the canary that had a fault and survived it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum InternalError {
    /// A probe ended with the reason `internal`. [`TargetMetrics::probe`] counts it.
    Probe,
    /// A batch's task panicked.
    Batch,
    /// The sweep of orphaned rooms failed.
    Janitor,
    /// The history can't be written, or can't store a batch. The history counts these faults itself.
    History,
    /// This process did not run for some seconds.
    Stall,
    /// The HTTP server failed, or a handler panicked.
    Http,
}

impl InternalError {
    pub const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The value of the label `kind`.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// All series of this process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<MetricsInner>,
}

struct MetricsInner {
    labels: CommonLabels,
    process_metrics: ProcessMetrics,
    process: Arc<CachedRegistry<ProcessSeries>>,
    live: Mutex<LiveSeries>,
}

/// What a scrape gathers, by name.
#[derive(Default)]
struct LiveSeries {
    targets: BTreeMap<String, TargetMetrics>,
    projects: BTreeMap<String, ProjectMetrics>,
    channels: BTreeMap<String, ChannelMetrics>,
}

struct ProcessSeries {
    internal_errors: IntCounterVec,
    history_dropped: IntCounter,
    log_dropped: IntCounter,
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
    /// With `drill`, every series has the label `drill="true"`.
    pub fn new(build: &Build, drill: bool) -> Self {
        let labels = CommonLabels::new(drill);
        let families = Families::for_process(&labels);
        let internal_errors = families.counters(
            &catalogue::INTERNAL_ERRORS,
            InternalError::ALL.iter().map(|kind| [kind.label()]),
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
            log_dropped: families.counter(&catalogue::LOG_DROPPED),
            history_degraded,
            reload_successful: families.gauge(&catalogue::RELOAD_SUCCESSFUL),
            reload_success_at: families.gauge(&catalogue::RELOAD_SUCCESS_AT),
        };
        Self {
            inner: Arc::new(MetricsInner {
                process_metrics: ProcessMetrics::new(&labels),
                process: Arc::new(families.cache(process)),
                labels,
                live: Mutex::default(),
            }),
        }
    }

    /// Returns the handle of a target with these settings. From now on all of its counters exist.
    ///
    /// An existing target keeps its counters and takes the changed settings. A target that was removed starts at zero
    /// again.
    pub fn target(&self, name: &str, target: &Target, project: &Project) -> TargetMetrics {
        let mut live = self.live();
        match live.targets.entry(name.to_owned()) {
            Entry::Occupied(existing) => {
                existing.get().configure(target, project);
                existing.get().clone()
            }
            Entry::Vacant(vacant) => {
                let process = Arc::clone(&self.inner.process);
                let metrics = TargetMetrics::new(name, &self.inner.labels, process);
                metrics.configure(target, project);
                vacant.insert(metrics).clone()
            }
        }
    }

    /// The handle of a target that was not removed.
    pub fn live_target(&self, name: &str) -> Option<TargetMetrics> {
        self.live().targets.get(name).cloned()
    }

    /// Removes the target's series. Handles to it stay valid, but no scrape shows what they count.
    pub fn remove_target(&self, name: &str) {
        self.live().targets.remove(name);
    }

    /// Returns the handle of a project with these settings, and creates it if it is new.
    pub fn project(&self, name: &str, project: &Project) -> ProjectMetrics {
        let mut live = self.live();
        let entry = live.projects.entry(name.to_owned());
        let metrics = entry.or_insert_with(|| ProjectMetrics::new(name, &self.inner.labels));
        metrics.configure(project);
        metrics.clone()
    }

    /// Removes the project's series. Handles to it stay valid, but no scrape shows what they count.
    pub fn remove_project(&self, name: &str) {
        self.live().projects.remove(name);
    }

    /// Returns the handle of a channel of notifications, and creates it if it is new.
    pub fn channel(&self, name: &str) -> ChannelMetrics {
        let mut live = self.live();
        let entry = live.channels.entry(name.to_owned());
        let metrics = entry.or_insert_with(|| ChannelMetrics::new(name, &self.inner.labels));
        metrics.clone()
    }

    /// Removes the channel's series. Handles to it stay valid, but no scrape shows what they count.
    pub fn remove_channel(&self, name: &str) {
        self.live().channels.remove(name);
    }

    pub fn internal_error(&self, kind: InternalError) {
        self.inner.process.update().internal_error(kind);
    }

    pub fn history_dropped(&self, records: u64) {
        self.inner.process.update().history_dropped.inc_by(records);
    }

    pub fn log_dropped(&self, lines: u64) {
        self.inner.process.update().log_dropped.inc_by(lines);
    }

    pub fn history_degraded(&self, degraded: bool) {
        let process = self.inner.process.update();
        process.history_degraded.set(flag(degraded));
    }

    /// Records that the settings were loaded, at the start or later.
    pub fn config_loaded(&self, at: DateTime<Utc>) {
        let process = self.inner.process.update();
        process.reload_successful.set(1.0);
        process.reload_success_at.set(timestamp(at));
    }

    /// Records that new settings were rejected. The old ones stay in use.
    pub fn config_refused(&self) {
        self.inner.process.update().reload_successful.set(0.0);
    }

    /// All series in Prometheus' text format 0.0.4: each family once, sorted by name, and its series by project or target.
    ///
    /// It waits for no probe and no disk, only for updates of the same registry, which take microseconds. With fifty
    /// changed targets it takes some milliseconds for 1.3 MB, so a server calls it off the async threads.
    pub fn render(&self) -> String {
        let own_process = self.inner.process_metrics.encode();
        let (targets, projects, channels) = {
            let live = self.live();
            let targets: Vec<_> = live.targets.values().cloned().collect();
            let projects: Vec<_> = live.projects.values().cloned().collect();
            let channels: Vec<_> = live.channels.values().cloned().collect();
            (targets, projects, channels)
        };
        let process = iter::once(self.inner.process.encoded());
        let projects = projects.iter().map(|project| project.0.encoded());
        let targets = targets.iter().map(|target| target.0.series.encoded());
        let channels = channels.iter().map(|channel| channel.0.encoded());
        let cached: Vec<_> = process
            .chain(projects)
            .chain(targets)
            .chain(channels)
            .collect();
        let mut families: BTreeMap<&str, Vec<&EncodedFamily>> = BTreeMap::new();
        for family in own_process
            .iter()
            .chain(cached.iter().flat_map(|families| families.iter()))
        {
            families.entry(&family.name).or_default().push(family);
        }
        let size = families.values().flatten().map(|part| part.len()).sum();
        let mut text = String::with_capacity(size);
        for family in families.values() {
            text.extend(family.first().map(|part| part.head()));
            text.extend(family.iter().map(|part| part.series()));
        }
        text
    }

    fn live(&self) -> MutexGuard<'_, LiveSeries> {
        // Each change is a single insert or remove, so a panic elsewhere leaves the maps consistent.
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
    series: CachedRegistry<TargetSeries>,
    process: Arc<CachedRegistry<ProcessSeries>>,
}

struct TargetSeries {
    probes: IntCounterVec,
    aborted: IntCounter,
    failures: IntCounterVec,
    limits: IntCounterVec,
    eligible: IntCounterVec,
    good: IntCounterVec,
    bad_batches: IntCounterVec,
    batches: IntCounterVec,
    skipped: IntCounterVec,
    billed: IntCounter,
    paths: IntCounterVec,
    packets: IntCounter,
    packets_lost: IntCounter,
    leaked: IntCounter,
    swept: IntCounter,
    join_delay: HistogramVec,
    first_speech_delay: Histogram,
    reply_delay: Histogram,
    turns: IntCounterVec,
    agent_stage: HistogramVec,
    reply_unexplained: Histogram,
    yield_delay: Histogram,
    word_error: Histogram,
    span_duration: HistogramVec,
    round_trip: Histogram,
    jitter: Histogram,
    in_flight: Gauge,
    last_tick: Gauge,
    next_batch: Gauge,
    last_completed: Gauge,
    last_success_ratio: Gauge,
    max_interval: Gauge,
    min_interval: Gauge,
    mean_interval: Gauge,
    effective_interval: Gauge,
    slo_threshold: GaugeVec,
    slo_objective: GaugeVec,
    paused: Gauge,
    state: GaugeVec,
    state_since: Gauge,
    incident_open: GaugeVec,
    incident_info: GaugeVec,
    info: GaugeVec,
}

fn paths() -> impl Iterator<Item = [&'static str; 1]> {
    MediaPath::ALL.iter().map(|path| [path.label()])
}

/// The spans without a histogram of their own: they share `span_duration_seconds`.
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
    fn new(name: &str, labels: &CommonLabels, process: Arc<CachedRegistry<ProcessSeries>>) -> Self {
        let families = Families::with_label("target", name, labels);
        let slis = || {
            let slis = Sli::ALL.iter();
            slis.flat_map(|sli| IN_INCIDENT.map(|in_incident| [sli.label(), in_incident]))
        };
        let purposes = Purpose::ALL.map(Purpose::label);
        let each_purpose = |labels: [&'static str; 2]| {
            let [one, other] = labels;
            purposes.map(|purpose| [purpose, one, other])
        };
        let in_flight = families.gauge(&catalogue::IN_FLIGHT);
        in_flight.set(0.0);
        let paused = families.gauge(&catalogue::PAUSED);
        paused.set(0.0);
        let state = families.gauges(&catalogue::STATE);
        set_state(&state, TargetState::Unknown);
        let incident_open = families.gauges(&catalogue::INCIDENT_OPEN);
        for fault in Fault::ALL {
            let open = incident_open.with_label_values(&[fault.label()]);
            open.set(f64::NAN);
        }
        let series = TargetSeries {
            probes: families.counters(&catalogue::PROBES, purposes.map(|purpose| [purpose])),
            aborted: families.counter(&catalogue::PROBES_ABORTED),
            failures: families.counters(
                &catalogue::FAILURES,
                Reason::ALL
                    .map(|reason| [reason.label(), reason.origin().label()])
                    .into_iter()
                    .flat_map(each_purpose),
            ),
            limits: families.counters(
                &catalogue::LIMITS,
                LimitKind::ALL.map(|kind| [kind.label()]),
            ),
            eligible: families.counters(&catalogue::ELIGIBLE, slis()),
            good: families.counters(&catalogue::GOOD, slis()),
            bad_batches: families.counters(&catalogue::BAD_BATCHES, slis()),
            batches: families.counters(
                &catalogue::BATCHES,
                BatchResult::ALL
                    .into_iter()
                    .flat_map(|result| purposes.map(|purpose| [purpose, result.label()])),
            ),
            skipped: families.counters(
                &catalogue::SKIPPED,
                SkipCause::ALL.iter().map(|cause| [cause.label()]),
            ),
            billed: families.counter(&catalogue::BILLED),
            paths: families.counters(&catalogue::PATHS, paths()),
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
            turns: families.counters(
                &catalogue::CALLER_TURNS,
                TurnResult::ALL.map(|result| [result.label()]),
            ),
            agent_stage: families.histograms(
                &catalogue::AGENT_STAGE,
                AgentStage::ALL.map(|stage| [stage.label()]),
            ),
            reply_unexplained: families.histogram(&catalogue::REPLY_UNEXPLAINED),
            yield_delay: families.histogram(&catalogue::YIELD_DELAY),
            word_error: families.histogram(&catalogue::WORD_ERROR),
            span_duration: families.histograms(
                &catalogue::SPAN_DURATION,
                other_spans().map(|span| [span.label()]),
            ),
            round_trip: families.histogram(&catalogue::ROUND_TRIP),
            jitter: families.histogram(&catalogue::JITTER),
            in_flight,
            last_tick: families.gauge(&catalogue::LAST_TICK),
            next_batch: families.gauge(&catalogue::NEXT_BATCH),
            last_completed: families.gauge(&catalogue::LAST_COMPLETED),
            last_success_ratio: families.gauge(&catalogue::LAST_SUCCESS_RATIO),
            max_interval: families.gauge(&catalogue::MAX_INTERVAL),
            min_interval: families.gauge(&catalogue::MIN_INTERVAL),
            mean_interval: families.gauge(&catalogue::MEAN_INTERVAL),
            effective_interval: families.gauge(&catalogue::EFFECTIVE_INTERVAL),
            slo_threshold: families.gauges(&catalogue::SLO_THRESHOLD),
            slo_objective: families.gauges(&catalogue::SLO_OBJECTIVE),
            paused,
            state,
            state_since: families.gauge(&catalogue::STATE_SINCE),
            incident_open,
            incident_info: families.gauges(&catalogue::INCIDENT_INFO),
            info: families.gauges(&catalogue::TARGET_INFO),
        };
        Self(Arc::new(TargetInner {
            series: families.cache(series),
            process,
        }))
    }

    fn update(&self) -> SeriesGuard<'_, TargetSeries> {
        self.0.series.update()
    }

    fn configure(&self, target: &Target, project: &Project) {
        let series = self.update();
        for &sli in Sli::ALL {
            let label = [sli.label()];
            // Without an objective no alert rule holds, so an alert ends when the settings no longer expect what it is about.
            let applicable = |value: f64| {
                if sli.applies_to(target) {
                    value
                } else {
                    f64::NAN
                }
            };
            let objective = applicable(sli.objective(&target.objectives));
            let gauge = series.slo_objective.with_label_values(&label);
            gauge.set(objective);
            if let Some(threshold) = sli.threshold(&target.objectives) {
                let gauge = series.slo_threshold.with_label_values(&label);
                gauge.set(applicable(threshold.as_secs_f64()));
            }
        }
        // The labels are the settings, so changed settings are a new series: the old one must go.
        series.info.reset();
        series
            .info
            .with_label_values(&[
                target.project.as_str(),
                project.url.as_str(),
                target.agent_name.as_deref().unwrap_or_default(),
                target.dispatch.deployment.as_str(),
                target.dispatch.mode.name(),
            ])
            .set(1.0);
    }

    /// Counts a room as open until the returned guard is dropped.
    pub fn room_opened(&self) -> OpenRoom {
        self.update().in_flight.inc();
        OpenRoom(Arc::clone(&self.0))
    }

    /// Counts a probe whose outcome is final. A scrape sees all of its changes or none.
    ///
    /// Service levels, delays and audio count scheduled batches only. `in_incident`: an incident of the target was open when
    /// the probe ended.
    pub fn probe(
        &self,
        purpose: Purpose,
        report: &ProbeReport,
        objectives: &Objectives,
        in_incident: bool,
    ) {
        let series = self.update();
        series.count_outcome(purpose, &report.outcome);
        let failure = report.outcome.failure();
        if failure.is_some_and(|failure| failure.reason == Reason::Internal) {
            self.0.process.update().internal_error(InternalError::Probe);
        }
        if let Some(billed) = report.billed() {
            series.billed.inc_by(billed.as_secs());
        }
        if purpose != Purpose::Scheduled {
            return;
        }
        for &sli in Sli::ALL {
            let label = [sli.label(), in_incident_label(in_incident)];
            match sli.judge(report, objectives) {
                SliVerdict::NotEligible => continue,
                SliVerdict::Bad => {}
                SliVerdict::Good => series.good.with_label_values(&label).inc(),
            }
            series.eligible.with_label_values(&label).inc();
        }
        series.observe_delays(report);
        for turn in &report.turns {
            // A turn that the canary cut off when it stopped is not an unanswered one.
            if report.outcome != Outcome::Aborted {
                let turns = series.turns.with_label_values(&[turn.result.label()]);
                turns.inc();
            }
            series.observe_turn(turn);
        }
        if let Some(path) = report.circumstances.media_path {
            series.paths.with_label_values(&[path.label()]).inc();
        }
        for connection in &report.evidence.media {
            if let Some(seconds) = connection.round_trip_seconds {
                series.round_trip.observe(seconds);
            }
        }
        series.packets.inc_by(report.audio.packets);
        series.packets_lost.inc_by(report.audio.lost);
        if let Some(jitter) = report.audio.jitter {
            series.jitter.observe(jitter.as_secs_f64());
        }
    }

    /// Counts a batch that has ended, without its probes: [`TargetMetrics::probe`] counts them. `in_incident`: an incident of
    /// the target was open when the batch ended.
    pub fn batch(&self, report: &BatchReport, objectives: &Objectives, in_incident: bool) {
        let series = self.update();
        let result = report.result();
        let labels = [report.purpose.label(), result.label()];
        series.batches.with_label_values(&labels).inc();
        if report.purpose != Purpose::Scheduled {
            return;
        }
        for &sli in Sli::ALL {
            let bad = |probe: &ProbeReport| sli.judge(probe, objectives) == SliVerdict::Bad;
            if report.probes.iter().any(bad) {
                let label = [sli.label(), in_incident_label(in_incident)];
                series.bad_batches.with_label_values(&label).inc();
            }
        }
        if result == BatchResult::Aborted {
            return;
        }
        series.last_completed.set(timestamp(report.ended_at));
        if let Some(ratio) = report.success_ratio() {
            series.last_success_ratio.set(ratio);
        }
    }

    /// Restores the end of the last batch from the history, after a restart.
    pub fn restore_last_batch(&self, completed_at: DateTime<Utc>) {
        self.update().last_completed.set(timestamp(completed_at));
    }

    pub fn skipped(&self, cause: SkipCause) {
        self.update()
            .skipped
            .with_label_values(&[cause.label()])
            .inc();
    }

    pub fn tick(&self, at: DateTime<Utc>) {
        self.update().last_tick.set(timestamp(at));
    }

    /// `None` if no further batch is scheduled.
    pub fn next_batch(&self, at: Option<DateTime<Utc>>) {
        self.update().next_batch.set(at.map_or(f64::NAN, timestamp));
    }

    /// The intervals between two batches over the next seven days, `None` if no batches are scheduled, and the longest time
    /// that a batch can take.
    pub fn intervals(
        &self,
        max: Option<Duration>,
        min: Option<Duration>,
        mean: Option<Duration>,
        longest_batch: Duration,
    ) {
        let seconds = |time: Option<Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64());
        let series = self.update();
        series.max_interval.set(seconds(max));
        series.min_interval.set(seconds(min));
        series.mean_interval.set(seconds(mean));
        let effective = min.map(|min| min.max(longest_batch));
        series.effective_interval.set(seconds(effective));
    }

    pub fn paused(&self, paused: bool) {
        self.update().paused.set(flag(paused));
    }

    /// Sets the state that the target has been in since `since`.
    pub fn state(&self, state: TargetState, since: DateTime<Utc>) {
        let series = self.update();
        set_state(&series.state, state);
        series.state_since.set(timestamp(since));
    }

    /// Sets whose fault the open incident is, and what is known of it; `None` if no incident is open. To be called only when
    /// both are known: after a restart, the alert of an open incident must not resolve for a moment.
    pub fn incident(&self, fault: Option<Fault>, info: Option<IncidentInfo>) {
        let series = self.update();
        for one in Fault::ALL {
            let open = series.incident_open.with_label_values(&[one.label()]);
            open.set(flag(fault == Some(one)));
        }
        series.incident_info.reset();
        if let Some(info) = info {
            let share = info.share();
            let IncidentInfo {
                incident,
                reason,
                differs,
                url,
                ..
            } = info;
            let [reason, url] = [reason, url].map(Option::unwrap_or_default);
            let labels = [incident, reason, share, differs, url];
            series.incident_info.with_label_values(&labels).set(1.0);
        }
    }

    /// Counts rooms that may still exist after their clean-up.
    pub fn leaked(&self, rooms: u64) {
        self.update().leaked.inc_by(rooms);
    }

    /// Counts rooms of earlier runs that are gone now.
    pub fn swept(&self, rooms: u64) {
        self.update().swept.inc_by(rooms);
    }
}

impl TargetSeries {
    fn count_outcome(&self, purpose: Purpose, outcome: &Outcome) {
        if *outcome == Outcome::Aborted {
            return self.aborted.inc();
        }
        let purpose = purpose.label();
        self.probes.with_label_values(&[purpose]).inc();
        let Outcome::Failed(failure) = outcome else {
            return;
        };
        let reason = failure.reason;
        self.failures
            .with_label_values(&[purpose, reason.label(), reason.origin().label()])
            .inc();
        if let Reason::PlanLimit(kind) = reason {
            self.limits.with_label_values(&[kind.label()]).inc();
        }
    }

    /// Observes delays whatever the outcome: delays of successes alone would look too good.
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
        for other in other_spans() {
            if let Some(duration) = span(other) {
                let histogram = self.span_duration.with_label_values(&[other.label()]);
                histogram.observe(duration.as_secs_f64());
            }
        }
    }

    /// Observes what is known of a turn, whatever its result.
    fn observe_turn(&self, turn: &Turn) {
        if let Some(delay) = turn.reply_delay() {
            self.reply_delay.observe(delay.as_secs_f64());
        }
        for stage in AgentStage::ALL {
            if let Some(duration) = turn.stages.get(stage) {
                let histogram = self.agent_stage.with_label_values(&[stage.label()]);
                histogram.observe(duration.as_secs_f64());
            }
        }
        if let Some(seconds) = turn.unexplained_seconds() {
            self.reply_unexplained.observe(seconds);
        }
        if let Some(delay) = turn.yield_delay() {
            self.yield_delay.observe(delay.as_secs_f64());
        }
        if let Some(share) = turn.word_error {
            self.word_error.observe(share);
        }
    }
}

/// A room that counts as open until this is dropped.
#[must_use = "dropping it counts the room as closed"]
pub struct OpenRoom(Arc<TargetInner>);

impl Drop for OpenRoom {
    fn drop(&mut self) {
        self.0.series.update().in_flight.dec();
    }
}

/// The series of one project. Cheap to clone.
#[derive(Clone)]
pub struct ProjectMetrics(Arc<CachedRegistry<ProjectSeries>>);

struct ProjectSeries {
    backoff_until: Gauge,
    budget: GaugeVec,
    budget_used: GaugeVec,
    budget_reserved: GaugeVec,
}

impl ProjectMetrics {
    fn new(name: &str, labels: &CommonLabels) -> Self {
        let families = Families::with_label("project", name, labels);
        let budget_used = families.gauges(&catalogue::BUDGET_USED);
        let budget_reserved = families.gauges(&catalogue::BUDGET_RESERVED);
        for period in Period::ALL {
            for gauges in [&budget_used, &budget_reserved] {
                gauges.with_label_values(&[period.label()]).set(f64::NAN);
            }
        }
        let series = ProjectSeries {
            backoff_until: families.gauge(&catalogue::BACKOFF_UNTIL),
            budget: families.gauges(&catalogue::BUDGET),
            budget_used,
            budget_reserved,
        };
        Self(Arc::new(families.cache(series)))
    }

    fn configure(&self, project: &Project) {
        let series = self.0.update();
        for period in Period::ALL {
            let limit = project.budget.limit(period);
            let seconds = limit.map_or(f64::NAN, |limit| limit.as_secs_f64());
            let gauge = series.budget.with_label_values(&[period.label()]);
            gauge.set(seconds);
        }
    }

    /// Sets the agent time of the current period: used by ended rooms, and reserved for open ones.
    pub fn budget_used(&self, period: Period, used: Duration, reserved: Duration) {
        let series = self.0.update();
        let period = [period.label()];
        for (gauges, time) in [
            (&series.budget_used, used),
            (&series.budget_reserved, reserved),
        ] {
            gauges.with_label_values(&period).set(time.as_secs_f64());
        }
    }

    /// `None` without a back-off.
    pub fn backoff_until(&self, until: Option<DateTime<Utc>>) {
        self.0
            .update()
            .backoff_until
            .set(until.map_or(f64::NAN, timestamp));
    }
}

fn set_state(states: &GaugeVec, state: TargetState) {
    for one in TargetState::ALL {
        let gauge = states.with_label_values(&[one.label()]);
        gauge.set(flag(one == state));
    }
}

/// The values of the label `in_incident`.
const IN_INCIDENT: [&str; 2] = [in_incident_label(false), in_incident_label(true)];

const fn in_incident_label(in_incident: bool) -> &'static str {
    if in_incident { "true" } else { "false" }
}

/// The series of one channel of notifications. Cheap to clone.
#[derive(Clone)]
pub struct ChannelMetrics(Arc<CachedRegistry<ChannelSeries>>);

struct ChannelSeries {
    attempts: IntCounter,
    failures: IntCounter,
    lost: IntCounter,
}

impl ChannelMetrics {
    fn new(name: &str, labels: &CommonLabels) -> Self {
        let families = Families::with_label("channel", name, labels);
        let series = ChannelSeries {
            attempts: families.counter(&catalogue::NOTIFICATIONS),
            failures: families.counter(&catalogue::NOTIFICATION_FAILURES),
            lost: families.counter(&catalogue::NOTIFICATIONS_LOST),
        };
        Self(Arc::new(families.cache(series)))
    }

    /// Counts an attempt to send.
    pub fn attempt(&self, succeeded: bool) {
        let series = self.0.update();
        series.attempts.inc();
        if !succeeded {
            series.failures.inc();
        }
    }

    /// Counts messages that will never be delivered.
    pub fn lost(&self, messages: u64) {
        self.0.update().lost.inc_by(messages);
    }
}

fn flag(set: bool) -> f64 {
    if set { 1.0 } else { 0.0 }
}

/// Seconds since the Unix epoch.
fn timestamp(at: DateTime<Utc>) -> f64 {
    (at - DateTime::UNIX_EPOCH).as_seconds_f64()
}

#[cfg(test)]
mod tests;
