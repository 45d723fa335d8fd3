//! Detects speech in decoded audio and reports when an utterance starts and ends.
//!
//! A state machine that reads no clock and knows no codec. It works on samples because no other source is accurate: a
//! packet of start-up silence is as large as one of speech, the server forwards no audio levels to subscribers, and its
//! speaker updates are half a second late (measured on livekit-server 1.13.5).
//!
//! `voice` judges each frame. A voice alone is not enough, because music and hum resemble one. What sets speech apart is
//! its rhythm (`rhythm`), so an utterance is certain only after its level has dropped once: in 95 % of 184 recorded and
//! synthesised utterances, 0.1 to 0.6 s after its start. The reported times are those of the sound, however late the
//! decision.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use self::decimator::Decimator;
use self::rhythm::Candidate;
use self::voice::{FRAME_SAMPLES, FrameKind, JudgedFrame, RATE, SUBFRAMES, VoiceModel, dbfs};
use crate::config::Speech;

mod decimator;
mod rhythm;
mod voice;

/// Frames in which voice is counted, half a second: one bit each.
const WINDOW: u32 = u32::BITS;

/// After this many frames without a voice (0.2 s), the next voice is a new candidate.
const CANDIDATE_PAUSE: u32 = 12;

/// Soft sound directly after the last frame of voice belongs to the utterance for at most this many frames (150 ms).
const TAIL_FRAMES: u32 = 9;

/// During an utterance, this many frames (130 ms) after one with a voice are not judged: most of them have a voice, too, and
/// judging is most of the cost. It must be less than [`TAIL_FRAMES`].
const RESTING_FRAMES: u32 = 8;

/// A candidate is certain if no audio follows it for this long: a muted track sends none.
const MUTE_AFTER: Duration = Duration::from_millis(200);

/// Subframes before the first frame of voice in which an utterance may start (150 ms): soft consonants are no voice yet.
const LOOK_BACK: usize = 38;
/// Subframes before the look-back in which the level of the background is measured (300 ms).
const BACKGROUND: usize = 75;
/// This many subframes of silence (20 ms) end the look-back.
const LOOK_BACK_GAP: usize = 5;

/// The first sound of an utterance is at least this many dB above the background.
const ONSET_ABOVE_BACKGROUND: f32 = 10.0;
/// It is louder than this, in dBFS.
const MIN_ONSET_LEVEL: f32 = -75.0;
/// It is at most this many dB below the first frame of voice.
const ONSET_BELOW_VOICE: f32 = 50.0;

/// The longest time from the start of an utterance to the event that reports it, unless it is mixed with other sound.
pub(crate) const MAX_DECISION_TIME: Duration = Duration::from_millis(1_200);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpeechEvent {
    /// An utterance started; the time is that of its first sound.
    Started(Instant),
    /// The utterance ended; the time is that of its last frame of speech.
    Ended(Instant),
}

/// The decoded mono samples of one packet or frame; empty if it carries no sound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PcmChunk<'a> {
    /// Nothing is missing between this chunk and the previous one.
    pub(crate) follows: bool,
    pub(crate) pcm: &'a [i16],
}

/// Detects the speech of one track.
pub(crate) struct Detector {
    settings: Speech,
    /// Samples per second of the audio.
    rate: u32,
    decimator: Decimator,
    frame: PartialFrame,
    model: VoiceModel,
    /// The last frames: their times and levels, and in the masks, with the newest in the lowest bit, whether they have a
    /// voice or are tones.
    recent: Recent,
    voiced: u32,
    tonal: u32,
    /// The last subframes.
    steps: Recent,
    /// When the last audio arrived.
    heard: Option<Instant>,
    candidate: Option<Candidate>,
    utterance: Option<Utterance>,
    level: LevelMeter,
}

/// The frame that is being collected, at the rate of the model.
struct PartialFrame {
    pcm: [i16; FRAME_SAMPLES],
    length: usize,
    /// The time of each subframe's first sample.
    times: [Option<Instant>; SUBFRAMES],
}

impl Default for PartialFrame {
    fn default() -> Self {
        Self {
            pcm: [0; FRAME_SAMPLES],
            length: 0,
            times: [None; SUBFRAMES],
        }
    }
}

struct Utterance {
    /// The time of its last frame of speech.
    last: Instant,
    /// Frames since the last one with a voice, if no silence was between.
    tail: Option<u32>,
    /// Frames that are not judged from now on.
    resting: u32,
}

/// Times and levels in dBFS.
struct Recent {
    entries: VecDeque<(Instant, f32)>,
    most: usize,
}

/// The mean level of frames.
#[derive(Debug, Clone, Copy, Default)]
struct LevelMeter {
    power: f64,
    frames: u32,
}

impl Detector {
    /// `rate`: sampling rate of the audio in Hz, a multiple of 16,000.
    pub(crate) fn new(settings: Speech, rate: u32) -> Self {
        Self {
            rate,
            decimator: Decimator::new(rate / RATE),
            frame: PartialFrame::default(),
            model: VoiceModel::new(settings.threshold_dbfs),
            recent: Recent::new(WINDOW as usize),
            voiced: 0,
            tonal: 0,
            steps: Recent::new(SUBFRAMES + LOOK_BACK + BACKGROUND),
            heard: None,
            candidate: None,
            utterance: None,
            level: LevelMeter::default(),
            settings,
        }
    }

    /// Takes the audio that arrived at `at`; returns the starts and ends of utterances in their order.
    pub(crate) fn on_sound(
        &mut self,
        at: Instant,
        sound: PcmChunk<'_>,
    ) -> impl Iterator<Item = SpeechEvent> + use<> {
        // After a pause, both the start of an utterance and its end may be due.
        let earlier = [self.on_time(at), self.on_time(at)];
        if self.heard.is_some_and(|heard| at >= heard + MUTE_AFTER) {
            self.forget();
        }
        if !sound.pcm.is_empty() {
            self.heard = Some(at);
        }
        if !sound.follows {
            self.frame = PartialFrame::default();
            self.decimator.reset();
        }
        let mut started = None;
        for (sample, index) in sound.pcm.iter().zip(0..) {
            let Some(sample) = self.decimator.push(*sample) else {
                continue;
            };
            let frame = &mut self.frame;
            if frame.length.is_multiple_of(FRAME_SAMPLES / SUBFRAMES) {
                let into = Duration::from_secs(1) * index / self.rate;
                frame.times[frame.length / (FRAME_SAMPLES / SUBFRAMES)] = Some(at + into);
            }
            frame.pcm[frame.length] = sample;
            frame.length += 1;
            if frame.length == FRAME_SAMPLES {
                let frame = std::mem::take(&mut self.frame);
                started = started.or(self.on_frame(at, &frame));
            }
        }
        earlier.into_iter().chain([started]).flatten()
    }

    /// The time of the last frame of speech so far, during an utterance.
    pub(crate) fn last_speech(&self) -> Option<Instant> {
        self.utterance.as_ref().map(|utterance| utterance.last)
    }

    /// Returns the start of an utterance after which the audio stopped, or the end of an utterance after the end silence.
    ///
    /// Packets alone cannot show them: a muted track and a killed agent send none.
    pub(crate) fn on_time(&mut self, now: Instant) -> Option<SpeechEvent> {
        if self.mute_deadline().is_some_and(|due| now >= due) {
            let candidate = self.candidate.take()?;
            return Some(self.start(&candidate));
        }
        let last = self.utterance.as_ref()?.last;
        (now >= last + self.settings.end_silence).then(|| {
            self.utterance = None;
            self.voiced = 0;
            self.tonal = 0;
            SpeechEvent::Ended(last)
        })
    }

    /// When [`on_time`](Self::on_time) returns an event if no more audio arrives. The native engine needs no deadline: it
    /// calls `on_time` after each read.
    #[cfg(any(test, feature = "libwebrtc"))]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let end = |utterance: &Utterance| utterance.last + self.settings.end_silence;
        self.mute_deadline().or(self.utterance.as_ref().map(end))
    }

    /// Whether the last frames had a voice that may turn out to be speech.
    pub(crate) fn speech_pending(&self) -> bool {
        let candidate = self.candidate.as_ref();
        candidate.is_some_and(|candidate| !candidate.is_steady())
    }

    /// The level of the last frame in dBFS.
    pub(crate) fn last_level(&self) -> f32 {
        let last = self.recent.entries.back();
        last.map_or(f32::NEG_INFINITY, |(_, level)| *level)
    }

    /// The level of all speech so far: the RMS of its frames with a voice, in dBFS.
    pub(crate) fn level(&self) -> Option<f32> {
        self.level.dbfs()
    }

    fn mute_deadline(&self) -> Option<Instant> {
        let candidate = self.candidate.as_ref()?;
        let certain = self.has_enough_voice() && !candidate.is_steady();
        Some(self.heard.filter(|_| certain)? + MUTE_AFTER)
    }

    /// `at`: the arrival of the frame's end.
    fn on_frame(&mut self, at: Instant, frame: &PartialFrame) -> Option<SpeechEvent> {
        let judged = match &mut self.utterance {
            Some(utterance) if utterance.resting > 0 => {
                utterance.resting -= 1;
                self.model.skip(&frame.pcm)
            }
            _ => self.model.judge(&frame.pcm),
        };
        let time = frame.times[0].unwrap_or(at);
        self.recent.push(time, judged.level);
        for (time, level) in frame.times.iter().zip(judged.levels) {
            self.steps.push(time.unwrap_or(at), level);
        }
        let voice = judged.kind == FrameKind::Voice;
        self.voiced = (self.voiced << 1) | u32::from(voice);
        self.tonal = (self.tonal << 1) | u32::from(judged.kind == FrameKind::Tone);
        if let Some(utterance) = &mut self.utterance {
            utterance.on_frame(time, judged);
            if voice {
                self.level.add(judged.level);
            }
            return None;
        }
        let new = |it: &Candidate| voice && it.pause >= CANDIDATE_PAUSE;
        if self.voiced == 0 || self.candidate.as_ref().is_some_and(new) {
            self.candidate = None;
        }
        if voice && self.candidate.is_none() {
            self.candidate = Some(Candidate::new(self.onset(judged.level)));
        }
        // The frames since the first voice of the window.
        let window = WINDOW - self.voiced.leading_zeros();
        let candidate = self.candidate.as_mut()?;
        let loudest = self.recent.loudest(window);
        candidate.on_frame(judged.level, loudest, voice);
        if !candidate.has_rhythm(window) || !self.has_enough_voice() {
            return None;
        }
        let mut candidate = self.candidate.take()?;
        if candidate.is_steady() {
            // The start of speech over music is unknown; it has been going on for this window at least.
            candidate.onset = self.recent.time(window - 1).unwrap_or(time);
        }
        Some(self.start(&candidate))
    }

    /// Audio follows a pause: nothing before it belongs to what comes.
    fn forget(&mut self) {
        self.model.reset();
        self.recent.entries.clear();
        self.steps.entries.clear();
        self.voiced = 0;
        self.tonal = 0;
        self.candidate = None;
    }

    fn start(&mut self, candidate: &Candidate) -> SpeechEvent {
        let last = self.recent.time(self.voiced.trailing_zeros());
        self.utterance = Some(Utterance {
            last: last.unwrap_or(candidate.onset),
            tail: None,
            resting: 0,
        });
        self.level.merge(candidate.level);
        SpeechEvent::Started(candidate.onset)
    }

    /// Enough frames of the window have a voice, and few are tones: the model takes parts of dialling and of music for a
    /// voice.
    fn has_enough_voice(&self) -> bool {
        let (voiced, tonal) = (self.voiced.count_ones(), self.tonal.count_ones());
        voiced >= self.settings.min_frames && tonal * 2 <= voiced
    }

    /// When the sound began that leads to the last frame, which has a voice of this level.
    fn onset(&self, level: f32) -> Instant {
        let steps = || self.steps.entries.iter().rev();
        let mut background: Vec<f32> = steps().map(|it| it.1).skip(SUBFRAMES + LOOK_BACK).collect();
        background.sort_by(f32::total_cmp);
        let background = background.get(background.len() / 2);
        let floor = background
            .map_or(MIN_ONSET_LEVEL, |it| it + ONSET_ABOVE_BACKGROUND)
            .max(MIN_ONSET_LEVEL)
            .max(level - ONSET_BELOW_VOICE);
        let (mut onset, mut gap) = (None, 0);
        for (index, (time, level)) in steps().take(SUBFRAMES + LOOK_BACK).enumerate() {
            if *level > floor {
                onset = Some(*time);
                gap = 0;
            } else if index >= SUBFRAMES {
                gap += 1;
                if gap >= LOOK_BACK_GAP {
                    break;
                }
            }
        }
        let newest = steps().next().map(|it| it.0);
        onset
            .or(newest)
            .expect("the frame's subframes are in the list")
    }
}

impl Utterance {
    fn on_frame(&mut self, time: Instant, judged: JudgedFrame) {
        self.tail = match judged.kind {
            FrameKind::Voice => Some(0),
            FrameKind::Noise => self
                .tail
                .map(|tail| tail + 1)
                .filter(|it| *it <= TAIL_FRAMES),
            FrameKind::Silence | FrameKind::Tone => None,
        };
        if self.tail.is_some() {
            self.last = time;
        }
        if judged.kind == FrameKind::Voice {
            self.resting = RESTING_FRAMES;
        }
    }
}

impl Recent {
    fn new(most: usize) -> Self {
        Self {
            entries: VecDeque::with_capacity(most),
            most,
        }
    }

    fn push(&mut self, time: Instant, level: f32) {
        if self.entries.len() == self.most {
            self.entries.pop_front();
        }
        self.entries.push_back((time, level));
    }

    /// The highest level of the last entries.
    fn loudest(&self, entries: u32) -> f32 {
        let last = self.entries.iter().rev().take(entries as usize);
        last.fold(f32::NEG_INFINITY, |loudest, it| loudest.max(it.1))
    }

    /// The time of the entry that is this many before the last.
    fn time(&self, back: u32) -> Option<Instant> {
        self.entries.iter().nth_back(back as usize).map(|it| it.0)
    }
}

impl LevelMeter {
    fn add(&mut self, dbfs: f32) {
        self.power += 10_f64.powf(f64::from(dbfs) / 10.0);
        self.frames += 1;
    }

    fn merge(&mut self, other: Self) {
        self.power += other.power;
        self.frames += other.frames;
    }

    fn dbfs(self) -> Option<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "it is a fraction")]
        let power = (self.power / f64::from(self.frames.max(1))) as f32;
        (self.frames > 0).then(|| dbfs(power))
    }
}

#[cfg(test)]
pub(crate) mod tests;
