//! The settings as plain types with their defaults; any module may read them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use chrono::{Datelike, Days, Months, NaiveDate};
use chrono_tz::Tz;
use croner::Cron;
use secrecy::SecretString;
use url::Url;

/// Everything that was configured. Maps are keyed by the names that logs and metrics use.
#[derive(Debug, Clone)]
pub struct Config {
    pub daemon: DaemonSettings,
    pub alerts: Alerts,
    pub projects: BTreeMap<String, Project>,
    pub targets: BTreeMap<String, Target>,
}

/// What only `run` looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DaemonSettings {
    pub http: Http,
    pub history: HistorySettings,
    pub lifetime: Lifetime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    pub listen: SocketAddr,
    /// TLS and users, in the format of Prometheus' exporter-toolkit.
    pub web_config_file: Option<PathBuf>,
    /// Whether POST is answered on any address, without users too.
    pub enable_lifecycle: bool,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9787)),
            web_config_file: None,
            enable_lifecycle: false,
        }
    }
}

/// What is kept on disk, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistorySettings {
    /// Folder of the history, the budget ledger and the journal of rooms; one process at a time.
    pub dir: PathBuf,
    /// Batches without a failure.
    pub keep: Duration,
    /// Batches with one.
    pub keep_failures: Duration,
    /// Above this size the oldest batches go, those without a failure first.
    pub max_megabytes: u64,
}

impl Default for HistorySettings {
    fn default() -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            dir: PathBuf::from("state"),
            keep: 30 * DAY,
            keep_failures: 180 * DAY,
            max_megabytes: 512,
        }
    }
}

/// How the daemon begins and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifetime {
    /// A target's first batch waits so long, so that a scrape has seen its counters at zero.
    pub startup_delay: Duration,
    /// On SIGTERM, running probes get so long to end by themselves.
    pub drain_grace: Duration,
    /// After the last room is gone, HTTP is answered so long for one more scrape.
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

/// What `rules` makes alert rules of, beside the targets' schedules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alerts {
    /// Over which an objective must be met. Prometheus must keep its data for so long.
    pub slo_window: Duration,
    /// The longest from scrape to scrape: no window may be so short that it holds only a few.
    pub scrape_interval: Duration,
    /// The severity of what somebody must look at now.
    pub page: String,
    /// The severity of what can wait for working hours.
    pub ticket: String,
    /// The page that describes every alert under its name in lower case: `<page>#agentfailing`. It has no fragment.
    pub runbook_base_url: Url,
}

/// The project's own page of alerts.
const DEFAULT_RUNBOOK: &str =
    "https://github.com/livekit-canary/livekit-canary/blob/main/docs/alerts.md";

impl Default for Alerts {
    fn default() -> Self {
        Self {
            slo_window: Duration::from_hours(30 * 24),
            scrape_interval: Duration::from_secs(30),
            page: "page".to_owned(),
            ticket: "ticket".to_owned(),
            runbook_base_url: DEFAULT_RUNBOOK.parse().expect("it is an absolute URL"),
        }
    }
}

/// One LiveKit project or server: where it is, how to sign in, how much of it the canary may use.
#[derive(Debug, Clone)]
pub struct Project {
    /// `ws`, `wss`, `http` or `https`; the signal socket and the server API share host and port.
    pub url: Url,
    pub api_key: String,
    pub api_secret: SecretString,
    /// PEM certificates trusted besides the built-in public roots.
    pub ca_file: Option<PathBuf>,
    /// LiveKit Cloud's project id (`p_…`), for links to a room's session.
    pub cloud_project: Option<String>,
    pub ice: Ice,
    /// Longest wait for one answer of the server API.
    pub api_timeout: Duration,
    /// Most rooms of this project that the canary holds open at once.
    pub max_rooms: usize,
    pub budget: Budget,
    pub backoff: Backoff,
}

/// Most agent time that all targets of a project may use, as LiveKit bills it: whole minutes a session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Budget {
    /// A UTC day; `None` sets no limit.
    pub agent_time_per_day: Option<Duration>,
    /// A UTC calendar month; `None` sets no limit.
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

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumCount, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Period {
    /// A UTC day.
    Day,
    /// A UTC calendar month.
    Month,
}

impl Period {
    pub const ALL: [Self; <Self as strum::EnumCount>::COUNT] = [Self::Day, Self::Month];

    /// The label value in metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// The first day of the one that `day` lies in.
    pub fn first_day(self, day: NaiveDate) -> NaiveDate {
        match self {
            Self::Day => day,
            Self::Month => day - Days::new(day.day0().into()),
        }
    }

    /// The first day of the one after that.
    pub fn next(self, day: NaiveDate) -> NaiveDate {
        match self {
            Self::Day => day + Days::new(1),
            Self::Month => self.first_day(day) + Months::new(1),
        }
    }
}

/// How long a project's batches rest after a plan limit was met, where the answer had no `Retry-After`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    /// After the first rejection; it doubles with each one that follows.
    pub first: Duration,
    /// Never longer, `Retry-After` included.
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

impl Project {
    pub const DEFAULT_API_TIMEOUT: Duration = Duration::from_secs(10);
    pub const DEFAULT_MAX_ROOMS: usize = 5;
}

/// What media may run over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Ice {
    /// UDP, and TCP where UDP doesn't get through.
    #[default]
    All,
    Tcp,
}

/// One agent on a project: how it is called, how often, and what is expected of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Key of [`Config::projects`].
    pub project: String,
    /// The name that the agent registered under; only [`DispatchMode::Automatic`] does without.
    pub agent_name: Option<String>,
    pub engine: Engine,
    pub dispatch: Dispatch,
    /// Attributes of the echo participant, beside `canary=true`, which is always set.
    pub attributes: BTreeMap<String, String>,
    pub schedule: Schedule,
    pub objectives: Objectives,
    pub batch: Batch,
    pub deadlines: Deadlines,
    pub echo: Echo,
    pub speech: Speech,
    pub expect: Expect,
    /// Whether the agent's transcript is kept; it may hold personal data.
    pub transcript: bool,
    /// How long a deleted room is re-checked where no agent was seen: a late agent re-creates it.
    pub late_agent_window: Duration,
}

impl Default for Target {
    /// The defaults of every key that has one; `project` and `agent_name` are the caller's to fill.
    fn default() -> Self {
        Self {
            project: String::new(),
            agent_name: None,
            engine: Engine::default(),
            dispatch: Dispatch::default(),
            attributes: BTreeMap::new(),
            schedule: Schedule::default(),
            objectives: Objectives::default(),
            batch: Batch::default(),
            deadlines: Deadlines::default(),
            echo: Echo::default(),
            speech: Speech::default(),
            expect: Expect::default(),
            transcript: false,
            late_agent_window: Duration::from_mins(1),
        }
    }
}

/// Which client stack joins the rooms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Engine {
    /// Pure Rust, in every binary.
    #[default]
    Native,
    /// The upstream SDK on libwebrtc.
    Libwebrtc,
}

impl Engine {
    /// Those of this binary.
    #[cfg(not(feature = "libwebrtc"))]
    pub const BUILT_IN: [Self; 1] = [Self::Native];
    #[cfg(feature = "libwebrtc")]
    pub const BUILT_IN: [Self; 2] = [Self::Native, Self::Libwebrtc];

    /// The name that the config and the metrics use.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// When a target's batches start.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    /// From one start to the next, counted from a moment that differs from target to target.
    Every(Duration),
    /// As crontab reads it, on the wall clock of `zone`.
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

/// What share of probes must be good, and what good means.
#[derive(Debug, Clone, PartialEq)]
pub struct Objectives {
    /// Share of probes that must be ok, above 0 and below 1.
    pub availability: f64,
    /// Share of probes whose agent must join within `join_within`.
    pub join: f64,
    pub join_within: Duration,
    /// Share of probes whose agent must speak within `first_speech_within`.
    pub first_speech: f64,
    pub first_speech_within: Duration,
    /// Share of probes that must be ok, failures of LiveKit, the network and plan limits counted.
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
            service: 0.99,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dispatch {
    pub mode: DispatchMode,
    /// Handed to the agent's job; any text. Empty with [`DispatchMode::Automatic`], which carries none.
    pub metadata: String,
}

/// What makes LiveKit send the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DispatchMode {
    /// The canary calls `CreateDispatch` for the named agent once its own media is up.
    #[default]
    Explicit,
    /// `CreateRoom` names the agent.
    Room,
    /// The token that the canary joins with names the agent; joining creates the room.
    Token,
    /// LiveKit itself sends the unnamed agent to every new room; joining creates it.
    Automatic,
}

impl DispatchMode {
    /// The name that the config and the results use.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether joining creates the room, with the settings that the token carries.
    pub fn joins_to_create(self) -> bool {
        matches!(self, Self::Token | Self::Automatic)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rooms: usize,
    pub ramp: RampMode,
    /// Only [`RampMode::Interval`] looks at it.
    pub interval: Duration,
    pub stay: Stay,
    /// `together`: from the ramp's end; `one_by_one`: from the agent's join in that room.
    pub hold: Duration,
    /// After this many rooms without an agent the rest doesn't open; 0 turns it off. [`RampMode::Burst`] leaves no rest.
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

/// When the next room of a batch opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum RampMode {
    /// When the agent has joined the room before, that probe has ended, or its join deadline has passed.
    #[default]
    AfterJoin,
    /// [`Batch::interval`] after the room before, whatever became of that one.
    Interval,
    /// At once.
    Burst,
}

impl RampMode {
    /// The name that the config and the results use.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// How long the rooms of a batch stay open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Stay {
    #[default]
    Together,
    /// Never two at once; only with [`RampMode::AfterJoin`].
    OneByOne,
}

/// The longest that each step may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// From the connection attempt to the join response.
    pub signal: Duration,
    /// From the join response to both transports up and the echo track published.
    pub media: Duration,
    /// From the `dispatch_sent` milestone of a probe to the agent's join.
    pub join: Duration,
    /// From the agent's join to its audio track.
    pub track: Duration,
    /// From the agent's join to its first speech.
    pub speech: Duration,
    /// From the end of the echo to the agent's reply.
    pub reply: Duration,
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
            cleanup: Duration::from_secs(10),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    pub mode: EchoMode,
    pub delay: Duration,
    /// Utterances echoed in `turn` mode; each costs the agent a turn of STT, LLM and TTS.
    pub max_turns: u32,
}

impl Default for Echo {
    fn default() -> Self {
        Self {
            mode: EchoMode::default(),
            delay: Duration::from_secs(1),
            max_turns: 1,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum EchoMode {
    /// Plays a whole utterance once, `delay` after it ended.
    #[default]
    Turn,
    /// Passes the agent's audio back, `delay` later, without a pause.
    Continuous,
}

/// What counts as speech.
#[derive(Debug, Clone, PartialEq)]
pub struct Speech {
    /// RMS level of a 20 ms frame, in dB relative to full scale, above which it is speech.
    pub threshold_dbfs: f32,
    /// Consecutive frames above the threshold that start an utterance.
    pub min_frames: u32,
    /// Time without a speech frame that ends an utterance.
    pub end_silence: Duration,
}

impl Default for Speech {
    fn default() -> Self {
        Self {
            threshold_dbfs: -45.0,
            min_frames: 3,
            end_silence: Duration::from_millis(600),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expect {
    /// Whether the agent must answer the echo.
    pub reply: bool,
    pub agent_may_leave: AgentMayLeave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AgentMayLeave {
    #[default]
    Never,
    AfterSpeech,
    AfterReply,
}
