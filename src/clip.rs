//! Recorded speech: what a line of the caller's script plays. It knows audio files and codecs, and no room.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ropus::{Application, Bitrate, Channels, DecodeMode, Decoder, Encoder};

mod ogg_opus;
mod wav;

/// Speech in both forms that an engine may send.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SpeechClip {
    /// Opus packets of 20 ms.
    pub packets: Vec<Arc<[u8]>>,
    /// Mono samples at 48 kHz.
    pub pcm: Vec<i16>,
}

/// The name of the question that ships with the binary, in place of a file.
pub const BUILTIN_HELLO: &str = "builtin:hello";

/// "Hello, can you tell me what you can do for me?", spoken by eSpeak NG. It has no pause that would end the turn.
const HELLO: &[u8] = include_bytes!("clip/hello.opus");

/// The largest file that is read.
pub const MAX_FILE_BYTES: u64 = 10 * 1024 * 1024;

/// The longest clip.
pub const MAX_DURATION: Duration = Duration::from_mins(1);

/// The shortest clip. An agent's voice activity detector needs about this much speech.
pub const MIN_DURATION: Duration = Duration::from_millis(100);

/// A clip whose loudest sample is below this (-50 dBFS) holds no speech that an agent would hear.
const MIN_PEAK: u16 = 103;

/// What is this many times (40 dB) softer than the loudest sample, at an end of the clip, is silence.
const SILENT_BELOW_PEAK: u16 = 100;

/// How much silence is kept at each end, for sounds that are too soft to be detected.
const SILENCE_KEPT: Duration = Duration::from_millis(40);

/// Sampling rate of [`SpeechClip::pcm`] in Hz.
const RATE: u32 = 48_000;

/// In bit/s.
const BITRATE: u32 = 32_000;

/// The longest Opus packet at [`BITRATE`] has far fewer bytes.
const MAX_PACKET_BYTES: usize = 1_500;

/// Why a file is no clip.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClipError {
    #[error("it is neither a WAV nor an Ogg Opus file")]
    UnknownFormat,
    #[error("it is not a valid {format} file: {reason}")]
    Invalid {
        format: &'static str,
        reason: String,
    },
    #[error("it has {0} channels, but only mono and stereo are supported")]
    Channels(u16),
    #[error("its sampling rate is {0} Hz, but only 8, 12, 16, 24 and 48 kHz are supported")]
    Rate(u32),
    #[error("it is longer than {} s", MAX_DURATION.as_secs())]
    TooLong,
    #[error("it is shorter than {} ms", MIN_DURATION.as_millis())]
    TooShort,
    #[error("it is silent")]
    Silent,
}

/// Mono samples of a file, at one of the rates that Opus encodes.
struct Recording {
    rate: u32,
    pcm: Vec<i16>,
}

type ReadRecording = fn(&[u8]) -> Result<Recording, ClipError>;

impl SpeechClip {
    /// The length of one packet.
    pub const PACKET: Duration = Duration::from_millis(20);

    /// Reads a WAV or Ogg Opus file: mono or stereo, from [`MIN_DURATION`] to [`MAX_DURATION`] long. The silence before and
    /// after its speech is left out, because the delay of the agent's reply is measured from the end of the clip.
    ///
    /// # Errors
    /// The file has another format, is malformed or does not fit these limits.
    pub fn read(file: &[u8]) -> Result<Self, ClipError> {
        let (format, reader): (_, ReadRecording) = match file {
            [b'R', b'I', b'F', b'F', ..] => ("WAV", wav::read),
            [b'O', b'g', b'g', b'S', ..] => ("Ogg Opus", ogg_opus::read),
            _ => return Err(ClipError::UnknownFormat),
        };
        // The file comes from anywhere, and a panic in a decoder must not end the canary.
        catch_unwind(AssertUnwindSafe(|| Self::encode(&reader(file)?))).unwrap_or_else(|_| {
            Err(ClipError::Invalid {
                format,
                reason: "the decoder failed".to_owned(),
            })
        })
    }

    /// The question [`BUILTIN_HELLO`].
    #[expect(clippy::missing_panics_doc, reason = "a test reads this file")]
    pub fn hello() -> Arc<Self> {
        static CLIP: OnceLock<Arc<SpeechClip>> = OnceLock::new();
        let clip = || Arc::new(Self::read(HELLO).expect("a test reads this file"));
        Arc::clone(CLIP.get_or_init(clip))
    }

    pub fn duration(&self) -> Duration {
        Self::PACKET * u32::try_from(self.packets.len()).unwrap_or(u32::MAX)
    }

    /// Encodes at the rate of the recording, and decodes at 48 kHz: Opus resamples.
    fn encode(recording: &Recording) -> Result<Self, ClipError> {
        recording.check()?;
        let failed = |reason: String| ClipError::Invalid {
            format: "audio",
            reason,
        };
        let mut encoder = Encoder::builder(recording.rate, Channels::Mono, Application::Voip)
            .bitrate(Bitrate::Bits(BITRATE))
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let mut decoder =
            Decoder::new(RATE, Channels::Mono).map_err(|error| failed(error.to_string()))?;
        let mut clip = Self {
            packets: Vec::new(),
            pcm: Vec::new(),
        };
        let packet_samples = samples(recording.rate, Self::PACKET);
        let mut packet = [0; MAX_PACKET_BYTES];
        let mut buffer = vec![0; samples(RATE, Self::PACKET)];
        for chunk in recording.speech().chunks(packet_samples) {
            let mut chunk = chunk.to_vec();
            chunk.resize(packet_samples, 0);
            let length = encoder.encode(&chunk, &mut packet);
            let length = length.map_err(|error| failed(error.to_string()))?;
            let packet = &packet[..length];
            decoder
                .decode(packet, &mut buffer, DecodeMode::Normal)
                .map_err(|error| failed(error.to_string()))?;
            clip.packets.push(packet.into());
            clip.pcm.extend_from_slice(&buffer);
        }
        Ok(clip)
    }
}

impl Recording {
    fn check(&self) -> Result<(), ClipError> {
        if self.pcm.len() > samples(self.rate, MAX_DURATION) {
            return Err(ClipError::TooLong);
        }
        if self.pcm.len() < samples(self.rate, MIN_DURATION) {
            return Err(ClipError::TooShort);
        }
        if self.peak() < MIN_PEAK {
            return Err(ClipError::Silent);
        }
        Ok(())
    }

    fn peak(&self) -> u16 {
        let levels = self.pcm.iter().map(|it| it.unsigned_abs());
        levels.max().unwrap_or_default()
    }

    /// The samples without the silence at both ends, except for [`SILENCE_KEPT`].
    fn speech(&self) -> &[i16] {
        let limit = self.peak() / SILENT_BELOW_PEAK;
        let loud = |it: &i16| it.unsigned_abs() > limit;
        let (Some(first), Some(last)) = (
            self.pcm.iter().position(loud),
            self.pcm.iter().rposition(loud),
        ) else {
            return &self.pcm;
        };
        let kept = samples(self.rate, SILENCE_KEPT);
        let end = (last + 1 + kept).min(self.pcm.len());
        &self.pcm[first.saturating_sub(kept)..end]
    }
}

/// Samples of one channel in a span. Both factors are small: a clip has at most a minute.
fn samples(rate: u32, span: Duration) -> usize {
    let samples = u128::from(rate) * span.as_millis() / 1_000;
    usize::try_from(samples).unwrap_or(usize::MAX)
}

/// The mean of each group of interleaved channels.
fn to_mono(interleaved: &[i16], channels: usize) -> Vec<i16> {
    let count = i32::try_from(channels).unwrap_or(1);
    let mean = |group: &[i16]| {
        let sum: i32 = group.iter().copied().map(i32::from).sum();
        i16::try_from(sum / count).unwrap_or_default()
    };
    interleaved.chunks_exact(channels).map(mean).collect()
}

impl fmt::Debug for SpeechClip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?} of speech]", self.duration())
    }
}

#[cfg(test)]
mod tests;
