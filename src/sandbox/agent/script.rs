//! How one agent behaves in one room, as its faults say.

use std::time::Duration;

use super::ear::HearingDelays;
use super::{FRAME, Tool};
use crate::sandbox::fault::{AgentStage, Faults, InjectedFault, VoicelessSound};

/// From the end of the caller's speech: when the transcript is there, and when the turn is over.
const TRANSCRIPTION: Duration = Duration::from_millis(400);
const END_OF_TURN: Duration = Duration::from_millis(600);
/// From the end of the turn: the LLM's first token, and then the first audio.
const LLM: Duration = Duration::from_millis(350);
const TTS: Duration = Duration::from_millis(150);

/// The pause in the greeting of an agent whose LLM is dead. A client that takes any speech for an answer then counts the
/// second part of the greeting as one.
const DEAD_LLM_PAUSE: Duration = Duration::from_secs(3);

/// What the agent says in its greeting and in each reply.
const WORDS: &str = "Good day to you.";
const WRONG_WORDS: &str = "Please hold the line.";

/// How one agent behaves in one room.
#[derive(Debug, Clone)]
pub(crate) struct AgentScript {
    pub job: JobBehaviour,
    /// From the dispatch to the join.
    pub join_delay: Duration,
    /// The agent connects this long after its room was deleted.
    pub late: Option<Duration>,
    /// The version that it reports.
    pub version: Option<String>,
    pub(super) track: TrackBehaviour,
    pub(super) leaves_after: Option<Duration>,
    /// It leaves by deleting the room.
    pub(super) deletes_room: bool,
    /// It reports this error when it should greet, and never speaks.
    pub(super) error: Option<String>,
    /// The pause between the two parts of its greeting.
    pub(super) greeting_pause: Option<Duration>,
    /// Turns of the caller that it hears; `None`: all.
    pub(super) hears_turns: Option<u32>,
    pub(super) hearing: HearingDelays,
    pub(super) llm: Duration,
    pub(super) tts: Duration,
    pub(super) answer: AnswerBehaviour,
    /// The least length of a reply, unless it answers an interruption.
    pub(super) reply_frames: usize,
    /// Frames by which a reply arrives later than it was sent.
    pub(super) network_delay: usize,
    pub(super) reply_words: &'static str,
    /// What it understands of every turn.
    pub(super) hears: Option<String>,
    pub(super) word_errors: usize,
    pub(super) tool: Option<Tool>,
    /// All faults of this room; those without a parameter are checked with `has`.
    faults: Faults,
}

/// How a worker treats the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobBehaviour {
    /// No worker takes it.
    Refused,
    /// A worker takes it and never joins.
    Taken,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrackBehaviour {
    None,
    WithoutPackets,
    Silent,
    /// It carries this sound and no voice.
    Playing(VoicelessSound),
    Speaking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnswerBehaviour {
    Speaks,
    Nothing,
    /// Its LLM fails.
    Error,
}

impl AgentScript {
    /// What it says in each part of its greeting.
    pub(super) const GREETING: &str = WORDS;

    pub(crate) fn new(faults: &Faults) -> Self {
        let mut script = Self {
            job: JobBehaviour::Done,
            // The time that a worker with a warm process needs.
            join_delay: Duration::from_millis(fastrand::u64(120..320)),
            late: None,
            version: None,
            track: TrackBehaviour::Speaking,
            leaves_after: None,
            deletes_room: false,
            error: None,
            greeting_pause: None,
            hears_turns: None,
            hearing: HearingDelays {
                transcription: TRANSCRIPTION,
                end_of_turn: END_OF_TURN,
            },
            llm: LLM,
            tts: TTS,
            answer: AnswerBehaviour::Speaks,
            reply_frames: 0,
            network_delay: 0,
            reply_words: WORDS,
            hears: None,
            word_errors: 0,
            tool: None,
            faults: faults.clone(),
        };
        for fault in faults.iter() {
            script.apply(fault);
        }
        if script.answer == AnswerBehaviour::Error {
            script.greeting_pause.get_or_insert(DEAD_LLM_PAUSE);
        }
        script
    }

    fn apply(&mut self, fault: &InjectedFault) {
        match fault {
            InjectedFault::JoinDelay(delay) => self.join_delay = *delay,
            InjectedFault::NeverAccepts => self.job = JobBehaviour::Refused,
            InjectedFault::NeverJoins => self.job = JobBehaviour::Taken,
            InjectedFault::NoTrack => self.track = TrackBehaviour::None,
            InjectedFault::SilentTrack => self.track = TrackBehaviour::Silent,
            InjectedFault::Plays(sound) => self.track = TrackBehaviour::Playing(*sound),
            InjectedFault::NoPackets => self.track = TrackBehaviour::WithoutPackets,
            InjectedFault::LeavesEarly(after) => self.leaves_after = Some(*after),
            InjectedFault::DeletesRoom(after) => {
                self.leaves_after = Some(*after);
                self.deletes_room = true;
            }
            InjectedFault::LateAfterDeletion(after) => self.late = Some(*after),
            InjectedFault::Version(text) => {
                // As with nodes and regions, the first rule that names one counts.
                self.version.get_or_insert_with(|| text.clone());
            }
            InjectedFault::TwoPartGreeting(pause) => self.greeting_pause = Some(*pause),
            InjectedFault::DeafAfter(turns) => self.hears_turns = Some(*turns),
            InjectedFault::Hears(text) => self.hears = Some(text.clone()),
            InjectedFault::WordErrors(number) => self.word_errors = *number,
            InjectedFault::WrongWords => self.reply_words = WRONG_WORDS,
            InjectedFault::LongReply(length) => self.reply_frames = frames(*length),
            InjectedFault::Tool { name, is_error } => {
                let (name, is_error) = (name.clone(), *is_error);
                self.tool = Some(Tool { name, is_error });
            }
            InjectedFault::SlowReply(delay) => self.llm = delay.saturating_sub(TTS),
            InjectedFault::SlowStage(stage, delay) => match stage {
                // The decision that a turn is over waits for its transcript.
                AgentStage::Transcription => {
                    self.hearing.transcription += *delay;
                    self.hearing.end_of_turn += *delay;
                }
                AgentStage::EndOfTurn => self.hearing.end_of_turn += *delay,
                AgentStage::Llm => self.llm += *delay,
                AgentStage::Tts => self.tts += *delay,
            },
            InjectedFault::SlowNetwork(delay) => self.network_delay = frames(*delay),
            InjectedFault::NoReply => self.answer = AnswerBehaviour::Nothing,
            InjectedFault::DeadLlm => self.answer = AnswerBehaviour::Error,
            InjectedFault::InferenceError(text) => self.error = Some(text.clone()),
            // These have no parameter (see `has`), or they concern the room and not the agent.
            InjectedFault::NeverPauses
            | InjectedFault::NeverYields
            | InjectedFault::WaitsForCaller
            | InjectedFault::SilentSession
            | InjectedFault::SpeaksAtOnce
            | InjectedFault::Background
            | InjectedFault::Avatar
            | InjectedFault::StandardAvatar
            | InjectedFault::Hidden
            | InjectedFault::UnknownSource
            | InjectedFault::Encrypted
            | InjectedFault::RestartsTrack
            | InjectedFault::Deployment(_)
            | InjectedFault::Node(_)
            | InjectedFault::Region(_)
            | InjectedFault::Duplicate
            | InjectedFault::Stray
            | InjectedFault::NoMedia
            | InjectedFault::UplinkLost
            | InjectedFault::Http { .. }
            | InjectedFault::Signal { .. } => {}
        }
    }

    pub(crate) fn has(&self, fault: &InjectedFault) -> bool {
        self.faults.has(fault)
    }

    /// The participant that should speak for the agent is not in the room, so nothing is published.
    pub(crate) fn speaks_by_missing_avatar(&mut self) {
        self.track = TrackBehaviour::None;
    }
}

/// The number of frames in this time. An hour is the most: no call lasts longer.
fn frames(time: Duration) -> usize {
    let time = time.min(Duration::from_hours(1));
    usize::try_from(time.as_millis() / FRAME.as_millis()).unwrap_or(usize::MAX)
}
