//! Outages of targets: the state of each target, its incidents, and what differs between its failed and its good rooms.
//!
//! A [`Detector`] hears of every room that ends. What it decides goes to the history, the series and the channels. It starts no
//! batch: the daemon asks it when a confirmation is due.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use url::Url;

use crate::config::{self, Confirm};
use crate::history::{DetectionRecord, History, IncidentRecord, OutboxMessage, RecentProbe};
use crate::metrics::{IncidentInfo, TargetMetrics};
use crate::notify::{Notice, NoticeKind, Notifier};
use crate::probe::{Position, ProbeReport, Reason};
use crate::report::{Fault, Purpose, TargetState};

mod difference;
mod incident;
#[cfg(test)]
mod simulation;
mod state;

pub(crate) use incident::{EndedBy, Incident, IncidentHead, Sample};
pub(crate) use state::{DueConfirmation, Transition, Verdict};

use difference::Difference;
use state::StateMachine;

/// The last rooms of a target, which an incident is compared with.
pub(crate) const MAX_RECENT: usize = 60;

/// Records of all targets whose messages wait for the disk.
const MAX_WAITING_RECORDS: usize = 1000;

/// How many rooms confirmations open in an outage of a whole day, if each fails at once.
pub(crate) fn rooms_in_a_days_outage(confirm: &Confirm) -> u64 {
    let start = DateTime::UNIX_EPOCH;
    let end = start + TimeDelta::days(1);
    let mut machine = StateMachine::new(start);
    let mut opened = 0;
    machine.room(start, start, Verdict::Bad(Fault::Agent));
    while let Some(due) = machine.next_confirmation(confirm)
        && due.at < end
    {
        for _ in 0..due.rooms {
            machine.room(due.at, due.at, Verdict::Bad(Fault::Agent));
        }
        machine.confirmation_attempted(due.at);
        opened += due.rooms as u64;
    }
    opened
}

/// The detection of one target. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Detector {
    shared: Arc<DetectorShared>,
}

struct DetectorShared {
    target: String,
    outputs: Outputs,
    detection: Mutex<Detection>,
}

/// The destinations of a detector's reports.
#[derive(Clone)]
pub(crate) struct Outputs {
    pub(crate) history: History,
    pub(crate) metrics: TargetMetrics,
    pub(crate) notifier: Notifier,
    pub(crate) courier: Courier,
    /// The address of the page.
    pub(crate) external_url: Option<Url>,
    /// The faults are simulated.
    pub(crate) drill: bool,
}

/// Hands messages to the channels once the history has them: a message that is sent is not sent again after a crash, but for the
/// moment between its delivery and the removal from the history. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Courier(mpsc::Sender<Vec<OutboxMessage>>);

impl Courier {
    /// The task ends when the last courier is dropped.
    pub(crate) fn start(history: History, notifier: Notifier, tasks: &mut JoinSet<()>) -> Self {
        let (sender, mut messages) = mpsc::channel(MAX_WAITING_RECORDS);
        tasks.spawn(async move {
            while let Some(messages) = messages.recv().await {
                history.detections_durable().await;
                notifier.deliver(messages);
            }
        });
        Self(sender)
    }

    /// Does not wait. If too many wait, the messages stay in the history, and the next run sends them.
    fn hand_over(&self, messages: Vec<OutboxMessage>) {
        if let Err(error) = self.0.try_send(messages) {
            tracing::error!("messages about outages wait until the next start: {error}");
        }
    }
}

struct Detection {
    settings: Arc<config::Target>,
    kept: Kept,
    /// The incident that is open, or the last one: it may go on.
    incident: Option<Incident>,
    /// The latest is the last one.
    recent: VecDeque<Sample>,
    /// A person suspended the target: its rooms show nothing that should page.
    paused: bool,
}

/// What the next run of this program needs of a target, in addition to its incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    machine: StateMachine,
    /// The id of the incident that is open, or of the last one.
    incident: Option<String>,
    /// When the target became unknown, if that was reported and still is the case.
    blind: Option<DateTime<Utc>>,
    /// The last verdict before that. A state that an earlier version stored has none.
    #[serde(default)]
    silent_since: Option<DateTime<Utc>>,
}

/// What a run of this program finds of a target in the history.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    /// The `state` of the last [`DetectionRecord`].
    pub(crate) state: Option<String>,
    /// The document of its incident.
    pub(crate) incident: Option<String>,
    /// The latest is the last one.
    pub(crate) recent: Vec<Sample>,
}

impl Restored {
    /// The id of the incident in a state; `None` if there is none or the state can't be read.
    pub(crate) fn incident_of(state: &str) -> Option<String> {
        serde_json::from_str::<Kept>(state).ok()?.incident
    }
}

impl Kept {
    /// The target has a verdict again, or it needs none.
    fn end_silence(&mut self) {
        self.blind = None;
        self.silent_since = None;
    }
}

impl Detector {
    pub(crate) fn new(
        target: &str,
        settings: Arc<config::Target>,
        outputs: Outputs,
        now: DateTime<Utc>,
    ) -> Self {
        let detection = Detection {
            settings,
            kept: Kept {
                machine: StateMachine::new(now),
                incident: None,
                blind: None,
                silent_since: None,
            },
            incident: None,
            recent: VecDeque::new(),
            paused: false,
        };
        Self {
            shared: Arc::new(DetectorShared {
                target: target.to_owned(),
                outputs,
                detection: Mutex::new(detection),
            }),
        }
    }

    /// Continues where an earlier run ended. What can't be read is logged, and counts as unknown.
    ///
    /// Until then, the series show no state: the alert of an open incident must not end for a moment.
    pub(crate) fn restore(&self, restored: Restored) {
        let mut detection = self.shared.lock();
        detection.recent.extend(restored.recent);
        if let Some(state) = restored.state {
            match serde_json::from_str(&state) {
                Ok(kept) => {
                    detection.kept = kept;
                    detection.kept.machine.restart(Utc::now());
                }
                Err(error) => tracing::warn!(
                    target_name = self.shared.target,
                    "target {}: its earlier state can't be read: {error}",
                    self.shared.target
                ),
            }
        }
        if let Some(document) = restored.incident {
            match Incident::from_document(&document) {
                Ok(incident) => detection.incident = Some(incident),
                Err(error) => tracing::warn!(
                    target_name = self.shared.target,
                    "target {}: its incident can't be read: {error}",
                    self.shared.target
                ),
            }
        }
        let open = detection.incident.as_ref();
        let open = open.filter(|_| detection.kept.machine.fault().is_some());
        let differences = open.map(Incident::differences).unwrap_or_default();
        self.shared.publish(&detection, &sentences(&differences));
    }

    /// Takes changed settings.
    pub(crate) fn configure(&self, settings: &Arc<config::Target>) {
        self.shared.lock().settings = Arc::clone(settings);
    }

    /// A room has ended.
    pub(crate) fn room(&self, batch_id: &str, purpose: Purpose, report: &ProbeReport) {
        self.room_at(batch_id, purpose, report, Utc::now());
    }

    fn room_at(&self, batch_id: &str, purpose: Purpose, report: &ProbeReport, now: DateTime<Utc>) {
        let sample = Sample::of(batch_id, purpose, report, now);
        let mut detection = self.shared.lock();
        if detection.paused {
            return;
        }
        let verdict = Verdict::of(&report.outcome);
        let machine = &mut detection.kept.machine;
        let in_incident = machine.fault().is_some();
        let transition = machine.room(report.started_at, now, verdict);
        let detail = report.outcome.failure();
        let detail = detail.map(|failure| failure.detail.clone());
        detection.add(sample, in_incident);
        self.shared.changed(&mut detection, transition, detail, now);
    }

    /// Time has passed. Without a verdict for `silence`, the state is unknown.
    pub(crate) fn elapse(&self, silence: Duration) {
        self.elapse_at(silence, Utc::now());
    }

    fn elapse_at(&self, silence: Duration, now: DateTime<Utc>) {
        let mut detection = self.shared.lock();
        let lost = detection.kept.machine.elapse(now, silence);
        let machine = &detection.kept.machine;
        // A target that was never known is reported once, too.
        let never_known = machine.state() == TargetState::Unknown
            && machine.is_silent(now, silence)
            && !detection.paused
            && detection.kept.blind.is_none();
        let never_known = never_known.then(|| Transition::Lost {
            since: machine.since(),
        });
        if let Some(transition) = lost.or(never_known) {
            self.shared
                .changed(&mut detection, Some(transition), None, now);
        }
    }

    /// While the target is paused, its state is unknown. Its incident ends.
    pub(crate) fn set_paused(&self, paused: bool) {
        let mut detection = self.shared.lock();
        if std::mem::replace(&mut detection.paused, paused) != paused {
            self.shared.suspend(&mut detection, EndedBy::Paused);
        }
    }

    /// The target is no longer in the settings: its incident ends.
    pub(crate) fn remove(&self) {
        let mut detection = self.shared.lock();
        detection.paused = true;
        self.shared.suspend(&mut detection, EndedBy::Removed);
    }

    /// The next confirmation; `None` if there is nothing to confirm, or if the settings turn confirmations off.
    pub(crate) fn next_confirmation(&self, confirm: &Confirm) -> Option<DueConfirmation> {
        self.shared.lock().kept.machine.next_confirmation(confirm)
    }

    /// A confirmation has ended, or was denied.
    pub(crate) fn confirmation_attempted(&self) {
        let mut detection = self.shared.lock();
        detection.kept.machine.confirmation_attempted(Utc::now());
    }

    pub(crate) fn state(&self) -> (TargetState, DateTime<Utc>) {
        let detection = self.shared.lock();
        (
            detection.kept.machine.state(),
            detection.kept.machine.since(),
        )
    }

    /// The id of the open incident.
    pub(crate) fn open_incident(&self) -> Option<String> {
        let detection = self.shared.lock();
        detection.kept.machine.fault()?;
        detection.kept.incident.clone()
    }
}

impl Detection {
    fn add(&mut self, sample: Sample, in_incident: bool) {
        if in_incident && let Some(incident) = &mut self.incident {
            incident.add(sample.clone());
        }
        self.recent.push_back(sample);
        if self.recent.len() > MAX_RECENT {
            self.recent.pop_front();
        }
    }
}

impl DetectorShared {
    fn lock(&self) -> MutexGuard<'_, Detection> {
        // Each change leaves a state that can go on, so a panic elsewhere does not make it unusable.
        self.detection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the state. An open incident ends without a recovery.
    fn suspend(&self, detection: &mut Detection, by: EndedBy) {
        let now = Utc::now();
        let was_open = detection.kept.machine.pause(now);
        let mut notices = Vec::new();
        if was_open && let Some(incident) = &mut detection.incident {
            incident.end(now, by);
            notices.push(self.notice(detection, NoticeKind::Closed, now));
        }
        if detection.kept.blind.is_some() {
            notices.push(self.notice(detection, NoticeKind::Sighted, now));
            detection.kept.end_silence();
        }
        self.record(detection, was_open, notices);
    }

    /// Acts on a transition, and records what has changed.
    fn changed(
        &self,
        detection: &mut Detection,
        transition: Option<Transition>,
        detail: Option<String>,
        now: DateTime<Utc>,
    ) {
        let is_open = detection.kept.machine.fault().is_some();
        let mut notices = Vec::new();
        match transition {
            None if !is_open => return,
            None | Some(Transition::Suspected | Transition::Dismissed | Transition::Found) => {}
            Some(Transition::Failed {
                began_at,
                fault,
                continues,
            }) => {
                self.open(detection, began_at, fault, continues, now);
                notices.push(Notice {
                    continues,
                    detail,
                    ..self.notice(detection, NoticeKind::Opened, now)
                });
            }
            Some(Transition::Recovered) => {
                if let Some(incident) = &mut detection.incident {
                    incident.end(now, EndedBy::Recovered);
                }
                notices.push(self.notice(detection, NoticeKind::Closed, now));
            }
            Some(Transition::Lost { since }) => {
                detection.kept.blind = Some(now);
                detection.kept.silent_since = Some(since);
                notices.push(self.notice(detection, NoticeKind::Blind, now));
            }
        }
        if detection.kept.blind.is_some() && detection.kept.machine.state() != TargetState::Unknown
        {
            notices.push(self.notice(detection, NoticeKind::Sighted, now));
            detection.kept.end_silence();
        }
        if let Some(transition) = transition {
            self.log(detection, transition);
        }
        let with_incident = is_open || matches!(transition, Some(Transition::Recovered));
        self.record(detection, with_incident, notices);
    }

    fn open(
        &self,
        detection: &mut Detection,
        began_at: DateTime<Utc>,
        fault: Fault,
        continues: bool,
        now: DateTime<Utc>,
    ) {
        if continues && let Some(incident) = &mut detection.incident {
            incident.reopen();
        } else {
            let settings = &detection.settings;
            let head = IncidentHead {
                id: format!("{}-{}", began_at.format("%Y%m%dT%H%M%SZ"), self.target),
                target: self.target.clone(),
                project: settings.project.clone(),
                fault,
                dispatch: settings.dispatch.mode.name().to_owned(),
                began_at,
                opened_at: now,
            };
            detection.kept.incident = Some(head.id.clone());
            let before = detection
                .recent
                .iter()
                .filter(|one| one.ended_at < began_at);
            detection.incident = Some(Incident::new(head, before.cloned().collect()));
        }
        let Some(incident) = &mut detection.incident else {
            return;
        };
        // The rooms since the first failed one belong to it.
        for sample in detection
            .recent
            .iter()
            .filter(|one| one.ended_at >= began_at)
        {
            if !incident.has(&sample.room) {
                incident.add(sample.clone());
            }
        }
    }

    fn notice(&self, detection: &Detection, kind: NoticeKind, now: DateTime<Utc>) -> Notice {
        // The id of an incident is known even if its document can't be read.
        let (incident, id) = match kind {
            NoticeKind::Opened | NoticeKind::Closed => {
                (detection.incident.as_ref(), detection.kept.incident.clone())
            }
            NoticeKind::Blind | NoticeKind::Sighted | NoticeKind::Test => (None, None),
        };
        let blind_since = detection.kept.blind.unwrap_or(now);
        let silent_since = detection.kept.silent_since.unwrap_or(blind_since);
        let blind = || {
            format!(
                "{}-{}-blind",
                blind_since.format("%Y%m%dT%H%M%SZ"),
                self.target
            )
        };
        let url = id.as_ref().and_then(|id| self.url_of(id));
        let reasons = incident.map(Incident::reasons).unwrap_or_default();
        let reasons = reasons.iter().map(|one| (one.reason.clone(), one.rooms));
        let ended_by = incident.and_then(|incident| incident.ended_by);
        Notice {
            kind,
            target: self.target.clone(),
            project: detection.settings.project.clone(),
            fault: incident.map(|incident| incident.head.fault.label().to_owned()),
            continues: false,
            incident: id.unwrap_or_else(blind),
            began_at: incident.map_or(silent_since, |incident| incident.head.began_at),
            at: now,
            reasons: reasons.collect(),
            failed: incident.map_or(0, Incident::failed),
            rooms: incident.map_or(0, Incident::rooms),
            // `record` knows what differs.
            differs: Vec::new(),
            detail: None,
            url,
            ended_by: ended_by.map(|by| by.label().to_owned()),
            drill: self.outputs.drill,
        }
    }

    fn url_of(&self, incident: &str) -> Option<String> {
        let base = self.outputs.external_url.as_ref()?.as_str();
        Some(format!(
            "{}/incidents/{incident}",
            base.trim_end_matches('/')
        ))
    }

    /// Writes what the next run needs, shows the state, and sends the messages.
    fn record(&self, detection: &Detection, with_incident: bool, mut notices: Vec<Notice>) {
        let incident = detection.incident.as_ref().filter(|_| with_incident);
        // Compares up to 2000 rooms by each factor, so the document, the series and the messages share the result.
        let differences = incident.map(Incident::differences).unwrap_or_default();
        let differs = sentences(&differences);
        for notice in &mut notices {
            if let NoticeKind::Opened | NoticeKind::Closed = notice.kind {
                notice.differs.clone_from(&differs);
            }
        }
        let notifier = &self.outputs.notifier;
        let messages = notices.iter().flat_map(|notice| notifier.messages(notice));
        let messages: Vec<_> = messages.collect();
        let state = serde_json::to_string(&detection.kept);
        let state = state.expect("plain structs with string keys always serialize");
        self.outputs.history.record_detection(DetectionRecord {
            target: self.target.clone(),
            state,
            incident: incident.map(|incident| IncidentRecord {
                id: incident.head.id.clone(),
                target: incident.head.target.clone(),
                project: incident.head.project.clone(),
                fault: incident.head.fault.label().to_owned(),
                began_at: incident.head.began_at,
                ended_at: incident.ended_at,
                document: incident.document(&differences),
            }),
            messages: messages.clone(),
        });
        self.publish(detection, &differs);
        if !messages.is_empty() {
            self.outputs.courier.hand_over(messages);
        }
    }

    /// `differs` says what differs between the rooms of the open incident.
    fn publish(&self, detection: &Detection, differs: &[String]) {
        let machine = &detection.kept.machine;
        let metrics = &self.outputs.metrics;
        metrics.state(machine.state(), machine.since());
        let fault = machine.fault();
        let open = detection.incident.as_ref().filter(|_| fault.is_some());
        metrics.incident(
            fault,
            open.map(|incident| IncidentInfo {
                incident: incident.head.id.clone(),
                reason: incident.reasons().first().map(|one| one.reason.clone()),
                failed: incident.failed(),
                rooms: incident.rooms(),
                differs: differs.join("; "),
                url: self.url_of(&incident.head.id),
            }),
        );
    }

    fn log(&self, detection: &Detection, transition: Transition) {
        let target = &self.target;
        let incident = detection.incident.as_ref();
        let id = incident.map(|incident| incident.head.id.as_str());
        match transition {
            Transition::Suspected => tracing::info!(
                target_name = target,
                "target {target} is suspect: a room failed, and more rooms are to confirm it"
            ),
            Transition::Dismissed => tracing::info!(
                target_name = target,
                "target {target} is healthy: the failure did not last"
            ),
            Transition::Found => {
                tracing::info!(target_name = target, "target {target} is healthy");
            }
            Transition::Failed { fault, .. } => {
                let (failed, rooms) =
                    incident.map_or((0, 0), |incident| (incident.failed(), incident.rooms()));
                tracing::error!(
                    target_name = target,
                    incident = id,
                    fault = fault.label(),
                    "target {target} fails: {failed} of {rooms} rooms failed; incident {}",
                    id.unwrap_or_default()
                );
            }
            Transition::Recovered => tracing::warn!(
                target_name = target,
                incident = id,
                "target {target} is healthy again: incident {} is over",
                id.unwrap_or_default()
            ),
            Transition::Lost { .. } => tracing::warn!(
                target_name = target,
                "target {target} is unknown: no room has given a verdict on the agent for too long"
            ),
        }
    }
}

fn sentences(differences: &[Difference]) -> Vec<String> {
    differences.iter().map(Difference::sentence).collect()
}

impl From<RecentProbe> for Sample {
    fn from(probe: RecentProbe) -> Self {
        let labelled = |reason: &Reason| Some(reason.label()) == probe.reason.as_deref();
        let reason = Reason::ALL.into_iter().find(labelled);
        let verdict = match (probe.outcome.as_str(), reason) {
            ("ok", _) => Verdict::Good,
            (_, Some(reason)) => Verdict::of_failure(reason.origin()),
            (_, None) => Verdict::None,
        };
        let position = if probe.place == 0 {
            Position::First
        } else {
            Position::Later
        };
        Self {
            room: probe.room,
            batch_id: probe.batch_id,
            purpose: probe.purpose.label().to_owned(),
            position: position.label().to_owned(),
            opened_at: probe.started_at,
            // The history keeps no end of a probe.
            ended_at: probe.started_at,
            failed: verdict.failed(),
            outcome: probe.outcome,
            origin: reason.map(|reason| reason.origin().label().to_owned()),
            reason: probe.reason,
            circumstances: probe.circumstances,
        }
    }
}

#[cfg(test)]
mod tests;
