use std::io::Cursor;

use hound::{SampleFormat, WavSpec, WavWriter};
use proptest::prelude::*;

use super::*;

fn spec(rate: u32, channels: u16) -> WavSpec {
    WavSpec {
        channels,
        sample_rate: rate,
        bits_per_sample: 16,
        sample_format: SampleFormat::Int,
    }
}

/// A WAV file with a tone of 400 Hz, `millis` long.
fn wav(spec: WavSpec, millis: u32) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    let mut writer = WavWriter::new(&mut file, spec).unwrap();
    for index in 0..spec.sample_rate * millis / 1_000 {
        let loud = (index * 800 / spec.sample_rate).is_multiple_of(2);
        for _ in 0..spec.channels {
            match spec.sample_format {
                SampleFormat::Int => {
                    let full = 1 << (spec.bits_per_sample - 3);
                    writer
                        .write_sample(if loud { full } else { -full })
                        .unwrap();
                }
                SampleFormat::Float => {
                    let sample = if loud { 0.25_f32 } else { -0.25 };
                    writer.write_sample(sample).unwrap();
                }
            }
        }
    }
    writer.finalize().unwrap();
    file.into_inner()
}

#[test]
fn built_in_question_is_long_enough_to_interrupt_and_as_loud_as_a_caller() {
    let clip = SpeechClip::hello();
    let duration = clip.duration();
    assert!(duration >= Duration::from_millis(1_500), "{duration:?}");
    assert!(duration <= Duration::from_secs(3), "{duration:?}");
    assert_eq!(clip.pcm.len(), clip.packets.len() * 960);
    let bytes: usize = clip.packets.iter().map(|packet| packet.len()).sum();
    assert!(bytes < 20_000, "{bytes}");
    let peak = clip.pcm.iter().map(|it| it.unsigned_abs()).max();
    assert!(peak > Some(8_000), "{peak:?}");
}

#[test]
fn wav_of_every_rate_and_format_becomes_packets_of_20_ms_with_the_same_sound() {
    for rate in [8_000, 12_000, 16_000, 24_000, 48_000] {
        for (channels, bits_per_sample, sample_format) in [
            (1, 16, SampleFormat::Int),
            (2, 16, SampleFormat::Int),
            (1, 8, SampleFormat::Int),
            (2, 24, SampleFormat::Int),
            (1, 32, SampleFormat::Int),
            (1, 32, SampleFormat::Float),
        ] {
            let spec = WavSpec {
                channels,
                sample_rate: rate,
                bits_per_sample,
                sample_format,
            };
            let clip = SpeechClip::read(&wav(spec, 490)).unwrap();
            assert_eq!(clip.packets.len(), 25, "{spec:?}");
            assert_eq!(clip.duration(), Duration::from_millis(500));
            assert_eq!(clip.pcm.len(), 24_000);
            let middle = &clip.pcm[9_600..14_400];
            let power: f64 = middle.iter().map(|it| f64::from(*it).powi(2)).sum();
            let level = (power / 4_800.0).sqrt();
            assert!((5_000.0..10_000.0).contains(&level), "{spec:?}: {level}");
        }
    }
}

#[test]
fn ogg_opus_of_another_encoder_is_read_with_its_exact_length() {
    // `opusenc` encoded 125,416 samples at 48 kHz.
    let recording = ogg_opus::read(HELLO).unwrap();
    assert_eq!(
        (recording.rate, recording.pcm.len()),
        (48_000, HELLO_SAMPLES)
    );
}

const HELLO_SAMPLES: usize = 125_416;

#[test]
fn file_that_is_no_clip_is_refused_with_its_reason() {
    let error = |file: &[u8]| SpeechClip::read(file).unwrap_err().to_string();
    assert_eq!(error(b""), "it is neither a WAV nor an Ogg Opus file");
    assert_eq!(error(b"ID3"), "it is neither a WAV nor an Ogg Opus file");
    let file = |rate, channels, millis| wav(spec(rate, channels), millis);
    assert_eq!(
        error(&file(44_100, 1, 500)),
        "its sampling rate is 44100 Hz, but only 8, 12, 16, 24 and 48 kHz are supported"
    );
    assert_eq!(
        error(&file(16_000, 3, 500)),
        "it has 3 channels, but only mono and stereo are supported"
    );
    assert_eq!(error(&file(8_000, 1, 60_001)), "it is longer than 60 s");
    assert_eq!(error(&file(8_000, 1, 99)), "it is shorter than 100 ms");
    let mut silent = file(8_000, 1, 500);
    silent[44..].fill(0);
    assert_eq!(error(&silent), "it is silent");
    let whole = file(8_000, 1, 500);
    let cut = error(&whole[..whole.len() - 100]);
    assert!(cut.starts_with("it is not a valid WAV file: "), "{cut}");
    let vorbis = error(b"OggS but nothing else of it");
    assert!(
        vorbis.starts_with("it is not a valid Ogg Opus file: "),
        "{vorbis}"
    );
    let mut garbled = HELLO.to_vec();
    garbled[1_000] ^= 1;
    let garbled = error(&garbled);
    assert!(garbled.contains("Ogg Opus file: "), "{garbled}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The checksum of a page protects the decoder from most garbage, so only the header is changed in some files.
    #[test]
    fn garbage_never_panics(
        opus in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        length in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut file = if opus { HELLO.to_vec() } else { wav(spec(8_000, 1), 200) };
        for (index, byte) in changes {
            // Most of the changes go to the headers.
            let within = file.len().min(if byte % 4 == 0 { usize::MAX } else { 80 });
            file[index.index(within)] = byte;
        }
        if cut {
            file.truncate(length.index(file.len()));
        }
        let _clip = SpeechClip::read(&file);
    }
}
