//! What the test binaries and the benchmark share: the canary as a process, a daemon and its HTTP, its metrics, and the
//! servers and agents that it calls.
//!
//! This crate starts programs and reads what they print. It doesn't use the library of the canary: a mistake there must not
//! make a test pass.

#![expect(
    clippy::missing_panics_doc,
    reason = "a helper panics only where a test is wrong itself"
)]

pub mod api;
pub mod behaviour;
pub mod canary;
pub mod daemon;
pub mod gate;
pub mod http;
pub mod network;
pub mod process;
pub mod recording;
pub mod report;
pub mod scrape;
pub mod settings;
pub mod signal_proxy;
pub mod stack;

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use tokio::time::Instant;

/// The secret of every server that a test starts. No output of the canary may contain it.
pub const SECRET: &str = "scenario-secret-that-no-output-may-ever-hold";

/// The limit of a wait for something that takes well under a second on an idle machine.
pub const SHORT_TIMEOUT: Duration = Duration::from_mins(1);

/// Calls `ask` every 20 ms until it returns a value.
///
/// # Errors
/// If `ask` returns an error, or no value before the limit.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ask()? {
            return Ok(value);
        }
        ensure!(start.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
