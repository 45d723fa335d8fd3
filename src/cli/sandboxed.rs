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
use crate::batch::BatchEvent;
use crate::config::{Config, Http, Problems, RawConfig};
use crate::daemon::{self, Ending, Launch, Moment, Observer, Order};
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

/// More than a few batches tell.
const MOST_TOLD: usize = 1024;

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
    seen: mpsc::Receiver<Told>,
    order: mpsc::Sender<Order>,
    config: watch::Sender<Config>,
    refresh: Interval,
    /// Nothing more is shown.
    stopping: bool,
    daemon: JoinHandle<anyhow::Result<Ending>>,
    sandbox: JoinHandle<()>,
    stop_sandbox: CancellationToken,
}

/// What the daemon's batches are told as, in their order.
enum Told {
    Beginning { number: usize },
    Event(BatchEvent),
    Ended(Arc<BatchReport>),
}

/// What a command acts on.
pub(super) enum Happened {
    Begun {
        number: usize,
    },
    Ended(Arc<BatchReport>),
    Interrupted,
    /// The daemon has ended, as it was told.
    Over,
}

impl SandboxedDaemon {
    pub(super) fn start(sandbox: Sandbox, config: Config, setup: Setup) -> anyhow::Result<Self> {
        let page = format!("http://{}/", setup.listener.local_addr()?);
        let handle = sandbox.handle();
        let stop_sandbox = CancellationToken::new();
        let (told, seen) = mpsc::channel(MOST_TOLD);
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
            observer: Some(observer(handle.clone(), setup.before_batch, told)),
        };
        let mut refresh = interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            handle,
            page,
            screen: setup.screen,
            signals: Signals::new()?,
            seen,
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
    pub(super) async fn next(&mut self) -> anyhow::Result<Happened> {
        loop {
            tokio::select! {
                // What happened is shown before the end is.
                biased;
                Some(told) = self.seen.recv(), if !self.stopping => match told {
                    Told::Beginning { number } => return Ok(Happened::Begun { number }),
                    Told::Event(event) => self.screen.show(event),
                    Told::Ended(report) => {
                        self.screen.close();
                        return Ok(Happened::Ended(report));
                    }
                },
                ended = &mut self.daemon => {
                    ended.context("the daemon died")??;
                    return Ok(Happened::Over);
                }
                () = self.signals.next() => {
                    self.screen.close();
                    return Ok(Happened::Interrupted);
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

/// Passes on what becomes of the batches.
fn observer(handle: Handle, before_batch: BeforeBatch, told: mpsc::Sender<Told>) -> Observer {
    let begun = AtomicUsize::new(0);
    Arc::new(move |moment| {
        let told_of = match moment {
            Moment::Beginning { .. } => {
                let number = begun.fetch_add(1, Ordering::Relaxed) + 1;
                before_batch(&handle, number);
                Told::Beginning { number }
            }
            Moment::Event(event) => Told::Event(event.clone()),
            Moment::Ended(report) => Told::Ended(Arc::clone(report)),
        };
        if told.try_send(told_of).is_err() {
            tracing::debug!("nobody looks at the batches any more");
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
        let row = table::brief_of(&probe.report);
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
