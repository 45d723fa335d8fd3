//! What is known of the room, whichever engine carries it: participants and tracks, which track is the agent's voice, the
//! agent's session and transcript. It knows messages and packets, no sockets.

pub(crate) mod agent_session;
pub(crate) mod observer;
pub(crate) mod roster;
pub(crate) mod transcript;
pub(crate) mod voice_selector;
