//! The owner of every room name until that room is gone: on success, failure, timeout, cancel and panic alike.
//!
//! It knows rooms and dispatches; it knows no outcome.

use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::RoomName;
use crate::livekit::api::Api;

/// The handle through which probes hand their rooms over. Cheap to clone.
#[derive(Clone)]
pub struct Janitor {}

/// The right to a room's name. Dropping it, in whatever way, has the janitor delete the room.
pub struct RoomLease {}

/// What became of a room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// The server confirmed, or knows no such room.
    Deleted {
        at: Instant,
    },
    NotDeleted {
        why: String,
    },
}

/// A room that the janitor can't vouch for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftBehind {
    pub room: RoomName,
    pub why: String,
}

impl Janitor {
    pub fn start() -> Self {
        todo!("janitor")
    }

    /// Takes a room name over before the room can exist.
    ///
    /// `late_agent_window`: how long the deleted room is re-checked where no agent was seen in it.
    pub fn own(
        &self,
        _room: RoomName,
        _api: Api,
        _cleanup: Duration,
        _late_agent_window: Duration,
    ) -> RoomLease {
        todo!("janitor")
    }

    /// Waits until every room is gone and every re-check is over, or `deadline`; names what is left.
    pub async fn close(self, _deadline: Instant) -> Vec<LeftBehind> {
        todo!("janitor")
    }
}

impl RoomLease {
    pub fn dispatched(&mut self, _dispatch_id: String) {
        todo!("janitor")
    }

    pub fn agent_seen(&mut self) {
        todo!("janitor")
    }

    /// Deletes the dispatch and the room now and says what became of them; re-checks go on behind it.
    pub async fn delete(self) -> Deletion {
        todo!("janitor")
    }
}
