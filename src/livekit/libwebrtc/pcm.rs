//! Decoded audio in the form that the SDK uses: mono frames of 10 ms at the sampling rate of Opus.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::clip::SpeechClip;
use crate::livekit::audio::caller::Frame;
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

    fn of_clip(clip: &SpeechClip) -> Vec<Self> {
        clip.pcm.chunks(FRAME).map(Self::from).collect()
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
    use crate::config::{self, CallerMode, Speech};
    use crate::livekit::audio::caller::{AgentActivity, AgentFrame, CallerOutput, CallerPlayer};
    use crate::livekit::audio::speech::tests::greeting;
    use crate::livekit::audio::speech::{Detector, PcmChunk, SpeechEvent};

    const TEN: Duration = Duration::from_millis(10);

    /// The length of the agent's greeting in ticks of 10 ms.
    const GREETING: u64 = 252;

    /// Runs an agent that greets after two seconds. Returns the ticks of 10 ms in which the echo was loud, the ticks in
    /// which it started and ended, and the speech events with their ticks.
    fn echo_of_a_greeting(mode: CallerMode) -> (Vec<u64>, Vec<(u64, &'static str)>, Vec<u64>) {
        let start = Instant::now();
        let settings = config::Caller {
            mode,
            silence: TEN * 100,
            ..config::Caller::default()
        };
        let mut echo = CallerPlayer::<Arc<[i16]>>::new(settings, Duration::from_secs(30));
        let mut detector = Detector::new(Speech::default(), RATE);
        let mut clock = FrameClock::default();
        echo.open(start);
        let greeting = greeting();
        let mut frames = greeting.chunks(FRAME);
        let (mut loud, mut marks, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for tick in 0..1_200_u64 {
            let now = start + TEN * u32::try_from(tick).unwrap();
            let spoken = if tick < 200 { None } else { frames.next() };
            let pcm: Arc<[i16]> = spoken.unwrap_or(&[0; FRAME]).into();
            let position = clock.on_frame(now, pcm.len());
            let sound = PcmChunk {
                follows: position.follows,
                pcm: &pcm,
            };
            let heard = detector.on_sound(now, sound);
            echo.on_frame(AgentFrame {
                arrived: now,
                time: position.time,
                level: detector.last_level(),
                frame: Arc::clone(&pcm),
            });
            for event in heard {
                let at = match event {
                    SpeechEvent::Started(at) => {
                        echo.on_speech_started(at);
                        at
                    }
                    SpeechEvent::Ended(at) => {
                        echo.on_speech_ended(at);
                        at
                    }
                };
                events.push(u64::try_from((at - start).as_millis() / 10).unwrap());
            }
            let agent = AgentActivity {
                may_speak: detector.speech_pending(),
                ..AgentActivity::default()
            };
            while let Some(out) = echo.poll(now, agent) {
                match out {
                    CallerOutput::Send { frame, .. } if frame.iter().any(|it| it.abs() > 200) => {
                        loud.push(tick);
                    }
                    CallerOutput::Send { .. } => {}
                    CallerOutput::Started(_) => marks.push((tick, "started")),
                    CallerOutput::Ended => marks.push((tick, "ended")),
                }
            }
        }
        (loud, marks, events)
    }

    #[test]
    fn utterance_is_detected_and_played_once_at_its_pace() {
        let (loud, marks, events) = echo_of_a_greeting(CallerMode::Echo);
        let [started, ended] = events[..] else {
            panic!("{events:?}");
        };
        assert!(
            (200..202).contains(&started) && (200 + GREETING - 20..200 + GREETING).contains(&ended)
        );
        let [(echo, "started"), (over, "ended")] = marks[..] else {
            panic!("{marks:?}");
        };
        // The echo starts a second after the last speech, with the audio from 200 ms before the first.
        assert!((ended + 100..=ended + 101).contains(&echo), "{marks:?}");
        let shift = echo - (started - 20);
        // The pause between its sentences is shortened.
        assert!(
            (ended + shift - 60..=ended + shift + 2).contains(&over),
            "{over}"
        );
        // Both are rounded down to ticks.
        assert!(loud[0] + 1 >= started + shift, "{loud:?}");
        assert!(loud[loud.len() - 1] <= over, "{loud:?} {over}");
        assert!(loud.len() > 150, "{loud:?}");
    }

    #[test]
    fn pass_through_plays_every_frame_after_the_delay() {
        let (loud, marks, events) = echo_of_a_greeting(CallerMode::PassThrough);
        assert!(loud[0] >= 300 && loud[loud.len() - 1] < 300 + GREETING);
        assert!(loud.len() > 150, "{loud:?}");
        // The start is certain only after the delay of a mark may have begun.
        let expected = [(events[0] + 100, "started"), (events[1] + 100, "ended")];
        for (mark, expected) in marks.iter().zip(expected) {
            assert!(
                mark.0.abs_diff(expected.0) <= 1 && mark.1 == expected.1,
                "{marks:?}"
            );
        }
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
