//! What can be heard and seen of a call afterwards: each track as an Ogg Opus file, and the level of each track over time.
//!
//! `placement` puts the packets on one time line, `ogg_opus` writes a track as a file, and `store` owns the files. This module
//! knows no probe and no history.

use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::audio::recording::{
    CallLevels, CallPackets, CallSound, MAX_DURATION, TrackPackets,
};

mod ogg_opus;
mod placement;
mod store;

pub(crate) use store::{RecordingFile, RecordingStore};

/// Peak levels from 0, silence, to 100, the loudest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waveform {
    /// When the first level begins.
    pub started: Instant,
    /// The time that one level covers.
    pub step: Duration,
    /// `None` if no packet arrived.
    pub agent: Option<Vec<u8>>,
    /// `None` if no packet was sent.
    pub caller: Option<Vec<u8>>,
}

/// The files of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedRecording {
    /// When both files begin: the canary's join.
    pub started: Instant,
    /// `None` if no packet arrived.
    pub agent: Option<SavedTrack>,
    /// `None` if no packet was sent.
    pub caller: Option<SavedTrack>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedTrack {
    pub bytes: u64,
    pub duration: Duration,
}

/// The packets of a call that may become files.
#[derive(Debug)]
pub(crate) struct CallRecording {
    started: Instant,
    duration: Duration,
    packets: CallPackets,
}

/// What a participant that has left heard and said: its levels, and its packets if the call was recorded. `None` if it did not join.
pub(crate) fn of_call(
    sound: CallSound,
    left: Instant,
) -> Option<(Waveform, Option<CallRecording>)> {
    let (started, levels, packets) = sound.into_parts()?;
    let recording = packets.map(|packets| CallRecording {
        started,
        duration: left.saturating_duration_since(started).min(MAX_DURATION),
        packets,
    });
    Some((Waveform::new(started, &levels), recording))
}

impl Waveform {
    fn new(started: Instant, levels: &CallLevels) -> Self {
        let heard = |peaks: &[u16]| {
            let levels = peaks.iter().map(|peak| level(*peak));
            (!peaks.is_empty()).then(|| levels.collect())
        };
        Self {
            started,
            step: levels.step,
            agent: heard(&levels.agent),
            caller: heard(&levels.caller),
        }
    }
}

/// 100 at 0 dBFS and 0 at -60 dBFS or below, in proportion to the decibels.
fn level(peak: u16) -> u8 {
    let dbfs = 20.0 * (f32::from(peak) / 32_768.0).log10();
    let level = (100.0 + dbfs / 0.6).round().clamp(0.0, 100.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is a whole number from 0 to 100"
    )]
    let level = level as u8;
    level
}

impl CallRecording {
    /// The tracks as files, both of the same duration. Takes milliseconds of computation.
    fn into_files(self) -> (Instant, [Option<TrackFile>; 2]) {
        let (started, duration) = (self.started, self.duration);
        let file = |track: TrackPackets, serial| {
            if track.list.is_empty() {
                return None;
            }
            let placed = placement::place(track.list, started);
            Some(TrackFile {
                content: ogg_opus::file(&placed, placement::ticks(duration), serial),
                duration,
            })
        };
        let files = [file(self.packets.agent, 1), file(self.packets.caller, 2)];
        (started, files)
    }
}

/// One track.
struct TrackFile {
    content: Vec<u8>,
    duration: Duration,
}

impl TrackFile {
    fn saved(&self) -> SavedTrack {
        SavedTrack {
            bytes: self.content.len() as u64,
            duration: self.duration,
        }
    }
}

/// A call in which the agent sends a tone for this long.
#[cfg(test)]
pub(crate) use tests::sample_call;

#[cfg(test)]
mod tests;
