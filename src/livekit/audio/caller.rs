//! What the echo track plays and when: the agent's own frames, either one whole utterance at a time or passed through.
//!
//! A state machine that reads no clock and sends nothing. Of a frame it knows only how long it plays.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::rtp;
use super::speech;
use crate::config::{Caller as CallerSettings, CallerMode};

/// The silence that ends an echo. Without it, the listener takes the end for packet loss.
const TAIL_SILENCE: Duration = Duration::from_millis(200);

/// Between echoes, a frame of silence is sent at this interval, as an Opus encoder with DTX does. LiveKit announces no
/// track that has not sent a packet, and a listener that subscribes late misses the start of the echo.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(400);

/// How much audio before the start of the speech belongs to the recording: its onset may be too soft to be detected.
const LEAD_IN: Duration = Duration::from_millis(200);

/// Maximum length of one recording.
const MAX_RECORDING: Duration = Duration::from_secs(30);

/// Maximum number of frames in memory, whatever their length: 30 s of 10 ms.
const MAX_FRAMES: usize = 3_000;

/// How far the recorded pace and the arrival times may drift apart before the pass-through resets its clock.
const MAX_DRIFT: Duration = Duration::from_millis(100);

/// How often an echo that is due checks whether what the agent plays is speech, until the detector has decided.
const SPEECH_CHECK_INTERVAL: Duration = Duration::from_millis(60);

/// How much of a pause is kept after a loud frame and before the next one. With the step between them a pause is at
/// most 200 ms long: an agent takes a longer one for the end of the turn, and an echo for several turns.
const PAUSE_MARGIN: Duration = Duration::from_millis(60);

/// A frame this many dB below the loudest one of the recording belongs to a pause.
const PAUSE_BELOW_SPEECH: f32 = 25.0;

/// How often a busy agent is checked.
const BUSY_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// A piece of audio in the form that an engine receives and sends: a coded packet, or samples. Cheap to clone.
pub(crate) trait Frame: Clone {
    /// One short frame of silence.
    fn silence() -> Self;

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
    /// The first frame of an echo goes out now.
    Started,
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
}

/// What the track does at a later time.
#[derive(Debug)]
enum PlannedOutput<F> {
    Frame(F),
    Mark(CallerOutput<F>),
}

/// The echo of one agent.
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

struct TurnPlayer<F> {
    recorded: VecDeque<AgentFrame<F>>,
    phase: TurnPhase,
    played: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum TurnPhase {
    #[default]
    Idle,
    Recording,
    /// The agent's utterance ended; the first `speech` frames of the recording reach to its last frame of speech.
    Waiting {
        until: Instant,
        /// Until when a busy agent is waited for.
        busy_until: Instant,
        speech: usize,
        /// How much later the echo starts because the agent may have begun to speak again.
        postponed: Duration,
    },
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
                played: 0,
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
        if !self.open {
            self.open = true;
            self.silence_from(now);
        }
    }

    pub(crate) fn on_frame(&mut self, frame: AgentFrame<F>) {
        match &mut self.mode {
            PlayMode::Turn(turn) if turn.played < self.settings.turns => turn.record(frame),
            PlayMode::Turn(_) => {}
            PlayMode::Continuous(continuous) => {
                let due = continuous.due(self.settings.silence, &frame);
                if self.queue.len() < MAX_FRAMES {
                    self.queue
                        .push_back((due, PlannedOutput::Frame(frame.frame)));
                }
            }
        }
    }

    pub(crate) fn on_speech_started(&mut self, at: Instant) {
        match &mut self.mode {
            // After a pause within one greeting, the recording continues, and the wait restarts at its end.
            PlayMode::Turn(turn) => {
                turn.trim(at);
                turn.phase = TurnPhase::Recording;
            }
            PlayMode::Continuous(continuous) => {
                continuous.mark(at + self.settings.silence, CallerOutput::Started);
            }
        }
    }

    /// `at`: the arrival of the utterance's last frame of speech.
    pub(crate) fn on_speech_ended(&mut self, at: Instant) {
        match &mut self.mode {
            PlayMode::Turn(turn) if turn.phase == TurnPhase::Recording => {
                turn.phase = TurnPhase::Waiting {
                    until: at + self.settings.silence,
                    busy_until: at + self.agent_turn,
                    speech: turn.recorded.partition_point(|it| it.arrived <= at),
                    postponed: Duration::ZERO,
                };
            }
            PlayMode::Turn(_) => {}
            PlayMode::Continuous(continuous) => {
                continuous.mark(at + self.settings.silence, CallerOutput::Ended);
            }
        }
    }

    /// Returns what to do at `now`. Call it until it returns `None`. An echo that has not started waits for the agent.
    pub(crate) fn poll(&mut self, now: Instant, agent: AgentActivity) -> Option<CallerOutput<F>> {
        if !self.open {
            return None;
        }
        if let PlayMode::Continuous(continuous) = &mut self.mode
            && let Some(mark) = continuous.marks.pop_front_if(|(due, _)| *due <= now)
        {
            return Some(mark.1);
        }
        self.start_echo(now, agent);
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
            PlayMode::Turn(turn) => match turn.phase {
                TurnPhase::Waiting { until, .. } if self.queue.is_empty() => Some(until),
                _ => None,
            },
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

    fn start_echo(&mut self, now: Instant, agent: AgentActivity) {
        let PlayMode::Turn(turn) = &mut self.mode else {
            return;
        };
        let TurnPhase::Waiting {
            until,
            busy_until,
            speech,
            postponed,
        } = &mut turn.phase
        else {
            return;
        };
        if now < *until || !self.queue.is_empty() {
            return;
        }
        // The silence may be a pause in the agent's turn. Our speech would interrupt it, and the rest would never be spoken.
        if agent.is_busy && now < *busy_until {
            *until = (now + BUSY_CHECK_INTERVAL).min(*busy_until);
            return;
        }
        // Not for longer: noise that never becomes speech must not hold the echo back.
        if agent.may_speak && *postponed < speech::MAX_DECISION_TIME {
            *until = now + SPEECH_CHECK_INTERVAL;
            *postponed += SPEECH_CHECK_INTERVAL;
            return;
        }
        let speech = *speech;
        turn.phase = TurnPhase::Idle;
        turn.played += 1;
        if speech == 0 {
            return;
        }
        self.queue
            .push_back((now, PlannedOutput::Mark(CallerOutput::Started)));
        let mut end = now;
        for (due, frame) in without_long_pauses(turn.recorded.drain(..).take(speech).collect()) {
            let due = now + due;
            end = due + frame.duration();
            self.queue.push_back((due, PlannedOutput::Frame(frame)));
        }
        self.queue
            .push_back((end, PlannedOutput::Mark(CallerOutput::Ended)));
        // An echo is rare and its buffer is large: return the memory.
        turn.recorded.shrink_to(0);
        self.silence_from(end);
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

impl<F> TurnPlayer<F> {
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
        if !full && frame.time - first < rtp::ticks(MAX_RECORDING) {
            self.recorded.push_back(frame);
        }
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
