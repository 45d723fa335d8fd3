//! Whether our own tasks are alive and ticking: what `/-/healthy` answers, whatever becomes of the targets.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The tasks that must live, each under its name. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Health {
    tasks: Arc<Mutex<BTreeMap<&'static str, Task>>>,
}

#[derive(Debug)]
struct Task {
    /// The longest that it may go without a beat; `None` where only its end counts.
    longest_gap: Option<Duration>,
    last_beat: Instant,
    dead: bool,
}

/// Held by a task for as long as it runs. Dropping it says that the task has died, by a panic too.
#[derive(Debug)]
#[must_use = "dropping it says that the task has died"]
pub struct Pulse {
    health: Health,
    name: &'static str,
}

impl Health {
    /// Watches a task from now on. A dead one of that name is forgotten; a living one must not have it.
    pub fn watch(&self, name: &'static str, longest_gap: Option<Duration>) -> Pulse {
        let task = Task {
            longest_gap,
            last_beat: Instant::now(),
            dead: false,
        };
        self.tasks().insert(name, task);
        Pulse {
            health: self.clone(),
            name,
        }
    }

    /// What is wrong with each task that is dead or silent, its name first; empty means healthy.
    pub fn failing(&self) -> Vec<String> {
        let tasks = self.tasks();
        tasks.iter().filter_map(Task::complaint).collect()
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<&'static str, Task>> {
        // Every change is a single assignment: a panic between two leaves nothing half done.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Task {
    fn complaint((name, task): (&&'static str, &Self)) -> Option<String> {
        if task.dead {
            return Some(format!("{name}: has ended"));
        }
        let longest = task.longest_gap?;
        let silent = task.last_beat.elapsed();
        (silent > longest).then(|| {
            let (silent, longest) = (silent.as_secs(), longest.as_secs_f64());
            format!("{name}: no sign of life for {silent} s, where {longest} s is the most")
        })
    }
}

impl Pulse {
    /// Says that the task is alive and doing its work.
    pub fn beat(&self) {
        if let Some(task) = self.health.tasks().get_mut(self.name) {
            task.last_beat = Instant::now();
        }
    }

    /// Ends the watch: the task is about to end as it should.
    pub fn retire(self) {
        self.health.tasks().remove(self.name);
        // Its drop finds nothing to mark.
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
    async fn a_task_that_beats_is_healthy_and_one_that_stopped_is_named() {
        let health = Health::default();
        let ticks = health.watch("scheduler", Some(GAP));
        let _quiet = health.watch("recorder", None);
        for _ in 0..3 {
            advance(GAP).await;
            ticks.beat();
            assert!(health.failing().is_empty());
        }
        advance(2 * GAP).await;
        let expected = "scheduler: no sign of life for 20 s, where 10 s is the most";
        assert_eq!(health.failing(), [expected]);
    }

    #[tokio::test]
    async fn a_task_that_panics_is_dead() {
        let health = Health::default();
        let pulse = health.watch("recorder", None);
        let task = tokio::spawn(async move {
            let _pulse = pulse;
            panic!("as the test wants");
        });
        assert!(task.await.is_err());
        assert_eq!(health.failing(), ["recorder: has ended"]);
    }

    #[test]
    fn a_task_that_retires_is_missed_by_nobody() {
        let health = Health::default();
        health.watch("recorder", None).retire();
        assert!(health.failing().is_empty());
    }
}
