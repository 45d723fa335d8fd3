//! A batch: its rooms on one axis of time, and the table that `once` prints.

use chrono::{DateTime, Utc};
use maud::html;

use super::docs::Advice;
use super::document::{BatchDocument, ProbeDocument};
use super::figure::{self, Bar, Mark, Row};
use super::layout::{Moment, Page, Tone, length, seconds};
use crate::http::status::TargetStatus;
use crate::report::counted;

/// The parts of a call: the milestones at its two ends, its class in the style sheet, and its name.
const PARTS: [(&str, &str, &str, &str); 4] = [
    ("Started", "CallerPublished", "setup", "connecting"),
    (
        "DispatchSent",
        "AgentJoined",
        "join",
        "waiting for the agent",
    ),
    (
        "AgentJoined",
        "AgentSpoke",
        "speech",
        "waiting for its speech",
    ),
    ("AgentSpoke", "Left", "call", "conversation"),
];

pub(super) fn render(batch: &BatchDocument, now: DateTime<Utc>) -> String {
    let summary = &batch.summary;
    let verdict = format!(
        "{}: batch {}, {} ok, {} failed{}",
        batch.target,
        batch.result,
        summary.ok,
        summary.failed,
        if summary.aborted > 0 {
            format!(", {} aborted", summary.aborted)
        } else {
            String::new()
        }
    );
    let rows: Vec<_> = batch.probes.iter().map(|probe| row(batch, probe)).collect();
    let content = html! {
        dl {
            dt { "Target" } dd { a href={ "../targets/" (batch.target) } { (batch.target) } " on " (batch.project) }
            dt { "Batch" } dd { code { (batch.batch_id) } }
            dt { "Purpose" } dd { (batch.purpose) ", ramp " (batch.ramp) }
            @if let Some(deployment) = &batch.deployment { dt { "Deployment" } dd { (deployment) } }
            dt { "Start" } dd { (Moment { at: batch.started_at, now }) ", for " (length(batch.ended_at - batch.started_at)) }
            dt { "Join delay" } dd { "p50 " (seconds(summary.join_delay.p50)) ", p90 " (seconds(summary.join_delay.p90)) }
        }
        @for reason in reasons(batch) { @if let Some(advice) = Advice::of(reason) { (advice.render(reason, "../")) } }
        @if let Some(rest) = &batch.not_opened { p .warning { (rest.rooms) " not opened: " (rest.why) } }
        h2 { "The ramp" }
        p .legend { @for (_, _, class, name) in PARTS { span { svg viewBox="0 0 1 1" aria-hidden="true" { rect .(class) width="1" height="1" {} } " " (name) } " " } }
        (figure::rows("Each room from its opening to its end. A line is the failure.", &rows))
        h2 { "Rooms" }
        div .scroll { table {
            thead { tr {
                th { "Room" } th { "Opened" } th { "Joined" } th { "Spoke" } th { "Reply" } th { "Outcome" }
            } }
            tbody { @for probe in &batch.probes { tr {
                th scope="row" { a href={ "../probes/" (probe.room) } { (probe.room) } }
                td { (probe.started_at.format("%H:%M:%S")) }
                td { (seconds(probe.join_delay_seconds)) }
                td { (seconds(probe.first_speech_delay_seconds)) }
                td { (seconds(probe.reply_delay_seconds)) }
                td .(probe.tone().class()) {
                    (probe.verdict())
                    @if let Some(detail) = &probe.detail { small { (detail) } }
                }
            } } }
        } }
        p { "The " a href={ "../api/v1/batches/" (batch.batch_id) } { "JSON" } " has the same, and more." }
    };
    let page = Page {
        root: "../",
        verdict: &verdict,
        tone: Tone::of_result(&batch.result),
        live: false,
        content,
    };
    page.render()
}

/// The history has its rooms when it has ended; until then the page waits for them.
pub(super) fn render_running(id: &str, target: &TargetStatus) -> String {
    let content = html! {
        p {
            "Batch " code { (id) } " of " a href={ "../targets/" (target.name) } { (target.name) } " is running: "
            (counted(target.rooms as u64, "room")) ", one after the other. This page shows them when it has ended."
        }
    };
    let page = Page {
        root: "../",
        verdict: &format!("{}: batch is running", target.name),
        tone: Tone::Neutral,
        live: true,
        content,
    };
    page.render()
}

/// The reasons of the failed rooms, each once.
fn reasons(batch: &BatchDocument) -> Vec<&str> {
    let mut reasons: Vec<_> = batch
        .probes
        .iter()
        .filter_map(|probe| probe.reason.as_deref())
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    reasons
}

fn row(batch: &BatchDocument, probe: &ProbeDocument) -> Row<'static> {
    let offset = probe.started_at - batch.started_at;
    let offset = offset.as_seconds_f64().max(0.0);
    let at = |milestone: &str| probe.at(milestone).map(|at| offset + at);
    let bars = PARTS.iter().filter_map(|&(from, to, class, name)| {
        let from = at(from)?;
        // A part that never ended lasts until the canary left.
        let to = at(to).or_else(|| at("Left"))?;
        Some(Bar {
            from,
            to: to.max(from),
            class,
            label: format!("{name} {:.3} s", to - from),
        })
    });
    let failed = probe.outcome == "failed";
    let end = at("Left").or_else(|| at("RoomDeleted"));
    let mark = end.filter(|_| failed).map(|at| Mark {
        at,
        class: "failure",
        label: probe.verdict().to_owned(),
    });
    Row {
        name: html! { a href={ "../probes/" (probe.room) } { (probe.room) } " " span .(probe.tone().class()) { (probe.verdict()) } },
        bars: bars.collect(),
        marks: mark.into_iter().collect(),
        ..Row::default()
    }
}
