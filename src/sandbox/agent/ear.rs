//! What the agent hears of its caller. The size of a frame tells whether it is speech.
//!
//! As in an `AgentSession`, the voice detector hears everything, and the transcription hears silence while the session
//! discards its input (`AgentActivity.push_audio` of livekit-agents 1.8.9).

use std::time::Duration;

use tokio::time::Instant;

use super::FRAME;

/// Frames above this size are speech: what a client sends in silence is 3 B (DTX) to 55 B (an encoder's start), and
/// speech at the usual bit rates is more.
pub(super) const SPEECH_BYTES: usize = 60;
/// Consecutive frames of speech that start an utterance.
const SPEECH_FRAMES: u32 = 3;
/// This long without speech, and the voice detector reports its end: the default of the session's own detector.
const VOICE_END: Duration = Duration::from_millis(250);

/// From the end of the caller's speech.
#[derive(Debug, Clone, Copy)]
pub(super) struct HearingDelays {
    pub(super) transcription: Duration,
    /// Includes the transcription.
    pub(super) end_of_turn: Duration,
}

/// An utterance of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Utterance {
    pub frames: u32,
    /// The arrival of its first frame.
    pub began: Instant,
    /// The end of its last frame.
    pub ended: Instant,
    /// It began while the agent itself spoke.
    pub over_agent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EarEvent {
    /// The caller speaks since this time.
    VoiceBegan(Instant),
    /// The caller has been silent since this time.
    VoiceEnded(Instant),
    /// The transcript of this number of frames is there, this long after their end.
    Transcribed {
        frames: u32,
        delay: Duration,
    },
    TurnOver(Utterance),
}

#[derive(Default)]
pub(super) struct CallerEar {
    /// Frames of speech in a row, before an utterance.
    run: Run,
    turn: Option<OpenTurn>,
}

#[derive(Default, Clone, Copy)]
struct Run {
    began: Option<Instant>,
    frames: u32,
    transcribed: u32,
}

struct OpenTurn {
    began: Instant,
    last: Instant,
    frames: u32,
    /// Those of the frames that reach the transcription.
    transcribed: u32,
    over_agent: bool,
    voice: Option<Voice>,
    has_transcript: bool,
}

/// Speech that goes on.
struct Voice {
    since: Instant,
    reported: bool,
}

impl CallerEar {
    /// A frame arrived, while the agent spoke or not, and reaches the transcription or not.
    pub(super) fn on_frame(
        &mut self,
        bytes: usize,
        over_agent: bool,
        transcribed: bool,
        now: Instant,
    ) {
        if bytes <= SPEECH_BYTES {
            self.run = Run::default();
            return;
        }
        if let Some(turn) = &mut self.turn {
            turn.last = now;
            turn.frames += 1;
            turn.transcribed += u32::from(transcribed);
            turn.voice.get_or_insert(Voice {
                since: now,
                reported: false,
            });
            return;
        }
        let began = *self.run.began.get_or_insert(now);
        self.run.frames += 1;
        self.run.transcribed += u32::from(transcribed);
        if self.run.frames == SPEECH_FRAMES {
            let run = std::mem::take(&mut self.run);
            self.turn = Some(OpenTurn {
                began,
                last: now,
                frames: run.frames,
                transcribed: run.transcribed,
                over_agent,
                voice: Some(Voice {
                    since: began,
                    reported: false,
                }),
                has_transcript: false,
            });
        }
    }

    pub(super) fn hears_voice(&self) -> bool {
        self.turn.as_ref().is_some_and(|turn| turn.voice.is_some())
    }

    /// Whether a turn of the caller is under way, or not yet over.
    pub(super) fn hears_turn(&self) -> bool {
        self.turn.is_some()
    }

    /// How long the caller has been speaking without a pause.
    pub(super) fn voice_duration(&self) -> Duration {
        let turn = self.turn.as_ref();
        let voice = turn.and_then(|turn| Some(turn.last + FRAME - turn.voice.as_ref()?.since));
        voice.unwrap_or_default()
    }

    /// When [`next`](Self::next) is due.
    pub(super) fn deadline(&self, delays: HearingDelays) -> Option<Instant> {
        let turn = self.turn.as_ref()?;
        let ended = turn.last + FRAME;
        let voice = turn.voice.as_ref().map(|voice| {
            if voice.reported {
                ended + VOICE_END
            } else {
                voice.since
            }
        });
        let transcript = turn
            .awaits_transcript()
            .then_some(ended + delays.transcription);
        let events = [voice, transcript, Some(ended + delays.end_of_turn)];
        events.into_iter().flatten().min()
    }

    /// The next event that is due.
    pub(super) fn next(&mut self, delays: HearingDelays, now: Instant) -> Option<EarEvent> {
        let turn = self.turn.as_mut()?;
        let ended = turn.last + FRAME;
        if let Some(voice) = &mut turn.voice {
            if !std::mem::replace(&mut voice.reported, true) {
                return Some(EarEvent::VoiceBegan(voice.since));
            }
            if now >= ended + VOICE_END {
                turn.voice = None;
                return Some(EarEvent::VoiceEnded(ended));
            }
        }
        if turn.awaits_transcript() && now >= ended + delays.transcription {
            turn.has_transcript = true;
            return Some(EarEvent::Transcribed {
                frames: turn.transcribed,
                delay: now - ended,
            });
        }
        if now < ended + delays.end_of_turn {
            return None;
        }
        let turn = self.turn.take()?;
        Some(EarEvent::TurnOver(Utterance {
            frames: turn.frames,
            began: turn.began,
            ended,
            over_agent: turn.over_agent,
        }))
    }
}

impl OpenTurn {
    fn awaits_transcript(&self) -> bool {
        !self.has_transcript && self.transcribed >= SPEECH_FRAMES
    }
}
