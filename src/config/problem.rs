//! What is wrong with a configuration, in words for the person who has to repair it.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a value was set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    File { path: Arc<Path>, line: usize },
    Environment(String),
    Flag(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "{name} on the command line"),
        }
    }
}

/// One mistake: whose it is, what it is, where it stands and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub(super) place: Option<Place>,
    /// The owner and the key, such as `target "support": batch.ramp`; empty for the file itself.
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

/// Every problem of one configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn new(mut problems: Vec<Problem>) -> Self {
        // What has no place of its own comes last; a stable sort keeps the order of reading among equals.
        problems.sort_by_cached_key(|problem| (problem.place.is_none(), problem.place.clone()));
        Self(problems)
    }

    /// One problem that no key of a file explains.
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

/// `value` in quotes, for a message. A long one may be a secret under the wrong key: it is not repeated.
pub(super) fn shown(value: &str) -> String {
    const LONGEST: usize = 24;
    if value.chars().count() <= LONGEST {
        format!("{value:?}")
    } else {
        "this value".to_owned()
    }
}

/// The one of `known` that `given` was probably meant to be.
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
