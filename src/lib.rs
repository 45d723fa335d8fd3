//! An always-on canary for LiveKit voice agents.
//!
//! How data flows:
//!
//! ```text
//! config ─► schedule ─tick─► batch ─ramp─► probe ─► ProbeReport ─► report ─► cli (table, JSON, Markdown, JUnit)
//!                              ▲            │ ▲                       └────► metrics, history ─► http
//!                            guard          ▼ │ RoomEvent
//!                              │     livekit::engine, livekit::wire::api ─ws/udp/https─► LiveKit
//!                           history         ▲
//!                                        janitor deletes every room, whatever happens
//! ```
//!
//! Which module imports which; each stands below the ones that it imports, so that no import cycle spans modules
//! (`tests/it/architecture.rs` checks each line against the code):
//!
//! ```text
//! clip → nothing
//! config → clip
//! livekit → clip, config
//! schedule → config
//! rules → config, schedule
//! janitor → livekit
//! stall → nothing
//! telemetry → nothing
//! recording → livekit
//! probe → config, janitor, livekit, recording, stall
//! report → config, livekit, probe, recording
//! history → config, livekit, probe, recording, report
//! guard → config, history, livekit, probe, report
//! batch → config, guard, history, livekit, probe, report
//! metrics → config, probe, report
//! http → config, history, livekit, metrics, probe, recording, report, telemetry
//! notify → config, history, livekit, metrics, report
//! detection → config, history, metrics, notify, probe, report
//! daemon → batch, config, detection, guard, history, http, janitor, livekit, metrics, notify, probe, report, schedule, stall, telemetry
//! sandbox → nothing
//! cli → batch, config, daemon, detection, guard, history, http, janitor, livekit, metrics, notify, probe, recording, report, rules, sandbox, schedule, stall, telemetry
//! ```
//!
//! - `clip`: recorded speech. `config`: the settings, read and validated. `schedule`: when a batch is due. `rules`: Prometheus rules for the settings.
//! - `livekit`: the client side of LiveKit. `janitor`: owns every room name and deletes every room.
//! - `probe`: one call, from the room's creation to its deletion. `batch`: the rooms of one tick. `report`: what they found.
//! - `recording`: the audio of a call as files, and its levels. `stall`: when this process did not run, so that no probe blames others for it.
//! - `guard`: what a project may use. `history`: the database of batches, outages, used agent time and room names.
//! - `daemon`: runs all of the above for `run`, `demo` and `drill`. `http`: its metrics, health, page and API.
//! - `detection`: the state of each target, and its outages. `notify`: reports outages to people.
//! - `sandbox`: a LiveKit server on loopback for demos, drills and tests. It shares no code with the client side, so that a
//!   mistake in one does not hide in the other.
//! - `cli`: the commands. `telemetry`: which events are logged, and where to.

mod batch;
pub mod cli;
pub mod clip;
pub mod config;
mod daemon;
mod detection;
mod guard;
mod history;
mod http;
mod janitor;
pub mod livekit;
pub mod metrics;
mod notify;
pub mod probe;
mod recording;
mod report;
pub mod rules;
pub mod sandbox;
mod schedule;
mod stall;
mod telemetry;
