//! How a sandbox is set up.

use std::path::PathBuf;

use secrecy::{ExposeSecret as _, SecretString};

use super::fault::FaultRule;

/// How a sandbox is set up.
#[derive(Debug, Clone)]
pub struct SandboxSettings {
    /// The TCP port on 127.0.0.1; 0 selects a free one.
    pub port: u16,
    pub api_key: String,
    pub api_secret: SecretString,
    /// The name under which the demo agent registers. With an empty name it is dispatched to every new room automatically.
    pub agent_name: String,
    pub faults: Vec<FaultRule>,
    /// The file to which the agents' report is appended: see [`report::SYNTAX`](super::report::SYNTAX).
    pub report: Option<PathBuf>,
}

impl Default for SandboxSettings {
    /// The key pair of `livekit-server --dev`, and an agent named `demo`.
    fn default() -> Self {
        Self {
            port: 0,
            api_key: "devkey".to_owned(),
            api_secret: SecretString::from("secret"),
            agent_name: "demo".to_owned(),
            faults: Vec::new(),
            report: None,
        }
    }
}

impl SandboxSettings {
    /// The key that signs and verifies tokens.
    pub(crate) fn secret(&self) -> &str {
        self.api_secret.expose_secret()
    }
}
