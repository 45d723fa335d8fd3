//! `drill`: injects a fault into what the daemon probes, so that a team sees its alerts arrive and resolve.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use chrono::Utc;
use console::style;
use humantime::format_duration;
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, sleep_until};

use super::fault_catalogue::{CatalogueFault, FAULTS, Injection};
use super::local_daemon::{
    LocalDaemon, LocalEvent, LocalSetup, LocalTarget, batch_result, comparison, heading, listen,
};
use super::progress::ProgressView;
use super::{DrillArgs, Exit, format, print_error, print_unless_closed};
use crate::batch::BatchEvent;
use crate::config::{Config, Problems, RecordAudio};
use crate::daemon::DaemonCommand;
use crate::probe::driver::ProbeFault;
use crate::probe::{LimitKind, Outcome, Reason};
use crate::report::{BatchReport, counted};
use crate::sandbox::fault::FaultRule;
use crate::sandbox::{Sandbox, SandboxSettings};
use crate::telemetry;

const PROJECT: &str = "drill";

/// The REASON that injects no fault.
const NO_FAULT: &str = "ok";

/// How long a switch of the fault takes to reach the daemon. A batch that starts meanwhile can run with or without it.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// The values of REASON.
pub(super) fn reasons() -> Vec<&'static str> {
    let reasons = Reason::ALL.iter().map(|reason| reason.label());
    reasons.chain([NO_FAULT]).collect()
}

/// The values of `--limit`.
pub(super) fn limits() -> Vec<&'static str> {
    LimitKind::ALL.map(LimitKind::label).to_vec()
}

pub(super) fn run(args: &DrillArgs) -> anyhow::Result<Exit> {
    let Some(reason) = args.reason.as_deref() else {
        print_error(&format!("error: no reason is given\n\n{}", list()));
        return Ok(Exit::Config);
    };
    let fault = selected(args, reason)?;
    let view = ProgressView::live_table(args.rooms);
    // Only errors: the drill prints the result of each batch itself.
    telemetry::log_to(view.log_writer(), ProgressView::colour(), "error");
    let runtime = super::runtime()?;
    let exit = runtime.block_on(run_drill(args, fault, view));
    runtime.shutdown_background();
    exit
}

/// Returns every REASON with the fault that the drill injects, in 80 columns.
fn list() -> String {
    let mut text = "The reasons, and the fault that the drill injects for each:\n".to_owned();
    let mut limits = "With plan_limit, --limit names the kind:\n".to_owned();
    for CatalogueFault {
        reason,
        description,
        ..
    } in FAULTS
    {
        let (list, name) = match reason {
            Reason::PlanLimit(kind) => (&mut limits, kind.label()),
            reason => (&mut text, reason.label()),
        };
        writeln!(list, "  {name:<20} {description}").expect("writing to a string cannot fail");
    }
    let plan_limit = Reason::PlanLimit(LimitKind::Other).label();
    format!(
        "{text}  {plan_limit:<20} a plan limit is reached\n  {NO_FAULT:<20} no fault\n\n{limits}\n\
         hint: livekit-canary drill {}",
        Reason::AgentSilent.label()
    )
}

/// Returns the fault that the flags select, and `None` for [`NO_FAULT`].
fn selected(args: &DrillArgs, wanted: &str) -> Result<Option<&'static CatalogueFault>, Problems> {
    let found = FAULTS.iter().find(|fault| match fault.reason {
        Reason::PlanLimit(kind) => {
            wanted == fault.reason.label() && args.limit.as_deref() == Some(kind.label())
        }
        reason => wanted == reason.label(),
    });
    let plan_limit = Reason::PlanLimit(LimitKind::Other).label();
    if args.limit.is_some() && wanted != plan_limit {
        return Err(Problems::single(
            format!("--limit has no effect: the reason is {wanted}"),
            format!("use it only with {plan_limit}"),
        ));
    }
    let fault_times = [
        ("--after", args.after.is_some()),
        ("--recover-after", args.recover_after.is_some()),
    ];
    let useless = fault_times
        .iter()
        .find(|(_, given)| *given && found.is_none());
    if let Some((flag, _)) = useless {
        return Err(Problems::single(
            format!("{flag} has no effect: {NO_FAULT} injects no fault"),
            "remove it, or choose a reason",
        ));
    }
    if let (Some(duration), Some(after)) = (args.duration, args.after)
        && after >= duration
    {
        return Err(Problems::single(
            "the drill ends before its fault begins",
            "make --after shorter than --for",
        ));
    }
    Ok(found)
}

async fn run_drill(
    args: &DrillArgs,
    fault: Option<&'static CatalogueFault>,
    view: ProgressView,
) -> anyhow::Result<Exit> {
    let sandbox = Sandbox::bind(SandboxSettings::default()).await?;
    let temporary = tempfile::tempdir().context("cannot create a folder for the history")?;
    let closed = ClosedPort::reserve().context("cannot reserve a port on loopback")?;
    let target = LocalTarget {
        target: target_name(fault),
        project: PROJECT,
        rooms: args.rooms,
        every: args.every,
        history_dir: (args.history_dir.clone()).unwrap_or_else(|| temporary.path().to_owned()),
        record: RecordAudio::Never,
    };
    let scene = fault.map(|fault| &fault.scene);
    let draft = || {
        let mut draft = target.draft(&sandbox)?;
        for (key, value) in scene.map(|scene| scene.settings).unwrap_or_default() {
            draft.set_by_flag(&target.target, key, (*value).to_owned(), "drill");
        }
        Ok::<_, Problems>(draft)
    };
    let good = draft()?.validate()?;
    let bad = match fault.map(|fault| &fault.injection) {
        Some(Injection::Setting(setting)) => {
            let mut draft = draft()?;
            setting.apply(&mut draft, PROJECT, &sandbox.url(), closed.number());
            draft.validate()?
        }
        _ => good.clone(),
    };
    let switch = FaultSwitch {
        injection: fault.map(|fault| &fault.injection),
        agent: scene.and_then(|scene| scene.agent),
        good,
        bad,
    };
    let at_once = args.after.is_none();
    let setup = LocalSetup {
        listener: listen(args.listen_address).await?,
        view,
        fault: switch.of_probes(at_once),
        drill: true,
        before_batch: Box::new(|_, _| {}),
    };
    sandbox.handle().set_faults(switch.of_sandbox(at_once));
    let url = sandbox.url();
    let daemon = LocalDaemon::start(sandbox, switch.config(at_once), setup)?;
    let mut drill = Drill::new(args, fault, switch, daemon);
    let exit = drill
        .run(&introduction(
            args,
            fault,
            &target.target,
            &url,
            &drill.daemon.page,
        ))
        .await;
    drill.daemon.close().await?;
    exit
}

/// Returns a target name such as `drill-agent-silent`. An alert route can match it, and no real target has it by chance.
fn target_name(fault: Option<&CatalogueFault>) -> String {
    let what = match fault.map(|fault| fault.reason) {
        Some(Reason::PlanLimit(kind)) => format!("plan-limit-{}", kind.label()),
        Some(reason) => reason.label().to_owned(),
        None => NO_FAULT.to_owned(),
    };
    format!("drill-{}", what.replace('_', "-"))
}

/// A reserved loopback port that refuses every connection: its socket is bound, but does not listen.
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
            address: address.expect("the socket was bound to an IPv4 address"),
        })
    }

    fn number(&self) -> u16 {
        self.address.port()
    }
}

/// Turns the fault on and off.
struct FaultSwitch {
    injection: Option<&'static Injection>,
    /// What the sandbox's agent does in every batch.
    agent: Option<&'static str>,
    good: Config,
    /// [`FaultSwitch::good`] with the bad setting, if the fault is one.
    bad: Config,
}

impl FaultSwitch {
    fn of_sandbox(&self, on: bool) -> Vec<FaultRule> {
        let injected = match self.injection {
            Some(Injection::Sandbox(rule)) if on => Some(*rule),
            _ => None,
        };
        let rules = self.agent.into_iter().chain(injected);
        let parse = |rule: &str| rule.parse().expect("a test parses every rule");
        rules.map(parse).collect()
    }

    fn of_probes(&self, on: bool) -> Option<ProbeFault> {
        let panics = on && self.injection == Some(&Injection::Panic);
        panics.then_some(ProbeFault::Panic { index: None })
    }

    fn config(&self, on: bool) -> Config {
        if on { &self.bad } else { &self.good }.clone()
    }

    /// Turns the fault on or off. Batches that start later see it.
    fn set(&self, on: bool, daemon: &LocalDaemon) {
        match self.injection {
            Some(Injection::Sandbox(_)) => daemon.handle.set_faults(self.of_sandbox(on)),
            Some(Injection::Setting(_)) => daemon.set_config(self.config(on)),
            Some(Injection::Panic) => daemon.send(DaemonCommand::SetFault(self.of_probes(on))),
            None => {}
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DrillPhase {
    BeforeFault,
    Fault,
    AfterFault,
}

struct Drill {
    fault: Option<&'static CatalogueFault>,
    switch: FaultSwitch,
    once: bool,
    daemon: LocalDaemon,
    phase: DrillPhase,
    /// When the next phase begins; `None` if this is the last.
    switch_at: Option<Instant>,
    recover_after: Option<Duration>,
    end_at: Option<Instant>,
    switched_at: Option<Instant>,
    /// The number of batches that have started.
    batches: usize,
    /// The phase that the running batch belongs to; `None` if the phase changed during it.
    batch_phase: Option<DrillPhase>,
    exit: Exit,
    sum: DrillSum,
}

/// What the drill has compared so far.
#[derive(Default)]
struct DrillSum {
    batches: usize,
    rooms: usize,
    as_expected: usize,
    /// Batches during which the fault began or ended.
    not_compared: usize,
}

impl DrillSum {
    fn text(&self) -> String {
        let batches = counted(self.batches as u64, "batch");
        let rooms = counted(self.rooms as u64, "room");
        let mut text = format!(
            "Sum: {batches}, {} of {rooms} as expected",
            self.as_expected
        );
        if self.not_compared > 0 {
            let batches = counted(self.not_compared as u64, "batch");
            write!(text, "; {batches} not compared").expect("writing to a string cannot fail");
        }
        text.push_str(".\n");
        text
    }
}

impl Drill {
    fn new(
        args: &DrillArgs,
        fault: Option<&'static CatalogueFault>,
        switch: FaultSwitch,
        daemon: LocalDaemon,
    ) -> Self {
        let now = Instant::now();
        let wait = args.after.or(args.recover_after);
        Self {
            fault,
            switch,
            once: args.once,
            daemon,
            phase: if args.after.is_some() {
                DrillPhase::BeforeFault
            } else {
                DrillPhase::Fault
            },
            switch_at: wait.map(|wait| now + wait),
            recover_after: args.recover_after,
            end_at: args.duration.map(|duration| now + duration),
            switched_at: None,
            batches: 0,
            batch_phase: None,
            exit: Exit::Ok,
            sum: DrillSum::default(),
        }
    }

    async fn run(&mut self, introduction: &str) -> anyhow::Result<Exit> {
        self.print(introduction)?;
        loop {
            tokio::select! {
                // In order, so that a batch that started before the switch is recorded before it.
                biased;
                event = self.daemon.next() => match event? {
                    LocalEvent::Batch(BatchEvent::Started) => self.batch_started()?,
                    LocalEvent::Batch(BatchEvent::Ended(report)) => self.batch_ended(&report)?,
                    LocalEvent::Batch(_) => {}
                    LocalEvent::Interrupted => {
                        if self.once {
                            self.exit = Exit::Aborted;
                        }
                        self.stop();
                    }
                    LocalEvent::Stopped => break,
                },
                () = sleep_until_some(self.switch_at) => self.switch_phase()?,
                () = sleep_until_some(self.end_at) => self.stop(),
            }
        }
        print_unless_closed(&format!("\n{}", self.sum.text()))?;
        Ok(self.exit)
    }

    fn switch_phase(&mut self) -> anyhow::Result<()> {
        self.batch_phase = None;
        self.switched_at = Some(Instant::now());
        let begins = self.phase == DrillPhase::BeforeFault;
        self.switch.set(begins, &self.daemon);
        let what = if begins { "begins" } else { "ends" };
        if begins {
            self.phase = DrillPhase::Fault;
            self.switch_at = self.recover_after.map(|wait| Instant::now() + wait);
        } else {
            self.phase = DrillPhase::AfterFault;
            self.switch_at = None;
        }
        let time = Utc::now().format("%H:%M:%S");
        let line = style(format!("{time} UTC, the fault {what}.")).bold();
        self.print(&format!("\n{line}\n"))
    }

    fn batch_started(&mut self) -> anyhow::Result<()> {
        self.batches += 1;
        let settled = self.switched_at.is_none_or(|at| at.elapsed() > SETTLE_TIME);
        self.batch_phase = settled.then_some(self.phase);
        let fault = self.fault_in(self.phase);
        let fault = fault.map(|fault| format!("fault: {}", fault.description));
        self.print(&heading(self.batches, fault))
    }

    fn fault_in(&self, phase: DrillPhase) -> Option<&'static CatalogueFault> {
        self.fault.filter(|_| phase == DrillPhase::Fault)
    }

    fn batch_ended(&mut self, report: &BatchReport) -> anyhow::Result<()> {
        let comparison = if let Some(phase) = self.batch_phase.take() {
            let mismatches = mismatches(self.fault_in(phase), report);
            // An aborted room shows neither.
            let aborted = report.summary().aborted;
            let rooms = report.probes.len() - aborted;
            self.sum.batches += 1;
            self.sum.rooms += rooms;
            self.sum.as_expected += rooms - mismatches.len();
            if !mismatches.is_empty() {
                self.exit = Exit::CanaryFailed;
            }
            comparison(&mismatches)
        } else {
            self.sum.not_compared += 1;
            "  Not compared: the fault began or ended during this batch.\n".to_owned()
        };
        self.print(&(batch_result(report) + &comparison))?;
        if self.once {
            self.stop();
        }
        Ok(())
    }

    /// Prints on stdout. If the reader has closed it, the drill stops.
    fn print(&mut self, text: &str) -> anyhow::Result<()> {
        if !print_unless_closed(text)? {
            self.stop();
        }
        Ok(())
    }

    fn stop(&mut self) {
        (self.switch_at, self.end_at) = (None, None);
        self.daemon.stop();
    }
}

/// Sleeps until `time`, or forever if it is `None`.
async fn sleep_until_some(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Returns the rooms in which the canary found something else than the injected fault.
fn mismatches(fault: Option<&CatalogueFault>, batch: &BatchReport) -> Vec<String> {
    let expected = fault.map(|fault| fault.reason);
    let description = expected.map_or_else(|| NO_FAULT.to_owned(), format::reason);
    let rooms = batch.probes.iter().enumerate();
    rooms
        .filter(|(_, probe)| match &probe.outcome {
            Outcome::Ok => expected.is_some(),
            Outcome::Failed(failure) => Some(failure.reason) != expected,
            Outcome::Aborted => false,
        })
        .map(|(index, _)| format!("room {} should be {description}", index + 1))
        .collect()
}

fn introduction(
    args: &DrillArgs,
    fault: Option<&CatalogueFault>,
    target: &str,
    url: &str,
    page: &str,
) -> String {
    let what = match fault {
        Some(fault) => format!(
            "{} ({}, origin {})",
            fault.description,
            format::reason(fault.reason),
            fault.reason.origin().label()
        ),
        None => "no fault".to_owned(),
    };
    let often = if args.once {
        "One batch runs".to_owned()
    } else {
        format!("A batch runs every {}", format_duration(args.every))
    };
    let begins = match args.after {
        Some(after) => format!("The fault begins after {}", format_duration(after)),
        None => "The fault begins at once".to_owned(),
    };
    let ends = match args.recover_after {
        Some(recover) => format!("{begins} and ends {} later. ", format_duration(recover)),
        None => format!("{begins}. "),
    };
    let fault_times = if fault.is_some() { &ends } else { "" };
    let end = match args.duration {
        _ if args.once => String::new(),
        Some(duration) => format!("The drill ends after {}.", format_duration(duration)),
        None => "Ctrl-C ends the drill.".to_owned(),
    };
    format!(
        "Drill: {what}.\n\
         {often} against a LiveKit server with a demo agent on this machine ({url}).\n\
         The target is {target}. Its series target_info has the label drill=\"true\".\n\
         The page is at {page} and the metrics are at {page}metrics.\n\
         {fault_times}{end}\n"
    )
}
