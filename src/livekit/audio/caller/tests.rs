use std::sync::Arc;

use super::super::opus::{OpusFrame, SILENCE};
use super::*;
use crate::config::CallerLine;

const SPEECH: u8 = 0x78;
const AGENT_TURN: Duration = Duration::from_secs(30);
/// Levels of a frame of speech and of one of a pause, in dBFS.
const LOUD: f32 = -20.0;
const QUIET: f32 = -80.0;

fn frame<const N: usize>(payload: [u8; N]) -> OpusFrame {
    OpusFrame {
        payload: Arc::from(payload),
        peak: 0,
    }
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn settings(mode: CallerMode, silence: u64) -> CallerSettings {
    CallerSettings {
        mode,
        silence: ms(silence),
        ..CallerSettings::default()
    }
}

/// A script of lines with 20, 40, … packets of 20 ms; the payload names the line.
fn script(lines: u8, silence: u64) -> CallerSettings {
    let line = |number: u8| CallerLine {
        name: format!("line {number}"),
        audio: Arc::new(SpeechClip {
            packets: vec![Arc::from([SPEECH, 100 + number, 0, 0]); 20 * usize::from(number + 1)],
            pcm: Vec::new(),
        }),
        text: None,
        expected_words: Vec::new(),
        expected_tool: None,
    };
    CallerSettings {
        turns: lines.into(),
        lines: (0..lines).map(line).collect(),
        ..settings(CallerMode::Script, silence)
    }
}

const STARTED: CallerOutput<OpusFrame> = CallerOutput::Started(CallerTurn {
    line: None,
    interrupts: false,
});

fn started(line: usize) -> CallerOutput<OpusFrame> {
    CallerOutput::Started(CallerTurn {
        line: Some(line),
        interrupts: false,
    })
}

const INTERRUPTS: CallerOutput<OpusFrame> = CallerOutput::Started(CallerTurn {
    line: None,
    interrupts: true,
});

/// A call on a simulated clock: an agent that sends a packet every 20 ms, with a number in its payload.
struct SimulatedCall {
    echo: CallerPlayer<OpusFrame>,
    start: Instant,
    now: Instant,
    number: u8,
    agent: AgentActivity,
    out: Vec<(u64, CallerOutput<OpusFrame>)>,
}

impl SimulatedCall {
    fn new(settings: CallerSettings) -> Self {
        let start = Instant::now();
        let mut echo = CallerPlayer::new(settings, AGENT_TURN);
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
                frame: frame([SPEECH, self.number, 0, 0]),
            });
            self.number = self.number.wrapping_add(1);
            if level == LOUD && self.agent.last_speech.is_some() {
                self.agent.last_speech = Some(self.now);
            }
        }
    }

    /// Sends an utterance of `count` packets. Its end is detected 600 ms later, while packets of silence arrive.
    fn utterance(&mut self, count: u64) {
        let first = self.now;
        self.packets(3, LOUD);
        self.echo.on_speech_started(first);
        self.agent.last_speech = Some(self.now);
        self.wait(20);
        self.packets(count - 3, LOUD);
        let last = self.now;
        self.wait(20);
        self.packets(30, QUIET);
        self.agent.last_speech = None;
        self.echo.on_speech_ended(last);
        self.run_to(self.now);
    }

    /// The times in milliseconds at which the caller began to speak and ended.
    fn turns(&self) -> Vec<(u64, u64)> {
        let marks = self.marks();
        marks.chunks(2).map(|pair| (pair[0].0, pair[1].0)).collect()
    }

    /// The time in milliseconds and the number of each echoed packet.
    fn echoed(&self) -> Vec<(u64, u8)> {
        let mut echoed = Vec::new();
        for (at, out) in &self.out {
            if let CallerOutput::Send { frame, .. } = out
                && frame.payload[0] == SPEECH
            {
                echoed.push((*at, frame.payload[1]));
            }
        }
        echoed
    }

    fn marks(&self) -> Vec<(u64, CallerOutput<OpusFrame>)> {
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
        [(2_980, STARTED), (3_980, CallerOutput::Ended)]
    );
    let sent = |(at, out): &&(u64, _)| *at > 3_960 && matches!(out, CallerOutput::Send { .. });
    let after: Vec<_> = call.out.iter().filter(sent).collect();
    let times: Vec<_> = after.iter().map(|(at, _)| *at).collect();
    let tail: Vec<_> = (0..10).map(|i| 3_980 + 20 * i).collect();
    assert_eq!(times[..10], tail);
    assert_eq!(times[10] - times[9], 400);
    for (_, out) in after {
        assert!(matches!(out, CallerOutput::Send { frame, .. } if *frame.payload == SILENCE));
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
            assert_ne!(out, STARTED);
        }
        now += SPEECH_CHECK_INTERVAL;
    }
    // What is pending for longer is not speech.
    let mut outputs = std::iter::from_fn(|| call.echo.poll(latest, call.agent));
    assert!(outputs.any(|out| out == STARTED));
}

#[test]
fn echo_starts_soon_after_the_sound_turned_out_not_to_be_speech() {
    let mut call = SimulatedCall::new(settings(CallerMode::Echo, 1_000));
    call.utterance(10);
    let due = call.start + ms(180 + 1_000);
    call.run_to(due - ms(1));
    call.agent.may_speak = true;
    while let Some(out) = call.echo.poll(due, call.agent) {
        assert_ne!(out, STARTED);
    }
    let postponed = call.echo.next_deadline().unwrap();
    assert_eq!(postponed, due + SPEECH_CHECK_INTERVAL);
    call.agent.may_speak = false;
    let started = call.echo.poll(postponed, call.agent);
    assert_eq!(started, Some(STARTED));
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
    assert_eq!(call.marks()[0], (180 + 30_000, STARTED));
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
        turns: 2,
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
        turns: 2,
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
    let mut echo = CallerPlayer::<OpusFrame>::new(CallerSettings::default(), AGENT_TURN);
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
        [(3_000, STARTED), (3_980, CallerOutput::Ended)]
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
            frame: frame([SPEECH, 0, 0, 0]),
        });
    }
    call.wait(5_000);
    let times: Vec<_> = call.echoed().iter().map(|(at, _)| *at).collect();
    assert!(
        times.windows(2).all(|pair| pair[1] - pair[0] == 20),
        "{times:?}"
    );
}

#[test]
fn script_says_one_line_after_each_speech_of_the_agent_and_repeats_from_the_first() {
    let mut call = SimulatedCall::new(CallerSettings {
        turns: 3,
        ..script(2, 1_000)
    });
    for _ in 0..5 {
        call.utterance(50);
        call.wait(4_000);
    }
    let marks = call.marks();
    let expected = [
        // The agent's last packet arrives 980 ms after the start of its utterance, which takes 1580 ms.
        (1_980, started(0)),
        (2_380, CallerOutput::Ended),
        (7_560, started(1)),
        (8_360, CallerOutput::Ended),
        (13_140, started(0)),
        (13_540, CallerOutput::Ended),
    ];
    assert_eq!(marks, expected);
    let said: Vec<u8> = call.echoed().iter().map(|(_, line)| *line).collect();
    let expected = [[100].repeat(20), [101].repeat(40), [100].repeat(20)].concat();
    assert_eq!(said, expected, "the agent's own speech is not played");
}

#[test]
fn agent_that_does_not_reply_gets_no_further_turn() {
    for settings in [
        script(3, 1_000),
        CallerSettings {
            turns: 3,
            ..settings(CallerMode::Echo, 1_000)
        },
    ] {
        let mut call = SimulatedCall::new(settings);
        call.utterance(50);
        call.wait(120_000);
        assert_eq!(call.marks().len(), 2);
    }
}

#[test]
fn turn_never_comes_before_the_end_of_the_agents_first_speech() {
    let mut call = SimulatedCall::new(script(1, 1_000));
    call.agent.subscribed_since = Some(call.start);
    call.agent.listening_since = Some(call.start);
    call.wait(60_000);
    assert_eq!(call.marks(), []);
    call.echo.on_speech_started(call.now);
    call.wait(60_000);
    assert_eq!(call.marks(), []);
}

#[test]
fn pause_counts_from_the_end_of_the_agents_last_speech_and_not_before_the_first_turn() {
    let mut call = SimulatedCall::new(CallerSettings {
        pause: ms(20_000),
        ..script(2, 1_000)
    });
    call.utterance(50);
    call.wait(4_000);
    let reply = u64::try_from(call.now.duration_since(call.start).as_millis()).unwrap();
    call.utterance(50);
    let silent_from = call.out.len();
    call.wait(30_000);
    assert_eq!(
        call.turns(),
        [(1_980, 2_380), (reply + 980 + 20_000, reply + 980 + 20_800)]
    );
    let sent = call.out[silent_from..].iter();
    let sent: Vec<u64> = sent.map(|(at, _)| *at).collect();
    let gaps = sent.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.max() <= Some(400), "the track is kept alive");
}

/// The agent may not have finished, so what it says after the pause comes first.
#[test]
fn agent_that_speaks_again_in_the_pause_restarts_it() {
    let mut call = SimulatedCall::new(CallerSettings {
        pause: ms(5_000),
        ..script(2, 1_000)
    });
    call.utterance(50);
    call.wait(4_000);
    call.utterance(50);
    call.wait(3_000);
    call.utterance(50);
    let spoken_until = call.now - ms(600);
    call.wait(10_000);
    let second = call.turns()[1].0;
    let expected = (spoken_until - call.start + ms(5_000)).as_millis();
    assert_eq!(u128::from(second), expected);
}

#[test]
fn caller_that_speaks_first_begins_1_s_after_the_session_listens() {
    let mut call = SimulatedCall::new(CallerSettings {
        speaks_first: true,
        ..script(2, 3_000)
    });
    call.wait(1_000);
    call.agent.subscribed_since = Some(call.now);
    call.agent.is_busy = true;
    call.wait(6_000);
    assert_eq!(call.marks(), []);
    call.agent.is_busy = false;
    call.agent.listening_since = Some(call.now);
    call.wait(2_000);
    assert_eq!(call.turns(), [(8_000, 8_400)]);
    // The second line waits for the agent's speech, as ever.
    call.wait(30_000);
    assert_eq!(call.turns().len(), 1);
    call.utterance(50);
    call.wait(10_000);
    assert_eq!(call.marks()[2].1, started(1));
}

#[test]
fn caller_that_speaks_first_waits_for_the_silence_of_an_agent_without_states() {
    let mut call = SimulatedCall::new(CallerSettings {
        speaks_first: true,
        ..script(1, 3_000)
    });
    call.wait(10_000);
    assert_eq!(call.marks(), [], "no agent is there");
    call.agent.subscribed_since = Some(call.now);
    call.wait(10_000);
    assert_eq!(call.turns(), [(13_000, 13_400)]);
}

#[test]
fn caller_that_speaks_first_waits_for_a_busy_agent_at_most_one_turn_of_it() {
    let mut call = SimulatedCall::new(CallerSettings {
        speaks_first: true,
        ..script(1, 3_000)
    });
    call.agent.subscribed_since = Some(call.now);
    call.agent.is_busy = true;
    call.wait(60_000);
    assert_eq!(call.turns(), [(30_000, 30_400)]);
}

#[test]
fn agent_that_speaks_before_the_caller_that_would_speak_first_is_heard_out() {
    let mut call = SimulatedCall::new(CallerSettings {
        speaks_first: true,
        ..script(1, 3_000)
    });
    call.agent.subscribed_since = Some(call.now);
    call.wait(2_000);
    call.utterance(100);
    call.wait(10_000);
    // Its last packet arrives at 3980 ms.
    assert_eq!(call.turns(), [(6_980, 7_380)]);
}

fn interrupting(settings: CallerSettings) -> CallerSettings {
    CallerSettings {
        interrupt: true,
        ..settings
    }
}

/// The length of the built-in question in milliseconds.
fn question() -> u64 {
    u64::try_from(SpeechClip::hello().duration().as_millis()).unwrap()
}

#[test]
fn first_reply_is_interrupted_once_after_1_s() {
    for settings in [settings(CallerMode::Echo, 1_000), script(1, 1_000)] {
        let mut call = SimulatedCall::new(interrupting(settings));
        call.utterance(150);
        call.wait(5_000);
        let reply = u64::try_from(call.now.duration_since(call.start).as_millis()).unwrap();
        call.utterance(150);
        call.wait(5_000);
        call.utterance(150);
        call.wait(10_000);
        let marks = call.marks();
        assert_eq!(marks.len(), 4, "{marks:?}");
        assert_eq!(marks[2], (reply + 1_000, INTERRUPTS));
        assert_eq!(marks[3], (reply + 1_000 + question(), CallerOutput::Ended));
    }
}

#[test]
fn reply_in_the_warm_up_of_the_session_is_interrupted_after_it() {
    let mut call = SimulatedCall::new(interrupting(CallerSettings {
        speaks_first: true,
        ..script(1, 1_000)
    }));
    call.agent.subscribed_since = Some(call.now);
    call.wait(2_000);
    // The agent's first speech is its reply.
    call.utterance(250);
    call.wait(10_000);
    let marks = call.marks();
    assert_eq!(marks[2], (2_000 + 3_500, INTERRUPTS));
}

#[test]
fn reply_of_less_than_1_s_is_not_interrupted_and_the_next_one_is() {
    let mut call = SimulatedCall::new(interrupting(script(2, 1_000)));
    call.utterance(150);
    call.wait(5_000);
    // The end of this reply is not certain yet when a second has passed.
    call.utterance(40);
    call.wait(5_000);
    assert_eq!(call.marks().len(), 4);
    let reply = u64::try_from(call.now.duration_since(call.start).as_millis()).unwrap();
    call.utterance(150);
    call.wait(10_000);
    assert_eq!(call.marks()[4], (reply + 1_000, INTERRUPTS));
}

#[test]
fn greeting_is_not_interrupted() {
    let mut call = SimulatedCall::new(interrupting(script(1, 1_000)));
    call.utterance(500);
    call.wait(10_000);
    assert_eq!(call.marks().len(), 2);
    assert_eq!(call.marks()[0].1, started(0));
}

#[test]
fn turn_after_an_interruption_waits_for_what_the_agent_says_then() {
    let mut call = SimulatedCall::new(interrupting(script(2, 1_000)));
    call.utterance(150);
    call.wait(5_000);
    // It is interrupted and stops half a second later.
    call.utterance(75);
    call.wait(20_000);
    assert_eq!(call.marks().len(), 4);
    assert_eq!(call.marks()[2].1, INTERRUPTS);
    call.utterance(100);
    call.wait(10_000);
    assert_eq!(call.marks()[4].1, started(1));
    assert_eq!(call.marks().len(), 6);
}

#[test]
fn next_turn_follows_an_agent_that_does_not_yield() {
    let mut call = SimulatedCall::new(interrupting(script(2, 1_000)));
    call.utterance(150);
    call.wait(5_000);
    // It speaks on for ten seconds, whatever the caller says meanwhile.
    call.utterance(500);
    call.wait(5_000);
    let marks = call.marks();
    assert_eq!(marks[2].1, INTERRUPTS);
    assert_eq!(marks[4].1, started(1));
    assert_eq!(marks.len(), 6);
}

#[test]
fn echo_after_an_interruption_plays_only_what_the_agent_said_after_it() {
    let mut call = SimulatedCall::new(interrupting(CallerSettings {
        turns: 2,
        ..settings(CallerMode::Echo, 1_000)
    }));
    call.utterance(150);
    call.wait(5_000);
    call.utterance(75);
    call.wait(5_000);
    let first = call.number;
    let before = call.out.len();
    call.utterance(100);
    call.wait(10_000);
    call.out.drain(..before);
    let echoed: Vec<u8> = call.echoed().iter().map(|(_, number)| *number).collect();
    let expected: Vec<u8> = (0..100).map(|number| first.wrapping_add(number)).collect();
    assert_eq!(echoed, expected);
}
