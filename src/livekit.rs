//! The client side of LiveKit: tokens, server API, signal connection, media, echo and speech detection.
//!
//! It knows rooms and participants; it knows no schedule, no SLO and no outcome.

use std::fmt;

pub mod api;
mod echo;
pub mod engine;
mod exchange;
mod ice_tcp;
pub mod net;
mod participant;
mod peer;
mod roster;
mod rtp;
mod session_stream;
pub mod signal;
mod speech;
#[cfg(test)]
mod test_server;
pub mod token;

/// A room's name, which is also its key: LiveKit has one live room of a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName(pub String);

impl fmt::Display for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
