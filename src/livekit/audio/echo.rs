//! What the echo track plays and when: the agent's own frames, a whole utterance at a time or passed through. A plain
//! state machine; it reads no clock, sends nothing, and knows of a frame only how long it plays.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::rtp;
use crate::config::{Echo as EchoSettings, EchoMode};

/// The silence that closes an echo, so that the listener hears its end and not a loss.
const TAIL_SILENCE: Duration = Duration::from_millis(200);

/// A track without any packets is announced to nobody, and a listener that subscribes late misses the onset: between
/// echoes a frame of silence goes out this often, as Opus does by itself in silence.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(400);

/// What is kept from before the detected start of an utterance; soft onsets stay below the threshold.
const LEAD_IN: Duration = Duration::from_millis(200);

/// The longest recording.
const MAX_RECORDING: Duration = Duration::from_secs(30);

/// Frames held at most, whatever their length: 30 s of 10 ms.
const MAX_FRAMES: usize = 3_000;

/// How far recorded pace and arrival may drift apart before the pass-through sets its clock anew.
const MAX_DRIFT: Duration = Duration::from_millis(100);

/// Speech is decided within this time of its first frame.
const SPEECH_DECISION_TIME: Duration = Duration::from_millis(60);

/// A stretch of sound as one engine takes and gives it: a coded packet, or samples. Cheap to clone.
pub(crate) trait Frame: Clone {
    /// A short one.
    fn silence() -> Self;

    fn duration(&self) -> Duration;
}

/// Something to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EchoOutput<F> {
    /// A frame for the track.
    Send {
        /// Its place in time; the RTP timestamp follows from it.
        due: Instant,
        frame: F,
        /// The first after a pause.
        resumes: bool,
    },
    /// The first frame of an echo goes out now.
    Started,
    /// The last frame of an echo that was speech went out, and has played; in pass-through it goes out now.
    Ended,
}

/// One recorded frame.
#[derive(Debug)]
struct RecordedFrame<F> {
    arrived: Instant,
    /// On the receiver's media clock, in ticks.
    time: u64,
    frame: F,
}

/// What the track does at a time to come.
#[derive(Debug)]
enum PlannedOutput<F> {
    Frame(F),
    Mark(EchoOutput<F>),
}

/// The echo of one agent.
pub(crate) struct EchoPlayer<F> {
    settings: EchoSettings,
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
    recorded: VecDeque<RecordedFrame<F>>,
    phase: TurnPhase,
    played: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum TurnPhase {
    #[default]
    Idle,
    Recording,
    /// The agent has ended; `speech` frames of the recording reach to its last speech frame.
    Waiting {
        until: Instant,
        speech: usize,
        postponed: bool,
    },
}

struct PassThrough<F> {
    /// A due time and the media time that belongs to it.
    anchor: Option<(Instant, u64)>,
    /// Speech of the agent whose echo begins or ends at these times.
    marks: VecDeque<(Instant, EchoOutput<F>)>,
}

impl<F: Frame> EchoPlayer<F> {
    pub(crate) fn new(settings: EchoSettings) -> Self {
        let mode = match settings.mode {
            EchoMode::Turn => PlayMode::Turn(TurnPlayer {
                recorded: VecDeque::new(),
                phase: TurnPhase::default(),
                played: 0,
            }),
            EchoMode::Continuous => PlayMode::Continuous(PassThrough {
                anchor: None,
                marks: VecDeque::new(),
            }),
        };
        Self {
            settings,
            silence: F::silence(),
            queue: VecDeque::new(),
            last_sent: None,
            open: false,
            mode,
        }
    }

    /// The track can carry frames from now on.
    pub(crate) fn open(&mut self, now: Instant) {
        if !self.open {
            self.open = true;
            self.silence_from(now);
        }
    }

    /// A frame of the agent's audio, `time` on the receiver's media clock.
    pub(crate) fn on_frame(&mut self, arrived: Instant, time: u64, frame: &F) {
        let frame = RecordedFrame {
            arrived,
            time,
            frame: frame.clone(),
        };
        match &mut self.mode {
            PlayMode::Turn(turn) if turn.played < self.settings.max_turns => turn.record(frame),
            PlayMode::Turn(_) => {}
            PlayMode::Continuous(continuous) => {
                let due = continuous.due(self.settings.delay, &frame);
                if self.queue.len() < MAX_FRAMES {
                    self.queue
                        .push_back((due, PlannedOutput::Frame(frame.frame)));
                }
            }
        }
    }

    pub(crate) fn on_speech_started(&mut self, at: Instant) {
        match &mut self.mode {
            // A pause within one greeting: the recording goes on, and the wait starts anew after its end.
            PlayMode::Turn(turn) => turn.phase = TurnPhase::Recording,
            PlayMode::Continuous(continuous) => {
                continuous.mark(at + self.settings.delay, EchoOutput::Started);
            }
        }
    }

    /// `at` is the arrival of the utterance's last speech frame.
    pub(crate) fn on_speech_ended(&mut self, at: Instant) {
        match &mut self.mode {
            PlayMode::Turn(turn) if turn.phase == TurnPhase::Recording => {
                turn.phase = TurnPhase::Waiting {
                    until: at + self.settings.delay,
                    speech: turn.recorded.partition_point(|it| it.arrived <= at),
                    postponed: false,
                };
            }
            PlayMode::Turn(_) => {}
            PlayMode::Continuous(continuous) => {
                continuous.mark(at + self.settings.delay, EchoOutput::Ended)
            }
        }
    }

    /// What to do at `now`; to be called until there is nothing left.
    ///
    /// `speech_pending`: the agent may just have begun to speak; an echo that hasn't begun waits until that is decided.
    pub(crate) fn poll(&mut self, now: Instant, speech_pending: bool) -> Option<EchoOutput<F>> {
        if !self.open {
            return None;
        }
        if let PlayMode::Continuous(continuous) = &mut self.mode
            && let Some(mark) = continuous.marks.pop_front_if(|(due, _)| *due <= now)
        {
            return Some(mark.1);
        }
        self.start_echo(now, speech_pending);
        if self.queue.is_empty() && self.keep_alive_at().is_some_and(|due| due <= now) {
            return Some(self.send(now, self.silence.clone()));
        }
        match self.queue.pop_front_if(|(due, _)| *due <= now)? {
            (_, PlannedOutput::Mark(out)) => Some(out),
            (due, PlannedOutput::Frame(frame)) => Some(self.send(due, frame)),
        }
    }

    /// When [`poll`](Self::poll) has something to do, as far as it is known.
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

    fn start_echo(&mut self, now: Instant, speech_pending: bool) {
        let PlayMode::Turn(turn) = &mut self.mode else {
            return;
        };
        let TurnPhase::Waiting {
            until,
            speech,
            postponed,
        } = &mut turn.phase
        else {
            return;
        };
        if now < *until || !self.queue.is_empty() {
            return;
        }
        if speech_pending && !*postponed {
            *until = now + SPEECH_DECISION_TIME;
            *postponed = true;
            return;
        }
        let speech = *speech;
        turn.phase = TurnPhase::Idle;
        turn.played += 1;
        let Some(first) = turn.recorded.front().filter(|_| speech > 0) else {
            return;
        };
        let first = first.time;
        let mut end = now;
        self.queue
            .push_back((now, PlannedOutput::Mark(EchoOutput::Started)));
        for recorded in turn.recorded.drain(..).take(speech) {
            let due = now + rtp::span(recorded.time - first);
            end = due + recorded.frame.duration();
            self.queue
                .push_back((due, PlannedOutput::Frame(recorded.frame)));
        }
        self.queue
            .push_back((end, PlannedOutput::Mark(EchoOutput::Ended)));
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

    fn send(&mut self, due: Instant, frame: F) -> EchoOutput<F> {
        let resumes = self
            .last_sent
            .is_none_or(|last| due.saturating_duration_since(last) >= KEEP_ALIVE_INTERVAL / 2);
        self.last_sent = Some(due);
        EchoOutput::Send {
            due,
            frame,
            resumes,
        }
    }
}

impl<F> TurnPlayer<F> {
    fn record(&mut self, frame: RecordedFrame<F>) {
        if self.phase == TurnPhase::Idle {
            let from = frame.time.saturating_sub(rtp::ticks(LEAD_IN));
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
    fn due(&mut self, delay: Duration, frame: &RecordedFrame<F>) -> Instant {
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

    /// Utterances are further apart than their end silence, so the marks in flight are few; a delay of hours would hold
    /// as many frames no more than [`MAX_FRAMES`], and its marks go the same way.
    fn mark(&mut self, due: Instant, out: EchoOutput<F>) {
        if self.marks.len() < MAX_FRAMES {
            self.marks.push_back((due, out));
        }
    }
}

#[cfg(test)]
mod tests;
