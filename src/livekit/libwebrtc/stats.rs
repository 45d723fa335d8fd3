//! Totals of the agent's audio from the SDK's statistics, over all streams of the agent.

use std::time::Duration;

use crate::livekit::event::AudioStats;

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

#[cfg(test)]
mod tests {
    use super::*;

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
