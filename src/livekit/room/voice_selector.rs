//! Which track carries the agent's voice: participants and tracks come to be known in any order, and an avatar can speak
//! before its agent is known. A plain state machine.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::roster::Roster;

/// `K` is an engine's own name for a track, `S` what it receives of one.
pub(crate) struct VoiceSelector<K, S> {
    selected: Option<VoiceTrack<K>>,
    /// What came of it before the agent was known, the newest.
    early: VecDeque<S>,
    max_early: usize,
}

/// A track that carries the agent's voice, or may.
struct VoiceTrack<K> {
    key: K,
    track_sid: String,
    since: Instant,
    /// It is the agent's, and was told to be there.
    announced: bool,
}

/// The agent's voice, where it had not been told of before.
pub(crate) struct SelectedVoice<S> {
    pub(crate) track_sid: String,
    pub(crate) since: Instant,
    pub(crate) early: VecDeque<S>,
}

impl<K, S> VoiceSelector<K, S> {
    /// `max_early`: how many are kept before the agent is known.
    pub(crate) fn new(max_early: usize) -> Self {
        Self {
            selected: None,
            early: VecDeque::new(),
            max_early,
        }
    }

    /// Settles which of the tracks that are there is the voice.
    pub(crate) fn select<'a>(
        &mut self,
        at: Instant,
        roster: &Roster,
        tracks: &(impl Iterator<Item = (K, &'a str)> + Clone),
    ) where
        K: Copy + PartialEq,
    {
        let stays = self.selected.as_ref().is_some_and(|voice| {
            let there = (voice.key, voice.track_sid.as_str());
            tracks.clone().any(|track| track == there)
                && roster.voice().any(|sid| sid == voice.track_sid)
        });
        if stays {
            return;
        }
        let found = roster
            .voice()
            .find_map(|voice| tracks.clone().find(|(_, sid)| *sid == voice));
        self.early.clear();
        self.selected = found.map(|(key, sid)| VoiceTrack {
            key,
            track_sid: sid.to_owned(),
            since: at,
            announced: false,
        });
    }

    /// Once: when the voice is there and the agent is known.
    pub(crate) fn announce(&mut self, roster: &Roster) -> Option<SelectedVoice<S>> {
        let voice = self.selected.as_mut().filter(|voice| !voice.announced)?;
        if !roster.knows_agent() {
            return None;
        }
        voice.announced = true;
        Some(SelectedVoice {
            track_sid: voice.track_sid.clone(),
            since: voice.since,
            early: std::mem::take(&mut self.early),
        })
    }

    /// The track to listen to.
    pub(crate) fn selected(&self) -> Option<K>
    where
        K: Copy,
    {
        self.selected.as_ref().map(|voice| voice.key)
    }

    /// Whether the voice is known to be the agent's.
    pub(crate) fn is_announced(&self) -> bool {
        self.selected.as_ref().is_some_and(|voice| voice.announced)
    }

    /// Gives back what is to be heard now, and keeps what came too early.
    pub(crate) fn admit_or_buffer(&mut self, sound: S) -> Option<S> {
        if self.is_announced() {
            return Some(sound);
        }
        if self.early.len() == self.max_early {
            self.early.pop_front();
        }
        self.early.push_back(sound);
        None
    }
}
