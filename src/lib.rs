//! An always-on canary for LiveKit voice agents.
//!
//! The modules, in the order that data flows:
//!
//! ```text
//! config ─► schedule ─tick─► batch ─ramp─► probe ──► Outcome ─► cli (table, JSON, Markdown, JUnit)
//!                                           │ ▲ RoomEvent{at}   └─► metrics, history
//!                                           ▼ │
//!                                   livekit::{engine, api} ─ws/udp/https─► LiveKit
//!                                   janitor owns every room name
//!
//! daemon: puts the above together and keeps it going, for `run`, `demo` and `drill`
//! guard: what a project may use; its ledger and the journal of rooms are history's
//! http: metrics, health, page and API of the daemon; knows none of the above but config
//! rules: Prometheus rules for the settings
//! telemetry: which events are logged, and where to
//! sandbox: a LiveKit server on loopback for demos, drills and tests; shares no code with the above
//! ```

pub mod batch;
pub mod cli;
pub mod config;
mod daemon;
pub mod guard;
pub mod history;
mod http;
pub mod janitor;
pub mod livekit;
pub mod metrics;
pub mod probe;
pub mod report;
pub mod rules;
pub mod sandbox;
pub mod schedule;
mod telemetry;
