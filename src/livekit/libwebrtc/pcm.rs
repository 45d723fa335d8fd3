//! Decoded audio in the form that the SDK uses: mono frames of 10 ms at the sampling rate of Opus.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::audio::echo::Frame;
use crate::livekit::audio::rtp::{self, MediaPosition};

/// Sampling rate in Hz; also the rate of the media clock.
pub(crate) const RATE: u32 = rtp::CLOCK_RATE;

/// Samples per frame of 10 ms, the unit of libwebrtc.
const FRAME: usize = RATE as usize / 100;

/// The longest gap between two frames of one stretch of audio. The SDK's decoder fills losses and pauses of the sender,
/// so a longer gap means that the track changed or that the SDK delivered nothing.
const MAX_GAP: Duration = Duration::from_millis(100);

/// The samples of one frame.
impl Frame for Arc<[i16]> {
    fn silence() -> Self {
        Self::from([0; FRAME])
    }

    fn duration(&self) -> Duration {
        rtp::span(self.len() as u64)
    }
}

/// Places frames on one media clock.
#[derive(Default)]
pub(crate) struct FrameClock {
    /// The arrival of the last frame and the media time of its end.
    last: Option<(Instant, u64)>,
}

impl FrameClock {
    /// Returns the position of a frame of `samples` samples. A pause advances the clock by the time that it lasted.
    pub(crate) fn on_frame(&mut self, at: Instant, samples: usize) -> MediaPosition {
        let position = match self.last {
            None => MediaPosition {
                time: 0,
                follows: false,
            },
            Some((before, end)) => {
                let since = at.saturating_duration_since(before);
                let follows = since <= MAX_GAP;
                let pause = if follows { 0 } else { rtp::ticks(since) };
                MediaPosition {
                    time: end + pause,
                    follows,
                }
            }
        };
        self.last = Some((at, position.time + samples as u64));
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, EchoMode, Speech};
    use crate::livekit::audio::echo::{EchoOutput, EchoPlayer};
    use crate::livekit::audio::speech::{Detector, PcmChunk, SpeechEvent};

    const TEN: Duration = Duration::from_millis(10);

    /// 10 ms of a tone, or of silence.
    fn frame(amplitude: f64) -> Arc<[i16]> {
        let sample = |i: u32| {
            let cycle = f64::from(i % 120) / 120.0;
            let sample = (cycle * std::f64::consts::TAU).sin() * amplitude;
            #[expect(clippy::cast_possible_truncation, reason = "amplitudes here fit")]
            let sample = sample as i16;
            sample
        };
        (0..480).map(sample).collect()
    }

    /// Runs an agent that speaks during the third second. Returns the ticks of 10 ms in which the echo was loud, the
    /// ticks in which it started and ended, and the speech events.
    fn echo_of_a_second(mode: EchoMode) -> (Vec<u64>, Vec<(u64, &'static str)>, Vec<SpeechEvent>) {
        let start = Instant::now();
        let settings = config::Echo {
            mode,
            ..config::Echo::default()
        };
        let mut echo = EchoPlayer::<Arc<[i16]>>::new(settings);
        let mut detector = Detector::new(Speech::default(), RATE);
        let mut clock = FrameClock::default();
        echo.open(start);
        let (mut loud, mut marks, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for tick in 0..800_u64 {
            let now = start + TEN * u32::try_from(tick).unwrap();
            let pcm = frame(if (200..300).contains(&tick) {
                8_000.0
            } else {
                0.0
            });
            let position = clock.on_frame(now, pcm.len());
            echo.on_frame(now, position.time, &pcm);
            let sound = PcmChunk {
                follows: position.follows,
                pcm: &pcm,
            };
            for event in detector.on_sound(now, sound) {
                events.push(event);
                match event {
                    SpeechEvent::Started(at) => echo.on_speech_started(at),
                    SpeechEvent::Ended(at) => echo.on_speech_ended(at),
                }
            }
            while let Some(out) = echo.poll(now, detector.speech_pending()) {
                match out {
                    EchoOutput::Send { frame, .. } if frame.iter().any(|it| *it != 0) => {
                        loud.push(tick);
                    }
                    EchoOutput::Send { .. } => {}
                    EchoOutput::Started => marks.push((tick, "started")),
                    EchoOutput::Ended => marks.push((tick, "ended")),
                }
            }
        }
        (loud, marks, events)
    }

    #[test]
    fn utterance_is_detected_and_played_once_at_its_pace() {
        let (loud, marks, events) = echo_of_a_second(EchoMode::Turn);
        assert_eq!(events.len(), 2, "{events:?}");
        // Its last window starts at tick 298, and the echo starts a second later. Its detection at tick 205 minus 200
        // ms is the first frame that is played.
        let first = 398 + (200 - 185);
        assert_eq!(loud, (first..first + 99).collect::<Vec<_>>());
        assert_eq!(marks, [(398, "started"), (first + 99, "ended")]);
    }

    #[test]
    fn pass_through_plays_every_frame_after_the_delay() {
        let (loud, marks, _) = echo_of_a_second(EchoMode::Continuous);
        assert_eq!(loud, (300..400).collect::<Vec<_>>());
        assert_eq!(marks, [(300, "started"), (398, "ended")]);
    }

    #[test]
    fn clock_counts_samples_and_includes_pauses() {
        let start = Instant::now();
        let mut clock = FrameClock::default();
        assert!(!clock.on_frame(start, 480).follows);
        // Frames may arrive in bursts. Their length counts, not their arrival.
        for (millis, time, follows) in [(0, 480, true), (25, 960, true), (1_025, 49_440, false)] {
            let at = start + Duration::from_millis(millis);
            assert_eq!(clock.on_frame(at, 480), MediaPosition { time, follows });
        }
    }
}
