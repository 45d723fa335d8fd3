//! Opus: decodes a packet and returns how long it plays.
//!
//! The bytes come from the network. A malformed packet yields no audio and never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ropus::celt::range_coder::RangeDecoder;
use ropus::opus::decoder::{MAX_FRAMES, opus_packet_get_samples_per_frame, opus_packet_parse_impl};
use ropus::silk::decoder::{SilkDecControl, SilkDecoder, silk_decode};
use ropus::{Channels, DecodeMode};

use super::caller::Frame;
use super::recording;
use super::rtp::{self, MediaPosition};
use super::speech::PcmChunk;
use crate::clip::SpeechClip;

/// Sampling rate of the decoded mono audio in Hz. The energy of speech lies below 8 kHz, and a higher rate costs more
/// time.
pub(crate) const RATE: u32 = 16_000;

#[expect(clippy::cast_possible_wrap, reason = "it is 16,000")]
const HERTZ: i32 = RATE as i32;

/// RTP ticks per sample.
const TICKS: u64 = (rtp::CLOCK_RATE / RATE) as u64;

/// The longest gap in media time between two packets that follow each other, in RTP ticks: 10 ms, half a usual packet.
const MAX_GAP: u64 = (rtp::CLOCK_RATE / 100) as u64;

/// Samples of the longest packet, 120 ms (RFC 6716, section 3.2.5).
pub const MAX_PACKET_SAMPLES: usize = (RATE * 120 / 1000) as usize;

/// A packet of at most this length carries no audio: discontinuous transmission (RFC 6716, section 2.1.9). `WebRTC`
/// sends three bytes.
const DTX_BYTES: usize = 3;

/// 20 ms of silence: CELT, full band, one frame without energy.
pub(crate) const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];

/// The duration of an empty packet, which has no first byte.
const DEFAULT_DURATION: Duration = Duration::from_millis(20);

/// Configurations from this first byte on have no SILK layer (RFC 6716, section 3.1).
const CELT_ONLY: u8 = 0x80;

/// The stereo flag of the first byte (RFC 6716, section 3.1).
const STEREO: u8 = 0x04;

/// Decodes one track and tracks its media time.
pub(crate) struct Decoder {
    codec: Codec,
    pcm: Box<[i16; MAX_PACKET_SAMPLES]>,
    /// Media time at which the next packet starts if the sender makes no pause.
    expected: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            codec: Codec::default(),
            pcm: Box::new([0; MAX_PACKET_SAMPLES]),
            expected: 0,
        }
    }
}

impl Decoder {
    /// Decodes a packet of the track. A packet that is malformed or has no audio yields an empty chunk.
    pub(crate) fn decode(&mut self, position: MediaPosition, payload: &[u8]) -> PcmChunk<'_> {
        let paused = position.time > self.expected + MAX_GAP;
        let samples = self.samples(payload);
        self.expected = position.time + TICKS * samples as u64;
        PcmChunk {
            follows: position.follows && !paused && samples > 0,
            pcm: &self.pcm[..samples],
        }
    }

    /// Decodes into `self.pcm`; returns the number of samples, 0 if the packet has no audio.
    fn samples(&mut self, payload: &[u8]) -> usize {
        if payload.len() <= DTX_BYTES {
            return 0;
        }
        let (codec, pcm) = (&mut self.codec, &mut self.pcm[..]);
        // A panic in the decoder would end the probe with `internal`. The state after a panic is unknown, so the
        // decoder is replaced.
        let outcome = catch_unwind(AssertUnwindSafe(|| codec.decode(payload, pcm)));
        let Ok(samples) = outcome else {
            self.codec = Codec::default();
            return 0;
        };
        // The decoder rejected the packet by its header and its state is intact. A new decoder for each such packet
        // would cost much time, which a sender could abuse.
        samples.unwrap_or_default().min(MAX_PACKET_SAMPLES)
    }
}

/// Decodes the packets of one track, mono.
///
/// It decodes only the SILK layer of a hybrid packet. The CELT layer adds frequencies above 8 kHz (RFC 6716, section
/// 2), which are lost at this sampling rate, and takes most of the decoding time.
#[derive(Default)]
pub struct Codec {
    silk: Option<Box<Silk>>,
    celt: Option<ropus::Decoder>,
}

impl Codec {
    /// Decodes `packet` into `pcm`; returns the number of samples, or `None` if the packet is malformed or `pcm` too
    /// short.
    pub fn decode(&mut self, packet: &[u8], pcm: &mut [i16]) -> Option<usize> {
        if *packet.first()? < CELT_ONLY {
            return self.silk.get_or_insert_default().decode(packet, pcm);
        }
        // SILK predicts from its last frame, which is now outdated (RFC 6716, section 4.5.2).
        if let Some(silk) = &mut self.silk {
            silk.reset = true;
        }
        let celt = match &mut self.celt {
            Some(celt) => celt,
            none => none.insert(ropus::Decoder::new(RATE, Channels::Mono).ok()?),
        };
        celt.decode(packet, pcm, DecodeMode::Normal).ok()
    }
}

struct Silk {
    state: SilkDecoder,
    /// The next packet needs a reset state: it is the first one, or the first after a packet without SILK.
    reset: bool,
}

impl Default for Silk {
    fn default() -> Self {
        Self {
            state: SilkDecoder::new(),
            reset: true,
        }
    }
}

impl Silk {
    fn decode(&mut self, packet: &[u8], pcm: &mut [i16]) -> Option<usize> {
        let frames = frames(packet)?;
        let length = opus_packet_get_samples_per_frame(packet, HERTZ);
        let mut control = control(packet, length);
        let length = usize::try_from(length).ok()?;
        if std::mem::take(&mut self.reset) {
            self.state.init();
        }
        let mut samples = 0;
        for frame in frames {
            let pcm = pcm.get_mut(samples..samples + length)?;
            // The sender left this frame out (DTX).
            if frame.len() < 2 {
                pcm.fill(0);
            } else {
                self.frame(frame, &mut control, pcm)?;
            }
            samples += length;
        }
        Some(samples)
    }

    /// Decodes one frame into `pcm`. SILK returns a frame of 40 or 60 ms in steps of 20 ms.
    fn frame(&mut self, frame: &[u8], control: &mut SilkDecControl, pcm: &mut [i16]) -> Option<()> {
        const NOT_LOST: i32 = 0;
        let mut range = RangeDecoder::new(frame);
        let mut done = 0;
        while done < pcm.len() {
            let mut samples = 0;
            let (state, first, rest) = (&mut self.state, done == 0, &mut pcm[done..]);
            let failed = silk_decode(
                state,
                control,
                NOT_LOST,
                first,
                &mut range,
                rest,
                &mut samples,
                None,
            );
            if failed != 0 || samples == 0 {
                return None;
            }
            done += samples;
        }
        Some(())
    }
}

/// The parameters of SILK for a packet. `length`: samples per frame.
fn control(packet: &[u8], length: i32) -> SilkDecControl {
    SilkDecControl {
        n_channels_api: 1,
        n_channels_internal: if packet[0] & STEREO == 0 { 1 } else { 2 },
        api_sample_rate: HERTZ,
        internal_sample_rate: match packet[0] >> 3 {
            0..4 => 8_000,
            4..8 => 12_000,
            _ => 16_000,
        },
        payload_size_ms: length * 1_000 / HERTZ,
        prev_pitch_lag: 0,
        enable_deep_plc: false,
    }
}

/// The frames of a packet (RFC 6716, section 3.2); `None` if the packet is malformed.
fn frames(packet: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let (mut toc, mut sizes, mut offset) = (0, [0; MAX_FRAMES], 0);
    let length = i32::try_from(packet.len()).ok()?;
    let count = opus_packet_parse_impl(
        packet,
        length,
        false,
        &mut toc,
        &mut sizes,
        &mut offset,
        None,
    );
    let count = usize::try_from(count).ok()?;
    let mut rest = packet.get(usize::try_from(offset).ok()?..)?;
    Some(sizes.into_iter().take(count).map_while(move |size| {
        let (frame, after) = rest.split_at_checked(usize::try_from(size).ok()?)?;
        rest = after;
        Some(frame)
    }))
}

/// The payload of one RTP packet, with the largest magnitude of its samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpusFrame {
    pub(crate) payload: Arc<[u8]>,
    pub(crate) peak: u16,
}

impl Frame for OpusFrame {
    fn silence() -> Self {
        Self {
            payload: Arc::from(SILENCE),
            peak: 0,
        }
    }

    fn of_clip(clip: &SpeechClip) -> Vec<Self> {
        let samples = clip.pcm.len() / clip.packets.len().max(1);
        let pcm = clip.pcm.chunks(samples.max(1));
        let peaks = pcm.map(recording::peak).chain(std::iter::repeat(0));
        let frames = clip.packets.iter().zip(peaks);
        frames
            .map(|(payload, peak)| Self {
                payload: Arc::clone(payload),
                peak,
            })
            .collect()
    }

    fn duration(&self) -> Duration {
        duration(&self.payload)
    }
}

/// Whether a decoder accepts the packet (RFC 6716, section 3.4).
pub(crate) fn is_well_formed(packet: &[u8]) -> bool {
    !packet.is_empty()
        && frames(packet).is_some_and(|frames| {
            let length = opus_packet_get_samples_per_frame(packet, HERTZ);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let samples = length.saturating_mul(frames.count());
            (1..=MAX_PACKET_SAMPLES).contains(&samples)
        })
}

/// How long a packet plays. The first byte tells the frame length, the second the number of frames if there are more
/// than two (RFC 6716, sections 3.1 and 3.2).
pub(crate) fn duration(payload: &[u8]) -> Duration {
    let Some(&toc) = payload.first() else {
        return DEFAULT_DURATION;
    };
    let frame = match toc >> 3 {
        config @ 0..12 => [10_000, 20_000, 40_000, 60_000][usize::from(config % 4)],
        config @ 12..16 => [10_000, 20_000][usize::from(config % 2)],
        config => [2_500, 5_000, 10_000, 20_000][usize::from(config % 4)],
    };
    let frames = match toc & 3 {
        0 => 1,
        1 | 2 => 2,
        _ => payload.get(1).map_or(1, |count| u64::from(count & 0x3f)),
    };
    // A malformed packet may claim up to 63 frames; 120 ms is the limit of RFC 6716, section 3.2.5.
    Duration::from_micros((frame * frames).min(120_000))
}

#[cfg(test)]
mod tests {
    use ropus::{Application, Bitrate, Encoder, InbandFec};

    use super::*;

    /// A second of speech-like audio in packets of `millis` milliseconds.
    fn packets(encoder: Encoder, millis: usize) -> Vec<Vec<u8>> {
        let mut encoder = encoder;
        let (rate, channels) = (encoder.sample_rate(), encoder.channels().count());
        let (mut random, mut phase) = (fastrand::Rng::with_seed(7), 0.0_f32);
        let samples = rate as usize * millis / 1_000;
        (0..1_000 / millis)
            .map(|_| {
                let mut sound = Vec::new();
                for _ in 0..samples {
                    phase += 1.0 / f32::from(u16::try_from(rate).unwrap());
                    let loud = (phase * 20.0).sin().abs();
                    let voice = (phase * 180.0 * std::f32::consts::TAU).sin();
                    for _ in 0..channels {
                        sound.push(loud * (0.3 * voice + 0.05 * (random.f32() - 0.5)));
                    }
                }
                let mut packet = vec![0; 3_000];
                let length = encoder.encode_float(&sound, &mut packet).unwrap();
                packet.truncate(length);
                packet
            })
            .collect()
    }

    #[test]
    fn silk_packets_decode_to_the_same_samples_as_with_a_full_decoder() {
        // The last column is the bit rate in bit/s. A low one keeps the encoder from adding a CELT layer to SILK.
        let cases = [
            (8_000, Channels::Mono, 20, None),
            (12_000, Channels::Mono, 40, Some(12_000)),
            (16_000, Channels::Mono, 10, Some(14_000)),
            (16_000, Channels::Stereo, 60, Some(24_000)),
            (48_000, Channels::Mono, 10, None),
            (48_000, Channels::Mono, 20, None),
            (48_000, Channels::Mono, 60, None),
            (48_000, Channels::Stereo, 20, None),
        ];
        let mut hybrid = 0;
        for (rate, channels, millis, bits) in cases {
            let mut encoder = Encoder::builder(rate, channels, Application::Voip)
                .inband_fec(InbandFec::Enabled)
                .packet_loss_perc(20);
            if let Some(bits) = bits {
                encoder = encoder.bitrate(Bitrate::Bits(bits));
            }
            let mut whole = ropus::Decoder::new(RATE, Channels::Mono).unwrap();
            let mut ours = Codec::default();
            for (number, packet) in packets(encoder.build().unwrap(), millis).iter().enumerate() {
                let case = format!("{rate} Hz, {channels:?}, {millis} ms, packet {number}");
                assert!(packet[0] < CELT_ONLY, "{case}");
                hybrid += usize::from(packet[0] >> 3 >= 12);
                let (mut expected, mut decoded) =
                    ([0; MAX_PACKET_SAMPLES], [1; MAX_PACKET_SAMPLES]);
                let samples = whole.decode(packet, &mut expected, DecodeMode::Normal);
                assert_eq!(ours.decode(packet, &mut decoded), samples.ok(), "{case}");
                let samples = millis * 16;
                assert!(decoded[..samples] == expected[..samples], "{case}");
            }
        }
        assert!(hybrid > 100, "{hybrid}");
    }

    #[test]
    fn track_that_switches_between_silk_and_celt_is_decoded_throughout() {
        let encoder = |application| {
            let encoder = Encoder::builder(48_000, Channels::Mono, application);
            encoder.build().unwrap()
        };
        let speech = packets(encoder(Application::Voip), 20);
        let music = packets(encoder(Application::RestrictedLowDelay), 20);
        assert!(music.iter().all(|packet| packet[0] >= CELT_ONLY));
        let (mut codec, mut pcm) = (Codec::default(), [0; MAX_PACKET_SAMPLES]);
        for (number, packets) in speech.chunks(5).zip(music.chunks(5)).enumerate() {
            for packet in packets.0.iter().chain(packets.1) {
                assert_eq!(codec.decode(packet, &mut pcm), Some(320));
            }
            assert!(pcm[..320].iter().any(|it| it.abs() > 500), "{number}");
        }
    }

    #[test]
    fn rejected_packet_yields_no_audio_and_leaves_the_decoder_intact() {
        let encoder = Encoder::builder(RATE, Channels::Mono, Application::Voip);
        let mut encoder = encoder.build().unwrap();
        let mut packets = (0..20_u64).map(|number| {
            let samples = (number * 320..(number + 1) * 320)
                .map(|at| if at / 40 % 2 == 0 { 8_000 } else { -8_000 })
                .collect::<Vec<i16>>();
            let mut packet = vec![0; 1_500];
            let length = encoder.encode(&samples, &mut packet).unwrap();
            packet.truncate(length);
            (number, packet)
        });
        let mut decoder = Decoder::default();
        let mut decode = |number: u64, payload: &[u8]| {
            let position = MediaPosition {
                time: number * 960,
                follows: true,
            };
            decoder.decode(position, payload).pcm.to_vec()
        };
        for (number, packet) in packets.by_ref().take(10) {
            assert_eq!(decode(number, &packet).len(), 320);
        }
        // A packet that announces zero frames is malformed (RFC 6716, section 3.2.5).
        assert_eq!(decode(10, &[3, 0, 1, 2]), [0; 0]);
        // A new decoder would start with silence.
        let (number, packet) = packets.next().unwrap();
        let sound = decode(number, &packet);
        assert!(sound[..40].iter().any(|it| it.abs() > 4_000), "{sound:?}");
    }

    #[test]
    fn duration_follows_from_the_first_two_bytes() {
        assert_eq!(duration(&SILENCE), Duration::from_millis(20));
        assert_eq!(duration(&[0x18]), Duration::from_millis(60));
        assert_eq!(duration(&[0x79]), Duration::from_millis(40));
        assert_eq!(duration(&[0x63, 6]), Duration::from_millis(60));
        assert_eq!(duration(&[0xe0]), Duration::from_micros(2_500));
        assert_eq!(duration(&[0xff, 0xff]), Duration::from_millis(120));
        assert_eq!(duration(&[]), Duration::from_millis(20));
    }
}
