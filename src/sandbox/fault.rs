//! Faults as data: what goes wrong, in which rooms, and the compact text form.
//!
//! A rule reads `[roomN:]FAULT[=VALUE]` or `[workerN:]FAULT[=VALUE]`; without a prefix it holds for every room. Rooms are
//! numbered from 1 in the order in which their names first reach the sandbox, and workers serve them in turn.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One fault and the rooms that it holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FaultRule {
    pub rooms: RoomSelector,
    pub fault: InjectedFault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoomSelector {
    All,
    /// The n-th room of this sandbox, from 1.
    Nth(u64),
    /// The rooms that the n-th worker serves, from 1. There are as many workers as the highest number names.
    Worker(u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InjectedFault {
    /// The agent joins this long after its dispatch.
    JoinDelay(Duration),
    /// No worker takes the job: the dispatch never lists one.
    NeverAccepts,
    /// A worker takes the job and never joins.
    NeverJoins,
    /// The agent joins without an audio track.
    NoTrack,
    /// Its track carries nothing but silence.
    SilentTrack,
    /// Its track carries this sound and no voice.
    Plays(VoicelessSound),
    /// Its track never carries a packet.
    NoPackets,
    /// It leaves after this much of its greeting.
    LeavesEarly(Duration),
    /// It deletes the room after this much speech, as an agent that ends the call does.
    DeletesRoom(Duration),
    /// Its greeting never ends.
    NeverPauses,
    /// It speaks as soon as its track is published, before anyone has subscribed.
    SpeaksAtOnce,
    /// Background sound plays on a second track all the time.
    Background,
    /// It publishes no voice: another participant speaks on its behalf.
    Avatar,
    /// It is a hidden participant: only the server API shows it.
    Hidden,
    /// It publishes its voice without a source.
    UnknownSource,
    /// Its tracks are announced as end-to-end encrypted.
    Encrypted,
    /// Such a participant speaks on its behalf, but joins as an ordinary one. A full room turns it away.
    StandardAvatar,
    /// It greets on one track and answers on another.
    RestartsTrack,
    /// Its workers register as this deployment.
    Deployment(String),
    /// It reports this version of itself.
    Version(String),
    /// A second agent of its name joins.
    Duplicate,
    /// An agent without a name joins the room too, as the agent of an unnamed worker does.
    Stray,
    /// It connects this long after its room was deleted, and so re-creates the room.
    LateAfterDeletion(Duration),
    /// It takes this long to answer what it heard.
    SlowReply(Duration),
    /// It hears its caller and never answers.
    NoReply,
    /// It hears this many turns of its caller, and then nothing.
    DeafAfter(u32),
    /// It understands this text in every turn of its caller.
    Hears(String),
    /// This number of words of each transcript of its caller is wrong.
    WordErrors(usize),
    /// It speaks on when its caller interrupts.
    NeverYields,
    /// It does not greet.
    WaitsForCaller,
    /// It greets in two parts, with this pause between them.
    TwoPartGreeting(Duration),
    /// Its replies are at least this long.
    LongReply(Duration),
    /// Its replies have other words than its greeting.
    WrongWords,
    /// It runs this tool before each reply.
    Tool {
        name: String,
        is_error: bool,
    },
    /// A stage of each reply takes this much longer.
    SlowStage(AgentStage, Duration),
    /// Each reply arrives this much later than it was sent.
    SlowNetwork(Duration),
    /// Its LLM fails on every turn of its caller. It greets in two parts, which are fixed texts.
    DeadLlm,
    /// It is no `AgentSession`: it reports no state, no event and no transcript.
    SilentSession,
    /// It reports this error on its session stream and never speaks.
    InferenceError(String),
    /// The join response names this node.
    Node(String),
    /// The join response names this region.
    Region(String),
    /// No datagram is answered: ICE never comes up.
    NoMedia,
    /// Once a caller's track is there, its media gets lost on the way to the server.
    UplinkLost,
    Http {
        step: HttpStep,
        answer: FaultAnswer,
    },
    Signal {
        step: SignalStep,
        action: FaultAction,
    },
}

/// A sound that is no speech.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VoicelessSound {
    /// Typing, and short tones.
    Clicks,
    Music,
    /// White noise of -38 dBFS.
    Noise,
}

/// A stage of the agent's answer that its session measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentStage {
    Transcription,
    EndOfTurn,
    Llm,
    Tts,
}

/// An HTTP request that can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpStep {
    /// Any call of the server API.
    Api,
    CreateRoom,
    DeleteRoom,
    CreateDispatch,
    ListDispatch,
    DeleteDispatch,
    /// The upgrade request of the signal socket.
    Upgrade,
}

/// A moment on the signal socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalStep {
    BeforeJoin,
    AfterJoin,
}

/// The HTTP response that replaces the normal one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultAnswer {
    /// 429, as Twirp JSON or as a proxy's HTML page.
    TooMany {
        retry_after: Option<Duration>,
        html: bool,
    },
    /// Twirp's `resource_exhausted` with a message about agent sessions.
    ResourceExhausted,
    /// Twirp's `resource_exhausted` with a message about a quota.
    Quota,
    /// `resource_exhausted` with HTTP 403, as earlier versions of Twirp send it, without naming what is used up.
    Unnamed,
    /// 503 with livekit-server's message for a full node.
    NodeLimit,
    /// A bare 500.
    ServerError,
    Drop,
    Hang,
    Flood,
}

/// What happens on the signal socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAction {
    /// `Leave` with `JOIN_FAILURE`.
    Leave,
    /// `Leave` with `PARTICIPANT_REMOVED`.
    Remove,
    Drop,
    Hang,
    Flood,
}

/// For `--help`: every fault with its form.
pub const SYNTAX: &str = "\
A fault is [roomN:]NAME[=VALUE]; without roomN: it applies to every room. Rooms count from 1.
workerN: instead of roomN: starts N workers, which serve the rooms in turn, and gives the fault to the agents of worker N.
The agent:
  join_delay=2s            joins late
  never_accepts            no worker takes the job
  never_joins              a worker takes the job and never joins
  no_track                 joins without an audio track
  silent_track             its track carries silence only
  plays=SOUND              its track carries a sound without a voice: clicks, music, noise
  no_packets               its track carries no packet
  leaves_early=500ms       leaves this long after its greeting began
  deletes_room=1s          ends the call after this much speech: deletes the room
  never_pauses             its greeting never ends
  speaks_at_once           speaks before anyone has subscribed
  background               plays sound on a second track all the time
  avatar                   another participant speaks on its behalf
  standard_avatar          the same, but a full room turns that participant away
  hidden                   joins as a hidden participant
  unknown_source           publishes its voice without a source
  encrypted                publishes end-to-end encrypted audio
  restarts_track           greets on one track and answers on another
  deployment=NAME          its workers register as this deployment
  version=TEXT             reports this version in its attribute agent.version
  duplicate                a second agent joins
  stray                    an agent without a name joins too
  late_after_deletion=1s   connects this long after its room was deleted
  slow_reply=5s            answers late
  no_reply                 never answers
  deaf                     hears nothing
  deaf_after=2             hears this many turns, and then nothing
  hears=TEXT               understands this in every turn
  word_errors=2            this many words of each transcript of the caller are wrong
  never_yields             speaks on when the caller interrupts
  waits_for_caller         does not greet
  two_part_greeting=2s     pauses in the middle of its greeting
  long_reply[=12s]         its replies are at least this long, unless it was interrupted
  wrong_words              its replies have other words than its greeting
  tool=NAME                runs this tool before each reply
  tool_error=NAME          the same, and the tool fails
  slow_stage=STAGE:2s      this stage takes longer: transcription, end_of_turn, llm, tts
  slow_network=1s          its replies arrive late; its own figures do not show it
  dead_llm                 greets in two parts, reports an error on every turn and never answers
  silent_session           reports no state, no event and no transcript
  inference_error[=TEXT]   reports an inference error (429) and falls silent
The service:
  node=ID                  the join response names this node
  region=NAME              the join response names this region
  no_media                 ICE never comes up
  uplink_lost              the caller's media gets lost once its track is there
  STEP=ANSWER              STEP: api, create_room, delete_room, create_dispatch, list_dispatch, delete_dispatch,
                           upgrade; ANSWER: 429[,retry_after=5s][,html], resource_exhausted, quota, unnamed, 503,
                           500, drop, hang, flood
  STEP=ACTION              STEP: before_join, after_join; ACTION: leave, remove, drop, hang, flood";

/// Long enough for an interruption.
const LONG_REPLY: Duration = Duration::from_secs(12);

const INFERENCE_ERROR: &str =
    "message='inference_quota_exceeded', status_code=429, retryable=False, body=None";

/// Why a text can't be read as a fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fault {text:?}: {problem}")]
pub struct FaultError {
    text: String,
    problem: String,
}

impl FromStr for FaultRule {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        parse(text).map_err(|problem| FaultError {
            text: text.to_owned(),
            problem,
        })
    }
}

impl TryFrom<String> for FaultRule {
    type Error = FaultError;

    fn try_from(text: String) -> Result<Self, FaultError> {
        text.parse()
    }
}

impl From<FaultRule> for String {
    fn from(rule: FaultRule) -> Self {
        rule.to_string()
    }
}

fn parse(text: &str) -> Result<FaultRule, String> {
    let numbered = |prefix| text.strip_prefix(prefix)?.split_once(':');
    let (rooms, fault) = if let Some((number, fault)) = numbered("room") {
        (RoomSelector::Nth(parse_number("room", number)?), fault)
    } else if let Some((number, fault)) = numbered("worker") {
        (RoomSelector::Worker(parse_number("worker", number)?), fault)
    } else {
        (RoomSelector::All, text)
    };
    let (name, value) = match fault.split_once('=') {
        Some((name, value)) => (name.trim(), Some(value.trim())),
        None => (fault.trim(), None),
    };
    let fault = parse_fault(name, value)?;
    if matches!(rooms, RoomSelector::Worker(_)) && !fault.is_of_agent() {
        return Err(format!(
            "{name} is no fault of one worker's agents; write it without worker"
        ));
    }
    Ok(FaultRule { rooms, fault })
}

fn parse_number(what: &str, number: &str) -> Result<u64, String> {
    match number.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!(
            "\"{what}{number}\" is not a {what}; {what}s count from 1, as in {what}2:no_track"
        )),
    }
}

impl InjectedFault {
    /// Whether an agent shows it after one worker took the job. If a worker takes no job, another one does.
    fn is_of_agent(&self) -> bool {
        !matches!(
            self,
            Self::NeverAccepts
                | Self::Deployment(_)
                | Self::Stray
                | Self::Node(_)
                | Self::Region(_)
                | Self::NoMedia
                | Self::UplinkLost
                | Self::Http { .. }
                | Self::Signal { .. }
        )
    }
}

fn parse_fault(name: &str, value: Option<&str>) -> Result<InjectedFault, String> {
    let duration = || {
        let value = value.ok_or_else(|| format!("needs a duration, as in {name}=2s"))?;
        parse_duration(value)
    };
    let plain = |fault: InjectedFault| match value {
        None => Ok(fault),
        Some(_) => Err(format!("{name} takes no value")),
    };
    let text = |example: &str| match value {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("needs a text, as in {name}={example}")),
    };
    match name {
        "join_delay" => Ok(InjectedFault::JoinDelay(duration()?)),
        "leaves_early" => Ok(InjectedFault::LeavesEarly(duration()?)),
        "deletes_room" => Ok(InjectedFault::DeletesRoom(duration()?)),
        "late_after_deletion" => Ok(InjectedFault::LateAfterDeletion(duration()?)),
        "slow_reply" => Ok(InjectedFault::SlowReply(duration()?)),
        "never_accepts" => plain(InjectedFault::NeverAccepts),
        "never_joins" => plain(InjectedFault::NeverJoins),
        "no_track" => plain(InjectedFault::NoTrack),
        "silent_track" => plain(InjectedFault::SilentTrack),
        "plays" => {
            let sound = VOICELESS_SOUNDS
                .iter()
                .find(|(_, text)| Some(*text) == value);
            let (sound, _) = sound.ok_or("needs clicks, music or noise, as in plays=noise")?;
            Ok(InjectedFault::Plays(*sound))
        }
        "no_packets" => plain(InjectedFault::NoPackets),
        "never_pauses" => plain(InjectedFault::NeverPauses),
        "speaks_at_once" => plain(InjectedFault::SpeaksAtOnce),
        "background" => plain(InjectedFault::Background),
        "avatar" => plain(InjectedFault::Avatar),
        "standard_avatar" => plain(InjectedFault::StandardAvatar),
        "hidden" => plain(InjectedFault::Hidden),
        "unknown_source" => plain(InjectedFault::UnknownSource),
        "encrypted" => plain(InjectedFault::Encrypted),
        "restarts_track" => plain(InjectedFault::RestartsTrack),
        "deployment" => Ok(InjectedFault::Deployment(text("staging")?)),
        "version" => Ok(InjectedFault::Version(text("1.4.0")?)),
        "duplicate" => plain(InjectedFault::Duplicate),
        "stray" => plain(InjectedFault::Stray),
        "no_reply" => plain(InjectedFault::NoReply),
        "deaf" => plain(InjectedFault::DeafAfter(0)),
        "deaf_after" => Ok(InjectedFault::DeafAfter(number(name, value)?)),
        "hears" => Ok(InjectedFault::Hears(text("hello there")?)),
        "word_errors" => Ok(InjectedFault::WordErrors(number(name, value)?)),
        "never_yields" => plain(InjectedFault::NeverYields),
        "waits_for_caller" => plain(InjectedFault::WaitsForCaller),
        "two_part_greeting" => Ok(InjectedFault::TwoPartGreeting(duration()?)),
        "long_reply" => {
            let length = value.map(parse_duration).transpose()?;
            Ok(InjectedFault::LongReply(length.unwrap_or(LONG_REPLY)))
        }
        "wrong_words" => plain(InjectedFault::WrongWords),
        "tool" | "tool_error" => Ok(InjectedFault::Tool {
            name: text("lookup")?,
            is_error: name == "tool_error",
        }),
        "slow_stage" => {
            let slow = value.and_then(|value| value.split_once(':'));
            let stage = slow.and_then(|(stage, delay)| {
                let known = STAGES.iter().find(|(_, text)| *text == stage);
                Some((known?.0, delay))
            });
            let (stage, delay) = stage.ok_or(
                "needs transcription, end_of_turn, llm or tts, and a duration, as in slow_stage=llm:2s",
            )?;
            Ok(InjectedFault::SlowStage(stage, parse_duration(delay)?))
        }
        "slow_network" => Ok(InjectedFault::SlowNetwork(duration()?)),
        "dead_llm" => plain(InjectedFault::DeadLlm),
        "silent_session" => plain(InjectedFault::SilentSession),
        "node" => Ok(InjectedFault::Node(text("ND_2")?)),
        "region" => Ok(InjectedFault::Region(text("eu-west")?)),
        "no_media" => plain(InjectedFault::NoMedia),
        "uplink_lost" => plain(InjectedFault::UplinkLost),
        "inference_error" => Ok(InjectedFault::InferenceError(
            value.unwrap_or(INFERENCE_ERROR).to_owned(),
        )),
        _ => parse_step(name, value),
    }
}

fn number<N: FromStr>(name: &str, value: Option<&str>) -> Result<N, String> {
    let number = value.and_then(|value| value.parse().ok());
    number.ok_or_else(|| format!("needs a number, as in {name}=2"))
}

fn parse_step(name: &str, value: Option<&str>) -> Result<InjectedFault, String> {
    let missing = || format!("needs a value, as in {name}=drop");
    if let Some((step, _)) = HTTP_STEPS.iter().find(|(_, text)| *text == name) {
        let answer = parse_answer(value.ok_or_else(missing)?)?;
        return Ok(InjectedFault::Http {
            step: *step,
            answer,
        });
    }
    let step = match name {
        "before_join" => SignalStep::BeforeJoin,
        "after_join" => SignalStep::AfterJoin,
        _ => return Err(format!("{name:?} is not the name of a fault")),
    };
    let action = match value.ok_or_else(missing)? {
        "leave" => FaultAction::Leave,
        "remove" => FaultAction::Remove,
        "drop" => FaultAction::Drop,
        "hang" => FaultAction::Hang,
        "flood" => FaultAction::Flood,
        other => {
            return Err(format!(
                "{other:?} is none of leave, remove, drop, hang, flood"
            ));
        }
    };
    Ok(InjectedFault::Signal { step, action })
}

fn parse_answer(value: &str) -> Result<FaultAnswer, String> {
    let mut parts = value.split(',').map(str::trim);
    let head = parts.next().unwrap_or_default();
    let (mut retry_after, mut html) = (None, false);
    for option in parts {
        match option.split_once('=') {
            _ if head != "429" => return Err(format!("{head} takes no options")),
            Some(("retry_after", after)) => retry_after = Some(parse_duration(after)?),
            None if option == "html" => html = true,
            _ => return Err(format!("{option:?} is neither retry_after=5s nor html")),
        }
    }
    match head {
        "429" => Ok(FaultAnswer::TooMany { retry_after, html }),
        "resource_exhausted" => Ok(FaultAnswer::ResourceExhausted),
        "quota" => Ok(FaultAnswer::Quota),
        "unnamed" => Ok(FaultAnswer::Unnamed),
        "503" => Ok(FaultAnswer::NodeLimit),
        "500" => Ok(FaultAnswer::ServerError),
        "drop" => Ok(FaultAnswer::Drop),
        "hang" => Ok(FaultAnswer::Hang),
        "flood" => Ok(FaultAnswer::Flood),
        _ => Err(format!(
            "{head:?} is none of 429, resource_exhausted, quota, unnamed, 503, 500, drop, hang, flood"
        )),
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration; write 2s, 500ms or 1m"))
}

const HTTP_STEPS: [(HttpStep, &str); 7] = [
    (HttpStep::Api, "api"),
    (HttpStep::CreateRoom, "create_room"),
    (HttpStep::DeleteRoom, "delete_room"),
    (HttpStep::CreateDispatch, "create_dispatch"),
    (HttpStep::ListDispatch, "list_dispatch"),
    (HttpStep::DeleteDispatch, "delete_dispatch"),
    (HttpStep::Upgrade, "upgrade"),
];

const VOICELESS_SOUNDS: [(VoicelessSound, &str); 3] = [
    (VoicelessSound::Clicks, "clicks"),
    (VoicelessSound::Music, "music"),
    (VoicelessSound::Noise, "noise"),
];

const STAGES: [(AgentStage, &str); 4] = [
    (AgentStage::Transcription, "transcription"),
    (AgentStage::EndOfTurn, "end_of_turn"),
    (AgentStage::Llm, "llm"),
    (AgentStage::Tts, "tts"),
];

impl fmt::Display for FaultRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rooms {
            RoomSelector::All => {}
            RoomSelector::Nth(number) => write!(f, "room{number}:")?,
            RoomSelector::Worker(number) => write!(f, "worker{number}:")?,
        }
        self.fault.fmt(f)
    }
}

impl fmt::Display for InjectedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timed = |f: &mut fmt::Formatter<'_>, name, time: &Duration| {
            write!(f, "{name}={}", compact(*time))
        };
        match self {
            Self::JoinDelay(time) => timed(f, "join_delay", time),
            Self::LeavesEarly(time) => timed(f, "leaves_early", time),
            Self::DeletesRoom(time) => timed(f, "deletes_room", time),
            Self::LateAfterDeletion(time) => timed(f, "late_after_deletion", time),
            Self::SlowReply(time) => timed(f, "slow_reply", time),
            Self::NeverAccepts => f.write_str("never_accepts"),
            Self::NeverJoins => f.write_str("never_joins"),
            Self::NoTrack => f.write_str("no_track"),
            Self::SilentTrack => f.write_str("silent_track"),
            Self::Plays(sound) => {
                let name = VOICELESS_SOUNDS.iter().find(|(known, _)| known == sound);
                write!(f, "plays={}", name.map_or("noise", |(_, name)| name))
            }
            Self::NoPackets => f.write_str("no_packets"),
            Self::NeverPauses => f.write_str("never_pauses"),
            Self::SpeaksAtOnce => f.write_str("speaks_at_once"),
            Self::Background => f.write_str("background"),
            Self::Avatar => f.write_str("avatar"),
            Self::StandardAvatar => f.write_str("standard_avatar"),
            Self::Hidden => f.write_str("hidden"),
            Self::UnknownSource => f.write_str("unknown_source"),
            Self::Encrypted => f.write_str("encrypted"),
            Self::RestartsTrack => f.write_str("restarts_track"),
            Self::Deployment(name) => write!(f, "deployment={name}"),
            Self::Version(text) => write!(f, "version={text}"),
            Self::Duplicate => f.write_str("duplicate"),
            Self::Stray => f.write_str("stray"),
            Self::NoReply => f.write_str("no_reply"),
            Self::DeafAfter(0) => f.write_str("deaf"),
            Self::DeafAfter(turns) => write!(f, "deaf_after={turns}"),
            Self::Hears(text) => write!(f, "hears={text}"),
            Self::WordErrors(number) => write!(f, "word_errors={number}"),
            Self::NeverYields => f.write_str("never_yields"),
            Self::WaitsForCaller => f.write_str("waits_for_caller"),
            Self::TwoPartGreeting(pause) => timed(f, "two_part_greeting", pause),
            Self::LongReply(length) => timed(f, "long_reply", length),
            Self::WrongWords => f.write_str("wrong_words"),
            Self::Tool { name, is_error } => {
                let fault = if *is_error { "tool_error" } else { "tool" };
                write!(f, "{fault}={name}")
            }
            Self::SlowStage(stage, delay) => {
                let name = STAGES.iter().find(|(known, _)| known == stage);
                let name = name.map_or("llm", |(_, name)| name);
                write!(f, "slow_stage={name}:{}", compact(*delay))
            }
            Self::SlowNetwork(delay) => timed(f, "slow_network", delay),
            Self::DeadLlm => f.write_str("dead_llm"),
            Self::SilentSession => f.write_str("silent_session"),
            Self::Node(id) => write!(f, "node={id}"),
            Self::Region(name) => write!(f, "region={name}"),
            Self::NoMedia => f.write_str("no_media"),
            Self::UplinkLost => f.write_str("uplink_lost"),
            Self::InferenceError(text) => write!(f, "inference_error={text}"),
            Self::Http { step, answer } => {
                let name = HTTP_STEPS.iter().find(|(known, _)| known == step);
                write!(f, "{}={answer}", name.map_or("api", |(_, name)| name))
            }
            Self::Signal { step, action } => {
                let step = match step {
                    SignalStep::BeforeJoin => "before_join",
                    SignalStep::AfterJoin => "after_join",
                };
                let action = match action {
                    FaultAction::Leave => "leave",
                    FaultAction::Remove => "remove",
                    FaultAction::Drop => "drop",
                    FaultAction::Hang => "hang",
                    FaultAction::Flood => "flood",
                };
                write!(f, "{step}={action}")
            }
        }
    }
}

impl fmt::Display for FaultAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { retry_after, html } => {
                f.write_str("429")?;
                if let Some(after) = retry_after {
                    write!(f, ",retry_after={}", compact(*after))?;
                }
                f.write_str(if *html { ",html" } else { "" })
            }
            Self::ResourceExhausted => f.write_str("resource_exhausted"),
            Self::Quota => f.write_str("quota"),
            Self::Unnamed => f.write_str("unnamed"),
            Self::NodeLimit => f.write_str("503"),
            Self::ServerError => f.write_str("500"),
            Self::Drop => f.write_str("drop"),
            Self::Hang => f.write_str("hang"),
            Self::Flood => f.write_str("flood"),
        }
    }
}

fn compact(time: Duration) -> String {
    humantime::format_duration(time)
        .to_string()
        .replace(' ', "")
}

/// The faults of one room, and the worker that serves it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    faults: Vec<InjectedFault>,
    /// The number of the worker, from 1; 0 for calls that concern no room.
    worker: u64,
}

impl Faults {
    /// Those of `rules` that hold for room `number`; 0 is no room.
    pub(crate) fn of_room(rules: &[FaultRule], number: u64) -> Self {
        let named = rules.iter().filter_map(|rule| match rule.rooms {
            RoomSelector::Worker(nth) => Some(nth),
            RoomSelector::All | RoomSelector::Nth(_) => None,
        });
        let workers = named.max().unwrap_or(1);
        let worker = number.checked_sub(1).map_or(0, |room| room % workers + 1);
        let holds = |rule: &&FaultRule| match rule.rooms {
            RoomSelector::All => true,
            RoomSelector::Nth(nth) => nth == number,
            RoomSelector::Worker(nth) => nth == worker,
        };
        let held = rules.iter().filter(holds);
        Self {
            faults: held.map(|rule| rule.fault.clone()).collect(),
            worker,
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &InjectedFault> {
        self.faults.iter()
    }

    pub(crate) fn has(&self, fault: &InjectedFault) -> bool {
        self.faults.contains(fault)
    }

    /// The id of the worker that serves the room.
    pub(crate) fn worker_id(&self) -> String {
        format!("AW_sandbox{}", self.worker)
    }

    /// The node that the join response names, if not the sandbox's own.
    pub(crate) fn node(&self) -> Option<&str> {
        self.iter().find_map(|fault| match fault {
            InjectedFault::Node(id) => Some(id.as_str()),
            _ => None,
        })
    }

    /// The region that the join response names; empty as on a server without regions.
    pub(crate) fn region(&self) -> &str {
        let named = self.iter().find_map(|fault| match fault {
            InjectedFault::Region(name) => Some(name.as_str()),
            _ => None,
        });
        named.unwrap_or_default()
    }

    /// The deployment as which the agent's workers register; empty if they have none.
    pub(crate) fn deployment(&self) -> &str {
        let named = self.iter().find_map(|fault| match fault {
            InjectedFault::Deployment(name) => Some(name.as_str()),
            _ => None,
        });
        named.unwrap_or_default()
    }

    /// The response that replaces the normal one of request `step`, if any.
    pub(crate) fn answer(&self, step: HttpStep) -> Option<&FaultAnswer> {
        self.iter().find_map(|fault| match fault {
            InjectedFault::Http { step: at, answer }
                if *at == step || (*at == HttpStep::Api && step != HttpStep::Upgrade) =>
            {
                Some(answer)
            }
            _ => None,
        })
    }

    pub(crate) fn action(&self, at: SignalStep) -> Option<FaultAction> {
        self.iter().find_map(|fault| match fault {
            InjectedFault::Signal { step, action } if *step == at => Some(*action),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_reads_back_as_it_was_written() {
        let texts = [
            "join_delay=2s",
            "room2:no_track",
            "never_accepts",
            "never_joins",
            "silent_track",
            "plays=clicks",
            "plays=music",
            "plays=noise",
            "no_packets",
            "leaves_early=500ms",
            "deletes_room=2s",
            "never_pauses",
            "speaks_at_once",
            "background",
            "avatar",
            "standard_avatar",
            "hidden",
            "unknown_source",
            "encrypted",
            "restarts_track",
            "deployment=staging",
            "version=1.4.0",
            "worker2:silent_track",
            "duplicate",
            "stray",
            "late_after_deletion=1m",
            "slow_reply=5s",
            "no_reply",
            "deaf",
            "deaf_after=2",
            "hears=good day",
            "word_errors=2",
            "never_yields",
            "waits_for_caller",
            "two_part_greeting=2s",
            "long_reply=8s",
            "wrong_words",
            "tool=lookup",
            "tool_error=lookup",
            "slow_stage=transcription:2s",
            "slow_stage=end_of_turn:2s",
            "slow_stage=llm:2s",
            "room3:slow_stage=tts:2s",
            "slow_network=1s",
            "dead_llm",
            "silent_session",
            "room2:node=ND_2",
            "region=eu-west",
            "no_media",
            "uplink_lost",
            "inference_error=quota",
            "api=429,retry_after=5s,html",
            "create_room=429",
            "room7:create_dispatch=resource_exhausted",
            "create_room=quota",
            "create_room=unnamed",
            "list_dispatch=hang",
            "delete_dispatch=500",
            "delete_room=drop",
            "upgrade=503",
            "before_join=leave",
            "after_join=remove",
            "after_join=flood",
        ];
        for text in texts {
            let rule: FaultRule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
            let json = serde_json::to_string(&rule).unwrap();
            assert_eq!(serde_json::from_str::<FaultRule>(&json).unwrap(), rule);
        }
    }

    #[test]
    fn an_error_names_what_is_wrong_with_a_fault() {
        let problem = |text: &str| text.parse::<FaultRule>().unwrap_err().to_string();
        assert_eq!(
            problem("jion_delay=2s"),
            "fault \"jion_delay=2s\": \"jion_delay\" is not the name of a fault"
        );
        assert!(problem("join_delay").contains("join_delay=2s"));
        assert!(problem("join_delay=soon").contains("not a duration"));
        assert!(problem("room0:no_track").contains("count from 1"));
        assert!(problem("worker0:no_track").contains("count from 1"));
        assert!(problem("worker2:no_media").contains("no fault of one worker's agents"));
        assert!(problem("worker2:upgrade=500").contains("no fault of one worker's agents"));
        assert!(problem("no_track=1").contains("takes no value"));
        assert!(problem("deaf_after").contains("deaf_after=2"));
        assert!(problem("tool=").contains("tool=lookup"));
        assert!(problem("slow_stage=asr:2s").contains("slow_stage=llm:2s"));
        assert!(problem("slow_stage=llm:soon").contains("not a duration"));
        assert!(problem("api=418").contains("none of 429"));
        assert!(problem("api=503,html").contains("takes no options"));
        assert!(problem("before_join=429").contains("none of leave"));
    }

    #[test]
    fn a_numbered_fault_holds_only_for_its_room() {
        let rules = [
            "room2:no_track".parse().unwrap(),
            "no_reply".parse().unwrap(),
        ];
        assert!(Faults::of_room(&rules, 2).has(&InjectedFault::NoTrack));
        assert!(!Faults::of_room(&rules, 1).has(&InjectedFault::NoTrack));
        assert!(Faults::of_room(&rules, 1).has(&InjectedFault::NoReply));
    }

    #[test]
    fn workers_serve_the_rooms_in_turn_and_a_fault_of_one_holds_only_for_its_rooms() {
        let rules = ["worker3:silent_track".parse().unwrap()];
        let worker = |room| {
            let faults = Faults::of_room(&rules, room);
            let poisoned = faults.has(&InjectedFault::SilentTrack);
            (faults.worker_id(), poisoned)
        };
        let rooms = (1..=4).map(worker).collect::<Vec<_>>();
        let expected = [("1", false), ("2", false), ("3", true), ("1", false)]
            .map(|(number, poisoned)| (format!("AW_sandbox{number}"), poisoned));
        assert_eq!(rooms, expected);
        assert!(!Faults::of_room(&rules, 0).has(&InjectedFault::SilentTrack));
        assert_eq!(Faults::of_room(&[], 7).worker_id(), "AW_sandbox1");
    }

    #[test]
    fn an_api_fault_does_not_affect_the_signal_upgrade() {
        let rules = ["api=drop".parse().unwrap()];
        let faults = Faults::of_room(&rules, 1);
        assert_eq!(
            faults.answer(HttpStep::CreateRoom),
            Some(&FaultAnswer::Drop)
        );
        assert_eq!(faults.answer(HttpStep::Upgrade), None);
    }
}
