//! One outage of a target: its rooms, and what they show. It becomes the JSON that the history keeps and the API returns.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::difference::{self, Case, Difference, Factor};
use super::state::Verdict;
use crate::probe::{Circumstances, MediaPath, ProbeReport};
use crate::report::{Fault, Purpose};

/// The rooms that an incident keeps. If there are more, the first and the last half of them.
const MAX_SAMPLES: usize = 2000;
/// The rooms before an incident that it is compared with.
pub(crate) const MAX_BEFORE: usize = 30;
/// Values of one factor in the JSON, the most frequent ones.
const MAX_VALUES: usize = 50;

/// One room of an incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) room: String,
    pub(crate) batch_id: String,
    pub(crate) purpose: String,
    pub(crate) position: String,
    pub(crate) opened_at: DateTime<Utc>,
    pub(crate) ended_at: DateTime<Utc>,
    pub(crate) outcome: String,
    pub(crate) reason: Option<String>,
    pub(crate) origin: Option<String>,
    /// `None` if the room shows nothing of the target: a plan limit, wrong settings, an abort.
    pub(crate) failed: Option<bool>,
    #[serde(flatten)]
    pub(crate) circumstances: Circumstances,
}

impl Sample {
    pub(crate) fn of(
        batch_id: &str,
        purpose: Purpose,
        report: &ProbeReport,
        ended_at: DateTime<Utc>,
    ) -> Self {
        let failure = report.outcome.failure();
        Self {
            room: report.room.0.clone(),
            batch_id: batch_id.to_owned(),
            purpose: purpose.label().to_owned(),
            position: report.position.label().to_owned(),
            opened_at: report.started_at,
            ended_at,
            outcome: report.outcome.label().to_owned(),
            reason: failure.map(|failure| failure.reason.label().to_owned()),
            origin: failure.map(|failure| failure.reason.origin().label().to_owned()),
            failed: Verdict::of(&report.outcome).failed(),
            circumstances: report.circumstances.clone(),
        }
    }

    fn value(&self, factor: Factor) -> Option<&str> {
        let known = &self.circumstances;
        match factor {
            Factor::Node => known.node.as_deref(),
            Factor::Region => known.region.as_deref(),
            Factor::Worker => known.worker.as_deref(),
            Factor::Position => Some(&self.position),
            Factor::MediaPath => known.media_path.map(MediaPath::label),
            Factor::AgentVersion => known.agent_version.as_deref(),
        }
    }

    /// `None` without a verdict.
    fn case(&self) -> Option<Case<'_>> {
        Some(Case {
            failed: self.failed?,
            batch_id: &self.batch_id,
            values: std::array::from_fn(|index| self.value(Factor::ALL[index])),
        })
    }
}

/// Why an incident ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(crate) enum EndedBy {
    /// Enough good rooms in a row.
    Recovered,
    /// A person paused the target.
    Paused,
    /// The target is no longer in the settings.
    Removed,
}

impl EndedBy {
    /// The value of `ended_by` in output.
    pub(crate) fn label(self) -> &'static str {
        self.into()
    }
}

/// The failed rooms with one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReasonCount {
    pub(crate) reason: String,
    pub(crate) rooms: u32,
}

/// What is known of an incident when it opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IncidentHead {
    pub(crate) id: String,
    pub(crate) target: String,
    pub(crate) project: String,
    pub(crate) fault: Fault,
    /// How the agent is dispatched: the name of the mode.
    pub(crate) dispatch: String,
    /// The end of the first failed room.
    pub(crate) began_at: DateTime<Utc>,
    /// When the state became `failing`.
    pub(crate) opened_at: DateTime<Utc>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Incident {
    #[serde(flatten)]
    pub(crate) head: IncidentHead,
    pub(crate) ended_at: Option<DateTime<Utc>>,
    pub(crate) ended_by: Option<EndedBy>,
    /// Rooms with a verdict, including those that are no longer kept.
    rooms: u32,
    failed: u32,
    /// Batches of these rooms. Absent in documents of older versions.
    #[serde(default)]
    batches: u32,
    /// The most frequent first.
    reasons: Vec<ReasonCount>,
    /// In the order of their end.
    samples: Vec<Sample>,
    /// The last rooms before the incident.
    before: Vec<Sample>,
}

/// What the JSON has in addition, for readers.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    incident: &'a Incident,
    state: &'static str,
    /// From the first failed room to the end; `None` while the incident is open.
    duration_seconds: Option<f64>,
    /// Failed rooms of all rooms with a verdict.
    share: Option<f64>,
    differs: Vec<DifferenceJson<'a>>,
    nodes: Vec<ValueCount>,
    regions: Vec<ValueCount>,
    workers: Vec<ValueCount>,
    positions: Vec<ValueCount>,
    media_paths: Vec<ValueCount>,
    agent_versions: Vec<ValueCount>,
}

#[derive(Serialize)]
struct DifferenceJson<'a> {
    #[serde(flatten)]
    difference: &'a Difference,
    sentence: String,
}

/// The kept rooms with one value of a factor.
#[derive(Serialize)]
struct ValueCount {
    value: String,
    rooms: u32,
    failed: u32,
}

impl Incident {
    /// `before` are rooms of the target before the first failed one; the last [`MAX_BEFORE`] are kept.
    pub(crate) fn new(head: IncidentHead, mut before: Vec<Sample>) -> Self {
        before.drain(..before.len().saturating_sub(MAX_BEFORE));
        Self {
            head,
            ended_at: None,
            ended_by: None,
            rooms: 0,
            failed: 0,
            batches: 0,
            reasons: Vec::new(),
            samples: Vec::new(),
            before,
        }
    }

    /// A room has ended.
    pub(crate) fn add(&mut self, sample: Sample) {
        if let Some(failed) = sample.failed {
            let is_first = !judged(&self.samples).any(|known| known.batch_id == sample.batch_id);
            self.batches = self.batches.saturating_add(u32::from(is_first));
            self.rooms = self.rooms.saturating_add(1);
            self.failed = self.failed.saturating_add(u32::from(failed));
        }
        if let (Some(true), Some(reason)) = (sample.failed, &sample.reason) {
            self.count_reason(reason);
        }
        if self.samples.len() == MAX_SAMPLES {
            self.samples.remove(MAX_SAMPLES / 2);
        }
        self.samples.push(sample);
    }

    fn count_reason(&mut self, reason: &str) {
        match self.reasons.iter_mut().find(|one| one.reason == reason) {
            Some(known) => known.rooms = known.rooms.saturating_add(1),
            None => self.reasons.push(ReasonCount {
                reason: reason.to_owned(),
                rooms: 1,
            }),
        }
        self.reasons.sort_by_key(|one| Reverse(one.rooms));
    }

    pub(crate) fn end(&mut self, at: DateTime<Utc>, by: EndedBy) {
        self.ended_at = Some(at);
        self.ended_by = Some(by);
    }

    /// The incident goes on: the end was too early.
    pub(crate) fn reopen(&mut self) {
        self.ended_at = None;
        self.ended_by = None;
    }

    /// Rooms with a verdict.
    pub(crate) fn rooms(&self) -> u32 {
        self.rooms
    }

    pub(crate) fn failed(&self) -> u32 {
        self.failed
    }

    /// The reasons of the failed rooms, the most frequent first.
    pub(crate) fn reasons(&self) -> &[ReasonCount] {
        &self.reasons
    }

    /// The rooms, in the order of their end.
    #[cfg(test)]
    pub(crate) fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Whether this room is part of it.
    pub(crate) fn has(&self, room: &str) -> bool {
        self.samples.iter().any(|sample| sample.room == room)
    }

    /// What separates the failed rooms from the good ones; empty if nothing does.
    pub(crate) fn differences(&self) -> Vec<Difference> {
        let rooms: Vec<_> = self.samples.iter().filter_map(Sample::case).collect();
        let before = self.before.iter().filter_map(Sample::case);
        let good: Vec<_> = before.filter(|room| !room.failed).collect();
        difference::differences(&rooms, &good)
    }

    /// The JSON of `/api/v1/incidents/{id}`; see `docs/api.md`. It takes its own [`differences`](Self::differences).
    pub(crate) fn document(&self, differences: &[Difference]) -> String {
        let duration = self.ended_at.map(|ended| ended - self.head.began_at);
        let differs = differences.iter().map(|difference| DifferenceJson {
            sentence: difference.sentence(),
            difference,
        });
        let document = Document {
            state: if self.ended_at.is_some() {
                "ended"
            } else {
                "open"
            },
            duration_seconds: duration.map(seconds),
            share: (self.rooms > 0).then(|| f64::from(self.failed) / f64::from(self.rooms)),
            differs: differs.collect(),
            nodes: self.values(Factor::Node),
            regions: self.values(Factor::Region),
            workers: self.values(Factor::Worker),
            positions: self.values(Factor::Position),
            media_paths: self.values(Factor::MediaPath),
            agent_versions: self.values(Factor::AgentVersion),
            incident: self,
        };
        serde_json::to_string(&document).expect("plain structs with string keys always serialize")
    }

    /// Reads what [`document`](Self::document) wrote.
    pub(crate) fn from_document(document: &str) -> Result<Self, serde_json::Error> {
        let mut incident: Self = serde_json::from_str(document)?;
        if incident.batches == 0 {
            let batches: BTreeSet<_> = judged(&incident.samples)
                .map(|sample| &sample.batch_id)
                .collect();
            incident.batches = u32::try_from(batches.len()).unwrap_or(u32::MAX);
        }
        Ok(incident)
    }

    /// The values of a factor, the most frequent first.
    fn values(&self, factor: Factor) -> Vec<ValueCount> {
        let mut counts: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
        for sample in &self.samples {
            if let (Some(failed), Some(value)) = (sample.failed, sample.value(factor)) {
                let (rooms, failures) = counts.entry(value).or_default();
                *rooms += 1;
                *failures += u32::from(failed);
            }
        }
        let counts = counts
            .into_iter()
            .map(|(value, (rooms, failed))| ValueCount {
                value: value.to_owned(),
                rooms,
                failed,
            });
        let mut counts: Vec<_> = counts.collect();
        counts.sort_by_key(|count| Reverse(count.rooms));
        counts.truncate(MAX_VALUES);
        counts
    }
}

/// The rooms with a verdict.
fn judged(samples: &[Sample]) -> impl Iterator<Item = &Sample> {
    samples.iter().filter(|sample| sample.failed.is_some())
}

/// Zero if the clock jumped backwards in between.
fn seconds(span: TimeDelta) -> f64 {
    span.to_std().unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests;
