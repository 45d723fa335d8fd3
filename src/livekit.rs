//! The client side of LiveKit, in layers: `wire` (HTTP, tokens, server API, signal connection), `audio` (RTP, Opus, speech
//! detection, echo), `room` (who and what is in the room), and two engines on top of them, `native` and `libwebrtc`.
//!
//! It knows rooms and participants; it knows no schedule, no SLO and no outcome.

use std::fmt;

#[cfg(test)]
mod arbitrary;
pub mod audio;
pub mod engine;
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

/// A room's name, which is also its key: LiveKit has one live room of a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName(pub String);

impl fmt::Display for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
