//! The result of a batch as GitHub-flavoured Markdown, for a comment on a pull request: the summary, one row per room,
//! then each kind of failure.

use std::fmt::Write as _;

use humantime::format_duration;

use super::format::{
    FailureGroup, delay, evidence, failures, join_delay, outcome, printable, reason, reply,
    room_numbers, summary, time, track_delay,
};
use crate::config::{Project, Target};
use crate::probe::{Milestone, ProbeReport, Span};
use crate::report::BatchReport;
use crate::report::json::session_url;

const HEADER: &str = "\
| # | room | dispatched at (UTC) | joined at (UTC) | join delay | track subscribed | first speech | reply | outcome |
|--:|:-----|:--------------------|:----------------|-----------:|-----------------:|-------------:|------:|:--------|
";

/// Returns Markdown that ends with a newline. Times of day are UTC.
pub(super) fn render(batch: &BatchReport, target: &Target, project: &Project) -> String {
    let mut text = format!("### livekit-canary: {}\n\n", escaped(&batch.target));
    for line in summary(batch).lines() {
        text.push_str(&escaped(line));
        // A backslash breaks the line everywhere. A newline alone does so only in comments, not in files.
        text.push_str("\\\n");
    }
    text.push_str(&escaped(&settings(batch, target)));
    text.push('\n');
    if !batch.probes.is_empty() {
        text.push('\n');
        text.push_str(HEADER);
        for (index, probe) in batch.probes.iter().enumerate() {
            text.push_str(&row(index + 1, probe, project));
        }
    }
    let failures = failures(batch);
    if !failures.is_empty() {
        text.push_str("\n#### Failures\n\n");
    }
    for group in failures {
        text.push_str(&item(&group, batch, project));
    }
    text
}

fn settings(batch: &BatchReport, target: &Target) -> String {
    let took = (batch.ended_at - batch.started_at).num_seconds().max(0);
    format!(
        "Batch {}, started at {} UTC, took {took} s; ramp {}, hold {}, dispatch {}",
        batch.batch_id,
        batch.started_at.format("%Y-%m-%d %H:%M:%S"),
        target.batch.ramp.name(),
        format_duration(target.batch.hold),
        target.dispatch.mode.name(),
    )
}

fn row(number: usize, probe: &ProbeReport, project: &Project) -> String {
    let report = probe;
    let cells = [
        number.to_string(),
        room(report, project),
        escaped(&time(probe, Milestone::DispatchSent)),
        escaped(&time(probe, Milestone::AgentJoined)),
        escaped(&join_delay(report)),
        escaped(&delay(track_delay(report))),
        escaped(&delay(report.timeline.span(Span::FirstSpeech))),
        escaped(&reply(report)),
        escaped(outcome(report)),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// Returns the room's name, as a link if its session has a page.
fn room(report: &ProbeReport, project: &Project) -> String {
    let name = escaped(&report.room.0);
    match session_url(report, project) {
        Some(url) => format!("[{name}]({url})"),
        None => name,
    }
}

fn item((rooms, failure): &FailureGroup<'_>, batch: &BatchReport, project: &Project) -> String {
    let mut text = format!(
        "- **{}: {}** (origin: {})\\\n  {}\n",
        room_numbers(rooms),
        escaped(&reason(failure.reason)),
        failure.reason.origin().label(),
        escaped(&failure.detail)
    );
    let reports = || rooms.iter().map(|index| &batch.probes[*index]);
    // The evidence of the first room stands for all: that of the others differs only in identifiers.
    let first = reports().next();
    for line in first.map_or_else(Vec::new, |report| evidence(&report.evidence)) {
        writeln!(text, "  - {}", escaped(&line)).expect("writing to a string can't fail");
    }
    for report in reports().filter(|report| session_url(report, project).is_some()) {
        writeln!(text, "  - session: {}", room(report, project))
            .expect("writing to a string can't fail");
    }
    text
}

/// Escapes text, so that what a server wrote cannot become a table cell, a link, HTML or a mention.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in printable(text).trim().chars() {
        match char {
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '~' | '&' | '$' => {
                escaped.push('\\');
                escaped.push(char);
            }
            // GitHub links @user and #1 even after a backslash. A zero-width space between the two prevents that.
            '@' | '#' => {
                escaped.push(char);
                escaped.push('\u{200b}');
            }
            _ => escaped.push(char),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;
    use pulldown_cmark::{Event, Options, Parser, Tag};

    use super::*;
    use crate::probe::{Evidence, Outcome, Reason};
    use crate::report::NotOpened;
    use crate::report::sample::{WELL, batch, failed, mixed, probe, project};

    #[test]
    fn every_room_has_a_row_and_every_kind_of_failure_an_item() {
        assert_snapshot!(render(&mixed(), &Target::default(), &project()));
    }

    #[test]
    fn batch_without_failures_has_no_list_of_failures() {
        let mut bound = probe(2, Outcome::Ok, Evidence::default(), WELL);
        bound.join_upper_bound = true;
        let rooms = vec![probe(1, Outcome::Ok, Evidence::default(), WELL), bound];
        let project = Project {
            cloud_project: None,
            ..project()
        };
        assert_snapshot!(render(&batch(rooms, None), &Target::default(), &project));
    }

    #[test]
    fn text_of_a_server_stays_text() {
        let text_of_server = "a|b\n| c | <img src=x> [x](http://evil) `code` **bold** @everyone #1 &amp; \\| \u{1b}[2J";
        let evidence = Evidence {
            answer: Some(text_of_server.to_owned()),
            participants: vec![text_of_server.to_owned()],
            ..Evidence::default()
        };
        let mut rooms = vec![probe(
            1,
            failed(Reason::SignalFailed, text_of_server),
            evidence,
            WELL,
        )];
        rooms[0].room_sid = Some("RM_1) <b>".to_owned());
        let why = text_of_server.to_owned();
        let batch = batch(
            rooms,
            Some(NotOpened {
                rooms: 1,
                why,
                denial: None,
            }),
        );
        let text = render(&batch, &Target::default(), &project());
        assert_snapshot!(text);
        assert!(!text.contains("@everyone") && !text.contains("#1"));

        let tags: Vec<_> = Parser::new_ext(&text, Options::ENABLE_TABLES)
            .filter_map(|event| match event {
                Event::Start(tag) => Some(tag),
                Event::Text(_) | Event::End(_) | Event::SoftBreak | Event::HardBreak => None,
                other => panic!("{other:?} in {text}"),
            })
            .collect();
        let count = |wanted: fn(&Tag) -> bool| tags.iter().filter(|tag| wanted(tag)).count();
        assert_eq!(count(|tag| matches!(tag, Tag::TableCell)), 2 * 9);
        assert_eq!(
            count(|tag| matches!(tag, Tag::Strong)),
            1,
            "the heading of the failure"
        );
        assert_eq!(
            count(|tag| matches!(tag, Tag::Link { .. } | Tag::Image { .. })),
            0
        );
    }
}
