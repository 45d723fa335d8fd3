//! Whether a voice has the rhythm of speech: syllables and pauses.

use tokio::time::Instant;

use super::LevelMeter;

/// The drop of the level that ends a syllable, in dB. Noise and held notes do not drop this far within half a second.
const DIP: f32 = 10.0;

/// The rise after a dip that begins the next syllable, in dB.
const DIP_RECOVERY: f32 = 8.0;

/// A voice that goes on for this many frames (1 s) without a dip is a steady sound such as music.
const STEADY_FRAMES: u32 = 62;

/// Speech over a steady sound has [`STEADY_DIPS`] dips within this many frames (1.2 s).
const DIP_FRAMES: u32 = 75;
const STEADY_DIPS: u32 = 3;

/// A voice that may be speech.
pub(super) struct Candidate {
    /// When its sound began.
    pub(super) onset: Instant,
    pub(super) level: LevelMeter,
    /// Frames since the last one with a voice.
    pub(super) pause: u32,
    frames: u32,
    /// The last frames, the newest in the lowest bit: whether the level dropped.
    dips: u128,
    /// The lowest level since the last dip, until the level rises again.
    low: Option<f32>,
}

impl Candidate {
    pub(super) fn new(onset: Instant) -> Self {
        Self {
            onset,
            level: LevelMeter::default(),
            pause: 0,
            frames: 0,
            dips: 0,
            low: None,
        }
    }

    /// Takes the next frame. `loudest`: the highest level since the first voice of the window.
    pub(super) fn on_frame(&mut self, level: f32, loudest: f32, voice: bool) {
        self.frames = self.frames.saturating_add(1);
        self.pause = if voice { 0 } else { self.pause + 1 };
        self.dips <<= 1;
        match self.low {
            None if level <= loudest - DIP => {
                self.dips |= 1;
                self.low = Some(level);
            }
            Some(low) if level >= low + DIP_RECOVERY => self.low = None,
            Some(low) => self.low = Some(low.min(level)),
            None => {}
        }
        if voice {
            self.level.add(level);
        }
    }

    pub(super) fn is_steady(&self) -> bool {
        self.frames > STEADY_FRAMES
    }

    /// `window`: the number of frames since the first voice of the window.
    pub(super) fn has_rhythm(&self, window: u32) -> bool {
        let dips = |frames: u32| {
            let recent = self.dips & ((1 << frames) - 1);
            recent.count_ones()
        };
        if self.is_steady() {
            dips(DIP_FRAMES) >= STEADY_DIPS
        } else {
            dips(window) >= 1
        }
    }
}
