//! What the agent plays: 20 ms Opus frames, encoded once.

use std::sync::Arc;

use super::Clip;
use crate::sandbox::fault::VoicelessSound;

pub(crate) struct VoiceClips {
    pub(super) greeting: Vec<Arc<[u8]>>,
    pub(super) reply: Vec<Arc<[u8]>>,
    clicks: Vec<Arc<[u8]>>,
    music: Vec<Arc<[u8]>>,
    noise: Vec<Arc<[u8]>>,
    pub(super) silence: Arc<[u8]>,
}

impl VoiceClips {
    pub(crate) fn load() -> Self {
        Self {
            greeting: frames(include_bytes!("../greeting.opusframes")),
            reply: frames(include_bytes!("../reply.opusframes")),
            clicks: frames(include_bytes!("../clicks.opusframes")),
            music: frames(include_bytes!("../music.opusframes")),
            noise: frames(include_bytes!("../noise.opusframes")),
            // A mono 20 ms CELT frame without energy: what a decoder hears as silence.
            silence: Arc::from([0xf8, 0xff, 0xfe].as_slice()),
        }
    }

    pub(super) fn of(&self, clip: Clip) -> &[Arc<[u8]>] {
        match clip {
            Clip::Greeting => &self.greeting,
            Clip::GreetingRest | Clip::Reply => &self.reply,
        }
    }

    pub(super) fn sound(&self, sound: VoicelessSound) -> &[Arc<[u8]>] {
        match sound {
            VoicelessSound::Clicks => &self.clicks,
            VoicelessSound::Music => &self.music,
            VoicelessSound::Noise => &self.noise,
        }
    }
}

/// Reads frames that are each preceded by their length, two bytes, big-endian.
fn frames(mut bytes: &[u8]) -> Vec<Arc<[u8]>> {
    let mut frames = Vec::new();
    while let [high, low, rest @ ..] = bytes {
        let (frame, rest) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        frames.push(Arc::from(frame));
        bytes = rest;
    }
    frames
}
