//! A dispatch and its jobs: how a worker accepts a job, starts its process, and brings the agent to the room.

use std::time::Duration;

use livekit_protocol as proto;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::agent_seat::agent_info;
use crate::sandbox::agent::{AgentScript, JobBehaviour};
use crate::sandbox::command::RoomCommand;
use crate::sandbox::ids::{guid, unix_millis};
use crate::sandbox::registry::Registry;
use crate::sandbox::report::ReportEvent;

pub(super) struct RoomDispatch {
    pub(super) info: proto::AgentDispatch,
    /// Ends the jobs that have not joined yet.
    pub(super) cancel: CancellationToken,
}

/// One job of a worker: accepted, started, and on its way to the room.
pub(super) struct AgentJob {
    pub(super) job: Box<proto::Job>,
    pub(super) script: AgentScript,
    pub(super) cancel: CancellationToken,
    pub(super) room_closed: CancellationToken,
}

impl AgentJob {
    /// Plays the worker and the job's process until the agent connects to the room; `None` if it never does.
    pub(super) async fn run(self, shared: &Registry) -> Option<Self> {
        // Shutdown ends it at any point.
        tokio::select! {
            () = shared.shutdown.cancelled() => None,
            arrived = self.travel(shared) => arrived,
        }
    }

    async fn travel(self, shared: &Registry) -> Option<Self> {
        let dispatched = Instant::now();
        if self.script.job == JobBehaviour::Refused {
            return None;
        }
        let accepts_after = Duration::from_millis(fastrand::u64(5..25));
        tokio::time::sleep(accepts_after).await;
        let name = self.room_name();
        let agent = agent_info(&self.job).identity;
        let metadata = self.job.metadata.clone();
        shared.report(name, &agent, &ReportEvent::Job { metadata });
        if let Some(room) = shared.find(name) {
            room.send(RoomCommand::JobAccepted(self.job.clone())).await;
        }
        if self.script.job == JobBehaviour::Taken {
            return None;
        }
        if let Some(late) = self.script.late {
            self.room_closed.cancelled().await;
            tokio::time::sleep(late).await;
        } else {
            tokio::select! {
                () = self.cancel.cancelled() => return None,
                () = tokio::time::sleep_until(dispatched + self.script.join_delay) => {}
            }
        }
        shared.report(name, &agent, &ReportEvent::Connecting);
        Some(self)
    }

    pub(super) fn room_name(&self) -> &str {
        self.job.room.as_ref().map_or("", |room| &room.name)
    }
}

pub(super) fn new_job(
    dispatch: &proto::AgentDispatch,
    room: &proto::Room,
    worker_id: String,
) -> proto::Job {
    let id = guid("AJ_");
    proto::Job {
        dispatch_id: dispatch.id.clone(),
        room: Some(room.clone()),
        metadata: dispatch.metadata.clone(),
        agent_name: dispatch.agent_name.clone(),
        deployment: dispatch.deployment.clone(),
        state: Some(proto::JobState {
            status: proto::JobStatus::JsRunning.into(),
            started_at: unix_millis() * 1_000_000,
            participant_identity: format!("agent-{id}"),
            worker_id,
            ..proto::JobState::default()
        }),
        id,
        ..proto::Job::default()
    }
}
