//! Reduces the sampling rate by an integer factor. A low-pass filter first removes what the lower rate cannot hold.

/// Taps per factor of the filter. 24 attenuate aliases of the upper half band by about 40 dB, enough to detect voices.
const TAPS_PER_FACTOR: usize = 8;

/// The pass band as a part of the new Nyquist frequency.
const PASS_BAND: f32 = 0.9;

pub(super) struct Decimator {
    factor: usize,
    taps: Vec<f32>,
    /// The last samples as a ring; `at` is the place of the next one.
    past: Vec<f32>,
    at: usize,
    /// Samples to skip before the next output.
    skip: usize,
}

impl Decimator {
    /// With a factor of 1, samples pass unchanged.
    pub(super) fn new(factor: u32) -> Self {
        let factor = factor.max(1) as usize;
        let count = factor * TAPS_PER_FACTOR;
        Self {
            factor,
            taps: low_pass(count, factor),
            past: vec![0.0; count],
            at: 0,
            skip: 0,
        }
    }

    /// The next sample does not follow the last one.
    pub(super) fn reset(&mut self) {
        self.past.fill(0.0);
        self.skip = 0;
    }

    /// Takes the next input sample; returns an output sample for each `factor` of them.
    pub(super) fn push(&mut self, sample: i16) -> Option<i16> {
        if self.factor == 1 {
            return Some(sample);
        }
        self.past[self.at] = f32::from(sample);
        self.at = (self.at + 1) % self.past.len();
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.skip = self.factor - 1;
        let (newer, older) = self.past.split_at(self.at);
        // The filter is symmetric, so its direction does not matter.
        let samples = older.iter().chain(newer);
        let sum: f32 = samples.zip(&self.taps).map(|(it, tap)| it * tap).sum();
        #[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
        let output = sum as i16;
        Some(output)
    }
}

/// A Hamming-windowed sinc with a gain of 1.
fn low_pass(count: usize, factor: usize) -> Vec<f32> {
    use std::f32::consts::PI;
    #[expect(clippy::cast_precision_loss, reason = "both are small")]
    let (count, factor) = (count as f32, factor as f32);
    let tap = |index: f32| {
        let x = (index - (count - 1.0) / 2.0) * PI * PASS_BAND / factor;
        let sinc = if x == 0.0 { 1.0 } else { x.sin() / x };
        sinc * (0.54 - 0.46 * (2.0 * PI * index / (count - 1.0)).cos())
    };
    let indices = std::iter::successors(Some(0.0), |index| Some(index + 1.0));
    let taps: Vec<f32> = indices.take_while(|it| *it < count).map(tap).collect();
    let gain: f32 = taps.iter().sum();
    taps.into_iter().map(|tap| tap / gain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The RMS of a tone of this frequency at 48 kHz after decimation to 16 kHz. Before, it is 7,071.
    fn level_of(frequency: f32) -> f32 {
        let mut decimator = Decimator::new(3);
        let samples = (0..4_800_u16).filter_map(|i| {
            let phase = f32::from(i) * frequency / 48_000.0 * std::f32::consts::TAU;
            #[expect(clippy::cast_possible_truncation, reason = "it fits")]
            decimator.push((phase.sin() * 10_000.0) as i16)
        });
        let output: Vec<f32> = samples.map(f32::from).collect();
        assert_eq!(output.len(), 1_600);
        let energy: f32 = output[100..].iter().map(|it| it * it).sum();
        (energy / 1_500.0).sqrt()
    }

    #[test]
    fn speech_passes_and_aliases_are_removed() {
        for frequency in [200.0, 1_000.0, 4_000.0] {
            let level = level_of(frequency);
            assert!((6_300.0..7_900.0).contains(&level), "{frequency}: {level}");
        }
        for frequency in [12_000.0, 15_000.0, 20_000.0] {
            let level = level_of(frequency);
            assert!(level < 200.0, "{frequency}: {level}");
        }
    }

    #[test]
    fn factor_of_one_changes_nothing() {
        let mut decimator = Decimator::new(1);
        let output: Vec<i16> = (0..100).filter_map(|it| decimator.push(it)).collect();
        assert_eq!(output, (0..100).collect::<Vec<i16>>());
    }
}
