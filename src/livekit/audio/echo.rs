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
mod tests {
    use std::sync::Arc;

    use super::super::opus::SILENCE;
    use super::*;

    const SPEECH: u8 = 0x78;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn settings(mode: EchoMode, delay: u64) -> Settings {
        Settings {
            mode,
            delay: ms(delay),
            max_turns: 1,
        }
    }

    /// A call on a clock of its own: an agent that sends a packet every 20 ms, numbered in its payload.
    struct Call {
        echo: Echo<Arc<[u8]>>,
        start: Instant,
        now: Instant,
        number: u8,
        out: Vec<(u64, Out<Arc<[u8]>>)>,
    }

    impl Call {
        fn new(settings: Settings) -> Self {
            let start = Instant::now();
            let mut echo = Echo::new(settings);
            echo.open(start);
            Self {
                echo,
                start,
                now: start,
                number: 0,
                out: Vec::new(),
            }
        }

        /// Goes on to `until`, stopping at each deadline of the echo.
        fn run_to(&mut self, until: Instant) {
            loop {
                while let Some(out) = self.echo.poll(self.now, false) {
                    let at = self.now.duration_since(self.start).as_millis();
                    self.out.push((u64::try_from(at).unwrap(), out));
                }
                match self.echo.next_deadline().filter(|next| *next <= until) {
                    Some(next) => {
                        assert!(
                            next > self.now,
                            "a deadline that has passed is never left over"
                        );
                        self.now = next;
                    }
                    None => break,
                }
            }
            self.now = until;
        }

        fn wait(&mut self, millis: u64) {
            self.run_to(self.now + ms(millis));
        }

        /// `count` packets from now on; leaves the clock at the arrival of the last.
        fn packets(&mut self, count: u64) {
            for i in 0..count {
                if i > 0 {
                    self.wait(20);
                }
                let time = rtp::ticks(self.now.duration_since(self.start));
                self.echo
                    .on_frame(self.now, time, &Arc::from([SPEECH, self.number, 0, 0]));
                self.number = self.number.wrapping_add(1);
            }
        }

        /// An utterance of `count` packets, whose end is found 600 ms later while silence flows.
        fn utterance(&mut self, count: u64) {
            let first = self.now;
            self.packets(3);
            self.echo.on_speech_started(first);
            self.wait(20);
            self.packets(count - 3);
            let last = self.now;
            self.wait(20);
            self.packets(30);
            self.echo.on_speech_ended(last);
            self.run_to(self.now);
        }

        /// When each echoed packet of the agent went out, by its number.
        fn echoed(&self) -> Vec<(u64, u8)> {
            let mut echoed = Vec::new();
            for (at, out) in &self.out {
                if let Out::Send { frame, .. } = out
                    && frame[0] == SPEECH
                {
                    echoed.push((*at, frame[1]));
                }
            }
            echoed
        }

        fn marks(&self) -> Vec<(u64, Out<Arc<[u8]>>)> {
            let marks = self.out.iter();
            marks
                .filter(|(_, out)| !matches!(out, Out::Send { .. }))
                .cloned()
                .collect()
        }
    }

    #[test]
    fn turn_is_played_once_at_its_pace_and_then_there_is_silence() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.wait(1_000);
        call.utterance(50);
        call.wait(10_000);
        // Last speech at 1 980 ms, the echo 1 000 ms later.
        let expected: Vec<_> = (0..50).map(|i| (2_980 + 20 * u64::from(i), i)).collect();
        assert_eq!(call.echoed(), expected);
        assert_eq!(call.marks(), [(2_980, Out::Started), (3_980, Out::Ended)]);
        let sent = |(at, out): &&(u64, _)| *at > 3_960 && matches!(out, Out::Send { .. });
        let after: Vec<_> = call.out.iter().filter(sent).collect();
        let times: Vec<_> = after.iter().map(|(at, _)| *at).collect();
        let tail: Vec<_> = (0..10).map(|i| 3_980 + 20 * i).collect();
        assert_eq!(times[..10], tail);
        assert_eq!(times[10] - times[9], 400);
        for (_, out) in after {
            assert!(matches!(out, Out::Send { frame, .. } if **frame == SILENCE));
        }
    }

    #[test]
    fn what_came_shortly_before_the_speech_is_played_too() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.packets(50);
        call.wait(20);
        call.utterance(10);
        call.wait(5_000);
        let numbers: Vec<_> = call.echoed().iter().map(|(_, number)| *number).collect();
        let lead = u8::try_from(LEAD.as_millis() / 20).unwrap();
        assert_eq!(numbers.first(), Some(&(50 - lead + 2)));
        assert_eq!(numbers.last(), Some(&59));
    }

    #[test]
    fn second_sentence_before_the_echo_joins_the_first() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.utterance(50);
        call.wait(200);
        let second = call.now;
        call.utterance(50);
        let spoken_until = call.now;
        assert_eq!(
            call.marks(),
            [],
            "the echo never starts while the agent speaks"
        );
        call.wait(10_000);
        let echoed = call.echoed();
        assert_eq!(
            echoed.len(),
            50 + 30 + 50,
            "both sentences and the pause between them"
        );
        let started = call.marks()[0].0;
        assert!(u128::from(started) > spoken_until.duration_since(call.start).as_millis());
        assert!(u128::from(started) > second.duration_since(call.start).as_millis());
        assert_eq!(call.marks().len(), 2);
    }

    #[test]
    fn echo_waits_while_the_agent_may_just_have_begun() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.utterance(10);
        let due = call.start + ms(180 + 1_000);
        call.run_to(due - ms(1));
        while let Some(out) = call.echo.poll(due, true) {
            assert_ne!(out, Out::Started);
        }
        let postponed = call.echo.next_deadline().unwrap();
        assert_eq!(postponed, due + VERGE);
        assert_eq!(call.echo.poll(postponed, true), Some(Out::Started));
    }

    #[test]
    fn no_more_turns_than_the_setting_allows() {
        let mut call = Call::new(Settings {
            max_turns: 2,
            ..settings(EchoMode::Turn, 700)
        });
        for _ in 0..4 {
            call.utterance(10);
            call.wait(5_000);
        }
        assert_eq!(call.marks().len(), 4);
        assert_eq!(call.echoed().len(), 20);
    }

    #[test]
    fn utterance_during_playback_is_the_next_turn() {
        let mut call = Call::new(Settings {
            max_turns: 2,
            ..settings(EchoMode::Turn, 700)
        });
        call.utterance(50);
        call.wait(200);
        call.utterance(10);
        call.wait(10_000);
        let marks = call.marks();
        assert_eq!(marks.len(), 4);
        assert!(marks[2].0 > marks[1].0);
        assert_eq!(call.echoed().len(), 60);
    }

    #[test]
    fn recording_ends_after_thirty_seconds() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.utterance(2_000);
        call.wait(60_000);
        assert_eq!(call.echoed().len(), 1_500);
        assert_eq!(call.marks().len(), 2);
    }

    #[test]
    fn nothing_is_sent_before_the_track_is_open() {
        let mut echo = Echo::<Arc<[u8]>>::new(Settings::default());
        let now = Instant::now();
        assert_eq!(echo.next_deadline(), None);
        assert_eq!(echo.poll(now, false), None);
        echo.open(now);
        assert!(matches!(
            echo.poll(now, false),
            Some(Out::Send { resumes: true, .. })
        ));
    }

    #[test]
    fn idle_track_sends_a_frame_of_silence_every_400_ms() {
        let mut call = Call::new(settings(EchoMode::Turn, 1_000));
        call.wait(180);
        call.out.clear();
        call.wait(4_000);
        assert_eq!(call.out.len(), 10);
        for (_, out) in &call.out {
            assert!(matches!(out, Out::Send { resumes: true, .. }));
        }
    }

    #[test]
    fn continuous_echo_passes_every_packet_on_after_the_delay() {
        let mut call = Call::new(settings(EchoMode::Continuous, 2_000));
        call.wait(1_000);
        call.utterance(50);
        call.wait(10_000);
        let expected: Vec<_> = (0..80).map(|i| (3_000 + 20 * u64::from(i), i)).collect();
        assert_eq!(call.echoed(), expected);
        assert_eq!(call.marks(), [(3_000, Out::Started), (3_980, Out::Ended)]);
    }

    #[test]
    fn continuous_echo_keeps_the_pace_of_the_speaker_under_jitter() {
        let mut call = Call::new(settings(EchoMode::Continuous, 1_000));
        for i in 0..20_u64 {
            let late = if i % 2 == 1 { 15 } else { 0 };
            call.run_to(call.start + ms(20 * i + late));
            let payload = Arc::from([SPEECH, 0, 0, 0]);
            call.echo.on_frame(call.now, 960 * i, &payload);
        }
        call.wait(5_000);
        let times: Vec<_> = call.echoed().iter().map(|(at, _)| *at).collect();
        assert!(
            times.windows(2).all(|pair| pair[1] - pair[0] == 20),
            "{times:?}"
        );
    }
}
