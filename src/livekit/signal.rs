//! The signal connection: a WebSocket that carries LiveKit's protobufs. One attempt, no failover, bounded frames;
//! the token never appears in an error.

use std::time::Duration;

use livekit_protocol as proto;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::net::{ConnectError, Endpoint, Refusal};

/// An open signal connection, after the join response.
pub struct Signal {}

#[derive(Debug, Clone, thiserror::Error)]
pub enum SignalError {
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    #[error("the signal connection was refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(Refusal),
    #[error("no join response within {0:?}")]
    JoinTimeout(Duration),
    /// `Leave` before the join response.
    #[error("the server sent Leave ({reason}) before the join response")]
    LeftBeforeJoin { reason: String },
    #[error("the server answers no pings: nothing came for {0:?}")]
    PingTimeout(Duration),
    #[error("the signal connection closed: {0}")]
    Closed(String),
    /// A frame above the size limit, an undecodable one, or more of them than any room sends.
    #[error("the server broke the signal protocol: {0}")]
    Protocol(String),
}

impl Signal {
    /// Connects and waits for the join response. `requested` is told the time just before the upgrade is written.
    pub async fn connect(
        _endpoint: &Endpoint,
        _token: &secrecy::SecretString,
        _timeout: Duration,
        _requested: oneshot::Sender<Instant>,
    ) -> Result<(Self, Box<proto::JoinResponse>, std::net::SocketAddr), SignalError> {
        todo!("signal")
    }

    /// The next message and when its frame was read. Answers pings and keeps the ping deadline by itself.
    ///
    /// Cancel-safe.
    pub async fn recv(
        &mut self,
    ) -> Result<(Instant, proto::signal_response::Message), SignalError> {
        todo!("signal")
    }

    pub async fn send(
        &mut self,
        _message: proto::signal_request::Message,
    ) -> Result<(), SignalError> {
        todo!("signal")
    }

    /// Sends `Leave` and closes the socket, within `timeout`.
    pub async fn leave(self, _timeout: Duration) {
        todo!("signal")
    }
}
