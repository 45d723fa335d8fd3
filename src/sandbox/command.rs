//! The commands that a room's task accepts, and their answers.

use std::collections::HashMap;

use livekit_protocol as proto;
use proto::signal_request::Message as Up;
use proto::signal_response::Message as Down;
use tokio::sync::{mpsc, oneshot};

use super::agent::AgentScript;

/// A client that joins: the claims of its token, and its options.
#[derive(Debug)]
pub(crate) struct Newcomer {
    pub identity: String,
    pub name: String,
    pub metadata: String,
    pub attributes: HashMap<String, String>,
    pub permission: proto::ParticipantPermission,
    pub kind: proto::participant_info::Kind,
    pub auto_subscribe: bool,
    pub client_protocol: i32,
}

/// The result of a join: the number of the client, and the messages for it.
pub(crate) struct JoinedClient {
    pub number: u64,
    pub join: Box<proto::JoinResponse>,
    pub messages: mpsc::Receiver<Down>,
}

/// The room has reached its limit of participants.
#[derive(Debug)]
pub(crate) struct RoomFull;

pub(crate) enum RoomCommand {
    Join(
        Box<Newcomer>,
        oneshot::Sender<Result<JoinedClient, RoomFull>>,
    ),
    Signal(u64, Box<Up>),
    SignalClosed(u64),
    Info(oneshot::Sender<proto::Room>),
    SetMetadata(String, oneshot::Sender<proto::Room>),
    Participants(oneshot::Sender<Vec<proto::ParticipantInfo>>),
    /// Answers whether there was such a participant.
    Remove(String, oneshot::Sender<bool>),
    /// Answers `None` if the room has too many dispatches.
    Dispatch(
        Box<proto::AgentDispatch>,
        oneshot::Sender<Option<proto::AgentDispatch>>,
    ),
    ListDispatch(oneshot::Sender<Vec<proto::AgentDispatch>>),
    DeleteDispatch(String, oneshot::Sender<Option<proto::AgentDispatch>>),
    JobAccepted(Box<proto::Job>),
    /// An agent's process has reached the room.
    AgentJoin(Box<proto::Job>, Box<AgentScript>),
    Close(oneshot::Sender<()>),
}

/// What a room is created with.
#[derive(Debug, Default)]
pub(crate) struct RoomOptions {
    pub empty_timeout: u32,
    pub departure_timeout: u32,
    pub max_participants: u32,
    pub metadata: String,
    pub agents: Vec<proto::RoomAgentDispatch>,
}

pub(crate) fn leave(reason: proto::DisconnectReason) -> Down {
    Down::Leave(proto::LeaveRequest {
        reason: reason.into(),
        ..proto::LeaveRequest::default()
    })
}
