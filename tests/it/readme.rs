//! The README keeps up with the code.

use livekit_canary::probe::{LimitKind, Reason};

const README: &str = include_str!("../../README.md");

/// The cells of the table row that begins with this word in backquotes.
fn row(word: &str) -> Option<Vec<&'static str>> {
    let start = format!("| `{word}` |");
    let line = README.lines().find(|line| line.starts_with(&start))?;
    Some(line.trim_matches('|').split('|').map(str::trim).collect())
}

#[test]
fn every_reason_has_its_origin_meaning_and_remedy() {
    for reason in Reason::ALL {
        let label = reason.label();
        let cells = row(label).unwrap_or_else(|| panic!("the README has no row for {label}"));
        let [_, origin, meaning, remedy] = cells[..] else {
            panic!("the row of {label} has not four cells");
        };
        assert_eq!(origin, reason.origin().label(), "{label}");
        assert!(!meaning.is_empty() && !remedy.is_empty(), "{label}");
    }
}

#[test]
fn every_kind_of_limit_is_named() {
    for kind in LimitKind::ALL {
        let label = format!("`{}`", kind.label());
        assert!(README.contains(&label), "the README doesn't name {label}");
    }
}
