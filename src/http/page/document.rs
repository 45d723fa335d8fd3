//! The documents of the history, as the pages read them. `docs/api.md` describes them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;

use super::layout::Tone;

#[derive(Debug, Deserialize)]
pub(super) struct BatchDocument {
    pub(super) batch_id: String,
    pub(super) target: String,
    pub(super) project: String,
    pub(super) purpose: String,
    pub(super) started_at: DateTime<Utc>,
    pub(super) ended_at: DateTime<Utc>,
    pub(super) result: String,
    pub(super) deployment: Option<String>,
    pub(super) ramp: String,
    /// Empty in a list of batches.
    #[serde(default)]
    pub(super) probes: Vec<ProbeDocument>,
    pub(super) not_opened: Option<NotOpenedDocument>,
    pub(super) summary: SummaryDocument,
}

#[derive(Debug, Deserialize)]
pub(super) struct NotOpenedDocument {
    pub(super) rooms: u64,
    pub(super) why: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct SummaryDocument {
    pub(super) ok: u64,
    pub(super) failed: u64,
    pub(super) aborted: u64,
    pub(super) join_delay: DelaysDocument,
}

#[derive(Debug, Deserialize)]
pub(super) struct DelaysDocument {
    pub(super) p50: Option<f64>,
    pub(super) p90: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ProbeDocument {
    pub(super) room: String,
    pub(super) started_at: DateTime<Utc>,
    pub(super) position: String,
    pub(super) outcome: String,
    pub(super) reason: Option<String>,
    pub(super) origin: Option<String>,
    pub(super) limit: Option<String>,
    pub(super) detail: Option<String>,
    pub(super) evidence: serde_json::Value,
    pub(super) join_delay_seconds: Option<f64>,
    pub(super) first_speech_delay_seconds: Option<f64>,
    pub(super) reply_delay_seconds: Option<f64>,
    /// Seconds since the probe's start, in no order.
    pub(super) milestones: BTreeMap<String, Option<f64>>,
    pub(super) turns: Vec<TurnDocument>,
    pub(super) transcript: Option<Vec<LineDocument>>,
    pub(super) agent: Option<AgentDocument>,
    /// Absent in documents of older versions.
    #[serde(default)]
    pub(super) circumstances: BTreeMap<String, Option<String>>,
    pub(super) audio: AudioDocument,
    /// Absent in documents of older versions, as are recordings.
    #[serde(default)]
    pub(super) waveform: Option<WaveformDocument>,
    #[serde(default)]
    pub(super) recording: Option<RecordingDocument>,
    pub(super) url: Option<String>,
    /// Absent in the document of a batch.
    pub(super) batch_id: Option<String>,
    pub(super) target: Option<String>,
}

impl ProbeDocument {
    /// Seconds from the probe's start to a milestone.
    pub(super) fn at(&self, milestone: &str) -> Option<f64> {
        self.milestones.get(milestone).copied().flatten()
    }

    /// The reason, or the outcome if there is none.
    pub(super) fn verdict(&self) -> &str {
        self.reason.as_deref().unwrap_or(&self.outcome)
    }

    pub(super) fn tone(&self) -> Tone {
        match self.outcome.as_str() {
            "ok" => Tone::Good,
            "failed" => Tone::Bad,
            _ => Tone::Neutral,
        }
    }

    /// The milestones that were reached, in order of time.
    pub(super) fn reached(&self) -> Vec<(&str, f64)> {
        let milestones = self.milestones.iter();
        let mut reached: Vec<_> = milestones
            .filter_map(|(name, at)| Some((name.as_str(), (*at)?)))
            .collect();
        reached.sort_by(|one, other| one.1.total_cmp(&other.1));
        reached
    }
}

/// Times are seconds since the probe's start.
#[derive(Debug, Deserialize)]
pub(super) struct TurnDocument {
    pub(super) agent_started: Option<f64>,
    pub(super) agent_ended: Option<f64>,
    pub(super) caller_started: Option<f64>,
    pub(super) caller_ended: Option<f64>,
    pub(super) replied: Option<f64>,
    pub(super) reply_ended: Option<f64>,
    pub(super) result: String,
    pub(super) reply_delay_seconds: Option<f64>,
    pub(super) agent_claim_seconds: Option<f64>,
    pub(super) unexplained_seconds: Option<f64>,
    pub(super) yield_delay_seconds: Option<f64>,
    #[serde(default)]
    pub(super) stages: BTreeMap<String, Option<f64>>,
    pub(super) word_error: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LineDocument {
    pub(super) at: Option<f64>,
    pub(super) speaker: String,
    pub(super) text: String,
    pub(super) r#final: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct AgentDocument {
    pub(super) identity: String,
    pub(super) name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct AudioDocument {
    pub(super) packets: u64,
    pub(super) lost: u64,
    pub(super) jitter_seconds: Option<f64>,
}

/// Levels from 0 to 100.
#[derive(Debug, Deserialize)]
pub(super) struct WaveformDocument {
    /// Seconds since the probe's start.
    pub(super) started: f64,
    pub(super) step_seconds: f64,
    pub(super) agent: Option<Vec<u8>>,
    pub(super) caller: Option<Vec<u8>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RecordingDocument {
    /// Seconds since the probe's start.
    pub(super) started: f64,
    pub(super) agent: Option<RecordedDocument>,
    pub(super) caller: Option<RecordedDocument>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RecordedDocument {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

#[derive(Debug, Deserialize)]
pub(super) struct IncidentDocument {
    pub(super) id: String,
    pub(super) target: String,
    pub(super) project: String,
    pub(super) fault: String,
    pub(super) began_at: DateTime<Utc>,
    pub(super) opened_at: DateTime<Utc>,
    pub(super) ended_at: Option<DateTime<Utc>>,
    pub(super) ended_by: Option<String>,
    pub(super) rooms: u64,
    pub(super) failed: u64,
    /// Absent in documents of older versions.
    pub(super) batches: Option<u64>,
    pub(super) reasons: Vec<ReasonDocument>,
    pub(super) samples: Vec<SampleDocument>,
    pub(super) before: Vec<SampleDocument>,
    pub(super) differs: Vec<DifferenceDocument>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ReasonDocument {
    pub(super) reason: String,
    pub(super) rooms: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct SampleDocument {
    pub(super) room: String,
    pub(super) batch_id: String,
    pub(super) purpose: String,
    pub(super) position: String,
    pub(super) opened_at: DateTime<Utc>,
    pub(super) ended_at: DateTime<Utc>,
    pub(super) outcome: String,
    pub(super) reason: Option<String>,
    /// `None` if the room shows nothing of the target.
    pub(super) failed: Option<bool>,
    pub(super) worker: Option<String>,
    pub(super) node: Option<String>,
    pub(super) region: Option<String>,
    pub(super) media_path: Option<String>,
    pub(super) agent_version: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct DifferenceDocument {
    pub(super) sentence: String,
}
