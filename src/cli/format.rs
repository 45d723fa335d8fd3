//! The parts of a result as text. Every output format for people uses the same.

use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::probe::{Evidence, Failure, Milestone, Outcome, ProbeReport, Reason, Span, Turn};
use crate::report::{BatchReport, counted};

/// Returns the UTC time of day of a milestone, or `-`.
///
/// It is the wall clock at the probe's start plus the monotonic time since then, so a clock that is set meanwhile does not
/// reorder milestones.
pub(super) fn time(probe: &ProbeReport, milestone: Milestone) -> String {
    let since = probe.timeline.since_started(milestone);
    let at: Option<DateTime<Utc>> = since.map(|since| probe.started_at + since);
    at.map_or_else(|| "-".to_owned(), |at| at.format("%H:%M:%S").to_string())
}

/// Returns seconds with three decimals, or `-`.
pub(super) fn delay(duration: Option<Duration>) -> String {
    duration.map_or_else(
        || "-".to_owned(),
        |duration| format!("{:.3} s", duration.as_secs_f64()),
    )
}

/// Returns the join delay, with `≤` if only an upper bound of it is known.
pub(super) fn join_delay(report: &ProbeReport) -> String {
    let bound = if report.join_upper_bound { "≤ " } else { "" };
    let span = report.timeline.span(Span::AgentJoin);
    span.map_or_else(
        || delay(None),
        |span| format!("{bound}{}", delay(Some(span))),
    )
}

/// Returns the time from the dispatch to the subscription of the agent's track. The other delays of a row start at the
/// dispatch, too.
pub(super) fn track_delay(report: &ProbeReport) -> Option<Duration> {
    let sent = report.timeline.get(Milestone::DispatchSent)?;
    let subscribed = report.timeline.get(Milestone::AgentTrackSubscribed)?;
    subscribed.checked_duration_since(sent)
}

/// Returns the first reply delay; without one, `overlap` if the agent spoke into the echo, and `none` if nothing followed
/// the end of the echo. `-` means that no echo of an utterance was played to its end, so no reply was due.
pub(super) fn reply(report: &ProbeReport) -> String {
    let turns = &report.turns;
    let measured = turns.iter().find_map(Turn::reply_delay);
    if measured.is_some() {
        return delay(measured);
    }
    let without = if turns.iter().any(|turn| turn.overlap) {
        "overlap"
    } else if turns.iter().any(|turn| turn.caller_ended.is_some()) {
        "none"
    } else {
        "-"
    };
    without.to_owned()
}

/// Returns the label of the outcome: `ok`, `aborted` or the reason.
pub(super) fn outcome(report: &ProbeReport) -> &'static str {
    let failure = report.outcome.failure();
    failure.map_or(report.outcome.label(), |failure| failure.reason.label())
}

/// Returns the counts and delays of a batch, and on a second line the rooms that did not open.
pub(super) fn summary(batch: &BatchReport) -> String {
    let summary = batch.summary();
    let rooms = counted(batch.probes.len() as u64, "room");
    let mut text = format!("{} of {rooms} ok", summary.ok);
    for (count, what) in [(summary.failed, "failed"), (summary.aborted, "aborted")] {
        if count > 0 {
            write!(text, ", {count} {what}").expect("writing to a string can't fail");
        }
    }
    if let Some(delays) = summary.join_delay {
        let [p50, p90, max] = [delays.p50, delays.p90, delays.max].map(|one| delay(Some(one)));
        write!(text, "; join delay p50 {p50}, p90 {p90}, max {max}")
            .expect("writing to a string can't fail");
    }
    if let Some(rest) = &batch.not_opened {
        write!(
            text,
            "\n{} did not open: {}",
            counted(rest.rooms as u64, "room"),
            printable(&rest.why)
        )
        .expect("writing to a string can't fail");
    }
    text
}

/// The rooms that failed in the same way, by their index in the batch. It is printed once for all of them.
pub(super) type FailureGroup<'a> = (Vec<usize>, &'a Failure);

pub(super) fn failures(batch: &BatchReport) -> Vec<FailureGroup<'_>> {
    let mut groups: Vec<FailureGroup<'_>> = Vec::new();
    for (index, probe) in batch.probes.iter().enumerate() {
        let Outcome::Failed(failure) = &probe.outcome else {
            continue;
        };
        match groups.iter_mut().find(|(_, other)| *other == failure) {
            Some((rooms, _)) => rooms.push(index),
            None => groups.push((vec![index], failure)),
        }
    }
    groups
}

/// Returns `room 2` or `rooms 2, 3`, with the numbers of the table's rows.
pub(super) fn room_numbers(rooms: &[usize]) -> String {
    let numbers: Vec<String> = rooms.iter().map(|index| (index + 1).to_string()).collect();
    let plural = if rooms.len() == 1 { "room" } else { "rooms" };
    format!("{plural} {}", numbers.join(", "))
}

pub(super) fn reason(reason: Reason) -> String {
    match reason {
        Reason::PlanLimit(kind) => format!("{} ({})", reason.label(), kind.label()),
        _ => reason.label().to_owned(),
    }
}

/// Returns the evidence that a person needs first, one line each. The JSON has all of it.
pub(super) fn evidence(evidence: &Evidence) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(step) = evidence.step {
        let deadline = evidence
            .deadline_seconds
            .map_or_else(String::new, |seconds| format!(", deadline {seconds} s"));
        lines.push(format!("step: {step}{deadline}"));
    }
    if let Some(status) = evidence.http_status {
        let code = evidence.twirp_code.as_deref();
        let code = code.map_or_else(String::new, |code| format!(", code {code}"));
        lines.push(format!("HTTP status: {status}{code}"));
    }
    if let Some(answer) = &evidence.answer {
        lines.push(format!("response: {answer}"));
    }
    if let Some(seconds) = evidence.retry_after_seconds {
        lines.push(format!("retry after: {seconds} s"));
    }
    match evidence.dispatches.as_deref() {
        Some([]) => lines.push("dispatches: none".to_owned()),
        Some(listed) => lines.extend(listed.iter().map(|one| format!("dispatch: {one}"))),
        None => {}
    }
    if !evidence.participants.is_empty() {
        lines.push(format!("in the room: {}", evidence.participants.join(", ")));
    }
    if !evidence.tracks.is_empty() {
        lines.push(format!("tracks: {}", evidence.tracks.join(", ")));
    }
    lines.extend(evidence.notes.iter().map(|note| format!("note: {note}")));
    lines.into_iter().map(|line| one_line(&line)).collect()
}

/// Returns the text on one line, without its end if it is long.
fn one_line(text: &str) -> String {
    const MAX_CHARS: usize = 300;
    let mut line: String = printable(text).chars().take(MAX_CHARS).collect();
    if text.chars().count() > MAX_CHARS {
        line.push('…');
    }
    line
}

/// Returns the text without control characters, which could redraw a terminal, and without U+FFFE and U+FFFF, which XML
/// forbids.
pub(super) fn printable(text: &str) -> String {
    text.replace(
        |char: char| char.is_control() || matches!(char, '\u{fffe}' | '\u{ffff}'),
        " ",
    )
}
