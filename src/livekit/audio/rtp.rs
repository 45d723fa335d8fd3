//! Statistics of a received RTP stream (loss, jitter) and one continuous media clock across changes of SSRC.
//!
//! It knows packet headers; it knows no codec and no room.

use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::event::AudioStats;

/// RTP clock rate of Opus in Hz, the same for every coded bandwidth (RFC 7587, section 4.1).
pub(crate) const CLOCK_RATE: u32 = 48_000;

/// How far a step of the sender's timestamps may differ from the step of the arrival times. A larger difference means
/// that the sender has changed its clock.
const CLOCK_JUMP: Duration = Duration::from_secs(5);

/// Converts a duration to RTP ticks.
pub(crate) fn ticks(span: Duration) -> u64 {
    // In two parts: nanoseconds times the clock rate would overflow after four days.
    let whole = span.as_secs().saturating_mul(u64::from(CLOCK_RATE));
    whole + u64::from(span.subsec_nanos()) * u64::from(CLOCK_RATE) / 1_000_000_000
}

/// Converts RTP ticks to a duration.
pub(crate) fn span(ticks: u64) -> Duration {
    let rate = u64::from(CLOCK_RATE);
    Duration::from_secs(ticks / rate) + Duration::from_nanos(ticks % rate * 1_000_000_000 / rate)
}

/// The header fields of one packet that the receiver needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RtpHeader {
    pub(crate) ssrc: u32,
    /// Extended by the number of wraps, so it does not wrap at 2^16.
    pub(crate) sequence: u64,
    /// In RTP ticks; wraps at 2^32.
    pub(crate) timestamp: u32,
}

/// The position of a packet on the receiver's own media clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MediaPosition {
    /// Ticks since the first packet; strictly increasing.
    pub(crate) time: u64,
    /// No packet is missing between this one and the one before.
    pub(crate) follows: bool,
}

/// Counts the packets of one track and places them on one media clock.
#[derive(Debug, Default)]
pub(crate) struct RtpReceiver {
    stream: Option<RtpStream>,
    /// Packets lost in the streams before the current one.
    lost_before: u64,
    packets: u64,
    /// Interarrival jitter in ticks (RFC 3550, section 6.4.1).
    jitter: f64,
    /// Whether `jitter` has a value: it needs two packets of one stream.
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
    /// Records one packet and returns its position.
    ///
    /// Returns `None` for a packet that is late or a duplicate. It is counted, but a later packet has been played
    /// already.
    pub(crate) fn on_packet(&mut self, at: Instant, header: RtpHeader) -> Option<MediaPosition> {
        self.packets += 1;
        // Another SSRC is another stream, whose numbers and timestamps start at random values (RFC 3550, section 5.1).
        let Some(stream) = self.stream.as_mut().filter(|it| it.ssrc == header.ssrc) else {
            return Some(self.begin(at, header));
        };
        stream.received += 1;
        if header.sequence <= stream.highest {
            return None;
        }
        let follows = header.sequence == stream.highest + 1;
        let elapsed = at.saturating_duration_since(stream.arrived);
        let forward = u64::from(header.timestamp.wrapping_sub(stream.timestamp));
        // A timestamp that goes back wraps to a huge `forward` and counts as a jump, too.
        let jumped = forward.abs_diff(ticks(elapsed)) > ticks(CLOCK_JUMP);
        if jumped || forward == 0 {
            // The sender's clock is of no use here: the arrival time decides. At least one tick, so that positions
            // increase.
            stream.time += ticks(elapsed).max(1);
        } else {
            stream.time += forward;
            let difference = ticks(elapsed).abs_diff(forward);
            self.jitter += (to_f64(difference) - self.jitter) / 16.0;
            self.measured = true;
        }
        stream.highest = header.sequence;
        stream.timestamp = header.timestamp;
        stream.arrived = at;
        Some(MediaPosition {
            time: stream.time,
            follows,
        })
    }

    /// Starts a new stream. Its timestamps have no relation to the previous one, so the arrival times bridge the two.
    fn begin(&mut self, at: Instant, header: RtpHeader) -> MediaPosition {
        let time = self.stream.as_ref().map_or(0, |before| {
            let pause = at.saturating_duration_since(before.arrived);
            before.time + ticks(pause).max(1)
        });
        self.lost_before += self.stream.as_ref().map_or(0, RtpStream::lost);
        self.stream = Some(RtpStream {
            ssrc: header.ssrc,
            first: header.sequence,
            highest: header.sequence,
            received: 1,
            timestamp: header.timestamp,
            arrived: at,
            time,
        });
        MediaPosition {
            time,
            follows: false,
        }
    }

    /// The statistics of all streams so far. The jitter is `None` before the second packet.
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
    /// Packets that never arrived. A duplicate hides one lost packet, as in RFC 3550, appendix A.3.
    fn lost(&self) -> u64 {
        (self.highest - self.first + 1).saturating_sub(self.received)
    }
}

/// Exact, because differences stay below [`CLOCK_JUMP`].
#[expect(clippy::cast_precision_loss, reason = "bounded by CLOCK_JUMP in ticks")]
fn to_f64(ticks: u64) -> f64 {
    ticks as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(ssrc: u32, sequence: u64, timestamp: u32) -> RtpHeader {
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
    fn ticks_and_durations_convert_both_ways() {
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
            let position = receiver.on_packet(at, header(1, 7 + u64::from(i), 960 * i));
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
    fn missing_packet_counts_as_lost_until_it_arrives_late() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, header(1, 10, 0));
        let after_gap = receiver.on_packet(start + ms(60), header(1, 13, 2880));
        assert!(after_gap.is_some_and(|position| !position.follows));
        assert_eq!(receiver.stats().lost, 2);
        assert_eq!(
            receiver.on_packet(start + ms(61), header(1, 12, 1920)),
            None
        );
        assert_eq!(receiver.stats().lost, 1);
        assert_eq!(receiver.stats().packets, 3);
    }

    #[test]
    fn jitter_follows_the_formula_of_rfc_3550() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, header(1, 0, 0));
        // The second packet is 16 ms late and the third is on time: |D| is 768 ticks twice.
        receiver.on_packet(start + ms(36), header(1, 1, 960));
        receiver.on_packet(start + ms(40), header(1, 2, 1920));
        let expected = 48.0 + (768.0 - 48.0) / 16.0;
        let jitter = receiver.stats().jitter.unwrap().as_secs_f64() * 48_000.0;
        assert!((jitter - expected).abs() < 0.01, "{jitter}");
    }

    #[test]
    fn clock_and_loss_continue_across_a_change_of_ssrc() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, header(1, 5, 4_000_000_000));
        receiver.on_packet(start + ms(40), header(1, 7, 4_000_001_920));
        let position = receiver.on_packet(start + ms(60), header(2, 900, 17));
        let expected = MediaPosition {
            time: 2880,
            follows: false,
        };
        assert_eq!(position, Some(expected));
        assert_eq!(receiver.stats().lost, 1);
    }

    #[test]
    fn wrap_of_the_timestamp_does_not_move_the_clock() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, header(1, 0, u32::MAX - 479));
        let position = receiver.on_packet(start + ms(20), header(1, 1, 480));
        assert_eq!(position.map(|position| position.time), Some(960));
    }

    #[test]
    fn clock_increases_if_the_senders_clock_jumps_or_stands_still() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        let mut last = None;
        for (i, timestamp) in [5, 5, 3_000_000_000, 0, 960].into_iter().enumerate() {
            let at = start + ms(20) * u32::try_from(i).unwrap();
            let time = receiver
                .on_packet(at, header(1, i as u64, timestamp))
                .unwrap()
                .time;
            assert!(last.is_none_or(|last| time > last && time < last + 2000));
            last = Some(time);
        }
    }

    #[test]
    fn pause_of_the_sender_stays_on_the_clock() {
        let start = Instant::now();
        let mut receiver = RtpReceiver::default();
        receiver.on_packet(start, header(1, 0, 0));
        let position = receiver.on_packet(start + ms(20_000), header(1, 1, 960_000));
        let expected = MediaPosition {
            time: 960_000,
            follows: true,
        };
        assert_eq!(position, Some(expected));
    }
}
