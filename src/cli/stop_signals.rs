//! SIGINT and SIGTERM, which have the same effect, as requests to stop.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// Signals that follow an accepted one within this time are part of the same request.
///
/// GNU `timeout` signals its child and then its process group, so the child receives two at once. Wrappers such as `uv run`
/// pass a Ctrl-C on that the terminal has sent to the canary already.
const MIN_STOP_INTERVAL: Duration = Duration::from_secs(1);

/// Receives the signals of this process from its creation on.
pub(super) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    requests: StopRequests,
}

impl StopSignals {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            requests: StopRequests::default(),
        })
    }

    /// Waits for the next request to stop. Cancel-safe.
    pub(super) async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
            }
            if self.requests.begins_with(Instant::now()) {
                return;
            }
        }
    }
}

/// Decides which signals begin a request.
#[derive(Default)]
struct StopRequests {
    last: Option<Instant>,
}

impl StopRequests {
    /// Whether a signal at this time begins a request of its own.
    fn begins_with(&mut self, at: Instant) -> bool {
        let begins = self
            .last
            .is_none_or(|last| at.saturating_duration_since(last) >= MIN_STOP_INTERVAL);
        if begins {
            self.last = Some(at);
        }
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_within_a_second_are_one_request() {
        let base = Instant::now();
        let mut requests = StopRequests::default();
        let begins: Vec<u64> = [0, 1, 500, 999, 1000, 1001, 1999, 2500]
            .into_iter()
            .filter(|millis| requests.begins_with(base + Duration::from_millis(*millis)))
            .collect();
        assert_eq!(begins, [0, 1000, 2500]);
    }
}
