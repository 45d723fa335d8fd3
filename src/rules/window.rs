//! The windows over which the rules count, and their length for a target's interval.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::config::{Alerts, Schedule};
use crate::schedule::{AHEAD, gaps, mean_interval};

pub(super) const MINUTE: Duration = Duration::from_mins(1);
/// Minimum number of scrapes per window. In a shorter window, the extrapolation of `increase` at its edges could look like a
/// batch.
const MIN_SCRAPES: u32 = 10;
/// Minimum number of intervals that a window of a slow alert spans.
const MIN_SLOW_INTERVALS: u32 = 24;

/// The windows of the alerts. Each is a multiple of the target's interval, because a window of fixed length is empty if
/// batches are rare. Prometheus 3 no longer counts a sample exactly at the start of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum RuleWindow {
    /// Contains the ends of two batches, even if one of them ends late, and seldom a third.
    Fast,
    /// Contains three ticks of the schedule.
    Persisting,
    /// Contains two rejections even if batches are paused for an hour between them.
    Lately,
    /// At least 24 intervals, for the burn rate that pages.
    Page,
    /// The last quarter of `Page`: whether the burn continues.
    PageRecent,
    /// At least 24 intervals, for the burn rate that opens a ticket.
    Ticket,
    /// The last part of `Ticket`: whether the burn continues.
    TicketRecent,
}

impl RuleWindow {
    pub(super) fn label(self) -> &'static str {
        self.into()
    }

    /// The length of the window for targets with this interval.
    pub(super) fn length(self, interval: Duration, alerts: &Alerts) -> Duration {
        let slow = |shortest: Duration| shortest.max(MIN_SLOW_INTERVALS * interval);
        let length = match self {
            Self::Fast => interval * 5 / 2,
            Self::Persisting => interval * 7 / 2,
            Self::Lately => (interval * 7 / 2).max(150 * MINUTE),
            Self::Page => slow(PAGE_WINDOW),
            Self::PageRecent => slow(PAGE_WINDOW) / 4,
            Self::Ticket => slow(TICKET_WINDOW),
            Self::TicketRecent => (slow(TICKET_WINDOW) / 12).max(6 * interval),
        };
        length.max(MIN_SCRAPES * alerts.scrape_interval)
    }

    /// The interval that the window is a multiple of. In windows of hours, the effective interval determines when the next
    /// batch ends. Windows of days include nights and weekends, so the mean determines the number of batches.
    pub(super) fn pace(self) -> Pace {
        match self {
            Self::Fast | Self::Persisting | Self::Lately => Pace::Effective,
            Self::Page | Self::PageRecent | Self::Ticket | Self::TicketRecent => Pace::Mean,
        }
    }
}

pub(super) const PAGE_WINDOW: Duration = Duration::from_hours(6);
pub(super) const TICKET_WINDOW: Duration = Duration::from_hours(72);

/// Which interval of a schedule counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Pace {
    /// The longer of the shortest interval and the longest possible batch: ticks are skipped while a batch runs, so a short
    /// interval says nothing about how often batches end.
    Effective,
    Mean,
}

impl Pace {
    pub(super) const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    pub(super) fn label(self) -> &'static str {
        self.into()
    }

    pub(super) fn of(
        self,
        schedule: &Schedule,
        longest_batch: Duration,
        now: DateTime<Utc>,
    ) -> Option<Duration> {
        match self {
            Self::Effective => {
                gaps(schedule, now, AHEAD).map(|gaps| gaps.shortest.max(longest_batch))
            }
            Self::Mean => mean_interval(schedule, now.date_naive()),
        }
    }

    /// The recorded series that holds this interval per target. A paused target has none.
    pub(super) fn series(self) -> String {
        format!("livekit_canary:batch_interval:{}", self.label())
    }
}

/// The longest mean interval for which burn rates can be computed: the windows must fit into the SLO window.
pub(crate) fn max_watched_interval(alerts: &Alerts) -> Duration {
    alerts.slo_window / MIN_SLOW_INTERVALS
}
