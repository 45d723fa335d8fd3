//! `check`: prints how the canary reads the settings, and tests the credentials.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use chrono::Utc;
use humantime::format_duration;

use super::forecast::{self, Forecast};
use super::{CheckArgs, Exit, once, print};
use crate::config::{
    Caller, CallerMode, Channel, Config, Period, Problems, Project, RampMode, RawConfig,
    RoomSettings, Stay, Target,
};
use crate::http::WebConfig;
use crate::livekit::wire::api::ApiError;
use crate::livekit::wire::token::Keys;
use crate::livekit::{RoomName, wire};
use crate::notify::{SendError, send_test};
use crate::probe::USUAL_HEADER_BYTES;
use crate::probe::driver::join_token_bytes;
use crate::report::counted;
use crate::telemetry;

/// HTTP errors that wrong settings cause: 401 and 403 by the key pair, 404 by a URL that is not LiveKit's, 451 by a project
/// that is pinned to another region.
const WRONG_SETTINGS: [u16; 4] = [401, 403, 404, 451];

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<Exit> {
    let mut draft = RawConfig::read(args.config.as_deref(), super::environment())?;
    let mut only = args.target.clone();
    let flags: [(&str, &[&str], &Option<String>); 2] = [
        ("--agent-name", &["agent_name"], &args.agent_name),
        (
            "--deployment",
            &["dispatch", "deployment"],
            &args.deployment,
        ),
    ];
    for (flag, key, value) in flags {
        if let Some(value) = value {
            let name = once::choose_target(&draft, only.as_deref())?;
            draft.ensure_target(&name);
            draft.set_by_flag(&name, key, value.clone(), flag);
            only = Some(name);
        }
    }
    let all = draft.validate()?;
    forecast::check_history_size(&all, Utc::now().date_naive())?;
    let web = WebConfig::load(&all.daemon.http).map_err(anyhow::Error::msg)?;
    // The targets of a project share its limits, so the forecast needs all of them, even if only one is printed.
    let forecast = Forecast::new(&all, Utc::now());
    let mut config = all.clone();
    if let Some(name) = &only {
        narrow(&mut config, name)?;
    }
    telemetry::log_to(std::io::stderr, false, "warn");
    let mut text = String::new();
    let mut exit = Exit::Ok;
    let connections = if args.connect {
        connect(&config)?
    } else {
        Vec::new()
    };
    if let (Some(file), Some(summary)) = (&all.daemon.http.web_config_file, web.summary()) {
        let listen = all.daemon.http.listen;
        writeln!(text, "http on {listen}").expect("writing to a string can't fail");
        entry(
            &mut text,
            "web config",
            &format!("{}: {summary}", file.display()),
        );
        text.push('\n');
    }
    for (index, (name, project)) in config.projects.iter().enumerate() {
        describe_project(&mut text, name, project);
        if let Some(connection) = connections.get(index) {
            let (line, project_exit) = connection_result(connection);
            entry(&mut text, "connect", &line);
            // Wrong settings of one project outrank an unreachable server of another.
            exit = exit.max(project_exit);
        }
        warn(&mut text, &forecast.warnings_of_project(name, project));
        text.push('\n');
    }
    for (name, target) in &config.targets {
        describe_target(&mut text, name, target);
        for (key, value) in forecast.of_target(name) {
            entry(&mut text, key, &value);
        }
        warn(&mut text, &forecast.warnings_of_target(name));
        warn(&mut text, &Vec::from_iter(warning_of_caller(target)));
        let project = &config.projects[&target.project];
        warn(&mut text, &warning_of_token(target, project)?);
        text.push('\n');
    }
    if config.targets.is_empty() {
        text.push_str("no targets are configured\n");
    }
    if args.notify {
        let notified = notify(&all.notify)?;
        text.push_str(&notification_results(&notified));
        let exits = notified.values().map(exit_of_notification);
        exit = exits.fold(exit, Exit::max);
    }
    print(text.trim_end_matches('\n'))?;
    print("\n")?;
    Ok(exit)
}

/// Sends a test message to every channel, all at the same time.
fn notify(channels: &BTreeMap<String, Channel>) -> anyhow::Result<Notified> {
    let runtime = super::runtime()?;
    let sent = channels
        .iter()
        .map(|(name, channel)| async { (name.clone(), send_test(channel).await) });
    let results = runtime.block_on(futures_util::future::join_all(sent));
    runtime.shutdown_background();
    Ok(results.into_iter().collect())
}

/// What each channel answered, and how fast.
type Notified = BTreeMap<String, Result<Duration, SendError>>;

fn notification_results(notified: &Notified) -> String {
    if notified.is_empty() {
        return "notify: no channels are configured; add [notify.NAME]\n".to_owned();
    }
    let width = notified.keys().map(String::len).max().unwrap_or(0);
    let lines = notified.iter().map(|(name, result)| {
        let result = match result {
            Ok(took) => format!("delivered in {} ms", took.as_millis()),
            Err(error) => format!("failed: {error}"),
        };
        format!("notify {name:<width$}   {result}\n")
    });
    lines.collect()
}

fn exit_of_notification(result: &Result<Duration, SendError>) -> Exit {
    match result {
        Ok(_) => Exit::Ok,
        Err(error) if error.blames_settings() => Exit::Config,
        Err(_) => Exit::Inconclusive,
    }
}

/// Removes every other target, and the projects that only they use.
fn narrow(config: &mut Config, target: &str) -> Result<(), Problems> {
    let names: Vec<String> = config.targets.keys().cloned().collect();
    config.targets.retain(|name, _| name == target);
    let Some(target) = config.targets.values().next() else {
        return Err(super::no_such_target(target, &names));
    };
    config.projects.retain(|name, _| *name == target.project);
    Ok(())
}

/// Adds one line: a setting and its value.
fn entry(text: &mut String, key: &str, value: &str) {
    writeln!(text, "  {key:<12}{value}").expect("writing to a string can't fail");
}

fn warn(text: &mut String, warnings: &[String]) {
    for warning in warnings {
        writeln!(text, "  warning: {warning}").expect("writing to a string can't fail");
    }
}

fn describe_project(text: &mut String, name: &str, project: &Project) {
    writeln!(text, "project {name}").expect("writing to a string can't fail");
    entry(text, "url", project.url.as_str());
    if let Some(file) = &project.ca_file {
        entry(text, "ca file", &file.display().to_string());
    }
    if let Some(id) = &project.cloud_project {
        entry(text, "cloud", id);
    }
    entry(
        text,
        "rooms",
        &format!("at most {} at once", project.max_rooms),
    );
    let limits: Vec<String> = Period::ALL
        .into_iter()
        .filter_map(|period| Some((project.budget.limit(period)?, period.label())))
        .map(|(limit, period)| format!("{} per UTC {period}", limit.as_secs() / 60))
        .collect();
    if !limits.is_empty() {
        let limits = limits.join(", ");
        entry(text, "budget", &format!("agent minutes: at most {limits}"));
    }
}

fn describe_target(text: &mut String, name: &str, target: &Target) {
    writeln!(text, "target {name} on project {}", target.project)
        .expect("writing to a string can't fail");
    let agent = target.agent_name.as_deref().unwrap_or("any");
    let dispatch = target.dispatch.mode.name();
    let deployment = target.dispatch.named_deployment();
    let deployment = deployment.map_or(String::new(), |name| format!(", deployment {name}"));
    entry(
        text,
        "agent",
        &format!("{agent}{deployment}, {dispatch} dispatch"),
    );
    if target.room != RoomSettings::default() {
        let room = &target.room;
        let participants = match room.max_participants {
            0 => "without a limit of participants".to_owned(),
            1 => "for 1 participant".to_owned(),
            limit => format!("for {limit} participants"),
        };
        entry(
            text,
            "room",
            &format!("named {}…, {participants}", room.name_prefix),
        );
    }
    let batch = &target.batch;
    let stay = match batch.stay {
        Stay::Together => "held together for",
        Stay::OneByOne => "one by one, each held for",
    };
    let ramp = match batch.ramp {
        RampMode::AfterJoin | RampMode::Burst => batch.ramp.name().to_owned(),
        RampMode::Interval => format!("one every {}", format_duration(batch.interval)),
    };
    let rooms = format!("{}, {ramp}", counted(batch.rooms as u64, "room"));
    entry(
        text,
        "batch",
        &format!("{rooms}, {stay} {}", format_duration(batch.hold)),
    );
    entry(text, "caller", &caller_line(&target.caller));
    let deadlines = &target.deadlines;
    let [join, speech] = [deadlines.join, deadlines.speech].map(format_duration);
    entry(
        text,
        "deadlines",
        &format!("join {join}, first speech {speech}"),
    );
}

fn caller_line(caller: &Caller) -> String {
    let silence = format_duration(caller.silence);
    if caller.mode == CallerMode::PassThrough {
        return format!("pass_through, {silence} later");
    }
    let mut line = caller.mode.name().to_owned();
    if caller.mode == CallerMode::Script {
        write!(line, " of {}", counted(caller.lines.len() as u64, "line"))
            .expect("writing to a string can't fail");
    }
    let turns = counted(caller.turns.into(), "turn");
    let each = if caller.turns > 1 { "each " } else { "" };
    write!(line, ", {turns}, {each}after {silence} of silence")
        .expect("writing to a string can't fail");
    if caller.turns > 1 && caller.pause > caller.silence {
        let pause = format_duration(caller.pause);
        write!(line, ", further ones after {pause}").expect("writing to a string can't fail");
    }
    if caller.speaks_first {
        line.push_str(", speaks first");
    }
    if caller.interrupt {
        line.push_str(", interrupts once");
    }
    line
}

fn warning_of_caller(target: &Target) -> Option<String> {
    let passes_through = target.caller.mode == CallerMode::PassThrough;
    passes_through.then(|| {
        "the caller's mode \"pass_through\" shows only the media path, not that the agent answers. Set caller.mode to \"echo\" or \
         \"script\" for that"
            .to_owned()
    })
}

/// The join token carries metadata and attributes, and is a header of the signal connection's request.
fn warning_of_token(target: &Target, project: &Project) -> anyhow::Result<Vec<String>> {
    let keys = Keys::new(project.api_key.clone(), project.api_secret.clone())?;
    let random = "x".repeat(19);
    let room = RoomName(format!("{}{random}", target.room.name_prefix));
    let bytes = join_token_bytes(target, &keys, &room);
    let warning = format!(
        "the join token has {bytes} bytes. Many proxies accept only {USUAL_HEADER_BYTES} bytes of a header, and refuse the signal \
         connection. Shorten the metadata and the attributes, or set dispatch.mode to \"explicit\" or \"room\""
    );
    let too_large = bytes > USUAL_HEADER_BYTES;
    Ok(Vec::from_iter(too_large.then_some(warning)))
}

/// Lists a room that does not exist on each project: the request needs valid credentials and changes nothing.
fn connect(config: &Config) -> anyhow::Result<Vec<Result<(), ApiError>>> {
    let apis = config
        .projects
        .values()
        .map(|project| Ok(wire::access(project)?.1))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let runtime = super::runtime()?;
    let no_room = [RoomName("canary-check".to_owned())];
    let calls = apis.iter().map(|api| async {
        let call = api.list_rooms(&no_room).await;
        call.result.map(drop)
    });
    let results = runtime.block_on(futures_util::future::join_all(calls));
    runtime.shutdown_background();
    Ok(results)
}

fn connection_result(result: &Result<(), ApiError>) -> (String, Exit) {
    match result {
        Ok(()) => ("ok".to_owned(), Exit::Ok),
        Err(error) => {
            let exit = match error {
                // Below 400, another server than LiveKit answered: a redirect, or a page.
                ApiError::Refused(refusal)
                    if refusal.status < 400 || WRONG_SETTINGS.contains(&refusal.status) =>
                {
                    Exit::Config
                }
                _ => Exit::Inconclusive,
            };
            (format!("failed: {error}"), exit)
        }
    }
}
