//! One way to a LiveKit host: DNS, TCP, then TLS for `wss`/`https`, each failure named by its stage.
//!
//! The signal socket and the server API both open their connections here, so that a host that can't be reached is
//! told from a request that was refused.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls;
use url::Url;

/// A LiveKit host and how to trust it. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) url: Url,
    pub(crate) tls: Option<Arc<rustls::ClientConfig>>,
}

/// Why no connection came up, by stage.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    #[error("DNS lookup of {host} failed: {error}")]
    Dns { host: String, error: String },
    #[error("TCP connection to {address} failed: {error}")]
    Tcp { address: String, error: String },
    #[error("TLS handshake with {host} failed: {error}")]
    Tls { host: String, error: String },
}

/// What a refused HTTP request or WebSocket upgrade said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    /// Twirp's `code`, where the body was Twirp JSON.
    pub twirp_code: Option<String>,
    /// Twirp's `msg`, or the first KiB of the body as text; never a token.
    pub message: String,
    /// `Retry-After` in seconds or as a date, resolved to seconds from receipt.
    pub retry_after: Option<std::time::Duration>,
}

impl Endpoint {
    /// # Errors
    /// A `ca_file` that can't be read or holds no certificate.
    pub fn new(_url: &Url, _ca_file: Option<&Path>) -> anyhow::Result<Self> {
        todo!("net")
    }
}

/// A connected byte stream, plain or TLS, and the two addresses of its TCP connection.
pub struct Stream {
    pub local: SocketAddr,
    pub peer: SocketAddr,
}
