//! The daemon and a sandbox for it in one process: what `demo` and `drill` show, each in its own way.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use chrono::Utc;
use console::style;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::once::Signals;
use super::progress::{REFRESH, Screen};
use super::{phrasing, table};
use crate::batch::{self, BatchEvent};
use crate::config::{Config, Http, Problems, RawConfig};
use crate::daemon::{self, Ending, Launch, Observer, Order};
use crate::history::History;
use crate::http::WebConfig;
use crate::probe::driver::Fault;
use crate::report::BatchReport;
use crate::sandbox::{Handle, Sandbox};

/// Loopback answers at once, so what is late by seconds won't come. Each is the shortest that leaves a busy machine
/// some room, so that a fault takes little longer than a good call.
const TARGET_SETTINGS: &[(&[&str], &str)] = &[
    (&["agent_name"], "demo"),
    (&["batch", "hold"], "1s"),
    (&["deadlines", "signal"], "4s"),
    (&["deadlines", "media"], "5s"),
    (&["deadlines", "join"], "5s"),
    (&["deadlines", "track"], "3s"),
    (&["deadlines", "speech"], "4s"),
    (&["deadlines", "reply"], "4s"),
    (&["deadlines", "cleanup"], "2s"),
    (&["echo", "delay"], "500ms"),
    (&["expect", "reply"], "true"),
    (&["late_agent_window"], "1s"),
];

/// A plan limit that is played holds nothing back for long.
const PROJECT_SETTINGS: &[(&[&str], &str)] = &[
    (&["backoff", "first"], "1s"),
    (&["backoff", "longest"], "1s"),
];

/// Nothing waits for a scrape.
const DAEMON_SETTINGS: &[(&[&str], &str)] = &[
    (&["lifetime", "startup_delay"], "0s"),
    (&["lifetime", "drain_grace"], "0s"),
    (&["lifetime", "shutdown_linger"], "0s"),
];

/// Batches whose events may wait to be shown.
const MAX_WAITING_BATCHES: usize = 4;

/// The one target that the daemon watches.
pub(super) struct Wanted {
    pub(super) target: String,
    pub(super) project: &'static str,
    pub(super) rooms: usize,
    pub(super) every: Duration,
    pub(super) history_dir: PathBuf,
}

impl Wanted {
    /// The settings are read as a user's are, but from here alone: no environment can send a drill to a real project.
    pub(super) fn draft(&self, sandbox: &Sandbox) -> Result<RawConfig, Problems> {
        let (target, project) = (self.target.as_str(), self.project);
        let mut draft = RawConfig::read(None, [])?;
        let secret = sandbox.api_secret().expose_secret();
        for (key, value) in [
            ("url", sandbox.url().as_str()),
            ("api_key", sandbox.api_key()),
            ("api_secret", secret),
        ] {
            draft.set(&["projects", project, key], value.to_owned(), target);
        }
        for (key, value) in PROJECT_SETTINGS {
            let path = [&["projects", project], *key].concat();
            draft.set(&path, (*value).to_owned(), target);
        }
        for (key, value) in TARGET_SETTINGS {
            draft.set_by_flag(target, key, (*value).to_owned(), target);
        }
        for (key, value) in DAEMON_SETTINGS {
            draft.set(key, (*value).to_owned(), target);
        }
        let folder = self.history_dir.display().to_string();
        draft.set(&["history", "dir"], folder, "--history-dir");
        let every = humantime::format_duration(self.every).to_string();
        draft.set_by_flag(target, &["schedule", "every"], every, "--every");
        let rooms = self.rooms.to_string();
        draft.set_by_flag(target, &["batch", "rooms"], rooms, "--rooms");
        Ok(draft)
    }
}

/// The daemon's own port on loopback, or any where that is taken; or what was asked for.
pub(super) async fn listen(wanted: Option<SocketAddr>) -> anyhow::Result<TcpListener> {
    if let Some(address) = wanted {
        return super::run::listen(address).await;
    }
    let port = Http::default().listen.port();
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("can't listen on loopback"),
    }
}

/// Called with the number of a batch, counted from 1, before it opens a room.
pub(super) type BeforeBatch = Box<dyn Fn(&Handle, usize) + Send + Sync>;

/// What the daemon starts with beside its settings.
pub(super) struct Setup {
    pub(super) listener: TcpListener,
    pub(super) screen: Screen,
    pub(super) fault: Option<Fault>,
    pub(super) drill: bool,
    pub(super) before_batch: BeforeBatch,
}

/// A daemon that runs, its sandbox, and the screen that shows both.
pub(super) struct SandboxedDaemon {
    pub(super) handle: Handle,
    pub(super) page: String,
    screen: Screen,
    signals: Signals,
    events: mpsc::Receiver<BatchEvent>,
    order: mpsc::Sender<Order>,
    config: watch::Sender<Config>,
    refresh: Interval,
    /// Nothing more is shown.
    stopping: bool,
    daemon: JoinHandle<anyhow::Result<Ending>>,
    sandbox: JoinHandle<()>,
    stop_sandbox: CancellationToken,
}

/// What a command acts on.
pub(super) enum LocalEvent {
    /// The screen has shown it.
    Batch(BatchEvent),
    Interrupted,
    /// The daemon has ended, as it was asked to.
    Stopped,
}

impl SandboxedDaemon {
    pub(super) fn start(sandbox: Sandbox, config: Config, setup: Setup) -> anyhow::Result<Self> {
        let page = format!("http://{}/", setup.listener.local_addr()?);
        let handle = sandbox.handle();
        let stop_sandbox = CancellationToken::new();
        let rooms = config.targets.values().map(|target| target.batch.rooms);
        let most = batch::max_events(rooms.max().unwrap_or_default());
        let (events_tx, events) = mpsc::channel(MAX_WAITING_BATCHES * most);
        let (order, orders) = mpsc::channel(4);
        let (settings, again) = watch::channel(config.clone());
        let launch = Launch {
            web: WebConfig::load(&config.daemon.http).map_err(anyhow::Error::msg)?,
            history: History::open(&config.daemon.history)?,
            config,
            reread: Box::new(move || Ok(again.borrow().clone())),
            listener: setup.listener,
            build: super::run::build(),
            fault: setup.fault,
            drill: setup.drill,
            observer: Some(observer(handle.clone(), setup.before_batch, events_tx)),
        };
        let mut refresh = interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            handle,
            page,
            screen: setup.screen,
            signals: Signals::new()?,
            events,
            order,
            config: settings,
            refresh,
            stopping: false,
            daemon: tokio::spawn(daemon::run(launch, orders)),
            sandbox: tokio::spawn(sandbox.run(stop_sandbox.clone())),
            stop_sandbox,
        })
    }

    /// What happens next; progress is shown meanwhile. Cancel-safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<LocalEvent> {
        loop {
            tokio::select! {
                // What happened is shown before the end is.
                biased;
                Some(event) = self.events.recv(), if !self.stopping => {
                    self.screen.show(&event);
                    if matches!(event, BatchEvent::Ended(_)) {
                        self.screen.close();
                    }
                    return Ok(LocalEvent::Batch(event));
                }
                ended = &mut self.daemon => {
                    ended.context("the daemon died")??;
                    return Ok(LocalEvent::Stopped);
                }
                () = self.signals.next() => {
                    self.screen.close();
                    return Ok(LocalEvent::Interrupted);
                }
                _ = self.refresh.tick() => self.screen.refresh(),
            }
        }
    }

    /// An order that finds no place is one of many of its kind.
    pub(super) fn tell(&self, order: Order) {
        if let Err(error) = self.order.try_send(order) {
            tracing::debug!("the daemon takes no orders: {error}");
        }
    }

    pub(super) fn set_config(&self, config: Config) {
        self.config.send_replace(config);
        self.tell(Order::Reload);
    }

    /// What comes now is but the end; a second call makes it a quick one.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        self.tell(Order::Stop);
    }

    /// Ends the sandbox; the daemon must be over.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.stop_sandbox.cancel();
        self.sandbox.await.context("the sandbox died")
    }
}

/// Calls `before_batch` where a batch starts, and sends every event on.
fn observer(
    handle: Handle,
    before_batch: BeforeBatch,
    events: mpsc::Sender<BatchEvent>,
) -> Observer {
    let started = AtomicUsize::new(0);
    Arc::new(move |event| {
        if let BatchEvent::Started { .. } = event {
            before_batch(&handle, started.fetch_add(1, Ordering::Relaxed) + 1);
        }
        if events.try_send(event.clone()).is_err() {
            tracing::debug!("a batch event was dropped: the command is stopping or slow");
        }
    })
}

pub(super) fn heading(number: usize, fault: Option<String>) -> String {
    let what = match fault {
        Some(fault) => style(fault).yellow(),
        None => style("no fault".to_owned()),
    };
    let time = Utc::now().format("%H:%M:%S");
    let batch = style(format!("Batch {number}")).bold();
    format!("\n{batch}, {time} UTC, {}\n", what.bold())
}

/// What came of a batch: fewer columns than the table of `once`, so that batch below batch is easy to compare.
pub(super) fn result(batch: &BatchReport) -> String {
    let head = format!("  room  {}", table::BRIEF_HEAD);
    let mut text = format!("{}\n", style(head).dim());
    for (index, probe) in batch.probes.iter().enumerate() {
        let row = table::brief_of(probe);
        writeln!(text, "  {:>4}  {row}", index + 1).expect("writing to a string can't fail");
    }
    for said in [phrasing::summary(batch), table::reasons(batch)] {
        table::push_indented(&mut text, said.lines());
    }
    text
}

/// Whether the canary said of each room what was played there: `wrong` says where it didn't.
pub(super) fn judgement(wrong: &[String]) -> String {
    let judgement = if wrong.is_empty() {
        style("As expected.".to_owned()).green()
    } else {
        style(format!("NOT what was played: {}.", wrong.join(", "))).red()
    };
    format!("  {judgement}\n")
}
