use std::sync::Arc;

use super::super::opus::SILENCE;
use super::*;

const SPEECH: u8 = 0x78;
/// Levels of a frame of speech and of one of a pause, in dBFS.
const LOUD: f32 = -20.0;
const QUIET: f32 = -80.0;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn settings(mode: CallerMode, delay: u64) -> CallerSettings {
    CallerSettings {
        mode,
        delay: ms(delay),
        max_turns: 1,
    }
}

/// A call on a simulated clock: an agent that sends a packet every 20 ms, with a number in its payload.
struct SimulatedCall {
    echo: CallerPlayer<Arc<[u8]>>,
    start: Instant,
    now: Instant,
    number: u8,
    agent: AgentActivity,
    out: Vec<(u64, CallerOutput<Arc<[u8]>>)>,
}

impl SimulatedCall {
    fn new(settings: CallerSettings) -> Self {
        let start = Instant::now();
        let mut echo = CallerPlayer::new(settings);
        echo.open(start);
        Self {
            echo,
            start,
            now: start,
            number: 0,
            agent: AgentActivity::default(),
            out: Vec::new(),
        }
    }

    /// Advances the clock to `until` and stops at each deadline of the echo.
    fn run_to(&mut self, until: Instant) {
        loop {
            while let Some(out) = self.echo.poll(self.now, self.agent) {
                let at = self.now.duration_since(self.start).as_millis();
                self.out.push((u64::try_from(at).unwrap(), out));
            }
            match self.echo.next_deadline().filter(|next| *next <= until) {
                Some(next) => {
                    assert!(
                        next > self.now,
                        "a deadline that has passed remains after polling"
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

    /// Sends `count` packets from now on; leaves the clock at the arrival of the last.
    fn packets(&mut self, count: u64, level: f32) {
        for i in 0..count {
            if i > 0 {
                self.wait(20);
            }
            self.echo.on_frame(AgentFrame {
                arrived: self.now,
                time: rtp::ticks(self.now.duration_since(self.start)),
                level,
                frame: Arc::from([SPEECH, self.number, 0, 0]),
            });
            self.number = self.number.wrapping_add(1);
        }
    }

    /// Sends an utterance of `count` packets. Its end is detected 600 ms later, while packets of silence arrive.
    fn utterance(&mut self, count: u64) {
        let first = self.now;
        self.packets(3, LOUD);
        self.echo.on_speech_started(first);
        self.wait(20);
        self.packets(count - 3, LOUD);
        let last = self.now;
        self.wait(20);
        self.packets(30, QUIET);
        self.echo.on_speech_ended(last);
        self.run_to(self.now);
    }

    /// The time in milliseconds and the number of each echoed packet.
    fn echoed(&self) -> Vec<(u64, u8)> {
        let mut echoed = Vec::new();
        for (at, out) in &self.out {
            if let CallerOutput::Send { frame, .. } = out
                && frame[0] == SPEECH
            {
                echoed.push((*at, frame[1]));
            }
        }
        echoed
    }

    fn marks(&self) -> Vec<(u64, CallerOutput<Arc<[u8]>>)> {
        let marks = self.out.iter();
        marks
            .filter(|(_, out)| !matches!(out, CallerOutput::Send { .. }))
            .cloned()
            .collect()
    }
}

#[test]
fn turn_is_played_once_at_its_pace_and_silence_follows() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.wait(1_000);
    call.utterance(50);
    call.wait(10_000);
    // The last speech is at 1980 ms, the echo starts 1000 ms later.
    let expected: Vec<_> = (0..50).map(|i| (2_980 + 20 * u64::from(i), i)).collect();
    assert_eq!(call.echoed(), expected);
    assert_eq!(
        call.marks(),
        [(2_980, CallerOutput::Started), (3_980, CallerOutput::Ended)]
    );
    let sent = |(at, out): &&(u64, _)| *at > 3_960 && matches!(out, CallerOutput::Send { .. });
    let after: Vec<_> = call.out.iter().filter(sent).collect();
    let times: Vec<_> = after.iter().map(|(at, _)| *at).collect();
    let tail: Vec<_> = (0..10).map(|i| 3_980 + 20 * i).collect();
    assert_eq!(times[..10], tail);
    assert_eq!(times[10] - times[9], 400);
    for (_, out) in after {
        assert!(matches!(out, CallerOutput::Send { frame, .. } if **frame == SILENCE));
    }
}

#[test]
fn audio_shortly_before_the_detected_speech_is_played_too() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.packets(50, QUIET);
    call.wait(20);
    call.utterance(10);
    call.wait(5_000);
    let numbers: Vec<_> = call.echoed().iter().map(|(_, number)| *number).collect();
    let lead = u8::try_from(LEAD_IN.as_millis() / 20).unwrap();
    assert_eq!(numbers.first(), Some(&(50 - lead)));
    assert_eq!(numbers.last(), Some(&59));
}

#[test]
fn second_sentence_before_the_echo_joins_the_first() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.utterance(50);
    call.wait(200);
    let second = call.now;
    call.utterance(50);
    let spoken_until = call.now;
    assert_eq!(call.marks(), [], "the echo started while the agent spoke");
    call.wait(10_000);
    let echoed = call.echoed();
    // Three frames of the pause are left. No frame came directly before the second sentence.
    assert_eq!(echoed.len(), 50 + 3 + 50);
    let started = call.marks()[0].0;
    assert!(u128::from(started) > spoken_until.duration_since(call.start).as_millis());
    assert!(u128::from(started) > second.duration_since(call.start).as_millis());
    assert_eq!(call.marks().len(), 2);
}

#[test]
fn echo_waits_while_speech_of_the_agent_is_pending() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.utterance(10);
    let due = call.start + ms(180 + 1_000);
    call.run_to(due - ms(1));
    call.agent.may_speak = true;
    let latest = due + speech::MAX_DECISION_TIME;
    let mut now = due;
    while now < latest {
        while let Some(out) = call.echo.poll(now, call.agent) {
            assert_ne!(out, CallerOutput::Started);
        }
        now += SPEECH_CHECK_INTERVAL;
    }
    // What is pending for longer is not speech.
    let mut outputs = std::iter::from_fn(|| call.echo.poll(latest, call.agent));
    assert!(outputs.any(|out| out == CallerOutput::Started));
}

#[test]
fn echo_starts_soon_after_the_sound_turned_out_not_to_be_speech() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.utterance(10);
    let due = call.start + ms(180 + 1_000);
    call.run_to(due - ms(1));
    call.agent.may_speak = true;
    while let Some(out) = call.echo.poll(due, call.agent) {
        assert_ne!(out, CallerOutput::Started);
    }
    let postponed = call.echo.next_deadline().unwrap();
    assert_eq!(postponed, due + SPEECH_CHECK_INTERVAL);
    call.agent.may_speak = false;
    let started = call.echo.poll(postponed, call.agent);
    assert_eq!(started, Some(CallerOutput::Started));
}

#[test]
fn echo_waits_until_the_agents_session_listens() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.agent.is_busy = true;
    call.utterance(10);
    call.wait(5_000);
    assert_eq!(call.marks(), []);
    call.agent.is_busy = false;
    call.wait(1_000);
    // The end of the speech, 600 ms of silence, and 5 s.
    let listens = 180 + 600 + 5_000;
    let started = call.marks()[0].0;
    assert!((listens..=listens + 100).contains(&started), "{started}");
}

#[test]
fn session_that_never_reports_that_it_listens_delays_the_echo_for_at_most_30_s() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.agent.is_busy = true;
    call.utterance(10);
    call.wait(60_000);
    assert_eq!(call.marks()[0], (180 + 30_000, CallerOutput::Started));
}

/// The endpointing of livekit-agents takes 500 ms of silence for the end of the caller's turn.
#[test]
fn pause_in_the_echo_is_at_most_200_ms_long_and_all_speech_is_there() {
    for (pause, sends_packets) in [(300, true), (1_500, true), (1_500, false)] {
        let mut call = SimulatedCall::new(settings(CallerMode::Echo, 2_000));
        let first = call.now;
        call.packets(50, LOUD);
        call.echo.on_speech_started(first);
        call.wait(20);
        if sends_packets {
            call.packets(pause / 20 - 1, QUIET);
            call.wait(20);
        } else {
            call.wait(pause);
        }
        let second = call.number;
        call.packets(50, LOUD);
        call.echo.on_speech_ended(call.now);
        call.wait(10_000);
        let echoed = call.echoed();
        let speech = echoed
            .iter()
            .filter(|(_, number)| *number < 50 || *number >= second);
        assert_eq!(speech.count(), 100);
        let at = |wanted: u8| {
            let mut echoed = echoed.iter();
            echoed.find(|(_, number)| *number == wanted).unwrap().0
        };
        let silence = at(second) - at(49) - 20;
        assert!((40..=200).contains(&silence), "{pause}: {silence} ms");
    }
}

#[test]
fn echo_plays_no_more_turns_than_the_setting() {
    let mut call = SimulatedCall::new(CallerSettings {
        max_turns: 2,
        ..settings(CallerMode::Echo, 700)
    });
    for _ in 0..4 {
        call.utterance(10);
        call.wait(5_000);
    }
    assert_eq!(call.marks().len(), 4);
    assert_eq!(call.echoed().len(), 20);
}

#[test]
fn utterance_during_playback_is_played_as_the_next_turn() {
    let mut call = SimulatedCall::new(CallerSettings {
        max_turns: 2,
        ..settings(CallerMode::Echo, 700)
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
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.utterance(2_000);
    call.wait(60_000);
    assert_eq!(call.echoed().len(), 1_500);
    assert_eq!(call.marks().len(), 2);
}

#[test]
fn echo_sends_nothing_before_the_track_is_open() {
    let mut echo = CallerPlayer::<Arc<[u8]>>::new(CallerSettings::default());
    let now = Instant::now();
    assert_eq!(echo.next_deadline(), None);
    assert_eq!(echo.poll(now, AgentActivity::default()), None);
    echo.open(now);
    assert!(matches!(
        echo.poll(now, AgentActivity::default()),
        Some(CallerOutput::Send { resumes: true, .. })
    ));
}

#[test]
fn idle_track_sends_a_frame_of_silence_every_400_ms() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.wait(180);
    call.out.clear();
    call.wait(4_000);
    assert_eq!(call.out.len(), 10);
    for (_, out) in &call.out {
        assert!(matches!(out, CallerOutput::Send { resumes: true, .. }));
    }
}

#[test]
fn continuous_echo_plays_every_packet_after_the_delay() {
    let mut call = SimulatedCall::new(settings(CallerMode::PassThrough, 2_000));
    call.wait(1_000);
    call.utterance(50);
    call.wait(10_000);
    let expected: Vec<_> = (0..80).map(|i| (3_000 + 20 * u64::from(i), i)).collect();
    assert_eq!(call.echoed(), expected);
    assert_eq!(
        call.marks(),
        [(3_000, CallerOutput::Started), (3_980, CallerOutput::Ended)]
    );
}

#[test]
fn continuous_echo_keeps_the_agents_pace_under_jitter() {
    let mut call = SimulatedCall::new(settings(CallerMode::PassThrough, 1_000));
    for i in 0..20_u64 {
        let late = if i % 2 == 1 { 15 } else { 0 };
        call.run_to(call.start + ms(20 * i + late));
        call.echo.on_frame(AgentFrame {
            arrived: call.now,
            time: 960 * i,
            level: LOUD,
            frame: Arc::from([SPEECH, 0, 0, 0]),
        });
    }
    call.wait(5_000);
    let times: Vec<_> = call.echoed().iter().map(|(at, _)| *at).collect();
    assert!(
        times.windows(2).all(|pair| pair[1] - pair[0] == 20),
        "{times:?}"
    );
}
