//! LiveKit's server API over Twirp: rooms, participants, agent dispatches. One attempt a call; status, body and
//! `Retry-After` of a refusal are always kept.

use std::time::Duration;

use tokio::time::Instant;

use super::RoomName;
use super::net::{ConnectError, Endpoint, Refusal};
use super::token::Keys;

/// A client of one project's server API. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    pub(crate) endpoint: Endpoint,
    pub(crate) keys: Keys,
    pub(crate) timeout: Duration,
}

/// One call: when its request was written (after TLS), and what came of it.
#[derive(Debug)]
pub struct Call<T> {
    /// Just before the request was written; `None` where no connection came up.
    pub sent_at: Option<Instant>,
    pub answered_at: Instant,
    pub result: Result<T, ApiError>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(Refusal),
    #[error("the connection broke before the answer was complete: {0}")]
    Broken(String),
    #[error("an answer that is not LiveKit's: {0}")]
    Protocol(String),
}

impl ApiError {
    /// Twirp's `not_found`, whatever the HTTP status.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.twirp_code.as_deref() == Some("not_found"))
    }
}

/// The settings of a room that the canary creates.
#[derive(Debug, Clone)]
pub struct NewRoom {
    pub name: RoomName,
    pub metadata: String,
    pub empty_timeout: Duration,
    pub departure_timeout: Duration,
    pub max_participants: u32,
}

#[derive(Debug, Clone)]
pub struct RoomInfo {
    pub name: RoomName,
    pub sid: String,
    pub metadata: String,
}

#[derive(Debug, Clone)]
pub struct DispatchInfo {
    pub id: String,
    pub agent_name: String,
    pub jobs: Vec<JobInfo>,
}

/// One job of a dispatch: a worker had accepted it.
#[derive(Debug, Clone)]
pub struct JobInfo {
    pub id: String,
    /// `JS_PENDING`, `JS_RUNNING`, …
    pub status: String,
    pub error: String,
}

#[derive(Debug, Clone)]
pub struct ParticipantBrief {
    pub identity: String,
    pub kind: String,
    pub attributes: std::collections::HashMap<String, String>,
    /// Unix milliseconds on the server's clock.
    pub joined_at_ms: i64,
}

impl Api {
    pub fn new(endpoint: Endpoint, keys: Keys, timeout: Duration) -> Self {
        Self {
            endpoint,
            keys,
            timeout,
        }
    }

    pub async fn create_room(&self, _room: &NewRoom) -> Call<RoomInfo> {
        todo!("api")
    }

    /// Rooms of these exact names that exist now; all rooms of the project where `names` is empty.
    pub async fn list_rooms(&self, _names: &[RoomName]) -> Call<Vec<RoomInfo>> {
        todo!("api")
    }

    pub async fn delete_room(&self, _room: &RoomName) -> Call<()> {
        todo!("api")
    }

    pub async fn list_participants(&self, _room: &RoomName) -> Call<Vec<ParticipantBrief>> {
        todo!("api")
    }

    /// Asks LiveKit to send `agent` to `room`; returns the dispatch's id once the server has accepted.
    pub async fn create_dispatch(
        &self,
        _room: &RoomName,
        _agent: &str,
        _metadata: &str,
    ) -> Call<String> {
        todo!("api")
    }

    pub async fn list_dispatch(&self, _room: &RoomName) -> Call<Vec<DispatchInfo>> {
        todo!("api")
    }

    /// Deletes a dispatch, which ends its jobs.
    pub async fn delete_dispatch(&self, _room: &RoomName, _id: &str) -> Call<()> {
        todo!("api")
    }
}
