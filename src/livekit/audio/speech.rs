//! Detects speech in decoded audio and reports when an utterance starts and ends.
//!
//! A state machine that reads no clock and knows no codec. It works on samples because no other source is accurate: a
//! packet of start-up silence is as large as one of speech, the server forwards no audio levels to subscribers, and its
//! speaker updates are half a second late (measured on livekit-server 1.13.5).

use tokio::time::Instant;

use crate::config::Speech;

/// Windows of 20 ms: each is classified as speech or silence.
pub(crate) const WINDOWS_PER_SECOND: u32 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpeechEvent {
    /// An utterance started; the time is the arrival of its first window.
    Started(Instant),
    /// The utterance ended; the time is the arrival of its last window of speech.
    Ended(Instant),
}

/// The decoded mono samples of one packet or frame; empty if it carries no sound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PcmChunk<'a> {
    /// Nothing is missing between this chunk and the previous one.
    pub(crate) follows: bool,
    pub(crate) pcm: &'a [i16],
}

/// Detects the speech of one track.
pub(crate) struct Detector {
    settings: Speech,
    /// A window whose sum of squared samples is above this value is speech.
    threshold: f64,
    /// Samples of one window.
    window_size: usize,
    window: EnergyWindow,
    /// Consecutive windows of speech that are too few for an utterance yet, and the arrival of the first.
    run: Option<(u32, Instant)>,
    /// Arrival of the last window of speech; `Some` during an utterance.
    last_speech: Option<Instant>,
    /// The last window was speech.
    voiced: bool,
}

/// The window that is being collected.
#[derive(Default)]
struct EnergyWindow {
    samples: usize,
    energy: f64,
    began: Option<Instant>,
}

impl Detector {
    /// `rate`: sampling rate of the audio in Hz.
    pub(crate) fn new(settings: Speech, rate: u32) -> Self {
        let level = 10_f64.powf(f64::from(settings.threshold_dbfs) / 20.0) * 32_768.0;
        let window_size = rate / WINDOWS_PER_SECOND;
        Self {
            settings,
            threshold: level * level * f64::from(window_size),
            window_size: window_size as usize,
            window: EnergyWindow::default(),
            run: None,
            last_speech: None,
            voiced: false,
        }
    }

    /// Takes the audio that arrived at `at`; returns the end of the previous utterance, the start of a new one, or
    /// both.
    pub(crate) fn on_sound(
        &mut self,
        at: Instant,
        sound: PcmChunk<'_>,
    ) -> impl Iterator<Item = SpeechEvent> + use<> {
        let ended = self.on_time(at);
        // Lost and unsent audio is not speech, so it interrupts a run of consecutive windows.
        if !sound.follows {
            self.window = EnergyWindow::default();
            self.run = None;
        }
        let mut started = None;
        let mut rest = sound.pcm;
        // Packets last 2.5 to 120 ms, so a window may span two of them.
        while !rest.is_empty() {
            let taken = rest.len().min(self.window_size - self.window.samples);
            let (part, after) = rest.split_at(taken);
            rest = after;
            let began = *self.window.began.get_or_insert(at);
            self.window.samples += taken;
            self.window.energy += energy(part);
            if self.window.samples == self.window_size {
                let speech = self.window.energy > self.threshold;
                self.window = EnergyWindow::default();
                started = started.or(self.judge(began, speech));
            }
        }
        [ended, started].into_iter().flatten()
    }

    /// Returns the end of the utterance if the end silence has passed.
    ///
    /// Packets alone cannot show it: a muted track and a killed agent send none.
    pub(crate) fn on_time(&mut self, now: Instant) -> Option<SpeechEvent> {
        let last = self.last_speech?;
        (now >= last + self.settings.end_silence).then(|| {
            self.last_speech = None;
            self.run = None;
            SpeechEvent::Ended(last)
        })
    }

    /// When [`on_time`](Self::on_time) returns the end of the utterance. The native engine needs no deadline: it calls
    /// `on_time` after each read.
    #[cfg(any(test, feature = "libwebrtc"))]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        Some(self.last_speech? + self.settings.end_silence)
    }

    /// Whether the last windows were speech, but too few to report the start of an utterance.
    pub(crate) fn speech_pending(&self) -> bool {
        self.last_speech.is_none() && self.run.is_some()
    }

    /// Whether the last window was speech.
    pub(crate) fn is_voiced(&self) -> bool {
        self.voiced
    }

    fn judge(&mut self, at: Instant, speech: bool) -> Option<SpeechEvent> {
        self.voiced = speech;
        if !speech {
            self.run = None;
            return None;
        }
        if self.last_speech.is_some() {
            self.last_speech = Some(at);
            return None;
        }
        let (frames, first) = self.run.unwrap_or((0, at));
        if frames + 1 < self.settings.min_frames {
            self.run = Some((frames + 1, first));
            return None;
        }
        self.run = None;
        self.last_speech = Some(at);
        Some(SpeechEvent::Started(first))
    }
}

fn energy(pcm: &[i16]) -> f64 {
    pcm.iter().map(|&sample| f64::from(sample).powi(2)).sum()
}

#[cfg(test)]
mod tests;
