//! What the caller's track plays and when: the agent's own frames, one whole utterance at a time or passed through, or the lines
//! of a script.
//!
//! A state machine that reads no clock and sends nothing. Of a frame it knows only how long it plays.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::rtp;
use super::speech;
use crate::clip::SpeechClip;
use crate::config::{Caller as CallerSettings, CallerMode};
use crate::livekit::event::CallerTurn;

/// The silence that ends a turn. Without it, the listener takes the end for packet loss.
const TAIL_SILENCE: Duration = Duration::from_millis(200);

/// Between turns, a frame of silence is sent at this interval, as an Opus encoder with DTX does. LiveKit announces no
/// track that has not sent a packet, and a listener that subscribes late misses the start of a turn.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(400);

/// How much audio before the start of the speech belongs to the recording: its onset may be too soft to be detected.
const LEAD_IN: Duration = Duration::from_millis(200);

/// Maximum number of frames in memory, whatever their length: 30 s of 10 ms.
const MAX_FRAMES: usize = 3_000;

/// How far the recorded pace and the arrival times may drift apart before the pass-through resets its clock.
const MAX_DRIFT: Duration = Duration::from_millis(100);

/// How often a turn that is due checks whether what the agent plays is speech, until the detector has decided.
const SPEECH_CHECK_INTERVAL: Duration = Duration::from_millis(60);

/// How much of a pause is kept after a loud frame and before the next one. With the step between them a pause is at
/// most 200 ms long: an agent takes a longer one for the end of the turn, and an echo for several turns.
const PAUSE_MARGIN: Duration = Duration::from_millis(60);

/// A frame this many dB below the loudest one of the recording belongs to a pause.
const PAUSE_BELOW_SPEECH: f32 = 25.0;

/// How often a busy agent is checked.
const BUSY_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// A caller that speaks first begins this long after the agent's session reported that it listens.
const OPENING_DELAY: Duration = Duration::from_secs(1);

/// The caller interrupts a reply this long after its start.
const INTERRUPT_AFTER: Duration = Duration::from_secs(1);

/// From its first speech on, an `AgentSession` can't be interrupted for 3 s (`aec_warmup_duration` in livekit-agents'
/// `voice/agent_session.py`), and it drops what it hears.
const WARM_UP: Duration = Duration::from_millis(3_500);

/// The agent speaks if its last frame of speech is at most this old: packets are read every 40 ms, and the next word of a
/// sentence soon follows a pause.
const MAX_SPEECH_AGE: Duration = Duration::from_millis(120);

/// A piece of audio in the form that an engine receives and sends: a coded packet, or samples. Cheap to clone.
pub(crate) trait Frame: Clone {
    /// One short frame of silence.
    fn silence() -> Self;

    /// The frames of recorded speech.
    fn of_clip(clip: &SpeechClip) -> Vec<Self>;

    fn duration(&self) -> Duration;
}

/// What the caller of [`CallerPlayer::poll`] has to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CallerOutput<F> {
    /// A frame for the track.
    Send {
        /// When the frame is due; the RTP timestamp follows from it.
        due: Instant,
        frame: F,
        /// This is the first frame after a pause.
        resumes: bool,
    },
    /// The first frame of what the caller says goes out now.
    Started(CallerTurn),
    /// The last frame of speech has been played. In pass-through mode, it is sent now.
    Ended,
}

/// A frame of the agent's audio.
#[derive(Debug)]
pub(crate) struct AgentFrame<F> {
    pub(crate) arrived: Instant,
    /// Position on the receiver's media clock, in ticks.
    pub(crate) time: u64,
    /// Its level in dBFS.
    pub(crate) level: f32,
    pub(crate) frame: F,
}

/// What the agent does now, as far as it is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AgentActivity {
    /// It may have started to speak: the detector has not decided yet.
    pub(crate) may_speak: bool,
    /// Its session reports another state than listening, for example because it has not finished.
    pub(crate) is_busy: bool,
    /// Since when its session reports that it listens.
    pub(crate) listening_since: Option<Instant>,
    /// Since when the canary receives its audio track.
    pub(crate) subscribed_since: Option<Instant>,
    /// Its last frame of speech, while it speaks.
    pub(crate) last_speech: Option<Instant>,
}

/// What the track does at a later time.
#[derive(Debug)]
enum PlannedOutput<F> {
    Frame(F),
    Mark(CallerOutput<F>),
}

/// The caller of one agent.
pub(crate) struct CallerPlayer<F> {
    settings: CallerSettings,
    /// How long a busy agent is waited for.
    agent_turn: Duration,
    silence: F,
    queue: VecDeque<(Instant, PlannedOutput<F>)>,
    last_sent: Option<Instant>,
    open: bool,
    mode: PlayMode<F>,
}

enum PlayMode<F> {
    Turn(TurnPlayer<F>),
    Continuous(PassThrough<F>),
}

/// Decides when the caller takes its turns, and keeps what it echoes.
struct TurnPlayer<F> {
    recorded: VecDeque<AgentFrame<F>>,
    phase: TurnPhase,
    /// Turns that have begun, excluding the interruption.
    taken: u32,
    /// When the caller's speech ended last, or will end.
    spoke_until: Option<Instant>,
    interruption: Option<Interruption>,
    /// The caller interrupted what the agent said last.
    interrupted: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum TurnPhase {
    /// The agent has to speak before the caller does.
    #[default]
    Idle,
    /// The caller speaks first, as soon as the agent listens.
    Opening(DueTurn),
    /// The agent speaks.
    Recording,
    /// The agent's utterance ended; the first `speech` frames of the recording reach to its last frame of speech.
    Waiting { speech: usize, due: DueTurn },
}

/// A turn of the caller that waits until the agent listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DueTurn {
    /// When to check next.
    check_at: Instant,
    /// Until when a busy agent is waited for.
    busy_until: Instant,
    /// How much later the turn starts because the agent may have begun to speak again.
    postponed: Duration,
}

/// The interruption that is still to come.
#[derive(Debug, Default)]
struct Interruption {
    /// When the agent first spoke.
    first_speech: Option<Instant>,
    /// When to interrupt the reply that the agent speaks now.
    check_at: Option<Instant>,
}

/// What a turn of the caller consists of.
enum Speech {
    /// These frames at the start of the recording.
    Echo(usize),
    Line(usize),
    Interruption,
}

struct PassThrough<F> {
    /// A due time and the matching media time.
    anchor: Option<(Instant, u64)>,
    /// When the echo of an utterance starts or ends.
    marks: VecDeque<(Instant, CallerOutput<F>)>,
}

impl<F: Frame> CallerPlayer<F> {
    pub(crate) fn new(settings: CallerSettings, agent_turn: Duration) -> Self {
        let mode = match settings.mode {
            CallerMode::Echo | CallerMode::Script => PlayMode::Turn(TurnPlayer {
                recorded: VecDeque::new(),
                phase: TurnPhase::default(),
                taken: 0,
                spoke_until: None,
                interruption: settings.interrupt.then(Interruption::default),
                interrupted: false,
            }),
            CallerMode::PassThrough => PlayMode::Continuous(PassThrough {
                anchor: None,
                marks: VecDeque::new(),
            }),
        };
        Self {
            settings,
            agent_turn,
            silence: F::silence(),
            queue: VecDeque::new(),
            last_sent: None,
            open: false,
            mode,
        }
    }

    /// From `now` on, the track can carry frames.
    pub(crate) fn open(&mut self, now: Instant) {
        if self.open {
            return;
        }
        self.open = true;
        self.silence_from(now);
        if self.settings.speaks_first
            && let PlayMode::Turn(turn) = &mut self.mode
            && turn.phase == TurnPhase::Idle
        {
            turn.phase = TurnPhase::Opening(DueTurn {
                check_at: now,
                busy_until: now,
                postponed: Duration::ZERO,
            });
        }
    }

    pub(crate) fn on_frame(&mut self, frame: AgentFrame<F>) {
        match &mut self.mode {
            PlayMode::Turn(turn) => {
                if self.settings.mode == CallerMode::Echo && turn.taken < self.settings.turns {
                    turn.record(frame);
                }
            }
            PlayMode::Continuous(continuous) => {
                let due = continuous.due(self.settings.silence, &frame);
                if self.queue.len() < MAX_FRAMES {
                    self.queue
                        .push_back((due, PlannedOutput::Frame(frame.frame)));
                }
            }
        }
    }

    /// `at`: the first sound of the utterance.
    pub(crate) fn on_speech_started(&mut self, at: Instant) {
        match &mut self.mode {
            PlayMode::Turn(turn) => turn.on_speech_started(at),
            PlayMode::Continuous(continuous) => {
                let started = CallerOutput::Started(CallerTurn::default());
                continuous.mark(at + self.settings.silence, started);
            }
        }
    }

    /// `at`: the arrival of the utterance's last frame of speech.
    pub(crate) fn on_speech_ended(&mut self, at: Instant) {
        match &mut self.mode {
            PlayMode::Turn(turn) => turn.on_speech_ended(at, &self.settings, self.agent_turn),
            PlayMode::Continuous(continuous) => {
                continuous.mark(at + self.settings.silence, CallerOutput::Ended);
            }
        }
    }

    /// Returns what to do at `now`. Call it until it returns `None`. A turn that has not started waits for the agent.
    pub(crate) fn poll(&mut self, now: Instant, agent: AgentActivity) -> Option<CallerOutput<F>> {
        if !self.open {
            return None;
        }
        if let PlayMode::Continuous(continuous) = &mut self.mode
            && let Some(mark) = continuous.marks.pop_front_if(|(due, _)| *due <= now)
        {
            return Some(mark.1);
        }
        self.take_turn(now, agent);
        if self.queue.is_empty() && self.keep_alive_at().is_some_and(|due| due <= now) {
            return Some(self.send(now, self.silence.clone()));
        }
        match self.queue.pop_front_if(|(due, _)| *due <= now)? {
            (_, PlannedOutput::Mark(out)) => Some(out),
            (due, PlannedOutput::Frame(frame)) => Some(self.send(due, frame)),
        }
    }

    /// When [`poll`](Self::poll) next has something to do; `None` if that depends on further audio.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        if !self.open {
            return None;
        }
        let own = match &self.mode {
            PlayMode::Turn(turn) if self.queue.is_empty() => turn.next_check(),
            PlayMode::Turn(_) => None,
            PlayMode::Continuous(continuous) => continuous.marks.front().map(|(due, _)| *due),
        };
        let next = match self.queue.front() {
            Some((due, _)) => Some(*due),
            None => self.keep_alive_at(),
        };
        own.into_iter().chain(next).min()
    }

    fn keep_alive_at(&self) -> Option<Instant> {
        Some(self.last_sent? + KEEP_ALIVE_INTERVAL)
    }

    /// Plans what the caller says, if its turn has come. What it says now is finished first.
    fn take_turn(&mut self, now: Instant, agent: AgentActivity) {
        let PlayMode::Turn(turn) = &mut self.mode else {
            return;
        };
        if !self.queue.is_empty() {
            return;
        }
        let Some(speech) = turn.next_speech(now, agent, &self.settings, self.agent_turn) else {
            return;
        };
        let (frames, turn) = match speech {
            Speech::Echo(frames) => (turn.take_recorded(frames), CallerTurn::default()),
            Speech::Line(line) => {
                let clip = &self.settings.lines[line].audio;
                let turn = CallerTurn {
                    line: Some(line),
                    interrupts: false,
                };
                (paced(F::of_clip(clip)), turn)
            }
            Speech::Interruption => {
                let turn = CallerTurn {
                    line: None,
                    interrupts: true,
                };
                (paced(F::of_clip(&SpeechClip::hello())), turn)
            }
        };
        self.say(now, frames, turn);
    }

    /// `frames`: each with the time after the start at which it is due.
    fn say(&mut self, now: Instant, frames: Vec<(Duration, F)>, turn: CallerTurn) {
        self.queue
            .push_back((now, PlannedOutput::Mark(CallerOutput::Started(turn))));
        let mut end = now;
        for (due, frame) in frames {
            let due = now + due;
            end = due + frame.duration();
            self.queue.push_back((due, PlannedOutput::Frame(frame)));
        }
        self.queue
            .push_back((end, PlannedOutput::Mark(CallerOutput::Ended)));
        self.silence_from(end);
        if let PlayMode::Turn(turn) = &mut self.mode {
            turn.spoke_until = Some(end);
        }
    }

    fn silence_from(&mut self, start: Instant) {
        let mut due = start;
        while due < start + TAIL_SILENCE {
            self.queue
                .push_back((due, PlannedOutput::Frame(self.silence.clone())));
            due += self.silence.duration();
        }
    }

    fn send(&mut self, due: Instant, frame: F) -> CallerOutput<F> {
        let resumes = self
            .last_sent
            .is_none_or(|last| due.saturating_duration_since(last) >= KEEP_ALIVE_INTERVAL / 2);
        self.last_sent = Some(due);
        CallerOutput::Send {
            due,
            frame,
            resumes,
        }
    }
}

/// Frames that follow each other, and when each is due after the start.
fn paced<F: Frame>(frames: Vec<F>) -> Vec<(Duration, F)> {
    let mut due = Duration::ZERO;
    let frames = frames.into_iter().map(|frame| {
        let at = due;
        due += frame.duration();
        (at, frame)
    });
    frames.collect()
}

/// The frames of a recording, and when each is due after the start. Pauses are shortened: see [`PAUSE_MARGIN`].
fn without_long_pauses<F: Frame>(
    recorded: Vec<AgentFrame<F>>,
) -> impl Iterator<Item = (Duration, F)> {
    let margin = rtp::ticks(PAUSE_MARGIN);
    let levels = recorded.iter().map(|it| it.level);
    let loudest = levels.fold(f32::NEG_INFINITY, f32::max);
    let loud = recorded
        .iter()
        .filter(|it| it.level > loudest - PAUSE_BELOW_SPEECH);
    let loud: Vec<u64> = loud.map(|it| it.time).collect();
    let in_pause = move |time: u64| {
        let next = loud.partition_point(|loud| *loud <= time);
        let (earlier, later) = loud.split_at(next);
        match (earlier.last(), later.first()) {
            (Some(before), Some(after)) => time > before + margin && time + margin < *after,
            _ => false,
        }
    };
    let mut due = Duration::ZERO;
    let mut last: Option<(u64, Duration)> = None;
    recorded
        .into_iter()
        .filter(move |it| !in_pause(it.time))
        .map(move |it| {
            if let Some((time, duration)) = last {
                // Frames that were not sent or were lost leave a step, too.
                due += rtp::span(it.time - time).min(PAUSE_MARGIN.max(duration));
            }
            last = Some((it.time, it.frame.duration()));
            (due, it.frame)
        })
}

impl DueTurn {
    /// Whether the turn begins at `now`; otherwise, when to check again is in `check_at`.
    fn begins(&mut self, now: Instant, agent: AgentActivity) -> bool {
        if now < self.check_at {
            return false;
        }
        // The silence may be a pause in the agent's turn. Our speech would interrupt it, and the rest would never be spoken.
        if agent.is_busy && now < self.busy_until {
            self.check_at = (now + BUSY_CHECK_INTERVAL).min(self.busy_until);
            return false;
        }
        // Not for longer: noise that never becomes speech must not hold the turn back.
        if agent.may_speak && self.postponed < speech::MAX_DECISION_TIME {
            self.check_at = now + SPEECH_CHECK_INTERVAL;
            self.postponed += SPEECH_CHECK_INTERVAL;
            return false;
        }
        true
    }

    /// The same for a turn before the agent's first speech.
    fn opens(
        &mut self,
        now: Instant,
        agent: AgentActivity,
        silence: Duration,
        agent_turn: Duration,
    ) -> bool {
        let Some(subscribed) = agent.subscribed_since else {
            self.check_at = now + BUSY_CHECK_INTERVAL;
            return false;
        };
        let ready = match agent.listening_since {
            Some(listening) => listening.max(subscribed) + OPENING_DELAY,
            None => subscribed + silence,
        };
        if now < ready {
            // The agent's session may report its state meanwhile.
            self.check_at = (now + BUSY_CHECK_INTERVAL).min(ready);
            return false;
        }
        self.busy_until = subscribed + agent_turn.max(silence);
        self.begins(now, agent)
    }
}

impl Interruption {
    /// An utterance began; `is_reply` if it may be one to the caller.
    fn on_speech_started(&mut self, at: Instant, is_reply: bool) {
        let first = *self.first_speech.get_or_insert(at);
        if is_reply {
            self.check_at = Some((at + INTERRUPT_AFTER).max(first + WARM_UP));
        }
    }

    /// Whether to interrupt the agent at `now`. The end of an utterance is certain only after its end silence: an
    /// interruption between the two would come into silence.
    fn begins(&mut self, now: Instant, agent: AgentActivity) -> bool {
        if self.check_at.is_none_or(|due| now < due) {
            return false;
        }
        let speaks = agent
            .last_speech
            .is_some_and(|last| now.saturating_duration_since(last) <= MAX_SPEECH_AGE);
        if !speaks {
            self.check_at = Some(now + SPEECH_CHECK_INTERVAL);
        }
        speaks
    }
}

impl<F> TurnPlayer<F> {
    fn on_speech_started(&mut self, at: Instant) {
        // After a pause within one greeting, the recording continues, and the wait restarts at its end.
        self.trim(at);
        self.phase = TurnPhase::Recording;
        self.interrupted = false;
        let is_reply = self.spoke_until.is_some_and(|ended| at >= ended);
        if let Some(interruption) = &mut self.interruption {
            interruption.on_speech_started(at, is_reply);
        }
    }

    fn on_speech_ended(&mut self, at: Instant, settings: &CallerSettings, agent_turn: Duration) {
        if let Some(interruption) = &mut self.interruption {
            interruption.check_at = None;
        }
        // After an interruption, the agent's reply to it comes first. An agent that did not yield gives none.
        let spoke_on = |ended: Instant| at > ended + CallerTurn::MAX_YIELD_AFTER;
        let finished = self.interrupted && self.spoke_until.is_some_and(spoke_on);
        if self.phase != TurnPhase::Recording && !finished {
            return;
        }
        if self.taken >= settings.turns {
            self.phase = TurnPhase::Idle;
            return;
        }
        let wait = match self.taken {
            0 => settings.silence,
            _ => settings.silence.max(settings.pause),
        };
        self.phase = TurnPhase::Waiting {
            speech: self.recorded.partition_point(|it| it.arrived <= at),
            due: DueTurn {
                check_at: at + wait,
                busy_until: at + wait.max(agent_turn),
                postponed: Duration::ZERO,
            },
        };
    }

    /// When [`next_speech`](Self::next_speech) has something to decide.
    fn next_check(&self) -> Option<Instant> {
        let turn = match self.phase {
            TurnPhase::Opening(due) | TurnPhase::Waiting { due, .. } => Some(due.check_at),
            TurnPhase::Idle | TurnPhase::Recording => None,
        };
        let interruption = self.interruption.as_ref().and_then(|it| it.check_at);
        turn.into_iter().chain(interruption).min()
    }

    /// What the caller says now, if its turn has come.
    fn next_speech(
        &mut self,
        now: Instant,
        agent: AgentActivity,
        settings: &CallerSettings,
        agent_turn: Duration,
    ) -> Option<Speech> {
        if let Some(interruption) = &mut self.interruption
            && interruption.begins(now, agent)
        {
            self.interruption = None;
            self.interrupted = true;
            self.phase = TurnPhase::Idle;
            return Some(Speech::Interruption);
        }
        let (begins, speech) = match &mut self.phase {
            TurnPhase::Opening(due) => (due.opens(now, agent, settings.silence, agent_turn), 0),
            TurnPhase::Waiting { speech, due } => (due.begins(now, agent), *speech),
            TurnPhase::Idle | TurnPhase::Recording => return None,
        };
        if !begins {
            return None;
        }
        self.phase = TurnPhase::Idle;
        let speech = if settings.mode == CallerMode::Script {
            let lines = u32::try_from(settings.lines.len()).ok()?;
            let line = self.taken.checked_rem(lines)?;
            Speech::Line(usize::try_from(line).ok()?)
        } else if speech > 0 {
            Speech::Echo(speech)
        } else {
            return None;
        };
        self.taken += 1;
        Some(speech)
    }

    /// Drops what was recorded before an utterance that started at `at`.
    fn trim(&mut self, at: Instant) {
        if self.phase == TurnPhase::Idle {
            self.recorded.retain(|it| it.arrived + LEAD_IN >= at);
        }
    }

    fn record(&mut self, frame: AgentFrame<F>) {
        if self.phase == TurnPhase::Idle {
            let kept = LEAD_IN + speech::MAX_DECISION_TIME;
            let from = frame.time.saturating_sub(rtp::ticks(kept));
            self.recorded.retain(|it| it.time >= from);
        }
        let first = self.recorded.front().map_or(frame.time, |it| it.time);
        let full = self.recorded.len() >= MAX_FRAMES;
        if !full && frame.time - first < rtp::ticks(CallerTurn::MAX_ECHO) {
            self.recorded.push_back(frame);
        }
    }
}

impl<F: Frame> TurnPlayer<F> {
    /// The first `count` frames of the recording, which ends here.
    fn take_recorded(&mut self, count: usize) -> Vec<(Duration, F)> {
        let frames = without_long_pauses(self.recorded.drain(..).take(count).collect()).collect();
        // An echo is rare and its buffer is large: return the memory.
        self.recorded.shrink_to(0);
        frames
    }
}

impl<F> PassThrough<F> {
    fn due(&mut self, delay: Duration, frame: &AgentFrame<F>) -> Instant {
        let by_arrival = frame.arrived + delay;
        if let Some((due, time)) = self.anchor {
            let by_pace = due + rtp::span(frame.time.saturating_sub(time));
            let drift = by_pace
                .saturating_duration_since(by_arrival)
                .max(by_arrival.saturating_duration_since(by_pace));
            if drift <= MAX_DRIFT {
                self.anchor = Some((by_pace, frame.time));
                return by_pace;
            }
        }
        self.anchor = Some((by_arrival, frame.time));
        by_arrival
    }

    /// Drops a mark beyond [`MAX_FRAMES`], as frames are. Only a delay of hours gets there: utterances are further
    /// apart than their end silence, so few marks wait at a time.
    fn mark(&mut self, due: Instant, out: CallerOutput<F>) {
        if self.marks.len() < MAX_FRAMES {
            self.marks.push_back((due, out));
        }
    }
}

#[cfg(test)]
mod tests;
