//! The native engine: a participant on str0m, a WebRTC stack without I/O of its own, and on the canary's own sockets.

pub(crate) mod ice_tcp;
pub(crate) mod participant;
pub(crate) mod peer;
pub(crate) mod relay;
pub(crate) mod udp;
