//! Carries a probe's actions out and feeds answers, room events and deadlines back.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Position, Progress, Report};
use crate::config::{Project, Target};
use crate::janitor::Janitor;
use crate::livekit::RoomName;
use crate::livekit::api::Api;
use crate::livekit::engine::Engine;
use crate::livekit::net::Endpoint;

/// What a probe works with; shared by all rooms of a batch.
#[derive(Clone)]
pub struct Context {
    pub project: Arc<Project>,
    pub target: Arc<Target>,
    pub endpoint: Endpoint,
    pub api: Api,
    pub engine: Engine,
    pub janitor: Janitor,
}

/// When the probe may end by itself: `None` until the batch knows.
pub type HoldUntil = watch::Receiver<Option<tokio::time::Instant>>;

/// Runs one probe to its end, room deleted or its deletion given up. Never panics: a panic inside becomes `internal`.
pub async fn run(
    _context: Context,
    _room: RoomName,
    _position: Position,
    _hold_until: HoldUntil,
    _abort: CancellationToken,
    _progress: mpsc::Sender<Progress>,
) -> Report {
    todo!("driver")
}
