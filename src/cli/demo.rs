//! `demo`: the sandbox and the canary in one process, batch after batch, with faults by turns.
//!
//! What is announced is what the sandbox was told; what follows is what the canary found out by itself. Where the two
//! differ, the demo says so.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use chrono::Utc;
use console::style;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::once::{Signals, verdict};
use super::progress::{REFRESH, Screen};
use super::{Demo, Exit, phrasing, print_unless_closed, table};
use crate::batch::{BatchEvent, BatchReport, ProbeReport};
use crate::config::{Config, Draft, Http, Problems};
use crate::daemon::{self, Ending, Launch, Moment, Observer, Order};
use crate::history::History;
use crate::http::WebConfig;
use crate::probe::{LimitKind, Outcome, Reason, Span};
use crate::sandbox::fault::{Rooms, Rule};
use crate::sandbox::{Handle, Sandbox, Settings};

const TARGET: &str = "demo";

/// Loopback answers at once, so what is late by seconds won't come. Each is the shortest that leaves a busy machine
/// some room, so that a fault takes little longer than a good call.
const SETTINGS: &[(&[&str], &str)] = &[
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

/// The daemon's: nothing waits for a scrape, and a plan limit that is played holds nothing back for long.
const DAEMON_SETTINGS: &[(&[&str], &str)] = &[
    (&["lifetime", "startup_delay"], "0s"),
    (&["lifetime", "drain_grace"], "0s"),
    (&["lifetime", "shutdown_linger"], "0s"),
    (&["projects", "default", "backoff", "first"], "1s"),
    (&["projects", "default", "backoff", "longest"], "1s"),
];

/// More than a few batches tell.
const MOST_TOLD: usize = 1024;

/// Batches without a fault before the first that has one; from there on they alternate.
const GOOD_AT_FIRST: usize = 2;

/// A fault that is played for one batch, and what the canary must make of it.
struct Drill {
    /// Follows "fault:" or "fault in room 2:".
    what: &'static str,
    fault: &'static str,
    rooms: Affected,
    expected: Expected,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Affected {
    All,
    /// The second, where there is one: so the table shows what the fault changes.
    One,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Ok,
    OkLate(Duration),
    Failed(Reason),
}

/// In the order of playing: what a person knows by sight first, and no two of a kind in a row.
const DRILLS: &[Drill] = &[
    Drill {
        what: "the agent takes 3 s to join",
        // A little more: the server stamps the join in whole milliseconds, on a clock that is only estimated here.
        fault: "join_delay=3s50ms",
        rooms: Affected::One,
        expected: Expected::OkLate(Duration::from_secs(3)),
    },
    Drill {
        what: "the agent joins and stays silent",
        fault: "silent_track",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::AgentSilent),
    },
    Drill {
        what: "the signal connection gets HTTP 429, Retry-After",
        fault: "upgrade=429,retry_after=30s",
        rooms: Affected::All,
        expected: Expected::Failed(Reason::PlanLimit(LimitKind::Connections)),
    },
    Drill {
        what: "no worker accepts the job",
        fault: "never_accepts",
        rooms: Affected::All,
        expected: Expected::Failed(Reason::DispatchUnanswered),
    },
    Drill {
        what: "the agent leaves while it greets",
        fault: "leaves_early=800ms",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::AgentLeftEarly),
    },
    Drill {
        what: "the signal connection drops",
        fault: "after_join=drop",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::SignalLost),
    },
    Drill {
        what: "the agent joins without an audio track",
        fault: "no_track",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::AgentNoTrack),
    },
    Drill {
        what: "the server's node is full, HTTP 503",
        fault: "upgrade=503",
        rooms: Affected::All,
        expected: Expected::Failed(Reason::PlanLimit(LimitKind::Node)),
    },
    Drill {
        what: "a second agent joins",
        fault: "duplicate",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::AgentDuplicate),
    },
    Drill {
        what: "no media packet gets through",
        fault: "no_media",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::MediaFailed),
    },
    Drill {
        what: "a worker accepts the job and never joins",
        fault: "never_joins",
        rooms: Affected::All,
        expected: Expected::Failed(Reason::AgentNoShow),
    },
    Drill {
        what: "the agent never answers what it hears",
        fault: "no_reply",
        rooms: Affected::One,
        expected: Expected::Failed(Reason::AgentNoReply),
    },
    Drill {
        what: "the plan's agent sessions are used up",
        fault: "create_dispatch=resource_exhausted",
        rooms: Affected::All,
        expected: Expected::Failed(Reason::PlanLimit(LimitKind::AgentSessions)),
    },
];

impl Drill {
    /// What is played in batch `number`, counted from 1.
    fn of_batch(number: usize) -> Option<&'static Self> {
        let faulty = number.checked_sub(GOOD_AT_FIRST + 1)?;
        faulty
            .is_multiple_of(2)
            .then(|| &DRILLS[faulty / 2 % DRILLS.len()])
    }

    /// Index of the one affected room of a batch; `None` where all are.
    fn only_room(&self, rooms: usize) -> Option<usize> {
        (self.rooms == Affected::One).then(|| rooms.min(2) - 1)
    }

    /// `seen`: the rooms that the sandbox has numbered so far.
    fn rule(&self, rooms: usize, seen: u64) -> Rule {
        let mut rule: Rule = self.fault.parse().expect("a test reads every fault");
        if let Some(index) = self.only_room(rooms) {
            rule.rooms = Rooms::Nth(seen + index as u64 + 1);
        }
        rule
    }

    fn announcement(&self, rooms: usize) -> String {
        match self.only_room(rooms) {
            Some(index) if rooms > 1 => format!("fault in room {}: {}", index + 1, self.what),
            _ => format!("fault: {}", self.what),
        }
    }
}

impl Expected {
    fn of_room(drill: Option<&Drill>, index: usize, rooms: usize) -> Self {
        match drill {
            Some(drill) if drill.only_room(rooms).is_none_or(|only| only == index) => {
                drill.expected
            }
            _ => Self::Ok,
        }
    }

    fn is_met_by(self, probe: &ProbeReport) -> bool {
        let report = &probe.report;
        match (self, &report.outcome) {
            (Self::Ok, Outcome::Ok) => true,
            (Self::OkLate(least), Outcome::Ok) => {
                let join = report.timeline.span(Span::AgentJoin);
                join.is_some_and(|join| join >= least)
            }
            (Self::Failed(reason), Outcome::Failed(failure)) => failure.reason == reason,
            _ => false,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Ok => "ok".to_owned(),
            Self::OkLate(least) => format!("ok, with a join delay of {least:?} or more"),
            Self::Failed(reason) => phrasing::reason(reason),
        }
    }
}

pub(super) fn run(args: &Demo) -> anyhow::Result<Exit> {
    let screen = Screen::live_table(args.rooms);
    // The demo tells of failed rooms and of skipped ticks in its own way.
    super::start_logging(screen.log_writer(), Screen::colour(), "error");
    let runtime = super::runtime()?;
    let exit = runtime.block_on(perform(args, screen));
    runtime.shutdown_background();
    exit
}

async fn perform(args: &Demo, screen: Screen) -> anyhow::Result<Exit> {
    let signals = Signals::new()?;
    let sandbox = Sandbox::bind(Settings::default()).await?;
    let folder = tempfile::tempdir().context("can't make a folder for the history")?;
    let config = settings(&sandbox, args, folder.path())?;
    let listener = listen().await?;
    let page = format!("http://{}/", listener.local_addr()?);
    let url = sandbox.url();
    let handle = sandbox.handle();
    let stop_sandbox = CancellationToken::new();
    let serving = tokio::spawn(sandbox.run(stop_sandbox.clone()));

    let (told, seen) = mpsc::channel(MOST_TOLD);
    let (order, orders) = mpsc::channel(4);
    let again = config.clone();
    let launch = Launch {
        web: WebConfig::load(&config.daemon.http).map_err(anyhow::Error::msg)?,
        history: History::open(&config.daemon.history)?,
        config,
        reread: Box::new(move || Ok(again.clone())),
        listener,
        build: super::run::build(),
        fault: None,
        observer: Some(director(handle.clone(), args.rooms, told)),
    };
    let stage = Stage {
        handle,
        screen,
        signals,
        seen,
        order,
        daemon: tokio::spawn(daemon::run(launch, orders)),
    };
    let introduction = introduction(args, &url, &page);
    let exit = stage.play(args, &introduction).await;
    stop_sandbox.cancel();
    serving.await.context("the sandbox died")?;
    exit
}

/// The settings are read as a user's are, but from here alone: no environment can send the demo to a real project.
fn settings(sandbox: &Sandbox, args: &Demo, folder: &Path) -> Result<Config, Problems> {
    let variables = [
        ("LIVEKIT_URL", sandbox.url()),
        ("LIVEKIT_API_KEY", sandbox.api_key().to_owned()),
        (
            "LIVEKIT_API_SECRET",
            sandbox.api_secret().expose_secret().to_owned(),
        ),
    ];
    let variables = variables.map(|(name, value)| (name.into(), value.into()));
    let mut draft = Draft::read(None, variables)?;
    for (key, value) in SETTINGS {
        draft.set_by_flag(TARGET, key, (*value).to_owned(), TARGET);
    }
    for (key, value) in DAEMON_SETTINGS {
        draft.set(key, (*value).to_owned(), TARGET);
    }
    let folder = folder.display().to_string();
    draft.set(&["history", "dir"], folder, TARGET);
    let every = humantime::format_duration(args.every).to_string();
    draft.set_by_flag(TARGET, &["schedule", "every"], every, "--every");
    let rooms = args.rooms.to_string();
    draft.set_by_flag(TARGET, &["batch", "rooms"], rooms, "--rooms");
    draft.validate()
}

/// The daemon's own port, or any where that is taken.
async fn listen() -> anyhow::Result<TcpListener> {
    let port = Http::default().listen.port();
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("can't listen on loopback"),
    }
}

/// What the daemon's batches are told as, in their order.
enum Told {
    Beginning { number: usize },
    Event(BatchEvent),
    Ended(Arc<BatchReport>),
}

/// Has the sandbox play what is due before a batch begins, and passes on what becomes of it.
fn director(handle: Handle, rooms: usize, told: mpsc::Sender<Told>) -> Observer {
    let begun = AtomicUsize::new(0);
    Arc::new(move |moment| {
        let told_of = match moment {
            Moment::Beginning { .. } => {
                let number = begun.fetch_add(1, Ordering::Relaxed) + 1;
                let drill = Drill::of_batch(number);
                let rule = drill.map(|drill| drill.rule(rooms, handle.rooms_seen()));
                handle.set_faults(rule.into_iter().collect());
                Told::Beginning { number }
            }
            Moment::Event(event) => Told::Event(event.clone()),
            Moment::Ended(report) => Told::Ended(Arc::clone(report)),
        };
        if told.try_send(told_of).is_err() {
            tracing::debug!("nobody looks at the demo any more");
        }
    })
}

/// What is shown, and the daemon behind it.
struct Stage {
    handle: Handle,
    screen: Screen,
    signals: Signals,
    seen: mpsc::Receiver<Told>,
    order: mpsc::Sender<Order>,
    daemon: JoinHandle<anyhow::Result<Ending>>,
}

impl Stage {
    async fn play(mut self, args: &Demo, introduction: &str) -> anyhow::Result<Exit> {
        let mut exit = None;
        if print_unless_closed(introduction)? {
            self.tell(Order::Batch(TARGET.to_owned()));
        } else {
            self.tell(Order::Stop);
        }
        let mut number = 0;
        let mut refresh = interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            tokio::select! {
                // What happened is shown before the end is.
                biased;
                Some(told) = self.seen.recv(), if exit.is_none() => match told {
                    Told::Beginning { number: begun } => {
                        number = begun;
                        let heading = heading(number, Drill::of_batch(number), args.rooms);
                        if !print_unless_closed(&heading)? {
                            self.tell(Order::Stop);
                        }
                    }
                    Told::Event(event) => self.screen.show(event),
                    Told::Ended(report) => {
                        self.screen.close();
                        let read = print_unless_closed(&result(number, &report, args.rooms))?;
                        if args.once || !read {
                            exit = Some(if args.once { verdict(&report) } else { Exit::Ok });
                            self.tell(Order::Stop);
                        }
                    }
                },
                ended = &mut self.daemon => break ended,
                () = self.signals.next() => {
                    self.screen.close();
                    exit.get_or_insert(if args.once { Exit::Aborted } else { Exit::Ok });
                    self.tell(Order::Stop);
                }
                _ = refresh.tick() => self.screen.refresh(),
            }
        };
        ended.context("the daemon died")??;
        if !args.once {
            let left = match self.handle.rooms().len() {
                0 => "none is left".to_owned(),
                left => format!("{left} are left"),
            };
            let opened = self.handle.rooms_seen();
            print_unless_closed(&format!("Stopped. Of the {opened} rooms opened, {left}.\n"))?;
        }
        Ok(exit.unwrap_or(Exit::Ok))
    }

    /// An order that finds no place is one of many of its kind.
    fn tell(&self, order: Order) {
        if let Err(error) = self.order.try_send(order) {
            tracing::debug!("the daemon takes no orders: {error}");
        }
    }
}

fn result(number: usize, report: &BatchReport, rooms: usize) -> String {
    let mut text = rows(report);
    for said in [phrasing::summary(report), table::reasons(report)] {
        table::push_indented(&mut text, said.lines());
    }
    text.push_str(&judgement(Drill::of_batch(number), report, rooms));
    text
}

fn introduction(args: &Demo, url: &str, page: &str) -> String {
    let rooms = match args.rooms {
        1 => "1 room".to_owned(),
        rooms => format!("{rooms} rooms"),
    };
    let (often, then) = if args.once {
        (String::new(), String::new())
    } else {
        (
            format!(" every {}", humantime::format_duration(args.every)),
            format!(
                "The first {GOOD_AT_FIRST} batches go well, then every other one meets a fault. \
                 Ctrl-C ends it.\n"
            ),
        )
    };
    format!(
        "A LiveKit server with a demo agent runs on this machine ({url}).\n\
         The canary opens {rooms}{often}. In each it calls the agent, waits for\n\
         its first words, plays them back to it and waits for the reply. Join delay and\n\
         first speech count from the call, reply from the end of what was played back.\n\
         Its page is at {page} and its metrics at {page}metrics.\n{then}"
    )
}

fn heading(number: usize, drill: Option<&Drill>, rooms: usize) -> String {
    let what = match drill {
        Some(drill) => style(drill.announcement(rooms)).yellow(),
        None => style("no fault".to_owned()),
    };
    let time = Utc::now().format("%H:%M:%S");
    let batch = style(format!("Batch {number}")).bold();
    format!("\n{batch}, {time} UTC, {}\n", what.bold())
}

/// Fewer columns than the table of `once`, so that batch below batch is easy to compare.
fn rows(batch: &BatchReport) -> String {
    let head = format!("  room  {}", table::BRIEF_HEAD);
    let mut text = format!("{}\n", style(head).dim());
    for (index, probe) in batch.probes.iter().enumerate() {
        let row = table::brief_of(&probe.report);
        writeln!(text, "  {:>4}  {row}", index + 1).expect("writing to a string can't fail");
    }
    text
}

/// Whether the canary said of each room what was played there.
fn judgement(drill: Option<&Drill>, batch: &BatchReport, rooms: usize) -> String {
    let wrong: Vec<String> = batch
        .probes
        .iter()
        .enumerate()
        .filter_map(|(index, probe)| {
            let expected = Expected::of_room(drill, index, rooms);
            (!expected.is_met_by(probe))
                .then(|| format!("room {} should be {}", index + 1, expected.describe()))
        })
        .collect();
    let judgement = if wrong.is_empty() {
        style("As expected.".to_owned()).green()
    } else {
        style(format!("NOT what was played: {}.", wrong.join(", "))).red()
    };
    format!("  {judgement}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::sample::{WELL, batch, failed, probe};
    use crate::probe::Evidence;

    fn silent_in(room: u8, rooms: u8) -> BatchReport {
        let outcome = |index| {
            if index == room {
                failed(Reason::AgentSilent, "no speech")
            } else {
                Outcome::Ok
            }
        };
        let probes = (1..=rooms).map(|room| probe(room, outcome(room), Evidence::default(), WELL));
        batch(probes.collect(), None)
    }

    fn drill(fault: &str) -> &'static Drill {
        DRILLS.iter().find(|drill| drill.fault == fault).unwrap()
    }

    #[test]
    fn every_drill_has_a_fault_that_the_sandbox_knows() {
        for drill in DRILLS {
            assert_eq!(drill.rule(3, 0).fault.to_string(), drill.fault);
        }
    }

    #[test]
    fn every_heading_fits_80_columns() {
        for drill in DRILLS {
            let heading = heading(999, Some(drill), 3);
            assert!(
                console::measure_text_width(heading.trim()) <= 80,
                "{heading}"
            );
        }
    }

    #[test]
    fn every_drill_is_played_with_a_good_batch_between() {
        let good = |number| Drill::of_batch(number).is_none();
        assert!(good(1) && good(2));
        let last = GOOD_AT_FIRST + 2 * DRILLS.len();
        for number in GOOD_AT_FIRST + 1..=last {
            assert_eq!(good(number), (number - GOOD_AT_FIRST).is_multiple_of(2));
        }
        let played = (1..=last).filter_map(Drill::of_batch);
        let faults: Vec<&str> = played.map(|drill| drill.fault).collect();
        assert_eq!(
            faults,
            DRILLS.iter().map(|drill| drill.fault).collect::<Vec<_>>()
        );
        assert_eq!(Drill::of_batch(last + 1).unwrap().fault, DRILLS[0].fault);
    }

    #[test]
    fn rooms_of_earlier_batches_are_counted_where_one_room_is_meant() {
        let silent = drill("silent_track");
        assert_eq!(silent.rule(3, 6).to_string(), "room8:silent_track");
        assert_eq!(silent.rule(1, 6).to_string(), "room7:silent_track");
        assert_eq!(
            drill("never_accepts").rule(3, 6).to_string(),
            "never_accepts"
        );
    }

    #[test]
    fn what_the_canary_says_is_held_against_what_was_played() {
        let silent = drill("silent_track");
        let good =
            |drill, report: &BatchReport| judgement(drill, report, 3).contains("As expected");
        assert!(good(Some(silent), &silent_in(2, 3)));
        assert!(good(None, &silent_in(0, 3)));
        assert!(!good(Some(silent), &silent_in(0, 3)), "a missed fault");
        assert!(!good(Some(silent), &silent_in(3, 3)), "another room");
        assert!(
            !good(Some(drill("no_track")), &silent_in(2, 3)),
            "another reason"
        );
        assert!(!good(None, &silent_in(1, 3)), "a false alarm");
        assert!(
            !good(Some(drill("join_delay=3s50ms")), &silent_in(0, 3)),
            "a short join delay"
        );
    }
}
