//! Places the packets of one track on the call's time line.
//!
//! The RTP timestamps say how far packets are apart; the arrival times say where the whole lies. What is lost, or was never
//! sent, leaves a gap. Reordered packets are put in order, and duplicates are dropped.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use crate::livekit::audio::opus;
use crate::livekit::audio::recording::SoundPacket;
use crate::livekit::audio::rtp;

/// A step of the timestamps that exceeds the step of the arrival times by this much is a jump of the sender's clock: 200 ms.
/// Congestion looks alike after a pause, but a jump only means that the arrival times decide again.
const CLOCK_JUMP: i64 = rtp::CLOCK_RATE as i64 / 5;

/// The path's shortest delay is that of the fastest of this many packets, a second of usual ones. So a packet that comes late,
/// alone or with others, changes no position.
const FASTEST_OF: usize = 50;

/// The last packets of a part are too few to tell the shortest delay, so that of this many decides for them.
const FEWEST: usize = 10;

/// How much later than their position packets may arrive, while the fastest of them decides: 20 ms. Beyond that, the sender
/// has paused without a step of its timestamps, as libwebrtc does.
const MAX_LATE: i64 = rtp::CLOCK_RATE as i64 / 50;

/// The same for packets that arrive before their position, which is impossible: 5 ms, for inexact clocks.
const MAX_EARLY: i64 = rtp::CLOCK_RATE as i64 / 200;

/// Times are RTP ticks since the start of the recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlacedPacket {
    pub(super) start: i64,
    pub(super) length: i64,
    pub(super) payload: Arc<[u8]>,
}

/// A packet with its times in ticks.
struct Timed {
    sequence: u64,
    timestamp: u32,
    /// Since the start of the recording. After [`by_sequence`], not later than that of any later packet.
    arrived: i64,
    payload: Arc<[u8]>,
}

/// The packets in their order, none of which overlaps another. Malformed ones are left out, as if they were lost: a player
/// may refuse a file for one of them.
pub(super) fn place(packets: Vec<SoundPacket>, started: Instant) -> Vec<PlacedPacket> {
    let mut placed: Vec<PlacedPacket> = Vec::with_capacity(packets.len());
    let mut end = 0;
    for stream in streams(packets, started) {
        let stream = by_sequence(stream);
        for part in parts(&stream) {
            for (packet, start) in part.iter().zip(positions(part)) {
                let length = ticks(opus::duration(&packet.payload));
                // After a correction towards an earlier time, packets overlap. Moving them all would shift the rest, so one
                // that mostly overlaps goes.
                if start + length / 2 < end {
                    continue;
                }
                let start = start.max(end);
                end = start + length;
                placed.push(PlacedPacket {
                    start,
                    length,
                    payload: Arc::clone(&packet.payload),
                });
            }
        }
    }
    placed
}

pub(super) fn ticks(span: std::time::Duration) -> i64 {
    i64::try_from(rtp::ticks(span)).unwrap_or(i64::MAX)
}

/// The packets of each SSRC. The last packets of one may arrive after the first of the next.
fn streams(packets: Vec<SoundPacket>, started: Instant) -> Vec<Vec<Timed>> {
    let mut streams: Vec<(u32, Vec<Timed>)> = Vec::new();
    for packet in packets {
        if !opus::is_well_formed(&packet.payload) {
            continue;
        }
        let timed = Timed {
            sequence: packet.header.sequence,
            timestamp: packet.header.timestamp,
            arrived: ticks(packet.at.saturating_duration_since(started)),
            payload: packet.payload,
        };
        let ssrc = packet.header.ssrc;
        let mut latest = streams.iter_mut().rev().take(2);
        match latest.find(|(known, _)| *known == ssrc) {
            Some((_, stream)) => stream.push(timed),
            None => streams.push((ssrc, vec![timed])),
        }
    }
    streams.into_iter().map(|(_, stream)| stream).collect()
}

/// Sorts, drops duplicates, and corrects the arrival of packets that were overtaken: they were due before those.
fn by_sequence(mut stream: Vec<Timed>) -> Vec<Timed> {
    stream.sort_by_key(|packet| packet.sequence);
    stream.dedup_by_key(|packet| packet.sequence);
    let mut earliest = i64::MAX;
    for packet in stream.iter_mut().rev() {
        earliest = earliest.min(packet.arrived);
        packet.arrived = earliest;
    }
    stream
}

/// Splits a stream at each jump of its timestamps.
fn parts(stream: &[Timed]) -> impl Iterator<Item = &[Timed]> {
    stream.chunk_by(|before, after| {
        let step = step(before, after);
        step > 0 && step - (after.arrived - before.arrived) <= CLOCK_JUMP
    })
}

/// The step of the timestamps, which wrap.
fn step(before: &Timed, after: &Timed) -> i64 {
    i64::from(after.timestamp.wrapping_sub(before.timestamp).cast_signed())
}

/// The position of each packet of a part.
fn positions(part: &[Timed]) -> Vec<i64> {
    let mut times = Vec::with_capacity(part.len());
    let mut time = 0;
    for (place, packet) in part.iter().enumerate() {
        if place > 0 {
            time += step(&part[place - 1], packet);
        }
        times.push(time);
    }
    let delays: Vec<i64> = part
        .iter()
        .zip(&times)
        .map(|(packet, time)| packet.arrived - time)
        .collect();
    let mut offset = None;
    let shortest = shortest_ahead(&delays).into_iter();
    times
        .into_iter()
        .zip(shortest)
        .map(|(time, shortest)| {
            let anchor = offset.get_or_insert(shortest);
            if shortest > *anchor + MAX_LATE || shortest < *anchor - MAX_EARLY {
                *anchor = shortest;
            }
            (time + *anchor).max(0)
        })
        .collect()
}

/// The smallest of each value and the [`FASTEST_OF`] - 1 after it, and for the last ones that of [`FEWEST`].
fn shortest_ahead(delays: &[i64]) -> Vec<i64> {
    // Places whose values increase: each is the smallest of those before the next.
    let mut window: VecDeque<usize> = VecDeque::new();
    let mut shortest = vec![0; delays.len()];
    for place in (0..delays.len()).rev() {
        while window
            .front()
            .is_some_and(|later| delays[*later] >= delays[place])
        {
            window.pop_front();
        }
        window.push_front(place);
        while window
            .back()
            .is_some_and(|last| *last >= place + FASTEST_OF)
        {
            window.pop_back();
        }
        shortest[place] = window.back().map_or(0, |place| delays[*place]);
    }
    let last = delays.len().saturating_sub(FEWEST);
    let at_the_end = shortest.get(last).copied().unwrap_or(0);
    for value in shortest.iter_mut().skip(last) {
        *value = at_the_end;
    }
    shortest
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::livekit::audio::opus::SILENCE;
    use crate::livekit::audio::rtp::RtpHeader;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    struct Stream {
        start: Instant,
        packets: Vec<SoundPacket>,
    }

    impl Stream {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                packets: Vec::new(),
            }
        }

        /// A packet that arrives this many milliseconds after the start.
        fn add(&mut self, at: u64, ssrc: u32, sequence: u64, timestamp: u32) {
            self.packets.push(SoundPacket {
                at: self.start + ms(at),
                header: RtpHeader {
                    ssrc,
                    sequence,
                    timestamp,
                },
                payload: SILENCE.into(),
            });
        }

        /// The starts in milliseconds.
        fn placed(self) -> Vec<i64> {
            let placed = place(self.packets, self.start);
            for pair in placed.windows(2) {
                assert!(
                    pair[0].start + pair[0].length <= pair[1].start,
                    "{placed:?}"
                );
            }
            placed.iter().map(|packet| packet.start / 48).collect()
        }
    }

    #[test]
    fn timestamps_place_packets_and_lost_ones_leave_gaps() {
        let mut stream = Stream::new();
        for number in [0, 1, 2, 5, 6, 30] {
            // Each arrives later than it should by a different time.
            let late = number * 7 % 5;
            let timestamp = u32::try_from(number * 960).unwrap();
            stream.add(100 + number * 20 + late, 1, 70 + number, timestamp);
        }
        assert_eq!(stream.placed(), [100, 120, 140, 200, 220, 700]);
    }

    #[test]
    fn reordered_packets_are_put_in_order_and_duplicates_are_dropped() {
        let mut stream = Stream::new();
        // The last arrives three seconds late, in the middle of others.
        for (at, number) in [
            (0, 0),
            (40, 2),
            (41, 1),
            (42, 2),
            (80, 4),
            (100, 5),
            (3_000, 3),
        ] {
            stream.add(at, 1, 10 + number, u32::try_from(number * 960).unwrap());
        }
        assert_eq!(stream.placed(), [0, 20, 40, 60, 80, 100]);
    }

    #[test]
    fn congestion_delays_no_packet() {
        let mut stream = Stream::new();
        for number in 0..200 {
            // The path is blocked from 1 s to 1.4 s, and the very first packet is late, too.
            let at = match number {
                0 => 60,
                50..70 => 1_400,
                number => number * 20,
            };
            stream.add(at, 1, number, u32::try_from(number * 960).unwrap());
        }
        let expected: Vec<i64> = (0..200).map(|number| number * 20).collect();
        assert_eq!(stream.placed(), expected);
    }

    #[test]
    fn pause_without_a_step_of_the_timestamps_is_a_gap() {
        let mut stream = Stream::new();
        for number in 0..100 {
            let pause = if number < 40 { 0 } else { 2_500 };
            stream.add(
                number * 20 + pause,
                1,
                number,
                u32::try_from(number * 960).unwrap(),
            );
        }
        let placed = stream.placed();
        assert_eq!((placed[39], placed[40]), (780, 3_300));
        assert_eq!(placed[99], 4_480);
    }

    #[test]
    fn jump_of_the_timestamps_moves_nothing() {
        // Far ahead, back, a little ahead, and across the wrap.
        for jump in [1_000_000_000, u32::MAX - 100_000, 48_000, u32::MAX - 30_000] {
            let mut stream = Stream::new();
            for number in 0..100_u32 {
                let jumped = if number < 50 { 0 } else { jump };
                let timestamp = (number * 960).wrapping_add(jumped);
                stream.add(u64::from(number) * 20, 1, number.into(), timestamp);
            }
            let expected: Vec<i64> = (0..100).map(|number| number * 20).collect();
            assert_eq!(stream.placed(), expected, "{jump}");
        }
        let mut wrapping = Stream::new();
        for number in 0..10_u32 {
            let timestamp = (u32::MAX - 3_000).wrapping_add(number * 960);
            wrapping.add(u64::from(number) * 20, 1, number.into(), timestamp);
        }
        assert_eq!(wrapping.placed().last(), Some(&180));
    }

    #[test]
    fn next_stream_continues_by_its_arrival() {
        let mut stream = Stream::new();
        for number in 0..10 {
            stream.add(
                number * 20,
                1,
                500 + number,
                u32::try_from(number * 960).unwrap(),
            );
        }
        stream.add(218, 2, 3, 77);
        // The last packet of the first stream is overtaken.
        stream.add(219, 1, 510, 9_600);
        stream.add(238, 2, 4, 77 + 960);
        stream.add(1_238, 2, 5, 77 + 51 * 960);
        let placed = stream.placed();
        assert_eq!(placed[9..], [180, 200, 220, 240, 1_238]);
    }

    #[test]
    fn drift_of_the_senders_clock_is_followed_in_small_steps() {
        // One in a thousand too fast, and too slow: 600 ms in ten minutes.
        for drift in [-1_i64, 1] {
            let mut stream = Stream::new();
            for number in 0..30_000_i64 {
                let at = number * 20 + drift * number / 50;
                let timestamp = u32::try_from(number * 960).unwrap();
                stream.add(at.unsigned_abs(), 1, number.unsigned_abs(), timestamp);
            }
            let placed = place(stream.packets, stream.start);
            let last = placed.last().unwrap();
            let arrived = (29_999 * 20 + drift * 29_999 / 50) * 48;
            assert!((last.start - arrived).abs() <= 25 * 48, "{}", last.start);
            assert!(placed.len() > 29_950, "{}", placed.len());
        }
    }

    #[test]
    fn malformed_packet_counts_as_lost() {
        let mut stream = Stream::new();
        for number in 0..3_u32 {
            stream.add(u64::from(number) * 20, 1, number.into(), number * 960);
        }
        // It announces zero frames.
        stream.packets[1].payload = [3, 0, 1, 2].into();
        assert_eq!(stream.placed(), [0, 40]);
    }

    #[test]
    fn flood_of_arbitrary_packets_is_placed_within_bounds() {
        let mut random = fastrand::Rng::with_seed(11);
        let mut stream = Stream::new();
        for _ in 0..20_000 {
            let at = random.u64(..60_000);
            stream.add(at, random.u32(..3), random.u64(..), random.u32(..));
        }
        stream.packets.sort_by_key(|packet| packet.at);
        let placed = stream.placed();
        assert!(placed.iter().all(|start| *start >= 0));
        // Audio of 20 ms each can't take more than all of it together after the last arrival.
        let last = placed.last().unwrap();
        assert!(*last <= 60_000 + 20_000 * 20, "{last}");
    }
}
