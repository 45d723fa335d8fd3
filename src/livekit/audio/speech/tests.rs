use std::time::Duration;

use ropus::{Application, Channels, Encoder};

use super::super::opus::{self, Decoder};
use super::super::rtp::MediaPosition;
use super::*;

const FRAME: Duration = Duration::from_millis(20);

/// An agent's track: packets of a real Opus encoder at a simulated pace.
struct EncodedTrack {
    encoder: Encoder,
    samples: usize,
    phase: usize,
    now: Instant,
    time: u64,
    decoder: Decoder,
    detector: Detector,
    events: Vec<SpeechEvent>,
}

impl EncodedTrack {
    fn new(millis: usize, settings: Speech) -> Self {
        let encoder = Encoder::builder(48_000, Channels::Mono, Application::Voip);
        Self {
            encoder: encoder.build().unwrap(),
            samples: 48 * millis,
            phase: 0,
            now: Instant::now(),
            time: 0,
            decoder: Decoder::default(),
            detector: Detector::new(settings, opus::RATE),
            events: Vec::new(),
        }
    }

    fn encode(&mut self, amplitude: f64) -> Vec<u8> {
        let pcm: Vec<i16> = (self.phase..self.phase + self.samples)
            .map(|i| {
                let cycle = f64::from(u16::try_from(i * 11 % 1_200).unwrap()) / 1_200.0;
                let sample = (cycle * std::f64::consts::TAU).sin() * amplitude;
                #[expect(clippy::cast_possible_truncation, reason = "amplitudes here fit")]
                let sample = sample as i16;
                sample
            })
            .collect();
        self.phase += self.samples;
        let mut packet = vec![0; 1500];
        let length = self.encoder.encode(&pcm, &mut packet).unwrap();
        packet.truncate(length);
        packet
    }

    /// Sends `count` packets; returns the arrival of the first.
    fn send(&mut self, count: usize, amplitude: f64) -> Instant {
        let first = self.now;
        for _ in 0..count {
            let packet = self.encode(amplitude);
            self.deliver(&packet, true);
        }
        first
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

    fn wait_for_deadline(&mut self) {
        if let Some(deadline) = self.detector.next_deadline() {
            assert_eq!(self.detector.on_time(deadline - FRAME / 20), None);
            self.events.extend(self.detector.on_time(deadline));
        }
    }
}

const LOUD: f64 = 8_000.0;
const QUIET: f64 = 60.0;

#[test]
fn utterance_has_the_times_of_its_first_and_last_frame() {
    let mut track = EncodedTrack::new(20, Speech::default());
    track.send(25, 0.0);
    let first = track.send(50, LOUD);
    // The Opus decoder overlaps a frame with the start of the next one.
    let after = track.send(60, 0.0);
    let [SpeechEvent::Started(started), SpeechEvent::Ended(ended)] = track.events[..] else {
        panic!("{:?}", track.events);
    };
    assert_eq!(started, first);
    assert!(ended >= after - FRAME && ended <= after + FRAME);
}

#[test]
fn sound_below_the_threshold_is_not_speech() {
    let mut track = EncodedTrack::new(20, Speech::default());
    track.send(100, QUIET);
    assert_eq!(track.events, []);
    assert_eq!(track.detector.next_deadline(), None);
}

#[test]
fn two_loud_frames_are_not_speech() {
    let settings = Speech {
        min_frames: 4,
        ..Speech::default()
    };
    let mut track = EncodedTrack::new(20, settings);
    for _ in 0..10 {
        track.send(2, LOUD);
        track.send(5, 0.0);
    }
    assert_eq!(track.events, []);
}

#[test]
fn utterance_ends_by_time_when_packets_stop() {
    let mut track = EncodedTrack::new(20, Speech::default());
    track.send(10, LOUD);
    let last = track.now - FRAME;
    track.wait_for_deadline();
    assert_eq!(track.events.last(), Some(&SpeechEvent::Ended(last)));
    assert_eq!(track.detector.next_deadline(), None);
}

#[test]
fn pause_shorter_than_the_end_silence_does_not_end_the_utterance() {
    let mut track = EncodedTrack::new(20, Speech::default());
    track.send(10, LOUD);
    track.send(25, 0.0);
    track.send(10, LOUD);
    assert_eq!(track.events.len(), 1);
    track.wait_for_deadline();
    assert_eq!(track.events.len(), 2);
}

#[test]
fn utterance_that_ended_between_two_polls_ends_before_the_next_starts() {
    let mut track = EncodedTrack::new(20, Speech::default());
    track.send(10, LOUD);
    for _ in 0..50 {
        track.skip();
    }
    track.send(10, LOUD);
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
fn every_packet_length_is_split_into_windows_of_20_ms() {
    for millis in [10, 20, 40, 60] {
        let mut track = EncodedTrack::new(millis, Speech::default());
        track.send(600 / millis, 0.0);
        let first = track.send(600 / millis, LOUD);
        assert_eq!(track.events, [SpeechEvent::Started(first)], "{millis} ms");
    }
}

#[test]
fn lost_packet_and_dtx_interrupt_consecutive_windows() {
    for dtx in [false, true] {
        let mut track = EncodedTrack::new(20, Speech::default());
        for _ in 0..10 {
            let packet = track.encode(LOUD);
            if dtx {
                track.deliver(&[0x78, 0, 0], true);
            } else {
                track.skip();
            }
            track.deliver(&packet, dtx);
            let packet = track.encode(LOUD);
            track.deliver(&packet, true);
        }
        assert_eq!(track.events, [], "dtx: {dtx}");
    }
}

#[test]
fn pause_in_media_time_interrupts_consecutive_windows() {
    let mut track = EncodedTrack::new(20, Speech::default());
    for _ in 0..5 {
        track.send(2, LOUD);
        track.skip();
    }
    assert_eq!(track.events, []);
}

#[test]
fn speech_is_detected_after_corrupt_payloads() {
    let mut track = EncodedTrack::new(20, Speech::default());
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..3_000 {
        let length = random.usize(0..200);
        let packet: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
            .take(length)
            .collect();
        track.deliver(&packet, true);
    }
    track.wait_for_deadline();
    track.events.clear();
    track.send(40, 0.0);
    track.wait_for_deadline();
    track.events.clear();
    track.send(10, LOUD);
    assert!(matches!(track.events[..], [SpeechEvent::Started(_)]));
}
