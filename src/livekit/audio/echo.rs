//! What the echo track plays and when: the agent's own frames, a whole utterance at a time or passed through. A plain
//! state machine; it reads no clock, sends nothing, and knows of a frame only how long it plays.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::rtp;
use crate::config::{Echo as Settings, EchoMode};

/// The silence that closes an echo, so that the listener hears its end and not a loss.
const TAIL: Duration = Duration::from_millis(200);

/// A track without any packets is announced to nobody, and a listener that subscribes late misses the onset: between
/// echoes a frame of silence goes out this often, as Opus does by itself in silence.
const KEEP_ALIVE: Duration = Duration::from_millis(400);

/// What is kept from before the detected start of an utterance; soft onsets stay below the threshold.
const LEAD: Duration = Duration::from_millis(200);

/// The longest recording.
const LONGEST: Duration = Duration::from_secs(30);

/// Frames held at most, whatever their length: 30 s of 10 ms.
const MOST_FRAMES: usize = 3_000;

/// How far recorded pace and arrival may drift apart before the pass-through sets its clock anew.
const DRIFT: Duration = Duration::from_millis(100);

/// Speech is decided within this time of its first frame.
const VERGE: Duration = Duration::from_millis(60);

/// A stretch of sound as one engine takes and gives it: a coded packet, or samples. Cheap to clone.
pub(crate) trait Frame: Clone {
    /// A short one.
    fn silence() -> Self;

    fn duration(&self) -> Duration;
}

/// Something to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Out<F> {
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
struct Recorded<F> {
    arrived: Instant,
    /// On the receiver's media clock, in ticks.
    time: u64,
    frame: F,
}

/// What the track does at a time to come.
#[derive(Debug)]
enum Planned<F> {
    Frame(F),
    Mark(Out<F>),
}

/// The echo of one agent.
pub(crate) struct Echo<F> {
    settings: Settings,
    silence: F,
    queue: VecDeque<(Instant, Planned<F>)>,
    last_sent: Option<Instant>,
    open: bool,
    mode: Mode<F>,
}

enum Mode<F> {
    Turn(Turn<F>),
    Continuous(Continuous<F>),
}

struct Turn<F> {
    recorded: VecDeque<Recorded<F>>,
    phase: Phase,
    played: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
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

struct Continuous<F> {
    /// A due time and the media time that belongs to it.
    anchor: Option<(Instant, u64)>,
    /// Speech of the agent whose echo begins or ends at these times.
    marks: VecDeque<(Instant, Out<F>)>,
}

impl<F: Frame> Echo<F> {
    pub(crate) fn new(settings: Settings) -> Self {
        let mode = match settings.mode {
            EchoMode::Turn => Mode::Turn(Turn {
                recorded: VecDeque::new(),
                phase: Phase::default(),
                played: 0,
            }),
            EchoMode::Continuous => Mode::Continuous(Continuous {
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
        let frame = Recorded {
            arrived,
            time,
            frame: frame.clone(),
        };
        match &mut self.mode {
            Mode::Turn(turn) if turn.played < self.settings.max_turns => turn.record(frame),
            Mode::Turn(_) => {}
            Mode::Continuous(continuous) => {
                let due = continuous.due(self.settings.delay, &frame);
                if self.queue.len() < MOST_FRAMES {
                    self.queue.push_back((due, Planned::Frame(frame.frame)));
                }
            }
        }
    }

    pub(crate) fn on_speech_started(&mut self, at: Instant) {
        match &mut self.mode {
            // A pause within one greeting: the recording goes on, and the wait starts anew after its end.
            Mode::Turn(turn) => turn.phase = Phase::Recording,
            Mode::Continuous(continuous) => {
                continuous.mark(at + self.settings.delay, Out::Started);
            }
        }
    }

    /// `at` is the arrival of the utterance's last speech frame.
    pub(crate) fn on_speech_ended(&mut self, at: Instant) {
        match &mut self.mode {
            Mode::Turn(turn) if turn.phase == Phase::Recording => {
                turn.phase = Phase::Waiting {
                    until: at + self.settings.delay,
                    speech: turn.recorded.partition_point(|it| it.arrived <= at),
                    postponed: false,
                };
            }
            Mode::Turn(_) => {}
            Mode::Continuous(continuous) => continuous.mark(at + self.settings.delay, Out::Ended),
        }
    }

    /// What to do at `now`; to be called until there is nothing left.
    ///
    /// `on_the_verge`: the agent may just have begun to speak; an echo that hasn't begun waits until that is decided.
    pub(crate) fn poll(&mut self, now: Instant, on_the_verge: bool) -> Option<Out<F>> {
        if !self.open {
            return None;
        }
        if let Mode::Continuous(continuous) = &mut self.mode
            && let Some(mark) = continuous.marks.pop_front_if(|(due, _)| *due <= now)
        {
            return Some(mark.1);
        }
        self.start_echo(now, on_the_verge);
        if self.queue.is_empty() && self.keep_alive_at().is_some_and(|due| due <= now) {
            return Some(self.send(now, self.silence.clone()));
        }
        match self.queue.pop_front_if(|(due, _)| *due <= now)? {
            (_, Planned::Mark(out)) => Some(out),
            (due, Planned::Frame(frame)) => Some(self.send(due, frame)),
        }
    }

    /// When [`poll`](Self::poll) has something to do, as far as it is known.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        if !self.open {
            return None;
        }
        let own = match &self.mode {
            Mode::Turn(turn) => match turn.phase {
                Phase::Waiting { until, .. } if self.queue.is_empty() => Some(until),
                _ => None,
            },
            Mode::Continuous(continuous) => continuous.marks.front().map(|(due, _)| *due),
        };
        let next = match self.queue.front() {
            Some((due, _)) => Some(*due),
            None => self.keep_alive_at(),
        };
        own.into_iter().chain(next).min()
    }

    fn keep_alive_at(&self) -> Option<Instant> {
        Some(self.last_sent? + KEEP_ALIVE)
    }

    fn start_echo(&mut self, now: Instant, on_the_verge: bool) {
        let Mode::Turn(turn) = &mut self.mode else {
            return;
        };
        let Phase::Waiting {
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
        if on_the_verge && !*postponed {
            *until = now + VERGE;
            *postponed = true;
            return;
        }
        let speech = *speech;
        turn.phase = Phase::Idle;
        turn.played += 1;
        let Some(first) = turn.recorded.front().filter(|_| speech > 0) else {
            return;
        };
        let first = first.time;
        let mut end = now;
        self.queue.push_back((now, Planned::Mark(Out::Started)));
        for recorded in turn.recorded.drain(..).take(speech) {
            let due = now + rtp::span(recorded.time - first);
            end = due + recorded.frame.duration();
            self.queue.push_back((due, Planned::Frame(recorded.frame)));
        }
        self.queue.push_back((end, Planned::Mark(Out::Ended)));
        turn.recorded.shrink_to(0);
        self.silence_from(end);
    }

    fn silence_from(&mut self, start: Instant) {
        let mut due = start;
        while due < start + TAIL {
            self.queue
                .push_back((due, Planned::Frame(self.silence.clone())));
            due += self.silence.duration();
        }
    }

    fn send(&mut self, due: Instant, frame: F) -> Out<F> {
        let resumes = self
            .last_sent
            .is_none_or(|last| due.saturating_duration_since(last) >= KEEP_ALIVE / 2);
        self.last_sent = Some(due);
        Out::Send {
            due,
            frame,
            resumes,
        }
    }
}

impl<F> Turn<F> {
    fn record(&mut self, frame: Recorded<F>) {
        if self.phase == Phase::Idle {
            let from = frame.time.saturating_sub(rtp::ticks(LEAD));
            self.recorded.retain(|it| it.time >= from);
        }
        let first = self.recorded.front().map_or(frame.time, |it| it.time);
        let full = self.recorded.len() >= MOST_FRAMES;
        if !full && frame.time - first < rtp::ticks(LONGEST) {
            self.recorded.push_back(frame);
        }
    }
}

impl<F> Continuous<F> {
    fn due(&mut self, delay: Duration, frame: &Recorded<F>) -> Instant {
        let by_arrival = frame.arrived + delay;
        if let Some((due, time)) = self.anchor {
            let by_pace = due + rtp::span(frame.time.saturating_sub(time));
            let drift = by_pace
                .saturating_duration_since(by_arrival)
                .max(by_arrival.saturating_duration_since(by_pace));
            if drift <= DRIFT {
                self.anchor = Some((by_pace, frame.time));
                return by_pace;
            }
        }
        self.anchor = Some((by_arrival, frame.time));
        by_arrival
    }

    /// Utterances are further apart than their end silence, so the marks in flight are few; a delay of hours would hold
    /// as many frames no more than [`MOST_FRAMES`], and its marks go the same way.
    fn mark(&mut self, due: Instant, out: Out<F>) {
        if self.marks.len() < MOST_FRAMES {
            self.marks.push_back((due, out));
        }
    }
}

#[cfg(test)]
mod tests;
