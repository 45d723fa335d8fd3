//! Logging: which events are written, in which format, and where they go.
//!
//! Only this crate's own events are written, whatever `RUST_LOG` asks for: at their finer levels the WebSocket and WebRTC
//! libraries log tokens, ICE passwords and SDPs.

use std::io::IsTerminal;

use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Layer, Registry};

/// Sends the log to `writer` as text. `RUST_LOG` replaces `default_level`.
pub(crate) fn log_to<W>(writer: W, colour: bool, default_level: &str)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(colour);
    install(layer, default_level);
}

/// Sends the daemon's log to stderr: text on a terminal, otherwise one JSON object per line.
pub(crate) fn log_daemon() {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        install(layer.with_target(false), "info");
    } else {
        install(layer.json().flatten_event(true), "info");
    }
}

fn install<L: Layer<Registry> + Send + Sync>(layer: L, default_level: &str) {
    // An empty variable is an unset one. As a filter it would hide everything but errors.
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let by_level = match EnvFilter::try_new(&wanted) {
        Ok(filter) if !wanted.trim().is_empty() => filter,
        _ => EnvFilter::new(default_level),
    };
    let own = filter_fn(|metadata| metadata.target().starts_with(env!("CARGO_CRATE_NAME")));
    let layer = layer.with_filter(by_level).with_filter(own);
    // Not `init()`: it also receives what other crates log through `log`, one record per packet, only to drop it here.
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
        .expect("a process starts logging only once");
}
