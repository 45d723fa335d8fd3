//! README and `docs/` agree with the code and with each other: tables, anchors, links, settings, exit statuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use livekit_canary::probe::{LimitKind, Reason};
use livekit_canary::rules::{ALERTS, Severity};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use crate::canary;

const README: &str = include_str!("../../README.md");
const REASONS: &str = include_str!("../../docs/reasons.md");
const ALERTS_PAGE: &str = include_str!("../../docs/alerts.md");
const CONFIGURE: &str = include_str!("../../docs/configure.md");
const EXIT_STATUS: &str = include_str!("../../docs/exit-status.md");

/// The rows of the page's table whose first column has this title, in `N` cells each, none of them empty.
fn table<const N: usize>(page: &'static str, title: &str) -> Vec<[&'static str; N]> {
    let start = format!("| {title} |");
    let lines = page.lines().skip_while(|line| !line.starts_with(&start));
    // After the title and the rule under it.
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

/// A name that links to its section on the same page.
fn linked(name: &str) -> String {
    format!("[`{name}`](#{})", name.to_lowercase())
}

/// The third-level headings of a page, each with the text up to the next heading.
fn sections(page: &'static str) -> Vec<(&'static str, &'static str)> {
    let parts = page.split("\n### ").skip(1);
    let section = |part: &'static str| {
        let (heading, text) = part.split_once('\n').unwrap();
        (heading, text.split("\n## ").next().unwrap())
    };
    parts.map(section).collect()
}

/// What follows `- **label**: ` in a section.
fn item<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let start = format!("- **{label}**: ");
    let mut items = text.lines().filter_map(|line| line.strip_prefix(&start));
    items.next().filter(|item| !item.is_empty())
}

/// Every alert once, with the severities of all its rules.
fn alerts() -> Vec<(&'static str, String)> {
    let mut alerts: Vec<(&str, String)> = Vec::new();
    for alert in ALERTS {
        let severity = match alert.severity {
            Severity::Page => "page",
            Severity::Ticket => "ticket",
        };
        match alerts.last_mut() {
            Some((name, severities)) if *name == alert.name => {
                *severities = format!("{severities}, {severity}");
            }
            _ => alerts.push((alert.name, severity.to_owned())),
        }
    }
    alerts
}

#[test]
fn table_of_reasons_lists_those_of_the_code_with_their_origin() {
    let rows = table(REASONS, "reason").into_iter();
    let documented = rows.map(|[reason, origin, _meaning, _remedy]| (reason.to_owned(), origin));
    let known = Reason::ALL.map(|reason| (linked(reason.label()), reason.origin().label()));
    assert_eq!(documented.collect::<Vec<_>>(), known);
}

#[test]
fn every_reason_has_one_section_with_origin_meaning_and_remedy() {
    let sections = sections(REASONS);
    let headings: BTreeSet<_> = sections.iter().map(|(heading, _)| *heading).collect();
    let known = Reason::ALL.map(|reason| quoted(reason.label()));
    assert_eq!(headings, known.iter().map(String::as_str).collect());
    assert_eq!(sections.len(), known.len());
    for reason in Reason::ALL {
        let heading = quoted(reason.label());
        let (_, text) = sections.iter().find(|(own, _)| *own == heading).unwrap();
        let origin = item(text, "Origin");
        assert_eq!(origin, Some(reason.origin().label()), "{heading}");
        for label in ["Meaning", "What to do"] {
            assert!(item(text, label).is_some(), "{heading}: {label}");
        }
    }
}

#[test]
fn table_of_limits_lists_those_of_the_code() {
    let rows = table(REASONS, "limit").into_iter();
    let documented = rows.map(|[limit, _answer, _remedy]| limit.to_owned());
    let known = LimitKind::ALL.map(|kind| quoted(kind.label()));
    assert_eq!(documented.collect::<Vec<_>>(), known);
}

#[test]
fn table_of_alerts_lists_those_of_the_rules_with_their_severity() {
    let rows = table(ALERTS_PAGE, "alert").into_iter();
    let documented =
        rows.map(|[alert, severity, _meaning, _remedy]| (alert.to_owned(), severity.to_owned()));
    let known = alerts().into_iter();
    let known = known.map(|(name, severity)| (linked(name), severity));
    assert_eq!(documented.collect::<Vec<_>>(), known.collect::<Vec<_>>());
}

#[test]
fn every_alert_has_one_section_with_severity_meaning_and_remedy() {
    let sections = sections(ALERTS_PAGE);
    let headings: Vec<_> = sections.iter().map(|(heading, _)| *heading).collect();
    let alerts = alerts();
    let names: Vec<_> = alerts.iter().map(|(name, _)| *name).collect();
    assert_eq!(headings, names);
    for ((heading, text), (_, severity)) in sections.iter().zip(&alerts) {
        assert_eq!(item(text, "Severity"), Some(severity.as_str()), "{heading}");
        for label in ["Meaning", "Look first at", "What to do"] {
            assert!(item(text, label).is_some(), "{heading}: {label}");
        }
    }
}

#[test]
fn settings_of_the_readme_are_valid_and_fit_their_budget() {
    let start = "```toml\n# canary.toml\n";
    let (_, rest) = README.split_once(start).unwrap();
    let (settings, _) = rest.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("canary.toml", settings),
        ("api-key", "key"),
        ("api-secret", "secret"),
    ] {
        fs::write(folder.path().join(file), text).unwrap();
    }
    let run = canary(folder.path(), ["check", "--config", "canary.toml"], &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(!run.output().contains("warning"), "{}", run.output());
}

#[test]
fn exit_statuses_are_those_of_the_help_in_its_order() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["once", "run", "drill"] {
        let help = canary(folder.path(), [command, "--help"], &[]).stdout;
        let (_, epilogue) = help.split_once("Exit status").unwrap();
        let first_words = epilogue.lines().skip(1);
        let first_words = first_words.filter_map(|line| line.split_whitespace().next());
        let in_help: Vec<_> = first_words
            .filter(|word| word.parse::<u8>().is_ok())
            .collect();
        let (_, section) = EXIT_STATUS
            .split_once(&format!("\n## {command}\n"))
            .unwrap();
        let rows = table(section, "status").into_iter();
        let documented: Vec<_> = rows.map(|[status, _meaning]| status).collect();
        assert_eq!(documented, in_help, "{command}");
    }
}

#[test]
fn modes_of_dispatch_and_ramps_are_those_of_the_help() {
    let folder = tempfile::tempdir().unwrap();
    let help = canary(folder.path(), ["once", "--help"], &[]).stdout;
    let in_help = |flag: &str| {
        let (_, flag) = help.split_once(&format!("--{flag} <")).unwrap();
        let (_, values) = flag.split_once("[possible values: ").unwrap();
        let (values, _) = values.split_once(']').unwrap();
        values.split(", ").map(quoted).collect::<Vec<_>>()
    };
    let modes = table(CONFIGURE, "mode").into_iter();
    let modes: Vec<_> = modes
        .map(|[mode, _named_by, _sent, _accepted]| mode)
        .collect();
    assert_eq!(modes, in_help("dispatch"));
    let ramps = table(CONFIGURE, "ramp").into_iter();
    let ramps: Vec<_> = ramps.map(|[ramp, _opens, _stopped_by]| ramp).collect();
    assert_eq!(ramps, in_help("ramp"));
}

#[test]
fn every_file_that_a_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["config/", "deploy/", "docs/", "grafana/", "src/", "tests/"];
    let mut checked = 0;
    for (path, page) in pages() {
        for word in page.code.iter().filter(|word| !word.contains(' ')) {
            if folders.iter().any(|folder| word.starts_with(folder)) {
                assert!(root.join(word).exists(), "{}: {word}", path.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked} files");
}

/// A page, with the anchors that GitHub gives its headings, and its links.
struct Page {
    anchors: BTreeSet<String>,
    links: Vec<String>,
    /// Its words in backquotes.
    code: Vec<String>,
}

impl Page {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let mut anchors = BTreeSet::new();
        let mut links = Vec::new();
        let mut code = Vec::new();
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
            if let Event::Code(words) = &event {
                code.push(words.to_string());
            }
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::Text(words) | Event::Code(words) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&words);
                    }
                }
                Event::End(TagEnd::Heading(_)) => {
                    let anchor = anchor(&heading.take().unwrap());
                    // GitHub numbers a repeated anchor; here a link to it would be ambiguous to a reader.
                    let unique = anchors.insert(anchor.clone());
                    assert!(unique, "{}: #{anchor} twice", path.display());
                }
                Event::Start(Tag::Link { dest_url, .. }) => links.push(dest_url.into_string()),
                _ => {}
            }
        }
        Self {
            anchors,
            links,
            code,
        }
    }
}

/// GitHub's anchor of a heading: lower case, without punctuation except `-` and `_`, a `-` for each space.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter_map(|char| match char {
        ' ' | '-' => Some('-'),
        '_' => Some('_'),
        char => char.is_alphanumeric().then_some(char),
    });
    kept.flat_map(char::to_lowercase).collect()
}

/// Every Markdown file of the repository that people read, by its path.
fn pages() -> BTreeMap<PathBuf, Page> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [root.to_owned(), root.join("docs")]
        .into_iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let pages: BTreeMap<_, _> = files
        .map(|path| (path.clone(), Page::read(&path)))
        .collect();
    assert!(pages.len() >= 10, "{:?}", pages.keys());
    pages
}

#[test]
fn every_relative_link_leads_to_a_file_and_its_anchor_to_a_heading() {
    let pages = pages();
    let mut checked = 0;
    for (path, page) in &pages {
        for link in &page.links {
            if link.starts_with("https://") {
                continue;
            }
            checked += 1;
            let shown = format!("{}: {link}", path.display());
            let (file, anchor) = link
                .split_once('#')
                .map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
            let to = if file.is_empty() {
                path.clone()
            } else {
                let joined = path.parent().unwrap().join(file);
                joined
                    .canonicalize()
                    .unwrap_or_else(|_| panic!("no file: {shown}"))
            };
            if let Some(anchor) = anchor {
                let page = pages.get(&to).unwrap_or_else(|| panic!("no page: {shown}"));
                assert!(page.anchors.contains(anchor), "no such heading: {shown}");
            }
        }
    }
    assert!(checked > 50, "{checked} links");
}

#[test]
fn every_page_of_docs_is_linked_from_the_readme() {
    let pages = pages();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let linked = &pages[&root.join("README.md")].links;
    for path in pages.keys() {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let found = linked.iter().any(|link| link == name);
        assert!(found || name == "README.md", "{name}");
    }
}

#[test]
fn anchors_are_those_of_github() {
    for (heading, expected) in [
        ("AgentFailing", "agentfailing"),
        ("agent_silent", "agent_silent"),
        ("Size it to the plan", "size-it-to-the-plan"),
        ("TLS & users: today", "tls--users-today"),
    ] {
        assert_eq!(anchor(heading), expected);
    }
}
