//! The daemon: puts schedule, batches, history, metrics and HTTP together, keeps them going, and ends them in order.
//!
//! One task owns all of its state and waits for whatever comes first: a tick, a request, the end of a batch, an order, or
//! the death of a task that nothing works without. It knows no probe: batches run in tasks of their own, and a
//! [`Recorder`] tells logs, metrics and history what came of them.

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
use crate::config::{self, Config, Problems};
use crate::guard::{Guard, worst_cases};
use crate::history::{History, LastBatch};
use crate::http::{
    self, BatchRefused, Control, DaemonStage, Health, LastReload, NoSuchTarget, Pulse, Sources,
    Status, WebConfig,
};
use crate::janitor::{CleanupResult, Janitor, OnCleanup, SweepResult};
use crate::livekit::RoomName;
use crate::livekit::wire::api::Api;
use crate::livekit::wire::connect::Endpoint;
use crate::metrics::{Build, InternalError, Metrics, ProjectMetrics, SkipCause, TargetMetrics};
use crate::probe::driver::{Context, Fault};
use crate::report::{BatchReport, Denial};
use crate::schedule::{self, Tick, Ticker};

mod drain;
mod recorder;
mod settings;
mod status;
mod supervisor;
#[cfg(test)]
mod tests;

use recorder::Recorder;
use supervisor::Watchdog;

/// How often what nobody tells is looked at: budgets, back-off, the state of the history.
const REFRESH: Duration = Duration::from_secs(1);
/// Without a sign of life for so long the daemon's own loop counts as hung.
const LONGEST_SILENCE: Duration = Duration::from_secs(15);

/// All that a daemon starts with; the caller has read the settings, opened the history and bound the socket.
pub struct Launch {
    pub config: Config,
    /// Reads the settings again, secrets included.
    pub reread: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
    pub listener: TcpListener,
    pub web: WebConfig,
    pub history: History,
    pub build: Build,
    pub fault: Option<Fault>,
    /// What happens is played: the series say so.
    pub drill: bool,
    /// Told of every batch, for a command that shows them.
    pub observer: Option<Observer>,
}

/// Called with each event of every batch, in the batch's own task: it must not block. A batch that has ended is already in
/// metrics and history.
pub type Observer = Arc<dyn Fn(&BatchEvent) + Send + Sync>;

/// What the outside wants of a running daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    Reload,
    /// A batch of this target now, beside its schedule.
    Batch(String),
    /// The batches from now on play this fault, or none.
    Play(Option<Fault>),
    /// The first asks for an orderly end, a second for one at once.
    Stop,
}

/// How a daemon that was told to stop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Drained,
    /// By a second order: not everything was waited for.
    CutShort,
}

/// Runs until it is told to stop.
///
/// # Errors
/// It can't start, or something that it can't do without has died. Rooms are deleted then as well.
pub async fn run(launch: Launch, mut orders: mpsc::Receiver<Order>) -> anyhow::Result<Ending> {
    let mut daemon = Daemon::start(launch).await?;
    supervisor::ready();
    let served = daemon.serve(&mut orders).await;
    let grace = match &served {
        Ok(()) => daemon.config.daemon.lifetime.drain_grace,
        Err(_) => Duration::ZERO,
    };
    let ending = daemon.drain(&mut orders, grace).await;
    served.map(|()| ending)
}

struct Project {
    settings: Arc<config::Project>,
    endpoint: Endpoint,
    api: Api,
    guard: Guard,
    metrics: ProjectMetrics,
}

struct Target {
    settings: Arc<config::Target>,
    metrics: TargetMetrics,
    paused: bool,
    /// An agent has come to one of its rooms, in this process or before.
    agent_known: bool,
    /// The batch that runs, or waits for its rooms.
    running: Option<String>,
    last_tick: Option<DateTime<Utc>>,
    last_batch: Option<LastBatch>,
}

struct Daemon {
    config: Config,
    reread: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
    projects: BTreeMap<String, Project>,
    targets: BTreeMap<String, Target>,
    ticker: Ticker,
    ticks: mpsc::Receiver<Tick>,
    history: History,
    /// Drops of the history that the metrics know of.
    dropped: u64,
    metrics: Metrics,
    janitor: Janitor,
    fault: Option<Fault>,
    drill: bool,
    observer: Option<Observer>,
    batches: JoinSet<Arc<BatchReport>>,
    /// Of each batch that runs, its target and its id.
    running: HashMap<task::Id, (String, String)>,
    abort: CancellationToken,
    control: mpsc::Receiver<Control>,
    status: watch::Sender<Arc<Status>>,
    stage: DaemonStage,
    started_at: DateTime<Utc>,
    last_reload: Option<LastReload>,
    pulse: Pulse,
    _watchdog: Watchdog,
    http: JoinSet<()>,
    http_end: CancellationToken,
    sweep: JoinSet<SweepResult>,
}

/// Why a batch does not begin.
enum NotBegun {
    Paused,
    Busy { batch_id: String },
    Refused(Denial),
}

impl Daemon {
    async fn start(launch: Launch) -> anyhow::Result<Self> {
        let metrics = Metrics::new(&launch.build);
        let (ticker, ticks) = Ticker::start(Utc::now).await?;
        let started_at = Utc::now();
        let (status, seen) = watch::channel(Arc::new(Status {
            version: env!("CARGO_PKG_VERSION"),
            started_at,
            stage: DaemonStage::Starting,
            targets: Vec::new(),
            projects: Vec::new(),
            last_reload: None,
        }));
        let (asked, control) = mpsc::channel(16);
        let health = Health::default();
        let pulse = health.watch("daemon", Some(LONGEST_SILENCE));
        let watchdog = Watchdog::start(&health);
        let http_end = CancellationToken::new();
        let mut http = JoinSet::new();
        let sources = Sources {
            metrics: metrics.clone(),
            status: seen,
            health,
            history: launch.history.clone(),
            control: asked,
        };
        http.spawn(http::serve(
            launch.listener,
            launch.web,
            sources,
            http_end.clone(),
        ));
        let mut daemon = Self {
            config: launch.config.clone(),
            reread: launch.reread,
            projects: BTreeMap::new(),
            targets: BTreeMap::new(),
            ticker,
            ticks,
            janitor: Janitor::start_with(on_cleanup(&launch.history, &metrics)),
            history: launch.history,
            dropped: 0,
            metrics,
            fault: launch.fault,
            drill: launch.drill,
            observer: launch.observer,
            batches: JoinSet::new(),
            running: HashMap::new(),
            abort: CancellationToken::new(),
            control,
            status,
            stage: DaemonStage::Starting,
            started_at,
            last_reload: None,
            pulse,
            _watchdog: watchdog,
            http,
            http_end,
            sweep: JoinSet::new(),
        };
        daemon.apply(launch.config).map_err(anyhow::Error::msg)?;
        daemon.metrics.config_loaded(started_at);
        daemon.restore().await;
        daemon.begin_sweep();
        daemon.stage = DaemonStage::Running;
        daemon.refresh();
        Ok(daemon)
    }

    /// Waits for whatever comes first, until it is told to stop.
    async fn serve(&mut self, orders: &mut mpsc::Receiver<Order>) -> anyhow::Result<()> {
        let mut refresh = interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Reload) => drop(self.reload().await),
                    Some(Order::Batch(target)) => self.run_as_ordered(&target),
                    Some(Order::Play(fault)) => self.fault = fault,
                    Some(Order::Stop) | None => return Ok(()),
                },
                Some(ended) = self.batches.join_next_with_id() => self.batch_ended(ended),
                Some(tick) = self.ticks.recv() => self.tick(&tick),
                Some(asked) = self.control.recv() => self.answer(asked).await,
                Some(swept) = self.sweep.join_next() => self.swept(swept),
                ended = self.http.join_next() => {
                    self.metrics.internal_error(InternalError::Http);
                    anyhow::bail!("the HTTP server died: {ended:?}");
                }
                () = self.ticker.stopped() => anyhow::bail!("the scheduler ticks no more"),
                _ = refresh.tick() => self.refresh(),
            }
        }
    }

    /// What the history knows of the targets from before this process, or from before they were removed.
    async fn restore(&mut self) {
        for (name, target) in &mut self.targets {
            if target.last_batch.is_some() && target.agent_known {
                continue;
            }
            let agent_name = target.settings.agent_name.as_deref();
            let read = tokio::try_join!(
                self.history.last_completed(name),
                self.history.has_seen_agent(name, agent_name),
            );
            match read {
                Ok((last, agent_known)) => {
                    target.agent_known |= agent_known;
                    if let (None, Some(last)) = (&target.last_batch, last) {
                        target.metrics.restore_last_batch(last.ended_at);
                        target.last_batch = Some(last);
                    }
                }
                Err(error) => {
                    tracing::warn!("can't read what came of targets before: {error:#}");
                    // Each further read could take as long as this one did.
                    return;
                }
            }
        }
    }

    /// Looks for the rooms that dead runs of this program journalled and nobody vouched for.
    fn begin_sweep(&mut self) {
        let mut rooms_of: BTreeMap<String, Vec<RoomName>> = BTreeMap::new();
        for left in self.history.orphan_rooms() {
            rooms_of.entry(left.project).or_default().push(left.room);
        }
        for (name, rooms) in rooms_of {
            let Some(project) = self.projects.get(&name) else {
                tracing::warn!(
                    "{} rooms of earlier runs are not looked for: project {name} is not configured any more",
                    rooms.len()
                );
                continue;
            };
            tracing::info!(
                "looking for {} rooms that an earlier run left on project {name}",
                rooms.len()
            );
            let (api, janitor) = (project.api.clone(), self.janitor.clone());
            self.sweep
                .spawn(async move { janitor.sweep(&api, rooms).await });
        }
    }

    fn swept(&mut self, swept: Result<SweepResult, JoinError>) {
        let swept = match swept {
            Ok(swept) => swept,
            Err(error) => {
                self.metrics.internal_error(InternalError::Janitor);
                tracing::error!("the search for left rooms died: {error}");
                return;
            }
        };
        for room in &swept.deleted {
            let target = self.history.target_of(room);
            if let Some(target) = target.and_then(|name| self.targets.get(&name)) {
                target.metrics.swept(1);
            }
        }
        for left in &swept.unconfirmed {
            tracing::warn!(
                "room {} of an earlier run is left behind: {}",
                left.room,
                left.why
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
        let begun = self.begin(&tick.target, true);
        self.ticker.handled(tick);
        self.tell_next(&tick.target);
        let target = &self.targets[&tick.target];
        let (cause, why) = match begun {
            Ok(_) => return,
            Err(NotBegun::Paused) => (SkipCause::Paused, "it is paused".to_owned()),
            Err(NotBegun::Busy { batch_id }) => {
                (SkipCause::Overlap, format!("batch {batch_id} still runs"))
            }
            Err(NotBegun::Refused(refusal)) => (cause(&refusal), refusal.to_string()),
        };
        skipped(&tick.target, &target.metrics, None, cause, &why);
    }

    fn tell_next(&self, name: &str) {
        let target = &self.targets[name];
        target.metrics.next_batch(self.ticker.next(name));
        let (schedule, now) = (&target.settings.schedule, Utc::now());
        let gaps = schedule::gaps(schedule, now, schedule::AHEAD);
        target.metrics.intervals(
            gaps.map(|gaps| gaps.longest),
            gaps.map(|gaps| gaps.shortest),
            schedule::mean_interval(schedule, now.date_naive()),
        );
    }

    /// Starts a batch and gives its id.
    fn begin(&mut self, name: &str, by_schedule: bool) -> Result<String, NotBegun> {
        let target = self.targets.get_mut(name).expect("the caller looked");
        if by_schedule && target.paused {
            return Err(NotBegun::Paused);
        }
        if let Some(batch_id) = target.running.clone() {
            return Err(NotBegun::Busy { batch_id });
        }
        let project = &self.projects[&target.settings.project];
        if let Some(refusal) = project
            .guard
            .refusal(first_worst_case(&target.settings, &project.settings))
        {
            return Err(NotBegun::Refused(refusal));
        }
        let batch_id = batch::new_id();
        target.running = Some(batch_id.clone());
        let recorder = Recorder {
            target: name.to_owned(),
            settings: Arc::clone(&target.settings),
            project: Arc::clone(&project.settings),
            metrics: target.metrics.clone(),
            history: self.history.clone(),
            observer: self.observer.clone(),
        };
        let context = Context {
            project: Arc::clone(&project.settings),
            target: Arc::clone(&target.settings),
            endpoint: project.endpoint.clone(),
            api: project.api.clone(),
            janitor: self.janitor.clone(),
            agent_known: target.agent_known,
            fault: self.fault,
        };
        let guard = project.guard.clone();
        let batch = recorder.run(batch_id.clone(), context, guard, self.abort.clone());
        let task = self.batches.spawn(batch);
        let running = (name.to_owned(), batch_id.clone());
        self.running.insert(task.id(), running);
        Ok(batch_id)
    }

    fn batch_ended(&mut self, ended: Result<(task::Id, Arc<BatchReport>), JoinError>) {
        let (id, report) = match ended {
            Ok((id, report)) => (id, Some(report)),
            // Cut short by our own end.
            Err(error) if error.is_cancelled() => (error.id(), None),
            Err(error) => {
                self.metrics.internal_error(InternalError::Batch);
                tracing::error!("a batch died: {error}");
                (error.id(), None)
            }
        };
        let (name, batch_id) = self.running.remove(&id).expect("noted when it began");
        let target = self.targets.get_mut(&name);
        if let Some(target) = target.filter(|target| target.running == Some(batch_id)) {
            target.running = None;
            if let Some(report) = report.filter(|report| !report.opened_nothing()) {
                let mut probes = report.probes.iter();
                target.agent_known |= probes.any(|probe| probe.agent.is_some());
                target.last_batch = Some(last_batch(&report));
            }
        }
        self.refresh();
    }

    async fn answer(&mut self, asked: Control) {
        match asked {
            Control::Reload { reply } => say(reply, self.reload().await),
            Control::RunBatch { target, reply } => say(reply, self.run_now(&target)),
            Control::SetPaused {
                target,
                paused,
                reply,
            } => say(reply, self.set_paused(&target, paused)),
        }
        self.refresh();
    }

    fn run_now(&mut self, name: &str) -> Result<String, BatchRefused> {
        if !self.targets.contains_key(name) {
            return Err(NoSuchTarget.into());
        }
        self.begin(name, false).map_err(|not| match not {
            NotBegun::Busy { batch_id } => BatchRefused::Busy { batch_id },
            NotBegun::Refused(refusal) => BatchRefused::Refused {
                retry_after: refusal
                    .until()
                    .and_then(|at| (at - Utc::now()).to_std().ok()),
                text: refusal.to_string(),
            },
            NotBegun::Paused => unreachable!("only the schedule looks at it"),
        })
    }

    fn run_as_ordered(&mut self, name: &str) {
        if let Err(refused) = self.run_now(name) {
            tracing::warn!(target_name = name, "no batch of target {name}: {refused}");
        }
    }

    fn set_paused(&mut self, name: &str, paused: bool) -> Result<(), NoSuchTarget> {
        let target = self.targets.get_mut(name).ok_or(NoSuchTarget)?;
        target.paused = paused;
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

/// Has the journal forget a room that the janitor vouches for, and counts one that it can't vouch for.
fn on_cleanup(history: &History, metrics: &Metrics) -> OnCleanup {
    let (history, metrics) = (history.clone(), metrics.clone());
    Arc::new(move |room, fate| match fate {
        CleanupResult::Gone => history.gone(room),
        CleanupResult::Unconfirmed { why } => {
            tracing::warn!("room {room} may be left behind: {why}");
            let target = history.target_of(room);
            if let Some(target) = target.and_then(|name| metrics.live_target(&name)) {
                target.leaked(1);
            }
        }
    })
}

/// Whoever asked may have gone.
fn say<T>(reply: oneshot::Sender<T>, answer: T) {
    let _gone: Result<(), T> = reply.send(answer);
}

/// What the first room of a batch may cost: where the budget has no room for that, the batch has none.
fn first_worst_case(target: &config::Target, project: &config::Project) -> Duration {
    worst_cases(target, project).next().unwrap_or_default()
}

/// Counts a tick that opened no room, and says why.
fn skipped(
    target: &str,
    metrics: &TargetMetrics,
    batch_id: Option<&str>,
    cause: SkipCause,
    why: &str,
) {
    metrics.skipped(cause);
    // Paused on purpose, every few minutes: not worth a line each.
    if cause != SkipCause::Paused {
        tracing::warn!(
            target_name = target,
            batch_id,
            cause = cause.label(),
            "no batch of target {target}: {why}"
        );
    }
}

fn cause(refusal: &Denial) -> SkipCause {
    match refusal {
        Denial::Backoff { .. } => SkipCause::Backoff,
        Denial::Budget { .. } | Denial::LedgerLost => SkipCause::Budget,
    }
}
