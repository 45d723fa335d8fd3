//! Reports outages to people: webhooks, PagerDuty and heartbeats.
//!
//! Each message is in the history before it is sent, and it leaves the history once a channel has taken it. So it is delivered
//! at least once, over restarts, and in order per incident.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(crate) enum NoticeKind {
    /// An incident began, or a recent one goes on.
    Opened,
    /// An incident is over.
    Closed,
    /// The canary has had no verdict on the agent for too long.
    Blind,
    /// It has a verdict again.
    Sighted,
    /// A test by `check --notify`.
    Test,
}

/// One message, before a channel gives it its form. It contains no text of a call and no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Notice {
    pub(crate) kind: NoticeKind,
    pub(crate) target: String,
    pub(crate) project: String,
    /// `agent` or `service`; `None` if there is no outage.
    pub(crate) fault: Option<String>,
    /// The id of the incident, or of the time without a verdict. Both of its messages have it.
    pub(crate) incident: String,
    /// The incident is one that ended a short time ago.
    pub(crate) continues: bool,
    /// The first failed room, or the last verdict.
    pub(crate) began_at: DateTime<Utc>,
    /// When the state changed.
    pub(crate) at: DateTime<Utc>,
    /// The reasons of the failed rooms with their numbers, the most frequent first.
    pub(crate) reasons: Vec<(String, u32)>,
    /// Failed rooms of all rooms since it began.
    pub(crate) failed: u32,
    pub(crate) rooms: u32,
    /// What differs between failed and good rooms, as sentences.
    pub(crate) differs: Vec<String>,
    /// The detail of the last failure, which names what to do.
    pub(crate) detail: Option<String>,
    /// The page of the incident.
    pub(crate) url: Option<String>,
    /// The faults are simulated.
    pub(crate) drill: bool,
}
