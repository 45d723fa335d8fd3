//! The lists of batches, rooms and incidents, with their filters. The address holds the filters, so it can be shared.

use chrono::{DateTime, Utc};
use http::Uri;
use maud::{Markup, html};
use url::form_urlencoded;

use super::document::{BatchDocument, IncidentDocument, ProbeDocument};
use super::layout::{Moment, Page, Tone, seconds};
use super::past::batch_table;
use crate::http::api;
use crate::probe::{Origin, Outcome, Reason};
use crate::report::{BatchResult, Purpose, counted};

/// What the lists have in common.
pub(super) struct List<'a> {
    /// The names of all targets.
    pub(super) targets: Vec<&'a str>,
    /// The path with the filters that have a value.
    pub(super) query: &'a Uri,
    /// The value of `before` for the next page.
    pub(super) next: Option<String>,
    pub(super) now: DateTime<Utc>,
}

/// A filter that the form offers.
enum Field<'a> {
    Choice(&'static str, Vec<&'a str>),
    Text(&'static str, &'static str),
}

/// The address without the fields of the form that were left empty.
pub(super) fn query_of(uri: &Uri) -> Uri {
    let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let filled = pairs.filter(|(_, value)| !value.is_empty());
    let query = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(filled)
        .finish();
    format!("{}?{query}", uri.path())
        .parse()
        .unwrap_or_else(|_| uri.clone())
}

const TIME: &str = "2026-09-21T14:00:00Z";

pub(super) fn batches(batches: &[BatchDocument], list: &List<'_>) -> String {
    let fields = list.room_fields(Field::Choice(
        "result",
        BatchResult::ALL.map(BatchResult::label).to_vec(),
    ));
    list.page(
        "batch",
        batches.len(),
        &fields,
        true,
        &batch_table(batches, "./", list.now),
    )
}

pub(super) fn probes(probes: &[ProbeDocument], list: &List<'_>) -> String {
    let fields = list.room_fields(Field::Choice("outcome", Outcome::LABELS.to_vec()));
    let table = html! {
        div .scroll { table {
            thead { tr { th { "Room" } th { "Target" } th { "Outcome" } th { "Joined" } th { "Spoke" } th { "Reply" } } }
            tbody { @for probe in probes { tr {
                th scope="row" {
                    a href={ "probes/" (probe.room) } { (probe.room) }
                    small { (Moment { at: probe.started_at, now: list.now }.ago()) }
                }
                td { (probe.target.as_deref().unwrap_or("-")) }
                td .(probe.tone().class()) { (probe.verdict()) }
                td { (seconds(probe.join_delay_seconds)) }
                td { (seconds(probe.first_speech_delay_seconds)) }
                td { (seconds(probe.reply_delay_seconds)) }
            } } }
        } }
    };
    list.page("room", probes.len(), &fields, true, &table)
}

pub(super) fn incidents(incidents: &[IncidentDocument], list: &List<'_>) -> String {
    let fields = [list.target(), Field::Choice("open", vec!["true", "false"])];
    let table = html! {
        ul { @for incident in incidents {
            li { a href={ "incidents/" (incident.id) } { (incident.headline(list.now)) } }
        } }
    };
    list.page("incident", incidents.len(), &fields, false, &table)
}

impl List<'_> {
    fn target(&self) -> Field<'_> {
        Field::Choice("target", self.targets.clone())
    }

    /// What selects batches and rooms alike. `outcome` is how those of this list end.
    fn room_fields<'a>(&'a self, outcome: Field<'a>) -> [Field<'a>; 9] {
        [
            self.target(),
            outcome,
            Field::Choice("purpose", Purpose::ALL.map(Purpose::label).to_vec()),
            Field::Choice("reason", Reason::ALL.map(Reason::label).to_vec()),
            Field::Choice("origin", Origin::ALL.map(Origin::label).to_vec()),
            Field::Text("node", ""),
            Field::Text("worker", ""),
            Field::Text("since", TIME),
            Field::Text("until", TIME),
        ]
    }

    /// `noun` names what is listed.
    fn page(
        &self,
        noun: &str,
        shown: usize,
        fields: &[Field<'_>],
        has_csv: bool,
        table: &Markup,
    ) -> String {
        let query = self.query.query().unwrap_or_default();
        let path = self.query.path().trim_start_matches('/');
        let csv = if query.is_empty() {
            "format=csv".to_owned()
        } else {
            format!("{query}&format=csv")
        };
        let content = html! {
            (self.form(fields))
            @if shown == 0 { p { "Nothing in the history meets these filters." } } @else { (table) }
            p {
                @if let Some(next) = &self.next { a href={ (path) "?" (api::with_before(self.query, next)) } { "Older" } ". " }
                "This page as " a href={ "api/v1/" (path) "?" (query) } { "JSON" }
                @if has_csv { " or " a href={ "api/v1/" (path) "?" (csv) } { "CSV" } }
                "."
            }
        };
        let more = if self.next.is_some() {
            ", the latest"
        } else {
            ""
        };
        let page = Page {
            root: "./",
            verdict: &format!("{}{more}", counted(shown as u64, noun)),
            tone: Tone::Neutral,
            live: false,
            content,
        };
        page.render()
    }

    fn form(&self, fields: &[Field<'_>]) -> Markup {
        html! {
            form .filters {
                @for field in fields { @match field {
                    Field::Choice(key, choices) => label {
                        (key) " "
                        select name=(key) {
                            option value="" { "any" }
                            @for choice in choices { option value=(choice) selected[self.has(key, choice)] { (choice) } }
                        }
                    },
                    Field::Text(key, example) => label {
                        (key) " "
                        input name=(key) value=(self.value(key).unwrap_or_default()) placeholder=(example);
                    },
                } }
                button { "Filter" }
            }
        }
    }

    fn value(&self, key: &str) -> Option<String> {
        let mut pairs = form_urlencoded::parse(self.query.query()?.as_bytes());
        pairs.find_map(|(name, value)| (name == key).then(|| value.into_owned()))
    }

    fn has(&self, key: &str, choice: &str) -> bool {
        self.value(key).as_deref() == Some(choice)
    }
}
