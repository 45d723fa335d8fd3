//! A batch: its rooms on one axis of time, and the table that `once` prints. The same while it runs.

use chrono::{DateTime, Utc};
use maud::{Markup, html};

use super::docs::Advice;
use super::document::{BatchDocument, ProbeDocument};
use super::figure::{self, Bar, Mark, Row};
use super::layout::{Moment, Page, Tone, length, seconds};
use crate::http::live::{RunningBatch, RunningRoom, Stage};
use crate::probe::{Milestone, Outcome, Span};
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
    let rooms: Vec<_> = batch.probes.iter().map(Room::ended).collect();
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
        (table(&rooms, batch.started_at))
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

/// A batch that the history has not yet. `running` is `None` in the moments before it starts and after it has ended.
pub(super) fn render_running(
    id: &str,
    target: &str,
    running: Option<&RunningBatch>,
    now: DateTime<Utc>,
) -> String {
    let count = |is_counted: fn(&Outcome) -> bool| {
        let rooms = running.map_or(&[][..], |batch| &batch.rooms);
        let outcomes = rooms.iter().filter_map(|room| room.outcome.as_ref());
        outcomes.filter(|outcome| is_counted(outcome)).count()
    };
    let ok = count(|outcome| matches!(outcome, Outcome::Ok));
    let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
    let verdict = format!("{target}: batch is running, {ok} ok, {failed} failed");
    let content = html! {
        dl {
            dt { "Target" } dd { a href={ "../targets/" (target) } { (target) } }
            dt { "Batch" } dd { code { (id) } }
            @if let Some(batch) = running {
                dt { "Purpose" } dd { (batch.purpose) }
                dt { "Start" } dd { (Moment { at: batch.started_at, now }) }
                dt { "Opened" } dd { (counted(batch.rooms.len() as u64, "room")) }
            }
        }
        @match running {
            Some(batch) if !batch.rooms.is_empty() => {
                @let rooms: Vec<_> = batch.rooms.iter().map(|room| Room::running(room, now)).collect();
                (table(&rooms, batch.started_at))
                p { "A room has a page of its own when the batch has ended." }
            },
            _ => p { "No room is open." },
        }
    };
    let page = Page {
        root: "../",
        verdict: &verdict,
        tone: if failed > 0 { Tone::Bad } else { Tone::Neutral },
        live: true,
        content,
    };
    page.render()
}

/// A room of a batch. Delays and times are in seconds, times since its opening.
struct Room<'a> {
    name: &'a str,
    /// Whether the history has it.
    has_page: bool,
    opened_at: DateTime<Utc>,
    milestones: Vec<(&'a str, f64)>,
    /// Up to where a part of the call that has not ended is drawn.
    until: Option<f64>,
    join: Option<f64>,
    first_speech: Option<f64>,
    reply: Option<f64>,
    verdict: &'a str,
    detail: Option<&'a str>,
    tone: Tone,
}

impl<'a> Room<'a> {
    fn ended(probe: &'a ProbeDocument) -> Self {
        Self {
            name: &probe.room,
            has_page: true,
            opened_at: probe.started_at,
            milestones: probe.reached(),
            until: probe.at("Left").or_else(|| probe.at("RoomDeleted")),
            join: probe.join_delay_seconds,
            first_speech: probe.first_speech_delay_seconds,
            reply: probe.reply_delay_seconds,
            verdict: probe.verdict(),
            detail: probe.detail.as_deref(),
            tone: probe.tone(),
        }
    }

    fn running(room: &'a RunningRoom, now: DateTime<Utc>) -> Self {
        let timeline = &room.timeline;
        let at = |milestone| timeline.since_started(milestone).map(|at| at.as_secs_f64());
        let span = |span| timeline.span(span).map(|delay| delay.as_secs_f64());
        let opened_for = (now - room.opened_at).as_seconds_f64().max(0.0);
        let failure = room.outcome.as_ref().and_then(Outcome::failure);
        Self {
            name: &room.room,
            has_page: false,
            opened_at: room.opened_at,
            milestones: Milestone::ALL
                .into_iter()
                .filter_map(|milestone| Some((milestone.label(), at(milestone)?)))
                .collect(),
            until: at(Milestone::Left)
                .or_else(|| at(Milestone::RoomDeleted))
                .or_else(|| (room.stage < Stage::Closed).then_some(opened_for)),
            join: span(Span::AgentJoin),
            first_speech: span(Span::FirstSpeech),
            // A turn of the call, which is known at its end.
            reply: None,
            verdict: room.verdict().unwrap_or(match room.stage {
                Stage::Opened => "waits for the agent",
                Stage::Joined => "waits for its speech",
                Stage::Spoke | Stage::Decided | Stage::Closed => "in conversation",
            }),
            detail: failure.map(|failure| failure.detail.as_str()),
            tone: match &room.outcome {
                Some(Outcome::Ok) => Tone::Good,
                Some(Outcome::Failed(_)) => Tone::Bad,
                Some(Outcome::Aborted) | None => Tone::Neutral,
            },
        }
    }

    fn link(&self) -> Markup {
        html! {
            @if self.has_page { a href={ "../probes/" (self.name) } { (self.name) } }
            @else { span .room { (self.name) } }
        }
    }

    fn row(&self, batch_started_at: DateTime<Utc>) -> Row<'static> {
        let offset = self.opened_at - batch_started_at;
        let offset = offset.as_seconds_f64().max(0.0);
        let at = |milestone: &str| {
            let mut milestones = self.milestones.iter();
            let (_, at) = milestones.find(|(name, _)| *name == milestone)?;
            Some(offset + at)
        };
        let until = self.until.map(|until| offset + until);
        let bars = PARTS.iter().filter_map(|&(from, to, class, name)| {
            let from = at(from)?;
            let to = at(to).or(until)?;
            Some(Bar {
                from,
                to: to.max(from),
                class,
                label: format!("{name} {:.3} s", to - from),
            })
        });
        let mark = until.filter(|_| self.tone == Tone::Bad).map(|at| Mark {
            at,
            class: "failure",
            label: self.verdict.to_owned(),
        });
        Row {
            name: html! { (self.link()) " " span .(self.tone.class()) { (self.verdict) } },
            bars: bars.collect(),
            marks: mark.into_iter().collect(),
            ..Row::default()
        }
    }
}

/// The rooms as a figure and as a table.
fn table(rooms: &[Room<'_>], batch_started_at: DateTime<Utc>) -> Markup {
    let rows: Vec<_> = rooms
        .iter()
        .map(|room| room.row(batch_started_at))
        .collect();
    html! {
        h2 { "The ramp" }
        p .legend { @for (_, _, class, name) in PARTS { span { svg viewBox="0 0 1 1" aria-hidden="true" { rect .(class) width="1" height="1" {} } " " (name) } " " } }
        (figure::rows("Each room from its opening to its end. A line is the failure.", &rows))
        h2 { "Rooms" }
        div .scroll { table {
            thead { tr {
                th { "Room" } th { "Opened" } th { "Joined" } th { "Spoke" } th { "Reply" } th { "Outcome" }
            } }
            tbody { @for room in rooms { tr {
                th scope="row" { (room.link()) }
                td { (room.opened_at.format("%H:%M:%S")) }
                td { (seconds(room.join)) }
                td { (seconds(room.first_speech)) }
                td { (seconds(room.reply)) }
                td .(room.tone.class()) {
                    (room.verdict)
                    @if let Some(detail) = room.detail { small { (detail) } }
                }
            } } }
        } }
    }
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
