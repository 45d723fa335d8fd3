//! The settings as plain types with their defaults; any module may read them.
//!
//! A new setting is a field and its default here, one line in `validate.rs`, and a commented key in `config/canary.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chrono::{Datelike, Days, Months, NaiveDate};
use chrono_tz::Tz;
use croner::Cron;
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use crate::clip::SpeechClip;

/// The complete settings. Projects and targets are keyed by the names that logs and metrics use.
#[derive(Debug, Clone)]
pub struct Config {
    pub daemon: DaemonSettings,
    pub alerts: Alerts,
    /// The channels that report outages, by their names.
    pub notify: BTreeMap<String, Channel>,
    pub projects: BTreeMap<String, Project>,
    pub targets: BTreeMap<String, Target>,
}

/// Settings that only `run` uses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DaemonSettings {
    pub http: Http,
    pub history: HistorySettings,
    pub lifetime: Lifetime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Loopback unless it is set: the page shows agents and transcripts to everyone who reaches it.
    pub listen: SocketAddr,
    /// TLS and users, in the file format of Prometheus' exporter-toolkit.
    pub web_config_file: Option<PathBuf>,
    /// Allows POST requests on every address, even if no users are configured.
    pub enable_lifecycle: bool,
    /// Who may read transcripts and recordings.
    pub sensitive: SensitiveAccess,
    /// The address under which people reach the page; alerts and notifications link to it. `None`: they have no link.
    pub external_url: Option<Url>,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 9787)),
            web_config_file: None,
            enable_lifecycle: false,
            sensitive: SensitiveAccess::default(),
            external_url: None,
        }
    }
}

/// Who may read what people said in a call: transcripts and recordings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SensitiveAccess {
    /// Users, clients with a verified certificate, and, on a loopback address, everyone on this machine.
    #[default]
    Users,
    /// Every client that reaches the server.
    Everyone,
}

/// The folder of the records, and how long they are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistorySettings {
    /// Folder of the history, the budget ledger and the journal of rooms. One process at a time can use it.
    pub dir: PathBuf,
    /// Retention of batches without a failure.
    pub keep: Duration,
    /// Retention of batches with a failure, and of incidents from their end.
    pub keep_failures: Duration,
    /// Above this size the oldest batches are deleted, those without a failure first.
    pub max_megabytes: u64,
    /// Retention of recordings. A recording is deleted with its batch, too.
    pub keep_recordings: Duration,
    /// Above this size of all recordings the oldest are deleted.
    pub max_recording_megabytes: u64,
}

impl Default for HistorySettings {
    fn default() -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            dir: PathBuf::from("state"),
            keep: 30 * DAY,
            keep_failures: 180 * DAY,
            max_megabytes: 512,
            keep_recordings: 7 * DAY,
            max_recording_megabytes: 1024,
        }
    }
}

/// How the daemon starts and stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifetime {
    /// From the start to a target's first batch, which does not wait for the grid. It lets Prometheus scrape the counters at zero first; otherwise `increase`
    /// misses what the first batch adds.
    pub startup_delay: Duration,
    /// After SIGTERM, running probes may finish within this time; then they are aborted.
    pub drain_grace: Duration,
    /// How long HTTP is served after the last room is deleted, so that Prometheus can scrape the final counts.
    pub shutdown_linger: Duration,
}

impl Default for Lifetime {
    fn default() -> Self {
        Self {
            startup_delay: Duration::from_mins(1),
            drain_grace: Duration::from_secs(30),
            shutdown_linger: Duration::from_secs(5),
        }
    }
}

/// Settings of the alert rules that `rules` prints, in addition to the targets' schedules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alerts {
    /// Period over which an objective must be met. Prometheus must retain its data for at least one day more.
    pub slo_window: Duration,
    /// Upper bound of the scrape interval. Every window of a rule spans at least ten scrapes.
    pub scrape_interval: Duration,
    /// Value of the label `severity` for alerts that need attention at once.
    pub page: String,
    /// Value of the label `severity` for alerts that can wait for working hours.
    pub ticket: String,
    /// Page that describes every alert. An alert links to its own anchor, its name in lower case: `<page>#agentfailing`.
    pub runbook_base_url: Url,
}

/// The files of this project's repository.
pub(crate) const REPOSITORY: &str = "https://github.com/livekit-canary/livekit-canary/blob/main";

impl Default for Alerts {
    fn default() -> Self {
        Self {
            slo_window: Duration::from_hours(30 * 24),
            scrape_interval: Duration::from_secs(30),
            page: "page".to_owned(),
            ticket: "ticket".to_owned(),
            runbook_base_url: format!("{REPOSITORY}/docs/alerts.md")
                .parse()
                .expect("it is an absolute URL"),
        }
    }
}

/// A receiver of messages about outages, in addition to the series.
#[derive(Debug, Clone, PartialEq)]
pub struct Channel {
    pub kind: ChannelKind,
    /// The targets that it reports. `None`: all of them.
    pub targets: Option<BTreeSet<String>>,
    /// Timeout of one request.
    pub timeout: Duration,
    /// PEM certificates to trust in addition to the built-in public roots.
    pub ca_file: Option<PathBuf>,
}

impl Channel {
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
    /// The Events API v2 of `PagerDuty`'s service region in the US.
    pub const PAGERDUTY_URL: &str = "https://events.pagerduty.com/v2/enqueue";

    /// Whether it reports this target.
    pub fn reports(&self, target: &str) -> bool {
        self.targets
            .as_ref()
            .is_none_or(|targets| targets.contains(target))
    }
}

/// What a channel sends, and where to.
#[derive(Debug, Clone)]
pub enum ChannelKind {
    /// A POST request with a JSON document of this project's own, or with one that Slack accepts.
    Webhook {
        /// It may contain a secret, as Slack's addresses do.
        url: SecretString,
        format: WebhookFormat,
    },
    /// Events API v2.
    Pagerduty { routing_key: SecretString, url: Url },
    /// A GET request after every scheduled batch with a verdict on the agent: its absence is an alert elsewhere.
    Heartbeat { url: SecretString },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum WebhookFormat {
    #[default]
    Json,
    Slack,
}

impl PartialEq for ChannelKind {
    fn eq(&self, other: &Self) -> bool {
        // Names every field and kind, so that a new one cannot be forgotten. Secrets have no comparison of their own.
        match (self, other) {
            (
                Self::Webhook { url, format },
                Self::Webhook {
                    url: other_url,
                    format: other_format,
                },
            ) => url.expose_secret() == other_url.expose_secret() && format == other_format,
            (
                Self::Pagerduty { routing_key, url },
                Self::Pagerduty {
                    routing_key: other_key,
                    url: other_url,
                },
            ) => routing_key.expose_secret() == other_key.expose_secret() && url == other_url,
            (Self::Heartbeat { url }, Self::Heartbeat { url: other_url }) => {
                url.expose_secret() == other_url.expose_secret()
            }
            (Self::Webhook { .. } | Self::Pagerduty { .. } | Self::Heartbeat { .. }, _) => false,
        }
    }
}

/// One LiveKit project or server: its address, the credentials, and how much the canary may use of it.
#[derive(Debug, Clone)]
pub struct Project {
    /// `ws`, `wss`, `http` or `https`; the signal socket and the server API share host and port.
    pub url: Url,
    pub api_key: SecretString,
    pub api_secret: SecretString,
    /// The files that hold the key pair, if it comes from files.
    pub credential_files: CredentialFiles,
    /// PEM certificates to trust in addition to the built-in public roots.
    pub ca_file: Option<PathBuf>,
    /// LiveKit Cloud's project id (`p_…`), used for links to a room's session.
    pub cloud_project: Option<String>,
    pub ice: Ice,
    /// Timeout of one request to the server API.
    pub api_timeout: Duration,
    /// Maximum number of rooms of this project that the canary holds open at the same time.
    pub max_rooms: usize,
    pub budget: Budget,
    pub backoff: Backoff,
}

/// The files of a key pair. Their content may change while the canary runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CredentialFiles {
    pub api_key: Option<PathBuf>,
    pub api_secret: Option<PathBuf>,
}

/// Maximum agent time that all targets of a project may use together. LiveKit bills whole minutes per session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Budget {
    /// Per UTC day; `None` sets no limit.
    pub agent_time_per_day: Option<Duration>,
    /// Per UTC calendar month; `None` sets no limit.
    pub agent_time_per_month: Option<Duration>,
}

impl Budget {
    pub fn limit(&self, period: Period) -> Option<Duration> {
        match period {
            Period::Day => self.agent_time_per_day,
            Period::Month => self.agent_time_per_month,
        }
    }
}

/// The period that a budget limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumCount, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Period {
    /// One UTC day.
    Day,
    /// One UTC calendar month.
    Month,
}

impl Period {
    pub const ALL: [Self; <Self as strum::EnumCount>::COUNT] = [Self::Day, Self::Month];

    /// The label value in metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// The first day of the period that contains `day`.
    pub fn first_day(self, day: NaiveDate) -> NaiveDate {
        match self {
            Self::Day => day,
            Self::Month => day - Days::new(day.day0().into()),
        }
    }

    /// The first day of the following period.
    pub fn next(self, day: NaiveDate) -> NaiveDate {
        match self {
            Self::Day => day + Days::new(1),
            Self::Month => self.first_day(day) + Months::new(1),
        }
    }
}

/// How long a project opens no rooms after LiveKit reported a plan limit without `Retry-After`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    /// Pause after the first rejection; it doubles with each further rejection in a row.
    pub first: Duration,
    /// Upper bound of a pause, also of one that `Retry-After` asks for.
    pub longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_mins(1),
            longest: Duration::from_hours(1),
        }
    }
}

impl PartialEq for Project {
    fn eq(&self, other: &Self) -> bool {
        // Without `..`, so that a new field cannot be forgotten. Secrets have no comparison of their own.
        let Self {
            url,
            api_key,
            api_secret,
            credential_files,
            ca_file,
            cloud_project,
            ice,
            api_timeout,
            max_rooms,
            budget,
            backoff,
        } = self;
        *url == other.url
            && api_key.expose_secret() == other.api_key.expose_secret()
            && api_secret.expose_secret() == other.api_secret.expose_secret()
            && *credential_files == other.credential_files
            && *ca_file == other.ca_file
            && *cloud_project == other.cloud_project
            && *ice == other.ice
            && *api_timeout == other.api_timeout
            && *max_rooms == other.max_rooms
            && *budget == other.budget
            && *backoff == other.backoff
    }
}

impl Project {
    pub const DEFAULT_API_TIMEOUT: Duration = Duration::from_secs(10);
    pub const DEFAULT_MAX_ROOMS: usize = 5;
}

/// Which transports media may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Ice {
    /// UDP; TCP and TURN relays if UDP is blocked.
    #[default]
    All,
    /// Only TCP.
    Tcp,
    /// Only TURN relays.
    Relay,
    /// Only TURN relays that are reached over TLS, as on a network that lets nothing but HTTPS out.
    Tls,
}

impl Ice {
    /// The name in the settings.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One agent on a project: how the canary dispatches it, how often, and what the canary expects from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Key of [`Config::projects`].
    pub project: String,
    /// The name that the agent registered under; set whenever the dispatch names the agent.
    pub agent_name: Option<String>,
    pub engine: Engine,
    pub dispatch: Dispatch,
    pub room: RoomSettings,
    pub participant: ParticipantSettings,
    pub schedule: Schedule,
    pub objectives: Objectives,
    pub batch: Batch,
    pub confirm: Confirm,
    pub deadlines: Deadlines,
    pub caller: Caller,
    pub speech: Speech,
    pub expect: Expect,
    /// Whether the agent's transcript is stored. It may contain personal data.
    pub transcript: bool,
    /// Which calls are recorded. A recording is personal data.
    pub record: RecordAudio,
    /// How long a deleted room is checked again if an agent may still join it: that re-creates the room.
    pub late_agent_window: Duration,
}

impl Target {
    /// The same target with the batch of a confirmation: this many rooms at once, or one after the other if rooms must stay one
    /// by one.
    pub(crate) fn confirming(&self, rooms: usize) -> Self {
        let ramp = match self.batch.stay {
            Stay::Together => RampMode::Burst,
            Stay::OneByOne => RampMode::AfterJoin,
        };
        Self {
            batch: Batch {
                rooms,
                ramp,
                ..self.batch.clone()
            },
            ..self.clone()
        }
    }

    /// Whether the agent's transcript is read: it is stored, or what is said is compared with what is expected. An agent whose
    /// session reports nothing still transcribes.
    pub(crate) fn reads_transcript(&self) -> bool {
        let expects_words = |line: &CallerLine| !line.expected_words.is_empty();
        self.transcript
            || self.expect.word_error_below.is_some()
            || self.caller.lines.iter().any(expects_words)
    }
}

impl Config {
    /// What differs from `before`, such as `target "sales" added`, in the order of the settings; empty if nothing does.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let Self {
            daemon,
            alerts,
            notify,
            projects,
            targets,
        } = self;
        let tables = [
            ("[http]", daemon.http != before.daemon.http),
            ("[history]", daemon.history != before.daemon.history),
            ("[lifetime]", daemon.lifetime != before.daemon.lifetime),
            ("[alerts]", *alerts != before.alerts),
        ];
        let tables = tables.into_iter().filter(|(_, changed)| *changed);
        tables
            .map(|(table, _)| format!("{table} changed"))
            .chain(entry_changes("notify", &before.notify, notify))
            .chain(entry_changes("project", &before.projects, projects))
            .chain(entry_changes("target", &before.targets, targets))
            .collect()
    }
}

fn entry_changes<T: PartialEq>(
    kind: &str,
    before: &BTreeMap<String, T>,
    after: &BTreeMap<String, T>,
) -> Vec<String> {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let changes = names.into_iter().filter_map(|name| {
        let what = match (before.get(name), after.get(name)) {
            (None, _) => "added",
            (_, None) => "removed",
            (before, after) if before != after => "changed",
            _ => return None,
        };
        Some(format!("{kind} {name:?} {what}"))
    });
    changes.collect()
}

impl Default for Target {
    /// The default of every key that has one. The caller sets `project` and `agent_name`, which have none.
    fn default() -> Self {
        Self {
            project: String::new(),
            agent_name: None,
            engine: Engine::default(),
            dispatch: Dispatch::default(),
            room: RoomSettings::default(),
            participant: ParticipantSettings::default(),
            schedule: Schedule::default(),
            objectives: Objectives::default(),
            batch: Batch::default(),
            confirm: Confirm::default(),
            deadlines: Deadlines::default(),
            caller: Caller::default(),
            speech: Speech::default(),
            expect: Expect::default(),
            transcript: false,
            record: RecordAudio::default(),
            late_agent_window: Duration::from_mins(1),
        }
    }
}

/// The client stack that joins the rooms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Engine {
    /// Pure Rust; part of every build.
    #[default]
    Native,
    /// LiveKit's own SDK on libwebrtc; part of builds with the feature `libwebrtc`.
    Libwebrtc,
}

impl Engine {
    /// The engines that this binary contains.
    #[cfg(not(feature = "libwebrtc"))]
    pub const BUILT_IN: [Self; 1] = [Self::Native];
    #[cfg(feature = "libwebrtc")]
    pub const BUILT_IN: [Self; 2] = [Self::Native, Self::Libwebrtc];

    /// The name that the config and the metrics use.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The calls whose audio is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum RecordAudio {
    #[default]
    Never,
    /// Those that failed.
    Failures,
    Always,
}

/// When a target's batches start.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    /// The time from one start to the next, on a grid that is shifted by an offset per target.
    Every(Duration),
    /// A crontab expression on the wall clock of `zone`.
    Cron { expression: Box<Cron>, zone: Tz },
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Every(Duration::from_mins(15))
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every(every) => write!(f, "every {}", humantime::format_duration(*every)),
            Self::Cron { expression, zone } => write!(f, "{} ({zone})", expression.as_str()),
        }
    }
}

/// The share of probes that must be good per service level, and the thresholds of a good probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Objectives {
    /// Share of probes that must be ok, above 0 and below 1. Failures of LiveKit, the network and the plan are excluded.
    pub availability: f64,
    /// Share of probes whose agent must join within `join_within`.
    pub join: f64,
    pub join_within: Duration,
    /// Share of probes whose agent must speak within `first_speech_within`.
    pub first_speech: f64,
    pub first_speech_within: Duration,
    /// Share of probes whose agent must reply to every turn of the caller within `reply_within`.
    pub reply: f64,
    pub reply_within: Duration,
    /// Share of probes that must be ok. Failures of LiveKit, the network and the plan are included.
    pub service: f64,
}

impl Default for Objectives {
    fn default() -> Self {
        Self {
            availability: 0.99,
            join: 0.99,
            join_within: Duration::from_secs(5),
            first_speech: 0.99,
            first_speech_within: Duration::from_secs(8),
            reply: 0.95,
            reply_within: Duration::from_secs(5),
            service: 0.99,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dispatch {
    pub mode: DispatchMode,
    /// The deployment of the agent, as its worker registers it (`LIVEKIT_AGENT_DEPLOYMENT`). Empty for workers without one,
    /// and if the dispatch does not name the agent.
    pub deployment: String,
    /// Handed to the agent's job; any text. Empty if the dispatch does not name the agent.
    pub metadata: String,
}

impl Dispatch {
    /// The deployment, if one is named.
    pub(crate) fn named_deployment(&self) -> Option<&str> {
        Some(self.deployment.as_str()).filter(|name| !name.is_empty())
    }
}

/// The rooms of a target, as an agent or another program sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomSettings {
    /// The beginning of every room's name. The rest is random.
    pub name_prefix: String,
    /// Any text. An agent or an operator can recognise a probe by it.
    pub metadata: String,
    /// Participants that LiveKit admits to a room, the canary included; 0 sets no limit. LiveKit does not count agents and
    /// recorders.
    pub max_participants: u32,
}

impl Default for RoomSettings {
    fn default() -> Self {
        Self {
            name_prefix: "canary-".to_owned(),
            metadata: r#"{"canary":true}"#.to_owned(),
            max_participants: 1,
        }
    }
}

/// The canary's participant, as the agent sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParticipantSettings {
    /// The display name; may be empty.
    pub name: String,
    /// Any text.
    pub metadata: String,
    /// In addition to `canary=true`, which is always set.
    pub attributes: BTreeMap<String, String>,
}

/// How the agent is dispatched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DispatchMode {
    /// The canary calls `CreateDispatch` for the named agent when its own media is connected.
    #[default]
    Explicit,
    /// `CreateRoom` names the agent.
    Room,
    /// The canary's join token names the agent; joining creates the room.
    Token,
    /// No request names an agent: LiveKit sends the unnamed agent to every new room. Joining creates the room.
    Automatic,
}

impl DispatchMode {
    /// The name that the config and the results use.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The table of modes: everything that differs between them follows from a mode's row.
    pub fn facts(self) -> DispatchFacts {
        use DispatchRequest::{CreateDispatch, CreateRoom, Join};
        let (request, names_agent) = match self {
            Self::Explicit => (CreateDispatch, true),
            Self::Room => (CreateRoom, true),
            Self::Token => (Join, true),
            Self::Automatic => (Join, false),
        };
        DispatchFacts {
            request,
            names_agent,
        }
    }
}

/// A row of [`DispatchMode::facts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DispatchFacts {
    pub request: DispatchRequest,
    /// The request names the agent and carries metadata for its job. Otherwise LiveKit sends the agent that registered
    /// without a name, and any agent counts.
    pub names_agent: bool,
}

/// The request of the canary on which LiveKit dispatches the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DispatchRequest {
    /// Sent once the canary is in the room and its media is up.
    CreateDispatch,
    /// Sent before the canary joins.
    CreateRoom,
    /// The canary's own join, which creates the room.
    Join,
}

impl DispatchRequest {
    /// Joining creates the room, with the settings that the token carries; otherwise `CreateRoom` does.
    pub fn joins_to_create(self) -> bool {
        match self {
            Self::CreateDispatch | Self::CreateRoom => false,
            Self::Join => true,
        }
    }

    /// The agent may be in the room before the canary sees who is there.
    pub fn precedes_join(self) -> bool {
        match self {
            Self::CreateDispatch => false,
            Self::CreateRoom | Self::Join => true,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rooms: usize,
    pub ramp: RampMode,
    /// Time from one room to the next; used only with [`RampMode::Interval`].
    pub interval: Duration,
    pub stay: Stay,
    /// With `together`, counted from the end of the ramp; with `one_by_one`, from the agent's join in that room.
    pub hold: Duration,
    /// After this many rooms without an agent, the batch opens no further rooms; 0 turns this off. With
    /// [`RampMode::Burst`] all rooms are open by then.
    pub stop_after_no_shows: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            rooms: 3,
            ramp: RampMode::default(),
            interval: Duration::from_secs(1),
            stay: Stay::default(),
            hold: Duration::from_secs(15),
            stop_after_no_shows: 2,
        }
    }
}

/// The batches that confirm a failure, in addition to the schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirm {
    /// From the first failed room to the first confirmation, and from its end to the second one. Each further one waits twice
    /// as long. Failures of rooms that open sooner than 30 s after the first one confirm nothing.
    pub after: Duration,
    /// Rooms of a confirmation; 0 turns confirmations off.
    pub rooms: usize,
    /// Upper bound of the time between two confirmations.
    pub longest: Duration,
    /// Maximum agent time of all confirmations of the target per UTC day. `None`: a tenth of the project's budget for a day,
    /// and no limit without such a budget.
    pub agent_time_per_day: Option<Duration>,
}

impl Default for Confirm {
    fn default() -> Self {
        Self {
            after: Duration::from_secs(30),
            rooms: 2,
            longest: Duration::from_mins(10),
            agent_time_per_day: None,
        }
    }
}

impl Confirm {
    /// The limit that applies within a project with this budget.
    pub fn daily_limit(&self, budget: &Budget) -> Option<Duration> {
        let share = budget.agent_time_per_day.map(|day| day / 10);
        self.agent_time_per_day.or(share)
    }
}

/// When the next room of a batch opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum RampMode {
    /// When the agent has joined the previous room, its probe has ended, or its join deadline has passed.
    #[default]
    AfterJoin,
    /// [`Batch::interval`] after the previous room, regardless of its outcome.
    Interval,
    /// All rooms at once.
    Burst,
}

impl RampMode {
    /// The name that the config and the results use.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Whether the rooms of a batch are open at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Stay {
    /// All rooms stay open until the batch ends.
    #[default]
    Together,
    /// At most one room is open at a time; only with [`RampMode::AfterJoin`].
    OneByOne,
}

/// The time limit of each step of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// From the connection attempt to the join response.
    pub signal: Duration,
    /// From the join response to both transports up and the caller's track published.
    pub media: Duration,
    /// From the dispatch request to the agent's join.
    pub join: Duration,
    /// From the agent's join to its audio track.
    pub track: Duration,
    /// From the agent's join to its first speech.
    pub speech: Duration,
    /// From the end of the caller's speech to the agent's reply.
    pub reply: Duration,
    /// How long one turn of the agent may take: until the caller can speak, and until its reply has ended.
    pub agent_turn: Duration,
    /// For leaving and deleting one room.
    pub cleanup: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            signal: Duration::from_secs(10),
            media: Duration::from_secs(15),
            join: Duration::from_secs(30),
            track: Duration::from_secs(10),
            speech: Duration::from_secs(20),
            reply: Duration::from_secs(20),
            agent_turn: Duration::from_secs(30),
            cleanup: Duration::from_secs(10),
        }
    }
}

/// What the caller says, and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Caller {
    pub mode: CallerMode,
    /// Silence of the agent after which the caller speaks. In mode `pass_through`, the delay of the agent's audio.
    pub silence: Duration,
    /// How many times the caller speaks. Each time costs the agent a turn of STT, LLM and TTS. Unused in mode
    /// `pass_through`.
    pub turns: u32,
    /// Before each turn after the first: at least this long from the end of the agent's last speech.
    pub pause: Duration,
    /// The caller speaks before the agent does; only in mode `script`.
    pub speaks_first: bool,
    /// Once, the caller speaks into a reply of the agent.
    pub interrupt: bool,
    /// What the caller says in mode `script`, from the first line again after the last one; otherwise empty.
    pub lines: Vec<CallerLine>,
}

impl Default for Caller {
    fn default() -> Self {
        Self {
            mode: CallerMode::default(),
            silence: Duration::from_secs(2),
            turns: 1,
            pause: Duration::ZERO,
            speaks_first: false,
            interrupt: false,
            lines: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum CallerMode {
    /// Says what the agent said.
    #[default]
    Echo,
    /// Sends all of the agent's audio back, `silence` later.
    PassThrough,
    /// Says the lines of the settings.
    Script,
}

impl CallerMode {
    /// The name that the config and the results use.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One line of the caller's script, and the reply that it needs.
#[derive(Debug, Clone, PartialEq)]
pub struct CallerLine {
    /// The value of `audio`, as it is written in the settings.
    pub name: String,
    pub audio: Arc<SpeechClip>,
    /// What the audio says. The word error is measured against it.
    pub text: Option<String>,
    /// Each must occur in the agent's reply; each is a list of alternatives.
    pub expected_words: Vec<Vec<String>>,
    /// The agent's session must report that this tool ran without an error.
    pub expected_tool: Option<String>,
}

/// What counts as speech in the agent's audio.
#[derive(Debug, Clone, PartialEq)]
pub struct Speech {
    /// RMS level below which a 16 ms frame is silence, in dB relative to full scale. Above it, a voice activity detector
    /// decides.
    pub threshold_dbfs: f32,
    /// Number of frames with a voice, within half a second, that start an utterance.
    pub min_frames: u32,
    /// Duration without a voice that ends an utterance.
    pub end_silence: Duration,
}

impl Default for Speech {
    fn default() -> Self {
        Self {
            threshold_dbfs: -60.0,
            min_frames: 5,
            end_silence: Duration::from_millis(600),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Expect {
    /// Whether a missing reply to the caller is a failure.
    pub reply: bool,
    /// The agent must stop speaking within this time when the caller interrupts it.
    pub yield_within: Option<Duration>,
    /// The word error of each turn must be below this, from 0 to 1.
    pub word_error_below: Option<f64>,
    pub agent_may_leave: AgentMayLeave,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            reply: true,
            yield_within: None,
            word_error_below: None,
            agent_may_leave: AgentMayLeave::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AgentMayLeave {
    #[default]
    Never,
    AfterSpeech,
    AfterReply,
}
