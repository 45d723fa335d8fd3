//! Writes one track as an Ogg Opus file (RFC 7845), without encoding anything again.

use std::borrow::Cow;

use ogg::{PacketWriteEndInfo, PacketWriter};

use super::placement::PlacedPacket;
use crate::livekit::audio::opus;

/// Samples at 48 kHz that a player drops at the start, while its decoder converges: the 80 ms that RFC 7845, section 4.2,
/// recommends. They are silence.
const PRE_SKIP: u16 = 3_840;

/// A page ends after this many samples, a second, so that a player can seek.
const PAGE_SAMPLES: i64 = 48_000;

/// Packets of silence, the longest first, with their lengths in samples: CELT, full band, one frame without energy. Players
/// ignore gaps between the positions of pages, so silence fills them. The shortest packet of Opus, 2.5 ms, is the accuracy.
const SILENCE: [(i64, [u8; 3]); 4] = [
    (960, opus::SILENCE),
    (480, [0xf0, 0xff, 0xfe]),
    (240, [0xe8, 0xff, 0xfe]),
    (120, [0xe0, 0xff, 0xfe]),
];

/// The stereo flag of a packet's first byte (RFC 6716, section 3.1).
const STEREO: u8 = 0x04;

/// A file that plays for `length` samples, with silence between the packets. Packets after that are left out.
pub(super) fn file(packets: &[PlacedPacket], length: i64, serial: u32) -> Vec<u8> {
    let stereo = |packet: &PlacedPacket| packet.payload.first().is_some_and(|it| it & STEREO != 0);
    let channels = if packets.iter().any(stereo) { 2 } else { 1 };
    let mut body = Body::default();
    body.fill(i64::from(PRE_SKIP));
    let shift = i64::from(PRE_SKIP);
    for packet in packets {
        if packet.start >= length {
            break;
        }
        body.fill(packet.start + shift);
        body.push(Cow::Borrowed(&packet.payload), packet.length);
    }
    body.fill_beyond(length + shift);

    let mut file = PacketWriter::new(Vec::new());
    let mut write = |packet: Cow<'_, [u8]>, end, position: i64| {
        let packet = packet.into_owned();
        let position = position.unsigned_abs();
        file.write_packet(packet, serial, end, position)
            .expect("writing to memory cannot fail");
    };
    write(head(channels).into(), PacketWriteEndInfo::EndPage, 0);
    write(tags().into(), PacketWriteEndInfo::EndPage, 0);
    let (mut position, mut page) = (0, 0);
    let last = body.packets.len() - 1;
    for (place, (packet, samples)) in body.packets.into_iter().enumerate() {
        position += samples;
        let end = if place == last {
            // The position of the last page cuts off what fills its last packet (RFC 7845, section 4.4).
            position = position.min(length + shift);
            PacketWriteEndInfo::EndStream
        } else if position - page >= PAGE_SAMPLES {
            page = position;
            PacketWriteEndInfo::EndPage
        } else {
            PacketWriteEndInfo::NormalPacket
        };
        write(packet, end, position);
    }
    file.into_inner()
}

/// The packets of a file, each with its samples.
#[derive(Default)]
struct Body<'a> {
    packets: Vec<(Cow<'a, [u8]>, i64)>,
    end: i64,
}

impl<'a> Body<'a> {
    fn push(&mut self, packet: Cow<'a, [u8]>, samples: i64) {
        self.packets.push((packet, samples));
        self.end += samples;
    }

    /// Adds silence up to a position. What is left is shorter than the shortest packet, and counts in the next gap.
    fn fill(&mut self, position: i64) {
        for (samples, packet) in SILENCE {
            while self.end + samples <= position {
                self.push(Cow::Owned(packet.to_vec()), samples);
            }
        }
    }

    /// Adds silence until the position is reached, and there is at least one packet.
    fn fill_beyond(&mut self, position: i64) {
        self.fill(position);
        if self.end < position {
            let (samples, packet) = SILENCE[SILENCE.len() - 1];
            self.push(Cow::Owned(packet.to_vec()), samples);
        }
    }
}

/// The identification header (RFC 7845, section 5.1).
fn head(channels: u8) -> Vec<u8> {
    let mut head = b"OpusHead".to_vec();
    head.extend([1, channels]);
    head.extend(PRE_SKIP.to_le_bytes());
    head.extend(48_000_u32.to_le_bytes());
    // No gain, and one stream.
    head.extend([0, 0, 0]);
    head
}

/// The comment header (RFC 7845, section 5.2), without comments.
fn tags() -> Vec<u8> {
    const VENDOR: &[u8] = b"livekit-canary";
    let length = u32::try_from(VENDOR.len()).unwrap_or_default();
    let mut tags = b"OpusTags".to_vec();
    tags.extend(length.to_le_bytes());
    tags.extend(VENDOR);
    tags.extend(0_u32.to_le_bytes());
    tags
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Cursor;
    use std::sync::Arc;

    use ogg::PacketReader;
    use ropus::{Application, Channels, DecodeMode, Decoder, Encoder};

    use super::super::placement::ticks;
    use super::*;

    /// A file as a player without a notion of gaps decodes it: mono samples at 48 kHz.
    pub(in crate::recording) fn decode(file: &[u8]) -> Vec<i16> {
        let mut reader = PacketReader::new(Cursor::new(file));
        let head = reader.read_packet().unwrap().unwrap();
        assert!(head.first_in_stream() && head.last_in_page());
        assert_eq!(head.data[..9], *b"OpusHead\x01");
        assert_eq!(head.data.len(), 19);
        let pre_skip = usize::from(u16::from_le_bytes([head.data[10], head.data[11]]));
        let tags = reader.read_packet().unwrap().unwrap();
        assert_eq!(tags.data[..8], *b"OpusTags");
        assert!(tags.last_in_page());
        let mut decoder = Decoder::new(48_000, Channels::Mono).unwrap();
        let (mut pcm, mut buffer) = (Vec::new(), vec![0; 5_760]);
        while let Some(packet) = reader.read_packet().unwrap() {
            let samples = decoder.decode(&packet.data, &mut buffer, DecodeMode::Normal);
            pcm.extend_from_slice(&buffer[..samples.unwrap()]);
            let position = usize::try_from(packet.absgp_page()).unwrap();
            if packet.last_in_stream() {
                // Only the last packet may be cut.
                assert!(pcm.len() >= position && pcm.len() - position < 960);
                pcm.truncate(position);
                assert!(reader.read_packet().unwrap().is_none());
                break;
            } else if packet.last_in_page() {
                assert_eq!(pcm.len(), position, "the position of a page");
            }
        }
        pcm.drain(..pre_skip);
        pcm
    }

    /// A loud tone in packets of 20 ms.
    fn tone(channels: Channels, count: usize) -> Vec<Arc<[u8]>> {
        let mut encoder = Encoder::builder(48_000, channels, Application::Voip)
            .build()
            .unwrap();
        let mut phase = 0.0_f32;
        let packet = |_| {
            let mut pcm = Vec::new();
            for _ in 0..960 {
                phase += 300.0 / 48_000.0;
                let sample = 0.5 * (phase * std::f32::consts::TAU).sin();
                pcm.extend(std::iter::repeat_n(sample, channels.count()));
            }
            let mut packet = vec![0; 1_500];
            let length = encoder.encode_float(&pcm, &mut packet).unwrap();
            packet.truncate(length);
            Arc::from(packet)
        };
        (0..count).map(packet).collect()
    }

    fn at(start: i64, payload: &Arc<[u8]>) -> PlacedPacket {
        PlacedPacket {
            start,
            length: 960,
            payload: Arc::clone(payload),
        }
    }

    /// The largest magnitude in each 20 ms.
    pub(in crate::recording) fn peaks(pcm: &[i16]) -> Vec<u16> {
        let peak = |chunk: &[i16]| chunk.iter().map(|it| it.unsigned_abs()).max().unwrap();
        pcm.chunks(960).map(peak).collect()
    }

    #[test]
    fn every_packet_of_silence_has_its_length_and_decodes_to_zeros() {
        for (samples, packet) in SILENCE {
            assert!(opus::is_well_formed(&packet));
            let length = usize::try_from(samples).unwrap();
            assert_eq!(ticks(opus::duration(&packet)), samples);
            let mut pcm = vec![1; 5_760];
            let mut decoder = Decoder::new(48_000, Channels::Mono).unwrap();
            let samples = decoder.decode(&packet, &mut pcm, DecodeMode::Normal);
            assert_eq!(samples.unwrap(), length);
            assert!(pcm[..length].iter().all(|sample| *sample == 0));
        }
    }

    #[test]
    fn gaps_play_as_silence_and_nothing_is_shifted() {
        let tone = tone(Channels::Mono, 40);
        // The tone from 200 ms on; two packets of it are lost, and it pauses for 1.2 s.
        let mut packets = Vec::new();
        for (number, payload) in tone.iter().enumerate() {
            let number = i64::try_from(number).unwrap();
            let pause = if number < 20 { 0 } else { 60 };
            if ![8, 9].contains(&number) {
                packets.push(at((10 + number + pause) * 960, payload));
            }
        }
        let pcm = decode(&file(&packets, 3 * 48_000 + 17, 1));
        assert_eq!(pcm.len(), 3 * 48_000 + 17);
        let peaks = peaks(&pcm);
        let loud: Vec<usize> = (0..peaks.len()).filter(|it| peaks[*it] > 8_000).collect();
        // A packet decodes with a delay of 6.5 ms. After a gap within a tone, the decoder needs a moment, as after any loss.
        for (from, to) in [(11, 17), (27, 29), (91, 109)] {
            assert!((from..=to).all(|it| loud.contains(&it)), "{loud:?}");
        }
        for silent in (0..10).chain([19]).chain(32..90).chain(112..150) {
            assert!(peaks[silent] < 300, "{silent}: {peaks:?}");
        }
    }

    #[test]
    fn gap_is_filled_to_two_and_a_half_milliseconds_and_no_rest_adds_up() {
        let tone = tone(Channels::Mono, 50);
        // Each packet begins 21 ms after the one before.
        let packets: Vec<_> = (0..50).map(|it| at(it * 1_008, &tone[0])).collect();
        let mut body = Body::default();
        for packet in &packets {
            body.fill(packet.start);
            assert!((0..120).contains(&(packet.start - body.end)));
            body.push(Cow::Borrowed(&packet.payload), packet.length);
        }
    }

    #[test]
    fn header_has_as_many_channels_as_the_packets() {
        for channels in [Channels::Mono, Channels::Stereo] {
            let tone = tone(channels, 3);
            let packets: Vec<_> = (0..3).map(|it| at(it * 960, &tone[0])).collect();
            let file = file(&packets, 4 * 960, 7);
            let head = 28;
            assert_eq!(file[head..head + 8], *b"OpusHead");
            assert_eq!(usize::from(file[head + 9]), channels.count());
            assert_eq!(file[head + 10..head + 12], 3_840_u16.to_le_bytes());
            assert_eq!(file[14..18], 7_u32.to_le_bytes());
            assert_eq!(decode(&file).len(), 4 * 960);
        }
    }

    #[test]
    fn packets_are_in_the_file_as_they_were() {
        let tone = tone(Channels::Mono, 30);
        let placed: Vec<_> = (0..30)
            .zip(&tone)
            .map(|(it, one)| at(it * 960, one))
            .collect();
        let file = file(&placed, 30 * 960, 1);
        let mut reader = PacketReader::new(Cursor::new(&file));
        let mut found = Vec::new();
        while let Some(packet) = reader.read_packet().unwrap() {
            found.push(packet.data);
        }
        // After two headers and 80 ms of silence.
        let expected: Vec<_> = tone.iter().map(|packet| packet.to_vec()).collect();
        assert_eq!(found[6..36], expected);
        assert_eq!(found[2..6], vec![opus::SILENCE.to_vec(); 4]);
    }

    #[test]
    fn recording_without_a_packet_or_without_a_length_is_a_valid_file() {
        assert_eq!(decode(&file(&[], 0, 1)).len(), 0);
        assert_eq!(decode(&file(&[], 100, 1)).len(), 100);
        let tone = tone(Channels::Mono, 1);
        // A packet after the end is left out.
        assert_eq!(decode(&file(&[at(960, &tone[0])], 960, 1)), [0; 960]);
    }
}
