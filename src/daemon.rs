//! The daemon: puts schedule, batches, history, metrics and HTTP together, keeps them going, and ends them in order.
//!
//! One task owns all of its state and waits for whatever comes first: a tick, a request, the end of a batch, an order, or
//! the death of a task that nothing works without. It knows no probe: batches run in tasks of their own, and a
//! [`Recorder`] tells logs, metrics and history what came of them.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::batch::{self, BatchEvent, BatchReport};
use crate::config::{self, Config, Period, Problems};
use crate::guard::{Guard, Refusal, worst_cases};
use crate::history::{History, LastBatch};
use crate::http::{
    self, BatchRefused, BudgetStatus, Control, Health, LastReload, NoSuchTarget, ProjectStatus,
    Pulse, ReloadRefused, Sources, Stage, Status, TargetStatus, WebConfig,
};
use crate::janitor::{Fate, Janitor, Register, Swept};
use crate::livekit::RoomName;
use crate::livekit::api::Api;
use crate::livekit::engine::Engine;
use crate::livekit::net::Endpoint;
use crate::livekit::token::Keys;
use crate::metrics::{Build, InternalError, Metrics, ProjectMetrics, SkipCause, TargetMetrics};
use crate::probe::driver::{Context, Fault};
use crate::schedule::{self, Tick, Ticker};

mod recorder;

use recorder::Recorder;

/// How often what nobody tells is looked at: budgets, back-off, the state of the history.
const REFRESH: Duration = Duration::from_secs(1);
/// Without a sign of life for so long the daemon's own loop counts as hung.
const LONGEST_SILENCE: Duration = Duration::from_secs(15);
/// What a batch that was told to stop may take beyond its rooms' deletion.
const ABORT_BATCH: Duration = Duration::from_millis(2500);
/// From the second signal: for deletions under way.
const LAST_DELETIONS: Duration = Duration::from_secs(2);
/// For what the history has yet to write.
const LAST_WRITES: Duration = Duration::from_secs(5);
/// The longest gap from one batch to the next is looked for so far ahead.
const AHEAD: Duration = Duration::from_hours(7 * 24);

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
    /// Told of every batch, for a command that shows them.
    pub observer: Option<Observer>,
}

/// Called where it happens, so it must wait for nothing.
pub type Observer = Arc<dyn Fn(Moment<'_>) + Send + Sync>;

/// What an observer is told of a batch.
#[derive(Debug, Clone, Copy)]
pub enum Moment<'a> {
    /// No room is open yet.
    Beginning {
        target: &'a str,
    },
    Event(&'a BatchEvent),
    Ended(&'a Arc<BatchReport>),
}

/// What the outside wants of a running daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    Reload,
    /// A batch of this target now, beside its schedule.
    Batch(String),
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
    engine: Engine,
    fault: Option<Fault>,
    observer: Option<Observer>,
    batches: JoinSet<Arc<BatchReport>>,
    /// Of each batch that runs, its target and its id.
    running: HashMap<task::Id, (String, String)>,
    abort: CancellationToken,
    control: mpsc::Receiver<Control>,
    status: watch::Sender<Arc<Status>>,
    stage: Stage,
    started_at: DateTime<Utc>,
    last_reload: Option<LastReload>,
    pulse: Pulse,
    http: JoinSet<()>,
    http_end: CancellationToken,
    sweep: JoinSet<Swept>,
}

/// Why a batch does not begin.
enum NotBegun {
    Paused,
    Busy { batch_id: String },
    Refused(Refusal),
}

impl Daemon {
    async fn start(launch: Launch) -> anyhow::Result<Self> {
        let metrics = Metrics::new(&launch.build);
        let (ticker, ticks) = Ticker::start(Utc::now).await?;
        let started_at = Utc::now();
        let (status, seen) = watch::channel(Arc::new(Status {
            version: env!("CARGO_PKG_VERSION"),
            started_at,
            stage: Stage::Starting,
            targets: Vec::new(),
            projects: Vec::new(),
            last_reload: None,
        }));
        let (asked, control) = mpsc::channel(16);
        let health = Health::default();
        let pulse = health.watch("daemon", Some(LONGEST_SILENCE));
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
            janitor: Janitor::start_with(register(&launch.history, &metrics)),
            history: launch.history,
            dropped: 0,
            metrics,
            engine: Engine::default(),
            fault: launch.fault,
            observer: launch.observer,
            batches: JoinSet::new(),
            running: HashMap::new(),
            abort: CancellationToken::new(),
            control,
            status,
            stage: Stage::Starting,
            started_at,
            last_reload: None,
            pulse,
            http,
            http_end,
            sweep: JoinSet::new(),
        };
        daemon.apply(launch.config).map_err(anyhow::Error::msg)?;
        daemon.metrics.config_loaded(started_at);
        daemon.restore().await;
        daemon.begin_sweep();
        daemon.stage = Stage::Running;
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

    /// Brings settings into effect, all or nothing. Batches that run go on with those that they began with.
    fn apply(&mut self, config: Config) -> Result<(), String> {
        let mut access = BTreeMap::new();
        for (name, project) in &config.projects {
            let endpoint = Endpoint::new(&project.url, project.ca_file.as_deref());
            let keys = Keys::new(project.api_key.clone(), project.api_secret.clone());
            match (endpoint, keys) {
                (Ok(endpoint), Ok(keys)) => {
                    let api = Api::new(endpoint.clone(), keys, project.api_timeout);
                    access.insert(name.clone(), (endpoint, api));
                }
                (Err(error), _) => return Err(format!("project {name:?}: {error:#}")),
                (_, Err(error)) => return Err(format!("project {name:?}: {error:#}")),
            }
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
        for (name, (endpoint, api)) in access {
            self.set_project(
                &name,
                Arc::new(config.projects[&name].clone()),
                endpoint,
                api,
            );
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
        endpoint: Endpoint,
        api: Api,
    ) {
        let metrics = self.metrics.project(name, &settings);
        let guard = match self.projects.get(name) {
            Some(known) => {
                known.guard.configure(&settings);
                known.guard.clone()
            }
            None => Guard::new(name, &settings, self.history.clone()),
        };
        let project = Project {
            settings,
            endpoint,
            api,
            guard,
            metrics,
        };
        self.projects.insert(name.to_owned(), project);
    }

    fn set_target(&mut self, name: &str, settings: &config::Target, config: &Config) {
        let project = &config.projects[&settings.project];
        let metrics = self.metrics.target(name, settings, project, false);
        let settings = Arc::new(settings.clone());
        let mut first = Utc::now();
        if let Some(known) = self.targets.get_mut(name) {
            known.agent_known &= known.settings.agent_name == settings.agent_name;
            known.settings = Arc::clone(&settings);
        } else {
            let target = Target {
                settings: Arc::clone(&settings),
                metrics: metrics.clone(),
                paused: false,
                agent_known: false,
                running: self.running_batch(name),
                last_tick: None,
                last_batch: None,
            };
            self.targets.insert(name.to_owned(), target);
            first += config.daemon.lifetime.startup_delay;
        }
        metrics.paused(self.targets[name].paused);
        self.ticker.set(name, &settings.schedule, first);
        self.tell_next(name);
    }

    /// A target that was removed and comes back may still have one.
    fn running_batch(&self, name: &str) -> Option<String> {
        let mut running = self.running.values();
        let found = running.find(|(target, _)| target == name);
        found.map(|(_, batch_id)| batch_id.clone())
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
        for left in self.history.leftovers() {
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

    fn swept(&mut self, swept: Result<Swept, JoinError>) {
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
        for left in &swept.left {
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
        target.metrics.skipped(cause);
        // Paused on purpose, every few minutes: not worth a line each.
        if cause != SkipCause::Paused {
            tracing::warn!(
                target_name = tick.target,
                cause = cause.label(),
                "no batch of target {}: {why}",
                tick.target
            );
        }
    }

    fn tell_next(&self, name: &str) {
        let target = &self.targets[name];
        target.metrics.next_batch(self.ticker.next(name));
        let gaps = schedule::gaps(&target.settings.schedule, Utc::now(), AHEAD);
        target.metrics.interval(gaps.map(|gaps| gaps.longest));
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
        if let Some(observer) = &self.observer {
            observer(Moment::Beginning { target: name });
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
            engine: self.engine,
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
        if let (Some(report), Some(observer)) = (&report, &self.observer) {
            observer(Moment::Ended(report));
        }
        let target = self.targets.get_mut(&name);
        if let Some(target) = target.filter(|target| target.running == Some(batch_id)) {
            target.running = None;
            if let Some(report) = report.filter(|report| !report.opened_nothing()) {
                let mut probes = report.probes.iter();
                target.agent_known |= probes.any(|probe| probe.report.agent.is_some());
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
            return Err(BatchRefused::NoSuchTarget);
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

    async fn reload(&mut self) -> Result<(), ReloadRefused> {
        let reread = (self.reread)().map_err(|problems| problems.to_string());
        let before = self.config.daemon.clone();
        let applied = reread.and_then(|config| self.apply(config));
        let at = Utc::now();
        match &applied {
            Ok(()) => {
                self.restore().await;
                self.metrics.config_loaded(at);
                tracing::info!("settings reloaded: {} targets", self.targets.len());
                let now = &self.config.daemon;
                if before.http != now.http || before.history != now.history {
                    tracing::warn!("changes of [http] and [history] take effect at the next start");
                }
            }
            Err(why) => {
                self.metrics.config_refused();
                tracing::error!("settings not reloaded, the old ones stay: {why}");
            }
        }
        self.last_reload = Some(LastReload {
            at,
            ok: applied.is_ok(),
            error: applied.clone().err(),
        });
        self.refresh();
        applied.map_err(ReloadRefused::Invalid)
    }
}

impl Daemon {
    /// Ends in order: ticks, batches, rooms, history, and HTTP last, so that a scrape sees how it all ended.
    async fn drain(mut self, orders: &mut mpsc::Receiver<Order>, grace: Duration) -> Ending {
        self.stage = Stage::Draining;
        for name in self.targets.keys() {
            self.ticker.remove(name);
        }
        self.refresh();
        tracing::info!("stopping, {} batches under way", self.batches.len());
        let ending = tokio::select! {
            () = self.end_in_order(grace) => Ending::Drained,
            () = told_to_stop(orders) => Ending::CutShort,
        };
        if ending == Ending::CutShort {
            tracing::warn!("told to stop again: ending at once");
            // The probes are dropped, and the janitor deletes their rooms.
            self.batches.abort_all();
            self.leave(Instant::now() + LAST_DELETIONS).await;
        }
        self.http_end.cancel();
        self.control.close();
        while let Some(asked) = self.control.recv().await {
            refuse(asked);
        }
        while self.http.join_next().await.is_some() {}
        ending
    }

    async fn end_in_order(&mut self, grace: Duration) {
        self.join_batches(Instant::now() + grace).await;
        if !self.batches.is_empty() {
            tracing::warn!("aborting {} batches", self.batches.len());
            self.abort.cancel();
            let patience = ABORT_BATCH + self.longest_cleanup();
            self.join_batches(Instant::now() + patience).await;
            self.batches.abort_all();
        }
        self.leave(Instant::now() + self.longest_cleanup()).await;
        let linger = self.config.daemon.lifetime.shutdown_linger;
        self.attend(sleep(linger)).await;
    }

    async fn join_batches(&mut self, until: Instant) {
        let mut refresh = interval(REFRESH);
        while !self.batches.is_empty() {
            tokio::select! {
                () = sleep_until(until) => return,
                () = self.meanwhile(&mut refresh) => {}
            }
        }
    }

    /// Waits until the rooms are gone and what there is to write is written. A room that can't be vouched for stays in
    /// the journal, and the next start looks for it.
    async fn leave(&mut self, until: Instant) {
        let closing = self.janitor.clone().close(until);
        for left in self.attend(closing).await {
            tracing::warn!(
                "room {} may be left behind, the next start looks for it: {}",
                left.room,
                left.why
            );
        }
        let history = self.history.clone();
        let closing = history.close(Instant::now() + LAST_WRITES);
        if !self.attend(closing).await {
            tracing::warn!("the history could not be written to its end");
        }
    }

    async fn attend<T>(&mut self, what: impl Future<Output = T>) -> T {
        let mut what = pin!(what);
        let mut refresh = interval(REFRESH);
        loop {
            tokio::select! {
                done = &mut what => return done,
                () = self.meanwhile(&mut refresh) => {}
            }
        }
    }

    /// The next thing that a daemon on its way out sees to: a scraper and an operator still get answers.
    async fn meanwhile(&mut self, refresh: &mut Interval) {
        tokio::select! {
            Some(ended) = self.batches.join_next_with_id() => self.batch_ended(ended),
            Some(swept) = self.sweep.join_next() => self.swept(swept),
            Some(asked) = self.control.recv() => refuse(asked),
            _ = refresh.tick() => self.refresh(),
        }
    }

    fn longest_cleanup(&self) -> Duration {
        let targets = self.config.targets.values();
        let longest = targets.map(|target| target.deadlines.cleanup).max();
        longest.unwrap_or_default()
    }
}

impl Daemon {
    /// Looks at what nobody tells of, and tells everybody.
    fn refresh(&mut self) {
        self.pulse.beat();
        self.metrics.history_degraded(self.history.is_degraded());
        let dropped = self.history.dropped();
        self.metrics.history_dropped(dropped - self.dropped);
        self.dropped = dropped;
        for project in self.projects.values() {
            project.metrics.backoff_until(project.guard.backoff_until());
            for period in Period::ALL {
                project
                    .metrics
                    .budget_used(period, project.guard.used(period));
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

    /// Why a batch that is not under way could not begin now.
    fn held_back(&self, target: &Target) -> Option<String> {
        let settings = &target.settings;
        let project = &self.projects[&settings.project];
        let worst_case = first_worst_case(settings, &project.settings);
        let refusal = project.guard.refusal(worst_case)?;
        target.running.is_none().then(|| refusal.to_string())
    }

    fn target_status(&self, name: &str, target: &Target) -> TargetStatus {
        let settings = &target.settings;
        TargetStatus {
            name: name.to_owned(),
            project: settings.project.clone(),
            url: self.projects[&settings.project].settings.url.to_string(),
            agent_name: settings.agent_name.clone(),
            dispatch: settings.dispatch.mode.name(),
            schedule: settings.schedule.to_string(),
            paused: target.paused,
            running: target.running.clone(),
            next_batch_at: self.ticker.next(name),
            last_tick_at: target.last_tick,
            last_batch: target.last_batch.clone(),
            held_back: self.held_back(target),
        }
    }
}

impl Project {
    fn status(&self, name: &str) -> ProjectStatus {
        let budgets = Period::ALL.map(|period| BudgetStatus {
            period: period.label(),
            used_seconds: self.guard.used(period).as_secs(),
            limit_seconds: self.guard.limit(period).map(|limit| limit.as_secs()),
        });
        ProjectStatus {
            name: name.to_owned(),
            url: self.settings.url.to_string(),
            max_rooms: self.settings.max_rooms,
            rooms_in_flight: self.guard.places_taken(),
            backoff_until: self.guard.backoff_until(),
            budgets: Vec::from(budgets),
        }
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
fn register(history: &History, metrics: &Metrics) -> Register {
    let (history, metrics) = (history.clone(), metrics.clone());
    Arc::new(move |room, fate| match fate {
        Fate::Gone => history.gone(room),
        Fate::LeftBehind { why } => {
            tracing::warn!("room {room} may be left behind: {why}");
            let target = history.target_of(room);
            if let Some(target) = target.and_then(|name| metrics.live_target(&name)) {
                target.leaked(1);
            }
        }
    })
}

async fn told_to_stop(orders: &mut mpsc::Receiver<Order>) {
    loop {
        match orders.recv().await {
            Some(Order::Stop) => return,
            Some(Order::Reload | Order::Batch(_)) => {}
            // Nobody can tell any more.
            None => std::future::pending().await,
        }
    }
}

/// Answers a request that comes too late.
fn refuse(asked: Control) {
    match asked {
        Control::Reload { reply } => say(reply, Err(ReloadRefused::ShuttingDown)),
        Control::RunBatch { reply, .. } => say(reply, Err(BatchRefused::ShuttingDown)),
        Control::SetPaused { reply, .. } => say(reply, Ok(())),
    }
}

/// Whoever asked may have gone.
fn say<T>(reply: oneshot::Sender<T>, answer: T) {
    let _gone: Result<(), T> = reply.send(answer);
}

/// What the first room of a batch may cost: where the budget has no room for that, the batch has none.
fn first_worst_case(target: &config::Target, project: &config::Project) -> Duration {
    worst_cases(target, project)
        .first()
        .copied()
        .unwrap_or_default()
}

fn cause(refusal: &Refusal) -> SkipCause {
    match refusal {
        Refusal::Backoff { .. } => SkipCause::Backoff,
        Refusal::Budget { .. } | Refusal::LedgerLost => SkipCause::Budget,
    }
}
