//! An always-on canary for LiveKit voice agents.
//!
//! The modules, in the order that data flows:
//!
//! ```text
//! config ─► batch ─ramp─► probe ──► Outcome ─► cli (table, JSON, Markdown, JUnit)
//!                          │ ▲ RoomEvent{at}
//!                          ▼ │
//!                  livekit::{engine, api} ─ws/udp/https─► LiveKit
//!                  janitor owns every room name
//!
//! sandbox: a LiveKit server on loopback for demos, drills and tests; shares no code with the above
//! ```

pub mod batch;
pub mod cli;
pub mod config;
pub mod janitor;
pub mod livekit;
pub mod probe;
pub mod sandbox;
