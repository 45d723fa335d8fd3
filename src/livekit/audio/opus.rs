//! Opus: the sound of a packet, and how long it lasts. The bytes are a stranger's: whatever they are, they harm nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ropus::celt::range_coder::RangeDecoder;
use ropus::opus::decoder::{MAX_FRAMES, opus_packet_get_samples_per_frame, opus_packet_parse_impl};
use ropus::silk::decoder::{SilkDecControl, SilkDecoder, silk_decode};
use ropus::{Channels, DecodeMode};

use super::echo::Frame;
use super::rtp::{self, MediaPosition};
use super::speech::{self, PcmChunk};

/// Samples a second of the decoded sound, mono: the energy of speech lies below 8 kHz, and decoding more costs more.
pub const RATE: u32 = 16_000;

#[expect(clippy::cast_possible_wrap, reason = "it is 16,000")]
const HERTZ: i32 = RATE as i32;

/// RTP ticks that a sample takes.
const TICKS: u64 = (rtp::CLOCK_RATE / RATE) as u64;

/// Half of what is judged at once, in RTP ticks: a pause that is longer is one.
const MAX_GAP: u64 = (rtp::CLOCK_RATE / speech::WINDOWS_PER_SECOND / 2) as u64;

/// Samples of the longest packet, 120 ms.
pub const MAX_PACKET_SAMPLES: usize = (RATE * 120 / 1000) as usize;

/// A packet this short carries no sound: discontinuous transmission (RFC 6716, 3.1 and what `WebRTC` sends).
const DTX_BYTES: usize = 3;

/// 20 ms of silence: CELT, full band, one frame without energy.
pub(crate) const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];

/// What a packet lasts that doesn't say.
const DEFAULT_DURATION: Duration = Duration::from_millis(20);

/// The first byte of the first packet without SILK (RFC 6716, 3.1).
const CELT_ONLY: u8 = 0x80;

/// In the first byte (RFC 6716, 3.1).
const STEREO: u8 = 0x04;

/// Decodes one track.
pub(crate) struct Decoder {
    codec: Codec,
    pcm: Box<[i16; MAX_PACKET_SAMPLES]>,
    /// Media time at which the next packet begins if nothing was left out.
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
    /// Takes a packet of the track in, whatever its bytes.
    pub(crate) fn decode(&mut self, position: MediaPosition, payload: &[u8]) -> PcmChunk<'_> {
        let paused = position.time > self.expected + MAX_GAP;
        let samples = self.samples(payload);
        self.expected = position.time + TICKS * samples as u64;
        PcmChunk {
            follows: position.follows && !paused && samples > 0,
            pcm: &self.pcm[..samples],
        }
    }

    /// Samples decoded into `pcm`; none of a packet that carries or yields no sound.
    fn samples(&mut self, payload: &[u8]) -> usize {
        if payload.len() <= DTX_BYTES {
            return 0;
        }
        let (codec, pcm) = (&mut self.codec, &mut self.pcm[..]);
        // Not even a decoder's panic may end the probe.
        let outcome = catch_unwind(AssertUnwindSafe(|| codec.decode(payload, pcm)));
        let Ok(samples) = outcome else {
            self.codec = Codec::default();
            return 0;
        };
        // Turned down by its header. The decoder is kept: a new one for every such packet is dear.
        samples.unwrap_or_default().min(MAX_PACKET_SAMPLES)
    }
}

/// Decodes the packets of one track, mono.
///
/// Of a hybrid packet it decodes SILK alone: CELT adds what lies above 8 kHz (RFC 6716, 2), which is lost at this rate,
/// and takes more time than all the rest.
#[derive(Default)]
pub struct Codec {
    silk: Option<Box<Silk>>,
    celt: Option<ropus::Decoder>,
}

impl Codec {
    /// Returns how many samples of `pcm` are the packet's; `None` of one that is no Opus, or too long for `pcm`.
    pub fn decode(&mut self, packet: &[u8], pcm: &mut [i16]) -> Option<usize> {
        if *packet.first()? < CELT_ONLY {
            return self.silk.get_or_insert_default().decode(packet, pcm);
        }
        if let Some(silk) = &mut self.silk {
            silk.begins = true;
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
    /// Before the first packet, and after one without SILK.
    begins: bool,
}

impl Default for Silk {
    fn default() -> Self {
        Self {
            state: SilkDecoder::new(),
            begins: true,
        }
    }
}

impl Silk {
    fn decode(&mut self, packet: &[u8], pcm: &mut [i16]) -> Option<usize> {
        let frames = frames(packet)?;
        let length = opus_packet_get_samples_per_frame(packet, HERTZ);
        let mut control = control(packet, length);
        let length = usize::try_from(length).ok()?;
        if std::mem::take(&mut self.begins) {
            self.state.init();
        }
        let mut samples = 0;
        for frame in frames {
            let pcm = pcm.get_mut(samples..samples + length)?;
            // A frame that was not sent.
            if frame.len() < 2 {
                pcm.fill(0);
            } else {
                self.frame(frame, &mut control, pcm)?;
            }
            samples += length;
        }
        Some(samples)
    }

    /// Fills `pcm`, in the steps that SILK makes of a long frame.
    fn frame(&mut self, frame: &[u8], control: &mut SilkDecControl, pcm: &mut [i16]) -> Option<()> {
        const ALL_THERE: i32 = 0;
        let mut range = RangeDecoder::new(frame);
        let mut done = 0;
        while done < pcm.len() {
            let mut samples = 0;
            let (state, first, rest) = (&mut self.state, done == 0, &mut pcm[done..]);
            let failed = silk_decode(
                state,
                control,
                ALL_THERE,
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

/// What SILK must be told of a packet; `length`: samples of each frame.
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

/// The frames of a packet (RFC 6716, 3.2); `None` where it is malformed.
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

/// A packet's payload.
impl Frame for Arc<[u8]> {
    fn silence() -> Self {
        Self::from(SILENCE)
    }

    fn duration(&self) -> Duration {
        duration(self)
    }
}

/// How long a packet plays, by its first byte and, for many frames, its second (RFC 6716, 3.1 and 3.2).
fn duration(payload: &[u8]) -> Duration {
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
    Duration::from_micros((frame * frames).min(120_000))
}

#[cfg(test)]
mod tests {
    use ropus::{Application, Bitrate, Encoder, InbandFec};

    use super::*;

    /// A second of something like speech, in packets of so many milliseconds each.
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
    fn of_packets_with_silk_all_is_heard_that_a_whole_decoder_hears() {
        // Bits a second where the encoder isn't to choose: too few for a layer beside SILK.
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
                let (mut expected, mut heard) = ([0; MAX_PACKET_SAMPLES], [1; MAX_PACKET_SAMPLES]);
                let samples = whole.decode(packet, &mut expected, DecodeMode::Normal);
                assert_eq!(ours.decode(packet, &mut heard), samples.ok(), "{case}");
                let samples = millis * 16;
                assert!(heard[..samples] == expected[..samples], "{case}");
            }
        }
        assert!(hybrid > 100, "{hybrid}");
    }

    #[test]
    fn track_that_changes_its_codec_is_heard_all_the_time() {
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
    fn packet_that_is_turned_down_is_no_sound_and_takes_nothing_with_it() {
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
        // Of several frames, and none of them (RFC 6716, 3.2.5).
        assert_eq!(decode(10, &[3, 0, 1, 2]), [0; 0]);
        // A decoder that begins anew begins with silence.
        let (number, packet) = packets.next().unwrap();
        let sound = decode(number, &packet);
        assert!(sound[..40].iter().any(|it| it.abs() > 4_000), "{sound:?}");
    }

    #[test]
    fn packet_length_follows_from_its_first_bytes() {
        assert_eq!(duration(&SILENCE), Duration::from_millis(20));
        assert_eq!(duration(&[0x18]), Duration::from_millis(60));
        assert_eq!(duration(&[0x79]), Duration::from_millis(40));
        assert_eq!(duration(&[0x63, 6]), Duration::from_millis(60));
        assert_eq!(duration(&[0xe0]), Duration::from_micros(2_500));
        assert_eq!(duration(&[0xff, 0xff]), Duration::from_millis(120));
        assert_eq!(duration(&[]), Duration::from_millis(20));
    }
}
