//! The mistakes in a configuration, worded for the person who corrects them.

use std::fmt;
use std::path::Path;

/// The place of a value that an environment variable sets.
pub(super) fn from_variable(name: &str) -> String {
    format!("environment variable {name}")
}

/// File and line of a place. `None` for a variable or a flag: only a place in a file has the form `path:line`.
pub(super) fn in_file(place: &str) -> Option<(&Path, usize)> {
    let (path, line) = place.rsplit_once(':')?;
    Some((Path::new(path), line.parse().ok()?))
}

/// One mistake: the key, the place, what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The place where the value was set: file and line, a variable or a flag.
    pub(super) place: Option<String>,
    /// The owner and the key, such as `target "support": batch.ramp`. Empty if the problem concerns the whole file.
    pub(super) subject: String,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("error: ")?;
        if !self.subject.is_empty() {
            write!(f, "{}: ", self.subject)?;
        }
        f.write_str(&self.message)?;
        if let Some(place) = &self.place {
            write!(f, "\n  --> {place}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

/// All problems of one configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn new(mut problems: Vec<Problem>) -> Self {
        // First lines of the file, then variables, flags, and problems without a place. The sort is stable: equal places
        // keep the order in which they were read.
        problems.sort_by_cached_key(|problem| {
            let place = problem.place.clone();
            let line = place.as_deref().and_then(in_file).map(|(_, line)| line);
            let flag = place.as_ref().is_some_and(|place| place.starts_with("--"));
            (place.is_none(), line.unwrap_or(usize::MAX), flag, place)
        });
        Self(problems)
    }

    /// One problem that has no place in the settings.
    pub fn single(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self(vec![Problem {
            place: None,
            subject: String::new(),
            message: message.into(),
            hint: Some(hint.into()),
        }])
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            problem.fmt(f)?;
        }
        if self.0.len() > 1 {
            write!(f, "\n\n{} problems", self.0.len())?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `value` in quotes, for a message. A long value is not repeated: it may be a secret under the wrong key.
pub(super) fn shown(value: &str) -> String {
    const MAX_SHOWN_CHARS: usize = 24;
    if value.chars().count() <= MAX_SHOWN_CHARS {
        format!("{value:?}")
    } else {
        "this value".to_owned()
    }
}

/// The name of `known` that is closest to `given`, if the difference looks like a typing error.
pub(super) fn similar<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(given, name), *name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min()
        .map(|(_, name)| name)
}

/// `"a", "b" or "c"`.
pub(super) fn alternatives(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}
