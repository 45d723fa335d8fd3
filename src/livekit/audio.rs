//! The agent's audio: RTP clock and statistics, Opus decoding, speech detection, and the echo.
//!
//! This layer knows no room and no socket.

pub(crate) mod caller;
pub mod opus;
pub(crate) mod recording;
pub(crate) mod rtp;
pub(crate) mod speech;
