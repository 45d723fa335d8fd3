//! Applies settings, at the start and by reloads while batches run.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::Utc;

use super::access::ProjectAccess;
use super::{Daemon, ProjectRuntime, TargetRuntime, supervisor};
use crate::config::{self, Config};
use crate::guard::Guard;
use crate::http::{LastReload, ReloadRefused};

impl Daemon {
    /// Reads the settings again and applies all of them. Returns what has changed.
    pub(super) async fn reload(&mut self) -> Result<Vec<String>, ReloadRefused> {
        supervisor::reloading();
        let config = (self.read_config)().map_err(|problems| problems.to_string());
        let applied = config.and_then(|config| {
            let changes = config.changes_since(&self.config);
            self.apply(config).map(|()| changes)
        });
        let at = Utc::now();
        match &applied {
            Ok(changes) => {
                self.restore().await;
                self.metrics.config_loaded(at);
                let what = match &changes[..] {
                    [] => "nothing has changed".to_owned(),
                    changes => changes.join(", "),
                };
                tracing::info!("settings reloaded: {what}");
                let (now, then) = (&self.config.daemon, &self.started_with);
                if now.http != then.http || now.history != then.history {
                    tracing::warn!("changes of [http] and [history] take effect at the next start");
                }
            }
            Err(why) => {
                self.metrics.config_refused();
                tracing::error!("settings not reloaded; the previous ones stay in effect: {why}");
            }
        }
        self.last_reload = Some(LastReload {
            at,
            ok: applied.is_ok(),
            error: applied.clone().err(),
        });
        self.refresh();
        supervisor::ready();
        applied.map_err(ReloadRefused::Invalid)
    }

    /// Applies all of `config` or, with an error, nothing. A running batch keeps the settings that it started with.
    pub(super) fn apply(&mut self, config: Config) -> Result<(), String> {
        let mut access = BTreeMap::new();
        for (name, project) in &config.projects {
            let known = ProjectAccess::new(name, project);
            let known = known.map_err(|error| format!("project {name:?}: {error:#}"))?;
            access.insert(name.clone(), known);
        }
        self.projects.retain(|name, _| {
            let stays = config.projects.contains_key(name);
            if !stays {
                self.metrics.remove_project(name);
            }
            stays
        });
        self.targets.retain(|name, _| {
            let stays = config.targets.contains_key(name);
            if !stays {
                self.ticker.remove(name);
                self.metrics.remove_target(name);
            }
            stays
        });
        for (name, access) in access {
            let settings = Arc::new(config.projects[&name].clone());
            self.set_project(&name, settings, Arc::new(access));
        }
        for (name, target) in &config.targets {
            self.set_target(name, target, &config);
        }
        self.config = config;
        Ok(())
    }

    fn set_project(
        &mut self,
        name: &str,
        settings: Arc<config::Project>,
        access: Arc<ProjectAccess>,
    ) {
        let metrics = self.metrics.project(name, &settings);
        let guard = match self.projects.get(name) {
            Some(known) => {
                known.guard.configure(&settings);
                known.guard.clone()
            }
            None => Guard::new(name, &settings, self.history.clone()),
        };
        let project = ProjectRuntime {
            settings,
            access,
            guard,
            metrics,
        };
        self.projects.insert(name.to_owned(), project);
    }

    fn set_target(&mut self, name: &str, settings: &config::Target, config: &Config) {
        let project = &config.projects[&settings.project];
        let metrics = self.metrics.target(name, settings, project, self.drill);
        let settings = Arc::new(settings.clone());
        if let Some(known) = self.targets.get_mut(name) {
            known.agent_known &= known.settings.agent_name == settings.agent_name;
            known.settings = Arc::clone(&settings);
            self.ticker.set(name, &settings.schedule, Utc::now());
        } else {
            let target = TargetRuntime {
                settings: Arc::clone(&settings),
                metrics: metrics.clone(),
                paused: false,
                agent_known: false,
                running: self.running_batch(name),
                last_tick: None,
                last_batch: None,
            };
            self.targets.insert(name.to_owned(), target);
            let first = Utc::now() + config.daemon.lifetime.startup_delay;
            self.ticker.start_target(name, &settings.schedule, first);
        }
        metrics.paused(self.targets[name].paused);
        self.publish_next_batch(name);
    }

    /// A target that was removed and is back may still have a running batch.
    fn running_batch(&self, name: &str) -> Option<String> {
        let mut running = self.running.values();
        let found = running.find(|(target, _)| target == name);
        found.map(|(_, batch_id)| batch_id.clone())
    }
}
