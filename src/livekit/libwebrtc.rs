//! The second engine: the upstream SDK (crate `livekit`) on libwebrtc, the client stack of the callers themselves.
//!
//! The SDK negotiates, decodes and encodes. What the server says passes through [`transport`] on its way to the SDK and is
//! read there as the native engine reads it; so both see the same in the same room. Only [`session`] needs the SDK to be
//! linked: the rest is compiled, and tested, without it.

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
