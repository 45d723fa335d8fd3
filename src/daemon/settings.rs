//! Applies settings, at the start and by reloads while batches run.
//!
//! A thread of its own reads them: a file system that hangs must not stop the daemon's loop.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::oneshot;
use tokio::task::{self, JoinError, JoinHandle};
use tokio::time::{Instant, sleep_until};

use super::access::ProjectAccess;
use super::{Daemon, ProjectRuntime, TargetRuntime, send_reply, supervisor};
use crate::config::{self, Config};
use crate::detection::{Detector, Outputs};
use crate::guard::Guard;
use crate::http::{LastReload, ReloadRefused};
use crate::report::Purpose;

/// How long a reload waits for the files. After that it has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

type AccessByProject = BTreeMap<String, ProjectAccess>;

type ReadSettings = Result<(Config, AccessByProject), String>;

type ReloadReply = oneshot::Sender<Result<Vec<String>, ReloadRefused>>;

/// A reload whose settings a thread reads.
pub(super) struct PendingReload {
    reading: JoinHandle<ReadSettings>,
    late_at: Instant,
    /// The reload has failed, but the thread can't be stopped. No other one is started meanwhile.
    is_late: bool,
    replies: Vec<ReloadReply>,
    /// Requests since the thread began: a file may have changed after it was read.
    next: Option<Vec<ReloadReply>>,
}

impl PendingReload {
    pub(super) fn refuse(self, why: &ReloadRefused) {
        for reply in self
            .replies
            .into_iter()
            .chain(self.next.unwrap_or_default())
        {
            send_reply(reply, Err(why.clone()));
        }
    }
}

/// What became of a read.
pub(super) enum SettingsRead {
    Done(Box<Result<ReadSettings, JoinError>>),
    /// [`READ_TIMEOUT`] is over.
    Late,
}

/// Never resolves without a reload. Cancel-safe.
pub(super) async fn next_read(reload: &mut Option<PendingReload>) -> SettingsRead {
    let Some(reload) = reload else {
        return pending().await;
    };
    tokio::select! {
        biased;
        read = &mut reload.reading => SettingsRead::Done(Box::new(read)),
        () = sleep_until(reload.late_at), if !reload.is_late => SettingsRead::Late,
    }
}

/// Blocks on the disk.
pub(super) fn access(config: &Config) -> Result<AccessByProject, String> {
    let access = config.projects.iter().map(|(name, project)| {
        let known = ProjectAccess::new(name, project);
        let known = known.map_err(|error| format!("project {name:?}: {error:#}"))?;
        Ok((name.clone(), known))
    });
    access.collect()
}

impl Daemon {
    /// Starts to read the settings again. The reply follows when they are applied or refused.
    pub(super) fn request_reload(&mut self, reply: Option<ReloadReply>) {
        match &mut self.reload {
            Some(reload) if reload.is_late => {
                tracing::error!("settings not reloaded: an earlier reload still waits for a file");
                let why = "an earlier reload still waits for a file: its file system hangs";
                if let Some(reply) = reply {
                    send_reply(reply, Err(ReloadRefused::Invalid(why.to_owned())));
                }
            }
            Some(reload) => reload.next.get_or_insert_default().extend(reply),
            None => self.start_reload(Vec::from_iter(reply)),
        }
    }

    fn start_reload(&mut self, replies: Vec<ReloadReply>) {
        supervisor::reloading();
        let read = Arc::clone(&self.read_config);
        let reading = task::spawn_blocking(move || {
            let config = read().map_err(|problems| problems.to_string())?;
            let access = access(&config)?;
            Ok((config, access))
        });
        self.reload = Some(PendingReload {
            reading,
            late_at: Instant::now() + READ_TIMEOUT,
            is_late: false,
            replies,
            next: None,
        });
    }

    pub(super) async fn settings_read(&mut self, read: SettingsRead) {
        let Some(reload) = &mut self.reload else {
            return;
        };
        let (replies, was_late) = (std::mem::take(&mut reload.replies), reload.is_late);
        let next = reload.next.take();
        let read = match read {
            SettingsRead::Late => {
                reload.is_late = true;
                Err(format!(
                    "the files could not be read within {READ_TIMEOUT:?}: a file system hangs"
                ))
            }
            SettingsRead::Done(read) => {
                self.reload = None;
                if was_late {
                    tracing::warn!("the files of a failed reload can be read now: reload again");
                    return;
                }
                (*read).unwrap_or_else(|error| Err(format!("reading the settings failed: {error}")))
            }
        };
        let applied = self.finish_reload(read).await;
        for reply in replies {
            send_reply(reply, applied.clone().map_err(ReloadRefused::Invalid));
        }
        if let Some(next) = next {
            if self.reload.is_none() {
                self.start_reload(next);
            } else {
                for reply in next {
                    self.request_reload(Some(reply));
                }
            }
        }
    }

    /// Returns what has changed.
    async fn finish_reload(&mut self, read: ReadSettings) -> Result<Vec<String>, String> {
        let applied = read.map(|(config, access)| {
            let changes = config.changes_since(&self.config);
            self.apply(config, access);
            changes
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
        applied
    }

    /// A running batch keeps the settings that it started with.
    pub(super) fn apply(&mut self, config: Config, access: AccessByProject) {
        self.projects.retain(|name, _| {
            let stays = config.projects.contains_key(name);
            if !stays {
                self.metrics.remove_project(name);
            }
            stays
        });
        self.targets.retain(|name, target| {
            let stays = config.targets.contains_key(name);
            if !stays {
                target.detector.remove();
                self.ticker.remove(name);
                self.metrics.remove_target(name);
            }
            stays
        });
        for (name, access) in access {
            let settings = Arc::new(config.projects[&name].clone());
            self.set_project(&name, settings, Arc::new(access));
        }
        self.notifier.configure(&config.notify);
        for (name, target) in &config.targets {
            self.set_target(name, target, &config);
        }
        self.config = config;
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
        let metrics = self.metrics.target(name, settings, project);
        let settings = Arc::new(settings.clone());
        if let Some(known) = self.targets.get_mut(name) {
            known.agent_known &= known.settings.agent_name == settings.agent_name;
            known.settings = Arc::clone(&settings);
            known.detector.configure(&settings);
            self.ticker.set(name, &settings.schedule, Utc::now());
        } else {
            let outputs = Outputs {
                history: self.history.clone(),
                metrics: metrics.clone(),
                notifier: self.notifier.clone(),
                courier: self.courier.clone(),
                // A target that a reload adds has the address of the others, until the next start.
                external_url: self.started_with.http.external_url.clone(),
                drill: self.drill,
            };
            let target = TargetRuntime {
                settings: Arc::clone(&settings),
                metrics: metrics.clone(),
                detector: Detector::new(name, Arc::clone(&settings), outputs, Utc::now()),
                restored: false,
                confirmation: self.running_batch(name, true),
                max_silence: None,
                paused: false,
                agent_known: false,
                running: self.running_batch(name, false),
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

    /// A target that was removed and is back may still have a running batch and a running confirmation.
    fn running_batch(&self, name: &str, is_confirmation: bool) -> Option<String> {
        let mut running = self.running.values();
        let found = running.find(|batch| {
            batch.target == name && (batch.purpose == Purpose::Confirmation) == is_confirmation
        });
        found.map(|batch| batch.batch_id.clone())
    }
}
