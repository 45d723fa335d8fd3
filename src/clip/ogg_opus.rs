//! Ogg Opus files (RFC 7845), decoded at 48 kHz.

use std::fmt::Display;
use std::io::Cursor;

use ogg::PacketReader;
use ropus::{Channels, DecodeMode, Decoder};

use super::{ClipError, MAX_DURATION, RATE, Recording, samples};

/// Samples of the longest packet, 120 ms (RFC 6716, section 3.2.5).
const MAX_PACKET_SAMPLES: usize = RATE as usize * 120 / 1_000;

/// The fields of the identification header (RFC 7845, section 5.1) that a reader of one stream needs.
struct Head {
    /// Samples to drop at the start.
    pre_skip: usize,
    /// In dB, as Q7.8.
    gain: i16,
}

pub(super) fn read(file: &[u8]) -> Result<Recording, ClipError> {
    let mut reader = PacketReader::new(Cursor::new(file));
    let mut next = || reader.read_packet().map_err(invalid);
    let missing = || invalid("it has no Opus header");
    let first = next()?.ok_or_else(missing)?;
    let head = Head::read(&first.data)?;
    // The comments.
    next()?;
    // A mono decoder mixes the channels of a stereo packet.
    let mut decoder = Decoder::new(RATE, Channels::Mono).map_err(invalid)?;
    decoder.set_gain(head.gain.into()).map_err(invalid)?;
    let mut pcm = Vec::new();
    let mut buffer = vec![0; MAX_PACKET_SAMPLES];
    while let Some(packet) = next()? {
        // An empty packet would ask the decoder to conceal a loss.
        if packet.data.is_empty() {
            return Err(invalid("it has an empty packet"));
        }
        let count = decoder.decode(&packet.data, &mut buffer, DecodeMode::Normal);
        pcm.extend_from_slice(&buffer[..count.map_err(invalid)?]);
        if packet.last_in_stream() {
            // The position of the last page cuts off what fills its last packet (RFC 7845, section 4.4).
            let end = usize::try_from(packet.absgp_page()).unwrap_or(usize::MAX);
            pcm.truncate(end);
        }
        // The size of the file alone does not bound the samples.
        if pcm.len() > head.pre_skip + samples(RATE, MAX_DURATION) {
            return Err(ClipError::TooLong);
        }
    }
    pcm.drain(..head.pre_skip.min(pcm.len()));
    Ok(Recording { rate: RATE, pcm })
}

impl Head {
    fn read(packet: &[u8]) -> Result<Self, ClipError> {
        let Some(fields) = packet
            .strip_prefix(b"OpusHead")
            .and_then(|it| it.first_chunk::<11>())
        else {
            return Err(invalid("it has no Opus header"));
        };
        let [
            version,
            channels,
            skip_low,
            skip_high,
            _,
            _,
            _,
            _,
            gain_low,
            gain_high,
            mapping,
        ] = *fields;
        // The upper half of the version changes with incompatible formats.
        if version >> 4 != 0 {
            return Err(invalid("the version of its header is unknown"));
        }
        if !(1..=2).contains(&channels) {
            return Err(ClipError::Channels(channels.into()));
        }
        if mapping != 0 {
            return Err(invalid("it has several streams"));
        }
        Ok(Self {
            pre_skip: u16::from_le_bytes([skip_low, skip_high]).into(),
            gain: i16::from_le_bytes([gain_low, gain_high]),
        })
    }
}

fn invalid(error: impl Display) -> ClipError {
    ClipError::Invalid {
        format: "Ogg Opus",
        reason: format!("{error}"),
    }
}
