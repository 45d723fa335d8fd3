//! What the daemon publishes of itself: the status for HTTP, and the gauges that it must poll.

use std::sync::Arc;
use std::time::Duration;

use super::{Daemon, ProjectRuntime, TargetRuntime, first_worst_case};
use crate::config::Period;
use crate::guard::worst_cases;
use crate::http::{BudgetStatus, ObjectivesStatus, ProjectStatus, Status, TargetStatus};
use crate::metrics::InternalError;
use crate::telemetry;

impl Daemon {
    /// Updates the polled gauges and the status, and gives the sign of life.
    pub(super) fn refresh(&mut self) {
        self.pulse.beat();
        self.metrics.history_degraded(self.history.is_degraded());
        let dropped = self.history.dropped();
        self.metrics.history_dropped(dropped - self.counted_drops);
        self.counted_drops = dropped;
        let faults = self.history.faults();
        for _ in self.counted_faults..faults {
            self.metrics.internal_error(InternalError::History);
        }
        self.counted_faults = faults;
        let lost_lines = telemetry::dropped_lines();
        self.metrics
            .log_dropped(lost_lines - self.counted_lost_lines);
        self.counted_lost_lines = lost_lines;
        let stalls = self.stalls.seen().count;
        for _ in self.counted_stalls..stalls {
            self.metrics.internal_error(InternalError::Stall);
        }
        self.counted_stalls = stalls;
        for project in self.projects.values() {
            project.metrics.backoff_until(project.guard.backoff_until());
            for period in Period::ALL {
                let (used, reserved) = project.guard.used_and_reserved(period);
                project.metrics.budget_used(period, used, reserved);
            }
        }
        self.status.send_replace(Arc::new(self.status()));
    }

    fn status(&self) -> Status {
        let targets = self.targets.iter();
        let projects = self.projects.iter();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started_at,
            stage: self.stage,
            targets: targets
                .map(|(name, target)| self.target_status(name, target))
                .collect(),
            projects: projects
                .map(|(name, project)| project.status(name))
                .collect(),
            last_reload: self.last_reload.clone(),
        }
    }

    /// Why no batch could start now. `None` if one could, or if one is running.
    fn held_back(&self, target: &TargetRuntime) -> Option<String> {
        let settings = &target.settings;
        let project = &self.projects[&settings.project];
        let worst_case = first_worst_case(settings, &project.settings);
        let denial = project.guard.denial(worst_case)?;
        target.running.is_none().then(|| denial.to_string())
    }

    fn target_status(&self, name: &str, target: &TargetRuntime) -> TargetStatus {
        let settings = &target.settings;
        let project = &self.projects[&settings.project].settings;
        let worst_case: Duration = worst_cases(settings, project).sum();
        let (state, state_since) = target.detector.state();
        TargetStatus {
            name: name.to_owned(),
            project: settings.project.clone(),
            url: project.url.to_string(),
            agent_name: settings.agent_name.clone(),
            dispatch: settings.dispatch.mode.name(),
            schedule: settings.schedule.to_string(),
            rooms: settings.batch.rooms,
            worst_case_seconds: worst_case.as_secs(),
            objectives: ObjectivesStatus {
                join_within_seconds: settings.objectives.join_within.as_secs_f64(),
                first_speech_within_seconds: settings.objectives.first_speech_within.as_secs_f64(),
                reply_within_seconds: settings.objectives.reply_within.as_secs_f64(),
            },
            paused: target.paused,
            state: state.label(),
            state_since,
            incident: target.detector.open_incident(),
            running: target.running.clone(),
            confirming: target.confirmation.clone(),
            next_batch_at: self.ticker.next(name),
            last_tick_at: target.last_tick,
            last_batch: target.last_batch.clone(),
            held_back: self.held_back(target),
        }
    }
}

impl ProjectRuntime {
    fn status(&self, name: &str) -> ProjectStatus {
        let budgets = Period::ALL.map(|period| {
            let (used, reserved) = self.guard.used_and_reserved(period);
            BudgetStatus {
                period: period.label(),
                used_seconds: used.as_secs(),
                reserved_seconds: reserved.as_secs(),
                limit_seconds: self.guard.limit(period).map(|limit| limit.as_secs()),
            }
        });
        ProjectStatus {
            name: name.to_owned(),
            url: self.settings.url.to_string(),
            max_rooms: self.settings.max_rooms,
            rooms_in_flight: self.guard.rooms_held(),
            backoff_until: self.guard.backoff_until(),
            budgets: Vec::from(budgets),
        }
    }
}
