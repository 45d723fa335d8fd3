//! Notices that this process did not run: it was stopped (SIGSTOP, `docker pause`), its machine was suspended or stalled, or
//! its only worker thread was busy.
//!
//! What a stalled canary missed was no fault of an agent, of LiveKit or of the network. So whatever judges others must first
//! look here. It knows no probe.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::{MissedTickBehavior, interval};

/// How often the process shows that it runs.
const BEAT_INTERVAL: Duration = Duration::from_millis(250);

/// A gap between two signs of life that is longer than this is a stall. No deadline of a probe is this short, and a busy
/// machine that opens many rooms at once stays below it.
const MAX_GAP: Duration = Duration::from_secs(2);

/// The stalls of this process. Cheap to clone; the beats end with the last clone.
#[derive(Clone)]
pub struct StallWatch {
    shared: Arc<StallShared>,
}

struct StallShared {
    clock: StallClock,
    state: Mutex<StallState>,
}

/// The time since a fixed moment.
type StallClock = Box<dyn Fn() -> Duration + Send + Sync>;

struct StallState {
    last_beat: Duration,
    seen: Stalls,
}

/// All stalls since the start of the watch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stalls {
    pub count: u64,
    /// How long they took together.
    pub total: Duration,
}

impl StallWatch {
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start() -> Self {
        let watch = Self::with_clock(uptime);
        tokio::spawn(beat(Arc::downgrade(&watch.shared)));
        watch
    }

    /// A watch without beats of its own.
    pub(crate) fn with_clock(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        let last_beat = clock();
        Self {
            shared: Arc::new(StallShared {
                clock: Box::new(clock),
                state: Mutex::new(StallState {
                    last_beat,
                    seen: Stalls::default(),
                }),
            }),
        }
    }

    /// Includes a stall that has just ended, even if no other task has run since then.
    pub fn seen(&self) -> Stalls {
        self.shared.observe()
    }
}

impl StallShared {
    fn observe(&self) -> Stalls {
        let mut state = self.lock();
        let now = (self.clock)();
        let gap = now.saturating_sub(state.last_beat);
        state.last_beat = now;
        if gap > MAX_GAP {
            state.seen.count += 1;
            state.seen.total += gap;
            tracing::error!(
                seconds = gap.as_secs_f64(),
                "this process did not run for {:.1} s: it was stopped, its machine was suspended or stalled, or it got no \
                 CPU. Probes of that time end as internal",
                gap.as_secs_f64()
            );
        }
        state.seen
    }

    fn lock(&self) -> MutexGuard<'_, StallState> {
        // The figures are only added to, so a panic elsewhere leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn beat(watch: Weak<StallShared>) {
    let mut due = interval(BEAT_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let Some(watch) = watch.upgrade() else { return };
        watch.observe();
    }
}

/// Since the machine's start, suspended time included: LiveKit's clock went on in the meantime.
fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .expect("Linux has this clock since 2.6.39")
        .into()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A watch whose clock the test sets, in milliseconds.
    pub(crate) fn manual() -> (StallWatch, Arc<AtomicU64>) {
        let now = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&now);
        let clock = move || Duration::from_millis(read.load(Ordering::Relaxed));
        (StallWatch::with_clock(clock), now)
    }

    #[test]
    fn only_gaps_above_the_limit_are_stalls_and_each_counts_once() {
        let (watch, now) = manual();
        for millis in [0, 2_000, 3_000, 5_000] {
            now.store(millis, Ordering::Relaxed);
            assert_eq!(watch.seen(), Stalls::default(), "at {millis} ms");
        }
        now.store(17_500, Ordering::Relaxed);
        let one = Stalls {
            count: 1,
            total: Duration::from_millis(12_500),
        };
        assert_eq!(watch.seen(), one);
        assert_eq!(watch.seen(), one);
        now.store(20_500, Ordering::Relaxed);
        assert_eq!(watch.clone().seen().count, 2);
    }

    #[tokio::test]
    async fn process_that_runs_has_no_stall_and_a_blocked_one_has() {
        let watch = StallWatch::start();
        tokio::time::sleep(2 * BEAT_INTERVAL).await;
        assert_eq!(watch.seen().count, 0);
        std::thread::sleep(MAX_GAP + BEAT_INTERVAL);
        let stalls = watch.seen();
        assert_eq!(stalls.count, 1);
        assert!(stalls.total >= MAX_GAP);
    }
}
