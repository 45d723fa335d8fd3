//! Who may know whom, held against the `crate::` paths of the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A file, or a folder with its file, and the modules of this crate that its code may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("schedule", &["config"]),
    ("livekit/wire/connect", &["livekit"]),
    ("livekit", &["config", "livekit"]),
    ("janitor", &["livekit"]),
    ("probe/timeline", &[]),
    // The state machine names what it is told, and does no I/O: only the driver knows the API and the engine's actor.
    ("probe", &["config", "janitor", "livekit", "probe"]),
    ("report", &["config", "livekit", "probe"]),
    (
        "batch",
        &[
            "config", "guard", "history", "janitor", "livekit", "probe", "report",
        ],
    ),
    ("metrics", &["config", "probe", "report"]),
    ("history", &["config", "livekit", "probe", "report"]),
    (
        "guard",
        &["config", "history", "livekit", "probe", "report"],
    ),
    // Shows what it is handed: no probe, no batch.
    ("http", &["config", "history", "metrics", "report"]),
    // Puts everything together; the recorder alone looks into a report.
    (
        "daemon",
        &[
            "batch", "config", "daemon", "guard", "history", "http", "janitor", "livekit",
            "metrics", "probe", "report", "schedule",
        ],
    ),
    (
        "cli",
        &[
            "batch",
            "config",
            "daemon",
            "guard",
            "history",
            "http",
            "janitor",
            "livekit",
            "metrics",
            "probe",
            "report",
            "rules",
            "sandbox",
            "schedule",
            "telemetry",
        ],
    ),
    // Settings in, text out.
    ("rules", &["config", "schedule"]),
    ("telemetry", &[]),
    ("build", &[]),
    // Shares no code with the client side.
    ("sandbox", &[]),
    ("main", &[]),
    ("lib", &[]),
];

/// What the probe's core may take from `livekit`: plain types that say what happened, and in which figures.
const TYPES_FOR_THE_PROBE: &[&str] = &[
    "livekit::RoomName",
    "livekit::wire::api::ApiError",
    "livekit::wire::api::Call",
    "livekit::wire::api::DispatchInfo",
    "livekit::wire::api::RoomInfo",
    "livekit::event::Agent",
    "livekit::event::AudioStats",
    "livekit::event::EndReason",
    "livekit::event::MediaPermission",
    "livekit::event::RoomEvent",
    "livekit::event::RoomEventKind",
    "livekit::event::Speaker",
    "livekit::event::TurnMetrics",
    "livekit::event::to_microseconds",
    "livekit::wire::connect::ConnectError",
    "livekit::wire::request::HttpRejection",
    "livekit::wire::signal::SignalError",
    "livekit::event::TranscriptText",
    "livekit::event::TranscriptSegment",
];

struct Source {
    /// `probe/driver` for `src/probe/driver.rs`.
    name: String,
    code: String,
}

/// Every file of `src` without tests and comments: those may name whom they like.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files
        .into_iter()
        .map(|file| {
            let text = fs::read_to_string(&file).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            let name = file.strip_prefix(&root).unwrap().with_extension("");
            Source {
                name: name.to_str().unwrap().to_owned(),
                code: code
                    .lines()
                    .map(|line| line.split("//").next().unwrap())
                    .collect::<Vec<_>>()
                    .join("\n"),
            }
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !path.ends_with("tests.rs")
        {
            files.push(path);
        }
    }
}

/// Every `crate::` path, with the braces of `use` unfolded one level deep at a time.
fn paths(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (start, _) in code.match_indices("crate::") {
        unfold("", &code[start + "crate::".len()..], &mut found);
    }
    found
}

/// Adds the paths that `rest` begins with to `found`, and returns what follows them.
fn unfold<'a>(prefix: &str, rest: &'a str, found: &mut BTreeSet<String>) -> &'a str {
    let rest = rest.trim_start();
    if let Some(mut rest) = rest.strip_prefix('{') {
        loop {
            rest = unfold(prefix, rest, found).trim_start();
            match rest.strip_prefix(',') {
                Some(more) if !more.trim_start().starts_with('}') => rest = more,
                Some(more) => return more.trim_start().trim_start_matches('}'),
                None => return rest.trim_start_matches('}'),
            }
        }
    }
    let end = rest
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    let path = if prefix.is_empty() {
        word.to_owned()
    } else {
        format!("{prefix}::{word}")
    };
    if let Some(deeper) = after.strip_prefix("::") {
        return unfold(&path, deeper, found);
    }
    found.insert(path);
    after
}

/// The rule for a file: the longest that its name or folder begins with.
fn allowed(name: &str) -> &'static [&'static str] {
    let matches = |rule: &str| name == rule || name.starts_with(&format!("{rule}/"));
    let rule = ARROWS
        .iter()
        .filter(|(rule, _)| matches(rule))
        .max_by_key(|(rule, _)| rule.len());
    let (_, modules) = rule.unwrap_or_else(|| panic!("no arrow is drawn for src/{name}.rs"));
    modules
}

#[test]
fn module_knows_only_whom_it_may() {
    for source in sources() {
        for path in paths(&source.code) {
            let module = path.split("::").next().unwrap();
            let own = source.name.split('/').next().unwrap();
            assert!(
                module == own || allowed(&source.name).contains(&module),
                "src/{}.rs names crate::{path}",
                source.name
            );
        }
    }
}

#[test]
fn probe_core_knows_no_io() {
    for source in sources() {
        let core = source.name == "probe" || source.name.starts_with("probe/");
        if !core || source.name == "probe/driver" {
            continue;
        }
        for path in paths(&source.code) {
            assert!(
                !path.starts_with("livekit") || TYPES_FOR_THE_PROBE.contains(&path.as_str()),
                "src/{}.rs names crate::{path}",
                source.name
            );
        }
        for io in [
            "tokio::net",
            "tokio::fs",
            "tokio::spawn",
            "std::net",
            "std::fs",
            "sleep",
        ] {
            assert!(
                !source.code.contains(io),
                "src/{}.rs does I/O: {io}",
                source.name
            );
        }
    }
}

#[test]
fn history_and_guard_know_no_more_of_livekit_than_a_rooms_name() {
    for source in sources() {
        if !["history", "guard"].contains(&source.name.split('/').next().unwrap()) {
            continue;
        }
        for path in paths(&source.code) {
            assert!(
                !path.starts_with("livekit") || path == "livekit::RoomName",
                "src/{}.rs names crate::{path}",
                source.name
            );
        }
    }
}

#[test]
fn only_the_command_line_prints() {
    for source in sources()
        .iter()
        .filter(|source| !source.name.starts_with("cli"))
        // The first writes the log to stderr, the second speaks to Cargo.
        .filter(|source| source.name != "telemetry" && source.name != "build")
    {
        for print in ["println!", "print!(", "stdout()", "stderr()"] {
            assert!(
                !source.code.contains(print),
                "src/{}.rs: {print}",
                source.name
            );
        }
    }
}

#[test]
fn nested_braces_are_unfolded() {
    let code = "use crate::a::{b::{C, D}, e::F,};\nlet x = crate::g::h();";
    let expected = ["a::b::C", "a::b::D", "a::e::F", "g::h"].map(str::to_owned);
    assert_eq!(paths(code), BTreeSet::from(expected));
}
