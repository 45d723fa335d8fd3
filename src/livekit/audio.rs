//! The agent's audio: RTP clocks and statistics, Opus, speech detection, and the echo. It knows no room and no socket.

pub(crate) mod echo;
pub mod opus;
pub(crate) mod rtp;
pub(crate) mod speech;
