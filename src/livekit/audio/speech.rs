//! Hears speech in decoded sound, and says when an utterance began and ended. A plain state machine; it reads no clock and
//! knows no codec.
//!
//! Nothing on the wire says it as well: payload sizes mislead (silence at start-up is as long as speech), the server
//! forwards no audio levels, and its speaker updates come half a second late.

use tokio::time::Instant;

use crate::config::Speech;

/// Windows a second: each of 20 ms is judged.
pub(crate) const WINDOWS_PER_SECOND: u32 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpeechEvent {
    /// An utterance began; stamped at the arrival of its first frame.
    Started(Instant),
    /// It ended; stamped at the arrival of its last speech frame.
    Ended(Instant),
}

/// Sound that came at one time, mono; empty where what came carries none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PcmChunk<'a> {
    /// It goes on where the sound before it ended.
    pub(crate) follows: bool,
    pub(crate) pcm: &'a [i16],
}

/// Tells speech from silence in one track.
pub(crate) struct Detector {
    settings: Speech,
    /// Sum of squares above which a window is speech.
    threshold: f64,
    /// Samples of the window that is judged.
    window_size: usize,
    window: EnergyWindow,
    /// Consecutive windows of speech before an utterance counts, and the arrival of the first.
    run: Option<(u32, Instant)>,
    /// Arrival of the last speech frame; there is one while an utterance lasts.
    last_speech: Option<Instant>,
}

/// The 20 ms of sound being collected.
#[derive(Default)]
struct EnergyWindow {
    samples: usize,
    energy: f64,
    began: Option<Instant>,
}

impl Detector {
    /// `rate`: samples a second of the sound.
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
        }
    }

    pub(crate) fn on_sound(
        &mut self,
        at: Instant,
        sound: PcmChunk<'_>,
    ) -> impl Iterator<Item = SpeechEvent> + use<> {
        let ended = self.on_time(at);
        // What was lost or not sent isn't speech, so what is consecutive starts anew.
        if !sound.follows {
            self.window = EnergyWindow::default();
            self.run = None;
        }
        let mut started = None;
        let mut rest = sound.pcm;
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

    /// The end of an utterance is also a matter of time: a muted track and a killed agent send nothing.
    pub(crate) fn on_time(&mut self, now: Instant) -> Option<SpeechEvent> {
        let last = self.last_speech?;
        (now >= last + self.settings.end_silence).then(|| {
            self.last_speech = None;
            self.run = None;
            SpeechEvent::Ended(last)
        })
    }

    /// The native participant needs none: it asks each time it has listened.
    #[cfg(any(test, feature = "libwebrtc"))]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        Some(self.last_speech? + self.settings.end_silence)
    }

    /// The last frames may be the start of an utterance that isn't one yet.
    pub(crate) fn speech_pending(&self) -> bool {
        self.last_speech.is_none() && self.run.is_some()
    }

    fn judge(&mut self, at: Instant, speech: bool) -> Option<SpeechEvent> {
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
