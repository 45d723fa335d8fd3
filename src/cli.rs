//! The command line: commands, flags and exit statuses. Results go to stdout, everything else to stderr.
//!
//! It reads settings, starts the work and prints what comes back. It does not know WebRTC.

#![expect(
    clippy::doc_markdown,
    reason = "`--help` prints these comments, and would print the backticks"
)]

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

use crate::config::{CallerMode, DispatchMode, Engine, Problems, RampMode};
use crate::probe::{Origin, Outcome};
use crate::sandbox::fault::{self, FaultRule};
use crate::sandbox::report;

mod check;
mod demo;
mod drill;
mod fault_catalogue;
mod forecast;
mod format;
mod health;
mod junit;
mod local_daemon;
mod markdown;
mod once;
mod progress;
mod rules;
mod run;
mod sandbox;
mod stop_signals;
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
    Run(RunArgs),
    Once(OnceArgs),
    Check(CheckArgs),
    Rules(RulesArgs),
    Demo(DemoArgs),
    Drill(DrillArgs),
    Sandbox(SandboxArgs),
    Health(HealthArgs),
}

/// Watch every configured target continuously
///
/// Starts a batch of rooms for each target when its schedule is due. Serves the
/// results on /metrics, as a page and as JSON.
///
/// SIGHUP reloads the settings. SIGTERM lets the open rooms end, deletes them and
/// stops. A second SIGTERM, at least a second later, stops at once.
#[derive(Args, Clone)]
#[command(after_help = RUN_EPILOGUE, verbatim_doc_comment)]
struct RunArgs {
    /// Settings file (TOML); config/canary.toml shows every key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Address that serves metrics, page and API [default: 127.0.0.1:9787]
    #[arg(long = "web.listen-address", value_name = "ADDRESS")]
    listen_address: Option<SocketAddr>,

    /// File with TLS settings and users, in the format of Prometheus' exporter-toolkit
    #[arg(long = "web.config.file", value_name = "FILE")]
    web_config_file: Option<PathBuf>,

    /// Accept POST (reload, pause, run a batch) on any address, even if no users are set
    #[arg(long = "web.enable-lifecycle")]
    enable_lifecycle: bool,

    /// Address of the page that alerts and messages link to
    #[arg(long = "web.external-url", value_name = "URL")]
    external_url: Option<String>,

    /// If the ledger of used agent time is lost, count the used time from zero
    #[arg(long)]
    accept_lost_ledger: bool,
}

const RUN_EPILOGUE: &str = "\
Credentials come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET, unless
the settings file sets them. The log goes to stderr: as text on a terminal,
otherwise as JSON. RUST_LOG sets its level.

Exit status:
  0  stopped by a signal, after all rooms were cleaned up
  1  the canary itself failed, or a second signal ended it at once
  2  wrong usage or settings, or another process uses the history";

/// Open one batch of rooms now and report what happened in each
///
/// In each room, the agent joins and speaks, the canary answers as a caller, and
/// the agent replies. Then the canary deletes the rooms. Progress goes to stderr,
/// the result to stdout.
#[derive(Args)]
#[command(after_help = ONCE_EPILOGUE, verbatim_doc_comment)]
struct OnceArgs {
    /// Settings file (TOML); without it, only the environment and these flags apply
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Target to probe; required if the settings have several
    #[arg(long, value_name = "NAME")]
    target: Option<String>,

    /// Name that the agent registers under
    #[arg(long, value_name = "NAME")]
    agent_name: Option<String>,

    /// Deployment of the agent, such as staging [default: workers without one]
    #[arg(long, value_name = "NAME")]
    deployment: Option<String>,

    /// Number of rooms to open [default: 3]
    #[arg(long, value_name = "N")]
    rooms: Option<usize>,

    /// Maximum number of rooms that are open at the same time [default: 5, or --rooms if the settings set none]
    #[arg(long, value_name = "N")]
    max_rooms: Option<usize>,

    /// When the next room opens: after the agent's join, at intervals, or all at once [default: after_join]
    #[arg(long, value_name = "RAMP", value_parser = value_names::<RampMode>())]
    ramp: Option<String>,

    /// Time from one room to the next with --ramp interval [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    ramp_interval: Option<Duration>,

    /// How long the rooms stay open after the last agent joined or failed to join [default: 15s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    hold: Option<Duration>,

    /// What the caller says: the agent's own words (echo), all of its audio (pass_through), or the lines of the settings
    /// (script) [default: echo]
    #[arg(long, value_name = "MODE", value_parser = value_names::<CallerMode>())]
    caller: Option<String>,

    /// How many times the caller speaks [default: 1, or once per line of a script]
    #[arg(long, value_name = "N")]
    turns: Option<u32>,

    /// Silence of the agent after which the caller speaks [default: 2s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    silence: Option<Duration>,

    /// Maximum wait for the agent's join [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    join_timeout: Option<Duration>,

    /// Maximum wait for the agent's first speech after its join [default: 20s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    speech_timeout: Option<Duration>,

    /// How the agent is dispatched: CreateDispatch (explicit), CreateRoom (room), join token (token), or automatically [default: explicit]
    #[arg(long, value_name = "MODE", value_parser = value_names::<DispatchMode>())]
    dispatch: Option<String>,

    /// Client stack that joins the rooms; libwebrtc only if this binary includes it [default: native]
    #[arg(long, value_name = "ENGINE", value_parser = value_names::<Engine>())]
    engine: Option<String>,

    /// Whether a room fails if its agent does not reply to the caller [default: true, with pass_through: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    expect_reply: Option<bool>,

    /// Add the agent's transcript, which may contain personal data; only with --format json
    #[arg(long)]
    transcript: bool,

    /// Write what the agent and the caller said to DIR, as two Ogg Opus files per room; they may contain personal data
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// Output format of the result
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    format: OutputFormat,

    /// Write the result to FILE; the table still goes to stdout
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

const ONCE_EPILOGUE: &str = "\
Credentials come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET, unless
the settings file sets them.

Exit status: the first that applies to any room
  130  aborted by a signal
    2  wrong usage, settings or credentials (origin config)
    1  the agent failed (origin agent), or no agent answered (undetermined)
    3  a plan limit was reached (origin limit)
    4  inconclusive: other failures (origin livekit, network, external or canary),
       or the result cannot be printed or written
    0  every room is ok";

/// Check the settings and print what they mean and what the schedules cost
///
/// Opens no room. Warns if a schedule exceeds its budget or its interval.
///
/// Exit status:
///   0  the settings are valid and, with --connect, the credentials work and, with
///      --notify, every channel took the message
///   2  wrong usage, settings or credentials
///   4  a server or a channel cannot be reached, or answers with an error
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct CheckArgs {
    /// Settings file (TOML); without it, only the environment applies
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Check only this target and its project
    #[arg(long, value_name = "NAME")]
    target: Option<String>,

    /// Name that the agent registers under: check what `once` with this flag would do
    #[arg(long, value_name = "NAME")]
    agent_name: Option<String>,

    /// Deployment of the agent: check what `once` with this flag would do
    #[arg(long, value_name = "NAME")]
    deployment: Option<String>,

    /// Also test each project's credentials with a read-only request
    #[arg(long)]
    connect: bool,

    /// Also send a test message to each channel of the settings
    #[arg(long)]
    notify: bool,
}

/// Print Prometheus alert rules for the settings
///
/// The rules cover every target of every canary that Prometheus scrapes. Their
/// windows fit the schedules of these settings exactly. The command reads no
/// credentials and connects to nothing.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct RulesArgs {
    /// Settings file (TOML); without it, the defaults apply
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Show the canary at work on this machine, without an account
///
/// Starts a LiveKit server with a demo agent on a free loopback port, and runs a
/// batch against it every few seconds until Ctrl-C. Every second batch has a fault.
/// The demo announces the fault, and then prints what the canary found. It uses no
/// settings and connects only to 127.0.0.1.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct DemoArgs {
    /// Run one batch without a fault, then exit as `once` does
    #[arg(long)]
    once: bool,

    /// Time between the starts of two batches; while a batch runs, no other starts
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "10s",
          conflicts_with = "once")]
    every: Duration,

    /// Rooms per batch, 1 to 5
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=5),
          default_value_t = 3)]
    rooms: usize,
}

/// Rehearse an outage: see alerts arrive and resolve
///
/// Runs the daemon with its metrics, page and history against a LiveKit server
/// with a demo agent on this machine, and injects the fault of one reason. The
/// target is named after the reason (drill-agent-silent). Every series of a drill
/// has the label drill="true", so that a route can send its alerts elsewhere.
/// The drill uses no settings and opens rooms only on 127.0.0.1.
#[derive(Args)]
#[command(after_help = DRILL_EPILOGUE, verbatim_doc_comment)]
struct DrillArgs {
    /// Reason that the canary must find, or ok for no fault; without one, the command lists them
    #[arg(value_name = "REASON", value_parser = PossibleValuesParser::new(drill::reasons()))]
    reason: Option<String>,

    /// Kind of limit; required with `plan_limit`
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(drill::limits()),
          required_if_eq("reason", "plan_limit"))]
    limit: Option<String>,

    /// Time between the starts of two batches; while a batch runs, no other starts
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "30s")]
    every: Duration,

    /// Rooms per batch, 1 to 5
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=5),
          default_value_t = 3)]
    rooms: usize,

    /// Start the fault after this time [default: at once]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    after: Option<Duration>,

    /// End the fault when it has lasted this long, and continue without it
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    recover_after: Option<Duration>,

    /// End the drill after this time [default: run until Ctrl-C]
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,

    /// Run one batch only
    #[arg(long, conflicts_with_all = ["every", "after", "recover_after", "duration"])]
    once: bool,

    /// Address that serves metrics, page and API [default: 127.0.0.1:9787, or a free port if it is taken]
    #[arg(long = "web.listen-address", value_name = "ADDRESS")]
    listen_address: Option<SocketAddr>,

    /// Folder that keeps the history; without it, the history is deleted when the drill ends
    #[arg(long, value_name = "FOLDER")]
    history_dir: Option<PathBuf>,
}

const DRILL_EPILOGUE: &str = "\
Exit status:
    0  the canary found the injected fault in every batch
    1  it did not, or it could not continue
    2  wrong usage
  130  --once, aborted by a signal";

/// Run a LiveKit server with a demo agent on this machine until Ctrl-C
///
/// Listens only on 127.0.0.1, and prints the URL and the key pair that `once`
/// needs. The agent greets, listens and replies. With a fault, the agent or the
/// server fails as a real one does.
#[derive(Args)]
#[command(after_help = format!("{}\n\n{}", fault::SYNTAX, report::SYNTAX), verbatim_doc_comment)]
struct SandboxArgs {
    /// TCP port; 0 selects a free one
    #[arg(long, default_value_t = 7880)]
    port: u16,

    /// Fault to inject, as described below; can be repeated
    #[arg(long = "fault", value_name = "FAULT")]
    faults: Vec<FaultRule>,

    /// Name that the agent registers under; if it is empty, the agent is dispatched to every new room
    #[arg(long, value_name = "NAME", default_value = "demo")]
    agent_name: String,

    /// Append what the agents observe and do to FILE, one JSON object per line, as described below
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Ask a daemon on this machine whether it is healthy
///
/// For a container's health check. If the port does not speak plain HTTP, the
/// request goes over TLS. Every certificate of the daemon is accepted.
///
/// Exit status:
///   0  the daemon answers with success
///   1  it does not
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct HealthArgs {
    /// URL to request
    #[arg(value_name = "URL", value_parser = health::http_url, default_value = "http://127.0.0.1:9787/-/healthy")]
    url: url::Url,

    /// Certificate to present, in PEM, if the daemon requires one of its clients
    #[arg(long, value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// For a terminal
    Table,
    /// Everything that the canary found, for programs
    Json,
    /// For a comment on a pull request
    Markdown,
    /// For a CI system's test report
    Junit,
}

/// The values that a flag accepts: those of the setting that it sets.
fn value_names<T>() -> PossibleValuesParser
where
    T: Copy + Into<&'static str> + VariantArray,
{
    let names = T::VARIANTS.iter().map(|value| (*value).into());
    names.collect::<Vec<&'static str>>().into()
}

/// What the exit status means to a script that acts on it. `docs/exit-status.md` describes it per command.
///
/// The variants are in ascending order of precedence: among the rooms of a batch, the greatest decides. A failed agent
/// outranks a plan limit and an inconclusive room, because a pipeline must not pass a deploy whose agent failed. Wrong
/// settings outrank the agent, because what such a batch found is not reliable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Exit {
    Ok,
    /// There is no verdict on the agent.
    Inconclusive,
    PlanLimit,
    /// The agent failed, or no agent answered the dispatch.
    Agent,
    /// Wrong usage, settings or credentials.
    Config,
    Aborted,
    /// The daemon failed, or a second signal ended it before its clean-up was done. No room's outcome leads here.
    CanaryFailed,
}

impl Exit {
    /// The status that the outcome of one room asks for.
    fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Ok,
            Outcome::Aborted => Self::Aborted,
            Outcome::Failed(failure) => Self::of_origin(failure.reason.origin()),
        }
    }

    fn of_origin(origin: Origin) -> Self {
        match origin {
            Origin::Agent | Origin::Undetermined => Self::Agent,
            Origin::Limit => Self::PlanLimit,
            Origin::Config => Self::Config,
            Origin::Livekit | Origin::Network | Origin::External | Origin::Canary => {
                Self::Inconclusive
            }
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Agent | Exit::CanaryFailed => 1,
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
        Command::Once(args) => once::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Rules(args) => rules::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Drill(args) => drill::run(&args),
        Command::Sandbox(args) => sandbox::run(&args),
        Command::Health(args) => health::run(&args),
    };
    exit.unwrap_or_else(|error| {
        print_error(&error_text(&error));
        Exit::Config
    })
    .into()
}

/// The text of an error. Problems of the settings have their own layout; any other error is printed with its causes.
fn error_text(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Problems>() {
        Some(problems) => problems.to_string(),
        None => format!("error: {error:#}"),
    }
}

fn no_such_target(name: &str, known: &[String]) -> Problems {
    Problems::single(
        format!("target {name:?} is not configured"),
        match known {
            [] => "the settings have no targets".to_owned(),
            _ => format!("choose one of: {}", known.join(", ")),
        },
    )
}

fn environment() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os()
}

/// Reports a panic in one line, without a backtrace.
///
/// The driver of a probe catches its panic and turns it into the outcome `internal`, so the process continues.
fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let place = place.as_deref().unwrap_or("an unknown place");
        let message = panic.payload_as_str().unwrap_or("no message");
        if tracing::dispatcher::has_been_set() {
            tracing::error!(place, "internal error: {message}");
        } else {
            print_error(&format!("error: internal error at {place}: {message}"));
        }
    }));
}

/// One worker thread serves every room. The work is mostly waiting: waking a second thread costs more than that thread saves.
fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?)
}

/// Prints an error, a warning or a notice on stderr.
fn print_error(message: &str) {
    let mut stderr = std::io::stderr().lock();
    let written = writeln!(stderr, "{message}");
    // A closed stderr must not stop the command: the rooms still have to be cleaned up.
    drop(written);
}

/// Prints the result on stdout. A closed pipe is not an error: its reader, such as `head`, wanted no more.
fn print(text: &str) -> anyhow::Result<()> {
    print_unless_closed(text).map(drop)
}

/// Prints on stdout and returns whether stdout is still open, for a command that stops when it is not.
fn print_unless_closed(text: &str) -> anyhow::Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to stdout")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_of_once_names_the_origins_of_each_exit_status() {
        let lines = ONCE_EPILOGUE.replace("\n       ", " ");
        for origin in Origin::ALL {
            let status = match Exit::of_origin(origin) {
                Exit::Agent => "    1  ",
                Exit::Config => "    2  ",
                Exit::PlanLimit => "    3  ",
                Exit::Inconclusive => "    4  ",
                other => panic!("{origin:?} leads to {other:?}"),
            };
            let line = lines.lines().find(|line| line.starts_with(status)).unwrap();
            assert!(
                line.contains(origin.label()),
                "{origin:?} is not in {line:?}"
            );
        }
    }
}
