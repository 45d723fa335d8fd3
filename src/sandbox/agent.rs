//! The demo agent as a plain state machine: events in, actions out. It lives inside the SFU: the room performs its
//! actions and passes it what its caller does.
//!
//! It behaves as an agent with an `AgentSession` of livekit-agents 1.8.9 and its defaults does.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::fault::InjectedFault;

mod clips;
mod ear;
mod script;
mod session;
mod words;

use ear::{CallerEar, EarEvent};
use script::{AnswerBehaviour, TrackBehaviour};
use session::{Message, MessageSpeaker, ToolCall, TurnClaims};
use words::Spoken;

pub(crate) use clips::VoiceClips;
pub(crate) use ear::Utterance;
pub(crate) use script::{AgentScript, JobBehaviour};
pub(crate) use session::{AgentState, SessionEvent, Tool};

/// An Opus frame is 20 ms of audio.
pub(crate) const FRAME: Duration = Duration::from_millis(20);

/// A real agent needs some 100 ms from `listening` to its first word.
const BEFORE_SPEAKING: Duration = Duration::from_millis(100);
/// Speech of this length interrupts the agent (`InterruptionOptions.min_duration`).
const INTERRUPTION: Duration = Duration::from_millis(500);
/// From its first speech on, the agent can't be interrupted for this long, and does not transcribe its caller while it
/// speaks (`aec_warmup_duration`).
const ECHO_CANCELLER_WARM_UP: Duration = Duration::from_secs(3);
const LLM_ERROR: &str = "type='llm_error' label='sandbox.LLM' error=APIConnectionError('Connection error.', body=None, \
                         retryable=True) recoverable=False";

/// What the room does for its agent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AgentAction {
    /// Its media is up: the other participants see it from now on.
    Appear,
    Publish(AgentSound),
    /// Unpublishes its voice.
    Unpublish,
    /// Sets `lk.agent.state`.
    State(AgentState),
    /// Sends one frame; `first` marks the start of an utterance.
    Send {
        sound: AgentSound,
        frame: Arc<[u8]>,
        first: bool,
    },
    Heard(Utterance),
    /// It has spoken this clip, to its end or until it was interrupted.
    Said {
        clip: Clip,
        began: Instant,
        ended: Instant,
        interrupted: bool,
    },
    /// Sends the transcript of its own speech.
    TranscribeSelf(String),
    TranscribeCaller(String),
    /// Its session reports this.
    Session(SessionEvent),
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

pub(crate) struct DemoAgent {
    script: AgentScript,
    voice: Arc<VoiceClips>,
    phase: AgentPhase,
    /// When the phase ends by itself.
    until: Option<Instant>,
    /// The state that its session reported last.
    state: AgentState,
    subscribed: bool,
    caller_published: bool,
    next_frame: Option<Instant>,
    background: Background,
    speech_sent: Duration,
    /// When it first spoke.
    first_speech: Option<Instant>,
    /// When the second part of its greeting is due.
    greeting_rest: Option<Instant>,
    /// What it said since the caller's last turn.
    spoken: Vec<Spoken>,
    /// Its message that was interrupted. The session adds it once it is certain that the caller spoke.
    interrupted: Option<Message>,
    /// The next reply answers an interruption: it has the usual length.
    answers_interruption: bool,
    /// Frames of sound without a voice.
    played: usize,
    ear: CallerEar,
    /// The caller has spoken, and `on_time` was not called since.
    caller_spoke: Option<Instant>,
    /// The transcript of the caller's turn, and its delay.
    transcript: Option<(String, Duration)>,
    turns_heard: u32,
    /// The turn of the caller that it answers.
    answers: Option<CallerTurn>,
    /// What it says next: its greeting only once.
    next_clip: Clip,
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
    Speaking(Speech),
    Listening,
    Thinking,
}

/// Speech that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Speech {
    clip: Clip,
    began: Instant,
    /// Frames that were sent.
    sent: usize,
    /// Frames of silence before it.
    delay: usize,
    /// Its frames, excluding the delay.
    frames: usize,
}

/// A turn of the caller: when it ended, and when the agent decided so.
#[derive(Debug, Clone, Copy)]
struct CallerTurn {
    ended: Instant,
    over: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clip {
    Greeting,
    /// The second part of a greeting in two parts.
    GreetingRest,
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
            state: AgentState::Initializing,
            subscribed: false,
            caller_published: false,
            next_frame: None,
            background: Background::default(),
            speech_sent: Duration::ZERO,
            first_speech: None,
            greeting_rest: None,
            spoken: Vec::new(),
            interrupted: None,
            answers_interruption: false,
            played: 0,
            ear: CallerEar::default(),
            caller_spoke: None,
            transcript: None,
            turns_heard: 0,
            answers: None,
            next_clip: Clip::Greeting,
        }
    }

    /// When [`on_time`](Self::on_time) is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let frames = [self.next_frame, self.background.next_frame];
        let rest = self.greeting_rest.filter(|_| self.may_go_on());
        let ear = self.ear.deadline(self.script.hearing);
        let others = [self.until, rest, self.caller_spoke, ear];
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
        if (self.script.hears_turns).is_some_and(|turns| self.turns_heard >= turns) {
            return;
        }
        let speaks = matches!(self.phase, AgentPhase::Speaking(_));
        let transcribed = !speaks || self.can_be_interrupted(now);
        self.ear.on_frame(bytes, speaks, transcribed, now);
        self.caller_spoke = self.ear.hears_voice().then_some(now);
    }

    /// Whether speech of the caller stops what the agent says.
    fn can_be_interrupted(&self, now: Instant) -> bool {
        let warm = (self.first_speech).is_none_or(|first| now >= first + ECHO_CANCELLER_WARM_UP);
        warm && !self.script.has(&InjectedFault::NeverYields)
    }

    /// Whether it may speak the second part of its greeting now.
    fn may_go_on(&self) -> bool {
        self.phase == AgentPhase::Listening && !self.ear.hears_turn()
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
        self.listen(now, &mut acts);
        if self.greeting_rest.is_some_and(|due| due <= now) && self.may_go_on() {
            self.greeting_rest = None;
            self.speak(Clip::GreetingRest, now, &mut acts);
        }
        self.send_due_frames(now, &mut acts);
        acts.extend(self.background.due_frames(&self.voice, now));
        if self.script.has(&InjectedFault::SilentSession) {
            acts.retain(|act| {
                !matches!(
                    act,
                    AgentAction::State(_)
                        | AgentAction::Session(_)
                        | AgentAction::TranscribeSelf(_)
                        | AgentAction::TranscribeCaller(_)
                )
            });
        }
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
                acts.push(AgentAction::State(AgentState::Initializing));
                if self.script.track != TrackBehaviour::None {
                    acts.push(AgentAction::Publish(AgentSound::Voice));
                    // A session listens as soon as its output is published, before any packet of it can have arrived.
                    self.enter(AgentState::Listening, acts);
                }
                if self.script.has(&InjectedFault::Background) {
                    acts.push(AgentAction::Publish(AgentSound::Background));
                    self.background.next_frame = Some(now);
                }
            }
            AgentPhase::Thinking if self.script.answer == AnswerBehaviour::Error => {
                acts.push(AgentAction::Session(SessionEvent::Error(
                    LLM_ERROR.to_owned(),
                )));
                self.phase = AgentPhase::Listening;
                self.enter(AgentState::Listening, acts);
            }
            // The caller goes on. The end of that turn asks for another reply.
            AgentPhase::Thinking if self.ear.hears_voice() => {}
            AgentPhase::Thinking if self.script.has(&InjectedFault::RestartsTrack) => {
                self.phase = AgentPhase::Waiting;
                self.subscribed = false;
                self.next_frame = None;
                acts.extend([
                    AgentAction::Unpublish,
                    AgentAction::Publish(AgentSound::Voice),
                ]);
            }
            AgentPhase::BeforeSpeaking | AgentPhase::Thinking => {
                let clip = std::mem::replace(&mut self.next_clip, Clip::Reply);
                self.speak(clip, now, acts);
            }
            AgentPhase::Waiting | AgentPhase::Speaking(_) | AgentPhase::Listening => {}
        }
    }

    /// Its caller has published and subscribed.
    fn begin(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        if let Some(error) = self.script.error.take() {
            acts.push(AgentAction::Session(SessionEvent::Error(error)));
            self.script.track = TrackBehaviour::Silent;
        }
        let greets = self.next_clip == Clip::Greeting;
        let waits = greets && self.script.has(&InjectedFault::WaitsForCaller);
        if self.script.track == TrackBehaviour::Speaking && !waits {
            self.next_frame.get_or_insert(now);
            self.phase = AgentPhase::BeforeSpeaking;
            self.until = Some(now + BEFORE_SPEAKING);
        } else {
            if waits {
                self.next_clip = Clip::Reply;
            }
            self.phase = AgentPhase::Listening;
        }
    }

    /// Reports a change of its state.
    fn enter(&mut self, new: AgentState, acts: &mut Vec<AgentAction>) {
        let old = std::mem::replace(&mut self.state, new);
        if old != new {
            acts.push(AgentAction::State(new));
            acts.push(AgentAction::Session(SessionEvent::AgentState { old, new }));
        }
    }

    fn speak(&mut self, clip: Clip, now: Instant, acts: &mut Vec<AgentAction>) {
        let (frames, delay) = if self.script.has(&InjectedFault::NeverPauses) {
            (usize::MAX, 0)
        } else if clip == Clip::Reply {
            let length = self.voice.of(clip).len();
            let is_long = !std::mem::take(&mut self.answers_interruption);
            let least = if is_long { self.script.reply_frames } else { 0 };
            let repetitions = least.div_ceil(length).max(1);
            (length * repetitions, self.script.network_delay)
        } else if clip == Clip::Greeting && self.script.greeting_pause.is_some() {
            (self.voice.of(clip).len() / 2, 0)
        } else {
            (self.voice.of(clip).len(), 0)
        };
        self.first_speech.get_or_insert(now);
        self.phase = AgentPhase::Speaking(Speech {
            clip,
            began: now,
            sent: 0,
            delay,
            frames,
        });
        self.enter(AgentState::Speaking, acts);
    }

    /// Hears its caller.
    fn listen(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        self.caller_spoke = None;
        if self.ear.voice_duration() >= INTERRUPTION {
            self.yield_to_caller(now, acts);
        }
        while let Some(event) = self.ear.next(self.script.hearing, now) {
            match event {
                EarEvent::VoiceBegan(since) => {
                    let speaks = true;
                    let event = SessionEvent::CallerState { speaks, since };
                    acts.push(AgentAction::Session(event));
                }
                EarEvent::VoiceEnded(since) => {
                    let speaks = false;
                    let event = SessionEvent::CallerState { speaks, since };
                    acts.push(AgentAction::Session(event));
                }
                EarEvent::Transcribed { frames, delay } => {
                    // A transcript interrupts, too.
                    self.yield_to_caller(now, acts);
                    self.transcribe(frames, delay, acts);
                }
                EarEvent::TurnOver(utterance) => {
                    acts.push(AgentAction::Heard(utterance));
                    self.end_turn(utterance, now, acts);
                }
            }
        }
    }

    /// Stops speaking, as the session pauses its output before it knows whether the caller interrupts.
    fn yield_to_caller(&mut self, now: Instant, acts: &mut Vec<AgentAction>) {
        let AgentPhase::Speaking(speech) = self.phase else {
            return;
        };
        if self.can_be_interrupted(now) {
            self.interrupted = self.end_speech(speech, true, now, acts);
            self.answers_interruption = true;
            self.enter(AgentState::Listening, acts);
        }
    }

    fn transcribe(&mut self, frames: u32, delay: Duration, acts: &mut Vec<AgentAction>) {
        let frames = usize::try_from(frames).unwrap_or(usize::MAX);
        let understood = match &self.script.hears {
            Some(text) => text.clone(),
            None => words::understood(&self.spoken, frames),
        };
        let text = words::with_errors(&understood, self.script.word_errors);
        acts.push(AgentAction::TranscribeCaller(text.clone()));
        acts.push(AgentAction::Session(SessionEvent::Transcribed(
            text.clone(),
        )));
        let interrupted = self.interrupted.take();
        acts.extend(interrupted.map(|it| AgentAction::Session(SessionEvent::Message(it))));
        self.transcript = Some((text, delay));
    }

    /// The caller's turn is over. Without a transcript it was none.
    fn end_turn(&mut self, utterance: Utterance, now: Instant, acts: &mut Vec<AgentAction>) {
        let Some((text, transcription_delay)) = self.transcript.take() else {
            return;
        };
        self.turns_heard += 1;
        self.spoken.clear();
        let metrics = TurnClaims {
            spoke: Some((utterance.began, utterance.ended)),
            transcription_delay: Some(transcription_delay.as_secs_f64()),
            end_of_turn_delay: Some((now - utterance.ended).as_secs_f64()),
            on_user_turn_completed_delay: Some(0.0),
            ..TurnClaims::default()
        };
        acts.push(AgentAction::Session(SessionEvent::Message(Message {
            speaker: MessageSpeaker::Caller,
            text,
            interrupted: false,
            metrics,
        })));
        let may = matches!(self.phase, AgentPhase::Listening | AgentPhase::Thinking)
            && self.script.track == TrackBehaviour::Speaking;
        if !may || self.script.answer == AnswerBehaviour::Nothing {
            return;
        }
        self.answers = Some(CallerTurn {
            ended: utterance.ended,
            over: now,
        });
        self.phase = AgentPhase::Thinking;
        self.until = Some(now + self.script.llm + self.script.tts);
        self.enter(AgentState::Thinking, acts);
        if let Some(tool) = self.script.tool.clone() {
            let call = ToolCall::new(tool);
            let events = [
                SessionEvent::ToolStarted(call.clone()),
                SessionEvent::ToolEnded(call.clone()),
                SessionEvent::ToolsExecuted(call),
            ];
            acts.extend(events.map(AgentAction::Session));
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
        let AgentPhase::Speaking(mut speech) = self.phase else {
            let TrackBehaviour::Playing(sound) = self.script.track else {
                return (Arc::clone(&self.voice.silence), false);
            };
            let frames = self.voice.sound(sound);
            let frame = Arc::clone(&frames[self.played % frames.len()]);
            self.played += 1;
            return (frame, false);
        };
        let silence = Arc::clone(&self.voice.silence);
        let Some(frame) = speech.sent.checked_sub(speech.delay) else {
            speech.sent += 1;
            self.phase = AgentPhase::Speaking(speech);
            return (silence, false);
        };
        if frame == speech.frames {
            self.finish_speech(speech, now, acts);
            return (silence, false);
        }
        let clip = self.voice.of(speech.clip);
        let audio = Arc::clone(&clip[frame % clip.len()]);
        speech.sent += 1;
        self.phase = AgentPhase::Speaking(speech);
        self.speech_sent += FRAME;
        (audio, frame == 0)
    }

    /// It has spoken to the end.
    fn finish_speech(&mut self, speech: Speech, now: Instant, acts: &mut Vec<AgentAction>) {
        let message = self.end_speech(speech, false, now, acts);
        acts.extend(message.map(|it| AgentAction::Session(SessionEvent::Message(it))));
        self.enter(AgentState::Listening, acts);
        if speech.clip == Clip::Greeting {
            self.greeting_rest = self.script.greeting_pause.map(|pause| now + pause);
        }
    }

    /// Ends speech; returns the message that the session adds to the conversation, unless it was interrupted before its
    /// first word.
    fn end_speech(
        &mut self,
        speech: Speech,
        interrupted: bool,
        now: Instant,
        acts: &mut Vec<AgentAction>,
    ) -> Option<Message> {
        self.phase = AgentPhase::Listening;
        let played = speech.sent.saturating_sub(speech.delay);
        let text = self.words(speech, played);
        self.spoken.push(Spoken {
            text: text.clone(),
            frames: played,
        });
        acts.push(AgentAction::Said {
            clip: speech.clip,
            began: speech.began,
            ended: now,
            interrupted,
        });
        let mut metrics = TurnClaims {
            spoke: Some((speech.began, now)),
            tts_node_ttfb: Some(self.script.tts.as_secs_f64()),
            ..TurnClaims::default()
        };
        if speech.clip != Clip::Greeting
            && let Some(turn) = self.answers.take()
        {
            // A fixed text has no LLM, but counts as the answer to a turn that nothing else has answered (`say` in
            // `agent_activity.py`).
            if speech.clip == Clip::Reply {
                let thought = speech.began - turn.over;
                let tts = self.script.tts.min(thought);
                metrics.tts_node_ttfb = Some(tts.as_secs_f64());
                metrics.llm_node_ttft = Some(thought.saturating_sub(tts).as_secs_f64());
            }
            metrics.e2e_latency = Some((speech.began - turn.ended).as_secs_f64());
        }
        if text.is_empty() {
            return None;
        }
        acts.push(AgentAction::TranscribeSelf(text.clone()));
        Some(Message {
            speaker: MessageSpeaker::Agent,
            text,
            interrupted,
            metrics,
        })
    }

    /// The words of the first `played` frames of a speech.
    fn words(&self, speech: Speech, played: usize) -> String {
        let words = match speech.clip {
            Clip::Greeting | Clip::GreetingRest => AgentScript::GREETING,
            Clip::Reply => self.script.reply_words,
        };
        let clip = self.voice.of(speech.clip).len();
        let mut text = vec![words.to_owned(); played / clip];
        let rest = words::beginning(words, played % clip, clip);
        text.extend(Some(rest).filter(|rest| !rest.is_empty()));
        text.join(" ")
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

#[cfg(test)]
mod tests;
