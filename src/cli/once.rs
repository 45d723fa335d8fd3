//! `once`: one batch now.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::progress::{REFRESH, Screen};
use super::{Exit, Format, Once, complain, junit, markdown, print, table};
use crate::batch;
use crate::config::{Config, Problems, Project, RampMode, RawConfig, Target};
use crate::janitor::{self, FINAL_DELETION_TIMEOUT, Janitor, UnconfirmedRoom};
use crate::livekit::wire;
use crate::probe::driver::{Context, Fault};
use crate::report::{BatchReport, json};
use crate::telemetry;

/// The target that flags and environment describe where no file does.
const IMPLIED_TARGET: &str = "default";

/// From the first signal: how long the batch may take to end itself, and when this process is gone, whatever hangs.
const ABORT_BATCH: Duration = Duration::from_millis(2500);
const ABORT_ALL: Duration = Duration::from_secs(4);

const NOTICEABLE: Duration = Duration::from_secs(1);

pub(super) fn run(args: &Once) -> anyhow::Result<Exit> {
    let (name, config) = settings(args)?;
    let (target, project) = chosen(&config, &name);
    let fault = Fault::from_env()?;
    let screen = Screen::new(target.batch.rooms);
    telemetry::log_to(screen.log_writer(), Screen::colour(), "warn");

    let (endpoint, api) =
        wire::access(&project).with_context(|| format!("project {:?}", target.project))?;
    let runtime = super::runtime()?;
    let exit = runtime.block_on(async {
        let context = Context {
            project: Arc::clone(&project),
            target: Arc::clone(&target),
            endpoint,
            api,
            janitor: Janitor::start(),
            agent_known: false,
            fault,
        };
        batch_of_rooms(&name, context, screen, args.format).await
    });
    // A DNS lookup that hangs can't be cancelled; everything else has ended by now.
    runtime.shutdown_background();
    exit
}

/// Flags over environment over file. The name is that of the one target to probe.
fn settings(args: &Once) -> Result<(String, Config), Problems> {
    let mut draft = RawConfig::read(args.config.as_deref(), super::environment())?;
    let name = choose_target(&draft, args.target.as_deref())?;
    draft.ensure_target(&name);
    let duration =
        |value: Option<Duration>| value.map(|value| humantime::format_duration(value).to_string());
    let flags: [(&str, &[&str], Option<String>); 11] = [
        ("--agent-name", &["agent_name"], args.agent_name.clone()),
        (
            "--rooms",
            &["batch", "rooms"],
            args.rooms.map(|rooms| rooms.to_string()),
        ),
        ("--ramp", &["batch", "ramp"], args.ramp.clone()),
        (
            "--ramp-interval",
            &["batch", "interval"],
            duration(args.ramp_interval),
        ),
        ("--hold", &["batch", "hold"], duration(args.hold)),
        (
            "--echo-delay",
            &["echo", "delay"],
            duration(args.echo_delay),
        ),
        ("--echo-mode", &["echo", "mode"], args.echo_mode.clone()),
        (
            "--join-timeout",
            &["deadlines", "join"],
            duration(args.join_timeout),
        ),
        (
            "--speech-timeout",
            &["deadlines", "speech"],
            duration(args.speech_timeout),
        ),
        ("--dispatch", &["dispatch", "mode"], args.dispatch.clone()),
        ("--engine", &["engine"], args.engine.clone()),
    ];
    for (flag, key, value) in flags {
        if let Some(value) = value {
            draft.set_by_flag(&name, key, value, flag);
        }
    }
    let config = draft.validate()?;
    let ramp = config.targets[&name].batch.ramp;
    // In a file the key may wait for its ramp; a flag that does nothing is a mistake.
    if args.ramp_interval.is_some() && ramp != RampMode::Interval {
        return Err(Problems::single(
            format!(
                "--ramp-interval changes nothing: the ramp is {}",
                ramp.name()
            ),
            "add --ramp interval".to_owned(),
        ));
    }
    Ok((name, config))
}

fn choose_target(draft: &RawConfig, wanted: Option<&str>) -> Result<String, Problems> {
    let names = draft.target_names();
    match (wanted, &names[..]) {
        (None, []) => Ok(IMPLIED_TARGET.to_owned()),
        (None, [only]) => Ok(only.clone()),
        (Some(wanted), []) if wanted == IMPLIED_TARGET => Ok(wanted.to_owned()),
        (Some(wanted), names) if names.iter().any(|name| name == wanted) => Ok(wanted.to_owned()),
        (None, names) => Err(Problems::single(
            "the settings have several targets",
            format!("choose one by --target: {}", names.join(", ")),
        )),
        (Some(wanted), names) => Err(super::no_such_target(wanted, names)),
    }
}

fn chosen(config: &Config, name: &str) -> (Arc<Target>, Arc<Project>) {
    let mut target = config.targets[name].clone();
    // A person or a pipeline waits for this command: it looks for late agents for as short as makes sense.
    target.late_agent_window = target.late_agent_window.min(janitor::MIN_SAFE_WINDOW);
    let project = config.projects[&target.project].clone();
    (Arc::new(target), Arc::new(project))
}

async fn batch_of_rooms(
    name: &str,
    context: Context,
    mut screen: Screen,
    format: Format,
) -> anyhow::Result<Exit> {
    let mut signals = Signals::new()?;
    let janitor = context.janitor.clone();
    let (target, project) = (Arc::clone(&context.target), Arc::clone(&context.project));
    let (report, interrupted_at) = watch(name, context, &mut screen, &mut signals).await;

    let printed = report.as_ref().map_or(Ok(()), |report| {
        print(&match format {
            Format::Table => table::render(report, &project, table::terminal_width()),
            Format::Json => json::render(report, &target, &project),
            Format::Markdown => markdown::render(report, &target, &project),
            Format::Junit => junit::render(report, &target, &project),
        })
    });
    // What remains is to vouch for the rooms, also where the result met a full disk.
    let until = match (interrupted_at, &report) {
        (None, _) => Instant::now() + target.late_agent_window + 2 * target.deadlines.cleanup,
        (Some(at), Some(_)) => at + ABORT_ALL,
        (Some(at), None) => (at + ABORT_ALL).min(Instant::now() + FINAL_DELETION_TIMEOUT),
    };
    let notice = interrupted_at.is_none().then(|| {
        let window = humantime::format_duration(target.late_agent_window);
        format!("making sure for about {window} that no room is left behind; Ctrl-C skips it")
    });
    vouch(janitor, until, notice, &mut signals).await;
    if let Err(error) = printed {
        complain(&super::report(&error));
        return Ok(Exit::Inconclusive);
    }
    Ok(match report {
        Some(report) if interrupted_at.is_none() => verdict(&report),
        _ => Exit::Aborted,
    })
}

/// Runs the batch and shows its progress. A first signal aborts it; a second one, or an abort that takes too long, drops
/// it: there is no report then, and the janitor deletes the rooms.
async fn watch(
    name: &str,
    context: Context,
    screen: &mut Screen,
    signals: &mut Signals,
) -> (Option<Arc<BatchReport>>, Option<Instant>) {
    let abort = CancellationToken::new();
    // The batch's events and what comes from outside both draw on it, in this one task.
    let screen = RefCell::new(screen);
    let mut running = Box::pin(batch::run(
        batch::new_id(),
        name,
        context,
        None,
        abort.clone(),
        |event| screen.borrow_mut().show(event),
    ));
    let mut refresh = interval(REFRESH);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut interrupted_at = None;
    let report = loop {
        let hung = interrupted_at.map_or_else(far_off, |at| at + ABORT_BATCH);
        tokio::select! {
            biased;
            report = &mut running => break Some(report),
            () = signals.next() => {
                if interrupted_at.is_some() {
                    break None;
                }
                interrupted_at = Some(Instant::now());
                abort.cancel();
                screen.borrow().say("stopping: deleting the rooms; a second signal ends at once");
            }
            () = sleep_until(hung), if interrupted_at.is_some() => break None,
            _ = refresh.tick() => screen.borrow_mut().refresh(),
        }
    };
    screen.borrow_mut().close();
    if report.is_none() {
        complain("warning: stopped before the rooms had ended; there is no result");
    }
    (report, interrupted_at)
}

/// Waits until every room is known to be gone, and names those that aren't. A wait that can be noticed is explained by
/// `notice`. A signal ends it.
async fn vouch(janitor: Janitor, until: Instant, notice: Option<String>, signals: &mut Signals) {
    let noticed_at = Instant::now() + NOTICEABLE;
    let mut closing = Box::pin(janitor.clone().close(until));
    let first = tokio::select! {
        left = &mut closing => Some(left),
        () = signals.next() => None,
        () = sleep_until(noticed_at) => {
            if let Some(notice) = notice {
                complain(&notice);
            }
            tokio::select! {
                left = closing => Some(left),
                () = signals.next() => None,
            }
        }
    };
    let left = match first {
        Some(left) => left,
        None => {
            janitor
                .close(until.min(Instant::now() + FINAL_DELETION_TIMEOUT))
                .await
        }
    };
    for UnconfirmedRoom { room, why } in left {
        complain(&format!("warning: room {room} may be left behind: {why}"));
    }
}

/// The first that applies, so that a pipeline blames the deploy for nothing else than the agent.
pub(super) fn verdict(report: &BatchReport) -> Exit {
    let exits = || {
        let probes = report.probes.iter();
        probes.map(|probe| Exit::of(&probe.outcome))
    };
    let precedence = [
        Exit::Aborted,
        Exit::Config,
        Exit::Agent,
        Exit::PlanLimit,
        Exit::Inconclusive,
    ];
    let mut precedence = precedence.into_iter();
    let first = precedence.find(|exit| exits().any(|one| one == *exit));
    first.unwrap_or(Exit::Ok)
}

fn far_off() -> Instant {
    Instant::now() + Duration::from_hours(24)
}

/// SIGINT and SIGTERM, which mean the same here.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Cancel-safe.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{Evidence, LimitKind, Outcome, Reason};
    use crate::report::sample::{batch, failed, probe};

    fn verdict_on(outcomes: &[Outcome]) -> Exit {
        let rooms = outcomes
            .iter()
            .map(|outcome| probe(1, outcome.clone(), Evidence::default(), &[]));
        verdict(&batch(rooms.collect(), None))
    }

    #[test]
    fn deploy_is_blamed_only_for_the_agent() {
        let of = |reason| failed(reason, "");
        let limit = of(Reason::PlanLimit(LimitKind::Room));
        for (outcomes, exit) in [
            (vec![Outcome::Ok, Outcome::Ok], Exit::Ok),
            (vec![Outcome::Ok, of(Reason::AgentSilent)], Exit::Agent),
            (vec![of(Reason::DispatchUnanswered)], Exit::Agent),
            (vec![Outcome::Ok, limit.clone()], Exit::PlanLimit),
            (vec![limit, of(Reason::AgentNoShow)], Exit::Agent),
            (
                vec![of(Reason::SignalLost), Outcome::Ok],
                Exit::Inconclusive,
            ),
            (vec![of(Reason::Internal)], Exit::Inconclusive),
            (vec![of(Reason::Removed)], Exit::Inconclusive),
            (vec![of(Reason::Unreachable)], Exit::Inconclusive),
            (
                vec![of(Reason::AgentSilent), of(Reason::AuthRejected)],
                Exit::Config,
            ),
            (
                vec![of(Reason::AuthRejected), Outcome::Aborted],
                Exit::Aborted,
            ),
        ] {
            assert_eq!(verdict_on(&outcomes), exit, "{outcomes:?}");
        }
    }
}
