//! The client side of LiveKit, in layers:
//!
//! - `wire`: HTTP, tokens, the server API and the signal connection;
//! - `audio`: RTP, Opus, speech detection and the echo;
//! - `room`: participants, tracks, the agent's voice, its session and transcript;
//! - `native` and `libwebrtc`: the two engines, of which `engine` starts one per participant.
//!
//! `event` holds what an engine reports, `join` what it needs to start. The module knows rooms and participants; it knows
//! no schedule, no SLO and no outcome.

use std::fmt;

#[cfg(test)]
mod arbitrary;
pub mod audio;
pub(crate) mod engine;
pub mod event;
pub(crate) mod join;
#[cfg(any(test, feature = "libwebrtc"))]
mod libwebrtc;
mod native;
#[cfg(test)]
mod robustness;
mod room;
#[cfg(test)]
mod test_server;
pub mod wire;

/// A room's name. It is also the room's key: LiveKit has at most one live room per name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName(pub String);

impl fmt::Display for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
