//! One table of raw settings while it is read, collecting every problem on the way.
//!
//! A key is known because somebody asks for it; whatever is left over in [`Section::finish`] is an unknown key. Values
//! of unknown keys are never repeated in a message: a secret may stand under the wrong key.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::document::{Entry, Table, Value};
use super::problem::{Place, Problem, alternatives, shown, similar};

pub(super) struct Text {
    pub(super) value: String,
    pub(super) place: Option<Place>,
}

impl Text {
    /// As a path: relative to the folder of the file that says it.
    pub(super) fn path(&self) -> PathBuf {
        match &self.place {
            Some(Place::File { path, .. }) => path
                .parent()
                .unwrap_or_else(|| Path::new(""))
                .join(&self.value),
            _ => PathBuf::from(&self.value),
        }
    }
}

pub(super) enum Taken {
    Text(Text),
    Missing,
    /// Reported already.
    Broken,
}

pub(super) struct Section<'a> {
    /// `target "support"`; empty at the root.
    owner: String,
    /// `batch.`, or empty.
    path: String,
    place: Option<Place>,
    /// What has not been read yet.
    table: Table,
    known: Vec<String>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Section<'a> {
    pub(super) fn root(table: Table, problems: &'a mut Vec<Problem>) -> Self {
        Self {
            owner: String::new(),
            path: String::new(),
            place: None,
            table,
            known: Vec::new(),
            problems,
        }
    }

    pub(super) fn of(
        kind: &str,
        name: &str,
        place: Option<Place>,
        table: Table,
        problems: &'a mut Vec<Problem>,
    ) -> Self {
        let section = Self {
            owner: format!("{kind} {name:?}"),
            path: String::new(),
            place,
            table,
            known: Vec::new(),
            problems,
        };
        let letters = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if name.is_empty() || !name.bytes().all(letters) {
            let place = section.place.clone();
            section.problems.push(Problem {
                place,
                subject: section.owner.clone(),
                message: "not a name".to_owned(),
                hint: Some("a name consists of a-z, 0-9 and -".to_owned()),
            });
        }
        section
    }

    /// The tables under `key`, by name.
    pub(super) fn named(&mut self, key: &'static str) -> Vec<(String, Option<Place>, Table)> {
        let outer = self.table(key);
        let entries = outer.table.into_iter();
        let problems = outer.problems;
        entries
            .filter_map(|(name, entry)| match entry.value {
                Value::Table(table) => Some((name, entry.place, table)),
                Value::Text(_) | Value::List => {
                    problems.push(Problem {
                        place: entry.place,
                        subject: format!("{key}.{name}"),
                        message: "a table belongs here".to_owned(),
                        hint: Some(format!("begin it with [{key}.NAME]")),
                    });
                    None
                }
            })
            .collect()
    }

    /// The table under `key`; an empty one where it is missing or broken.
    pub(super) fn table(&mut self, key: &'static str) -> Section<'_> {
        self.known.push(key.to_owned());
        let entry = self.table.remove(key).unwrap_or(Entry {
            place: None,
            value: Value::Table(Table::new()),
        });
        let table = if let Value::Table(table) = entry.value {
            table
        } else {
            let message = "a table belongs here".to_owned();
            let hint = format!("write {key}.KEY = VALUE, or begin a table of that name");
            self.problem(key, entry.place.clone(), message, &hint);
            Table::new()
        };
        Section {
            owner: self.owner.clone(),
            path: format!("{}{key}.", self.path),
            place: entry.place,
            table,
            known: Vec::new(),
            problems: self.problems,
        }
    }

    pub(super) fn text(&mut self, key: &'static str) -> Taken {
        self.known.push(key.to_owned());
        self.take(key)
    }

    /// Every key of a table whose keys are the user's own.
    pub(super) fn all_texts(&mut self) -> Vec<(String, Text)> {
        let keys: Vec<String> = self.table.keys().cloned().collect();
        keys.into_iter()
            .filter_map(|key| match self.take(&key) {
                Taken::Text(text) => Some((key, text)),
                Taken::Missing | Taken::Broken => None,
            })
            .collect()
    }

    fn take(&mut self, key: &str) -> Taken {
        let Some(entry) = self.table.remove(key) else {
            return Taken::Missing;
        };
        if let Value::Text(value) = entry.value {
            return Taken::Text(Text {
                value,
                place: entry.place,
            });
        }
        let message = "one value belongs here, not a table or a list".to_owned();
        self.problem(key, entry.place, message, "write KEY = VALUE");
        Taken::Broken
    }

    pub(super) fn place_of(&self, key: &str) -> Option<Place> {
        self.table.get(key).and_then(|entry| entry.place.clone())
    }

    pub(super) fn duration(
        &mut self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let Taken::Text(text) = self.text(key) else {
            return default;
        };
        let (message, hint) = match humantime::parse_duration(&text.value) {
            Ok(duration) if range.contains(&duration) => return duration,
            Ok(_) => (
                format!("{} is out of range", shown(&text.value)),
                format!(
                    "from {} to {}",
                    humantime::format_duration(*range.start()),
                    humantime::format_duration(*range.end())
                ),
            ),
            Err(_) => (
                format!("{} is not a duration", shown(&text.value)),
                "write a number with its unit, such as \"15s\", \"500ms\" or \"2m\"".to_owned(),
            ),
        };
        self.problem(key, text.place, message, &hint);
        default
    }

    pub(super) fn number<N: FromStr + PartialOrd + Display>(
        &mut self,
        key: &'static str,
        default: N,
        range: RangeInclusive<N>,
    ) -> N {
        let Taken::Text(text) = self.text(key) else {
            return default;
        };
        let message = match text.value.trim().parse() {
            Ok(number) if range.contains(&number) => return number,
            Ok(_) => format!("{} is out of range", shown(&text.value)),
            Err(_) => format!("{} is not a number that fits", shown(&text.value)),
        };
        let hint = format!("from {} to {}", range.start(), range.end());
        self.problem(key, text.place, message, &hint);
        default
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        let Taken::Text(text) = self.text(key) else {
            return default;
        };
        match text.value.to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => return true,
            "false" | "no" | "off" | "0" => return false,
            _ => {}
        }
        let message = format!("{} is neither true nor false", shown(&text.value));
        self.problem(key, text.place, message, "write true or false");
        default
    }

    pub(super) fn choice<C: Copy + Default>(
        &mut self,
        key: &'static str,
        choices: &[(&'static str, C)],
        what: &str,
    ) -> C {
        let Taken::Text(text) = self.text(key) else {
            return C::default();
        };
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text.value) {
            return *choice;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let message = format!("{} is not a {what}", shown(&text.value));
        let hint = match similar(&text.value, &names) {
            Some(name) => format!("did you mean {name:?}?"),
            None => format!("write {}", alternatives(&names)),
        };
        self.problem(key, text.place, message, &hint);
        C::default()
    }

    /// Not reported where an unknown key was probably meant to be this one: that is one mistake, not two.
    pub(super) fn missing(&mut self, key: &str, hint: &str) {
        if self
            .table
            .keys()
            .any(|left| similar(left, &[key]).is_some())
        {
            return;
        }
        let place = self.place.clone();
        self.problem(key, place, "missing".to_owned(), hint);
    }

    pub(super) fn problem(&mut self, key: &str, place: Option<Place>, message: String, hint: &str) {
        let key = format!("{}{key}", self.path);
        let subject = if self.owner.is_empty() {
            key
        } else {
            format!("{}: {key}", self.owner)
        };
        self.problems.push(Problem {
            place,
            subject,
            message,
            hint: Some(hint.to_owned()),
        });
    }

    /// Reports whatever no reader asked for. Its value may be a misplaced secret: it is not repeated.
    pub(super) fn finish(mut self) {
        for (key, entry) in std::mem::take(&mut self.table) {
            let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
            let hint = match similar(&key, &known) {
                Some(name) => format!("did you mean {name:?}?"),
                None => format!("known here: {}", known.join(", ")),
            };
            self.problem(&key, entry.place, "unknown key".to_owned(), &hint);
        }
    }
}
