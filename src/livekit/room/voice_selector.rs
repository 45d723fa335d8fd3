//! Selects the track that carries the agent's voice. Participants and tracks become known in any order, and an avatar can
//! speak before its agent is known; its audio is buffered until then. A plain state machine.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::roster::Roster;

/// `K` identifies a track within an engine; `S` is the unit of audio that the engine receives.
pub(crate) struct VoiceSelector<K, S> {
    selected: Option<VoiceTrack<K>>,
    /// The newest audio that arrived before the agent was known.
    early: VecDeque<S>,
    max_early: usize,
}

/// A track that carries the agent's voice, or may carry it while the agent is not known yet.
struct VoiceTrack<K> {
    key: K,
    track_sid: String,
    since: Instant,
    /// Whether the track is known to be the agent's and was reported.
    announced: bool,
}

/// The agent's voice, when it is reported for the first time.
pub(crate) struct SelectedVoice<S> {
    pub(crate) track_sid: String,
    pub(crate) since: Instant,
    pub(crate) early: VecDeque<S>,
}

impl<K, S> VoiceSelector<K, S> {
    /// `max_early` is how many units of audio are buffered before the agent is known.
    pub(crate) fn new(max_early: usize) -> Self {
        Self {
            selected: None,
            early: VecDeque::new(),
            max_early,
        }
    }

    /// Selects the voice among `tracks`, the tracks that exist now. The current one stays selected as long as it is valid.
    pub(crate) fn select<'a>(
        &mut self,
        at: Instant,
        roster: &Roster,
        tracks: &(impl Iterator<Item = (K, &'a str)> + Clone),
    ) where
        K: Copy + PartialEq,
    {
        let is_valid = self.selected.as_ref().is_some_and(|voice| {
            let current = (voice.key, voice.track_sid.as_str());
            tracks.clone().any(|track| track == current)
                && roster.voice().any(|sid| sid == voice.track_sid)
        });
        if is_valid {
            return;
        }
        let found = roster
            .voice()
            .find_map(|voice| tracks.clone().find(|(_, sid)| *sid == voice));
        // What is buffered belongs to the previous track.
        self.early.clear();
        self.selected = found.map(|(key, sid)| VoiceTrack {
            key,
            track_sid: sid.to_owned(),
            since: at,
            announced: false,
        });
    }

    /// Returns the voice once, as soon as it is selected and the agent is known.
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

    /// The selected track.
    pub(crate) fn selected(&self) -> Option<K>
    where
        K: Copy,
    {
        self.selected.as_ref().map(|voice| voice.key)
    }

    /// Whether the selected track is known to be the agent's.
    pub(crate) fn is_announced(&self) -> bool {
        self.selected.as_ref().is_some_and(|voice| voice.announced)
    }

    /// Returns the audio if the track is known to be the agent's; otherwise buffers it.
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
