//! Hears speech in decoded sound, and says when an utterance began and ended. A plain state machine; it reads no clock and
//! knows no codec.
//!
//! Nothing on the wire says it as well: payload sizes mislead (silence at start-up is as long as speech), the server
//! forwards no audio levels, and its speaker updates come half a second late.

use tokio::time::Instant;

use crate::config::Speech;

/// Windows a second: each of 20 ms is judged.
pub(crate) const WINDOWS: u32 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An utterance began; stamped at the arrival of its first frame.
    Started(Instant),
    /// It ended; stamped at the arrival of its last speech frame.
    Ended(Instant),
}

/// Sound that came at one time, mono; empty where what came carries none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sound<'a> {
    /// It goes on where the sound before it ended.
    pub(crate) follows: bool,
    pub(crate) pcm: &'a [i16],
}

/// Tells speech from silence in one track.
pub(crate) struct Detector {
    settings: Speech,
    /// Sum of squares above which a window is speech.
    threshold: f64,
    /// Samples of the window that is judged.
    window_size: usize,
    window: Window,
    /// Consecutive windows of speech before an utterance counts, and the arrival of the first.
    run: Option<(u32, Instant)>,
    /// Arrival of the last speech frame; there is one while an utterance lasts.
    last_speech: Option<Instant>,
}

/// The 20 ms of sound being collected.
#[derive(Default)]
struct Window {
    samples: usize,
    energy: f64,
    began: Option<Instant>,
}

impl Detector {
    /// `rate`: samples a second of the sound.
    pub(crate) fn new(settings: Speech, rate: u32) -> Self {
        let level = 10_f64.powf(f64::from(settings.threshold_dbfs) / 20.0) * 32_768.0;
        let window_size = rate / WINDOWS;
        Self {
            settings,
            threshold: level * level * f64::from(window_size),
            window_size: window_size as usize,
            window: Window::default(),
            run: None,
            last_speech: None,
        }
    }

    pub(crate) fn on_sound(
        &mut self,
        at: Instant,
        sound: Sound<'_>,
    ) -> impl Iterator<Item = Heard> + use<> {
        let ended = self.on_time(at);
        // What was lost or not sent isn't speech, so what is consecutive starts anew.
        if !sound.follows {
            self.window = Window::default();
            self.run = None;
        }
        let mut started = None;
        let mut rest = sound.pcm;
        while !rest.is_empty() {
            let taken = rest.len().min(self.window_size - self.window.samples);
            let (part, after) = rest.split_at(taken);
            rest = after;
            let began = *self.window.began.get_or_insert(at);
            self.window.samples += taken;
            self.window.energy += energy(part);
            if self.window.samples == self.window_size {
                let speech = self.window.energy > self.threshold;
                self.window = Window::default();
                started = started.or(self.judge(began, speech));
            }
        }
        [ended, started].into_iter().flatten()
    }

    /// The end of an utterance is also a matter of time: a muted track and a killed agent send nothing.
    pub(crate) fn on_time(&mut self, now: Instant) -> Option<Heard> {
        let last = self.last_speech?;
        (now >= last + self.settings.end_silence).then(|| {
            self.last_speech = None;
            self.run = None;
            Heard::Ended(last)
        })
    }

    /// The native participant needs none: it asks each time it has listened.
    #[cfg(any(test, feature = "libwebrtc"))]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        Some(self.last_speech? + self.settings.end_silence)
    }

    /// The last frames may be the start of an utterance that isn't one yet.
    pub(crate) fn on_the_verge(&self) -> bool {
        self.last_speech.is_none() && self.run.is_some()
    }

    fn judge(&mut self, at: Instant, speech: bool) -> Option<Heard> {
        if !speech {
            self.run = None;
            return None;
        }
        if self.last_speech.is_some() {
            self.last_speech = Some(at);
            return None;
        }
        let (frames, first) = self.run.unwrap_or((0, at));
        if frames + 1 < self.settings.min_frames {
            self.run = Some((frames + 1, first));
            return None;
        }
        self.run = None;
        self.last_speech = Some(at);
        Some(Heard::Started(first))
    }
}

fn energy(pcm: &[i16]) -> f64 {
    pcm.iter().map(|&sample| f64::from(sample).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ropus::{Application, Channels, Encoder};

    use super::super::opus::{self, Decoder};
    use super::super::rtp::Position;
    use super::*;

    const FRAME: Duration = Duration::from_millis(20);

    /// A track, encoded for real, one packet after the other.
    struct Track {
        encoder: Encoder,
        samples: usize,
        phase: usize,
        now: Instant,
        time: u64,
        decoder: Decoder,
        detector: Detector,
        heard: Vec<Heard>,
    }

    impl Track {
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
                heard: Vec::new(),
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

        /// Sends `count` packets; says when the first arrived.
        fn send(&mut self, count: usize, amplitude: f64) -> Instant {
            let first = self.now;
            for _ in 0..count {
                let packet = self.encode(amplitude);
                self.deliver(&packet, true);
            }
            first
        }

        fn deliver(&mut self, packet: &[u8], follows: bool) {
            let position = Position {
                time: self.time,
                follows,
            };
            let sound = self.decoder.decode(position, packet);
            self.heard.extend(self.detector.on_sound(self.now, sound));
            self.skip();
        }

        fn skip(&mut self) {
            self.time += self.samples as u64;
            self.now += Duration::from_millis(self.samples as u64 / 48);
        }

        fn wait_for_deadline(&mut self) {
            if let Some(deadline) = self.detector.next_deadline() {
                assert_eq!(self.detector.on_time(deadline - FRAME / 20), None);
                self.heard.extend(self.detector.on_time(deadline));
            }
        }
    }

    const LOUD: f64 = 8_000.0;
    const QUIET: f64 = 60.0;

    #[test]
    fn utterance_is_stamped_at_its_first_and_last_frame() {
        let mut track = Track::new(20, Speech::default());
        track.send(25, 0.0);
        let first = track.send(50, LOUD);
        // Opus spreads its last frame a little into the next packet.
        let after = track.send(60, 0.0);
        let [Heard::Started(started), Heard::Ended(ended)] = track.heard[..] else {
            panic!("{:?}", track.heard);
        };
        assert_eq!(started, first);
        assert!(ended >= after - FRAME && ended <= after + FRAME);
    }

    #[test]
    fn sound_below_the_threshold_is_not_speech() {
        let mut track = Track::new(20, Speech::default());
        track.send(100, QUIET);
        assert_eq!(track.heard, []);
        assert_eq!(track.detector.next_deadline(), None);
    }

    #[test]
    fn two_loud_frames_are_a_click_and_not_speech() {
        let settings = Speech {
            min_frames: 4,
            ..Speech::default()
        };
        let mut track = Track::new(20, settings);
        for _ in 0..10 {
            track.send(2, LOUD);
            track.send(5, 0.0);
        }
        assert_eq!(track.heard, []);
    }

    #[test]
    fn utterance_ends_by_time_when_packets_stop() {
        let mut track = Track::new(20, Speech::default());
        track.send(10, LOUD);
        let last = track.now - FRAME;
        track.wait_for_deadline();
        assert_eq!(track.heard.last(), Some(&Heard::Ended(last)));
        assert_eq!(track.detector.next_deadline(), None);
    }

    #[test]
    fn pause_shorter_than_the_end_silence_is_within_one_utterance() {
        let mut track = Track::new(20, Speech::default());
        track.send(10, LOUD);
        track.send(25, 0.0);
        track.send(10, LOUD);
        assert_eq!(track.heard.len(), 1);
        track.wait_for_deadline();
        assert_eq!(track.heard.len(), 2);
    }

    #[test]
    fn speech_after_an_end_that_no_timer_saw_is_two_utterances() {
        let mut track = Track::new(20, Speech::default());
        track.send(10, LOUD);
        for _ in 0..50 {
            track.skip();
        }
        track.send(10, LOUD);
        assert!(matches!(
            track.heard[..],
            [Heard::Started(_), Heard::Ended(_), Heard::Started(_)]
        ));
    }

    #[test]
    fn every_packet_length_is_judged_in_windows_of_20_ms() {
        for millis in [10, 20, 40, 60] {
            let mut track = Track::new(millis, Speech::default());
            track.send(600 / millis, 0.0);
            let first = track.send(600 / millis, LOUD);
            assert_eq!(track.heard, [Heard::Started(first)], "{millis} ms");
        }
    }

    #[test]
    fn lost_packet_and_dtx_break_what_is_consecutive() {
        for dtx in [false, true] {
            let mut track = Track::new(20, Speech::default());
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
            assert_eq!(track.heard, [], "dtx: {dtx}");
        }
    }

    #[test]
    fn pause_in_media_time_breaks_what_is_consecutive() {
        let mut track = Track::new(20, Speech::default());
        for _ in 0..5 {
            track.send(2, LOUD);
            track.skip();
        }
        assert_eq!(track.heard, []);
    }

    #[test]
    fn corrupt_payloads_neither_panic_nor_deafen() {
        let mut track = Track::new(20, Speech::default());
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..3_000 {
            let length = random.usize(0..200);
            let packet: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
                .take(length)
                .collect();
            track.deliver(&packet, true);
        }
        track.wait_for_deadline();
        track.heard.clear();
        track.send(40, 0.0);
        track.wait_for_deadline();
        track.heard.clear();
        track.send(10, LOUD);
        assert!(matches!(track.heard[..], [Heard::Started(_)]));
    }
}
