//! The README keeps up with the code.

use livekit_canary::probe::{LimitKind, Reason};
use livekit_canary::rules::{ALERTS, Severity};

use crate::canary;

const README: &str = include_str!("../../README.md");

/// The rows of the table whose first column has this title, in `N` cells each, none of them empty.
fn table<const N: usize>(title: &str) -> Vec<[&'static str; N]> {
    let start = format!("| {title} |");
    let lines = README.lines().skip_while(|line| !line.starts_with(&start));
    // Past the title and the rule under it.
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &'static str| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert!(cells.iter().all(|cell| !cell.is_empty()), "{row}");
        <[_; N]>::try_from(cells).unwrap_or_else(|_| panic!("not {N} cells: {row}"))
    };
    rows.map(cells).collect()
}

fn quoted(label: &str) -> String {
    format!("`{label}`")
}

#[test]
fn reasons_are_those_of_the_code_with_origin_meaning_and_remedy() {
    let rows = table("reason").into_iter();
    let told = rows.map(|[reason, origin, _meaning, _remedy]| (reason.to_owned(), origin));
    let known = Reason::ALL.map(|reason| (quoted(reason.label()), reason.origin().label()));
    assert_eq!(told.collect::<Vec<_>>(), known);
}

#[test]
fn limits_are_those_of_the_code_with_what_was_said_and_a_remedy() {
    let rows = table("limit").into_iter();
    let told = rows.map(|[limit, _said, _remedy]| limit.to_owned());
    let known = LimitKind::ALL.map(|kind| quoted(kind.label()));
    assert_eq!(told.collect::<Vec<_>>(), known);
}

#[test]
fn settings_of_the_guide_are_valid_and_fit_their_budget() {
    let start = "```toml\n# canary.toml\n";
    let (_, rest) = README.split_once(start).unwrap();
    let (settings, _) = rest.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("canary.toml", settings),
        ("api-key", "key"),
        ("api-secret", "secret"),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
    }
    let run = canary(folder.path(), ["check", "--config", "canary.toml"], &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(!run.output().contains("warning"), "{}", run.output());
}

#[test]
fn alerts_are_those_of_the_rules_with_severity_meaning_and_remedy() {
    let rows = table("alert").into_iter();
    let told = rows.map(|[alert, severity, _meaning, _remedy]| (alert.to_owned(), severity));
    let mut known: Vec<(String, String)> = Vec::new();
    for alert in ALERTS {
        let severity = match alert.severity {
            Severity::Page => "page",
            Severity::Ticket => "ticket",
        };
        match known.last_mut() {
            Some((name, severities)) if *name == quoted(alert.name) => {
                *severities = format!("{severities}, {severity}");
            }
            _ => known.push((quoted(alert.name), severity.to_owned())),
        }
    }
    let told = told.map(|(alert, severity)| (alert, severity.to_owned()));
    assert_eq!(told.collect::<Vec<_>>(), known);
}
