//! Whether the canary's own tasks run and give signs of life, which `/-/healthy` reports. The targets' health is not part of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The tasks that must run, by name. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    tasks: Arc<Mutex<BTreeMap<&'static str, WatchedTask>>>,
}

#[derive(Debug)]
struct WatchedTask {
    /// The longest time without a beat. `None` if the task gives no beats, so that only its end counts.
    max_gap: Option<Duration>,
    last_beat: Instant,
    dead: bool,
}

/// Held by a task while it runs. Dropping it marks the task as dead, so a panic does so as well.
#[derive(Debug)]
#[must_use = "dropping it marks the task as dead"]
pub(crate) struct Pulse {
    health: Health,
    name: &'static str,
}

impl Health {
    /// Watches a task from now on, in place of a dead task with this name. No live task may have the name.
    pub(crate) fn watch(&self, name: &'static str, max_gap: Option<Duration>) -> Pulse {
        let task = WatchedTask {
            max_gap,
            last_beat: Instant::now(),
            dead: false,
        };
        self.tasks().insert(name, task);
        Pulse {
            health: self.clone(),
            name,
        }
    }

    /// One text per task that is dead or silent, beginning with its name. Empty means healthy.
    pub(crate) fn failing(&self) -> Vec<String> {
        let tasks = self.tasks();
        tasks.iter().filter_map(WatchedTask::problem).collect()
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<&'static str, WatchedTask>> {
        // Every change is a single assignment, so a panic of a holder leaves no task half changed.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WatchedTask {
    fn problem((name, task): (&&'static str, &Self)) -> Option<String> {
        if task.dead {
            return Some(format!("{name}: the task has ended"));
        }
        let max_gap = task.max_gap?;
        let silent = task.last_beat.elapsed();
        (silent > max_gap).then(|| {
            let (silent, max_gap) = (silent.as_secs(), max_gap.as_secs_f64());
            format!("{name}: no sign of life for {silent} s (limit {max_gap} s)")
        })
    }
}

impl Pulse {
    /// Records a sign of life.
    pub(crate) fn beat(&self) {
        if let Some(task) = self.health.tasks().get_mut(self.name) {
            task.last_beat = Instant::now();
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        if let Some(task) = self.health.tasks().get_mut(self.name) {
            task.dead = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const GAP: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn task_that_stops_beating_is_named_as_failing() {
        let health = Health::default();
        let ticks = health.watch("scheduler", Some(GAP));
        let _quiet = health.watch("recorder", None);
        for _ in 0..3 {
            advance(GAP).await;
            ticks.beat();
            assert!(health.failing().is_empty());
        }
        advance(2 * GAP).await;
        let expected = "scheduler: no sign of life for 20 s (limit 10 s)";
        assert_eq!(health.failing(), [expected]);
    }
}
