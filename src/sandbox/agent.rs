//! The demo agent as a plain state machine: events in, actions out. It lives inside the SFU: the room performs its
//! actions and passes it what its caller does.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::fault::{Faults, InjectedFault, VoicelessSound};

/// An Opus frame is 20 ms of audio.
pub(crate) const FRAME: Duration = Duration::from_millis(20);

/// Frames above this size are speech: what a client sends in silence is 3 B (DTX) to 55 B (an encoder's start), and
/// speech at the usual bit rates is more.
const SPEECH_BYTES: usize = 60;
/// Consecutive frames of speech that start an utterance.
const SPEECH_FRAMES: u32 = 3;
/// This long without speech ends an utterance.
const END_OF_UTTERANCE: Duration = Duration::from_millis(600);
/// From the end of an utterance, as the agent sees it, to its reply.
const REPLY_DELAY: Duration = Duration::from_millis(500);
/// A real agent needs some 100 ms from `listening` to its first word.
const BEFORE_SPEAKING: Duration = Duration::from_millis(100);

/// What the agent plays: 20 ms Opus frames, encoded once.
pub(crate) struct VoiceClips {
    greeting: Vec<Arc<[u8]>>,
    reply: Vec<Arc<[u8]>>,
    clicks: Vec<Arc<[u8]>>,
    music: Vec<Arc<[u8]>>,
    noise: Vec<Arc<[u8]>>,
    silence: Arc<[u8]>,
}

impl VoiceClips {
    pub(crate) fn load() -> Self {
        Self {
            greeting: frames(include_bytes!("greeting.opusframes")),
            reply: frames(include_bytes!("reply.opusframes")),
            clicks: frames(include_bytes!("clicks.opusframes")),
            music: frames(include_bytes!("music.opusframes")),
            noise: frames(include_bytes!("noise.opusframes")),
            // A mono 20 ms CELT frame without energy: what a decoder hears as silence.
            silence: Arc::from([0xf8, 0xff, 0xfe].as_slice()),
        }
    }
}

impl VoiceClips {
    fn sound(&self, sound: VoicelessSound) -> &[Arc<[u8]>] {
        match sound {
            VoicelessSound::Clicks => &self.clicks,
            VoicelessSound::Music => &self.music,
            VoicelessSound::Noise => &self.noise,
        }
    }
}

/// Reads frames that are each preceded by their length, two bytes, big-endian.
fn frames(mut bytes: &[u8]) -> Vec<Arc<[u8]>> {
    let mut frames = Vec::new();
    while let [high, low, rest @ ..] = bytes {
        let (frame, rest) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        frames.push(Arc::from(frame));
        bytes = rest;
    }
    frames
}

/// How one agent behaves in one room.
#[derive(Debug, Clone)]
pub(crate) struct AgentScript {
    pub job: JobBehaviour,
    /// From the dispatch to the join.
    pub join_delay: Duration,
    /// The agent connects this long after its room was deleted.
    pub late: Option<Duration>,
    track: TrackBehaviour,
    leaves_after: Option<Duration>,
    /// It leaves by deleting the room.
    deletes_room: bool,
    /// `None`: never answers.
    reply_delay: Option<Duration>,
    max_replies: u32,
    error: Option<String>,
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
enum TrackBehaviour {
    None,
    WithoutPackets,
    Silent,
    /// It carries this sound and no voice.
    Playing(VoicelessSound),
    Speaking,
}

impl AgentScript {
    pub(crate) fn new(faults: &Faults, max_replies: u32) -> Self {
        let mut script = Self {
            job: JobBehaviour::Done,
            // The time that a worker with a warm process needs.
            join_delay: Duration::from_millis(fastrand::u64(120..320)),
            late: None,
            track: TrackBehaviour::Speaking,
            leaves_after: None,
            deletes_room: false,
            reply_delay: Some(REPLY_DELAY),
            max_replies,
            error: None,
            faults: faults.clone(),
        };
        for fault in faults.iter() {
            match fault {
                InjectedFault::JoinDelay(delay) => script.join_delay = *delay,
                InjectedFault::NeverAccepts => script.job = JobBehaviour::Refused,
                InjectedFault::NeverJoins => script.job = JobBehaviour::Taken,
                InjectedFault::NoTrack => script.track = TrackBehaviour::None,
                InjectedFault::SilentTrack => script.track = TrackBehaviour::Silent,
                InjectedFault::Plays(sound) => script.track = TrackBehaviour::Playing(*sound),
                InjectedFault::NoPackets => script.track = TrackBehaviour::WithoutPackets,
                InjectedFault::LeavesEarly(after) => script.leaves_after = Some(*after),
                InjectedFault::DeletesRoom(after) => {
                    script.leaves_after = Some(*after);
                    script.deletes_room = true;
                }
                InjectedFault::LateAfterDeletion(after) => script.late = Some(*after),
                InjectedFault::SlowReply(delay) => script.reply_delay = Some(*delay),
                InjectedFault::NoReply => script.reply_delay = None,
                InjectedFault::InferenceError(text) => script.error = Some(text.clone()),
                // These have no parameter (see `has`), or they concern the room and not the agent.
                InjectedFault::NeverPauses
                | InjectedFault::SpeaksAtOnce
                | InjectedFault::Background
                | InjectedFault::Avatar
                | InjectedFault::StandardAvatar
                | InjectedFault::Hidden
                | InjectedFault::UnknownSource
                | InjectedFault::Encrypted
                | InjectedFault::RestartsTrack
                | InjectedFault::Deployment(_)
                | InjectedFault::Duplicate
                | InjectedFault::Stray
                | InjectedFault::NoMedia
                | InjectedFault::Http { .. }
                | InjectedFault::Signal { .. } => {}
            }
        }
        script
    }

    pub(crate) fn has(&self, fault: &InjectedFault) -> bool {
        self.faults.has(fault)
    }

    /// The participant that should speak for the agent is not in the room, so nothing is published.
    pub(crate) fn speaks_by_missing_avatar(&mut self) {
        self.track = TrackBehaviour::None;
    }
}

/// What the room does for its agent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AgentAction {
    /// Its media is up: the other participants see it from now on.
    Appear,
    Publish(AgentSound),
    /// Unpublishes its voice.
    Unpublish,
    /// Sets `lk.agent.state`.
    State(&'static str),
    /// Sends one frame; `first` marks the start of an utterance.
    Send {
        sound: AgentSound,
        frame: Arc<[u8]>,
        first: bool,
    },
    Heard(Utterance),
    /// It has spoken this clip to its end.
    Said {
        clip: Clip,
        began: Instant,
        ended: Instant,
    },
    /// Reports an error on its session stream.
    Report(String),
    Leave,
    /// Deletes the room with everyone in it.
    DeleteRoom,
}

/// What an agent plays; each sound has its own track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentSound {
    Voice,
    Background,
}

/// An utterance of the caller, as the agent heard it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Utterance {
    pub frames: u32,
    /// The arrival of its first frame.
    pub began: Instant,
    /// The end of its last frame.
    pub ended: Instant,
    /// It began while the agent itself spoke, so it is no turn of the caller.
    pub over_agent: bool,
}

pub(crate) struct DemoAgent {
    script: AgentScript,
    voice: Arc<VoiceClips>,
    phase: AgentPhase,
    /// When the phase ends by itself.
    until: Option<Instant>,
    subscribed: bool,
    caller_published: bool,
    next_frame: Option<Instant>,
    background: Background,
    speech_sent: Duration,
    /// Frames of sound without a voice.
    played: usize,
    ear: CallerEar,
    replies: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AgentPhase {
    /// Joined; its media comes up.
    Connecting,
    /// Visible to all participants; its session starts.
    Starting,
    /// Published; waits for its caller.
    Waiting,
    BeforeSpeaking,
    Speaking {
        clip: Clip,
        began: Instant,
        frame: usize,
    },
    Listening,
    Thinking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clip {
    Greeting,
    Reply,
}

impl DemoAgent {
    /// An agent that joins now.
    pub(crate) fn new(script: AgentScript, voice: Arc<VoiceClips>, now: Instant) -> Self {
        Self {
            script,
            voice,
            phase: AgentPhase::Connecting,
            until: Some(now + Duration::from_millis(fastrand::u64(30..80))),
            subscribed: false,
            caller_published: false,
            next_frame: None,
            background: Background::default(),
            speech_sent: Duration::ZERO,
            played: 0,
            ear: CallerEar::default(),
            replies: 0,
        }
    }

    /// When [`on_time`](Self::on_time) is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let frames = [self.next_frame, self.background.next_frame];
        let others = [self.until, self.ear.deadline()];
        frames.into_iter().chain(others).flatten().min()
    }

    /// The caller's audio track is there.
    pub(crate) fn on_caller_published(&mut self) {
        self.caller_published = true;
    }

    /// A caller has subscribed to the agent's voice.
    pub(crate) fn on_subscribed(&mut self, now: Instant) {
        self.subscribed = true;
        if matches!(
            self.script.track,
            TrackBehaviour::Silent | TrackBehaviour::Playing(_) | TrackBehaviour::Speaking
        ) {
            self.next_frame.get_or_insert(now);
        }
    }

    /// A frame of the caller's audio arrived.
    pub(crate) fn on_caller_frame(&mut self, bytes: usize, now: Instant) {
        let speaking = matches!(self.phase, AgentPhase::Speaking { .. });
        self.ear.on_frame(bytes, speaking, now);
    }

    /// Does what is due at `now`.
    pub(crate) fn on_time(&mut self, now: Instant) -> Vec<AgentAction> {
        let mut acts = Vec::new();
        if self.until.is_some_and(|until| until <= now) {
            self.until = None;
            self.next_phase(now, &mut acts);
        }
        let heard = self.subscribed && self.caller_published;
        if self.phase == AgentPhase::Waiting
            && (heard || self.script.has(&InjectedFault::SpeaksAtOnce))
        {
            self.begin(now, &mut acts);
        }
        if let Some(utterance) = self.ear.on_time(now) {
            acts.push(AgentAction::Heard(utterance));
            self.answer(utterance, now, &mut acts);
        }
        self.send_due_frames(now, &mut acts);
        acts.extend(self.background.due_frames(&self.voice, now));
        acts
    }

    fn next_phase(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        match self.phase {
            AgentPhase::Connecting => {
                self.phase = AgentPhase::Starting;
                self.until = Some(now + Duration::from_millis(fastrand::u64(20..50)));
                acts.push(AgentAction::Appear);
            }
            AgentPhase::Starting => {
                self.phase = AgentPhase::Waiting;
                acts.push(AgentAction::State("initializing"));
                if self.script.track != TrackBehaviour::None {
                    acts.push(AgentAction::Publish(AgentSound::Voice));
                    // A session listens as soon as its output is published, before any packet of it can have arrived.
                    acts.push(AgentAction::State("listening"));
                }
                if self.script.has(&InjectedFault::Background) {
                    acts.push(AgentAction::Publish(AgentSound::Background));
                    self.background.next_frame = Some(now);
                }
            }
            AgentPhase::Thinking if self.script.has(&InjectedFault::RestartsTrack) => {
                self.phase = AgentPhase::Waiting;
                self.subscribed = false;
                self.next_frame = None;
                acts.extend([
                    AgentAction::Unpublish,
                    AgentAction::Publish(AgentSound::Voice),
                ]);
            }
            AgentPhase::BeforeSpeaking | AgentPhase::Thinking => self.speak(now, acts),
            AgentPhase::Waiting | AgentPhase::Speaking { .. } | AgentPhase::Listening => {}
        }
    }

    /// Its caller has published and subscribed.
    fn begin(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        if let Some(error) = self.script.error.take() {
            acts.push(AgentAction::Report(error));
            self.script.track = TrackBehaviour::Silent;
        }
        if self.script.track == TrackBehaviour::Speaking {
            self.next_frame.get_or_insert(now);
            self.phase = AgentPhase::BeforeSpeaking;
            self.until = Some(now + BEFORE_SPEAKING);
        } else {
            self.phase = AgentPhase::Listening;
        }
    }

    fn speak(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        let clip = if self.replies == 0 {
            Clip::Greeting
        } else {
            Clip::Reply
        };
        self.phase = AgentPhase::Speaking {
            clip,
            began: now,
            frame: 0,
        };
        acts.push(AgentAction::State("speaking"));
    }

    fn answer(&mut self, utterance: Utterance, now: Instant, acts: &mut Vec<AgentAction>) {
        let may = self.phase == AgentPhase::Listening
            && !utterance.over_agent
            && self.replies < self.script.max_replies
            && self.script.track == TrackBehaviour::Speaking;
        if let (true, Some(delay)) = (may, self.script.reply_delay) {
            self.replies += 1;
            self.phase = AgentPhase::Thinking;
            self.until = Some(now + delay);
            acts.push(AgentAction::State("thinking"));
        }
    }

    fn send_due_frames(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        while take_due(&mut self.next_frame, now) {
            let (frame, first) = self.next_audio(now, acts);
            let sound = AgentSound::Voice;
            acts.push(AgentAction::Send {
                sound,
                frame,
                first,
            });
            if self
                .script
                .leaves_after
                .is_some_and(|after| self.speech_sent >= after)
            {
                self.next_frame = None;
                acts.push(if self.script.deletes_room {
                    AgentAction::DeleteRoom
                } else {
                    AgentAction::Leave
                });
            }
        }
    }

    fn next_audio(&mut self, now: Instant, acts: &mut Vec<AgentAction>) -> (Arc<[u8]>, bool) {
        let AgentPhase::Speaking { clip, began, frame } = self.phase else {
            let TrackBehaviour::Playing(sound) = self.script.track else {
                return (Arc::clone(&self.voice.silence), false);
            };
            let frames = self.voice.sound(sound);
            let frame = Arc::clone(&frames[self.played % frames.len()]);
            self.played += 1;
            return (frame, false);
        };
        let frames = match clip {
            Clip::Greeting => &self.voice.greeting,
            Clip::Reply => &self.voice.reply,
        };
        let at = if self.script.has(&InjectedFault::NeverPauses) {
            frame % frames.len()
        } else {
            frame
        };
        let Some(audio) = frames.get(at) else {
            self.phase = AgentPhase::Listening;
            let ended = now;
            acts.push(AgentAction::Said { clip, began, ended });
            acts.push(AgentAction::State("listening"));
            return (Arc::clone(&self.voice.silence), false);
        };
        self.phase = AgentPhase::Speaking {
            clip,
            began,
            frame: frame + 1,
        };
        self.speech_sent += FRAME;
        (Arc::clone(audio), frame == 0)
    }
}

/// Returns whether a frame is due, and schedules the next one a frame later.
fn take_due(next_frame: &mut Option<Instant>, now: Instant) -> bool {
    let Some(due) = next_frame.filter(|due| *due <= now) else {
        return false;
    };
    // After a stall of the process, continue from now instead of sending a burst.
    let late = now - due > FRAME * 10;
    *next_frame = Some(if late { now } else { due } + FRAME);
    true
}

/// Endless sound. It contains a voice as well, so that a client that mistakes it for the agent hears speech.
#[derive(Default)]
struct Background {
    next_frame: Option<Instant>,
    sent: usize,
}

impl Background {
    fn due_frames(&mut self, voice: &VoiceClips, now: Instant) -> Vec<AgentAction> {
        let mut acts = Vec::new();
        while take_due(&mut self.next_frame, now) {
            acts.push(AgentAction::Send {
                sound: AgentSound::Background,
                frame: Arc::clone(&voice.reply[self.sent % voice.reply.len()]),
                first: self.sent == 0,
            });
            self.sent += 1;
        }
        acts
    }
}

/// Detects utterances by the size of their frames.
#[derive(Default)]
struct CallerEar {
    /// Frames of speech in a row, before an utterance.
    run: u32,
    run_started: Option<Instant>,
    utterance: Option<Open>,
}

struct Open {
    started: Instant,
    last: Instant,
    frames: u32,
    over_agent: bool,
}

impl CallerEar {
    fn on_frame(&mut self, bytes: usize, agent_speaks: bool, now: Instant) {
        if bytes <= SPEECH_BYTES {
            self.run = 0;
            return;
        }
        if let Some(open) = &mut self.utterance {
            open.last = now;
            open.frames += 1;
            return;
        }
        if self.run == 0 {
            self.run_started = Some(now);
        }
        self.run += 1;
        if self.run == SPEECH_FRAMES {
            self.utterance = Some(Open {
                started: self.run_started.unwrap_or(now),
                last: now,
                frames: self.run,
                over_agent: agent_speaks,
            });
            self.run = 0;
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.utterance
            .as_ref()
            .map(|open| open.last + END_OF_UTTERANCE)
    }

    fn on_time(&mut self, now: Instant) -> Option<Utterance> {
        self.deadline().filter(|deadline| *deadline <= now)?;
        let open = self.utterance.take()?;
        Some(Utterance {
            frames: open.frames,
            began: open.started,
            ended: open.last + FRAME,
            over_agent: open.over_agent,
        })
    }
}

#[cfg(test)]
mod tests;
