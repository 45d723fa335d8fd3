//! Runs one batch, and records its events in log, metrics and history.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::BatchObserver;
use crate::batch::{self, Access, BatchEvent};
use crate::config::{Project, Target};
use crate::detection::{Detector, Verdict};
use crate::history::History;
use crate::http::{LiveBatch, LiveProgress};
use crate::metrics::{OpenRoom, TargetMetrics};
use crate::notify::Notifier;
use crate::probe::driver::Context;
use crate::probe::{Outcome, ProbeReport};
use crate::report::{BatchReport, NotOpened, Purpose};

/// The destinations of one batch's records, with the settings that were in effect when it started.
pub(super) struct Recorder {
    pub(super) target: String,
    pub(super) purpose: Purpose,
    pub(super) settings: Arc<Target>,
    pub(super) metrics: TargetMetrics,
    pub(super) detector: Detector,
    pub(super) notifier: Notifier,
    pub(super) history: History,
    pub(super) progress: LiveProgress,
    pub(super) observer: Option<BatchObserver>,
}

impl Recorder {
    pub(super) async fn run(
        self,
        batch_id: String,
        context: Context,
        access: Access,
        abort: CancellationToken,
    ) -> Arc<BatchReport> {
        let mut open = HashMap::new();
        let live = self
            .progress
            .start(&batch_id, &self.target, self.purpose.label());
        let project = Arc::clone(&context.project);
        let id = batch_id.clone();
        let on_event = |event: &BatchEvent| {
            self.record_event(&id, event, &mut open, &project);
            show_live(&live, event);
        };
        batch::run(
            batch_id,
            &self.target,
            self.purpose,
            context,
            access,
            abort,
            on_event,
        )
        .await
    }

    fn record_event(
        &self,
        batch_id: &str,
        event: &BatchEvent,
        open: &mut HashMap<usize, OpenRoom>,
        project: &Project,
    ) {
        match event {
            BatchEvent::Started | BatchEvent::Probe { .. } | BatchEvent::HoldDecided { .. } => {}
            BatchEvent::RoomOpened { index, .. } => {
                open.insert(*index, self.metrics.room_opened());
            }
            BatchEvent::RoomClosed { index, report } => {
                open.remove(index);
                self.record_probe(batch_id, report);
            }
            BatchEvent::Ended(report) => self.record_batch(report, project),
        }
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }

    fn record_probe(&self, batch_id: &str, report: &ProbeReport) {
        let in_incident = self.detector.open_incident().is_some();
        let objectives = &self.settings.objectives;
        self.metrics
            .probe(self.purpose, report, objectives, in_incident);
        self.detector.room(batch_id, self.purpose, report);
        let Outcome::Failed(failure) = &report.outcome else {
            return;
        };
        tracing::warn!(
            target_name = self.target,
            room = report.room.0,
            reason = failure.reason.label(),
            origin = failure.reason.origin().label(),
            "target {}, room {}: {}: {}",
            self.target,
            report.room,
            failure.reason.label(),
            failure.detail
        );
    }

    fn record_batch(&self, report: &BatchReport, project: &Project) {
        if let Some(NotOpened {
            denial: Some(denial),
            ..
        }) = &report.not_opened
            && report.probes.is_empty()
        {
            let (id, cause) = (Some(report.batch_id.as_str()), super::skip_cause(denial));
            // A confirmation is no tick of the schedule.
            if self.purpose != Purpose::Confirmation {
                super::record_skip(&self.target, &self.metrics, id, cause, &denial.to_string());
            }
            return;
        }
        let in_incident = self.detector.open_incident().is_some();
        self.metrics
            .batch(report, &self.settings.objectives, in_incident);
        self.history.record(report, &self.settings, project);
        let mut verdicts = report
            .probes
            .iter()
            .map(|probe| Verdict::of(&probe.outcome));
        if self.purpose == Purpose::Scheduled && verdicts.any(Verdict::is_on_agent) {
            self.notifier.heartbeat(&self.target);
        }
        let summary = report.summary();
        let took = report.ended_at - report.started_at;
        let join = summary.join_delay.map_or_else(
            || "no join delay".to_owned(),
            |delay| {
                format!(
                    "join p50 {:.3} s, max {:.3} s",
                    delay.p50.as_secs_f64(),
                    delay.max.as_secs_f64()
                )
            },
        );
        tracing::info!(
            target_name = self.target,
            batch_id = report.batch_id,
            result = report.result().label(),
            ok = summary.ok,
            failed = summary.failed,
            aborted = summary.aborted,
            not_opened = report.not_opened.as_ref().map(|rest| rest.rooms),
            seconds = took.as_seconds_f64(),
            "target {}: {} ok, {} failed, {} aborted; {join}; batch {}",
            self.target,
            summary.ok,
            summary.failed,
            summary.aborted,
            report.batch_id
        );
    }
}

/// Shows an event to those who watch the batch at this moment.
fn show_live(live: &LiveBatch, event: &BatchEvent) {
    match event {
        BatchEvent::Started | BatchEvent::HoldDecided { .. } => {}
        BatchEvent::RoomOpened { room, .. } => live.room_opened(&room.0),
        BatchEvent::Probe { index, event } => live.probe_advanced(*index, event),
        BatchEvent::RoomClosed { index, report } => live.room_closed(*index, report),
        BatchEvent::Ended(report) => live.ended(report.result().label()),
    }
}
