//! Decoded sound as the SDK gives and takes it: frames of 10 ms, mono, at the rate of Opus.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::audio::echo::Frame;
use crate::livekit::audio::rtp::{self, MediaPosition};

/// Samples a second; also the ticks of the media clock.
pub(crate) const RATE: u32 = rtp::CLOCK_RATE;

/// Samples of 10 ms, which is what libwebrtc works in.
const FRAME: usize = RATE as usize / 100;

/// The SDK's decoder goes on through losses and pauses of the sender; where nothing comes for so long, the track was another
/// or stood still.
const MAX_GAP: Duration = Duration::from_millis(100);

/// Mono samples.
impl Frame for Arc<[i16]> {
    fn silence() -> Self {
        Self::from([0; FRAME])
    }

    fn duration(&self) -> Duration {
        rtp::span(self.len() as u64)
    }
}

/// Lays frames out on one media clock.
#[derive(Default)]
pub(crate) struct FrameClock {
    /// When the last frame came, and the media time of its end.
    last: Option<(Instant, u64)>,
}

impl FrameClock {
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

    /// What comes back of an agent that speaks for a second from the third second on: in which 10 ms it was loud, and when
    /// the echo began and ended.
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
        let (mut loud, mut marks, mut all) = (Vec::new(), Vec::new(), Vec::new());
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
            for heard in detector.on_sound(now, sound) {
                all.push(heard);
                match heard {
                    SpeechEvent::Started(at) => echo.on_speech_started(at),
                    SpeechEvent::Ended(at) => echo.on_speech_ended(at),
                }
            }
            while let Some(out) = echo.poll(now, detector.speech_pending()) {
                match out {
                    EchoOutput::Send { frame, .. } if frame.iter().any(|it| *it != 0) => {
                        loud.push(tick)
                    }
                    EchoOutput::Send { .. } => {}
                    EchoOutput::Started => marks.push((tick, "started")),
                    EchoOutput::Ended => marks.push((tick, "ended")),
                }
            }
        }
        (loud, marks, all)
    }

    #[test]
    fn utterance_is_heard_and_played_once_at_its_pace() {
        let (loud, marks, heard) = echo_of_a_second(EchoMode::Turn);
        assert_eq!(heard.len(), 2, "{heard:?}");
        // Its last window began at tick 298. A second later it is played from 200 ms before it was found, at tick 205.
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
    fn clock_counts_samples_and_keeps_a_pause() {
        let start = Instant::now();
        let mut clock = FrameClock::default();
        assert!(!clock.on_frame(start, 480).follows);
        // Frames come in bursts, and are as long as they are.
        for (millis, time, follows) in [(0, 480, true), (25, 960, true), (1_025, 49_440, false)] {
            let at = start + Duration::from_millis(millis);
            assert_eq!(clock.on_frame(at, 480), MediaPosition { time, follows });
        }
    }

    #[test]
    fn silence_lasts_as_long_as_a_frame_of_the_sdk() {
        assert_eq!(Arc::<[i16]>::silence().duration(), TEN);
    }
}
