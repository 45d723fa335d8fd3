//! The second engine: the upstream SDK (crate `livekit`) on libwebrtc, the same client stack as many real callers use.
//!
//! The SDK negotiates, decodes and encodes. The server's messages pass through [`transport`], which reports them before
//! the SDK reads them, so both engines report the same events in the same room. Only [`session`] needs the linked SDK;
//! the other modules are compiled and tested without it.

mod pcm;
#[cfg(feature = "libwebrtc")]
mod session;
mod stats;
mod streams;
mod transport;
mod watch;

#[cfg(feature = "libwebrtc")]
pub(crate) use session::run;
#[cfg(feature = "libwebrtc")]
pub(crate) use stats::InboundTotals;
