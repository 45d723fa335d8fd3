//! The client side of LiveKit: tokens, server API, signal connection, media, echo and speech detection.
//!
//! It knows rooms and participants; it knows no schedule, no SLO and no outcome.

use std::fmt;

use crate::config::Project;

pub mod api;
#[cfg(test)]
mod arbitrary;
mod echo;
pub mod engine;
mod exchange;
mod ice_tcp;
#[cfg(any(test, feature = "libwebrtc"))]
mod libwebrtc;
mod listening;
pub mod net;
mod observer;
pub mod opus;
mod participant;
mod peer;
#[cfg(test)]
mod robustness;
mod roster;
mod rtp;
mod session_stream;
pub mod signal;
mod speech;
#[cfg(test)]
mod test_server;
pub mod token;
pub mod transcript;
mod udp;

/// Where a project is and how to sign in there; nothing is connected yet.
///
/// # Errors
/// See [`Endpoint::new`](net::Endpoint::new) and [`Keys::new`](token::Keys::new).
pub fn access(project: &Project) -> anyhow::Result<(net::Endpoint, api::Api)> {
    let endpoint = net::Endpoint::new(&project.url, project.ca_file.as_deref())?;
    let keys = token::Keys::new(project.api_key.clone(), project.api_secret.clone())?;
    let api = api::Api::new(endpoint.clone(), keys, project.api_timeout);
    Ok((endpoint, api))
}

/// A room's name, which is also its key: LiveKit has one live room of a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName(pub String);

impl fmt::Display for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
