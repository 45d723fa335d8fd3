//! Prometheus rules for these settings: pure, from settings to YAML text.
//!
//! One set of rules serves every target of every daemon: objectives and intervals come from the series themselves, so that
//! the rules printed for one daemon fit another. Only the window of a range selector must stand in the text: there is one
//! for each class of intervals, and a target's own interval picks the class. The schedules of these settings get classes
//! of their own, with windows that fit exactly.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::config::{Alerts, Config, Schedule};
use crate::schedule::{AHEAD, gaps, mean_interval};

mod catalogue;
mod yaml;

pub use catalogue::{ALERTS, Alert, Severity};

const MINUTE: Duration = Duration::from_mins(1);
const DAY: Duration = Duration::from_hours(24);

/// Longest intervals of the classes, in minutes: the usual schedules fit exactly, others by a factor of two or so. Windows
/// of all classes are read for every target, so those of rarer batches, which are days, come from the settings alone.
const LADDER: [u64; 7] = [2, 5, 10, 15, 30, 60, 180];
/// A window with fewer scrapes than that is too coarse: what `increase` adds for its edges would pass for a batch.
const FEWEST_SCRAPES: u32 = 10;
/// The fewest intervals that a window of a slow alert spans.
const SLOW_INTERVALS: u32 = 24;

/// The windows that alerts look at. All count in intervals of the target: a window of fixed length is empty where batches
/// are rare, and Prometheus 3 no longer counts the sample at its far end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Window {
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

impl Window {
    fn label(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Persisting => "persisting",
            Self::Lately => "lately",
            Self::Page => "page",
            Self::PageRecent => "page_recent",
            Self::Ticket => "ticket",
            Self::TicketRecent => "ticket_recent",
        }
    }

    /// Of targets with this interval.
    fn length(self, interval: Duration, alerts: &Alerts) -> Duration {
        let slow = |shortest: Duration| shortest.max(SLOW_INTERVALS * interval);
        let length = match self {
            Self::Fast => interval * 5 / 2,
            Self::Persisting => interval * 7 / 2,
            Self::Lately => (interval * 7 / 2).max(150 * MINUTE),
            Self::Page => slow(PAGE_WINDOW),
            Self::PageRecent => slow(PAGE_WINDOW) / 4,
            Self::Ticket => slow(TICKET_WINDOW),
            Self::TicketRecent => (slow(TICKET_WINDOW) / 12).max(6 * interval),
        };
        length.max(FEWEST_SCRAPES * alerts.scrape_interval)
    }

    /// What batches come at. Within a day the shortest interval says when the next one tells more; over days with nights
    /// and weekends the mean says how many there are.
    fn pace(self) -> Pace {
        match self {
            Self::Fast | Self::Persisting | Self::Lately => Pace::Shortest,
            Self::Page | Self::PageRecent | Self::Ticket | Self::TicketRecent => Pace::Mean,
        }
    }
}

const PAGE_WINDOW: Duration = Duration::from_hours(6);
const TICKET_WINDOW: Duration = Duration::from_hours(72);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Shortest,
    Mean,
}

impl Pace {
    const ALL: [Self; 2] = [Self::Shortest, Self::Mean];

    fn label(self) -> &'static str {
        match self {
            Self::Shortest => "shortest",
            Self::Mean => "mean",
        }
    }

    fn of(self, schedule: &Schedule, now: DateTime<Utc>) -> Option<Duration> {
        match self {
            Self::Shortest => gaps(schedule, now, AHEAD).map(|gaps| gaps.shortest),
            Self::Mean => mean_interval(schedule, now.date_naive()),
        }
    }

    /// The series that says it of a target; a paused one has none.
    fn series(self) -> String {
        format!("livekit_canary:batch_interval:{}", self.label())
    }
}

/// The longest mean interval from which burn rates can be told: its windows must fit into that of the objectives.
pub fn longest_watched(alerts: &Alerts) -> Duration {
    alerts.slo_window / SLOW_INTERVALS
}

/// What a record counts, over one of the windows.
struct Record {
    name: &'static str,
    window: Window,
    /// The labels that it has beside those of a target.
    labels: &'static str,
    /// With `$w` for the window.
    expr: &'static str,
}

/// `livekit_canary:slo_eligible:fast` and the like.
fn record_name(record: &Record) -> String {
    format!("livekit_canary:{}:{}", record.name, record.window.label())
}

const fn counted(
    name: &'static str,
    window: Window,
    labels: &'static str,
    expr: &'static str,
) -> Record {
    Record {
        name,
        window,
        labels,
        expr,
    }
}

const ELIGIBLE: &str =
    "sum without (instance, pod) (increase(livekit_canary_slo_eligible_total[$w]))";
const GOOD: &str = "sum without (instance, pod) (increase(livekit_canary_slo_good_total[$w]))";
const BAD_BATCHES: &str =
    "sum without (instance, pod) (increase(livekit_canary_slo_bad_batches_total[$w]))";
const BY_LIVEKIT: &str = "sum without (instance, pod, reason, origin) \
     (increase(livekit_canary_probe_failures_total{origin=~\"livekit|network\"}[$w]))";
const TICKS_LIMITED: &str = "sum without (instance, pod, result) \
     (increase(livekit_canary_batches_total{result=\"limited\"}[$w])) + sum without (instance, pod, cause) \
     (increase(livekit_canary_batches_skipped_total{cause=\"backoff\"}[$w]))";

const FAST: &[Record] = &[
    counted("slo_eligible", Window::Fast, "sli", ELIGIBLE),
    counted("slo_good", Window::Fast, "sli", GOOD),
    counted("slo_bad_batches", Window::Fast, "sli", BAD_BATCHES),
    counted("failures_by_livekit", Window::Fast, "", BY_LIVEKIT),
    counted(
        "credentials_rejected",
        Window::Fast,
        "",
        "sum without (instance, pod, reason, origin) \
         (increase(livekit_canary_probe_failures_total{reason=\"auth_rejected\"}[$w]))",
    ),
    counted(
        "batches",
        Window::Fast,
        "result",
        "sum without (instance, pod) (increase(livekit_canary_batches_total[$w]))",
    ),
    counted(
        "batches_skipped",
        Window::Fast,
        "cause",
        "sum without (instance, pod) (increase(livekit_canary_batches_skipped_total[$w]))",
    ),
    counted("ticks_limited", Window::Persisting, "", TICKS_LIMITED),
    counted(
        "batches_limited",
        Window::Lately,
        "",
        "sum without (instance, pod, result) (increase(livekit_canary_batches_total{result=\"limited\"}[$w]))",
    ),
    counted(
        "limit_rejections",
        Window::Lately,
        "limit",
        "sum without (instance, pod) (increase(livekit_canary_plan_limit_rejections_total[$w]))",
    ),
];

const SLOW: &[Record] = &[
    counted("slo_eligible", Window::Page, "sli", ELIGIBLE),
    counted("slo_good", Window::Page, "sli", GOOD),
    counted("slo_bad_batches", Window::Page, "sli", BAD_BATCHES),
    counted("failures_by_livekit", Window::Page, "", BY_LIVEKIT),
    counted("ticks_limited", Window::Page, "", TICKS_LIMITED),
    counted("slo_eligible", Window::PageRecent, "sli", ELIGIBLE),
    counted("slo_bad_batches", Window::PageRecent, "sli", BAD_BATCHES),
    counted("slo_eligible", Window::Ticket, "sli", ELIGIBLE),
    counted("slo_good", Window::Ticket, "sli", GOOD),
    counted("slo_bad_batches", Window::Ticket, "sli", BAD_BATCHES),
    counted("failures_by_livekit", Window::Ticket, "", BY_LIVEKIT),
    counted("slo_eligible", Window::TicketRecent, "sli", ELIGIBLE),
    counted("slo_bad_batches", Window::TicketRecent, "sli", BAD_BATCHES),
];

/// The rules for these settings, as a file of Prometheus'.
pub fn render(config: &Config, now: DateTime<Utc>) -> String {
    let alerts = &config.alerts;
    let mut file = yaml::File::new(alerts);
    file.group("livekit-canary", None);
    for pace in Pace::ALL {
        file.record(&pace.series(), &interval_of_target(pace));
    }
    file.record("livekit_canary:slo_objective:ratio", OBJECTIVE);
    let (shortest, mean) = (
        classes(config, Pace::Shortest, now),
        classes(config, Pace::Mean, now),
    );
    let add_records = |file: &mut yaml::File<'_>, records: &[Record]| {
        for record in records {
            let classes = match record.window.pace() {
                Pace::Shortest => &shortest,
                Pace::Mean => &mean,
            };
            file.record(&record_name(record), &by_class(record, classes, alerts));
        }
    };
    add_records(&mut file, FAST);
    add_alerts(&mut file, alerts, false);
    // Hours and days move slowly, and cost more to add up.
    file.group("livekit-canary-slow", Some(2 * MINUTE));
    add_records(&mut file, SLOW);
    for (name, counter) in [
        ("slo_eligible", ELIGIBLE),
        ("slo_good", GOOD),
        ("slo_bad_batches", BAD_BATCHES),
    ] {
        let expr = counter.replace("$w", &yaml::duration(alerts.slo_window));
        file.record(&format!("livekit_canary:{name}:slo_window"), &expr);
    }
    file.record("livekit_canary:slo_error_budget_left:ratio", BUDGET_LEFT);
    add_alerts(&mut file, alerts, true);
    file.text
}

fn add_alerts(file: &mut yaml::File<'_>, alerts: &Alerts, slow: bool) {
    for alert in ALERTS.iter().filter(|alert| alert.slow == slow) {
        file.alert(alert, &alert.expr(alerts));
    }
}

/// Kept for an hour without a scrape, so that a daemon that dies in an outage doesn't end the outage's alert.
fn interval_of_target(pace: Pace) -> String {
    format!(
        "max without (instance, pod) (last_over_time(livekit_canary_batch_interval_{}_seconds[1h]))\n\
         unless max without (instance, pod) (livekit_canary_target_paused) == 1",
        pace.label()
    )
}

const OBJECTIVE: &str =
    "max without (instance, pod) (last_over_time(livekit_canary_slo_objective_ratio[1h]))";

const BUDGET_LEFT: &str = "\
1 - (1 - livekit_canary:slo_good:slo_window / (livekit_canary:slo_eligible:slo_window > 0.5))
  / (1 - livekit_canary:slo_objective:ratio)";

/// The longest intervals of the classes, ascending.
fn classes(config: &Config, pace: Pace, now: DateTime<Utc>) -> Vec<Duration> {
    let ladder = LADDER.map(Duration::from_mins);
    let own = config.targets.values();
    let own = own.filter_map(|target| pace.of(&target.schedule, now));
    // In whole seconds, upwards: a mean seldom is one.
    let own = own.map(|interval| {
        let part = u64::from(interval.subsec_nanos() > 0);
        Duration::from_secs(interval.as_secs() + part)
    });
    let all: BTreeSet<Duration> = ladder.into_iter().chain(own).collect();
    let longest = longest_watched(&config.alerts);
    all.into_iter()
        .filter(|class| pace == Pace::Shortest || *class <= longest)
        .collect()
}

/// One line a class, each over its own window; classes with the same window are one.
fn by_class(record: &Record, classes: &[Duration], alerts: &Alerts) -> String {
    let length = |class: &Duration| record.window.length(*class, alerts);
    let interval = record.window.pace().series();
    let mut above = None;
    let mut lines = Vec::new();
    for class in classes.chunk_by(|one, next| length(one) == length(next)) {
        let up_to = class.last().expect("a chunk is not empty");
        let lower = above.map_or_else(String::new, |above: Duration| {
            format!(" > {}", above.as_secs_f64())
        });
        above = Some(*up_to);
        let counted = record.expr.replace("$w", &yaml::duration(length(up_to)));
        let matching = if record.labels.is_empty() {
            String::new()
        } else {
            format!(" ignoring ({})", record.labels)
        };
        lines.push(format!(
            "{counted}\n  and{matching} ({interval}{lower} <= {})",
            up_to.as_secs_f64()
        ));
    }
    lines.join("\nor\n")
}
