//! One tree of raw values from a TOML file, the environment and flags. Each value has its place.
//!
//! The crate `config` holds and merges the tree; a value's origin is its place, in the words that messages use. The
//! crate's own sources and builder are not used: they have no line numbers, lower-case the names of attributes and drop
//! the origins of tables.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use config::{Map, Source, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::credential::is_quoted;
use super::file::{MAX_FILE_BYTES, read_regular_text};
use super::problem::{Problem, Problems, from_variable};

const OVERRIDE_PREFIX: &str = "LIVEKIT_CANARY__";

/// Credentials from the environment, used for every key that nothing else sets.
#[derive(Default)]
pub(super) struct EnvCredentials {
    pub(super) url: Option<String>,
    pub(super) api_key: Option<String>,
    pub(super) api_secret: Option<String>,
}

/// Merged settings before validation.
pub struct RawConfig {
    /// Folder of the file; file names in the settings are relative to it.
    pub(super) folder: PathBuf,
    pub(super) settings: config::Config,
    pub(super) fallback: EnvCredentials,
    /// Whether credentials, certificates and audio files are read.
    pub(super) signs_in: bool,
    pub(super) problems: Vec<Problem>,
}

impl RawConfig {
    /// Reads the file, if there is one, and overrides its values by those of the environment.
    ///
    /// # Errors
    /// The file can't be read, or it isn't TOML. [`Self::validate`] reports every other problem, all at once.
    pub fn read(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, Problems> {
        let mut settings = config::Config::default();
        if let Some(path) = file {
            settings.cache = read_file(path)?.into();
        }
        let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
        let mut raw = Self {
            folder: folder.to_owned(),
            settings,
            fallback: EnvCredentials::default(),
            signs_in: true,
            problems: Vec::new(),
        };
        for (name, value) in environment {
            raw.take_variable(&name, value);
        }
        raw.settings.cache = located(raw.settings.cache);
        Ok(raw)
    }

    pub fn target_names(&self) -> Vec<String> {
        let targets = self.settings.get_table("targets").unwrap_or_default();
        let mut names: Vec<String> = targets.into_keys().collect();
        names.sort();
        names
    }

    /// The project that a target uses: the one that it names, or the only one. `None` if that is a mistake, which
    /// [`Self::validate`] reports.
    pub fn project_of(&self, target: &str) -> Option<String> {
        let mut names: Vec<String> = match self.value(&["projects"]) {
            Some(projects) => projects.into_table().ok()?.into_keys().collect(),
            None => Vec::new(),
        };
        if names.is_empty() {
            names.push(super::DEFAULT_PROJECT.to_owned());
        }
        match self.value(&["targets", target, "project"]) {
            Some(name) => {
                let name = name.into_string().ok()?;
                names.contains(&name).then_some(name)
            }
            None => names.pop().filter(|_| names.is_empty()),
        }
    }

    /// Whether the file, the environment or a flag sets this key.
    pub fn is_set(&self, path: &[&str]) -> bool {
        self.value(path).is_some()
    }

    fn value(&self, path: &[&str]) -> Option<Value> {
        path.iter()
            .try_fold(self.settings.cache.clone(), |value, key| {
                value.into_table().ok()?.remove(*key)
            })
    }

    /// Adds a target that has only defaults, unless it exists.
    pub fn ensure_target(&mut self, name: &str) {
        self.overlay(&["targets", name], Map::<String, Value>::new().into());
    }

    /// Overrides a key of a target by a command-line flag.
    pub fn set_by_flag(&mut self, target: &str, key: &[&str], value: String, flag: &str) {
        let mut path = vec!["targets", target];
        path.extend(key);
        self.set(&path, value, flag);
    }

    /// Overrides any key by a command-line flag.
    pub fn set(&mut self, path: &[&str], value: String, flag: &str) {
        let origin = format!("{flag} on the command line");
        self.overlay(path, Value::new(Some(&origin), value));
    }

    /// For commands that never connect: credentials, certificates and audio files are not read from any source.
    #[must_use]
    pub fn without_credentials(mut self) -> Self {
        self.signs_in = false;
        self.fallback = EnvCredentials {
            url: Some("ws://none.invalid".to_owned()),
            api_key: Some("none".to_owned()),
            api_secret: Some("none".to_owned()),
        };
        self
    }

    /// Sets one value. Tables along the path keep their other keys; any other value on the path is replaced.
    fn overlay(&mut self, path: &[&str], value: Value) {
        let mut layer = config::Config::default();
        layer.cache = path.iter().rfold(value, |inner, key| {
            Map::from([((*key).to_owned(), inner)]).into()
        });
        layer
            .collect_to(&mut self.settings.cache)
            .expect("a table in memory can be read");
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
        // Compose and Helm pass an unset value on as an empty one.
        if value.is_empty() {
            return;
        }
        let Ok(value) = value.into_string() else {
            self.problems.push(Problem {
                place: Some(from_variable(name)),
                subject: String::new(),
                message: format!("{name} is not UTF-8"),
                hint: None,
            });
            return;
        };
        if let Some(path) = path {
            let path = override_path(path);
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            if let Some(value) = unwrapped(&path, &value) {
                self.overlay(&path, Value::new(Some(&from_variable(name)), value));
            }
            return;
        }
        let key = name.trim_start_matches("LIVEKIT_").to_lowercase();
        let value = unwrapped(&[&key], &value).map(str::to_owned);
        match name {
            "LIVEKIT_URL" => self.fallback.url = value,
            "LIVEKIT_API_KEY" => self.fallback.api_key = value,
            _ => self.fallback.api_secret = value,
        }
    }
}

/// The value of a variable without what tools add to it, and `None` if nothing is left: white space at both ends, and the
/// quotation marks that an env file of Docker passes on.
///
/// In a key or a secret, quotation marks stay: they could belong to it, so the validation refuses them. Metadata and
/// attributes are any text, so they stay as they are.
fn unwrapped<'a>(path: &[&str], value: &'a str) -> Option<&'a str> {
    let key = *path.last()?;
    if key == "metadata" || path.contains(&"attributes") {
        return Some(value);
    }
    let mut value = value.trim();
    if is_quoted(value) && !matches!(key, "api_key" | "api_secret" | "routing_key") {
        value = value[1..value.len() - 1].trim();
    }
    (!value.is_empty()).then_some(value)
}

/// `targets__My_Agent__batch__rooms` → `targets`, `my-agent`, `batch`, `rooms`.
///
/// A shell can't export a name that contains `-`, and names of projects, targets and channels never contain `_`. Only attributes
/// keep their case.
fn override_path(path: &str) -> Vec<String> {
    let named = path.split("__").next().is_some_and(|table| {
        let table = table.to_lowercase();
        matches!(table.as_str(), "projects" | "targets" | "notify")
    });
    path.split("__")
        .enumerate()
        .scan(false, |verbatim, (depth, part)| {
            let folded = part.to_lowercase();
            let segment = match depth {
                _ if *verbatim => part.to_owned(),
                1 if named => folded.replace('_', "-"),
                _ => folded,
            };
            *verbatim |= depth == 3 && segment == "attributes";
            Some(segment)
        })
        .collect()
}

/// Adds the missing place of tables that only environment variables create: merging drops it. The place is that of the
/// table's first value.
fn located(value: Value) -> Value {
    let origin = value.origin().map(str::to_owned);
    let ValueKind::Table(table) = value.kind else {
        return value;
    };
    let inner = table.into_iter().map(|(key, value)| (key, located(value)));
    let table: Map<String, Value> = inner.collect();
    let first = || table.values().filter_map(Value::origin).min();
    let origin = origin.or_else(|| first().map(str::to_owned));
    Value::new(origin.as_ref(), table)
}

fn read_file(path: &Path) -> Result<Map<String, Value>, Problem> {
    let problem = |place, message| Problem {
        place,
        subject: String::new(),
        message,
        hint: None,
    };
    let text = read_regular_text(path, MAX_FILE_BYTES)
        .map_err(|error| problem(None, format!("can't read {}: {error}", path.display())))?;
    let place = |offset| format!("{}:{}", path.display(), position(&text, offset).0);
    let document = DeTable::parse(&text).map_err(|error| {
        // Only the parser's message: the full text repeats the line, which may contain a secret.
        let start = error.span().map_or(0, |span| span.start);
        let (_, column) = position(&text, start);
        problem(
            Some(place(start)),
            format!("not valid TOML: {}, at column {column}", error.message()),
        )
    })?;
    Ok(convert(document.into_inner(), &place))
}

fn convert(table: DeTable<'_>, place: &impl Fn(usize) -> String) -> Map<String, Value> {
    table
        .into_iter()
        .map(|(key, value)| {
            let origin = place(key.span().start);
            let value = Value::new(Some(&origin), convert_value(value, place));
            (key.into_inner().into_owned(), value)
        })
        .collect()
}

fn convert_value(value: Spanned<DeValue<'_>>, place: &impl Fn(usize) -> String) -> ValueKind {
    match value.into_inner() {
        DeValue::String(string) => string.into_owned().into(),
        DeValue::Boolean(boolean) => boolean.into(),
        DeValue::Integer(integer) => i128::from_str_radix(integer.as_str(), integer.radix())
            .map_or_else(|_| integer.as_str().into(), ValueKind::from),
        // The digits as written, because an attribute's value is text: 1.10 must not become 1.1.
        DeValue::Float(float) => float.as_str().into(),
        DeValue::Datetime(datetime) => datetime.to_string().into(),
        DeValue::Table(table) => convert(table, place).into(),
        DeValue::Array(items) => {
            let items = items.into_iter().map(|item| {
                let origin = place(item.span().start);
                Value::new(Some(&origin), convert_value(item, place))
            });
            ValueKind::Array(items.collect())
        }
    }
}

/// Line and column of a byte offset; both count from 1.
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
