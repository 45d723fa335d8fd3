//! What the service manager that started the daemon is told, as `sd_notify(3)` has it; without one, nothing is.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::http::Health;

/// Ends with the daemon.
pub(super) struct Watchdog {
    _beats: JoinSet<()>,
}

impl Watchdog {
    /// Where the manager asked for signs of life, gives one at half the time that it allows: for as long as `/-/healthy`
    /// answers 200, so that a hung daemon is restarted and one that watches failing targets isn't.
    pub(super) fn start(health: &Health) -> Self {
        let mut beats = JoinSet::new();
        if let Some(allowed) = sd_notify::watchdog_enabled().filter(|allowed| !allowed.is_zero()) {
            let health = health.clone();
            beats.spawn(beat(health, allowed / 2, || tell(&[NotifyState::Watchdog])));
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

/// The settings are in effect and HTTP is answered.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Followed by [`ready`], whatever comes of it: the old settings stay in effect where the new ones are wrong.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        // Since version 253 systemd wants both in one message.
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!("can't read the monotonic clock: {error}"),
    }
}

pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("the service manager can't be told {states:?}: {error}");
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
    async fn signs_of_life_end_with_the_health_of_the_daemons_own_tasks() {
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
            // The task runs before this one goes on.
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
