//! The daemon's HTTP server: metrics, health, the status page, the JSON API, and the POST requests that control the daemon.
//!
//! It starts no batch. The daemon hands it what it shows as [`Sources`], and receives every POST as a
//! [`Control`].

mod access;
mod api;
mod audio;
mod badge;
mod client_certificate;
mod control;
mod csv;
mod event;
mod health;
mod live;
mod page;
mod response;
mod routes;
mod scrape;
mod sensitive;
mod server;
mod status;
mod stream;
#[cfg(test)]
mod tests;
mod users;
mod web_config;

pub(crate) use control::{BatchRefused, Control, NoSuchTarget, ReloadRefused};
pub(crate) use health::{Health, Pulse};
pub(crate) use live::{LiveBatch, LiveProgress};
pub(crate) use routes::Sources;
pub(crate) use server::serve;
pub(crate) use status::{
    BudgetStatus, DaemonStage, LastReload, ObjectivesStatus, ProjectStatus, Status, TargetStatus,
};
pub(crate) use web_config::WebConfig;
