//! Validates every key and its range, and turns raw settings into a [`Config`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono_tz::{TZ_VARIANTS, Tz};
use humantime::format_duration;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{self, PemObject};
use url::Url;

use super::caller;
use super::credential::{self, SecretLookup, SecretText, is_override};
use super::cron;
use super::file::{MAX_CA_BYTES, read_regular};
use super::notify;
use super::problem::{Problem, Problems, alternatives, from_variable, in_file, shown, similar};
use super::raw::{EnvCredentials, RawConfig};
use super::section::{Lookup, MAX_WAIT, MIN_WAIT, RawValue, Section, Table, http_url};
use super::settings::{
    Alerts, Backoff, Batch, Budget, Config, Confirm, CredentialFiles, DaemonSettings, Deadlines,
    Dispatch, DispatchMode, Engine, HistorySettings, Http, Ice, Lifetime, Objectives,
    ParticipantSettings, Project, RampMode, RecordAudio, RoomSettings, Schedule, Speech, Stay,
    Target,
};

const MAX_ROOMS: usize = 10_000;
const DAY: Duration = Duration::from_hours(24);
const YEAR: Duration = Duration::from_hours(8766);
/// Ten years; the upper bound of retention and of agent time.
const MAX_RETENTION: Duration = Duration::from_hours(10 * 8766);
/// Rarer batches would detect nothing in useful time.
const MAX_BATCH_INTERVAL: Duration = Duration::from_hours(24 * 30);
/// A confirmation looks whether a failure lasts. More rooms would show no more.
const MAX_CONFIRMING_ROOMS: usize = 5;
const MIN_CONFIRM_LONGEST: Duration = Duration::from_mins(1);
const MIN_BATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The longest name of a deployment that LiveKit accepts (`MaxDeploymentLength` of its protocol).
const MAX_DEPLOYMENT_BYTES: usize = 64;

/// The longest beginning of a room's name. LiveKit allows 256 characters for the whole name by default.
const MAX_NAME_PREFIX: usize = 64;

/// The keys of a project that only commands that connect need.
const CREDENTIALS: [&str; 5] = [
    "api_key",
    "api_key_file",
    "api_secret",
    "api_secret_file",
    "ca_file",
];

/// Settings of a project that its targets must be consistent with.
#[derive(Clone, Copy)]
struct ProjectLimits {
    max_rooms: usize,
    ice: Ice,
}

impl RawConfig {
    /// # Errors
    /// All problems of the settings.
    pub fn validate(mut self) -> Result<Config, Problems> {
        let mut problems = std::mem::take(&mut self.problems);
        let config = config(self, &mut problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Problems::new(problems))
        }
    }
}

fn config(raw: RawConfig, problems: &mut Vec<Problem>) -> Config {
    let fallback = raw.fallback;
    let mut root = Section::root(raw.settings.cache, problems);
    let mut project_entries = root.named("projects");
    let target_entries = root.named("targets");
    let notify_entries = root.named("notify");
    let daemon = DaemonSettings {
        http: http(root.table("http")),
        history: history(root.table("history"), &raw.folder),
        lifetime: lifetime(root.table("lifetime")),
    };
    let alerts = alerts(root.table("alerts"));
    // If no project is configured, the environment describes the only one.
    if project_entries.is_empty() {
        project_entries.push((super::DEFAULT_PROJECT.to_owned(), None, Table::new()));
    }
    root.finish();

    let mut projects = BTreeMap::new();
    let mut limits = BTreeMap::new();
    for (name, place, mut table) in project_entries {
        if !raw.signs_in {
            table.retain(|key, _| !CREDENTIALS.contains(&key.as_str()));
        }
        let mut section = Section::of("project", &name, place, table, problems);
        let limit = ProjectLimits {
            max_rooms: section.number("max_rooms", Project::DEFAULT_MAX_ROOMS, 1..=MAX_ROOMS),
            ice: section.choice("ice", "an ICE mode"),
        };
        limits.insert(name.clone(), limit);
        if let Some(project) = project(section, limit, &fallback) {
            projects.insert(name, project);
        }
    }
    let target_names: Vec<&str> = target_entries
        .iter()
        .map(|(name, ..)| name.as_str())
        .collect();
    let mut notify = BTreeMap::new();
    for (name, place, mut table) in notify_entries {
        if !raw.signs_in {
            table.retain(|key, _| !notify::SECRETS.contains(&key.as_str()));
        }
        let mut section = Section::of("notify", &name, place, table, problems);
        let ca_file = ca_file(&mut section);
        if let Some(channel) = notify::read(section, ca_file, &target_names, raw.signs_in) {
            notify.insert(name, channel);
        }
    }
    let targets = target_entries
        .into_iter()
        .map(|(name, place, table)| {
            let section = Section::of("target", &name, place, table, problems);
            (name, target(section, &limits, raw.signs_in))
        })
        .collect();
    Config {
        daemon,
        alerts,
        notify,
        projects,
        targets,
    }
}

fn http(mut section: Section<'_>) -> Http {
    let default = Http::default();
    let listen = match section.text("listen") {
        Lookup::Found(text) => text.value.parse().unwrap_or_else(|_| {
            let message = format!("{} is not an IP address with a port", shown(&text.value));
            let hint = "write it as \"0.0.0.0:9787\" or \"[::]:9787\"";
            section.problem("listen", text.place, message, hint);
            default.listen
        }),
        Lookup::Missing | Lookup::Invalid => default.listen,
    };
    let web_config_file = path(&mut section, "web_config_file");
    let enable_lifecycle = section.boolean("enable_lifecycle", default.enable_lifecycle);
    let sensitive = section.choice("sensitive", "a group of readers");
    let external_url = external_url(&mut section);
    section.finish();
    Http {
        listen,
        web_config_file,
        enable_lifecycle,
        sensitive,
        external_url,
    }
}

/// The address of the page. Links append a path to it.
fn external_url(section: &mut Section<'_>) -> Option<Url> {
    let Lookup::Found(text) = section.text("external_url") else {
        return None;
    };
    let mistake = match http_url(&text.value) {
        Err(mistake) => mistake,
        Ok(url) if url.query().is_some() || url.fragment().is_some() => {
            "it has a query or a fragment, but links append a path to it"
        }
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            "it contains credentials, which every alert and message would show"
        }
        Ok(url) => return Some(url),
    };
    let hint = "write it as \"https://canary.example.com\", with the path of a reverse proxy if there is one";
    section.problem("external_url", text.place, mistake.to_owned(), hint);
    None
}

/// A file or folder; it need not exist.
fn path(section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
    let Lookup::Found(text) = section.text(key) else {
        return None;
    };
    if !text.value.trim().is_empty() {
        return Some(text.path());
    }
    section.problem(
        key,
        text.place,
        "the path is empty".to_owned(),
        "set a path, or remove the key",
    );
    None
}

fn history(mut section: Section<'_>, folder: &Path) -> HistorySettings {
    let default = HistorySettings::default();
    let [keep_place, failures_place, recordings_place] =
        ["keep", "keep_failures", "keep_recordings"].map(|key| section.place_of(key));
    let dir = path(&mut section, "dir").unwrap_or_else(|| folder.join(default.dir));
    let mut duration = |key, default| section.duration(key, default, DAY..=MAX_RETENTION);
    let keep = duration("keep", default.keep);
    let keep_failures = duration("keep_failures", default.keep_failures);
    let history = HistorySettings {
        dir,
        keep,
        keep_failures,
        // A recording is deleted with its batch, so a shorter retention of batches shortens the default.
        keep_recordings: duration(
            "keep_recordings",
            default.keep_recordings.min(keep_failures),
        ),
        max_recording_megabytes: section.number(
            "max_recording_megabytes",
            default.max_recording_megabytes,
            1..=1_000_000,
        ),
        max_megabytes: section.number("max_megabytes", default.max_megabytes, 8..=1_000_000),
    };
    if history.keep_failures < history.keep {
        let message = "shorter than keep".to_owned();
        let hint = "set it to at least the value of keep: old failures are what people look up";
        section.problem(
            "keep_failures",
            failures_place.or(keep_place),
            message,
            hint,
        );
    }
    if history.keep_recordings > history.keep_failures {
        let message = "longer than keep_failures".to_owned();
        let hint =
            "set it to at most the value of keep_failures: a recording is deleted with its batch";
        section.problem("keep_recordings", recordings_place, message, hint);
    }
    section.finish();
    history
}

fn lifetime(mut section: Section<'_>) -> Lifetime {
    let default = Lifetime::default();
    let mut duration = |key, default| section.duration(key, default, Duration::ZERO..=MAX_WAIT);
    let lifetime = Lifetime {
        startup_delay: duration("startup_delay", default.startup_delay),
        drain_grace: duration("drain_grace", default.drain_grace),
        shutdown_linger: duration("shutdown_linger", default.shutdown_linger),
    };
    section.finish();
    lifetime
}

fn alerts(mut section: Section<'_>) -> Alerts {
    let default = Alerts::default();
    let ticket_place = section
        .place_of("ticket")
        .or_else(|| section.place_of("page"));
    let alerts = Alerts {
        slo_window: section.duration("slo_window", default.slo_window, 7 * DAY..=YEAR),
        scrape_interval: section.duration(
            "scrape_interval",
            default.scrape_interval,
            MIN_BATCH_INTERVAL..=Duration::from_mins(2),
        ),
        page: line(&mut section, "page", default.page),
        ticket: line(&mut section, "ticket", default.ticket),
        runbook_base_url: runbook_base_url(&mut section, default.runbook_base_url),
    };
    if alerts.page == alerts.ticket {
        let message = "it has the same value as page".to_owned();
        let hint = "set two different values: Alertmanager routes alerts by severity";
        section.problem("ticket", ticket_place, message, hint);
    }
    section.finish();
    alerts
}

/// One line of text for a label. Braces are refused: Prometheus would expand them as a template.
fn line(section: &mut Section<'_>, key: &'static str, default: String) -> String {
    let Lookup::Found(text) = section.text(key) else {
        return default;
    };
    let fits = |char: char| !char.is_control() && !matches!(char, '{' | '}');
    if !text.value.trim().is_empty() && text.value.chars().all(fits) {
        return text.value;
    }
    let message = format!("{} is not one line of text", shown(&text.value));
    section.problem(key, text.place, message, "write one line without braces");
    default
}

/// The address of the page that describes every alert. Each alert appends its own fragment.
fn runbook_base_url(section: &mut Section<'_>, default: Url) -> Url {
    let Lookup::Found(text) = section.text("runbook_base_url") else {
        return default;
    };
    let mistake = match http_url(&text.value) {
        Err(mistake) => mistake,
        Ok(url) if url.fragment().is_some() => "it has a fragment, but every alert adds its own",
        // Prometheus expands braces in an annotation as a template.
        Ok(url) if url.as_str().contains(['{', '}']) => "it contains braces",
        Ok(url) => return url,
    };
    let hint = "write it as \"https://host/path\": every alert appends its own anchor";
    section.problem("runbook_base_url", text.place, mistake.to_owned(), hint);
    default
}

fn project(
    mut section: Section<'_>,
    limits: ProjectLimits,
    fallback: &EnvCredentials,
) -> Option<Project> {
    let url = server_url(&mut section, fallback.url.as_deref());
    let api_key = key_or_secret(
        &mut section,
        ["api_key", "api_key_file", "LIVEKIT_API_KEY"],
        fallback.api_key.as_deref(),
    );
    let api_secret = key_or_secret(
        &mut section,
        ["api_secret", "api_secret_file", "LIVEKIT_API_SECRET"],
        fallback.api_secret.as_deref(),
    );
    let ca_file = ca_file(&mut section);
    let cloud_project = cloud_project(&mut section);
    let api_timeout = section.duration(
        "api_timeout",
        Project::DEFAULT_API_TIMEOUT,
        MIN_WAIT..=MAX_WAIT,
    );
    let budget = budget(section.table("budget"));
    let backoff = backoff(section.table("backoff"));
    section.finish();
    Some(Project {
        url: url?,
        credential_files: CredentialFiles {
            api_key: api_key.as_ref().and_then(|key| key.file.clone()),
            api_secret: api_secret.as_ref().and_then(|secret| secret.file.clone()),
        },
        api_key: api_key?.value.into(),
        api_secret: api_secret?.value.into(),
        ca_file,
        cloud_project,
        ice: limits.ice,
        api_timeout,
        max_rooms: limits.max_rooms,
        budget,
        backoff,
    })
}

fn budget(mut section: Section<'_>) -> Budget {
    let month_place = section.place_of("agent_time_per_month");
    let budget = Budget {
        agent_time_per_day: agent_time(&mut section, "agent_time_per_day"),
        agent_time_per_month: agent_time(&mut section, "agent_time_per_month"),
    };
    if let (Some(day), Some(month)) = (budget.agent_time_per_day, budget.agent_time_per_month)
        && month < day
    {
        let message = "less than agent_time_per_day".to_owned();
        let hint = "the monthly limit also bounds each day: raise it, or remove agent_time_per_day";
        section.problem("agent_time_per_month", month_place, message, hint);
    }
    section.finish();
    budget
}

/// A limit without a default.
fn agent_time(section: &mut Section<'_>, key: &'static str) -> Option<Duration> {
    // Zero is out of range, so it can stand for a missing or wrong value.
    let limit = section.duration(key, Duration::ZERO, Duration::from_mins(1)..=MAX_RETENTION);
    (!limit.is_zero()).then_some(limit)
}

fn backoff(mut section: Section<'_>) -> Backoff {
    let default = Backoff::default();
    let place = section.place_of("longest");
    let backoff = Backoff {
        first: section.duration("first", default.first, MIN_WAIT..=MAX_WAIT),
        longest: section.duration("longest", default.longest, MIN_WAIT..=DAY),
    };
    if backoff.longest < backoff.first {
        let message = "shorter than first".to_owned();
        section.problem(
            "longest",
            place,
            message,
            "set it to at least the value of first",
        );
    }
    section.finish();
    backoff
}

/// Messages about the URL don't repeat it, because it may contain credentials.
fn server_url(section: &mut Section<'_>, fallback: Option<&str>) -> Option<Url> {
    let text = match (section.text("url"), fallback) {
        (Lookup::Found(text), _) => text,
        (Lookup::Invalid, _) => return None,
        (Lookup::Missing, Some(url)) => RawValue {
            value: url.to_owned(),
            place: Some(from_variable("LIVEKIT_URL")),
        },
        (Lookup::Missing, None) => {
            section.missing("url", "set LIVEKIT_URL, or url in the settings");
            return None;
        }
    };
    let hint = "write it as \"wss://host\" or \"ws://host:7880\"";
    let url = match Url::parse(&text.value) {
        Ok(url) => url,
        Err(error) => {
            section.problem("url", text.place, format!("not a URL: {error}"), hint);
            return None;
        }
    };
    let mistake = if !matches!(url.scheme(), "ws" | "wss" | "http" | "https") {
        "its scheme is not ws, wss, http or https"
    } else if !url.username().is_empty() || url.password().is_some() {
        "it contains credentials, which belong in api_key and api_secret"
    } else if url.query().is_some() || url.fragment().is_some() {
        "it contains a query or a fragment, which a LiveKit URL does not have"
    } else {
        return Some(url);
    };
    section.problem("url", text.place, mistake.to_owned(), hint);
    None
}

/// Half of the key pair: from the settings, or from the environment.
fn key_or_secret(
    section: &mut Section<'_>,
    [key, file_key, variable]: [&'static str; 3],
    fallback: Option<&str>,
) -> Option<SecretText> {
    const EMPTY: &str = "set a value, or remove the key to use the environment variable";
    match credential::find(section, key, file_key, EMPTY) {
        SecretLookup::Found(found) => Some(found),
        SecretLookup::Invalid => None,
        SecretLookup::Missing => {
            if let Some(value) = fallback {
                let (value, place) = (value.to_owned(), Some(from_variable(variable)));
                credential::inline(section, key, RawValue { value, place }, EMPTY)
            } else {
                let hint = format!("set {variable}, or {key} or {file_key} in the settings");
                section.missing(key, &hint);
                None
            }
        }
    }
}

fn ca_file(section: &mut Section<'_>) -> Option<PathBuf> {
    let Lookup::Found(text) = section.text("ca_file") else {
        return None;
    };
    let path = text.path();
    let certificates = read_regular(&path, MAX_CA_BYTES)
        .map_err(pem::Error::Io)
        .and_then(|pem| CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>());
    let mistake = match certificates {
        Ok(certificates) if certificates.is_empty() => {
            "this file contains no certificate".to_owned()
        }
        Ok(_) => return Some(path),
        Err(error) => format!("can't read certificates from this file: {error}"),
    };
    let hint = "name a PEM file; its blocks begin with -----BEGIN CERTIFICATE-----";
    section.problem("ca_file", text.place, mistake, hint);
    None
}

fn cloud_project(section: &mut Section<'_>) -> Option<String> {
    let Lookup::Found(text) = section.text("cloud_project") else {
        return None;
    };
    let well_formed = text.value.strip_prefix("p_").is_some_and(|id| {
        !id.is_empty()
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    });
    if well_formed {
        return Some(text.value);
    }
    let message = "not a project id of LiveKit Cloud".to_owned();
    let hint = "the id begins with p_; the address of the project's dashboard contains it";
    section.problem("cloud_project", text.place, message, hint);
    None
}

/// `reads_audio`: whether the caller's audio files are read.
fn target(
    mut section: Section<'_>,
    projects: &BTreeMap<String, ProjectLimits>,
    reads_audio: bool,
) -> Target {
    let default = Target::default();
    let project = project_of(&mut section, projects);
    let limits = project
        .as_ref()
        .and_then(|name| projects.get(name).map(|limits| (name.as_str(), *limits)));
    let engine = engine(&mut section, limits);
    let agent_name = match section.text("agent_name") {
        Lookup::Found(text) => {
            let value = text.value;
            let hint = "set the name that the agent registers under";
            if value.trim().is_empty() {
                section.problem("agent_name", text.place, "empty".to_owned(), hint);
            } else if value.trim() != value {
                let message = "it has white space around it".to_owned();
                section.problem("agent_name", text.place, message, hint);
            }
            Some(value)
        }
        // Empty instead of absent, so that it isn't also reported as missing.
        Lookup::Invalid => Some(String::new()),
        Lookup::Missing => None,
    };
    let dispatch = dispatch(section.table("dispatch"));
    if dispatch.mode.facts().names_agent && agent_name.is_none() {
        let hint = format!(
            "set the name that the agent registers under: {} dispatch needs it",
            dispatch.mode.name()
        );
        section.missing("agent_name", &hint);
    }
    let batch = batch(section.table("batch"), limits);
    let confirm = confirm(section.table("confirm"), batch.stay, limits);
    let deadlines = deadlines(section.table("deadlines"));
    let caller = caller::read(section.table("caller"), reads_audio);
    let expect = caller::expect(section.table("expect"), &caller);
    let target = Target {
        project: project.unwrap_or_default(),
        agent_name,
        engine,
        dispatch,
        room: room(section.table("room")),
        participant: participant(section.table("participant")),
        schedule: schedule(section.table("schedule")),
        objectives: objectives(section.table("objectives"), &deadlines),
        batch,
        confirm,
        deadlines,
        caller,
        speech: speech(section.table("speech")),
        expect,
        transcript: section.boolean("transcript", default.transcript),
        record: record(section.table("record"), engine),
        late_agent_window: section.duration(
            "late_agent_window",
            default.late_agent_window,
            Duration::ZERO..=MAX_WAIT,
        ),
    };
    section.finish();
    target
}

fn record(mut section: Section<'_>, engine: Engine) -> RecordAudio {
    let place = section.place_of("audio");
    let record = section.choice("audio", "one of never, failures and always");
    if record != RecordAudio::Never && engine == Engine::Libwebrtc {
        let message =
            "the engine \"libwebrtc\" can't record: its SDK does not pass on the packets of a call";
        let hint = "set engine = \"native\", or record.audio = \"never\"";
        section.problem("audio", place, message.to_owned(), hint);
    }
    section.finish();
    record
}

fn engine(section: &mut Section<'_>, project: Option<(&str, ProjectLimits)>) -> Engine {
    let place = section.place_of("engine");
    let engine = section.choice("engine", "an engine");
    let mut problem = |message: String, hint: &str| {
        section.problem("engine", place.clone(), message, hint);
    };
    if !Engine::BUILT_IN.contains(&engine) {
        let message = format!("{:?} is not part of this binary", engine.name());
        problem(
            message,
            "build the canary with --features libwebrtc, or set engine = \"native\"",
        );
    }
    if engine == Engine::Libwebrtc
        && let Some((name, limits)) = project
        && let Some(transport) = match limits.ice {
            Ice::Tcp => Some("TCP"),
            Ice::Tls => Some("TURN over TLS"),
            Ice::All | Ice::Relay => None,
        }
    {
        let message = format!(
            "{:?} can't be restricted to {transport}, but project {name:?} sets ice = {:?}",
            engine.name(),
            limits.ice.name(),
        );
        problem(
            message,
            "set ice = \"all\" or \"relay\" in the project, or engine = \"native\"",
        );
    }
    engine
}

fn project_of(
    section: &mut Section<'_>,
    projects: &BTreeMap<String, ProjectLimits>,
) -> Option<String> {
    let names: Vec<&str> = projects.keys().map(String::as_str).collect();
    match section.text("project") {
        Lookup::Invalid => None,
        Lookup::Found(text) if projects.contains_key(&text.value) => Some(text.value),
        Lookup::Found(text) => {
            let message = format!("{} is not a configured project", shown(&text.value));
            let hint = match similar(&text.value, &names) {
                Some(name) => format!("did you mean {name:?}?"),
                None => format!("use {}", alternatives(&names)),
            };
            section.problem("project", text.place, message, &hint);
            None
        }
        Lookup::Missing => {
            if let [only] = names[..] {
                return Some(only.to_owned());
            }
            let hint = format!(
                "several projects are configured: set it to {}",
                alternatives(&names)
            );
            section.missing("project", &hint);
            None
        }
    }
}

fn dispatch(mut section: Section<'_>) -> Dispatch {
    let mode: DispatchMode = section.choice("mode", "a dispatch mode");
    let metadata = of_named_agent(&mut section, mode, "metadata", "metadata");
    let deployment = of_named_agent(&mut section, mode, "deployment", "a deployment");
    let deployment = deployment.filter(|text| {
        let valid = is_deployment(&text.value);
        if !valid {
            let message = format!("{} is not the name of a deployment", shown(&text.value));
            let hint = format!(
                "write it without spaces and underscores, in at most {MAX_DEPLOYMENT_BYTES} bytes: it is the worker's \
                 LIVEKIT_AGENT_DEPLOYMENT"
            );
            section.problem("deployment", text.place.clone(), message, &hint);
        }
        valid
    });
    let [deployment, metadata] = [deployment, metadata].map(|text| text.map(|text| text.value));
    section.finish();
    Dispatch {
        mode,
        deployment: deployment.unwrap_or_default(),
        metadata: metadata.unwrap_or_default(),
    }
}

/// A text that only a request that names the agent can carry.
fn of_named_agent(
    section: &mut Section<'_>,
    mode: DispatchMode,
    key: &'static str,
    what: &str,
) -> Option<RawValue> {
    let Lookup::Found(text) = section.text(key) else {
        return None;
    };
    if mode.facts().names_agent || text.value.is_empty() {
        return Some(text);
    }
    let message = format!("{} dispatch can't carry {what}", mode.name());
    let modes = <DispatchMode as strum::VariantArray>::VARIANTS.iter();
    let named: Vec<_> = modes
        .filter(|mode| mode.facts().names_agent)
        .map(|mode| mode.name())
        .collect();
    let hint = format!("remove it, or set mode to {}", alternatives(&named));
    section.problem(key, text.place, message, &hint);
    None
}

/// LiveKit's rule for the name of a deployment (`ValidateDeployment` of its protocol).
fn is_deployment(name: &str) -> bool {
    let reserved = |byte| byte == b'_' || byte <= b' ' || byte == 0x7f;
    name.len() <= MAX_DEPLOYMENT_BYTES && !name.bytes().any(reserved)
}

fn room(mut section: Section<'_>) -> RoomSettings {
    let default = RoomSettings::default();
    let name_prefix = match section.text("name_prefix") {
        Lookup::Found(text) if is_name_prefix(&text.value) => text.value,
        Lookup::Found(text) => {
            let message = format!("{} can't begin the name of a room", shown(&text.value));
            let hint = format!(
                "use 1 to {MAX_NAME_PREFIX} letters, digits and characters of - _ . ~ : + @"
            );
            section.problem("name_prefix", text.place, message, &hint);
            default.name_prefix
        }
        Lookup::Missing | Lookup::Invalid => default.name_prefix,
    };
    let room = RoomSettings {
        name_prefix,
        metadata: text_or(&mut section, "metadata", default.metadata),
        max_participants: section.number("max_participants", default.max_participants, 0..=1000),
    };
    section.finish();
    room
}

/// Whether a room's name that begins so can be copied into a shell and into the path of a URL.
fn is_name_prefix(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~:+@".contains(&byte);
    (1..=MAX_NAME_PREFIX).contains(&text.len()) && text.bytes().all(allowed)
}

fn participant(mut section: Section<'_>) -> ParticipantSettings {
    let default = ParticipantSettings::default();
    let participant = ParticipantSettings {
        name: text_or(&mut section, "name", default.name),
        metadata: text_or(&mut section, "metadata", default.metadata),
        attributes: attributes(section.table("attributes")),
    };
    section.finish();
    participant
}

/// Any text.
fn text_or(section: &mut Section<'_>, key: &'static str, default: String) -> String {
    match section.text(key) {
        Lookup::Found(text) => text.value,
        Lookup::Missing | Lookup::Invalid => default,
    }
}

fn attributes(mut section: Section<'_>) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::new();
    for (key, text) in section.all_texts() {
        // LiveKit and its agents act on their own attributes: `lk.simulator`, for example, changes how a worker behaves.
        // `lk.mock` is an exception. Users set it to control upstream's test server, and nothing else reads it.
        let reserved = key.starts_with("lk.") && key != "lk.mock";
        if reserved || key == "canary" {
            let message = "this attribute is reserved".to_owned();
            let hint = "use another name: LiveKit reserves lk.*, and canary=true is always set";
            section.problem(&key, text.place, message, hint);
        } else {
            attributes.insert(key, text.value);
        }
    }
    attributes
}

fn schedule(mut section: Section<'_>) -> Schedule {
    let Schedule::Every(default) = Schedule::default() else {
        unreachable!("the default is an interval")
    };
    let every_place = section.place_of("every");
    let every = section.duration("every", default, MIN_BATCH_INTERVAL..=MAX_BATCH_INTERVAL);
    let [cron, zone] = ["cron", "time_zone"].map(|key| section.text(key));
    let schedule = match cron {
        Lookup::Found(cron) => {
            // As with secrets, an override by the environment wins over the other key in the settings file.
            let overrides =
                every_place.map(|place| (in_file(&place).is_none(), is_override(&cron)));
            match overrides {
                Some((true, false)) => None,
                None | Some((false, true)) => by_wall_clock(&mut section, cron, zone),
                Some(_) => {
                    let message = "every is also set".to_owned();
                    section.problem("cron", cron.place, message, "set only one of the two");
                    None
                }
            }
        }
        Lookup::Missing => {
            if let Lookup::Found(zone) = zone {
                let message = "an interval has no time zone".to_owned();
                section.problem(
                    "time_zone",
                    zone.place,
                    message,
                    "remove time_zone, or set cron",
                );
            }
            None
        }
        Lookup::Invalid => None,
    };
    section.finish();
    schedule.unwrap_or(Schedule::Every(every))
}

fn by_wall_clock(section: &mut Section<'_>, cron: RawValue, zone: Lookup) -> Option<Schedule> {
    let zone = match zone {
        Lookup::Found(zone) => time_zone(section, zone),
        Lookup::Missing => Some(Tz::UTC),
        Lookup::Invalid => None,
    };
    match cron::read(&cron.value) {
        Ok(expression) => Some(Schedule::Cron {
            expression: Box::new(expression),
            zone: zone?,
        }),
        Err(mistake) => {
            let shown = shown(&cron.value);
            let message = format!("{shown} is not a cron expression: {}", mistake.message);
            section.problem("cron", cron.place, message, &mistake.hint);
            None
        }
    }
}

fn time_zone(section: &mut Section<'_>, text: RawValue) -> Option<Tz> {
    if let Ok(zone) = text.value.parse() {
        return Some(zone);
    }
    let message = format!("{} is not a time zone", shown(&text.value));
    // There are 600 names, so a short word is similar to some of them by chance.
    let names: Vec<&str> = TZ_VARIANTS.iter().map(|zone| zone.name()).collect();
    let similar = similar(&text.value, &names);
    let hint = match similar.filter(|_| text.value.contains('/')) {
        Some(name) => format!("did you mean {name:?}?"),
        None => "use a name from the IANA time zone database, such as \"UTC\" or \"Europe/Berlin\""
            .to_owned(),
    };
    section.problem("time_zone", text.place, message, &hint);
    None
}

fn objectives(mut section: Section<'_>, deadlines: &Deadlines) -> Objectives {
    let default = Objectives::default();
    // The default may be longer than a short deadline. Then every agent that joins before the deadline is in time.
    let mut within = |key, default, deadline| {
        let place = section.place_of(key);
        let within = section.duration(key, default, MIN_WAIT..=MAX_WAIT);
        if place.is_some() && within > deadline {
            let message = "longer than the deadlines allow".to_owned();
            let hint = format!(
                "set at most {}: after that, the probe fails in any case",
                format_duration(deadline)
            );
            section.problem(key, place, message, &hint);
        }
        within
    };
    let join_within = within("join_within", default.join_within, deadlines.join);
    let first_speech_within = within(
        "first_speech_within",
        default.first_speech_within,
        deadlines.join + deadlines.speech,
    );
    let reply_within = within("reply_within", default.reply_within, deadlines.reply);
    // An objective of 1 has no error budget, so no alert can measure how fast the budget burns.
    let mut share = |key, default| section.number(key, default, 0.01..=0.9999);
    let objectives = Objectives {
        availability: share("availability", default.availability),
        join: share("join", default.join),
        join_within,
        first_speech: share("first_speech", default.first_speech),
        first_speech_within,
        reply: share("reply", default.reply),
        reply_within,
        service: share("service", default.service),
    };
    section.finish();
    objectives
}

fn batch(mut section: Section<'_>, project: Option<(&str, ProjectLimits)>) -> Batch {
    let default = Batch::default();
    let [rooms_place, ramp_place] = ["rooms", "ramp"].map(|key| section.place_of(key));
    let batch = Batch {
        rooms: section.number("rooms", default.rooms, 1..=MAX_ROOMS),
        ramp: section.choice("ramp", "a ramp"),
        interval: section.duration("interval", default.interval, MIN_WAIT..=MAX_WAIT),
        stay: section.choice("stay", "a way to hold rooms"),
        hold: section.duration("hold", default.hold, Duration::ZERO..=MAX_WAIT),
        stop_after_no_shows: section.number(
            "stop_after_no_shows",
            default.stop_after_no_shows,
            0..=MAX_ROOMS,
        ),
    };
    if let Some((name, _)) = project
        && let Some(message) = too_many_at_once(batch.stay, batch.rooms, project)
    {
        let by_flag = rooms_place
            .as_deref()
            .is_some_and(|place| place.starts_with("--rooms"));
        let hint = if by_flag {
            format!("lower --rooms, or add --max-rooms {}", batch.rooms)
        } else {
            format!(
                "lower rooms, raise max_rooms of the project (LIVEKIT_CANARY__projects__{name}__max_rooms), or set \
                 stay = \"one_by_one\""
            )
        };
        section.problem("rooms", rooms_place, message, &hint);
    }
    if batch.stay == Stay::OneByOne && batch.ramp != RampMode::AfterJoin {
        let ramp = batch.ramp.name();
        let message =
            format!("{ramp:?} opens several rooms at the same time, but stay is \"one_by_one\"");
        let hint = "set ramp to \"after_join\", or stay to \"together\"";
        section.problem("ramp", ramp_place, message, hint);
    }
    section.finish();
    batch
}

/// What is wrong if more of these rooms are open at the same time than the project allows.
fn too_many_at_once(
    stay: Stay,
    rooms: usize,
    project: Option<(&str, ProjectLimits)>,
) -> Option<String> {
    let (name, limits) = project?;
    (stay == Stay::Together && rooms > limits.max_rooms).then(|| {
        format!(
            "{rooms} rooms are open at the same time, but project {name:?} allows {}",
            limits.max_rooms
        )
    })
}

/// `stay` is that of the target's batches: a confirmation holds its rooms in the same way.
fn confirm(
    mut section: Section<'_>,
    stay: Stay,
    project: Option<(&str, ProjectLimits)>,
) -> Confirm {
    let default = Confirm::default();
    let [rooms_place, longest_place] = ["rooms", "longest"].map(|key| section.place_of(key));
    let confirm = Confirm {
        after: section.duration("after", default.after, MIN_WAIT..=MAX_WAIT),
        rooms: section.number("rooms", default.rooms, 0..=MAX_CONFIRMING_ROOMS),
        longest: section.duration("longest", default.longest, MIN_CONFIRM_LONGEST..=DAY),
        agent_time_per_day: agent_time(&mut section, "agent_time_per_day"),
    };
    if confirm.longest < confirm.after {
        let message = "shorter than after".to_owned();
        let hint = "set it to at least the value of after";
        section.problem("longest", longest_place, message, hint);
    }
    if rooms_place.is_some()
        && let Some(message) = too_many_at_once(stay, confirm.rooms, project)
    {
        let hint = "lower rooms, or raise max_rooms of the project";
        section.problem("rooms", rooms_place, message, hint);
    }
    section.finish();
    confirm
}

fn deadlines(mut section: Section<'_>) -> Deadlines {
    let default = Deadlines::default();
    let mut duration = |key, default| section.duration(key, default, MIN_WAIT..=MAX_WAIT);
    let deadlines = Deadlines {
        signal: duration("signal", default.signal),
        media: duration("media", default.media),
        join: duration("join", default.join),
        track: duration("track", default.track),
        speech: duration("speech", default.speech),
        reply: duration("reply", default.reply),
        agent_turn: duration("agent_turn", default.agent_turn),
        cleanup: duration("cleanup", default.cleanup),
    };
    section.finish();
    deadlines
}

fn speech(mut section: Section<'_>) -> Speech {
    let default = Speech::default();
    let speech = Speech {
        threshold_dbfs: section.number("threshold_dbfs", default.threshold_dbfs, -90.0..=-1.0),
        min_frames: section.number("min_frames", default.min_frames, 1..=25),
        end_silence: section.duration("end_silence", default.end_silence, MIN_WAIT..=MAX_WAIT),
    };
    section.finish();
    speech
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(stay: &str) -> Result<Config, Problems> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("canary.toml");
        let settings = format!(
            "[projects.main]\nmax_rooms = 1\n\n[targets.support]\nagent_name = \"my-agent\"\nbatch.stay = {stay:?}\n\
             confirm.rooms = 2\n"
        );
        std::fs::write(&file, settings).unwrap();
        let variables = [
            ("LIVEKIT_URL", "wss://canary.example"),
            ("LIVEKIT_API_KEY", "key"),
            ("LIVEKIT_API_SECRET", "secret"),
        ];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        RawConfig::read(Some(&file), variables).unwrap().validate()
    }

    #[test]
    fn confirmation_of_more_rooms_than_the_project_allows_is_valid_one_by_one() {
        let config = validate("one_by_one").unwrap();
        assert_eq!(config.targets["support"].confirm.rooms, 2);
        let problems = validate("together").unwrap_err().to_string();
        assert!(
            problems.contains(
                "confirm.rooms: 2 rooms are open at the same time, but project \"main\" allows 1"
            ),
            "{problems}"
        );
    }
}
