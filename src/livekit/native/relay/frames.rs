//! The frames of TURN over a stream (RFC 8656, sections 3.1 and 12.5): STUN messages, and
//! `ChannelData` with padding.

use std::io;

use bytes::{Buf, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

const STUN_HEADER: usize = 20;
const CHANNEL_HEADER: usize = 4;

/// Cuts a stream into frames without their padding. A frame has at most 64 KiB, because its length has 16 bits.
#[derive(Default)]
pub(super) struct TurnFrames {
    /// The padding of the last frame that has not arrived yet.
    padding: usize,
}

impl Decoder for TurnFrames {
    type Item = BytesMut;
    type Error = io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> io::Result<Option<BytesMut>> {
        let skipped = self.padding.min(bytes.len());
        bytes.advance(skipped);
        self.padding -= skipped;
        let Some(&[kind, _, high, low]) = bytes.first_chunk() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        // The first two bits tell them apart (RFC 8656, section 12).
        let frame = match kind >> 6 {
            0 => STUN_HEADER + length,
            1 => CHANNEL_HEADER + length,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "no TURN")),
        };
        if bytes.len() < frame {
            return Ok(None);
        }
        self.padding = frame.next_multiple_of(4) - frame;
        Ok(Some(bytes.split_to(frame)))
    }

    /// A frame that is cut off by the end of the stream is dropped.
    fn decode_eof(&mut self, bytes: &mut BytesMut) -> io::Result<Option<BytesMut>> {
        self.decode(bytes)
    }
}

/// `rtc-turn` writes whole frames, with their padding.
impl Encoder<&[u8]> for TurnFrames {
    type Error = io::Error;

    fn encode(&mut self, frame: &[u8], bytes: &mut BytesMut) -> io::Result<()> {
        bytes.extend_from_slice(frame);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::livekit::arbitrary::{bytes, config};

    /// Decodes `stream`, which arrives in pieces of at most `piece` bytes.
    fn frames(stream: &[u8], piece: usize) -> io::Result<Vec<Vec<u8>>> {
        let (mut decoder, mut buffer) = (TurnFrames::default(), BytesMut::new());
        let mut frames = Vec::new();
        for piece in stream.chunks(piece) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                frames.push(frame.to_vec());
            }
        }
        Ok(frames)
    }

    fn channel_data(data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).unwrap().to_be_bytes();
        let mut frame = vec![0x40, 0, length[0], length[1]];
        frame.extend_from_slice(data);
        frame
    }

    #[test]
    fn frames_of_any_length_keep_their_bounds_in_any_segmentation() {
        let mut stun = vec![0_u8; STUN_HEADER + 8];
        stun[3] = 8;
        let mut stream = Vec::new();
        let mut expected = Vec::new();
        for length in [0, 1, 2, 3, 4, 1_500, 0xffff] {
            let frame = channel_data(&vec![0xa5; length]);
            stream.extend_from_slice(&frame);
            stream.resize(stream.len().next_multiple_of(4), 0xff);
            stream.extend_from_slice(&stun);
            expected.extend([frame, stun.clone()]);
        }
        for piece in [1, 3, 7, 1_460, stream.len()] {
            assert_eq!(frames(&stream, piece).unwrap(), expected, "{piece}");
        }
    }

    #[test]
    fn bytes_that_start_no_frame_are_an_error() {
        for first in [0x80, 0xc0, 0xff] {
            assert!(frames(&[first, 0, 0, 0], 4).is_err(), "{first}");
        }
    }

    #[test]
    fn buffer_never_needs_more_than_one_frame() {
        let cases = prop::collection::vec(bytes(300), 0..40);
        let mut runner = proptest::test_runner::TestRunner::new(config(256));
        let result = runner.run(&cases, |pieces| {
            let (mut decoder, mut buffer) = (TurnFrames::default(), BytesMut::new());
            'pieces: for piece in pieces {
                buffer.extend_from_slice(&piece);
                loop {
                    match decoder.decode(&mut buffer) {
                        Ok(Some(frame)) => prop_assert!(frame.len() >= CHANNEL_HEADER),
                        Ok(None) => break,
                        Err(_) => break 'pieces,
                    }
                }
                prop_assert!(buffer.len() < 0xffff + STUN_HEADER);
            }
            Ok(())
        });
        result.unwrap();
    }
}
