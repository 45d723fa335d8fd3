//! Judges one frame of audio: silence, noise, a tone, or a voice.
//!
//! The voice activity detector `earshot`, a small neural network, scores it. It rejects noise and typing, but takes tones
//! and dialling for a voice. Linear prediction detects those: it predicts a tone almost exactly, and noise not at all.

use std::collections::VecDeque;

/// The sampling rate that the model needs, in Hz.
pub(super) const RATE: u32 = 16_000;

/// Samples of one frame, 16 ms: the input of the model.
pub(super) const FRAME_SAMPLES: usize = 256;

/// Parts of a frame, 4 ms each, whose level is measured.
pub(super) const SUBFRAMES: usize = 4;

/// A frame whose score is at least this may be a voice: the default of the model.
const VOICE_SCORE: f32 = 0.5;
/// The same for a tone.
const TONE_SCORE: f32 = 0.4;

/// How much of a frame's energy linear prediction explains, in dB. White and pink noise are below 6. The median of an
/// utterance is 17 to 33, with the highest values in a telephone's band. Tones and dialling are at 38 to 44.
const NOISE_BELOW: f32 = 6.0;
const TONE_ABOVE: f32 = 36.0;

/// Order of the linear prediction.
const ORDER: usize = 8;

/// A frame this many dB below the loudest of the last half second is an echo or a decoder's fading, and not a voice.
const FADED: f32 = 30.0;
const FADED_FRAMES: usize = 32;

/// The model hears quiet audio too late. So it is amplified until its peaks reach this level, as a part of full scale
/// (-30 dBFS), but not beyond a gain of 30 dB.
const TARGET_PEAK: f32 = 0.0316;
const MIN_PEAK: f32 = 0.001;
/// The decay of the peak per frame: 0.8 dB per second.
const PEAK_DECAY: f32 = 0.9985;

/// After this many quiet frames (0.3 s), the model is idle until the next sound. It is most of the detector's cost.
const IDLE_AFTER: u32 = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameKind {
    Silence,
    /// A sound that is no voice and no tone.
    Noise,
    Tone,
    Voice,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct JudgedFrame {
    pub(super) kind: FrameKind,
    /// RMS in dBFS.
    pub(super) level: f32,
    /// The same of its parts.
    pub(super) levels: [f32; SUBFRAMES],
}

pub(super) struct VoiceModel {
    network: Box<earshot::Detector>,
    /// Quieter frames are silence, in dBFS.
    threshold: f32,
    peak: f32,
    /// The levels of the last frames.
    recent: VecDeque<f32>,
    /// Frames of silence in a row.
    quiet: u32,
}

impl VoiceModel {
    pub(super) fn new(threshold: f32) -> Self {
        Self {
            network: Box::default(),
            threshold,
            peak: MIN_PEAK,
            recent: VecDeque::with_capacity(FADED_FRAMES),
            quiet: 0,
        }
    }

    /// The next frame does not follow the last one.
    pub(super) fn reset(&mut self) {
        self.network.reset();
        self.recent.clear();
    }

    pub(super) fn judge(&mut self, frame: &[i16; FRAME_SAMPLES]) -> JudgedFrame {
        let (mut judged, power) = self.measure(frame);
        if judged.kind != FrameKind::Silence {
            self.quiet = 0;
        } else if self.quiet <= IDLE_AFTER {
            self.quiet += 1;
        } else {
            return judged;
        }
        if self.quiet > IDLE_AFTER {
            self.network.reset();
            return judged;
        }
        let score = self.score(frame, power);
        if judged.kind == FrameKind::Noise && !self.has_faded(judged.level) {
            judged.kind = kind(frame, score);
        }
        judged
    }

    /// Measures only the level of the next frame. A sound is taken for noise.
    pub(super) fn skip(&mut self, frame: &[i16; FRAME_SAMPLES]) -> JudgedFrame {
        let (mut judged, _) = self.measure(frame);
        if self.has_faded(judged.level) {
            judged.kind = FrameKind::Silence;
        }
        judged
    }

    /// Tells silence from sound. Also returns the power of the frame, as a part of full scale.
    fn measure(&mut self, frame: &[i16; FRAME_SAMPLES]) -> (JudgedFrame, f32) {
        let mut powers = [0.0; SUBFRAMES];
        let parts = frame.chunks(FRAME_SAMPLES / SUBFRAMES);
        for (power, part) in powers.iter_mut().zip(parts) {
            *power = mean_power(part);
        }
        let power = powers.iter().sum::<f32>() / 4.0;
        let level = dbfs(power);
        if self.recent.len() == FADED_FRAMES {
            self.recent.pop_front();
        }
        self.recent.push_back(level);
        let audible = level > self.threshold;
        let judged = JudgedFrame {
            kind: if audible {
                FrameKind::Noise
            } else {
                FrameKind::Silence
            },
            level,
            levels: powers.map(dbfs),
        };
        (judged, power)
    }

    fn has_faded(&self, level: f32) -> bool {
        let loudest = self.recent.iter().copied().fold(level, f32::max);
        level < loudest - FADED
    }

    /// How much the frame sounds like a voice, 0 to 1.
    fn score(&mut self, frame: &[i16; FRAME_SAMPLES], power: f32) -> f32 {
        self.peak = (self.peak * PEAK_DECAY).max(power.sqrt()).max(MIN_PEAK);
        if self.peak >= TARGET_PEAK {
            return self.network.predict_i16(frame);
        }
        let gain = TARGET_PEAK / self.peak;
        #[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
        let louder = frame.map(|sample| (f32::from(sample) * gain) as i16);
        self.network.predict_i16(&louder)
    }
}

/// The kind of a sound with this score.
fn kind(frame: &[i16; FRAME_SAMPLES], score: f32) -> FrameKind {
    if score < TONE_SCORE {
        return FrameKind::Noise;
    }
    let gain = prediction_gain(frame);
    if gain > TONE_ABOVE {
        FrameKind::Tone
    } else if gain < NOISE_BELOW || score < VOICE_SCORE {
        FrameKind::Noise
    } else {
        FrameKind::Voice
    }
}

/// The mean square, as a part of full scale.
#[expect(clippy::cast_precision_loss, reason = "a frame has few samples")]
fn mean_power(pcm: &[i16]) -> f32 {
    const FULL_SCALE: f32 = 32_768.0;
    let energy: f32 = pcm.iter().map(|&it| f32::from(it) * f32::from(it)).sum();
    energy / pcm.len() as f32 / (FULL_SCALE * FULL_SCALE)
}

/// At least -100 dBFS.
pub(super) fn dbfs(power: f32) -> f32 {
    10.0 * power.max(1e-10).log10()
}

/// The energy of the frame over that of its prediction's error, in dB (Levinson-Durbin recursion).
fn prediction_gain(frame: &[i16; FRAME_SAMPLES]) -> f32 {
    use std::f32::consts::TAU;
    let mut windowed = [0.0; FRAME_SAMPLES];
    let mut phase = 0.0_f32;
    for (output, sample) in windowed.iter_mut().zip(frame) {
        *output = f32::from(*sample) * (0.5 - 0.5 * phase.cos());
        phase += TAU / 255.0;
    }
    let mut correlation = [0.0; ORDER + 1];
    for (lag, value) in correlation.iter_mut().enumerate() {
        *value = windowed
            .iter()
            .zip(&windowed[lag..])
            .map(|(a, b)| a * b)
            .sum();
    }
    if correlation[0] <= 0.0 {
        return 0.0;
    }
    // White noise 50 dB below keeps the recursion stable.
    correlation[0] *= 1.0 + 1e-5;
    let mut error = correlation[0];
    let mut weights = [0.0; ORDER + 1];
    for order in 1..=ORDER {
        let predicted: f32 = (1..order)
            .map(|i| weights[i] * correlation[order - i])
            .sum();
        let reflection = (correlation[order] - predicted) / error;
        let before = weights;
        for i in 1..order {
            weights[i] -= reflection * before[order - i];
        }
        weights[order] = reflection;
        error *= 1.0 - reflection * reflection;
    }
    10.0 * (correlation[0] / error.max(f32::MIN_POSITIVE)).log10()
}
