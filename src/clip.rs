//! Recorded speech: what a line of the caller's script plays. It knows audio files and codecs, and no room.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Speech in both forms that an engine may send.
#[derive(Clone, PartialEq, Eq)]
pub struct SpeechClip {
    /// Opus packets of 20 ms.
    pub packets: Vec<Arc<[u8]>>,
    /// Mono samples at 48 kHz.
    pub pcm: Vec<i16>,
}

impl SpeechClip {
    /// The length of one packet.
    pub const PACKET: Duration = Duration::from_millis(20);

    pub fn duration(&self) -> Duration {
        Self::PACKET * u32::try_from(self.packets.len()).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for SpeechClip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?} of speech]", self.duration())
    }
}
