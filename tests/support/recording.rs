//! A recording of one side of a call, as a player hears it.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context as _, ensure};
use ogg::PacketReader;
use ropus::{Channels, DecodeMode, Decoder};

/// Sampling rate of [`Heard::pcm`] in Hz.
const RATE: usize = 48_000;

/// Samples in 10 ms, the accuracy of [`Heard::loud`].
const STEP: usize = RATE / 100;

/// Mono samples.
pub struct Heard {
    pcm: Vec<i16>,
}

impl Heard {
    /// Decodes a file packet by packet, as players do that ignore gaps between the positions of pages.
    ///
    /// # Errors
    /// If there is no such file, or it is no Ogg Opus file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let file = fs::read(path).with_context(|| format!("no {name}"))?;
        let mut reader = PacketReader::new(Cursor::new(file));
        let head = reader.read_packet()?.context("no header")?;
        ensure!(head.data.starts_with(b"OpusHead"), "{name} is no Opus");
        let skip = head.data.get(10..12).context("a short header")?;
        let skip = usize::from(u16::from_le_bytes([skip[0], skip[1]]));
        reader.read_packet()?.context("no comments")?;
        let mut decoder = Decoder::new(48_000, Channels::Mono)?;
        let (mut pcm, mut buffer) = (Vec::new(), vec![0; RATE * 120 / 1_000]);
        let mut end = None;
        while let Some(packet) = reader.read_packet()? {
            let samples = decoder.decode(&packet.data, &mut buffer, DecodeMode::Normal)?;
            pcm.extend_from_slice(&buffer[..samples]);
            if packet.last_in_stream() {
                end = Some(usize::try_from(packet.absgp_page())?);
            }
        }
        let end = end.context("the file is cut off")?;
        ensure!(pcm.len() >= end, "{name}: {} of {end} samples", pcm.len());
        pcm.truncate(end);
        pcm.drain(..skip.min(end));
        Ok(Self { pcm })
    }

    pub fn seconds(&self) -> f64 {
        to_seconds(self.pcm.len())
    }

    /// The spans of sound above -60 dBFS, in seconds since the start of the file. Pauses of less than this many seconds do not
    /// end one.
    pub fn loud(&self, pause: f64) -> Vec<(f64, f64)> {
        let is_loud = |step: &[i16]| step.iter().any(|sample| sample.unsigned_abs() > 32);
        let mut spans: Vec<(f64, f64)> = Vec::new();
        for (place, step) in self.pcm.chunks(STEP).enumerate() {
            if !is_loud(step) {
                continue;
            }
            let (start, end) = (to_seconds(place * STEP), to_seconds((place + 1) * STEP));
            match spans.last_mut() {
                Some((_, last)) if start - *last < pause => *last = end,
                _ => spans.push((start, end)),
            }
        }
        spans
    }
}

#[expect(clippy::cast_precision_loss, reason = "a call has few samples")]
fn to_seconds(samples: usize) -> f64 {
    samples as f64 / RATE as f64
}
