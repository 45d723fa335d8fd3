//! The agent's RTP as numbers: loss and jitter, and one unbroken media clock across changes of SSRC. It knows packets;
//! it knows no codec and no room.

use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::event::AudioStats;

/// Ticks a second of Opus over RTP, whatever the coded bandwidth (RFC 7587, 4.1).
pub(crate) const CLOCK_RATE: u32 = 48_000;

/// Beyond this, a step of the sender's timestamps that the arrival times don't share is a new clock, not a pause.
const CLOCK_JUMP: Duration = Duration::from_secs(5);

/// RTP ticks in `span`.
pub(crate) fn ticks(span: Duration) -> u64 {
    let whole = span.as_secs().saturating_mul(u64::from(CLOCK_RATE));
    whole + u64::from(span.subsec_nanos()) * u64::from(CLOCK_RATE) / 1_000_000_000
}

/// The time that `ticks` of the RTP clock take.
pub(crate) fn span(ticks: u64) -> Duration {
    let rate = u64::from(CLOCK_RATE);
    Duration::from_secs(ticks / rate) + Duration::from_nanos(ticks % rate * 1_000_000_000 / rate)
}

/// The head of one packet, with the extended sequence number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RtpHeader {
    pub(crate) ssrc: u32,
    pub(crate) sequence: u64,
    pub(crate) timestamp: u32,
}

/// Where a packet stands on the receiver's own media clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MediaPosition {
    /// Ticks since the first packet; strictly rising.
    pub(crate) time: u64,
    /// No packet is missing between this one and the one before.
    pub(crate) follows: bool,
}

/// Counts one track's packets and lays them out on one clock.
#[derive(Debug, Default)]
pub(crate) struct RtpReceiver {
    stream: Option<RtpStream>,
    /// Loss of the streams before the current one.
    lost_before: u64,
    packets: u64,
    /// In ticks; RFC 3550, 6.4.1.
    jitter: f64,
    measured: bool,
}

#[derive(Debug)]
struct RtpStream {
    ssrc: u32,
    first: u64,
    highest: u64,
    received: u64,
    timestamp: u32,
    arrived: Instant,
    time: u64,
}

impl RtpReceiver {
    /// Takes one packet in. `None` for one that comes late or twice: it counts, but its moment has passed.
    pub(crate) fn on_packet(&mut self, at: Instant, head: RtpHeader) -> Option<MediaPosition> {
        self.packets += 1;
        let Some(stream) = self.stream.as_mut().filter(|it| it.ssrc == head.ssrc) else {
            return Some(self.begin(at, head));
        };
        stream.received += 1;
        if head.sequence <= stream.highest {
            return None;
        }
        let follows = head.sequence == stream.highest + 1;
        let elapsed = at.saturating_duration_since(stream.arrived);
        let forward = u64::from(head.timestamp.wrapping_sub(stream.timestamp));
        let jumped = forward.abs_diff(ticks(elapsed)) > ticks(CLOCK_JUMP);
        if jumped || forward == 0 {
            stream.time += ticks(elapsed).max(1);
        } else {
            stream.time += forward;
            let difference = ticks(elapsed).abs_diff(forward);
            self.jitter += (to_f64(difference) - self.jitter) / 16.0;
            self.measured = true;
        }
        stream.highest = head.sequence;
        stream.timestamp = head.timestamp;
        stream.arrived = at;
        Some(MediaPosition {
            time: stream.time,
            follows,
        })
    }

    /// The sender's clock and numbers start anew with a new SSRC; ours go on by the arrival times.
    fn begin(&mut self, at: Instant, head: RtpHeader) -> MediaPosition {
        let time = self.stream.as_ref().map_or(0, |before| {
            let pause = at.saturating_duration_since(before.arrived);
            before.time + ticks(pause).max(1)
        });
        self.lost_before += self.stream.as_ref().map_or(0, RtpStream::lost);
        self.stream = Some(RtpStream {
            ssrc: head.ssrc,
            first: head.sequence,
            highest: head.sequence,
            received: 1,
            timestamp: head.timestamp,
            arrived: at,
            time,
        });
        MediaPosition {
            time,
            follows: false,
        }
    }

    pub(crate) fn stats(&self) -> AudioStats {
        AudioStats {
            packets: self.packets,
            lost: self.lost_before + self.stream.as_ref().map_or(0, RtpStream::lost),
            jitter: self
                .measured
                .then(|| Duration::from_secs_f64(self.jitter / f64::from(CLOCK_RATE))),
        }
    }
}

impl RtpStream {
    /// Packets that never came; a duplicate hides one lost packet, as in RFC 3550, A.3.
    fn lost(&self) -> u64 {
        (self.highest - self.first + 1).saturating_sub(self.received)
    }
}

/// Differences stay below [`CLOCK_JUMP`], far inside what an `f64` holds exactly.
#[expect(clippy::cast_precision_loss, reason = "bounded by CLOCK_JUMP in ticks")]
fn to_f64(ticks: u64) -> f64 {
    ticks as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(ssrc: u32, sequence: u64, timestamp: u32) -> RtpHeader {
        RtpHeader {
            ssrc,
            sequence,
            timestamp,
        }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn ticks_and_spans_agree() {
        for millis in [0, 20, 60, 999, 1000, 30_000] {
            assert_eq!(span(ticks(ms(millis))), ms(millis));
        }
    }

    #[test]
    fn steady_packets_have_no_loss_and_no_jitter() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        for i in 0..50_u32 {
            let at = start + ms(20) * i;
            let position = receiver.on_packet(at, head(1, 7 + u64::from(i), 960 * i));
            assert_eq!(
                position,
                Some(MediaPosition {
                    time: u64::from(960 * i),
                    follows: i > 0
                })
            );
        }
        let expected = AudioStats {
            packets: 50,
            lost: 0,
            jitter: Some(Duration::ZERO),
        };
        assert_eq!(receiver.stats(), expected);
    }

    #[test]
    fn gap_is_lost_until_the_late_packet_comes() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, head(1, 10, 0));
        let after_gap = receiver.on_packet(start + ms(60), head(1, 13, 2880));
        assert!(after_gap.is_some_and(|position| !position.follows));
        assert_eq!(receiver.stats().lost, 2);
        assert_eq!(receiver.on_packet(start + ms(61), head(1, 12, 1920)), None);
        assert_eq!(receiver.stats().lost, 1);
        assert_eq!(receiver.stats().packets, 3);
    }

    #[test]
    fn jitter_follows_the_formula_of_rfc_3550() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, head(1, 0, 0));
        // 16 ms late, then in step again: |D| = 768 ticks twice.
        receiver.on_packet(start + ms(36), head(1, 1, 960));
        receiver.on_packet(start + ms(40), head(1, 2, 1920));
        let expected = 48.0 + (768.0 - 48.0) / 16.0;
        let jitter = receiver.stats().jitter.unwrap().as_secs_f64() * 48_000.0;
        assert!((jitter - expected).abs() < 0.01, "{jitter}");
    }

    #[test]
    fn clock_goes_on_across_a_change_of_ssrc_and_the_loss_before_it_stays() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, head(1, 5, 4_000_000_000));
        receiver.on_packet(start + ms(40), head(1, 7, 4_000_001_920));
        let position = receiver.on_packet(start + ms(60), head(2, 900, 17));
        let expected = MediaPosition {
            time: 2880,
            follows: false,
        };
        assert_eq!(position, Some(expected));
        assert_eq!(receiver.stats().lost, 1);
    }

    #[test]
    fn timestamp_wraps_without_a_step() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, head(1, 0, u32::MAX - 479));
        let position = receiver.on_packet(start + ms(20), head(1, 1, 480));
        assert_eq!(position.map(|position| position.time), Some(960));
    }

    #[test]
    fn senders_clock_that_jumps_or_stands_still_never_turns_ours_back() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        let mut last = None;
        for (i, timestamp) in [5, 5, 3_000_000_000, 0, 960].into_iter().enumerate() {
            let at = start + ms(20) * u32::try_from(i).unwrap();
            let time = receiver
                .on_packet(at, head(1, i as u64, timestamp))
                .unwrap()
                .time;
            assert!(last.is_none_or(|last| time > last && time < last + 2000));
            last = Some(time);
        }
    }

    #[test]
    fn pause_of_the_sender_is_kept() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, head(1, 0, 0));
        let position = receiver.on_packet(start + ms(20_000), head(1, 1, 960_000));
        let expected = MediaPosition {
            time: 960_000,
            follows: true,
        };
        assert_eq!(position, Some(expected));
    }
}
