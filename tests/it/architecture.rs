//! Which module may import which: the map in `src/lib.rs`, checked against every production line of the sources.
//!
//! The sources are read as tokens, so that comments, strings and `#[cfg(test)]` items count for nothing, wherever they stand.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{Source, production};

const MAP: &str = include_str!("../../src/lib.rs");

/// Files and folders that may not import each other in a circle, file by file.
const FREE_OF_CYCLES: [&str; 3] = ["config", "livekit", "sandbox"];

/// The layers of `livekit`; each may import the ones before it.
const LAYERS: [&str; 8] = [
    "wire",
    "event",
    "join",
    "audio",
    "room",
    "native",
    "libwebrtc",
    "engine",
];

/// What the probe's core may take from `livekit`: plain types that report what happened, with their figures.
const TYPES_FOR_THE_PROBE: &[&str] = &[
    "livekit::RoomName",
    "livekit::event",
    "livekit::wire::api::ApiError",
    "livekit::wire::api::Call",
    "livekit::wire::api::DispatchInfo",
    "livekit::wire::api::ParticipantBrief",
    "livekit::wire::api::RoomInfo",
    "livekit::wire::connect::ConnectError",
    "livekit::wire::request::HttpRejection",
    "livekit::wire::signal::SignalError",
];

fn top(path: &str) -> &str {
    path.split("::").next().unwrap()
}

/// A production source file and every path into this crate that it names, such as `probe::driver::Context`.
struct Imports {
    source: &'static Source,
    paths: BTreeSet<String>,
}

impl Imports {
    fn all() -> Vec<Self> {
        let files = Source::all().iter().map(|source| Self {
            paths: imports(&source.module, &source.words),
            source,
        });
        files.collect()
    }

    fn module(&self) -> &str {
        &self.source.module
    }

    fn top(&self) -> &str {
        top(&self.source.module)
    }

    fn of_livekit(&self) -> impl Iterator<Item = &String> {
        self.paths.iter().filter(|path| top(path) == "livekit")
    }
}

/// Every path that begins with `crate` or `super`, from the crate's root on, with the braces of `use` unfolded.
fn imports(module: &str, words: &[String]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (place, word) in words.iter().enumerate() {
        let inside_a_path = place > 0 && words[place - 1] == "::";
        if inside_a_path || !["crate", "super"].contains(&word.as_str()) {
            continue;
        }
        let mut prefix: Vec<String> = match word.as_str() {
            "crate" => Vec::new(),
            _ => parent(module.split("::").map(str::to_owned).collect()),
        };
        let mut rest = &words[place + 1..];
        while let ["::", "super", ..] = as_strs(rest)[..] {
            prefix = parent(prefix);
            rest = &rest[2..];
        }
        // `pub(crate)` and `pub(super)` name no path.
        if rest.first().is_some_and(|word| word == "::") {
            unfold(&prefix, &rest[1..], &mut found);
        }
    }
    found
}

fn as_strs(words: &[String]) -> Vec<&str> {
    words.iter().take(3).map(String::as_str).collect()
}

fn parent(mut path: Vec<String>) -> Vec<String> {
    path.pop();
    path
}

/// Adds the paths that `words` begins with, below `prefix`; returns what follows them.
fn unfold<'a>(
    prefix: &[String],
    words: &'a [String],
    found: &mut BTreeSet<String>,
) -> &'a [String] {
    let Some(first) = words.first() else {
        return words;
    };
    if first == "{" {
        let mut rest = &words[1..];
        while rest.first().is_some_and(|word| word != "}") {
            rest = unfold(prefix, rest, found);
            while rest.first().is_some_and(|word| word != "}" && word != ",") {
                rest = &rest[1..];
            }
            if rest.first().is_some_and(|word| word == ",") {
                rest = &rest[1..];
            }
        }
        return rest.get(1..).unwrap_or_default();
    }
    let path: Vec<String> = if first == "self" {
        prefix.to_vec()
    } else {
        [prefix, std::slice::from_ref(first)].concat()
    };
    match words.get(1) {
        Some(colons) if colons == "::" => unfold(&path, &words[2..], found),
        _ => {
            found.insert(path.join("::"));
            &words[1..]
        }
    }
}

/// The lines `module → imports` of the map in `src/lib.rs`, in their order.
fn arrows() -> Vec<(&'static str, Vec<&'static str>)> {
    let lines = MAP.lines().filter_map(|line| line.strip_prefix("//! "));
    lines
        .filter_map(|line| line.split_once(" → "))
        .map(|(module, imports)| {
            let imports = imports.split(", ").map(str::trim);
            (
                module.trim(),
                imports.filter(|name| *name != "nothing").collect(),
            )
        })
        .collect()
}

/// Which files of these sources each of them imports.
fn graph(files: &[Imports]) -> BTreeMap<&str, BTreeSet<&str>> {
    let modules: BTreeSet<&str> = files.iter().map(Imports::module).collect();
    let file_of = |path: &str| {
        let mut path = path;
        loop {
            if let Some(module) = modules.get(path) {
                return Some(*module);
            }
            path = path.rsplit_once("::")?.0;
        }
    };
    let edges = files.iter().map(|file| {
        let imported = file.paths.iter().filter_map(|path| file_of(path));
        // A file may name its own items by the crate's path.
        let others = imported.filter(|other| *other != file.module());
        (file.module(), others.collect())
    });
    edges.collect()
}

/// A circle of files that import each other, if there is one.
fn cycle<'a>(graph: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Option<Vec<&'a str>> {
    fn visit<'a>(
        file: &'a str,
        graph: &BTreeMap<&'a str, BTreeSet<&'a str>>,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> bool {
        if let Some(start) = path.iter().position(|passed| *passed == file) {
            path.drain(..start);
            return true;
        }
        if !done.insert(file) {
            return false;
        }
        path.push(file);
        for next in graph.get(file).into_iter().flatten() {
            if visit(next, graph, path, done) {
                return true;
            }
        }
        path.pop();
        false
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|file| {
        let mut path = Vec::new();
        visit(file, graph, &mut path, &mut done).then_some(path)
    })
}

#[test]
fn map_names_every_module_and_has_no_cycle() {
    let mut above = BTreeSet::new();
    for (module, imports) in arrows() {
        for import in imports {
            assert!(
                above.contains(import),
                "src/lib.rs: {module} imports {import}, which must stand above it"
            );
        }
        assert!(above.insert(module), "src/lib.rs names {module} twice");
    }
    let declared = MAP.lines().filter_map(|line| {
        let name = line
            .trim_start_matches("pub(crate) ")
            .trim_start_matches("pub ");
        name.strip_prefix("mod ")?.strip_suffix(';')
    });
    assert_eq!(above, declared.collect());
}

#[test]
fn imports_between_modules_are_those_of_the_map() {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in Imports::all() {
        if ["lib", "main", "build"].contains(&file.module()) {
            continue;
        }
        let others = file.paths.iter().map(|path| top(path));
        let others = others.filter(|module| *module != file.top());
        let others: Vec<_> = others.map(str::to_owned).collect();
        found
            .entry(file.top().to_owned())
            .or_default()
            .extend(others);
    }
    let drawn = arrows().into_iter().map(|(module, imports)| {
        let imports = imports.into_iter().map(str::to_owned).collect();
        (module.to_owned(), imports)
    });
    assert_eq!(found, drawn.collect());
}

#[test]
fn files_of_a_module_do_not_import_each_other_in_a_circle() {
    let files = Imports::all();
    for module in FREE_OF_CYCLES {
        let graph = graph(&files).into_iter();
        let circle = cycle(&graph.filter(|(file, _)| top(file) == module).collect());
        assert_eq!(circle, None, "in {module}");
    }
}

#[test]
fn layers_of_livekit_import_only_those_below() {
    let layer_of = |path: &str| {
        let layer = path.strip_prefix("livekit::")?.split("::").next()?;
        LAYERS.iter().position(|known| *known == layer)
    };
    for file in Imports::all() {
        let Some(own) = layer_of(file.module()) else {
            continue;
        };
        for path in &file.paths {
            let below = layer_of(path).is_none_or(|layer| layer <= own);
            assert!(below, "{} imports {path}", file.module());
        }
    }
}

#[test]
fn probe_core_knows_no_io() {
    let io = [
        &["tokio", "::", "net"][..],
        &["tokio", "::", "fs"],
        &["tokio", "::", "spawn"],
        &["std", "::", "net"],
        &["std", "::", "fs"],
        &["sleep"],
    ];
    for file in Imports::all() {
        if file.top() != "probe" || file.module() == "probe::driver" {
            continue;
        }
        for path in file.of_livekit() {
            let allowed = TYPES_FOR_THE_PROBE
                .iter()
                .any(|allowed| path == allowed || path.starts_with(&format!("{allowed}::")));
            assert!(allowed, "{} imports {path}", file.module());
        }
        for io in io {
            assert!(!file.source.contains(io), "{}: {io:?}", file.module());
        }
    }
}

#[test]
fn history_and_guard_know_only_the_room_name_of_livekit() {
    for file in Imports::all() {
        if ["history", "guard"].contains(&file.top()) {
            for path in file.of_livekit() {
                assert_eq!(path, "livekit::RoomName", "{}", file.module());
            }
        }
    }
}

#[test]
fn only_the_command_line_prints() {
    for file in Imports::all() {
        // Telemetry writes the log to stderr, and the build script prints to Cargo.
        if ["cli", "telemetry", "build"].contains(&file.top()) {
            continue;
        }
        for print in ["println", "print", "eprintln", "eprint", "stdout", "stderr"] {
            let calls = [[print, "!"], [print, "("]];
            let called = calls.iter().any(|call| file.source.contains(call));
            assert!(!called, "{}: {print}", file.module());
        }
    }
}

#[test]
fn braces_of_use_and_super_are_resolved() {
    let code = "use crate::a::{b::{C, D}, e::F,};
        fn f() { let x = crate::g::h(); let y = format!(\"{}\", super::i::j(1)); }
        pub(crate) struct S;";
    let (words, _) = production(code);
    let found = imports("k::l::m", &words);
    let expected = ["a::b::C", "a::b::D", "a::e::F", "g::h", "k::l::i::j"].map(str::to_owned);
    assert_eq!(found, BTreeSet::from(expected));
}

#[test]
fn circle_of_imports_is_found() {
    let graph = |edges: &[(&'static str, &'static str)]| {
        let mut graph: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (from, to) in edges {
            graph.entry(*from).or_default().insert(*to);
        }
        graph
    };
    assert_eq!(cycle(&graph(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    let circle = cycle(&graph(&[("a", "b"), ("b", "c"), ("c", "b")])).unwrap();
    assert_eq!(circle, ["b", "c"]);
}
