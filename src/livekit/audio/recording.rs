//! What is kept of a call's audio: the Opus packets of both tracks, if the call is recorded, and the peak level of each track
//! over time.
//!
//! It reads no clock, decodes nothing and knows no file.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::rtp::RtpHeader;
use crate::livekit::event::Speaker;

/// A recording covers this much of a call.
pub(crate) const MAX_DURATION: Duration = Duration::from_mins(30);

/// The payload of one track that is kept: [`MAX_DURATION`] at 64 kbit/s.
const MAX_TRACK_BYTES: usize = 30 * 60 * 64_000 / 8;

/// The packets of one track that are kept: [`MAX_DURATION`] of 10 ms each.
const MAX_TRACK_PACKETS: usize = 30 * 60 * 100;

/// The time that one level covers at the start of a call.
const LEVEL_STEP: Duration = Duration::from_millis(100);

/// Levels of one track. A longer call has steps of twice the length: 10 min with 100 ms, 20 min with 200 ms.
const MAX_LEVELS: usize = 6_000;

/// A packet of one track, as it was received or sent.
#[derive(Debug, Clone)]
pub(crate) struct SoundPacket {
    /// When it arrived, or when it was due to be sent.
    pub(crate) at: Instant,
    pub(crate) header: RtpHeader,
    pub(crate) payload: Arc<[u8]>,
}

/// The audio of one call. It outlives a panic of the participant.
#[derive(Debug)]
pub(crate) struct CallSound {
    started: Option<Instant>,
    levels: CallLevels,
    /// `None` if the call is not recorded.
    packets: Option<CallPackets>,
}

/// Peak levels of both tracks from the same moment on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallLevels {
    /// The time that one level covers.
    pub(crate) step: Duration,
    /// Empty if nothing arrived.
    pub(crate) agent: Vec<u16>,
    /// Empty if nothing was sent.
    pub(crate) caller: Vec<u16>,
}

/// The packets of both tracks, in the order of their arrival.
#[derive(Debug, Default)]
pub(crate) struct CallPackets {
    pub(crate) agent: TrackPackets,
    pub(crate) caller: TrackPackets,
}

#[derive(Debug, Default)]
pub(crate) struct TrackPackets {
    pub(crate) list: Vec<SoundPacket>,
    bytes: usize,
}

impl CallSound {
    pub(crate) fn new(keeps_packets: bool) -> Self {
        Self {
            started: None,
            levels: CallLevels {
                step: LEVEL_STEP,
                agent: Vec::new(),
                caller: Vec::new(),
            },
            packets: keeps_packets.then(CallPackets::default),
        }
    }

    /// The canary joined at this time: the origin of both tracks.
    pub(crate) fn start(&mut self, at: Instant) {
        self.started.get_or_insert(at);
    }

    /// Keeps a packet, if the call is recorded. Packets may come in any order and more than once.
    pub(crate) fn on_packet(&mut self, track: Speaker, packet: impl FnOnce() -> SoundPacket) {
        let (Some(packets), Some(started)) = (&mut self.packets, self.started) else {
            return;
        };
        let kept = match track {
            Speaker::Agent => &mut packets.agent,
            Speaker::Caller => &mut packets.caller,
        };
        let packet = packet();
        let bytes = kept.bytes + packet.payload.len();
        if packet.at < started + MAX_DURATION
            && bytes <= MAX_TRACK_BYTES
            && kept.list.len() < MAX_TRACK_PACKETS
        {
            kept.bytes = bytes;
            kept.list.push(packet);
        }
    }

    /// Adds audio that begins at `at` and has this peak, the largest magnitude of a sample.
    pub(crate) fn on_level(&mut self, track: Speaker, at: Instant, length: Duration, peak: u16) {
        if let Some(started) = self.started {
            let from = at.saturating_duration_since(started);
            self.levels.add(track, from, length, peak);
        }
    }

    /// The origin, the levels, and the packets if the call was recorded; `None` if the canary did not join.
    pub(crate) fn into_parts(self) -> Option<(Instant, CallLevels, Option<CallPackets>)> {
        Some((self.started?, self.levels, self.packets))
    }
}

impl CallLevels {
    fn add(&mut self, track: Speaker, from: Duration, length: Duration, peak: u16) {
        let end = from + length.saturating_sub(Duration::from_nanos(1));
        let place = |at: Duration, step: Duration| {
            usize::try_from(at.as_nanos() / step.as_nanos()).unwrap_or(usize::MAX)
        };
        // A call lasts hours at most, so this ends after a few rounds.
        while place(end, self.step) >= MAX_LEVELS {
            self.step *= 2;
            for levels in [&mut self.agent, &mut self.caller] {
                *levels = levels
                    .chunks(2)
                    .map(|pair| pair.iter().copied().max().unwrap_or_default())
                    .collect();
            }
        }
        let levels = match track {
            Speaker::Agent => &mut self.agent,
            Speaker::Caller => &mut self.caller,
        };
        let (first, last) = (place(from, self.step), place(end, self.step));
        if levels.len() <= last {
            levels.resize(last + 1, 0);
        }
        for level in &mut levels[first..=last] {
            *level = peak.max(*level);
        }
    }
}

/// The largest magnitude of a sample; 0 without samples.
pub(crate) fn peak(pcm: &[i16]) -> u16 {
    let magnitudes = pcm.iter().map(|sample| sample.unsigned_abs());
    magnitudes.max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn packet(at: Instant, sequence: u64, bytes: usize) -> SoundPacket {
        SoundPacket {
            at,
            header: RtpHeader {
                ssrc: 1,
                sequence,
                timestamp: 0,
            },
            payload: vec![0; bytes].into(),
        }
    }

    #[test]
    fn level_counts_in_each_step_that_its_audio_touches() {
        let start = Instant::now();
        let mut sound = CallSound::new(false);
        // Before the join, there is no origin.
        sound.on_level(Speaker::Agent, start, ms(20), 9);
        sound.start(start);
        sound.on_level(Speaker::Agent, start + ms(80), ms(20), 5);
        sound.on_level(Speaker::Agent, start + ms(290), ms(20), 7);
        sound.on_level(Speaker::Agent, start + ms(310), ms(20), 3);
        let (at, levels, packets) = sound.into_parts().unwrap();
        assert_eq!((at, levels.step), (start, ms(100)));
        assert_eq!(levels.agent, [5, 0, 7, 7]);
        assert_eq!(levels.caller, [0; 0]);
        assert!(packets.is_none());
    }

    #[test]
    fn long_call_has_longer_steps_and_keeps_every_peak() {
        let start = Instant::now();
        let mut sound = CallSound::new(false);
        sound.start(start);
        sound.on_level(Speaker::Agent, start + ms(100), ms(20), 8);
        sound.on_level(Speaker::Caller, start + ms(599_980), ms(20), 2);
        let (_, levels, _) = sound.into_parts().unwrap();
        assert_eq!((levels.step, levels.caller.len()), (ms(100), MAX_LEVELS));

        let mut sound = CallSound::new(false);
        sound.start(start);
        sound.on_level(Speaker::Agent, start + ms(100), ms(20), 8);
        sound.on_level(Speaker::Caller, start + ms(600_000), ms(20), 2);
        // Three hours later, it is still bounded.
        sound.on_level(Speaker::Caller, start + ms(10_800_000), ms(20), 4);
        let (_, levels, _) = sound.into_parts().unwrap();
        assert_eq!(levels.step, ms(3_200));
        assert_eq!(levels.agent, [8]);
        assert!(levels.caller.len() <= MAX_LEVELS);
        assert_eq!(levels.caller.iter().filter(|level| **level > 0).count(), 2);
    }

    #[test]
    fn packets_are_kept_up_to_the_bounds_of_time_bytes_and_number() {
        let start = Instant::now();
        let kept = |bytes: usize, times: &mut dyn Iterator<Item = Instant>| {
            let mut sound = CallSound::new(true);
            sound.start(start);
            for (at, sequence) in times.zip(0..) {
                sound.on_packet(Speaker::Agent, || packet(at, sequence, bytes));
            }
            sound.into_parts().unwrap().2.unwrap().agent.list.len()
        };
        let minutes = (0..60).map(|minute| start + Duration::from_mins(minute));
        assert_eq!(kept(10, &mut { minutes }), 30);
        let many = std::iter::repeat_n(start, 200_000);
        assert_eq!(kept(1_000, &mut many.clone()), MAX_TRACK_BYTES / 1_000);
        assert_eq!(kept(1, &mut { many }), MAX_TRACK_PACKETS);
    }
}
