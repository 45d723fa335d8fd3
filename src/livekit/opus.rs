//! Opus: the sound of a packet, and how long it lasts. The bytes are a stranger's: whatever they are, they harm nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ropus::{Channels, DecodeMode};

use super::echo::Frame;
use super::rtp::{self, Position};
use super::speech::{self, Sound};

/// Samples a second of the decoded sound, mono: the energy of speech lies below 8 kHz, and decoding more costs more.
pub(super) const RATE: u32 = 16_000;

/// RTP ticks that a sample takes.
const TICKS: u64 = (rtp::CLOCK_RATE / RATE) as u64;

/// Half of what is judged at once, in RTP ticks: a pause that is longer is one.
const PAUSE: u64 = (rtp::CLOCK_RATE / speech::WINDOWS / 2) as u64;

/// Samples of the longest packet, 120 ms.
const LONGEST: usize = (RATE * 120 / 1000) as usize;

/// A packet this short carries no sound: discontinuous transmission (RFC 6716, 3.1 and what `WebRTC` sends).
const DTX_BYTES: usize = 3;

/// 20 ms of silence: CELT, full band, one frame without energy.
pub(super) const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];

/// What a packet lasts that doesn't say.
const FRAME: Duration = Duration::from_millis(20);

/// Decodes one track.
pub(super) struct Decoder {
    codec: Option<ropus::Decoder>,
    pcm: Box<[i16; LONGEST]>,
    /// Media time at which the next packet begins if nothing was left out.
    expected: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            codec: None,
            pcm: Box::new([0; LONGEST]),
            expected: 0,
        }
    }
}

impl Decoder {
    /// Takes a packet of the track in, whatever its bytes.
    pub(super) fn decode(&mut self, position: Position, payload: &[u8]) -> Sound<'_> {
        let paused = position.time > self.expected + PAUSE;
        let samples = self.samples(payload);
        self.expected = position.time + TICKS * samples as u64;
        Sound {
            follows: position.follows && !paused && samples > 0,
            pcm: &self.pcm[..samples],
        }
    }

    /// Samples decoded into `pcm`; none of a packet that carries or yields no sound.
    fn samples(&mut self, payload: &[u8]) -> usize {
        if payload.len() <= DTX_BYTES {
            return 0;
        }
        let decoder = match &mut self.codec {
            Some(decoder) => decoder,
            none => match ropus::Decoder::new(RATE, Channels::Mono) {
                Ok(decoder) => none.insert(decoder),
                Err(_) => return 0,
            },
        };
        let pcm = &mut self.pcm[..];
        // Not even a decoder's panic may end the probe.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            decoder.decode(payload, pcm, DecodeMode::Normal)
        }));
        match outcome {
            Ok(Ok(samples)) => samples.min(LONGEST),
            // Turned down by its header. The decoder is kept: a new one for every such packet is dear.
            Ok(Err(_)) => 0,
            Err(_) => {
                self.codec = None;
                0
            }
        }
    }
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
        return FRAME;
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
    use ropus::{Application, Encoder};

    use super::*;

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
            let position = Position {
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
