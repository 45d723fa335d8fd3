//! The input of an engine: what a participant needs before it can join a room.

use std::future::pending;
use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::watch;

use super::RoomName;
use super::event::EndReason;
use super::wire::connect::Endpoint;
use super::wire::token::{Keys, TokenParticipant};
use crate::config::{Caller, Ice, Speech};

/// The identity of an agent without a name that the probe has recognised as the target's.
pub(crate) struct Adoption(watch::Receiver<Option<String>>);

impl Adoption {
    pub(crate) fn new(adopted: watch::Receiver<Option<String>>) -> Self {
        Self(adopted)
    }

    /// Waits for the next one; for ever if none can come. Cancel-safe.
    pub(crate) async fn next(&mut self) -> String {
        loop {
            if self.0.changed().await.is_err() {
                return pending().await;
            }
            if let Some(identity) = &*self.0.borrow() {
                return identity.clone();
            }
        }
    }
}

/// Everything that a participant needs before it starts.
#[derive(Clone)]
pub(crate) struct JoinRequest {
    pub(crate) endpoint: Endpoint,
    pub(crate) keys: Keys,
    pub(crate) room: RoomName,
    pub(crate) participant: TokenParticipant,
    /// The target's agent name; `None` accepts any agent.
    pub(crate) agent_name: Option<String>,
    /// Room settings for the token, if joining creates the room.
    pub(crate) room_config: Option<livekit_protocol::RoomConfiguration>,
    pub(crate) caller: Caller,
    /// How long the caller waits for an agent whose session does not report that it listens.
    pub(crate) agent_turn: Duration,
    pub(crate) speech: Speech,
    pub(crate) signal_timeout: Duration,
    pub(crate) ice: Ice,
    /// Whether the agent's transcript is read.
    pub(crate) transcript: bool,
    /// Whether the packets of both tracks are kept.
    pub(crate) record: bool,
}

impl JoinRequest {
    pub(crate) fn token(&self) -> Result<SecretString, EndReason> {
        let token = self
            .keys
            .participant(&self.room, &self.participant, self.room_config.as_ref());
        token.map_err(|error| EndReason::Internal(error.to_string()))
    }
}

/// A request for tests, whose agent name is `support`.
#[cfg(test)]
pub(crate) fn request(endpoint: Endpoint) -> JoinRequest {
    JoinRequest {
        endpoint,
        keys: crate::livekit::test_server::keys(),
        room: RoomName("room".to_owned()),
        participant: TokenParticipant {
            identity: "canary-echo".to_owned(),
            ..TokenParticipant::default()
        },
        agent_name: Some("support".to_owned()),
        room_config: None,
        caller: Caller::default(),
        agent_turn: Duration::from_secs(30),
        speech: Speech::default(),
        signal_timeout: Duration::from_secs(10),
        ice: Ice::default(),
        transcript: true,
        record: true,
    }
}
