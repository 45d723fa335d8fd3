//! What the history keeps of outages: the state of each target, the incidents, and the messages that still have to be sent.
//!
//! The documents are JSON that other modules write and read; this module knows their keys only.

use chrono::{DateTime, Utc};

/// What a target's detection keeps. It is written in one transaction and durable then.
#[derive(Debug, Clone)]
pub(crate) struct DetectionRecord {
    pub(crate) target: String,
    /// The state of the target, for the next run of this program.
    pub(crate) state: String,
    /// The incident that began, changed or ended.
    pub(crate) incident: Option<IncidentRecord>,
    /// The messages about it, in order.
    pub(crate) messages: Vec<OutboxMessage>,
}

/// One incident. A later record with the same id replaces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IncidentRecord {
    pub(crate) id: String,
    pub(crate) target: String,
    pub(crate) project: String,
    /// A label of the fault.
    pub(crate) fault: String,
    /// The first failed room.
    pub(crate) began_at: DateTime<Utc>,
    /// `None` while it is open.
    pub(crate) ended_at: Option<DateTime<Utc>>,
    /// What `/api/v1/incidents/{id}` returns.
    pub(crate) document: String,
}

/// A message that one channel has to deliver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutboxMessage {
    /// Sorts by time.
    pub(crate) id: String,
    /// The name of the channel.
    pub(crate) channel: String,
    /// Messages of one incident to one channel are delivered in order.
    pub(crate) incident: String,
    pub(crate) created_at: DateTime<Utc>,
    /// The notice, as JSON.
    pub(crate) document: String,
}
