//! One tree of raw values from a TOML file, the environment and flags, where each value knows its place.
//!
//! The crate `config` isn't used for this: it loses places, lower-cases every key (attribute names too) and stops at
//! the first mistake.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Place, Problem, Problems};
use super::{Config, validate};

const OVERRIDE_PREFIX: &str = "LIVEKIT_CANARY__";

/// Credentials that the environment offers where nothing else sets them.
#[derive(Default)]
pub(super) struct Fallback {
    pub(super) url: Option<String>,
    pub(super) api_key: Option<String>,
    pub(super) api_secret: Option<String>,
}

pub(super) type Table = BTreeMap<String, Entry>;

pub(super) struct Entry {
    pub(super) place: Option<Place>,
    pub(super) value: Value,
}

pub(super) enum Value {
    /// Strings, numbers and booleans alike: the reader of a key decides what it takes them for, so that `5` and
    /// `"5"` mean the same.
    Text(String),
    Table(Table),
    /// No key takes a list.
    List,
}

/// Raw settings, not validated yet.
pub struct Draft {
    pub(super) root: Table,
    pub(super) fallback: Fallback,
    problems: Vec<Problem>,
}

impl Draft {
    /// Reads the file, if there is one, and lays the environment over it.
    ///
    /// # Errors
    /// A file that can't be read or isn't TOML. Every other problem waits for [`Self::validate`], which tells them
    /// all at once.
    pub fn read(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, Problems> {
        let root = file.map(read_file).transpose()?.unwrap_or_default();
        let mut draft = Self {
            root,
            fallback: Fallback::default(),
            problems: Vec::new(),
        };
        for (name, value) in environment {
            draft.take_variable(&name, value);
        }
        Ok(draft)
    }

    pub fn target_names(&self) -> Vec<String> {
        match self.root.get("targets").map(|entry| &entry.value) {
            Some(Value::Table(targets)) => targets.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Makes sure that this target exists, with nothing but defaults so far.
    pub fn ensure_target(&mut self, name: &str) {
        table_at(&mut self.root, &["targets", name], None);
    }

    /// Overrides a key of a target by a flag of the command line.
    pub fn set_by_flag(&mut self, target: &str, key: &[&str], value: String, flag: &str) {
        let mut path = vec!["targets", target];
        path.extend(key);
        set(&mut self.root, &path, value, Place::Flag(flag.to_owned()));
    }

    /// # Errors
    /// Everything that is wrong, at once.
    pub fn validate(mut self) -> Result<Config, Problems> {
        let mut problems = std::mem::take(&mut self.problems);
        let config = validate::config(self, &mut problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Problems::new(problems))
        }
    }

    fn take_variable(&mut self, name: &OsString, value: OsString) {
        let Some(name) = name.to_str().filter(|name| name.starts_with("LIVEKIT_")) else {
            return;
        };
        let path = name.strip_prefix(OVERRIDE_PREFIX);
        if path.is_none()
            && !matches!(
                name,
                "LIVEKIT_URL" | "LIVEKIT_API_KEY" | "LIVEKIT_API_SECRET"
            )
        {
            return;
        }
        let Ok(value) = value.into_string() else {
            self.problems.push(Problem {
                place: Some(Place::Environment(name.to_owned())),
                subject: String::new(),
                message: format!("{name} is not UTF-8"),
                hint: None,
            });
            return;
        };
        if let Some(path) = path {
            let path = override_path(path);
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            set(
                &mut self.root,
                &path,
                value,
                Place::Environment(name.to_owned()),
            );
        } else if !value.is_empty() {
            match name {
                "LIVEKIT_URL" => self.fallback.url = Some(value),
                "LIVEKIT_API_KEY" => self.fallback.api_key = Some(value),
                _ => self.fallback.api_secret = Some(value),
            }
        }
    }
}

/// `targets__My_Agent__batch__rooms` → `targets`, `my-agent`, `batch`, `rooms`.
///
/// A shell can't export a name with `-`, and no name of ours has `_`. Only attributes keep their case.
fn override_path(path: &str) -> Vec<String> {
    path.split("__")
        .enumerate()
        .scan(false, |verbatim, (depth, part)| {
            let folded = part.to_lowercase();
            let segment = match depth {
                _ if *verbatim => part.to_owned(),
                1 => folded.replace('_', "-"),
                _ => folded,
            };
            *verbatim |= depth == 2 && segment == "attributes";
            Some(segment)
        })
        .collect()
}

fn set(root: &mut Table, path: &[&str], value: String, place: Place) {
    let (key, parents) = path.split_last().expect("split() yields at least one part");
    table_at(root, parents, Some(&place)).insert(
        (*key).to_owned(),
        Entry {
            place: Some(place),
            value: Value::Text(value),
        },
    );
}

/// The table at `path`, made where it is missing or something else stands there.
fn table_at<'a>(root: &'a mut Table, path: &[&str], place: Option<&Place>) -> &'a mut Table {
    path.iter().fold(root, |table, key| {
        let entry = table.entry((*key).to_owned()).or_insert_with(|| Entry {
            place: place.cloned(),
            value: Value::Table(Table::new()),
        });
        if !matches!(entry.value, Value::Table(_)) {
            entry.value = Value::Table(Table::new());
        }
        match &mut entry.value {
            Value::Table(table) => table,
            _ => unreachable!("it was made a table just above"),
        }
    })
}

fn read_file(path: &Path) -> Result<Table, Problem> {
    let problem = |place, message| Problem {
        place,
        subject: String::new(),
        message,
        hint: None,
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| problem(None, format!("can't read {}: {error}", path.display())))?;
    let shared: Arc<Path> = path.into();
    let document = DeTable::parse(&text).map_err(|error| {
        // Only the parser's message: its full text repeats the line, which may hold a secret.
        let start = error.span().map_or(0, |span| span.start);
        let (line, column) = position(&text, start);
        let place = Place::File {
            path: Arc::clone(&shared),
            line,
        };
        problem(
            Some(place),
            format!("not TOML: {}, at column {column}", error.message()),
        )
    })?;
    Ok(convert(document.into_inner(), &text, &shared))
}

fn convert(table: DeTable<'_>, text: &str, path: &Arc<Path>) -> Table {
    table
        .into_iter()
        .map(|(key, value)| {
            let entry = Entry {
                place: Some(Place::File {
                    path: Arc::clone(path),
                    line: position(text, key.span().start).0,
                }),
                value: convert_value(value, text, path),
            };
            (key.into_inner().into_owned(), entry)
        })
        .collect()
}

fn convert_value(value: Spanned<DeValue<'_>>, text: &str, path: &Arc<Path>) -> Value {
    match value.into_inner() {
        DeValue::String(string) => Value::Text(string.into_owned()),
        DeValue::Boolean(boolean) => Value::Text(boolean.to_string()),
        DeValue::Integer(integer) => Value::Text(
            i128::from_str_radix(integer.as_str(), integer.radix())
                .map_or_else(|_| integer.as_str().to_owned(), |number| number.to_string()),
        ),
        DeValue::Float(float) => Value::Text(float.as_str().to_owned()),
        DeValue::Datetime(datetime) => Value::Text(datetime.to_string()),
        DeValue::Table(table) => Value::Table(convert(table, text, path)),
        DeValue::Array(_) => Value::List,
    }
}

/// Line and column of a byte offset, both from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = String::from_utf8_lossy(&text.as_bytes()[..offset.min(text.len())]);
    let line = before.split('\n').count();
    let column = before
        .rsplit('\n')
        .next()
        .map_or(0, |last| last.chars().count())
        + 1;
    (line, column)
}
