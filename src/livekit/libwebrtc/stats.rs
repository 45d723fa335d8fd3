//! Totals from the SDK's statistics: of the agent's audio over all its streams, and of what the server received of the caller's.

use std::time::Duration;

use tokio::time::Instant;

use crate::livekit::event::{AudioStats, UplinkReport};

/// How long a packet of the SDK's encoder plays.
const PACKET: Duration = Duration::from_millis(20);

/// The `inbound-rtp` statistics of one stream (W3C WebRTC Statistics, `RTCInboundRtpStreamStats`).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct InboundStats {
    pub(crate) ssrc: u32,
    pub(crate) packets: u64,
    /// Negative if there are more duplicates than losses.
    pub(crate) lost: i64,
    pub(crate) jitter_seconds: f64,
}

/// The totals of all streams so far.
#[derive(Debug, Default)]
pub(crate) struct InboundTotals {
    /// The totals of the streams before the current one.
    before: AudioStats,
    current: Option<InboundStats>,
}

impl InboundTotals {
    /// Records new statistics. They replace those of the same SSRC and are added to those of others.
    pub(crate) fn on_stats(&mut self, inbound: InboundStats) {
        let replaced = self.current.replace(inbound);
        if let Some(before) = replaced.filter(|it| it.ssrc != inbound.ssrc) {
            self.before = sum(self.before, before);
        }
    }

    pub(crate) fn stats(&self) -> AudioStats {
        self.current
            .map_or(self.before, |current| sum(self.before, current))
    }
}

/// Adds the counts. The jitter is that of the last stream that has one, because it is a running mean.
fn sum(before: AudioStats, inbound: InboundStats) -> AudioStats {
    let jitter = Duration::try_from_secs_f64(inbound.jitter_seconds).ok();
    AudioStats {
        packets: before.packets + inbound.packets,
        lost: before.lost + u64::try_from(inbound.lost).unwrap_or(0),
        // Jitter needs two packets. Before that, the SDK reports 0.
        jitter: jitter.filter(|_| inbound.packets > 1).or(before.jitter),
    }
}

/// The statistics of the sent track (`RTCOutboundRtpStreamStats` and `RTCRemoteInboundRtpStreamStats`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct OutboundStats {
    pub(crate) packets: u64,
    /// The server's latest receiver report: when it arrived, by any clock, and how many packets it counts as lost.
    pub(crate) report: Option<(i64, i64)>,
}

/// What was sent, and what the server has reported of it.
#[derive(Debug, Default)]
pub(crate) struct UplinkTotals {
    /// The time of the latest statistics and the packets sent by then.
    latest: Option<(Instant, u64)>,
    /// The packets sent by the statistics before the latest.
    before: u64,
    reported_at: Option<i64>,
}

impl UplinkTotals {
    /// Records new statistics; returns the receiver report if it is a new one.
    ///
    /// The SDK does not say up to which packet a report goes. It arrived after the previous statistics, and what was sent
    /// by those before it takes less than their interval to arrive: that much is certain.
    pub(crate) fn on_stats(&mut self, at: Instant, stats: OutboundStats) -> Option<UplinkReport> {
        let covered = self.before;
        self.before = self.latest.map_or(0, |(_, packets)| packets);
        self.latest = Some((at, stats.packets));
        let (arrived, lost) = stats.report?;
        (self.reported_at.replace(arrived) != Some(arrived)).then_some(UplinkReport {
            covered,
            lost: u64::try_from(lost).unwrap_or(0),
        })
    }

    /// The packets sent by `now`: those of the latest statistics, and at most as many as play since.
    pub(crate) fn sent(&self, now: Instant) -> u64 {
        let Some((at, packets)) = self.latest else {
            return 0;
        };
        let since = now.saturating_duration_since(at).as_millis() / PACKET.as_millis();
        packets + u64::try_from(since).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_report_covers_what_was_sent_before_the_previous_statistics() {
        let start = Instant::now();
        let mut uplink = UplinkTotals::default();
        assert_eq!(uplink.sent(start), 0);
        let mut on_stats = |half_seconds: u32, packets, report| {
            let at = start + Duration::from_millis(500) * half_seconds;
            uplink.on_stats(at, OutboundStats { packets, report })
        };
        assert_eq!(on_stats(0, 10, None), None);
        assert_eq!(on_stats(1, 35, None), None);
        let covered = |covered, lost| Some(UplinkReport { covered, lost });
        assert_eq!(on_stats(2, 60, Some((7, 1))), covered(10, 1));
        assert_eq!(on_stats(3, 85, Some((7, 1))), None);
        assert_eq!(on_stats(4, 110, Some((8, -2))), covered(60, 0));
        let now = start + Duration::from_millis(2_310);
        assert_eq!(uplink.sent(now), 110 + 15);
    }

    fn inbound(ssrc: u32, packets: u64, lost: i64, jitter_seconds: f64) -> InboundStats {
        InboundStats {
            ssrc,
            packets,
            lost,
            jitter_seconds,
        }
    }

    #[test]
    fn totals_are_empty_before_the_first_packet() {
        let mut totals = InboundTotals::default();
        assert_eq!(totals.stats(), AudioStats::default());
        totals.on_stats(inbound(1, 0, 0, 0.0));
        assert_eq!(totals.stats(), AudioStats::default());
    }

    #[test]
    fn newer_statistics_replace_those_of_their_stream_and_add_to_other_streams() {
        let mut totals = InboundTotals::default();
        for figures in [
            inbound(1, 50, 1, 0.004),
            inbound(1, 100, 2, 0.003),
            inbound(2, 1, 0, 0.0),
        ] {
            totals.on_stats(figures);
        }
        let expected = AudioStats {
            packets: 101,
            lost: 2,
            jitter: Some(Duration::from_millis(3)),
        };
        assert_eq!(totals.stats(), expected);
    }

    #[test]
    fn negative_loss_counts_as_zero_and_invalid_jitter_as_missing() {
        let mut totals = InboundTotals::default();
        totals.on_stats(inbound(1, 10, -3, f64::NAN));
        let expected = AudioStats {
            packets: 10,
            lost: 0,
            jitter: None,
        };
        assert_eq!(totals.stats(), expected);
    }
}
