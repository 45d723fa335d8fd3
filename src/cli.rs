//! Commands, flags and exit codes; data on stdout, all else on stderr.
//!
//! It knows no WebRTC.

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use strum::VariantArray;
use tokio::runtime::Runtime;

use crate::config::{DispatchMode, EchoMode, Engine, Problems, RampMode};
use crate::probe::{Origin, Outcome};
use crate::sandbox::fault::{self, FaultRule};
use crate::sandbox::report;

mod check;
mod demo;
mod drill;
mod forecast;
mod health;
mod junit;
mod markdown;
mod once;
mod phrasing;
mod progress;
mod rehearsal;
mod rules;
mod run;
mod sandbox;
mod sandboxed;
mod table;

/// Production canary for LiveKit voice agents
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Run),
    Once(Once),
    Check(Check),
    Rules(Rules),
    Demo(Demo),
    Drill(DrillArgs),
    Sandbox(SandboxArgs),
    Health(Health),
}

/// Watch every configured target, always
///
/// Opens a batch of rooms against each target whenever its schedule says so, and serves what it found out
/// on /metrics, as a page and as JSON. SIGHUP reads the settings again. SIGTERM lets the rooms that are
/// open end, deletes them, and stops; a second one ends at once.
#[derive(Args, Clone)]
#[command(after_help = RUN_EPILOGUE, verbatim_doc_comment)]
struct Run {
    /// The settings (TOML); config/canary.toml shows every key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Where to serve metrics, page and API [default: 0.0.0.0:9787]
    #[arg(long = "web.listen-address", value_name = "ADDRESS")]
    listen_address: Option<SocketAddr>,

    /// TLS and users, in the format of Prometheus' exporter-toolkit
    #[arg(long = "web.config.file", value_name = "FILE")]
    web_config_file: Option<PathBuf>,

    /// Answer POST (reload, pause, a batch now) on any address, without users too
    #[arg(long = "web.enable-lifecycle")]
    enable_lifecycle: bool,

    /// Where the ledger of the budget was lost: count what was used from zero
    #[arg(long)]
    accept_lost_ledger: bool,
}

const RUN_EPILOGUE: &str = "\
Credentials come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET where no file sets them.
RUST_LOG sets the level of the log, which goes to stderr: text on a terminal, JSON otherwise.

Exit status:
  0  told to stop, and all rooms were seen to
  1  a fault of the canary's own, or told to stop twice
  2  wrong usage or settings, or another process uses the history";

/// Open one batch of rooms now and tell what happened in each
///
/// Opens the rooms, has the agent join each, waits for its first words, echoes them, and
/// deletes the rooms. Progress goes to stderr, the result to stdout.
#[derive(Args)]
#[command(after_help = ONCE_EPILOGUE, verbatim_doc_comment)]
struct Once {
    /// Settings to start from (TOML); without it: the environment and these flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The target of the settings; needed where they have several
    #[arg(long, value_name = "NAME")]
    target: Option<String>,

    /// The name that the agent registered under
    #[arg(long, value_name = "NAME")]
    agent_name: Option<String>,

    /// Rooms to open [default: 3]
    #[arg(long, value_name = "N")]
    rooms: Option<usize>,

    /// When the next room opens: after the agent's join (the default), at intervals, or all at once
    #[arg(long, value_name = "RAMP", value_parser = names::<RampMode>())]
    ramp: Option<String>,

    /// From one room to the next with --ramp interval [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    ramp_interval: Option<Duration>,

    /// How long the rooms stay open once the last agent has joined, or won't [default: 15s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    hold: Option<Duration>,

    /// Pause between the agent's speech and its echo [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    echo_delay: Option<Duration>,

    /// Whole utterances once, or all that the agent says [default: turn]
    #[arg(long, value_name = "MODE", value_parser = names::<EchoMode>())]
    echo_mode: Option<String>,

    /// Longest wait for the agent's join [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    join_timeout: Option<Duration>,

    /// Longest wait for the agent's first words, from its join [default: 20s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    speech_timeout: Option<Duration>,

    /// What names the agent: a call of its own, the room, our token, or nothing [default: explicit]
    #[arg(long, value_name = "MODE", value_parser = names::<DispatchMode>())]
    dispatch: Option<String>,

    /// The client stack that joins; libwebrtc only where it is built in [default: native]
    #[arg(long, value_name = "ENGINE", value_parser = names::<Engine>())]
    engine: Option<String>,

    /// How to print the result
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

const ONCE_EPILOGUE: &str = "\
Credentials come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET where no file sets them.

Exit status, the first that applies:
  130  aborted by a signal
    2  wrong usage, settings or credentials
    1  the agent failed, or nobody answered the dispatch
    3  a plan limit was met
    4  inconclusive: only LiveKit, the network or the canary failed
    0  every room ok";

/// Validate the settings, print what was understood and what the schedules come to
///
/// Opens no room. Warns where a schedule can't fit its budget or its interval.
/// Exit status: 0 all right; 2 wrong settings or credentials; 4 a server can't
/// be reached or answers with an error.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Check {
    /// Settings to check (TOML); without it: the environment alone
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Only this target and its project
    #[arg(long, value_name = "NAME")]
    target: Option<String>,

    /// Also try each project's credentials by a call that changes nothing
    #[arg(long)]
    connect: bool,
}

/// Print Prometheus alert rules for the settings
///
/// They serve every target of every canary that Prometheus scrapes; the schedules of these settings get windows
/// that fit them exactly. Reads no credentials and connects to nothing.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Rules {
    /// Settings to make rules for (TOML); without it: the defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// See the canary at work on this machine, with nothing to sign up for
///
/// Starts a LiveKit server with a demo agent on a free loopback port, and runs a batch against it every few
/// seconds, until Ctrl-C. After two good batches, every other one meets a fault: it is announced, and followed
/// by what the canary makes of it. Uses no settings, and nothing but 127.0.0.1.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Demo {
    /// One batch without a fault, then exit as `once` does
    #[arg(long)]
    once: bool,

    /// From the start of a batch to the start of the next, which waits for its end
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "10s",
          conflicts_with = "once")]
    every: Duration,

    /// Rooms of a batch, 1 to 5
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=5),
          default_value_t = 3)]
    rooms: usize,
}

/// See alerts arrive, and resolve, before there is an outage
///
/// Runs the daemon, its metrics, page and history included, against a LiveKit server with a demo agent on this
/// machine that plays the fault of one reason. The target is named for it (drill-agent-silent), and its
/// `target_info` says drill="true", so that a route can send what it raises elsewhere. Uses no settings, and opens
/// no room anywhere but on 127.0.0.1.
#[derive(Args)]
#[command(after_help = DRILL_EPILOGUE, verbatim_doc_comment)]
struct DrillArgs {
    /// What the canary is to find, or ok
    #[arg(value_name = "REASON", value_parser = PossibleValuesParser::new(drill::reasons()))]
    reason: String,

    /// Which limit, with `plan_limit`
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(drill::limits()),
          required_if_eq("reason", "plan_limit"))]
    limit: Option<String>,

    /// From the start of a batch to the start of the next, which waits for its end
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "30s")]
    every: Duration,

    /// Rooms of a batch, 1 to 5
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=5),
          default_value_t = 3)]
    rooms: usize,

    /// Begin the fault after so long, not at once
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    after: Option<Duration>,

    /// End the fault when it has lasted so long, and go on without it
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    recover_after: Option<Duration>,

    /// End the drill after so long [default: Ctrl-C ends it]
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    whole: Option<Duration>,

    /// One batch
    #[arg(long, conflicts_with_all = ["every", "after", "recover_after", "whole"])]
    once: bool,

    /// Where to serve metrics, page and API [default: 127.0.0.1:9787, or another port where that is taken]
    #[arg(long = "web.listen-address", value_name = "ADDRESS")]
    listen_address: Option<SocketAddr>,

    /// Keep the history here, not in a folder that goes with the drill
    #[arg(long, value_name = "FOLDER")]
    history_dir: Option<PathBuf>,
}

const DRILL_EPILOGUE: &str = "\
Exit status:
    0  the canary found what was played, in every batch
    1  it didn't, or couldn't go on
    2  wrong usage
  130  --once, aborted by a signal";

/// Run a LiveKit server with a demo agent on this machine, until Ctrl-C
///
/// Listens on 127.0.0.1 only and prints the URL and the key pair that `once` needs. The agent greets,
/// listens and replies; faults make it and the server fail as real ones do.
#[derive(Args)]
#[command(after_help = format!("{}\n\n{}", fault::SYNTAX, report::SYNTAX), verbatim_doc_comment)]
struct SandboxArgs {
    /// TCP port; 0 takes a free one
    #[arg(long, default_value_t = 7880)]
    port: u16,

    /// What goes wrong, as told below; may be given several times
    #[arg(long = "fault", value_name = "FAULT")]
    faults: Vec<FaultRule>,

    /// The name that the agent registers under; an empty one is sent to every new room
    #[arg(long, value_name = "NAME", default_value = "demo")]
    agent_name: String,

    /// Append what the agents saw, heard and said to FILE, a JSON object a line, as told below
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Ask a daemon on this machine whether it is healthy
///
/// For a container's health check: exit status 0 where it answers with success, 1 where it doesn't. It speaks
/// plain HTTP only; where the daemon has TLS, check it from outside.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Health {
    /// What to ask
    #[arg(value_name = "URL", value_parser = health::plain_url, default_value = "http://127.0.0.1:9787/-/healthy")]
    url: url::Url,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For a terminal
    Table,
    /// All that was found out, for programs
    Json,
    /// For a comment on a pull request
    Markdown,
    /// For a CI system's test report
    Junit,
}

fn names<T>() -> PossibleValuesParser
where
    T: Copy + Into<&'static str> + VariantArray,
{
    let names = T::VARIANTS.iter().map(|choice| (*choice).into());
    names.collect::<Vec<&'static str>>().into()
}

/// What the exit status says, for a caller that acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Ok,
    /// An agent failed, or nobody answered the dispatch.
    Agent,
    /// Usage, settings or credentials.
    Config,
    PlanLimit,
    /// Nothing is said about the agent.
    Inconclusive,
    /// The daemon could not go on, or was not let end in order.
    Fault,
    Aborted,
}

impl Exit {
    /// What one room's outcome says.
    fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Ok,
            Outcome::Aborted => Self::Aborted,
            Outcome::Failed(failure) => match failure.reason.origin() {
                Origin::Agent | Origin::Undetermined => Self::Agent,
                Origin::Limit => Self::PlanLimit,
                Origin::Config => Self::Config,
                Origin::Livekit | Origin::Network | Origin::External | Origin::Canary => {
                    Self::Inconclusive
                }
            },
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Agent | Exit::Fault => 1,
            Exit::Config => 2,
            Exit::PlanLimit => 3,
            Exit::Inconclusive => 4,
            Exit::Aborted => 130,
        })
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    install_panic_hook();
    let exit = match CommandLine::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Once(once) => once::run(&once),
        Command::Check(check) => check::run(&check),
        Command::Rules(args) => rules::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Drill(args) => drill::run(&args),
        Command::Sandbox(args) => sandbox::run(&args),
        Command::Health(args) => health::run(&args),
    };
    exit.unwrap_or_else(|error| {
        complain(&report(&error));
        Exit::Config
    })
    .into()
}

/// Problems of the settings speak for themselves; any other error is told with its causes.
fn report(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Problems>() {
        Some(problems) => problems.to_string(),
        None => format!("error: {error:#}"),
    }
}

fn no_such_target(name: &str, known: &[String]) -> Problems {
    Problems::single(
        format!("target {name:?} is not configured"),
        match known {
            [] => "no target is".to_owned(),
            _ => format!("configured: {}", known.join(", ")),
        },
    )
}

fn environment() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os()
}

/// A panic of one probe is caught by its driver and told as its outcome: one line of log is enough here.
fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        if tracing::dispatcher::has_been_set() {
            tracing::error!(place, "internal fault: {message}");
        } else {
            complain(&format!("error: internal fault: {message}, at {place:?}"));
        }
    }));
}

/// One thread carries every room: the work is mostly waiting, and a second one costs more to wake than it takes over.
fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?)
}

/// One message on stderr. A closed stderr is no reason to stop.
fn complain(message: &str) {
    let mut stderr = std::io::stderr().lock();
    let written = writeln!(stderr, "{message}");
    drop(written);
}

/// The result on stdout. Whoever closed the pipe has seen enough: that alone is no error.
fn print(text: &str) -> anyhow::Result<()> {
    print_unless_closed(text).map(drop)
}

/// Whether anyone still reads stdout, for a command that goes on for as long as somebody does.
fn print_unless_closed(text: &str) -> anyhow::Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("can't write to stdout")),
    }
}
