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
    /// A fault to play, for tests of this program only.
    pub fault: Option<Fault>,
}

/// A fault of our own, played so that tests can see what it harms. Not for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The probe of this room, counted from 0 in the order of opening, panics once its agent has joined.
    Panic { index: usize },
}

impl Fault {
    /// What `LIVEKIT_CANARY_FAULT` says (`panic:<index>`); read once, by the command line.
    ///
    /// # Errors
    /// A value of another form: a test whose fault isn't played must not pass.
    pub fn from_env() -> anyhow::Result<Option<Self>> {
        let Some(value) = std::env::var_os("LIVEKIT_CANARY_FAULT") else {
            return Ok(None);
        };
        let index = value
            .to_str()
            .and_then(|value| value.strip_prefix("panic:"));
        match index.and_then(|index| index.parse().ok()) {
            Some(index) => Ok(Some(Self::Panic { index })),
            None => anyhow::bail!("LIVEKIT_CANARY_FAULT: expected panic:<index>"),
        }
    }
}

impl Context {
    /// The context of one room of the batch: without the fault that is meant for another.
    #[must_use]
    pub fn of_room(&self, index: usize) -> Self {
        Self {
            fault: self.fault.filter(|fault| *fault == Fault::Panic { index }),
            ..self.clone()
        }
    }
}

/// When the probe may end by itself: `None` until the batch knows.
pub type HoldUntil = watch::Receiver<Option<tokio::time::Instant>>;

/// Runs one probe to its end, room deleted or its deletion given up. Never panics: a panic inside becomes `internal`.
///
/// Progress never holds the probe up: nothing is lost on a channel of [`Progress::MOST`] places or more.
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
