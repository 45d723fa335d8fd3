//! Notifies the service manager of the daemon's state, by the protocol of `sd_notify(3)`. Does nothing without one.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::http::Health;

/// Sends signs of life to the service manager until it is dropped.
pub(super) struct Watchdog {
    _beats: JoinSet<()>,
}

impl Watchdog {
    /// If the manager expects signs of life, sends them twice per allowed interval while `/-/healthy` responds with 200. So a
    /// hung daemon is restarted, and one whose targets fail is not.
    pub(super) fn start(health: &Health) -> Self {
        let mut beats = JoinSet::new();
        if let Some(allowed) = sd_notify::watchdog_enabled().filter(|allowed| !allowed.is_zero()) {
            let health = health.clone();
            beats.spawn(beat(health, allowed / 2, || {
                notify(&[NotifyState::Watchdog]);
            }));
        }
        Self { _beats: beats }
    }
}

async fn beat(health: Health, every: Duration, alive: impl Fn()) {
    let mut due = interval(every.max(Duration::from_millis(1)));
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if health.failing().is_empty() {
            alive();
        }
    }
}

/// The settings are in effect, and the HTTP server responds.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// [`ready`] must follow, also after a failed reload, because the previous settings stay in effect then.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        // Since version 253, systemd requires both in one message.
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!("cannot read the monotonic clock: {error}"),
    }
}

pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("cannot notify the service manager of {states:?}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::advance;

    use super::*;

    const HALF: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_stop_when_a_task_of_the_daemon_is_dead() {
        let health = Health::default();
        let pulse = health.watch("daemon", None);
        let beats = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&beats);
        let alive = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(beat(health, HALF, alive));
        let after = async |time| {
            advance(time).await;
            // Lets the task run before this one continues.
            tokio::task::yield_now().await;
            beats.load(Ordering::Relaxed)
        };
        assert_eq!(after(Duration::ZERO).await, 1);
        assert_eq!(after(HALF).await, 2);
        drop(pulse);
        assert_eq!(after(HALF).await, 2);
        assert_eq!(after(10 * HALF).await, 2);
    }
}
