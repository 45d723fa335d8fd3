//! The JSON of a batch, as `once --format json` and the history of a daemon return it: the fields that tests read.

use std::collections::BTreeMap;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub struct Batch {
    pub result: String,
    pub purpose: String,
    /// The agent's deployment, if the target names one.
    pub deployment: Option<String>,
    pub started_at: DateTime<Utc>,
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
    pub circumstances: Circumstances,
    pub started_at: DateTime<Utc>,
    pub join_delay_seconds: Option<f64>,
    pub join_upper_bound: bool,
    pub reply_delay_seconds: Option<f64>,
    /// The agent that counts.
    pub agent: Option<AgentSeen>,
    /// Seconds since the start of the probe; null if the probe did not reach the milestone.
    pub milestones: BTreeMap<String, Option<f64>>,
    pub turns: Vec<Turn>,
    pub audio: Audio,
    pub recording: Option<Recording>,
    pub transcript: Option<Vec<Segment>>,
}

/// What the agent said, what the caller said then, and the reply. Times are in seconds since the start of the probe.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Turn {
    pub caller_started: Option<f64>,
    pub caller_ended: Option<f64>,
    pub replied: Option<f64>,
    pub result: String,
    pub reply_delay_seconds: Option<f64>,
    pub yield_delay_seconds: Option<f64>,
    pub agent_claim_seconds: Option<f64>,
    pub unexplained_seconds: Option<f64>,
    /// What the agent's session claims of each stage, in seconds.
    pub stages: BTreeMap<String, Option<f64>>,
    pub word_error: Option<f64>,
    pub said: Option<String>,
    pub heard: Option<String>,
    pub reply_text: Option<String>,
    pub confirmed: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub struct AgentSeen {
    pub identity: String,
    pub name: Option<String>,
    /// The server's time of the join, in Unix milliseconds.
    pub joined_at_ms: f64,
}

#[derive(Debug, Deserialize)]
pub struct Evidence {
    /// One line for each participant except the canary.
    pub participants: Vec<String>,
    /// One line for each track of other participants.
    pub tracks: Vec<String>,
    pub media: Vec<MediaConnection>,
    pub notes: Vec<String>,
    pub agent_metrics: Vec<serde_json::Value>,
    pub speech_level_dbfs: Option<f64>,
}

/// How one of the canary's two peer connections reached LiveKit.
#[derive(Debug, Deserialize)]
pub struct MediaConnection {
    pub connection: String,
    pub path: String,
    pub via: Option<String>,
    pub round_trip_seconds: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub struct Circumstances {
    pub media_path: Option<String>,
}

/// A part of the transcript.
#[derive(Debug, Deserialize)]
pub struct Segment {
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

/// The files of a call. They begin this many seconds after the start of the probe.
#[derive(Debug, Deserialize)]
pub struct Recording {
    pub started: f64,
    pub agent: Option<RecordedTrack>,
    pub caller: Option<RecordedTrack>,
}

#[derive(Debug, Deserialize)]
pub struct RecordedTrack {
    pub bytes: u64,
    pub seconds: f64,
}

impl Batch {
    /// # Errors
    /// If the batch has no probe or more than one.
    pub fn only_probe(&self) -> anyhow::Result<&Probe> {
        let [probe] = &self.probes[..] else {
            anyhow::bail!("{} probes: {self:?}", self.probes.len());
        };
        Ok(probe)
    }
}

impl Probe {
    /// The time of a milestone, in Unix seconds.
    pub fn at(&self, milestone: &str) -> anyhow::Result<f64> {
        Ok(unix_seconds(self.started_at) + self.seconds(milestone)?)
    }

    /// The time of a milestone, in seconds since the start of the probe.
    pub fn seconds(&self, milestone: &str) -> anyhow::Result<f64> {
        self.milestones
            .get(milestone)
            .copied()
            .flatten()
            .with_context(|| format!("{}: {milestone} was not reached", self.room))
    }

    /// The reason of the failure, or the outcome if there is none.
    pub fn verdict(&self) -> &str {
        self.reason.as_deref().unwrap_or(&self.outcome)
    }

    /// The detail, or an empty string.
    pub fn detail(&self) -> &str {
        self.detail.as_deref().unwrap_or_default()
    }
}

/// A time in the form that agents and logs print.
#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of this century fit"
)]
pub fn unix_seconds(at: DateTime<Utc>) -> f64 {
    at.timestamp_micros() as f64 / 1e6
}
