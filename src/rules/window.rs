//! The windows over which alert rules count, and how long each is for a target's interval.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::config::{Alerts, Schedule};
use crate::schedule::{AHEAD, gaps, mean_interval};

pub(super) const MINUTE: Duration = Duration::from_mins(1);
/// A window with fewer scrapes than that is too coarse: what `increase` adds for its edges would pass for a batch.
const MIN_SCRAPES: u32 = 10;
/// The fewest intervals that a window of a slow alert spans.
const MIN_SLOW_INTERVALS: u32 = 24;

/// The windows that alerts look at. All count in intervals of the target: a window of fixed length is empty where batches
/// are rare, and Prometheus 3 no longer counts the sample at its far end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum RuleWindow {
    /// Two batches, however late one of them ends, and seldom a third.
    Fast,
    /// Three ticks of the schedule.
    Persisting,
    /// Long enough for two rejections where batches rest for an hour between them.
    Lately,
    /// At least 24 intervals; the burn that pages.
    Page,
    PageRecent,
    /// At least 24 intervals; the burn that makes a ticket.
    Ticket,
    TicketRecent,
}

impl RuleWindow {
    pub(super) fn label(self) -> &'static str {
        self.into()
    }

    /// Of targets with this interval.
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

    /// What batches come at. Within a day the shortest interval says when the next one tells more; over days with nights
    /// and weekends the mean says how many there are.
    pub(super) fn pace(self) -> Pace {
        match self {
            Self::Fast | Self::Persisting | Self::Lately => Pace::Shortest,
            Self::Page | Self::PageRecent | Self::Ticket | Self::TicketRecent => Pace::Mean,
        }
    }
}

pub(super) const PAGE_WINDOW: Duration = Duration::from_hours(6);
pub(super) const TICKET_WINDOW: Duration = Duration::from_hours(72);

#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Pace {
    Shortest,
    Mean,
}

impl Pace {
    pub(super) const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    pub(super) fn label(self) -> &'static str {
        self.into()
    }

    pub(super) fn of(self, schedule: &Schedule, now: DateTime<Utc>) -> Option<Duration> {
        match self {
            Self::Shortest => gaps(schedule, now, AHEAD).map(|gaps| gaps.shortest),
            Self::Mean => mean_interval(schedule, now.date_naive()),
        }
    }

    /// The series that says it of a target; a paused one has none.
    pub(super) fn series(self) -> String {
        format!("livekit_canary:batch_interval:{}", self.label())
    }
}

/// The longest mean interval from which burn rates can be told: its windows must fit into that of the objectives.
pub fn max_watched_interval(alerts: &Alerts) -> Duration {
    alerts.slo_window / MIN_SLOW_INTERVALS
}
