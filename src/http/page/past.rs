//! What the page of all targets and that of one show of the history.

use chrono::{DateTime, TimeDelta, Utc};
use maud::{Markup, html};

use super::document::{BatchDocument, IncidentDocument};
use super::figure::{self, Column, Line, Mark};
use super::layout::{Moment, Tone, seconds};
use crate::history::{
    HistoryEvent, Percentiles, RoomCount, SpanStatistics, Statistics, TargetStatistics,
};
use crate::http::status::ObjectivesStatus;
use crate::report::counted;

/// What a page shows of the history.
pub(super) struct Past {
    /// The latest first.
    pub(super) incidents: Vec<IncidentDocument>,
    /// The last ones, without their probes.
    pub(super) batches: Vec<BatchDocument>,
    pub(super) statistics: Statistics,
    /// The latest first.
    pub(super) events: Vec<HistoryEvent>,
}

impl Past {
    /// `None` without a room in 30 days.
    pub(super) fn statistics_of(&self, target: &str) -> Option<&TargetStatistics> {
        self.statistics
            .targets
            .iter()
            .find(|it| it.target == target)
    }

    /// The events that concern a target.
    pub(super) fn events_of(&self, target: &str) -> Vec<&HistoryEvent> {
        let concerns =
            |event: &&HistoryEvent| event.target.as_deref().is_none_or(|of| of == target);
        self.events.iter().filter(concerns).collect()
    }

    /// The events of a target on an axis of these spans, each as long as `width`.
    fn marks(&self, target: &str, spans: &[SpanStatistics], width: TimeDelta) -> Vec<Mark> {
        let Some(first) = spans.first() else {
            return Vec::new();
        };
        let events = self.events_of(target).into_iter();
        let events = events.filter(|event| event.at >= first.from);
        let mark = |event: &HistoryEvent| Mark {
            at: (event.at - first.from).as_seconds_f64() / width.as_seconds_f64(),
            class: "event",
            label: format!(
                "{} {}: {}",
                event.at.format("%m-%d %H:%M UTC"),
                event.kind,
                event.text
            ),
        };
        events.map(mark).collect()
    }
}

pub(super) fn no_history() -> Markup {
    html! { p .warning { "The history can't be read now, so what has ended is not shown." } }
}

/// `folder` is the path to the pages of targets.
pub(super) fn results_of(target: &str, past: &Past, folder: &str) -> Markup {
    let name = html! { b { a href={ (folder) (target) } { (target) } } };
    let Some(statistics) = past.statistics_of(target) else {
        return html! { div .results { div .name { (name) small { "no room in 30 days" } } } };
    };
    let RoomCount { ok, failed } = statistics.last_hour;
    let (day, week) = (statistics.last_day(), statistics.last_week());
    html! {
        div .results {
            div .name {
                (name)
                small {
                    "ok: " (share(ok as u64, failed as u64)) " in 1 h, " (share(day.ok, day.failed)) " in 24 h, "
                    (share(week.ok, week.failed)) " in 7 days"
                }
                small { "join p50 " (seconds(day.join_delay.p50)) ", p90 " (seconds(day.join_delay.p90)) }
            }
            div {
                (figure::columns(
                    &columns(&statistics.hours, "%m-%d %H:00 UTC"),
                    &past.marks(target, &statistics.hours, TimeDelta::hours(1)),
                ))
                small { "24 hours" }
            }
            div {
                (figure::columns(
                    &columns(&statistics.days, "%Y-%m-%d"),
                    &past.marks(target, &statistics.days, TimeDelta::days(1)),
                ))
                small { "30 days" }
            }
        }
    }
}

fn columns(spans: &[SpanStatistics], format: &str) -> Vec<Column> {
    let column = |span: &SpanStatistics| Column {
        ok: span.ok,
        failed: span.failed,
        label: span.from.format(format).to_string(),
    };
    spans.iter().map(column).collect()
}

/// In percent; `-` without a room.
pub(super) fn share(ok: u64, failed: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "counts of rooms")]
    match ok + failed {
        0 => "-".to_owned(),
        rooms => format!("{:.1}\u{a0}%", 100.0 * ok as f64 / rooms as f64),
    }
}

/// `root` is the path from the page to the first one.
pub(super) fn batch_table(batches: &[BatchDocument], root: &str, now: DateTime<Utc>) -> Markup {
    if batches.is_empty() {
        return html! { p { "No batch has ended yet." } };
    }
    html! {
        div .scroll { table {
            thead { tr { th { "Batch" } th { "Result" } th { "Rooms" } th { "Join p50" } th { "Join p90" } } }
            tbody { @for batch in batches { tr {
                th scope="row" {
                    a href={ (root) "batches/" (batch.batch_id) } { (batch.target) }
                    small { (batch.purpose) ", " (Moment { at: batch.started_at, now }.ago()) }
                }
                td .(Tone::of_result(&batch.result).class()) { (batch.result) }
                td { (batch.summary.ok) " ok, " (batch.summary.failed) " failed" }
                td { (seconds(batch.summary.join_delay.p50)) }
                td { (seconds(batch.summary.join_delay.p90)) }
            } } }
        } }
    }
}

type Delay = fn(&SpanStatistics) -> Percentiles;

/// A plot for each delay, with its objective drawn in.
pub(super) fn delays(statistics: &TargetStatistics, objectives: &ObjectivesStatus) -> Markup {
    let plots: [(&str, Delay, Option<f64>); 3] = [
        (
            "Join delay",
            |span| span.join_delay,
            Some(objectives.join_within_seconds),
        ),
        (
            "First speech",
            |span| span.first_speech_delay,
            Some(objectives.first_speech_within_seconds),
        ),
        (
            "Reply",
            |span| span.reply_delay,
            Some(objectives.reply_within_seconds),
        ),
    ];
    html! {
        h2 { "Delays of 24 hours" }
        p { small { "Per hour: p50 as a line, p90 dashed. The objective is the dotted line." } }
        @for (name, delay, limit) in plots {
            @let day = delay(statistics.last_day());
            @if day.p50.is_some() {
                div .delays {
                    div .name { b { (name) } small { "p50 " (seconds(day.p50)) ", p90 " (seconds(day.p90)) } }
                    (figure::plot(name, &[
                        Line { class: "p50", values: statistics.hours.iter().map(|hour| delay(hour).p50).collect() },
                        Line { class: "p90", values: statistics.hours.iter().map(|hour| delay(hour).p90).collect() },
                    ], limit))
                }
            }
        }
    }
}

/// `root` is the path from the page to the first one.
pub(super) fn reasons(statistics: &TargetStatistics, target: &str, root: &str) -> Markup {
    html! {
        @if !statistics.reasons.is_empty() {
            h2 { "Failures of 24 hours" }
            div .scroll { table {
                thead { tr { th { "Reason" } th { "Rooms" } } }
                tbody { @for reason in &statistics.reasons { tr {
                    th scope="row" { a href={ (root) "docs/reasons#" (reason.reason) } { (reason.reason) } }
                    td { a href={ (root) "probes?target=" (target) "&reason=" (reason.reason) } { (counted(reason.rooms, "room")) } }
                } } }
            } }
        }
    }
}
