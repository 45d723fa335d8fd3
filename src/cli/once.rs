//! `once`: runs one batch now, prints its result, and confirms that its rooms are gone.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::progress::{ProgressView, REFRESH_INTERVAL};
use super::stop_signals::StopSignals;
use super::{Exit, OnceArgs, OutputFormat, error_text, junit, markdown, print, print_error, table};
use crate::batch;
use crate::config::{Config, Problems, Project, RampMode, RawConfig, Target};
use crate::janitor::{self, FINAL_DELETION_TIMEOUT, Janitor, UnconfirmedRoom};
use crate::livekit::wire;
use crate::probe::driver::{Context, ProbeFault};
use crate::recording::RecordingStore;
use crate::report::{BatchReport, Purpose, counted, json};
use crate::stall::StallWatch;
use crate::telemetry;

/// The target of the flags and the environment if there is no settings file.
const IMPLIED_TARGET: &str = "default";

/// How long the batch may take to end after the first signal.
const ABORT_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long the process may run after the first signal, even if something hangs.
const EXIT_TIMEOUT: Duration = Duration::from_secs(4);

/// A wait that takes longer than this is explained. Longer than the short check that follows every call.
const NOTICE_AFTER: Duration = Duration::from_secs(3);

pub(super) fn run(args: &OnceArgs) -> anyhow::Result<Exit> {
    let (name, config) = settings(args)?;
    let (target, project) = selected(&config, &name);
    let fault = ProbeFault::from_env()?;
    let output = ResultOutput::open(args.format, args.output.as_deref())?;
    let recordings = args.record.as_deref().map(open_recordings).transpose()?;
    let view = ProgressView::new(&target, &project);
    telemetry::log_to(view.log_writer(), ProgressView::colour(), "warn");

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
            stalls: StallWatch::start(),
            recordings,
            agent_known: false,
            fault,
        };
        probe_and_print(&name, context, view, output, args.record.as_deref()).await
    });
    // Does not wait for a DNS lookup that hangs: it runs on a blocking thread and cannot be cancelled. Everything else has
    // ended by now.
    runtime.shutdown_background();
    exit
}

/// Opens the folder before any room opens: a wrong name is a mistake of the user.
fn open_recordings(folder: &Path) -> anyhow::Result<RecordingStore> {
    let opened = RecordingStore::open_unmanaged(folder);
    opened.with_context(|| format!("cannot write recordings to {}", folder.display()))
}

/// Reads the settings, and returns them with the name of the target to probe. A flag overrides the environment, and the
/// environment overrides the file.
fn settings(args: &OnceArgs) -> Result<(String, Config), Problems> {
    let mut draft = RawConfig::read(args.config.as_deref(), super::environment())?;
    let name = choose_target(&draft, args.target.as_deref())?;
    draft.ensure_target(&name);
    let duration =
        |value: Option<Duration>| value.map(|value| humantime::format_duration(value).to_string());
    let flags: [(&str, &[&str], Option<String>); 16] = [
        ("--agent-name", &["agent_name"], args.agent_name.clone()),
        (
            "--deployment",
            &["dispatch", "deployment"],
            args.deployment.clone(),
        ),
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
        ("--silence", &["caller", "silence"], duration(args.silence)),
        ("--caller", &["caller", "mode"], args.caller.clone()),
        (
            "--turns",
            &["caller", "turns"],
            args.turns.map(|turns| turns.to_string()),
        ),
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
        (
            "--expect-reply",
            &["expect", "reply"],
            args.expect_reply.map(|expected| expected.to_string()),
        ),
        (
            "--transcript",
            &["transcript"],
            args.transcript.then(|| "true".to_owned()),
        ),
        (
            "--record",
            &["record", "audio"],
            args.record.is_some().then(|| "always".to_owned()),
        ),
    ];
    for (flag, key, value) in flags {
        if let Some(value) = value {
            draft.set_by_flag(&name, key, value, flag);
        }
    }
    set_max_rooms(&mut draft, &name, args);
    let config = draft.validate()?;
    if args.transcript && args.format != OutputFormat::Json {
        return Err(Problems::single(
            "--transcript has no effect: only JSON contains the transcript",
            "add --format json",
        ));
    }
    let ramp = config.targets[&name].batch.ramp;
    // A file may set the interval of a ramp that it does not use yet. A flag without effect is a mistake.
    if args.ramp_interval.is_some() && ramp != RampMode::Interval {
        return Err(Problems::single(
            format!("--ramp-interval has no effect: the ramp is {}", ramp.name()),
            "add --ramp interval".to_owned(),
        ));
    }
    Ok((name, config))
}

/// Sets the project's `max_rooms` by flag. `--rooms` alone raises the default, but not a limit of the settings.
fn set_max_rooms(draft: &mut RawConfig, target: &str, args: &OnceArgs) {
    let Some(project) = draft.project_of(target) else {
        return;
    };
    let key = ["projects", project.as_str(), "max_rooms"];
    if let Some(rooms) = args.max_rooms {
        draft.set(&key, rooms.to_string(), "--max-rooms");
    } else if let Some(rooms) = args.rooms
        && rooms > Project::DEFAULT_MAX_ROOMS
        && !draft.is_set(&key)
    {
        draft.set(&key, rooms.to_string(), "--rooms");
    }
}

/// The target that the command probes: the one that is wanted, or the only one.
pub(super) fn choose_target(draft: &RawConfig, wanted: Option<&str>) -> Result<String, Problems> {
    let names = draft.target_names();
    match (wanted, &names[..]) {
        (None, []) => Ok(IMPLIED_TARGET.to_owned()),
        (None, [only]) => Ok(only.clone()),
        (Some(wanted), []) if wanted == IMPLIED_TARGET => Ok(wanted.to_owned()),
        (Some(wanted), names) if names.iter().any(|name| name == wanted) => Ok(wanted.to_owned()),
        (None, names) => Err(Problems::single(
            "the settings have several targets",
            format!("choose one with --target: {}", names.join(", ")),
        )),
        (Some(wanted), names) => Err(super::no_such_target(wanted, names)),
    }
}

fn selected(config: &Config, name: &str) -> (Arc<Target>, Arc<Project>) {
    let mut target = config.targets[name].clone();
    // A person or a pipeline waits for this command, so it watches for late agents only as long as needed.
    target.late_agent_window = target.late_agent_window.min(janitor::MIN_SAFE_WINDOW);
    let project = config.projects[&target.project].clone();
    (Arc::new(target), Arc::new(project))
}

async fn probe_and_print(
    name: &str,
    context: Context,
    mut view: ProgressView,
    mut output: ResultOutput,
    recordings: Option<&Path>,
) -> anyhow::Result<Exit> {
    let mut signals = StopSignals::new()?;
    let janitor = context.janitor.clone();
    let (target, project) = (Arc::clone(&context.target), Arc::clone(&context.project));
    let (report, interrupted_at) = run_batch(name, context, &mut view, &mut signals).await;

    let printed = report.as_ref().map_or(Ok(()), |report| {
        output.write(|format, width| match format {
            OutputFormat::Table => {
                let mut text = table::render(report, &project, width);
                if let Some(folder) = recordings {
                    text.push_str(&recorded(report, folder));
                }
                text
            }
            OutputFormat::Json => json::render(report, &target, &project),
            OutputFormat::Markdown => markdown::render(report, &target, &project),
            OutputFormat::Junit => junit::render(report, &target, &project),
        })
    });
    // The rooms are confirmed even if the result could not be printed, for example on a full disk.
    let until = match (interrupted_at, &report) {
        (None, _) => Instant::now() + target.late_agent_window + 2 * target.deadlines.cleanup,
        (Some(at), Some(_)) => at + EXIT_TIMEOUT,
        (Some(at), None) => (at + EXIT_TIMEOUT).min(Instant::now() + FINAL_DELETION_TIMEOUT),
    };
    let notice = interrupted_at.is_none().then(|| {
        let window = humantime::format_duration(target.late_agent_window);
        format!("checking for about {window} that no room reappears; Ctrl-C ends the check")
    });
    confirm_cleanup(janitor, until, notice, &mut signals).await;
    if let Err(error) = printed {
        print_error(&error_text(&error));
        return Ok(Exit::Inconclusive);
    }
    Ok(match report {
        Some(report) if interrupted_at.is_none() => verdict(&report),
        _ => Exit::Aborted,
    })
}

/// A line about the recordings.
fn recorded(report: &BatchReport, folder: &Path) -> String {
    let recorded = report.probes.iter().filter(|it| it.recording.is_some());
    let rooms = counted(recorded.count() as u64, "room");
    format!("\nrecordings of {rooms} in {}\n", folder.display())
}

/// The destination of the result, and its format.
struct ResultOutput {
    format: OutputFormat,
    /// `None` for stdout.
    file: Option<(PathBuf, File)>,
}

impl ResultOutput {
    /// Creates the file, before any room opens: a wrong name is a mistake of the user, and the result of an earlier run must
    /// not stay there.
    ///
    /// # Errors
    /// The file cannot be created.
    fn open(format: OutputFormat, path: Option<&Path>) -> anyhow::Result<Self> {
        let file = path.map(|path| {
            let file = File::create(path);
            let file = file.with_context(|| format!("cannot write to {}", path.display()))?;
            anyhow::Ok((path.to_owned(), file))
        });
        Ok(Self {
            format,
            file: file.transpose()?,
        })
    }

    /// Writes the result, which `render` returns in a format for a width of columns.
    fn write(
        &mut self,
        render: impl Fn(OutputFormat, Option<u16>) -> String,
    ) -> anyhow::Result<()> {
        let width = table::terminal_width();
        let Some((path, file)) = &mut self.file else {
            return print(&render(self.format, width));
        };
        let written = file.write_all(render(self.format, None).as_bytes());
        let written = written.with_context(|| format!("cannot write to {}", path.display()));
        print(&render(OutputFormat::Table, width)).and(written)
    }
}

/// Runs the batch and shows its progress. Returns its report and the time of the first signal.
///
/// The first signal aborts the batch. A second signal, or an abort that takes longer than [`ABORT_TIMEOUT`], drops it: then
/// there is no report, and the janitor deletes the rooms.
async fn run_batch(
    name: &str,
    context: Context,
    view: &mut ProgressView,
    signals: &mut StopSignals,
) -> (Option<Arc<BatchReport>>, Option<Instant>) {
    let abort = CancellationToken::new();
    // The batch's events, signals and the clock all draw on it, in this one task.
    let view = RefCell::new(view);
    let mut running = Box::pin(batch::run(
        batch::new_id(),
        name,
        Purpose::Manual,
        context,
        batch::Access::Unguarded,
        abort.clone(),
        |event| view.borrow_mut().show(event),
    ));
    let mut refresh = interval(REFRESH_INTERVAL);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut interrupted_at = None;
    let report = loop {
        let hung = interrupted_at.map_or_else(far_off, |at| at + ABORT_TIMEOUT);
        tokio::select! {
            // In order, so that a batch that has ended has a report, even if a signal arrives at the same time.
            biased;
            report = &mut running => break Some(report),
            () = signals.next() => {
                if interrupted_at.is_some() {
                    break None;
                }
                interrupted_at = Some(Instant::now());
                abort.cancel();
                view.borrow().print("stopping: deleting the rooms; a second signal exits at once");
            }
            () = sleep_until(hung), if interrupted_at.is_some() => break None,
            _ = refresh.tick() => view.borrow_mut().refresh(),
        }
    };
    view.borrow_mut().close();
    if report.is_none() {
        print_error(
            "warning: the batch was stopped before its rooms had ended, so there is no result",
        );
    }
    (report, interrupted_at)
}

/// Waits until every room is confirmed as deleted, and prints a warning for each room that is not.
///
/// If the wait takes longer than [`NOTICE_AFTER`], `notice` explains it. A signal ends the wait.
async fn confirm_cleanup(
    janitor: Janitor,
    until: Instant,
    notice: Option<String>,
    signals: &mut StopSignals,
) {
    let notice_at = Instant::now() + NOTICE_AFTER;
    let mut closing = Box::pin(janitor.clone().close(until));
    let unconfirmed = tokio::select! {
        rooms = &mut closing => Some(rooms),
        () = signals.next() => None,
        () = sleep_until(notice_at) => {
            if let Some(notice) = notice {
                print_error(&notice);
            }
            tokio::select! {
                rooms = closing => Some(rooms),
                () = signals.next() => None,
            }
        }
    };
    let unconfirmed = match unconfirmed {
        Some(rooms) => rooms,
        None => {
            janitor
                .close(until.min(Instant::now() + FINAL_DELETION_TIMEOUT))
                .await
        }
    };
    for UnconfirmedRoom { room, why } in unconfirmed {
        print_error(&format!("warning: room {room} may still exist: {why}"));
    }
}

/// Returns the exit status of a batch: that of the room with the highest precedence.
pub(super) fn verdict(report: &BatchReport) -> Exit {
    let exits = report.probes.iter().map(|probe| Exit::of(&probe.outcome));
    exits.max().unwrap_or(Exit::Ok)
}

fn far_off() -> Instant {
    Instant::now() + Duration::from_hours(24)
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
    fn only_a_failed_agent_gives_exit_status_1() {
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
