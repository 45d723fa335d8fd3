//! The daemon: connects schedule, batches, history, metrics and HTTP, runs them, and shuts them down in order.
//!
//! One task owns all of the state. It waits for the next event: a tick, an HTTP request, the end of a batch, a command, or
//! the death of a task that the daemon needs. It knows no probe: each batch runs in a task of its own, and a [`Recorder`]
//! writes its results to log, metrics and history.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::batch::{self, BatchEvent};
use crate::config::{self, Config, DaemonSettings, Problems};
use crate::detection::{self, Courier, Detector, Restored, Sample};
use crate::guard::{Guard, max_batch_duration, max_rooms_at_once, worst_cases};
use crate::history::{History, LastBatch, ReadError};
use crate::http::{
    self, BatchRefused, Control, DaemonStage, Health, LastReload, LiveProgress, NoSuchTarget,
    Pulse, Sources, Status, WebConfig,
};
use crate::janitor::{CleanupResult, Janitor, OnCleanup, SweepResult};
use crate::livekit::RoomName;
use crate::metrics::{Build, InternalError, Metrics, ProjectMetrics, SkipCause, TargetMetrics};
use crate::notify::Notifier;
use crate::probe::driver::{Context, ProbeFault};
use crate::report::{BatchReport, Denial, Purpose, counted};
use crate::schedule::{self, Tick, Ticker};
use crate::stall::StallWatch;

mod access;
mod drain;
mod recorder;
mod settings;
mod status;
mod supervisor;
#[cfg(test)]
mod tests;

use access::ProjectAccess;
use recorder::Recorder;
use settings::PendingReload;
use supervisor::Watchdog;

/// How often the daemon polls what reports no changes: budgets, back-offs and the state of the history.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// If the daemon's loop runs no turn for this long, `/-/healthy` reports it as hung.
const MAX_SILENCE: Duration = Duration::from_secs(15);

/// What a daemon starts with. The caller has read the settings, opened the history and bound the socket.
pub(crate) struct DaemonOptions {
    pub(crate) config: Config,
    /// Reads the settings again for a reload, including the secrets.
    pub(crate) read_config: ReadConfig,
    pub(crate) listener: TcpListener,
    pub(crate) web: WebConfig,
    pub(crate) history: History,
    pub(crate) build: Build,
    pub(crate) fault: Option<ProbeFault>,
    /// The faults are simulated, and the label `drill` of every series shows it.
    pub(crate) drill: bool,
    /// For a command that shows the batches.
    pub(crate) observer: Option<BatchObserver>,
}

/// Blocks on the disk, for as long as a file system hangs.
pub(crate) type ReadConfig = Arc<dyn Fn() -> Result<Config, Problems> + Send + Sync>;

/// Receives each event of every batch, in the batch's own task, so it must not block. When it receives the end of a batch,
/// metrics and history have the batch already.
pub(crate) type BatchObserver = Arc<dyn Fn(&BatchEvent) + Send + Sync>;

/// A request to a running daemon from a signal or from `demo` and `drill`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DaemonCommand {
    Reload,
    /// The following batches simulate this fault, or none.
    SetFault(Option<ProbeFault>),
    /// The first shuts down in order, a second one immediately.
    Stop,
}

/// How a daemon shut down after [`DaemonCommand::Stop`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShutdownKind {
    Drained,
    /// A second `Stop` cut the shutdown short.
    Immediate,
}

/// Runs until [`DaemonCommand::Stop`], or until the sender of commands is dropped.
///
/// # Errors
/// The daemon cannot start, or a task that it needs has died. It deletes its rooms in this case as well.
pub(crate) async fn run(
    options: DaemonOptions,
    mut commands: mpsc::Receiver<DaemonCommand>,
) -> anyhow::Result<ShutdownKind> {
    let mut daemon = Daemon::start(options).await?;
    supervisor::ready();
    let served = daemon.serve(&mut commands).await;
    let grace = match &served {
        Ok(()) => daemon.config.daemon.lifetime.drain_grace,
        Err(_) => Duration::ZERO,
    };
    let ending = daemon.drain(&mut commands, grace).await;
    served.map(|()| ending)
}

struct ProjectRuntime {
    settings: Arc<config::Project>,
    access: Arc<ProjectAccess>,
    guard: Guard,
    metrics: ProjectMetrics,
}

struct TargetRuntime {
    settings: Arc<config::Target>,
    metrics: TargetMetrics,
    paused: bool,
    /// Whether an agent has joined one of its rooms, in this process or an earlier one.
    agent_known: bool,
    detector: Detector,
    /// The detector has what an earlier run knew.
    restored: bool,
    /// The id of the batch that runs or waits for room permits.
    running: Option<String>,
    /// The id of the confirmation that runs, in addition to it.
    confirmation: Option<String>,
    /// Without a verdict for this long, its state is unknown. `None` if no batch is scheduled.
    max_silence: Option<Duration>,
    last_tick: Option<DateTime<Utc>>,
    last_batch: Option<LastBatch>,
}

impl TargetRuntime {
    /// Gives its detector what an earlier run knew, once: later the detector knows more.
    fn restore_detection(&mut self, restored: Restored) {
        if !std::mem::replace(&mut self.restored, true) {
            self.detector.restore(restored);
        }
    }
}

struct Daemon {
    config: Config,
    /// The settings of the start: those of the HTTP server and the history stay in effect.
    started_with: DaemonSettings,
    read_config: ReadConfig,
    /// A reload that still reads the settings.
    reload: Option<PendingReload>,
    projects: BTreeMap<String, ProjectRuntime>,
    targets: BTreeMap<String, TargetRuntime>,
    ticker: Ticker,
    ticks: mpsc::Receiver<Tick>,
    history: History,
    /// Dropped records of the history that the metrics have counted.
    counted_drops: u64,
    /// Faults of the history that the metrics have counted.
    counted_faults: u64,
    /// Dropped lines of the log that the metrics have counted.
    counted_lost_lines: u64,
    metrics: Metrics,
    notifier: Notifier,
    courier: Courier,
    /// The task of the courier.
    _delivery: JoinSet<()>,
    drill: bool,
    janitor: Janitor,
    stalls: StallWatch,
    /// Stalls that the metrics have counted.
    counted_stalls: u64,
    fault: Option<ProbeFault>,
    observer: Option<BatchObserver>,
    batches: JoinSet<Arc<BatchReport>>,
    /// The batch of each running task.
    running: HashMap<task::Id, RunningBatch>,
    abort: CancellationToken,
    control: mpsc::Receiver<Control>,
    status: watch::Sender<Arc<Status>>,
    progress: LiveProgress,
    stage: DaemonStage,
    started_at: DateTime<Utc>,
    last_reload: Option<LastReload>,
    pulse: Pulse,
    _watchdog: Watchdog,
    http: JoinSet<()>,
    http_end: CancellationToken,
    sweep: JoinSet<SweepResult>,
}

struct RunningBatch {
    target: String,
    batch_id: String,
    purpose: Purpose,
}

/// Why a batch does not start.
enum BatchNotStarted {
    Paused,
    Busy { batch_id: String },
    Denied(Denial),
}

impl Daemon {
    async fn start(options: DaemonOptions) -> anyhow::Result<Self> {
        let metrics = Metrics::new(&options.build, options.drill);
        let (ticker, ticks) = Ticker::start(Utc::now).await?;
        let started_at = Utc::now();
        let history = options.history;
        let notifier = start_notifier(&options.config, &history, &metrics);
        let mut delivery = JoinSet::new();
        let (status, status_receiver) = watch::channel(Arc::new(Status {
            version: env!("CARGO_PKG_VERSION"),
            started_at,
            stage: DaemonStage::Starting,
            targets: Vec::new(),
            projects: Vec::new(),
            last_reload: None,
        }));
        let (control_sender, control) = mpsc::channel(16);
        let health = Health::default();
        let pulse = health.watch("daemon", Some(MAX_SILENCE));
        let watchdog = Watchdog::start(&health);
        let http_end = CancellationToken::new();
        let mut http = JoinSet::new();
        let progress = LiveProgress::default();
        let sources = Sources {
            progress: progress.clone(),
            metrics: metrics.clone(),
            status: status_receiver,
            health,
            history: history.clone(),
            control: control_sender,
        };
        http.spawn(http::serve(
            options.listener,
            options.web,
            sources,
            http_end.clone(),
        ));
        let mut daemon = Self {
            config: options.config.clone(),
            started_with: options.config.daemon.clone(),
            read_config: options.read_config,
            reload: None,
            projects: BTreeMap::new(),
            targets: BTreeMap::new(),
            ticker,
            ticks,
            janitor: Janitor::start_with(on_cleanup(&history, &metrics)),
            stalls: StallWatch::start(),
            counted_stalls: 0,
            history: history.clone(),
            counted_drops: 0,
            counted_faults: 0,
            counted_lost_lines: 0,
            courier: Courier::start(history.clone(), notifier.clone(), &mut delivery),
            _delivery: delivery,
            notifier,
            metrics,
            drill: options.drill,
            fault: options.fault,
            observer: options.observer,
            batches: JoinSet::new(),
            running: HashMap::new(),
            abort: CancellationToken::new(),
            control,
            status,
            progress,
            stage: DaemonStage::Starting,
            started_at,
            last_reload: None,
            pulse,
            _watchdog: watchdog,
            http,
            http_end,
            sweep: JoinSet::new(),
        };
        let access = settings::access(&options.config).map_err(anyhow::Error::msg)?;
        daemon.apply(options.config, access);
        daemon.metrics.config_loaded(started_at);
        daemon.restore().await;
        daemon.start_sweep();
        daemon.stage = DaemonStage::Running;
        daemon.refresh();
        daemon.log_schedules();
        Ok(daemon)
    }

    /// Logs when each target is probed, because the first batch can be far off.
    fn log_schedules(&self) {
        for (name, target) in &self.targets {
            let next = self.ticker.next(name);
            let first = next.map_or_else(
                || "no batch is due".to_owned(),
                |at| format!("first batch at {}", at.format("%Y-%m-%d %H:%M:%S UTC")),
            );
            tracing::info!(
                target_name = name,
                schedule = %target.settings.schedule,
                next_batch_at = next.map(|at| at.to_rfc3339()),
                "target {name} on project {}: {}, {first}",
                target.settings.project,
                target.settings.schedule
            );
        }
    }

    /// Handles events until [`DaemonCommand::Stop`].
    async fn serve(&mut self, commands: &mut mpsc::Receiver<DaemonCommand>) -> anyhow::Result<()> {
        let mut refresh = interval(REFRESH_INTERVAL);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(DaemonCommand::Reload) => self.request_reload(None),
                    Some(DaemonCommand::SetFault(fault)) => self.fault = fault,
                    Some(DaemonCommand::Stop) | None => return Ok(()),
                },
                Some(ended) = self.batches.join_next_with_id() => self.batch_ended(ended),
                Some(tick) = self.ticks.recv() => self.tick(&tick),
                Some(control) = self.control.recv() => self.handle_control(control),
                Some(swept) = self.sweep.join_next() => self.swept(swept),
                read = settings::next_read(&mut self.reload) => self.settings_read(read).await,
                ended = self.http.join_next() => {
                    self.metrics.internal_error(InternalError::Http);
                    anyhow::bail!("the HTTP server has ended: {ended:?}");
                }
                () = self.ticker.stopped() => anyhow::bail!("the scheduler has ended"),
                _ = refresh.tick() => {
                    self.watch_silence();
                    self.start_confirmations();
                    self.refresh();
                }
            }
        }
    }

    /// Notices targets without a verdict for two and a half intervals.
    fn watch_silence(&self) {
        for target in self.targets.values().filter(|target| !target.paused) {
            if let Some(silence) = target.max_silence {
                target.detector.elapse(silence);
            }
        }
    }

    /// Restores the state and the last batch of targets that are new to this process from the history.
    async fn restore(&mut self) {
        let mut is_readable = true;
        for (name, target) in &mut self.targets {
            if target.last_batch.is_some() && target.agent_known {
                continue;
            }
            // Each further read could take as long as the one that failed.
            if is_readable && let Err(error) = restore_target(&self.history, name, target).await {
                is_readable = false;
                tracing::warn!(
                    target_name = name,
                    "target {name}: cannot read its earlier state and batches from the history, so no further target is read: {error:#}"
                );
            }
            // Without an earlier state it is unknown. Its series must show that.
            target.restore_detection(Restored::default());
        }
    }

    /// Starts to delete the rooms that dead runs of this program journalled without a confirmed deletion.
    fn start_sweep(&mut self) {
        let mut rooms_of: BTreeMap<String, Vec<RoomName>> = BTreeMap::new();
        for orphan in self.history.orphan_rooms() {
            rooms_of
                .entry(orphan.project)
                .or_default()
                .push(orphan.room);
        }
        for (name, rooms) in rooms_of {
            let Some(project) = self.projects.get(&name) else {
                tracing::warn!(
                    "left from earlier runs and not deleted: {}, because project {name} is no longer configured",
                    counted(rooms.len() as u64, "room")
                );
                continue;
            };
            tracing::info!(
                "deleting {} that an earlier run left on project {name}",
                counted(rooms.len() as u64, "room")
            );
            let (access, janitor) = (Arc::clone(&project.access), self.janitor.clone());
            self.sweep.spawn(async move {
                let access = access.current().await;
                janitor.sweep(&access.api, rooms).await
            });
        }
    }

    fn swept(&mut self, swept: Result<SweepResult, JoinError>) {
        let swept = match swept {
            Ok(swept) => swept,
            Err(error) => {
                self.metrics.internal_error(InternalError::Janitor);
                tracing::error!("clean-up of leftover rooms failed: {error}");
                return;
            }
        };
        for room in &swept.deleted {
            let target = self.history.target_of(room);
            if let Some(target) = target.and_then(|name| self.targets.get(&name)) {
                target.metrics.swept(1);
            }
        }
        for unconfirmed in &swept.unconfirmed {
            tracing::warn!(
                "room {} of an earlier run may still exist: {}",
                unconfirmed.room,
                unconfirmed.why
            );
        }
    }

    fn tick(&mut self, tick: &Tick) {
        let Some(target) = self.targets.get_mut(&tick.target) else {
            return;
        };
        let now = Utc::now();
        target.metrics.tick(now);
        target.last_tick = Some(now);
        for _ in 0..tick.dropped {
            target.metrics.skipped(SkipCause::Overlap);
        }
        let started = self.start_batch(&tick.target, Purpose::Scheduled);
        self.ticker.handled(tick);
        self.publish_next_batch(&tick.target);
        let target = &self.targets[&tick.target];
        let (cause, why) = match started {
            Ok(_) => return,
            Err(BatchNotStarted::Paused) => (SkipCause::Paused, "the target is paused".to_owned()),
            Err(BatchNotStarted::Busy { batch_id }) => (
                SkipCause::Overlap,
                format!("batch {batch_id} is still running"),
            ),
            Err(BatchNotStarted::Denied(denial)) => (skip_cause(&denial), denial.to_string()),
        };
        record_skip(&tick.target, &target.metrics, None, cause, &why);
    }

    fn publish_next_batch(&mut self, name: &str) {
        let next = self.ticker.next(name);
        let Some(target) = self.targets.get_mut(name) else {
            return;
        };
        target.metrics.next_batch(next);
        let settings = Arc::clone(&target.settings);
        let (schedule, now) = (&settings.schedule, Utc::now());
        let gaps = schedule::gaps(schedule, now, schedule::AHEAD);
        let project = &self.projects[&settings.project].settings;
        target.max_silence = gaps.map(|gaps| max_silence(gaps.longest, &settings, project));
        target.metrics.intervals(
            gaps.map(|gaps| gaps.longest),
            gaps.map(|gaps| gaps.shortest),
            schedule::mean_interval(schedule, now.date_naive()),
            max_batch_duration(&target.settings, project),
        );
    }

    /// Starts the confirmations that are due and fit into what the schedules leave free.
    fn start_confirmations(&mut self) {
        let now = Utc::now();
        let due: Vec<(String, usize)> = self
            .targets
            .iter()
            .filter(|(_, target)| !target.paused && target.confirmation.is_none())
            .filter_map(|(name, target)| {
                let due = target
                    .detector
                    .next_confirmation(&target.settings.confirm)?;
                (due.at <= now).then(|| (name.clone(), due.rooms))
            })
            .collect();
        for (name, rooms) in due {
            self.start_confirmation(&name, rooms);
        }
    }

    fn start_confirmation(&mut self, name: &str, rooms: usize) {
        let target = &self.targets[name];
        let project = &self.projects[&target.settings.project];
        let settings = Arc::new(target.settings.confirming(rooms));
        let first = first_worst_case(&settings, &project.settings);
        let all_rooms = worst_cases(&settings, &project.settings).sum();
        let denied = project.guard.denial(first).or_else(|| {
            project
                .guard
                .confirmation_denial(name, &settings, all_rooms)
        });
        if let Some(denial) = denied {
            tracing::info!(
                target_name = name,
                "target {name}: no confirmation: {denial}"
            );
            target.detector.confirmation_attempted();
            return;
        }
        let abort = self.abort.child_token();
        // If the schedules leave no place, the next turn of the loop tries again.
        let Some(permits) = project
            .guard
            .take_spare(max_rooms_at_once(&settings), &abort)
        else {
            return;
        };
        let access = batch::Access::Granted(project.guard.clone(), permits);
        let batch_id = self.spawn_batch(name, Purpose::Confirmation, settings, access, abort);
        if let Some(target) = self.targets.get_mut(name) {
            target.confirmation = Some(batch_id);
        }
    }

    /// Starts a batch of the existing target `name`, and returns the batch's id.
    fn start_batch(&mut self, name: &str, purpose: Purpose) -> Result<String, BatchNotStarted> {
        let target = &self.targets[name];
        if purpose == Purpose::Scheduled && target.paused {
            return Err(BatchNotStarted::Paused);
        }
        if let Some(batch_id) = target.running.clone() {
            return Err(BatchNotStarted::Busy { batch_id });
        }
        let project = &self.projects[&target.settings.project];
        if let Some(denial) = project
            .guard
            .denial(first_worst_case(&target.settings, &project.settings))
        {
            return Err(BatchNotStarted::Denied(denial));
        }
        let access = batch::Access::Queue(project.guard.clone());
        let (settings, abort) = (Arc::clone(&target.settings), self.abort.clone());
        let batch_id = self.spawn_batch(name, purpose, settings, access, abort);
        if let Some(target) = self.targets.get_mut(name) {
            target.running = Some(batch_id.clone());
        }
        Ok(batch_id)
    }

    /// Runs a batch of the existing target `name` in a task of its own.
    fn spawn_batch(
        &mut self,
        name: &str,
        purpose: Purpose,
        settings: Arc<config::Target>,
        access: batch::Access,
        abort: CancellationToken,
    ) -> String {
        let target = &self.targets[name];
        let batch_id = batch::new_id();
        let recorder = Recorder {
            target: name.to_owned(),
            purpose,
            settings: Arc::clone(&settings),
            metrics: target.metrics.clone(),
            detector: target.detector.clone(),
            notifier: self.notifier.clone(),
            history: self.history.clone(),
            progress: self.progress.clone(),
            observer: self.observer.clone(),
        };
        let project = Arc::clone(&self.projects[&settings.project].access);
        let (janitor, stalls) = (self.janitor.clone(), self.stalls.clone());
        let (agent_known, fault) = (target.agent_known, self.fault);
        let recordings = Some(self.history.recordings().clone());
        let id = batch_id.clone();
        let task = self.batches.spawn(async move {
            let server = project.current().await;
            let context = Context {
                project: server.project,
                target: settings,
                endpoint: server.endpoint,
                api: server.api,
                janitor,
                stalls,
                recordings,
                agent_known,
                fault,
            };
            recorder.run(id, context, access, abort).await
        });
        let running = RunningBatch {
            target: name.to_owned(),
            batch_id: batch_id.clone(),
            purpose,
        };
        self.running.insert(task.id(), running);
        batch_id
    }

    fn batch_ended(&mut self, ended: Result<(task::Id, Arc<BatchReport>), JoinError>) {
        let (id, report) = match ended {
            Ok((id, report)) => (id, Some(report)),
            // The shutdown aborted the task.
            Err(error) if error.is_cancelled() => (error.id(), None),
            Err(error) => {
                self.metrics.internal_error(InternalError::Batch);
                tracing::error!("the task of a batch failed: {error}");
                (error.id(), None)
            }
        };
        let ended = self
            .running
            .remove(&id)
            .expect("inserted when the batch started");
        let Some(target) = self.targets.get_mut(&ended.target) else {
            return;
        };
        let has_agent = report.as_ref().is_some_and(|report| {
            let mut probes = report.probes.iter();
            probes.any(|probe| probe.agent.is_some())
        });
        target.agent_known |= has_agent;
        if ended.purpose == Purpose::Confirmation {
            target.confirmation = None;
            target.detector.confirmation_attempted();
        } else {
            target.running = None;
            if let Some(report) = report.filter(|report| !report.opened_nothing()) {
                target.last_batch = Some(last_batch(&report));
            }
        }
        self.refresh();
    }

    fn handle_control(&mut self, control: Control) {
        match control {
            Control::Reload { reply } => self.request_reload(Some(reply)),
            Control::RunBatch { target, reply } => send_reply(reply, self.run_now(&target)),
            Control::SetPaused {
                target,
                paused,
                reply,
            } => send_reply(reply, self.set_paused(&target, paused)),
        }
        self.refresh();
    }

    fn run_now(&mut self, name: &str) -> Result<String, BatchRefused> {
        if !self.targets.contains_key(name) {
            return Err(NoSuchTarget.into());
        }
        self.start_batch(name, Purpose::Manual)
            .map_err(|reason| match reason {
                BatchNotStarted::Busy { batch_id } => BatchRefused::Busy { batch_id },
                BatchNotStarted::Denied(denial) => BatchRefused::Refused {
                    retry_after: denial
                        .until()
                        .and_then(|at| (at - Utc::now()).to_std().ok()),
                    text: denial.to_string(),
                },
                BatchNotStarted::Paused => {
                    unreachable!("only a scheduled batch depends on the pause")
                }
            })
    }

    fn set_paused(&mut self, name: &str, paused: bool) -> Result<(), NoSuchTarget> {
        let target = self.targets.get_mut(name).ok_or(NoSuchTarget)?;
        target.paused = paused;
        target.detector.set_paused(paused);
        target.metrics.paused(paused);
        let what = if paused { "paused" } else { "resumed" };
        tracing::info!(target_name = name, "target {name} is {what}");
        Ok(())
    }
}

fn last_batch(report: &BatchReport) -> LastBatch {
    let summary = report.summary();
    LastBatch {
        batch_id: report.batch_id.clone(),
        started_at: report.started_at,
        ended_at: report.ended_at,
        result: report.result().label().to_owned(),
        ok: summary.ok,
        failed: summary.failed,
        aborted: summary.aborted,
    }
}

/// Removes a room from the journal once the janitor confirms its deletion, and counts a room without confirmation.
fn on_cleanup(history: &History, metrics: &Metrics) -> OnCleanup {
    let (history, metrics) = (history.clone(), metrics.clone());
    Arc::new(move |room, result| match result {
        CleanupResult::Gone => history.gone(room),
        CleanupResult::Unconfirmed { why } => {
            tracing::warn!("room {room} may still exist: {why}");
            let target = history.target_of(room);
            if let Some(target) = target.and_then(|name| metrics.live_target(&name)) {
                target.leaked(1);
            }
        }
    })
}

/// Sends a reply. It is lost if the client has disconnected, which is no error.
fn send_reply<T>(reply: oneshot::Sender<T>, answer: T) {
    let _lost: Result<(), T> = reply.send(answer);
}

/// Its messages leave the history once they are delivered.
fn start_notifier(config: &Config, history: &History, metrics: &Metrics) -> Notifier {
    let done = {
        let history = history.clone();
        Arc::new(move |id: &str| history.message_done(id))
    };
    Notifier::start_with(&config.notify, history.outbox(), done, metrics.clone())
}

/// How long a target may be without a verdict before its state is unknown. A batch may take longer than its interval.
fn max_silence(
    longest_interval: Duration,
    target: &config::Target,
    project: &config::Project,
) -> Duration {
    let interval = longest_interval.max(max_batch_duration(target, project));
    interval * 5 / 2
}

/// Gives a target what an earlier run knew.
async fn restore_target(
    history: &History,
    name: &str,
    target: &mut TargetRuntime,
) -> Result<(), ReadError> {
    if !target.restored {
        let restored = read_detection(history, name).await?;
        target.restore_detection(restored);
    }
    let agent_name = target.settings.agent_name.as_deref();
    let (scheduled, last, agent_known) = tokio::try_join!(
        history.last_completed(name, &[Purpose::Scheduled]),
        history.last_completed(name, &[Purpose::Scheduled, Purpose::Manual]),
        history.has_seen_agent(name, agent_name),
    )?;
    target.agent_known |= agent_known;
    if target.last_batch.is_none() {
        if let Some(scheduled) = scheduled {
            target.metrics.restore_last_batch(scheduled.ended_at);
        }
        target.last_batch = last;
    }
    Ok(())
}

async fn read_detection(history: &History, name: &str) -> Result<Restored, ReadError> {
    let state = history.target_state(name).await?;
    let id = state.as_deref().and_then(Restored::incident_of);
    let incident = match id {
        Some(id) => history.incident(id).await?,
        None => None,
    };
    let recent = history.recent_probes(name, detection::MAX_RECENT).await?;
    Ok(Restored {
        state,
        incident: incident.map(|document| document.get().to_owned()),
        recent: recent.into_iter().rev().map(Sample::from).collect(),
    })
}

/// The most agent time that the first room of a batch may use. If the budget has less left, the batch does not start.
fn first_worst_case(target: &config::Target, project: &config::Project) -> Duration {
    worst_cases(target, project).next().unwrap_or_default()
}

/// Counts and logs a batch that opened no room.
fn record_skip(
    target: &str,
    metrics: &TargetMetrics,
    batch_id: Option<&str>,
    cause: SkipCause,
    why: &str,
) {
    metrics.skipped(cause);
    // An operator paused the target, so a line per tick would only fill the log.
    if cause != SkipCause::Paused {
        tracing::warn!(
            target_name = target,
            batch_id,
            cause = cause.label(),
            "target {target}: batch skipped: {why}"
        );
    }
}

fn skip_cause(denial: &Denial) -> SkipCause {
    match denial {
        Denial::Backoff { .. } => SkipCause::Backoff,
        Denial::Budget { .. }
        | Denial::Confirmations { .. }
        | Denial::LedgerLost
        | Denial::LedgerUnread => SkipCause::Budget,
    }
}
