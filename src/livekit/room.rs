//! The state of the room, independent of the engine: participants and tracks, which track carries the agent's voice, the
//! agent's session and the transcript. The module knows messages and packets, but no sockets.

pub(crate) mod agent_session;
pub(crate) mod observer;
pub(crate) mod roster;
pub(crate) mod transcript;
pub(crate) mod voice_selector;
