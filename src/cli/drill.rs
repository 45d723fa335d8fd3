//! `drill`: a fault that is played to the daemon's own pipeline, so that a team sees its alerts arrive, and resolve.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use chrono::Utc;
use console::style;
use humantime::format_duration;
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, sleep_until};

use super::progress::Screen;
use super::rehearsal::{self, How, Rehearsal};
use super::sandboxed::{
    LocalEvent, SandboxedDaemon, Setup, Wanted, heading, judgement, listen, result,
};
use super::{DrillArgs, Exit, phrasing, print_unless_closed};
use crate::batch::BatchEvent;
use crate::config::{Config, Problems};
use crate::daemon::Order;
use crate::probe::driver::Fault;
use crate::probe::{LimitKind, Outcome, Reason};
use crate::report::BatchReport;
use crate::sandbox::fault::FaultRule;
use crate::sandbox::{Sandbox, SandboxSettings};
use crate::telemetry;

const PROJECT: &str = "drill";

/// Plays nothing: the canary on a service that works.
const NO_FAULT: &str = "ok";

/// Which of two batches a fault fell into is not known more exactly: the daemon is told, and has its own work first.
const SETTLING: Duration = Duration::from_secs(1);

/// What REASON may be.
pub(super) fn reasons() -> Vec<&'static str> {
    let reasons = Reason::ALL.iter().map(|reason| reason.label());
    reasons.chain([NO_FAULT]).collect()
}

/// What `--limit` may be.
pub(super) fn limits() -> Vec<&'static str> {
    LimitKind::ALL.map(LimitKind::label).to_vec()
}

pub(super) fn run(args: &DrillArgs) -> anyhow::Result<Exit> {
    let rehearsal = chosen(args)?;
    let screen = Screen::live_table(args.rooms);
    // What becomes of the batches is told in words.
    telemetry::log_to(screen.log_writer(), Screen::colour(), "error");
    let runtime = super::runtime()?;
    let exit = runtime.block_on(perform(args, rehearsal, screen));
    runtime.shutdown_background();
    exit
}

/// What the flags ask for; `None` plays no fault.
fn chosen(args: &DrillArgs) -> Result<Option<&'static Rehearsal>, Problems> {
    let found = rehearsal::ALL.iter().find(|one| match one.reason {
        Reason::PlanLimit(kind) => {
            args.reason == one.reason.label() && args.limit.as_deref() == Some(kind.label())
        }
        reason => args.reason == reason.label(),
    });
    let plan_limit = Reason::PlanLimit(LimitKind::Other).label();
    if args.limit.is_some() && args.reason != plan_limit {
        return Err(Problems::single(
            format!("--limit changes nothing: the reason is {}", args.reason),
            format!("it goes with {plan_limit}"),
        ));
    }
    let course = [
        ("--after", args.after.is_some()),
        ("--recover-after", args.recover_after.is_some()),
    ];
    let useless = course.iter().find(|(_, given)| *given && found.is_none());
    if let Some((flag, _)) = useless {
        return Err(Problems::single(
            format!("{flag} changes nothing: {NO_FAULT} plays no fault"),
            "leave it out, or choose a reason",
        ));
    }
    if let (Some(whole), Some(after)) = (args.whole, args.after)
        && after >= whole
    {
        return Err(Problems::single(
            "the drill is over before its fault begins",
            "make --after shorter than --for",
        ));
    }
    Ok(found)
}

async fn perform(
    args: &DrillArgs,
    rehearsal: Option<&'static Rehearsal>,
    screen: Screen,
) -> anyhow::Result<Exit> {
    let sandbox = Sandbox::bind(SandboxSettings::default()).await?;
    let temporary = tempfile::tempdir().context("can't make a folder for the history")?;
    let closed = ClosedPort::reserve().context("can't reserve a port on loopback")?;
    let wanted = Wanted {
        target: target(rehearsal),
        project: PROJECT,
        rooms: args.rooms,
        every: args.every,
        history_dir: (args.history_dir.clone()).unwrap_or_else(|| temporary.path().to_owned()),
    };
    let good = wanted.draft(&sandbox)?.validate()?;
    let bad = match rehearsal.map(|rehearsal| &rehearsal.how) {
        Some(How::Settings(wrong)) => {
            let mut draft = wanted.draft(&sandbox)?;
            wrong.lay(&mut draft, PROJECT, &sandbox.url(), closed.number());
            draft.validate()?
        }
        _ => good.clone(),
    };
    let fault = Staging {
        how: rehearsal.map(|rehearsal| &rehearsal.how),
        good,
        bad,
    };
    let at_once = args.after.is_none();
    let setup = Setup {
        listener: listen(args.listen_address).await?,
        screen,
        fault: fault.of_probes(at_once),
        drill: true,
        before_batch: Box::new(|_, _| {}),
    };
    sandbox.handle().set_faults(fault.of_sandbox(at_once));
    let url = sandbox.url();
    let daemon = SandboxedDaemon::start(sandbox, fault.config(at_once), setup)?;
    let mut drill = Drill::new(args, rehearsal, fault, &wanted.target, daemon);
    let exit = drill
        .play(&introduction(
            args,
            rehearsal,
            &wanted.target,
            &url,
            &drill.daemon.page,
        ))
        .await;
    drill.daemon.close().await?;
    exit
}

/// A name that an alert's route can tell from those of real targets: `drill-agent-silent`.
fn target(rehearsal: Option<&Rehearsal>) -> String {
    let what = match rehearsal.map(|rehearsal| rehearsal.reason) {
        Some(Reason::PlanLimit(kind)) => format!("plan-limit-{}", kind.label()),
        Some(reason) => reason.label().to_owned(),
        None => NO_FAULT.to_owned(),
    };
    format!("drill-{}", what.replace('_', "-"))
}

/// A port of loopback that is taken and refuses every connection, since nobody listens on it.
struct ClosedPort {
    _socket: Socket,
    address: SocketAddr,
}

impl ClosedPort {
    fn reserve() -> std::io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        let address = socket.local_addr()?.as_socket();
        Ok(Self {
            _socket: socket,
            address: address.expect("it was bound to such an address"),
        })
    }

    fn number(&self) -> u16 {
        self.address.port()
    }
}

/// A fault, ready to be played and taken away.
struct Staging {
    how: Option<&'static How>,
    good: Config,
    bad: Config,
}

impl Staging {
    fn of_sandbox(&self, on: bool) -> Vec<FaultRule> {
        match self.how {
            Some(How::Sandbox(fault)) if on => {
                vec![fault.parse().expect("a test reads every fault")]
            }
            _ => Vec::new(),
        }
    }

    fn of_probes(&self, on: bool) -> Option<Fault> {
        let panics = on && self.how == Some(&How::Panic);
        panics.then_some(Fault::Panic { index: None })
    }

    fn config(&self, on: bool) -> Config {
        if on { &self.bad } else { &self.good }.clone()
    }

    /// Has it played from the next batch on, or no more.
    fn turn(&self, on: bool, daemon: &SandboxedDaemon) {
        match self.how {
            Some(How::Sandbox(_)) => daemon.handle.set_faults(self.of_sandbox(on)),
            Some(How::Settings(_)) => daemon.set_config(self.config(on)),
            Some(How::Panic) => daemon.tell(Order::Play(self.of_probes(on))),
            None => {}
        }
    }
}

/// Where the drill is in its course.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Act {
    Before,
    Fault,
    After,
}

struct Drill {
    rehearsal: Option<&'static Rehearsal>,
    staging: Staging,
    target: String,
    once: bool,
    daemon: SandboxedDaemon,
    act: Act,
    /// When the next act begins.
    turn_at: Option<Instant>,
    recover_after: Option<Duration>,
    over_at: Option<Instant>,
    turned_at: Option<Instant>,
    /// How many have begun.
    batches: usize,
    /// What is played in the batch that runs; `None` where that has changed under way.
    batch: Option<Act>,
    exit: Exit,
}

impl Drill {
    fn new(
        args: &DrillArgs,
        rehearsal: Option<&'static Rehearsal>,
        staging: Staging,
        target: &str,
        daemon: SandboxedDaemon,
    ) -> Self {
        let now = Instant::now();
        let wait = args.after.or(args.recover_after);
        Self {
            rehearsal,
            staging,
            target: target.to_owned(),
            once: args.once,
            daemon,
            act: if args.after.is_some() {
                Act::Before
            } else {
                Act::Fault
            },
            turn_at: wait.map(|wait| now + wait),
            recover_after: args.recover_after,
            over_at: args.whole.map(|whole| now + whole),
            turned_at: None,
            batches: 0,
            batch: None,
            exit: Exit::Ok,
        }
    }

    async fn play(&mut self, introduction: &str) -> anyhow::Result<Exit> {
        self.say(introduction)?;
        self.daemon.tell(Order::Batch(self.target.clone()));
        loop {
            tokio::select! {
                // A batch that began before the fault is told so.
                biased;
                happened = self.daemon.next() => match happened? {
                    LocalEvent::Batch(BatchEvent::Started { .. }) => self.begun()?,
                    LocalEvent::Batch(BatchEvent::Ended(report)) => self.ended(&report)?,
                    LocalEvent::Batch(_) => {}
                    LocalEvent::Interrupted => {
                        if self.once {
                            self.exit = Exit::Aborted;
                        }
                        self.stop();
                    }
                    LocalEvent::Stopped => break,
                },
                () = at(self.turn_at) => self.turn()?,
                () = at(self.over_at) => self.stop(),
            }
        }
        Ok(self.exit)
    }

    fn turn(&mut self) -> anyhow::Result<()> {
        self.batch = None;
        self.turned_at = Some(Instant::now());
        let begins = self.act == Act::Before;
        self.staging.turn(begins, &self.daemon);
        let what = if begins { "begins" } else { "ends" };
        if begins {
            self.act = Act::Fault;
            self.turn_at = self.recover_after.map(|wait| Instant::now() + wait);
        } else {
            self.act = Act::After;
            self.turn_at = None;
        }
        let time = Utc::now().format("%H:%M:%S");
        let line = style(format!("{time} UTC, the fault {what}.")).bold();
        self.say(&format!("\n{line}\n"))
    }

    fn begun(&mut self) -> anyhow::Result<()> {
        self.batches += 1;
        let settled = self.turned_at.is_none_or(|at| at.elapsed() > SETTLING);
        self.batch = settled.then_some(self.act);
        let fault = self.played(self.act);
        let fault = fault.map(|rehearsal| format!("fault: {}", rehearsal.what));
        self.say(&heading(self.batches, fault))
    }

    /// What is played in an act.
    fn played(&self, act: Act) -> Option<&'static Rehearsal> {
        self.rehearsal.filter(|_| act == Act::Fault)
    }

    fn ended(&mut self, report: &BatchReport) -> anyhow::Result<()> {
        let judged = match self.batch.take() {
            Some(act) => {
                let wrong = wrong(self.played(act), report);
                if !wrong.is_empty() {
                    self.exit = Exit::Fault;
                }
                judgement(&wrong)
            }
            None => "  Not judged: the fault began or ended meanwhile.\n".to_owned(),
        };
        self.say(&(result(report) + &judged))?;
        if self.once {
            self.stop();
        }
        Ok(())
    }

    /// Whoever closed the pipe has seen enough.
    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        if !print_unless_closed(text)? {
            self.stop();
        }
        Ok(())
    }

    fn stop(&mut self) {
        (self.turn_at, self.over_at) = (None, None);
        self.daemon.stop();
    }
}

/// Never, where there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The rooms of which the canary said something else than what was played.
fn wrong(played: Option<&Rehearsal>, batch: &BatchReport) -> Vec<String> {
    let expected = played.map(|rehearsal| rehearsal.reason);
    let describe = expected.map_or_else(|| NO_FAULT.to_owned(), phrasing::reason);
    let rooms = batch.probes.iter().enumerate();
    rooms
        .filter(|(_, probe)| match &probe.outcome {
            Outcome::Ok => expected.is_some(),
            Outcome::Failed(failure) => Some(failure.reason) != expected,
            Outcome::Aborted => false,
        })
        .map(|(index, _)| format!("room {} should be {describe}", index + 1))
        .collect()
}

fn introduction(
    args: &DrillArgs,
    rehearsal: Option<&Rehearsal>,
    target: &str,
    url: &str,
    page: &str,
) -> String {
    let what = match rehearsal {
        Some(rehearsal) => format!(
            "{} ({}, origin {})",
            rehearsal.what,
            phrasing::reason(rehearsal.reason),
            rehearsal.reason.origin().label()
        ),
        None => "no fault".to_owned(),
    };
    let often = if args.once {
        "One batch".to_owned()
    } else {
        format!("A batch every {}", format_duration(args.every))
    };
    let begins = match args.after {
        Some(after) => format!("The fault begins after {}", format_duration(after)),
        None => "The fault is there from the start".to_owned(),
    };
    let ends = match args.recover_after {
        Some(recover) => format!("{begins} and ends {} later. ", format_duration(recover)),
        None => format!("{begins}. "),
    };
    let course = if rehearsal.is_some() { &ends } else { "" };
    let end = match args.whole {
        _ if args.once => String::new(),
        Some(whole) => format!("The drill ends after {}.", format_duration(whole)),
        None => "Ctrl-C ends the drill.".to_owned(),
    };
    format!(
        "Fire drill: {what}.\n\
         {often} against a LiveKit server with a demo agent on this machine ({url}).\n\
         The target is {target}, and its target_info says drill=\"true\".\n\
         Its page is at {page} and its metrics at {page}metrics.\n\
         {course}{end}\n"
    )
}
