use std::f64::consts::TAU;
use std::time::Duration;

use ropus::{Application, Channels, DecodeMode, Encoder};

use super::super::opus::{self, Codec};
use super::super::rtp::MediaPosition;
use super::*;

const FRAME: Duration = Duration::from_millis(20);

/// Sampling rate of the agent's audio in Hz.
const AGENT_RATE: usize = 48_000;

/// The greeting of the sandbox's agent: 2.5 s of speech at 48 kHz, which begin and end without silence.
pub(crate) fn greeting() -> Vec<i16> {
    let mut decoder = ropus::Decoder::new(48_000, Channels::Mono).unwrap();
    let mut rest = &include_bytes!("../../../sandbox/greeting.opusframes")[..];
    let mut pcm = Vec::new();
    while let [high, low, after @ ..] = rest {
        let (packet, after) = after.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        let mut frame = [0; 960];
        let mode = DecodeMode::Normal;
        let samples = decoder.decode(packet, &mut frame, mode).unwrap();
        pcm.extend(&frame[..samples]);
        rest = after;
    }
    pcm
}

/// Amplifies or attenuates the audio to this RMS level.
fn at_level(pcm: &[i16], dbfs: f64) -> Vec<i16> {
    let energy: f64 = pcm.iter().map(|it| f64::from(*it).powi(2)).sum();
    #[expect(clippy::cast_precision_loss, reason = "a clip is short")]
    let level = (energy / pcm.len() as f64).sqrt() / 32_768.0;
    let gain = 10_f64.powf(dbfs / 20.0) / level;
    let scaled = pcm.iter().map(|it| f64::from(*it) * gain);
    #[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
    scaled.map(|it| it as i16).collect()
}

/// Samples of a function of the time in seconds, -1 to 1.
fn sound(seconds: usize, mut wave: impl FnMut(f64) -> f64) -> Vec<i16> {
    let samples = 0..u32::try_from(seconds * AGENT_RATE).unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
    samples
        .map(|index| (wave(f64::from(index) / 48_000.0) * 32_767.0) as i16)
        .collect()
}

fn sine(frequency: f64, time: f64) -> f64 {
    (time * frequency * TAU).sin()
}

fn white_noise(seconds: usize, dbfs: f64) -> Vec<i16> {
    let mut random = fastrand::Rng::with_seed(7);
    let noise = sound(seconds, |_| random.f64() - 0.5);
    at_level(&noise, dbfs)
}

/// An agent's track: packets of a real Opus encoder at a simulated pace.
struct EncodedTrack {
    encoder: Encoder,
    samples: usize,
    now: Instant,
    time: u64,
    decoder: opus::Decoder,
    detector: Detector,
    events: Vec<SpeechEvent>,
}

impl EncodedTrack {
    fn new(millis: usize, settings: Speech) -> Self {
        let encoder = Encoder::builder(48_000, Channels::Mono, Application::Voip);
        let mut track = Self {
            encoder: encoder.build().unwrap(),
            samples: 48 * millis,
            now: Instant::now(),
            time: 0,
            decoder: opus::Decoder::default(),
            detector: Detector::new(settings, opus::RATE),
            events: Vec::new(),
        };
        track.pause(600);
        track
    }

    fn with_defaults() -> Self {
        Self::new(20, Speech::default())
    }

    fn encode(&mut self, pcm: &[i16]) -> Vec<u8> {
        let mut pcm = pcm.to_vec();
        pcm.resize(self.samples, 0);
        let mut packet = vec![0; 1500];
        let length = self.encoder.encode(&pcm, &mut packet).unwrap();
        packet.truncate(length);
        packet
    }

    /// Sends the audio; returns the arrival of its first packet.
    fn play(&mut self, pcm: &[i16]) -> Instant {
        let first = self.now;
        for pcm in pcm.chunks(self.samples) {
            let packet = self.encode(pcm);
            self.deliver(&packet, true);
        }
        first
    }

    /// Sends silence; returns the arrival of its first packet.
    fn pause(&mut self, millis: usize) -> Instant {
        self.play(&vec![0; 48 * millis])
    }

    fn deliver(&mut self, packet: &[u8], follows: bool) {
        let position = MediaPosition {
            time: self.time,
            follows,
        };
        let sound = self.decoder.decode(position, packet);
        self.events.extend(self.detector.on_sound(self.now, sound));
        self.skip();
    }

    fn skip(&mut self) {
        self.time += self.samples as u64;
        self.now += Duration::from_millis(self.samples as u64 / 48);
    }

    /// No more packets arrive.
    fn wait_for_deadlines(&mut self) {
        while let Some(deadline) = self.detector.next_deadline() {
            assert_eq!(self.detector.on_time(deadline - FRAME / 20), None);
            let event = self.detector.on_time(deadline);
            assert!(event.is_some(), "the deadline passed without an event");
            self.events.extend(event);
        }
    }

    /// The start and the end of the only utterance.
    fn utterance(&self) -> (Instant, Instant) {
        match self.events[..] {
            [SpeechEvent::Started(started), SpeechEvent::Ended(ended)] => (started, ended),
            _ => panic!("{:?}", self.events),
        }
    }
}

/// The time from `first` to `at`, which is not earlier, in milliseconds.
fn millis(first: Instant, at: Instant) -> u128 {
    assert!(at >= first, "{:?} too early", first - at);
    at.duration_since(first).as_millis()
}

#[test]
fn utterance_has_the_times_of_its_first_and_last_sound() {
    let mut track = EncodedTrack::with_defaults();
    let first = track.play(&greeting());
    let after = track.pause(1_000);
    let (started, ended) = track.utterance();
    assert!(millis(first, started) <= 20);
    assert!(millis(after - FRAME * 10, ended) <= 220);
}

#[test]
fn quiet_speech_is_heard_in_time_and_its_level_is_reported() {
    for level in [-20.0, -35.0, -51.0] {
        let mut track = EncodedTrack::with_defaults();
        let first = track.play(&at_level(&greeting(), level));
        track.pause(1_000);
        let (started, _) = track.utterance();
        assert!(millis(first, started) <= 60, "{level}");
        // The mean of the frames with a voice is higher than that of the whole clip.
        let measured = f64::from(track.detector.level().unwrap());
        assert!((level - 1.0..level + 4.0).contains(&measured), "{measured}");
    }
}

#[test]
fn sound_below_the_threshold_is_not_speech() {
    let mut track = EncodedTrack::with_defaults();
    track.play(&at_level(&greeting(), -75.0));
    assert_eq!(track.events, []);
    assert_eq!(track.detector.next_deadline(), None);
    assert_eq!(track.detector.level(), None);
}

#[test]
fn sound_without_a_voice_is_not_speech() {
    let gated = |time: f64, period: f64, on: f64| f64::from(u8::from(time % period < on));
    let decaying = |time: f64, period: f64| (-(time % period) / 0.006).exp();
    let mut random = fastrand::Rng::with_seed(7);
    let notes = [262.0, 330.0, 392.0, 523.0, 392.0, 330.0, 294.0, 349.0];
    let sounds = [
        ("noise of -20 dBFS", white_noise(10, -20.0)),
        ("noise of -38 dBFS", white_noise(10, -38.0)),
        ("noise of -50 dBFS", white_noise(10, -50.0)),
        ("tone", sound(10, |at| 0.5 * sine(440.0, at))),
        (
            "dial tone",
            sound(10, |at| 0.2 * (sine(350.0, at) + sine(440.0, at))),
        ),
        (
            "beeps",
            sound(10, |at| 0.5 * sine(1_000.0, at) * gated(at, 1.0, 0.3)),
        ),
        (
            "dialling",
            sound(10, |at| {
                0.3 * (sine(770.0, at) + sine(1_336.0, at)) * gated(at, 0.25, 0.12)
            }),
        ),
        (
            "clicks of 20 ms",
            sound(10, |at| 0.8 * sine(600.0, at) * gated(at, 1.0, 0.02)),
        ),
        (
            "typing",
            sound(10, |at| (random.f64() - 0.5) * decaying(at, 0.15)),
        ),
        (
            "melody",
            sound(10, |at| {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "short"
                )]
                let note = notes[(at / 0.4) as usize % notes.len()];
                let tone: f64 = (1..8)
                    .map(|n| sine(note * f64::from(n), at) / f64::from(n))
                    .sum();
                0.1 * tone * (-(at % 0.4) * 2.0).exp()
            }),
        ),
    ];
    for (name, pcm) in sounds {
        let mut track = EncodedTrack::with_defaults();
        track.play(&pcm);
        track.pause(1_000);
        track.wait_for_deadlines();
        assert_eq!(track.events, [], "{name}");
    }
}

#[test]
fn speech_over_noise_is_heard() {
    let mut track = EncodedTrack::with_defaults();
    let mut random = fastrand::Rng::with_seed(7);
    track.play(&white_noise(2, -45.0));
    assert_eq!(track.events, []);
    let speech = at_level(&greeting(), -20.0);
    // Noise of the same level.
    let speech = speech
        .into_iter()
        .map(|it| it.saturating_add(random.i16(-320..320)));
    let first = track.play(&speech.collect::<Vec<_>>());
    track.play(&white_noise(2, -45.0));
    let (started, _) = track.utterance();
    assert!(millis(first - FRAME, started) <= 120);
}

#[test]
fn soft_consonant_belongs_to_the_utterance() {
    let mut track = EncodedTrack::with_defaults();
    let consonant = &white_noise(1, -50.0)[..AGENT_RATE / 10];
    let first = track.play(&[consonant, &greeting()].concat());
    track.pause(1_000);
    let (started, _) = track.utterance();
    assert!(millis(first, started) <= 20);
}

#[test]
fn more_frames_than_a_word_has_are_not_reached() {
    let settings = Speech {
        min_frames: 25,
        ..Speech::default()
    };
    let word = &greeting()[..AGENT_RATE / 4];
    for (settings, events) in [(Speech::default(), 2), (settings, 0)] {
        let mut track = EncodedTrack::new(20, settings);
        track.play(word);
        track.pause(1_000);
        assert_eq!(track.events.len(), events);
    }
}

#[test]
fn utterance_ends_by_time_when_packets_stop() {
    let mut track = EncodedTrack::with_defaults();
    track.play(&greeting());
    let last = track.now - FRAME;
    track.wait_for_deadlines();
    let (_, ended) = track.utterance();
    assert!(millis(last - FRAME * 10, ended) <= 220);
    assert_eq!(track.detector.next_deadline(), None);
}

#[test]
fn word_is_heard_although_the_track_is_muted_within_it() {
    let speech = greeting();
    for packets in 10..40 {
        let mut track = EncodedTrack::with_defaults();
        let first = track.play(&speech[..packets * 960]);
        track.wait_for_deadlines();
        let (started, ended) = track.utterance();
        assert!(millis(first, started) <= 20 && started < ended, "{packets}");
    }
}

#[test]
fn pause_shorter_than_the_end_silence_does_not_end_the_utterance() {
    let mut track = EncodedTrack::with_defaults();
    let word = &greeting()[..AGENT_RATE / 2];
    track.play(word);
    track.pause(400);
    track.play(word);
    assert_eq!(track.events.len(), 1);
    track.wait_for_deadlines();
    assert_eq!(track.events.len(), 2);
}

#[test]
fn utterance_that_ended_between_two_polls_ends_before_the_next_starts() {
    let mut track = EncodedTrack::with_defaults();
    let word = &greeting()[..AGENT_RATE / 2];
    track.play(word);
    for _ in 0..50 {
        track.skip();
    }
    track.play(word);
    track.pause(300);
    assert!(matches!(
        track.events[..],
        [
            SpeechEvent::Started(_),
            SpeechEvent::Ended(_),
            SpeechEvent::Started(_)
        ]
    ));
}

#[test]
fn utterance_after_a_pause_without_packets_starts_with_its_own_sound() {
    let mut track = EncodedTrack::with_defaults();
    let speech = greeting();
    // Too short to be speech.
    track.play(&speech[..2 * 960]);
    for _ in 0..500 {
        track.skip();
    }
    assert_eq!(track.events, []);
    let first = track.play(&speech);
    track.pause(1_000);
    let (started, _) = track.utterance();
    assert!(millis(first, started) <= 60);
}

#[test]
fn every_packet_length_gives_the_same_start() {
    for length in [10, 20, 40, 60] {
        let mut track = EncodedTrack::new(length, Speech::default());
        let first = track.play(&greeting());
        track.pause(1_200);
        let (started, _) = track.utterance();
        assert!(millis(first, started) <= 20, "{length} ms");
    }
}

#[test]
fn speech_is_heard_in_spite_of_lost_packets_and_dtx() {
    for dtx in [false, true] {
        let mut track = EncodedTrack::with_defaults();
        let first = track.now;
        for (number, pcm) in greeting().chunks(960).enumerate() {
            let packet = track.encode(pcm);
            match number % 4 {
                1 if dtx => track.deliver(&[0x78, 0, 0], true),
                1 => track.skip(),
                2 => track.deliver(&packet, dtx),
                _ => track.deliver(&packet, true),
            }
        }
        track.pause(1_000);
        let (started, _) = track.utterance();
        assert!(millis(first, started) <= 60, "dtx: {dtx}");
    }
}

#[test]
fn audio_of_48_khz_gives_the_same_start() {
    let mut detector = Detector::new(Speech::default(), 48_000);
    let mut now = Instant::now();
    let mut events = Vec::new();
    let first = now + Duration::from_secs(1);
    let pcm = [vec![0; AGENT_RATE], greeting(), vec![0; AGENT_RATE]].concat();
    for pcm in pcm.chunks(480) {
        let follows = true;
        events.extend(detector.on_sound(now, PcmChunk { follows, pcm }));
        now += Duration::from_millis(10);
    }
    let [SpeechEvent::Started(started), SpeechEvent::Ended(_)] = events[..] else {
        panic!("{events:?}");
    };
    assert!(millis(first, started) <= 20);
}

#[test]
fn speech_is_detected_after_corrupt_payloads() {
    let mut track = EncodedTrack::with_defaults();
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..3_000 {
        let length = random.usize(0..200);
        let packet: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
            .take(length)
            .collect();
        track.deliver(&packet, true);
    }
    track.pause(2_000);
    track.wait_for_deadlines();
    track.events.clear();
    track.play(&greeting());
    assert!(matches!(track.events[..], [SpeechEvent::Started(_)]));
}

#[test]
fn sandbox_sounds_without_a_voice_are_not_speech() {
    let sounds = [
        (
            "clicks",
            &include_bytes!("../../../sandbox/clicks.opusframes")[..],
        ),
        ("music", include_bytes!("../../../sandbox/music.opusframes")),
        ("noise", include_bytes!("../../../sandbox/noise.opusframes")),
    ];
    for (name, frames) in sounds {
        let mut codec = Codec::default();
        let mut detector = Detector::new(Speech::default(), opus::RATE);
        let mut now = Instant::now();
        for _ in 0..10 {
            let mut rest = frames;
            while let [high, low, after @ ..] = rest {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                let (packet, after) = after.split_at(length);
                let mut pcm = [0; opus::MAX_PACKET_SAMPLES];
                let samples = codec.decode(packet, &mut pcm).unwrap();
                let pcm = &pcm[..samples];
                let follows = true;
                let events = detector.on_sound(now, PcmChunk { follows, pcm });
                assert_eq!(events.count(), 0, "{name}");
                now += FRAME;
                rest = after;
            }
        }
    }
}
