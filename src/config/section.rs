//! Reads one table of raw settings and collects every problem in it.
//!
//! A key is known if a reader asks for it; [`Section::finish`] reports the remaining keys as unknown. Messages never
//! repeat the value of an unknown key, because it may be a secret under the wrong key.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use config::{Map, Value};
use strum::VariantArray;
use url::Url;

use super::problem::{Problem, alternatives, in_file, shown, similar};

/// Upper bound of every wait of a probe. Sums of several waits stay far below the range of a clock.
pub(super) const MAX_WAIT: Duration = Duration::from_hours(1);
pub(super) const MIN_WAIT: Duration = Duration::from_millis(1);

/// Sorted by key, unlike the maps of `config`, so that messages always have the same order.
pub(super) type Table = BTreeMap<String, Value>;

fn table_of(value: Value) -> Option<Table> {
    Some(value.into_table().ok()?.into_iter().collect())
}

fn place_of(value: &Value) -> Option<String> {
    value.origin().map(str::to_owned)
}

/// Reads an absolute URL of the scheme http or https.
///
/// # Errors
/// What is wrong. The text contains nothing of the URL, which may be a secret.
pub(super) fn http_url(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "not an absolute URL")?;
    if matches!(url.scheme(), "http" | "https") {
        Ok(url)
    } else {
        Err("its scheme is neither http nor https")
    }
}

/// One value as text, and where it was set.
pub(super) struct RawValue {
    pub(super) value: String,
    pub(super) place: Option<String>,
}

impl RawValue {
    /// The value as a path, relative to the folder of the file that sets it.
    pub(super) fn path(&self) -> PathBuf {
        let file = self.place.as_deref().and_then(in_file);
        let folder = file.and_then(|(path, _)| path.parent());
        folder.unwrap_or_else(|| Path::new("")).join(&self.value)
    }
}

/// The result of asking for a key.
pub(super) enum Lookup {
    Found(RawValue),
    Missing,
    /// The key holds a table or a list; the problem is already reported.
    Invalid,
}

/// A table while it is read.
pub(super) struct Section<'a> {
    /// What messages name first, such as `target "support"`; empty at the root.
    owner: String,
    /// The prefix of keys in messages, such as `batch.`; empty for the owner's own keys.
    path: String,
    place: Option<String>,
    /// The keys that no reader has asked for yet.
    table: Table,
    known: Vec<String>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Section<'a> {
    pub(super) fn root(settings: Value, problems: &'a mut Vec<Problem>) -> Self {
        Self {
            owner: String::new(),
            path: String::new(),
            place: None,
            table: table_of(settings).unwrap_or_default(),
            known: Vec::new(),
            problems,
        }
    }

    pub(super) fn of(
        kind: &str,
        name: &str,
        place: Option<String>,
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
                message: "this name is not valid".to_owned(),
                hint: Some("use only a-z, 0-9 and - in a name".to_owned()),
            });
        }
        section
    }

    /// The tables under `key`, each with its name and place.
    pub(super) fn named(&mut self, key: &'static str) -> Vec<(String, Option<String>, Table)> {
        let outer = self.table(key);
        let entries = outer.table.into_iter();
        let problems = outer.problems;
        entries
            .filter_map(|(name, value)| {
                let place = place_of(&value);
                if let Some(table) = table_of(value) {
                    return Some((name, place, table));
                }
                problems.push(Problem {
                    place,
                    subject: format!("{key}.{name}"),
                    message: "expected a table".to_owned(),
                    hint: Some(format!("start the table with [{key}.NAME]")),
                });
                None
            })
            .collect()
    }

    /// The table under `key`. It is empty if the key is missing, or if its value is not a table, which is reported.
    pub(super) fn table(&mut self, key: &'static str) -> Section<'_> {
        self.known.push(key.to_owned());
        let value = self.table.remove(key);
        let value = value.unwrap_or_else(|| Map::<String, Value>::new().into());
        let place = place_of(&value);
        let table = table_of(value).unwrap_or_else(|| {
            let message = "expected a table".to_owned();
            let hint = format!("write {key}.KEY = VALUE, or start a table of that name");
            self.problem(key, place.clone(), message, &hint);
            Table::new()
        });
        Section {
            owner: self.owner.clone(),
            path: format!("{}{key}.", self.path),
            place,
            table,
            known: Vec::new(),
            problems: self.problems,
        }
    }

    /// Reads each table of the list under `key`, which is empty if the key is missing; `None` if it is no list of tables.
    /// Messages number the tables from 0, as the results do.
    pub(super) fn each_table<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(Section<'_>) -> T,
    ) -> Option<Vec<T>> {
        let hint = format!(
            "start each of them with [[targets.NAME.{}{key}]]",
            self.path
        );
        let items = self.list(key, &hint)?.into_iter().enumerate();
        let values = items.map(|(number, item)| {
            let place = place_of(&item);
            let name = format!("{key}[{number}]");
            let Some(table) = table_of(item) else {
                self.problem(&name, place, "expected a table".to_owned(), &hint);
                return None;
            };
            Some(read(Section {
                owner: self.owner.clone(),
                path: format!("{}{name}.", self.path),
                place,
                table,
                known: Vec::new(),
                problems: self.problems,
            }))
        });
        // All of them, so that every problem is reported.
        let values: Vec<Option<T>> = values.collect();
        values.into_iter().collect()
    }

    /// Each text of the list under `key`, which is empty if the key is missing.
    pub(super) fn texts(&mut self, key: &'static str) -> Vec<RawValue> {
        let hint = format!("write {key} = [\"…\", \"…\"]");
        let mut texts = Vec::new();
        for item in self.list(key, &hint).unwrap_or_default() {
            let place = place_of(&item);
            match item.into_string() {
                Ok(value) => texts.push(RawValue { value, place }),
                Err(_) => {
                    self.problem(key, place, "expected a list of texts".to_owned(), &hint);
                }
            }
        }
        texts
    }

    /// The list under `key`, which is empty if the key is missing; `None` if the value is no list, which is reported.
    fn list(&mut self, key: &'static str, hint: &str) -> Option<Vec<Value>> {
        self.known.push(key.to_owned());
        let Some(value) = self.table.remove(key) else {
            return Some(Vec::new());
        };
        let place = place_of(&value);
        let list = value.into_array().ok();
        if list.is_none() {
            self.problem(key, place, "expected a list".to_owned(), hint);
        }
        list
    }

    /// The value under `key`, as text.
    pub(super) fn text(&mut self, key: &'static str) -> Lookup {
        self.known.push(key.to_owned());
        self.take(key)
    }

    /// Removes a key that is reported already, so that it is not reported as unknown as well.
    pub(super) fn ignore(&mut self, key: &str) {
        self.table.remove(key);
    }

    /// All values of a table whose keys the user chooses.
    pub(super) fn all_texts(&mut self) -> Vec<(String, RawValue)> {
        let keys: Vec<String> = self.table.keys().cloned().collect();
        keys.into_iter()
            .filter_map(|key| match self.take(&key) {
                Lookup::Found(text) => Some((key, text)),
                Lookup::Missing | Lookup::Invalid => None,
            })
            .collect()
    }

    fn take(&mut self, key: &str) -> Lookup {
        let Some(value) = self.table.remove(key) else {
            return Lookup::Missing;
        };
        let place = place_of(&value);
        // Variables and flags are always strings, so `5` and `"5"` must mean the same.
        if let Ok(value) = value.into_string() {
            return Lookup::Found(RawValue { value, place });
        }
        let message = "expected a single value, not a table or a list".to_owned();
        self.problem(key, place, message, "write KEY = VALUE");
        Lookup::Invalid
    }

    /// The place of a key that is set and has not been read yet.
    pub(super) fn place_of(&self, key: &str) -> Option<String> {
        self.table.get(key).and_then(place_of)
    }

    /// A duration with its unit. A missing or wrong value yields the default; a wrong one is also reported.
    pub(super) fn duration(
        &mut self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let Lookup::Found(text) = self.text(key) else {
            return default;
        };
        let (message, hint) = match humantime::parse_duration(&text.value) {
            Ok(duration) if range.contains(&duration) => return duration,
            Ok(_) => (
                format!("{} is out of range", shown(&text.value)),
                format!(
                    "allowed: {} to {}",
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
        let Lookup::Found(text) = self.text(key) else {
            return default;
        };
        let message = match text.value.trim().parse() {
            Ok(number) if range.contains(&number) => return number,
            Ok(_) => format!("{} is out of range", shown(&text.value)),
            Err(_) => format!("{} is not a valid number", shown(&text.value)),
        };
        let hint = format!("allowed: {} to {}", range.start(), range.end());
        self.problem(key, text.place, message, &hint);
        default
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        let Lookup::Found(text) = self.text(key) else {
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

    /// A variant of a closed enum, by its name; `what` is the noun for messages, with its article.
    pub(super) fn choice<C>(&mut self, key: &'static str, what: &str) -> C
    where
        C: Copy + Default + Into<&'static str> + VariantArray,
    {
        let Lookup::Found(text) = self.text(key) else {
            return C::default();
        };
        let names: Vec<&str> = C::VARIANTS.iter().map(|choice| (*choice).into()).collect();
        if let Some(index) = names.iter().position(|name| *name == text.value) {
            return C::VARIANTS[index];
        }
        let message = format!("{} is not {what}", shown(&text.value));
        let hint = match similar(&text.value, &names) {
            Some(name) => format!("did you mean {name:?}?"),
            None => format!("write {}", alternatives(&names)),
        };
        self.problem(key, text.place, message, &hint);
        C::default()
    }

    /// Reports that `key` is missing, unless an unknown key looks like a misspelling of it: that is one mistake, not two.
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

    pub(super) fn problem(
        &mut self,
        key: &str,
        place: Option<String>,
        message: String,
        hint: &str,
    ) {
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

    /// Reports every key that no reader asked for. The message omits its value, which may be a misplaced secret.
    pub(super) fn finish(mut self) {
        for (key, value) in std::mem::take(&mut self.table) {
            let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
            let hint = match similar(&key, &known) {
                Some(name) => format!("did you mean {name:?}?"),
                None => format!("known keys: {}", known.join(", ")),
            };
            self.problem(&key, place_of(&value), "unknown key".to_owned(), &hint);
        }
    }
}
