//! The patterns of unclear English that a machine can find, in everything that a person reads: HELP, `--help`, alerts,
//! the docs, messages and doc comments.

use std::fs;
use std::path::Path;

use livekit_canary::metrics::CATALOGUE;
use livekit_canary::rules::ALERTS;

use crate::canary;
use crate::sources::Source;

const MAX_WORDS: usize = 30;

/// What no sentence begins with.
const BAD_STARTS: [&str; 6] = [
    "Where",
    "Whoever",
    "Whatever",
    "Nobody",
    "Somebody",
    "Whereupon",
];

/// What stands in no sentence.
const BAD_WORDS: [&str; 12] = [
    "anew",
    "heed",
    "heeded",
    "nobody",
    "nobody's",
    "somebody",
    "vouch",
    "vouches",
    "whatever becomes",
    "whoever",
    "so long as",
    "so many",
];

/// The sentences of a text; the period of an abbreviation, a version or a file name ends none.
fn sentences(text: &str) -> impl Iterator<Item = String> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let ends = [". ", "? ", "! ", ": ", "; "];
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = ends.iter().filter_map(|end| rest.find(end)).min();
        let sentence = match end {
            Some(end) => rest.drain(..=end).collect::<String>(),
            None => std::mem::take(&mut rest),
        };
        rest = rest.trim_start().to_owned();
        Some(sentence.trim().to_owned())
    })
}

/// What is wrong with a text, if anything.
fn fault(text: &str) -> Option<String> {
    let words = |text: &str| {
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '\'');
        let words = words.filter(|word| !word.is_empty()).map(str::to_lowercase);
        format!(" {} ", words.collect::<Vec<_>>().join(" "))
    };
    for sentence in sentences(text) {
        let start = sentence.trim_start_matches(|c: char| !c.is_alphanumeric());
        if let Some(bad) = BAD_STARTS.iter().find(|bad| starts_with_word(start, bad)) {
            return Some(format!("a sentence begins with {bad:?}: {sentence}"));
        }
        let words = words(&sentence);
        if let Some(bad) = BAD_WORDS
            .iter()
            .find(|bad| words.contains(&format!(" {bad} ")))
        {
            return Some(format!("{bad:?}: {sentence}"));
        }
    }
    None
}

fn starts_with_word(text: &str, word: &str) -> bool {
    let rest = text.strip_prefix(word);
    rest.is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
}

/// The first sentence that is too long to be understood at once.
fn too_long(text: &str) -> Option<String> {
    sentences(text).find(|sentence| sentence.split_whitespace().count() > MAX_WORDS)
}

fn expect_plain<'a>(texts: impl IntoIterator<Item = (String, &'a str)>) {
    let faults = texts.into_iter().filter_map(|(place, text)| {
        let fault = fault(text).or_else(|| too_long(text).map(|long| format!("long: {long}")));
        fault.map(|fault| format!("{place}: {fault}"))
    });
    let faults: Vec<_> = faults.collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn help_of_metrics_is_plain() {
    expect_plain(
        CATALOGUE
            .iter()
            .map(|series| (series.name.to_owned(), series.help)),
    );
}

/// A template without what stands between its braces.
fn without_actions(template: &str) -> String {
    let parts = template.split("{{");
    let texts = parts.map(|part| part.split_once("}}").map_or(part, |(_, text)| text));
    texts.collect()
}

#[test]
fn alerts_are_plain() {
    let folder = tempfile::tempdir().unwrap();
    let rules = canary(folder.path(), ["rules"], &[]).stdout;
    let annotations = ["summary: ", "description: ", "remedy: "];
    let texts = rules.lines().filter_map(|line| {
        let annotation = annotations
            .iter()
            .find(|key| line.trim_start().starts_with(**key))?;
        Some((
            annotation.to_string(),
            without_actions(line.split_once(": ")?.1),
        ))
    });
    let texts: Vec<_> = texts.collect();
    assert!(texts.len() >= ALERTS.len());
    expect_plain(
        texts
            .iter()
            .map(|(place, text)| (place.clone(), text.as_str())),
    );
}

#[test]
fn help_of_the_commands_is_plain() {
    let folder = tempfile::tempdir().unwrap();
    let help = |command: &str| canary(folder.path(), [command, "--help"], &[]).stdout;
    for command in [
        "once", "run", "demo", "drill", "check", "rules", "sandbox", "health",
    ] {
        let help = help(command);
        assert!(!help.is_empty(), "{command}");
        // A row of a table is a text of its own; a gap stands between its columns.
        let mut texts = vec![String::new()];
        for line in help.lines() {
            let starts_row = line.trim_start().contains("  ");
            if line.is_empty() || starts_row {
                texts.push(String::new());
            }
            let text = texts.last_mut().expect("it begins with one");
            *text = format!("{text} {line}");
        }
        expect_plain(texts.iter().map(|text| (command.to_owned(), text.as_str())));
    }
}

#[test]
fn messages_and_doc_comments_are_plain() {
    let mut faults = Vec::new();
    for source in Source::all() {
        let literals = source
            .words
            .iter()
            .filter(|word| word.contains('"') && word.contains(' '));
        for literal in literals {
            let text = literal
                .trim_start_matches(['r', '#'])
                .trim_matches(['"', '#']);
            // A string literal shows its line breaks as they were typed.
            let text = text.replace("\\n", "\n").replace("\\\n", " ");
            faults.extend(fault(&text).map(|fault| format!("{}: {fault}", source.module)));
        }
    }
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn docs_are_plain() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    let pages = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(|page| root.join(page));
    for page in docs.chain(pages) {
        let text = fs::read_to_string(&page).unwrap();
        let prose = text.split("```").step_by(2);
        for paragraph in prose.flat_map(|part| part.split("\n\n")) {
            let fault = fault(paragraph);
            assert_eq!(fault, None, "{}", page.display());
        }
    }
}

#[test]
fn unclear_english_is_found() {
    assert_eq!(
        fault("If a room is gone, its agent leaves. The file where it stands."),
        None
    );
    assert!(fault("It works. Where it does not, look.").is_some());
    assert!(fault("It counts anew.").is_some());
    let long = "word ".repeat(MAX_WORDS + 1);
    assert!(too_long(&long).is_some());
    assert_eq!(too_long(&long.replacen(" word", ". word", 15)), None);
}
