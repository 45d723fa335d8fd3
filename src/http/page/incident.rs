//! An outage: its reasons, what differs between failed and good rooms, and its rooms.

use chrono::{DateTime, Utc};
use maud::{Markup, html};

use super::docs::Advice;
use super::document::{IncidentDocument, ProbeDocument, SampleDocument};
use super::figure::{self, Bar, Mark, Row};
use super::layout::{Moment, Page, Tone, length, seconds};
use crate::report::counted;
use crate::telemetry::without_marks;

impl IncidentDocument {
    /// `support FAILS: agent_silent, 3 of 3 rooms, since 15:12:52 UTC (22 min, 14 batches); last ok
    /// 15:12:39`.
    pub(super) fn headline(&self, now: DateTime<Utc>) -> String {
        let reason = self
            .reasons
            .first()
            .map_or("no reason", |one| one.reason.as_str());
        let (verb, until) = match self.ended_at {
            None => ("FAILS", now),
            Some(at) => ("failed", at),
        };
        let since = self.began_at.format("%Y-%m-%d %H:%M:%S");
        let last_ok = self.last_good().map_or_else(String::new, |sample| {
            format!("; last ok {}", sample.ended_at.format("%H:%M:%S"))
        });
        let batches = self.batches.map_or_else(String::new, |batches| {
            format!(", {}", counted(batches, "batch"))
        });
        let headline = format!(
            "{} {verb}: {reason}, {} of {}, since {since} UTC ({}{batches}){last_ok}",
            self.target,
            self.failed,
            counted(self.rooms, "room"),
            length(until - self.began_at),
        );
        without_marks(&headline)
    }

    /// The last good room, of the incident or before it.
    pub(super) fn last_good(&self) -> Option<&SampleDocument> {
        let is_good = |sample: &&SampleDocument| sample.failed == Some(false);
        let last = self.samples.iter().rfind(is_good);
        last.or_else(|| self.before.iter().rfind(is_good))
    }

    /// The first failed room.
    pub(super) fn first_bad(&self) -> Option<&SampleDocument> {
        self.samples
            .iter()
            .find(|sample| sample.failed == Some(true))
    }
}

/// What the history still has of the two rooms that the page compares.
pub(super) struct Sides {
    pub(super) good: Option<ProbeDocument>,
    pub(super) bad: Option<ProbeDocument>,
}

pub(super) fn render(incident: &IncidentDocument, sides: &Sides, now: DateTime<Utc>) -> String {
    let reason = incident
        .reasons
        .first()
        .map_or("", |one| one.reason.as_str());
    let alert = if incident.fault == "agent" {
        "AgentFailing"
    } else {
        "ServiceFailing"
    };
    let content = html! {
        @if let Some(advice) = Advice::of(reason) { (advice.render(reason, "../")) }
        dl {
            dt { "Target" } dd { a href={ "../targets/" (incident.target) } { bdi { (incident.target) } } " on " bdi { (incident.project) } }
            dt { "Fault of" } dd { @if incident.fault == "agent" { "the agent" } @else { "LiveKit or the network" } }
            dt { "First failed room" } dd { (Moment { at: incident.began_at, now }) }
            dt { "Known as an outage" } dd {
                (Moment { at: incident.opened_at, now }) ", " (length(incident.opened_at - incident.began_at)) " later"
            }
            dt { "End" } dd {
                @match (incident.ended_at, &incident.ended_by) {
                    (Some(at), Some(by)) => { (Moment { at, now }) ": " (by) },
                    _ => "still open",
                }
            }
            dt { "Alert" } dd {
                a href={ "../docs/alerts#" (alert.to_lowercase()) } { (alert) }
                @if incident.ended_at.is_none() { " fires while this incident is open." }
                @else { " fired while this incident was open." }
            }
        }
        h2 { "What differs" }
        @if incident.differs.is_empty() {
            p { "Nothing separates the failed rooms from the good ones." }
        } @else {
            ul { @for difference in &incident.differs { li { (difference.sentence) } } }
        }
        h2 { "Reasons" }
        div .scroll { table {
            thead { tr { th { "Reason" } th { "Rooms" } th { "First rooms" } th { "Later rooms" } } }
            tbody { @for reason in &incident.reasons { tr {
                th scope="row" { a href={ "../docs/reasons#" (reason.reason) } { (reason.reason) } }
                td { (reason.rooms) " (" (percent(reason.rooms, incident.rooms)) ")" }
                td { (count(incident, Some(&reason.reason), "first")) " of " (count(incident, None, "first")) }
                td { (count(incident, Some(&reason.reason), "later")) " of " (count(incident, None, "later")) }
            } } }
        } }
        h2 { "The rooms in time" }
        (timeline(incident, now))
        h2 { "The last good room beside the first bad one" }
        (comparison(incident, sides, now))
        h2 { "Rooms" }
        (samples(&incident.samples, now))
        p { "The " a href={ "../api/v1/incidents/" (incident.id) } { "JSON" } " has the same, and more." }
    };
    let page = Page {
        root: "../",
        verdict: &incident.headline(now),
        tone: if incident.ended_at.is_some() {
            Tone::Neutral
        } else {
            Tone::Bad
        },
        live: incident.ended_at.is_none(),
        content,
    };
    page.render()
}

fn percent(part: u64, of: u64) -> String {
    match of {
        0 => "-".to_owned(),
        of => format!("{} %", part * 100 / of),
    }
}

/// The kept rooms of this position, with this reason if one is given.
fn count(incident: &IncidentDocument, reason: Option<&str>, position: &str) -> usize {
    let samples = incident.samples.iter();
    let has = |sample: &&SampleDocument| {
        sample.position == position
            && reason.is_none_or(|reason| sample.reason.as_deref() == Some(reason))
    };
    samples.filter(has).count()
}

/// A row for each purpose of a batch that opened rooms, and a bar for each room.
fn timeline(incident: &IncidentDocument, now: DateTime<Utc>) -> Markup {
    // The incident begins when its first room fails, which is after that room opened.
    let opened = incident.samples.iter().map(|sample| sample.opened_at);
    let begin = opened.fold(incident.began_at, DateTime::min);
    let since = |at: DateTime<Utc>| (at - begin).as_seconds_f64();
    let of_purpose = |purpose: &str| {
        let samples = incident
            .samples
            .iter()
            .filter(|sample| sample.purpose == purpose);
        let bars: Vec<_> = samples
            .map(|sample| Bar {
                from: since(sample.opened_at),
                to: since(sample.ended_at),
                class: if sample.failed == Some(true) {
                    "failed"
                } else {
                    "ok"
                },
                label: format!(
                    "{} {}",
                    sample.opened_at.format("%H:%M:%S"),
                    sample.reason.as_deref().unwrap_or(&sample.outcome)
                ),
            })
            .collect();
        (!bars.is_empty()).then(|| Row {
            name: html! { (purpose) },
            bars,
            ..Row::default()
        })
    };
    let mark = |at: DateTime<Utc>, class: &'static str, label: &str| Mark {
        at: since(at),
        class,
        label: format!("{label} {}", at.format("%H:%M:%S")),
    };
    let mut marks = vec![mark(incident.opened_at, "failure", "known as an outage")];
    match incident.ended_at {
        Some(at) => marks.push(mark(at, "milestone", "ended")),
        None => marks.push(mark(now, "milestone", "now")),
    }
    let state = Row {
        name: html! { "incident" },
        marks,
        ..Row::default()
    };
    let rows: Vec<_> = std::iter::once(state)
        .chain(
            ["scheduled", "confirmation", "manual"]
                .into_iter()
                .filter_map(of_purpose),
        )
        .collect();
    figure::rows(
        "Since the first of these rooms opened. A bar is a room; that of a failed one is high and red. The marks above are the time at which it was known as an outage, and its end or now.",
        &rows,
    )
}

/// A row of the comparison: its name, and what the two rooms have.
type Compared = (&'static str, Option<String>, Option<String>);

fn comparison(incident: &IncidentDocument, sides: &Sides, now: DateTime<Utc>) -> Markup {
    let (Some(good), Some(bad)) = (incident.last_good(), incident.first_bad()) else {
        return html! { p { "No good room is known." } };
    };
    let of_sample =
        |name, value: fn(&SampleDocument) -> Option<String>| (name, value(good), value(bad));
    let of_probe = |name, value: fn(&ProbeDocument) -> Option<String>| {
        (
            name,
            sides.good.as_ref().and_then(value),
            sides.bad.as_ref().and_then(value),
        )
    };
    let facts: [Compared; 10] = [
        of_sample("Outcome", |it| {
            Some(it.reason.as_ref().unwrap_or(&it.outcome).clone())
        }),
        of_sample("Position in the batch", |it| Some(it.position.clone())),
        of_sample("Worker", |it| it.worker.clone()),
        of_sample("Agent version", |it| it.agent_version.clone()),
        of_sample("Node", |it| it.node.clone()),
        of_sample("Region", |it| it.region.clone()),
        of_sample("Media path", |it| it.media_path.clone()),
        of_probe("Last milestone", |it| {
            it.reached().last().map(|(name, _)| (*name).to_owned())
        }),
        of_probe("Agent", |it| {
            it.agent.as_ref().and_then(|agent| agent.name.clone())
        }),
        of_probe("Lost packets", |it| Some(it.audio.lost.to_string())),
    ];
    // A delay differs always, so it has no mark.
    let delays: [Compared; 3] = [
        of_probe("Join delay", |it| {
            it.join_delay_seconds.map(|delay| seconds(Some(delay)))
        }),
        of_probe("First speech", |it| {
            it.first_speech_delay_seconds
                .map(|delay| seconds(Some(delay)))
        }),
        of_probe("Reply", |it| {
            it.reply_delay_seconds.map(|delay| seconds(Some(delay)))
        }),
    ];
    let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    html! {
        div .scroll { table {
            thead { tr { th {} th { "Last good" } th { "First bad" } } }
            tbody {
                tr { th scope="row" { "Room" } td { (room(good)) } td { (room(bad)) } }
                tr {
                    th scope="row" { "Opened" }
                    td { (Moment { at: good.opened_at, now }) } td { (Moment { at: bad.opened_at, now }) }
                }
                @for (name, one, other) in facts.iter().filter(|(_, one, other)| one.is_some() || other.is_some()) { tr {
                    th scope="row" { (name) }
                    td { (shown(one)) }
                    td { @if one == other { (shown(other)) } @else { strong { bdi { (shown(other)) } } " (differs)" } }
                } }
                @for (name, one, other) in &delays { tr {
                    th scope="row" { (name) } td { (shown(one)) } td { (shown(other)) }
                } }
            }
        } }
    }
}

fn samples(samples: &[SampleDocument], now: DateTime<Utc>) -> Markup {
    html! {
        div .scroll { table {
            thead { tr { th { "Room" } th { "Outcome" } th { "Batch" } th { "Worker" } } }
            tbody { @for sample in samples.iter().rev() { tr {
                th scope="row" { (room(sample)) small { (Moment { at: sample.opened_at, now }) } }
                td .(tone(sample).class()) { (sample.reason.as_deref().unwrap_or(&sample.outcome)) }
                td { a href={ "../batches/" (sample.batch_id) } { (sample.purpose) } small { (sample.position) } }
                td { (sample.worker.as_deref().unwrap_or("-")) }
            } } }
        } }
    }
}

fn room(sample: &SampleDocument) -> Markup {
    html! { a href={ "../probes/" (sample.room) } { (sample.room) } }
}

fn tone(sample: &SampleDocument) -> Tone {
    match sample.failed {
        Some(true) => Tone::Bad,
        Some(false) => Tone::Good,
        None => Tone::Neutral,
    }
}
