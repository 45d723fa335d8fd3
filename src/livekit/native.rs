//! The canary's own engine: a participant on the sans-IO WebRTC stack str0m, with its own sockets.

pub(crate) mod ice_tcp;
pub(crate) mod participant;
pub(crate) mod peer;
pub(crate) mod udp;
