//! The daemon and a sandbox that it probes, in one process. `demo` and `drill` run it and print what its batches find.

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

use super::progress::{ProgressView, REFRESH_INTERVAL};
use super::stop_signals::StopSignals;
use super::{format, table};
use crate::batch::{self, BatchEvent};
use crate::config::{Config, Http, Problems, RawConfig, RecordAudio};
use crate::daemon::{self, BatchObserver, DaemonCommand, DaemonOptions, ShutdownKind};
use crate::history::History;
use crate::http::WebConfig;
use crate::probe::driver::ProbeFault;
use crate::report::BatchReport;
use crate::sandbox::{Handle, Sandbox};

/// Short deadlines: loopback answers at once, so whatever is seconds late does not come. A failed room then takes little
/// longer than a good one. Each deadline still leaves time on a busy machine.
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
    (&["caller", "silence"], "500ms"),
    (&["expect", "reply"], "true"),
    (&["late_agent_window"], "1s"),
];

/// The pause after an injected plan limit is short.
const PROJECT_SETTINGS: &[(&[&str], &str)] = &[
    (&["backoff", "first"], "1s"),
    (&["backoff", "longest"], "1s"),
];

/// The first batch starts at once, and no Prometheus needs time for a last scrape.
const DAEMON_SETTINGS: &[(&[&str], &str)] = &[
    (&["lifetime", "startup_delay"], "0s"),
    (&["lifetime", "drain_grace"], "0s"),
    (&["lifetime", "shutdown_linger"], "0s"),
];

/// Batches whose events can wait in the channel until they are shown.
const MAX_WAITING_BATCHES: usize = 4;

/// The one target that the daemon probes.
pub(super) struct LocalTarget {
    pub(super) target: String,
    pub(super) project: &'static str,
    pub(super) rooms: usize,
    pub(super) every: Duration,
    pub(super) history_dir: PathBuf,
    pub(super) record: RecordAudio,
}

impl LocalTarget {
    /// Returns settings that are validated as a user's are, but come only from here. The environment is not read, so that
    /// it cannot point a drill at a real project.
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
        let record: &str = self.record.into();
        draft.set_by_flag(target, &["record", "audio"], record.to_owned(), target);
        let every = humantime::format_duration(self.every).to_string();
        draft.set_by_flag(target, &["schedule", "every"], every, "--every");
        let rooms = self.rooms.to_string();
        draft.set_by_flag(target, &["batch", "rooms"], rooms, "--rooms");
        Ok(draft)
    }
}

/// Listens on `address`. Without one it takes the daemon's default port on loopback, or a free port if that is taken.
pub(super) async fn listen(address: Option<SocketAddr>) -> anyhow::Result<TcpListener> {
    if let Some(address) = address {
        return super::run::listen(address).await;
    }
    let port = Http::default().listen.port();
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("cannot listen on loopback"),
    }
}

/// Called before a batch opens its first room, with the number of the batch, which starts at 1.
pub(super) type BeforeBatch = Box<dyn Fn(&Handle, usize) + Send + Sync>;

/// What the daemon starts with in addition to its settings.
pub(super) struct LocalSetup {
    pub(super) listener: TcpListener,
    pub(super) view: ProgressView,
    pub(super) fault: Option<ProbeFault>,
    pub(super) drill: bool,
    pub(super) before_batch: BeforeBatch,
}

/// A running daemon, its sandbox, and the view of its batches.
pub(super) struct LocalDaemon {
    pub(super) handle: Handle,
    pub(super) page: String,
    view: ProgressView,
    signals: StopSignals,
    events: mpsc::Receiver<BatchEvent>,
    order: mpsc::Sender<DaemonCommand>,
    config: watch::Sender<Config>,
    refresh: Interval,
    /// Batches are no longer shown.
    stopping: bool,
    daemon: JoinHandle<anyhow::Result<ShutdownKind>>,
    sandbox: JoinHandle<()>,
    stop_sandbox: CancellationToken,
}

/// What `demo` and `drill` react to.
pub(super) enum LocalEvent {
    /// The view has shown it already.
    Batch(BatchEvent),
    /// Ctrl-C or SIGTERM.
    Interrupted,
    /// The daemon has ended, after a request to stop.
    Stopped,
}

impl LocalDaemon {
    pub(super) fn start(
        sandbox: Sandbox,
        config: Config,
        setup: LocalSetup,
    ) -> anyhow::Result<Self> {
        let page = format!("http://{}/", setup.listener.local_addr()?);
        let mut view = setup.view;
        if let Some(target) = config.targets.values().next() {
            view.set_limits(target, &config.projects[&target.project]);
        }
        let handle = sandbox.handle();
        let stop_sandbox = CancellationToken::new();
        let events = config
            .targets
            .values()
            .map(|target| batch::max_events(target.batch.rooms, target.caller.turns));
        let max_events = events.max().unwrap_or_default();
        let (events_tx, events) = mpsc::channel(MAX_WAITING_BATCHES * max_events);
        let (order, orders) = mpsc::channel(4);
        let (settings, again) = watch::channel(config.clone());
        let options = DaemonOptions {
            web: WebConfig::load(&config.daemon.http).map_err(anyhow::Error::msg)?,
            history: History::open(&config.daemon.history)?,
            config,
            read_config: Arc::new(move || Ok(again.borrow().clone())),
            listener: setup.listener,
            build: super::run::build(),
            fault: setup.fault,
            drill: setup.drill,
            observer: Some(observer(handle.clone(), setup.before_batch, events_tx)),
        };
        let mut refresh = interval(REFRESH_INTERVAL);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            handle,
            page,
            view,
            signals: StopSignals::new()?,
            events,
            order,
            config: settings,
            refresh,
            stopping: false,
            daemon: tokio::spawn(daemon::run(options, orders)),
            sandbox: tokio::spawn(sandbox.run(stop_sandbox.clone())),
            stop_sandbox,
        })
    }

    /// Waits for the next event and shows progress meanwhile. Cancel-safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<LocalEvent> {
        loop {
            tokio::select! {
                // In order, so that the events of a batch are shown before the end of the daemon.
                biased;
                Some(event) = self.events.recv(), if !self.stopping => {
                    self.view.show(&event);
                    if matches!(event, BatchEvent::Ended(_)) {
                        self.view.close();
                    }
                    return Ok(LocalEvent::Batch(event));
                }
                ended = &mut self.daemon => {
                    ended.context("the daemon panicked")??;
                    return Ok(LocalEvent::Stopped);
                }
                () = self.signals.next() => {
                    self.view.close();
                    return Ok(LocalEvent::Interrupted);
                }
                _ = self.refresh.tick() => self.view.refresh(),
            }
        }
    }

    /// Sends a command to the daemon. A full queue drops it: the queue then holds several of the same kind.
    pub(super) fn send(&self, order: DaemonCommand) {
        if let Err(error) = self.order.try_send(order) {
            tracing::debug!("the daemon did not accept a command: {error}");
        }
    }

    pub(super) fn set_config(&self, config: Config) {
        self.config.send_replace(config);
        self.send(DaemonCommand::Reload);
    }

    /// Asks the daemon to stop. A second call makes it stop at once.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        self.send(DaemonCommand::Stop);
    }

    /// Stops the sandbox. The daemon must have ended before.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.stop_sandbox.cancel();
        self.sandbox.await.context("the sandbox panicked")
    }
}

/// Calls `before_batch` when a batch starts, and forwards every event.
fn observer(
    handle: Handle,
    before_batch: BeforeBatch,
    events: mpsc::Sender<BatchEvent>,
) -> BatchObserver {
    let started = AtomicUsize::new(0);
    Arc::new(move |event| {
        if let BatchEvent::Started = event {
            before_batch(&handle, started.fetch_add(1, Ordering::Relaxed) + 1);
        }
        if events.try_send(event.clone()).is_err() {
            tracing::debug!("a batch event was dropped: the command is stopping or slow");
        }
    })
}

/// Returns the line above a batch: its number, the time and the fault.
pub(super) fn heading(number: usize, fault: Option<String>) -> String {
    let what = match fault {
        Some(fault) => style(fault).yellow(),
        None => style("no fault".to_owned()),
    };
    let time = Utc::now().format("%H:%M:%S");
    let batch = style(format!("Batch {number}")).bold();
    format!("\n{batch}, {time} UTC, {}\n", what.bold())
}

/// Returns the result of a batch. It has fewer columns than the table of `once`, so that batches are easy to compare.
pub(super) fn batch_result(batch: &BatchReport) -> String {
    let head = format!("  room  {}", table::BRIEF_HEAD);
    let mut text = format!("{}\n", style(head).dim());
    for (index, probe) in batch.probes.iter().enumerate() {
        let row = table::brief_row_of(probe);
        writeln!(text, "  {:>4}  {row}", index + 1).expect("writing to a string cannot fail");
    }
    for part in [format::summary(batch), table::failures_in_brief(batch)] {
        table::push_indented(&mut text, part.lines());
    }
    text
}

/// Returns a line that states whether the canary found the injected fault in each room. `mismatches` lists the rooms where
/// it did not.
pub(super) fn comparison(mismatches: &[String]) -> String {
    let comparison = if mismatches.is_empty() {
        style("As expected.".to_owned()).green()
    } else {
        style(format!("NOT as expected: {}.", mismatches.join(", "))).red()
    };
    format!("  {comparison}\n")
}
