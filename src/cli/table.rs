//! The result of a batch as a table for a terminal: one row per room, then each kind of failure.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use std::fmt::{Display, Write as _};

use super::format::{
    FailureGroup, delay, evidence, failures, join_delay, outcome, printable, reason, reply,
    room_numbers, summary, time, track_delay,
};
use crate::config::Project;
use crate::probe::{Failure, Milestone, Outcome, ProbeReport, Span, Timeline};
use crate::report::BatchReport;
use crate::report::json::session_url;

/// Columns that the full table needs. A narrower terminal gets the table for 80 columns.
const FULL_WIDTH: u16 = 120;

/// Returns the width of the terminal that stdout writes to, and `None` if stdout is not a terminal.
pub(super) fn terminal_width() -> Option<u16> {
    console::Term::stdout()
        .size_checked()
        .map(|(_rows, columns)| columns)
}

/// Returns text that ends with a newline. Times of day are UTC.
pub(super) fn render(batch: &BatchReport, project: &Project, width: Option<u16>) -> String {
    let mut text = String::new();
    if !batch.probes.is_empty() {
        text = rows(batch, width);
        text.push_str("\n\n");
    }
    text.push_str(&summary(batch));
    text.push('\n');
    for group in failures(batch) {
        text.push('\n');
        text.push_str(&failure_block(&group, batch, project));
    }
    text
}

/// Returns each kind of failure without its evidence.
pub(super) fn failures_in_brief(batch: &BatchReport) -> String {
    let groups = failures(batch);
    let heads = groups
        .iter()
        .map(|(rooms, failure)| failure_head(rooms, failure));
    heads.collect()
}

/// A column of the table, apart from the number of the row.
struct Column {
    header: &'static str,
    alignment: CellAlignment,
    cell: fn(&ProbeReport) -> String,
}

/// A narrow table fits 80 columns: it omits what other columns imply, and the time of the dispatch. A room's name stays
/// whole, so that it can be copied and searched for.
fn columns(narrow: bool) -> Vec<Column> {
    let text = |header, cell| Column {
        header,
        alignment: CellAlignment::Left,
        cell,
    };
    let number = |header, cell| Column {
        header,
        alignment: CellAlignment::Right,
        cell,
    };
    let room = text("room", |probe| probe.room.to_string());
    let join = number("join\ndelay", join_delay);
    let speech = number("first\nspeech", |probe| {
        delay(probe.timeline.span(Span::FirstSpeech))
    });
    let reply = number("reply", reply);
    let outcome = text("outcome", |probe| outcome(probe).to_owned());
    if narrow {
        return vec![room, join, speech, reply, outcome];
    }
    vec![
        room,
        text("dispatched\nat (UTC)", |probe| {
            time(probe, Milestone::DispatchSent)
        }),
        text("joined\nat (UTC)", |probe| {
            time(probe, Milestone::AgentJoined)
        }),
        join,
        number("track sub-\nscribed", |probe| delay(track_delay(probe))),
        text("echo pub-\nlished", |probe| {
            let published = probe.timeline.get(Milestone::CallerPublished);
            if published.is_some() { "yes" } else { "-" }.to_owned()
        }),
        speech,
        reply,
        outcome,
    ]
}

/// The header above rows of [`brief_row`].
pub(super) const BRIEF_HEAD: &str = "join delay  first speech    reply  outcome";

/// A room as a row of fixed columns, for `demo` and `drill`. The room may still be open.
pub(super) fn brief_row(timeline: &Timeline, reply: &str, outcome: impl Display) -> String {
    let join = delay(timeline.span(Span::AgentJoin));
    let speech = delay(timeline.span(Span::FirstSpeech));
    format!("{join:>10}  {speech:>12}  {reply:>7}  {outcome}")
}

/// The row of a room that has ended. Its outcome has a colour if stdout takes colour.
pub(super) fn brief_row_of(report: &ProbeReport) -> String {
    let outcome = console::style(outcome(report));
    let outcome = match report.outcome {
        Outcome::Ok => outcome.green(),
        Outcome::Aborted => outcome.yellow(),
        Outcome::Failed(_) => outcome.red(),
    };
    brief_row(&report.timeline, &reply(report), outcome)
}

fn rows(batch: &BatchReport, width: Option<u16>) -> String {
    let columns = columns(width.is_some_and(|width| width < FULL_WIDTH));
    let rule = LineStyle::none().fill('-').junction('-');
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(rule));
    let headers = columns.iter().map(|column| column.header);
    table.set_header(std::iter::once("#").chain(headers));
    for (index, probe) in batch.probes.iter().enumerate() {
        let cells = columns.iter().map(|column| (column.cell)(probe));
        table.add_row(std::iter::once((index + 1).to_string()).chain(cells));
    }
    let alignments = columns.iter().map(|column| column.alignment);
    let alignments = std::iter::once(CellAlignment::Right).chain(alignments);
    for (column, alignment) in table.column_iter_mut().zip(alignments) {
        column.set_padding((0, 1)).set_cell_alignment(alignment);
    }
    table.trim_fmt()
}

/// Returns the rooms, reason, origin and detail of one kind of failure.
fn failure_head(rooms: &[usize], failure: &Failure) -> String {
    let mut text = format!(
        "{}: {} (origin: {})\n",
        room_numbers(rooms),
        reason(failure.reason),
        failure.reason.origin().label()
    );
    push_indented(&mut text, wrapped(&printable(&failure.detail)));
    text
}

/// Returns one kind of failure with its evidence and the links to its sessions.
fn failure_block(
    (rooms, failure): &FailureGroup<'_>,
    batch: &BatchReport,
    project: &Project,
) -> String {
    let mut text = failure_head(rooms, failure);
    let reports = rooms.iter().map(|index| &batch.probes[*index]);
    // The evidence of the first room stands for all: that of the others differs only in identifiers.
    let first = reports.clone().next();
    push_indented(
        &mut text,
        first.map_or_else(Vec::new, |report| {
            let lines = evidence(&report.evidence);
            lines.iter().flat_map(|line| wrapped(line)).collect()
        }),
    );
    let urls = reports.filter_map(|report| session_url(report, project));
    push_indented(&mut text, urls.map(|url| format!("session: {url}")));
    text
}

pub(super) fn push_indented<L: Display>(text: &mut String, lines: impl IntoIterator<Item = L>) {
    for line in lines {
        writeln!(text, "  {line}").expect("writing to a string can't fail");
    }
}

/// Breaks a sentence between words, so that it is readable on a terminal of 80 columns.
fn wrapped(sentence: &str) -> Vec<String> {
    /// 80 columns less two indents of 2: `demo` and `drill` indent once more.
    const WIDTH: usize = 76;
    let mut lines = vec![String::new()];
    for word in sentence.split_whitespace() {
        let line = lines
            .last_mut()
            .expect("the list starts with one line and only grows");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= WIDTH {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::probe::Evidence;
    use crate::report::sample::{WELL, batch, mixed, probe, project};

    #[test]
    fn every_room_has_a_row_and_every_kind_of_failure_a_block() {
        assert_snapshot!(render(&mixed(), &project(), None));
    }

    #[test]
    fn narrow_terminal_gets_a_table_of_80_columns_with_whole_room_names() {
        let text = render(&mixed(), &project(), Some(80));
        for probe in &mixed().probes {
            assert!(text.contains(&probe.room.0), "{text}");
        }
        let rows = text.split("\n\n").next().unwrap();
        let widest = rows.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{rows}");
        assert_snapshot!(text);
    }

    #[test]
    fn batch_without_failures_is_a_table_and_one_line() {
        let rooms = vec![
            probe(1, Outcome::Ok, Evidence::default(), WELL),
            probe(2, Outcome::Ok, Evidence::default(), WELL),
        ];
        assert_snapshot!(render(&batch(rooms, None), &project(), None));
    }

    #[test]
    fn text_of_a_server_cannot_redraw_the_terminal() {
        assert!(!render(&mixed(), &project(), None).contains('\u{1b}'));
    }
}
