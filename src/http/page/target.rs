//! A target: its state, what a batch now would cost, and what has ended.

use chrono::{DateTime, Utc};
use maud::{Markup, html};

use super::document::IncidentDocument;
use super::layout::{Moment, Page, Tone, length, seconds};
use super::past::{Past, batch_table, delays, no_history, reasons, results_of, share};
use crate::history::{ComparedSpan, HistoryEvent, TargetStatistics};
use crate::http::status::TargetStatus;
use crate::report::counted;

/// Changes that the page lists.
const RECENT_EVENTS: usize = 10;

pub(super) struct TargetPage<'a> {
    pub(super) target: &'a TargetStatus,
    /// `None` if the history can't be read.
    pub(super) past: Option<Past>,
    pub(super) now: DateTime<Utc>,
}

impl TargetPage<'_> {
    pub(super) fn render(&self) -> String {
        let Self { target, past, now } = self;
        let open = past
            .iter()
            .flat_map(|past| &past.incidents)
            .find(|incident| incident.ended_at.is_none());
        let verdict = match open {
            Some(incident) => incident.headline(*now),
            None => idle_verdict(target, *now),
        };
        let page = Page {
            root: "../",
            verdict: &verdict,
            tone: Tone::of_state(target.state),
            live: true,
            content: self.content(),
        };
        page.render()
    }

    fn content(&self) -> Markup {
        let &Self { target, now, .. } = self;
        html! {
            @if let Some(why) = &target.held_back { p .bad { "No batch can start now: " (why) } }
            dl {
                dt { "Agent" } dd { bdi { (target.agent_name.as_deref().unwrap_or("any agent")) } ", dispatch " (target.dispatch) }
                dt { "Project" } dd { (target.project) " " small { (target.url) } }
                dt { "State" } dd {
                    span .(Tone::of_state(target.state).class()) { (target.shown_state()) }
                    " since " (Moment { at: target.state_since, now })
                    @if target.paused { ", paused" }
                }
                dt { "Schedule" } dd {
                    (target.schedule)
                    @if let Some(at) = target.next_batch_at.filter(|_| !target.paused) { "; next batch " (Moment { at, now }) }
                }
                @for batch in [&target.running, &target.confirming].into_iter().flatten() {
                    dt { "Running" } dd { a href={ "../batches/" (batch) } { (batch) } }
                }
            }
            (self.run_now())
            @match &self.past {
                None => (no_history()),
                Some(past) => {
                    h2 { "Scheduled rooms" }
                    (results_of(&target.name, past, ""))
                    @if let Some(statistics) = past.statistics_of(&target.name) {
                        (delays(statistics, &target.objectives))
                        (comparison(statistics))
                        (reasons(statistics, &target.name, "../"))
                    }
                    (events(&past.events_of(&target.name), now))
                    h2 { "Last incidents" }
                    (incidents(&past.incidents, now))
                    p {
                        "All " a href={ "../incidents?target=" (target.name) } { "incidents" } ", "
                        a href={ "../batches?target=" (target.name) } { "batches" } " and "
                        a href={ "../probes?target=" (target.name) } { "rooms" } " of this target."
                    }
                    h2 { "Last batches" }
                    (batch_table(&past.batches, "../", now))
                },
            }
        }
    }

    /// The request and its answer are those of the API, so the guard rails hold for it, too.
    fn run_now(&self) -> Markup {
        let target = self.target;
        let minutes = target.worst_case_seconds.div_ceil(60);
        html! {
            form method="post" action={ "../api/v1/targets/" (target.name) "/batches" } {
                button disabled[target.running.is_some()] { "Run a batch now" }
                small {
                    "It opens " (counted(target.rooms as u64, "room")) " and uses at most " (counted(minutes, "minute"))
                    " of agent time. It counts in no service level."
                }
            }
        }
    }
}

/// Each span beside the same hours a day and a week before.
fn comparison(statistics: &TargetStatistics) -> Markup {
    let rows = |compared: &ComparedSpan| {
        let rows = [
            (compared.span, compared.now),
            ("the day before", compared.day_before),
            ("the week before", compared.week_before),
        ];
        rows.into_iter()
            .filter(|(_, span)| span.ok + span.failed > 0)
    };
    html! {
        h2 { "Compared with before" }
        div .scroll { table {
            thead { tr {
                th { "Span" } th { "Rooms" } th { "Ok" } th { "Join p50" } th { "Join p90" } th { "First speech p90" } th { "Reply p90" }
            } }
            @for compared in &statistics.compared {
                tbody { @for (name, span) in rows(compared) { tr {
                    th scope="row" { (name) }
                    td { (span.ok + span.failed) }
                    td { (share(span.ok, span.failed)) }
                    td { (seconds(span.join_delay.p50)) }
                    td { (seconds(span.join_delay.p90)) }
                    td { (seconds(span.first_speech_delay.p90)) }
                    td { (seconds(span.reply_delay.p90)) }
                } } }
            }
        } }
    }
}

/// The last changes that were reported, such as deployments.
fn events(events: &[&HistoryEvent], now: DateTime<Utc>) -> Markup {
    html! {
        @if !events.is_empty() {
            h2 { "Reported changes" }
            ul { @for event in events.iter().take(RECENT_EVENTS) {
                li { (Moment { at: event.at, now }) ": " (event.kind) ", " (event.text) }
            } }
        }
    }
}

/// The verdict without an open incident.
fn idle_verdict(target: &TargetStatus, now: DateTime<Utc>) -> String {
    let state = match target.shown_state() {
        "never ran" => "never ran".to_owned(),
        state => format!("{state} for {}", length(now - target.state_since)),
    };
    match target.obstacle() {
        Some(obstacle) => format!("{}: {obstacle}; {state}", target.name),
        None => format!("{}: {state}", target.name),
    }
}

fn incidents(incidents: &[IncidentDocument], now: DateTime<Utc>) -> Markup {
    if incidents.is_empty() {
        return html! { p { "No incident is known." } };
    }
    html! {
        ul { @for incident in incidents {
            li { a href={ "../incidents/" (incident.id) } { (incident.headline(now)) } }
        } }
    }
}
