//! WAV files: integer or floating-point samples, at a rate that Opus encodes.

use std::io::Cursor;

use hound::{SampleFormat, WavReader};

use super::{ClipError, MAX_DURATION, Recording, to_mono};

/// The sampling rates of Opus encoders in Hz (RFC 6716, section 2).
const RATES: [u32; 5] = [8_000, 12_000, 16_000, 24_000, 48_000];

pub(super) fn read(file: &[u8]) -> Result<Recording, ClipError> {
    let mut reader = WavReader::new(Cursor::new(file)).map_err(|error| invalid(&error))?;
    let spec = reader.spec();
    if !(1..=2).contains(&spec.channels) {
        return Err(ClipError::Channels(spec.channels));
    }
    if !RATES.contains(&spec.sample_rate) {
        return Err(ClipError::Rate(spec.sample_rate));
    }
    // Before the samples are read: the size of the file alone does not bound them.
    if u64::from(reader.duration()) > u64::from(spec.sample_rate) * MAX_DURATION.as_secs() {
        return Err(ClipError::TooLong);
    }
    let interleaved: Result<Vec<i16>, hound::Error> = match spec.sample_format {
        SampleFormat::Int => {
            let samples = reader.samples::<i32>();
            let to_16_bits = |sample| scaled(sample, spec.bits_per_sample);
            samples.map(|sample| sample.map(to_16_bits)).collect()
        }
        SampleFormat::Float => {
            let samples = reader.samples::<f32>();
            samples.map(|sample| sample.map(from_float)).collect()
        }
    };
    let interleaved = interleaved.map_err(|error| invalid(&error))?;
    Ok(Recording {
        rate: spec.sample_rate,
        pcm: to_mono(&interleaved, spec.channels.into()),
    })
}

fn scaled(sample: i32, bits: u16) -> i16 {
    let sample = match bits {
        0..=16 => sample << (16 - bits),
        _ => sample >> (bits - 16).min(31),
    };
    saturated(sample)
}

#[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
fn from_float(sample: f32) -> i16 {
    saturated((sample * 32_767.0) as i32)
}

fn saturated(sample: i32) -> i16 {
    let sample = sample.clamp(i16::MIN.into(), i16::MAX.into());
    i16::try_from(sample).expect("it is clamped")
}

fn invalid(error: &hound::Error) -> ClipError {
    ClipError::Invalid {
        format: "WAV",
        reason: error.to_string(),
    }
}
