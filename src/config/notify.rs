//! The channels that report outages: `[notify.NAME]`.
//!
//! No message repeats a URL or a routing key: both are secrets.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use strum::VariantArray;
use url::Url;

use super::credential::{self, SecretLookup};
use super::problem::{alternatives, similar};
use super::section::{Lookup, MIN_WAIT, Section, http_url};
use super::settings::{Channel, ChannelKind, WebhookFormat};

/// The keys that only commands that send need.
pub(super) const SECRETS: [&str; 5] = [
    "url",
    "url_file",
    "routing_key",
    "routing_key_file",
    "ca_file",
];

/// A request that takes longer would delay the messages after it.
const MAX_TIMEOUT: Duration = Duration::from_mins(1);

/// Takes the place of a secret that is not read.
const NOT_READ: &str = "http://none.invalid";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
enum Kind {
    #[default]
    Webhook,
    Pagerduty,
    Heartbeat,
}

impl Kind {
    fn name(self) -> &'static str {
        self.into()
    }

    /// The keys that only some kinds have.
    fn own_keys(self) -> &'static [&'static str] {
        match self {
            Self::Webhook => &["url", "url_file", "format"],
            Self::Pagerduty => &["url", "routing_key", "routing_key_file"],
            Self::Heartbeat => &["url", "url_file"],
        }
    }
}

/// Reads one channel; `None` after a mistake without which it would be another channel. `targets` are the names of all targets.
pub(super) fn read(
    mut section: Section<'_>,
    ca_file: Option<PathBuf>,
    targets: &[&str],
    reads_secrets: bool,
) -> Option<Channel> {
    if section.place_of("kind").is_none() {
        let names: Vec<&str> = Kind::VARIANTS.iter().map(|kind| kind.name()).collect();
        section.missing("kind", &format!("set it to {}", alternatives(&names)));
        // What the other keys should be depends on it.
        return None;
    }
    let kind: Kind = section.choice("kind", "a kind of channel");
    refuse_keys_of_other_kinds(&mut section, kind);
    let targets = reported_targets(&mut section, targets);
    let timeout = section.duration("timeout", Channel::DEFAULT_TIMEOUT, MIN_WAIT..=MAX_TIMEOUT);
    let kind = match kind {
        Kind::Webhook => {
            let format: WebhookFormat = section.choice("format", "a format");
            let url = secret_url(&mut section, reads_secrets);
            url.map(|url| ChannelKind::Webhook { url, format })
        }
        Kind::Pagerduty => pagerduty(&mut section, reads_secrets),
        Kind::Heartbeat => {
            let url = secret_url(&mut section, reads_secrets);
            url.map(|url| ChannelKind::Heartbeat { url })
        }
    };
    section.finish();
    Some(Channel {
        kind: kind?,
        targets,
        timeout,
        ca_file,
    })
}

fn refuse_keys_of_other_kinds(section: &mut Section<'_>, kind: Kind) {
    let known: BTreeSet<&str> = kind.own_keys().iter().copied().collect();
    let others = Kind::VARIANTS.iter().flat_map(|kind| kind.own_keys());
    let others: BTreeSet<&'static str> = others
        .filter(|key| !known.contains(**key))
        .copied()
        .collect();
    for key in others {
        let Some(place) = section.place_of(key) else {
            continue;
        };
        section.ignore(key);
        let owners: Vec<&str> = Kind::VARIANTS
            .iter()
            .filter(|kind| kind.own_keys().contains(&key))
            .map(|kind| kind.name())
            .collect();
        let message = format!("kind = {:?} has no such key", kind.name());
        let hint = format!("remove it, or set kind to {}", alternatives(&owners));
        section.problem(key, Some(place), message, &hint);
    }
}

/// The targets of the key `targets`; `None` without the key.
fn reported_targets(section: &mut Section<'_>, known: &[&str]) -> Option<BTreeSet<String>> {
    let place = section.place_of("targets");
    let texts = section.texts("targets");
    let place = place?;
    if texts.is_empty() {
        let message = "it names no target".to_owned();
        let hint = "remove the key to report every target";
        section.problem("targets", Some(place), message, hint);
    }
    let mut targets = BTreeSet::new();
    for text in texts {
        if !known.contains(&text.value.as_str()) {
            let message = format!("{:?} is not a configured target", text.value);
            let hint = match similar(&text.value, known) {
                Some(name) => format!("did you mean {name:?}?"),
                None if known.is_empty() => "the settings have no targets".to_owned(),
                None => format!("use {}", alternatives(known)),
            };
            section.problem("targets", text.place, message, &hint);
        }
        targets.insert(text.value);
    }
    Some(targets)
}

fn secret_url(section: &mut Section<'_>, reads_secrets: bool) -> Option<SecretString> {
    const HINT: &str = "write it as \"https://host/path\"";
    let place = section
        .place_of("url")
        .or_else(|| section.place_of("url_file"));
    let text = match credential::find(section, "url", "url_file", HINT) {
        _ if !reads_secrets => return Some(NOT_READ.into()),
        SecretLookup::Found(text) => text,
        SecretLookup::Invalid => return None,
        SecretLookup::Missing => {
            section.missing("url", "set url, or url_file to a file that contains it");
            return None;
        }
    };
    let key = if text.file.is_some() {
        "url_file"
    } else {
        "url"
    };
    match request_url(&text.value) {
        Ok(_) => Some(text.value.into()),
        Err(mistake) => {
            section.problem(key, place, mistake.to_owned(), HINT);
            None
        }
    }
}

/// Reads the address of a request.
///
/// # Errors
/// What is wrong. The text contains nothing of the address.
fn request_url(text: &str) -> Result<Url, &'static str> {
    let url = http_url(text)?;
    if url.fragment().is_some() {
        return Err("it has a fragment, which a request cannot send");
    }
    Ok(url)
}

fn pagerduty(section: &mut Section<'_>, reads_secrets: bool) -> Option<ChannelKind> {
    const HINT: &str = "copy the integration key of an Events API v2 integration";
    let mut url = Url::parse(Channel::PAGERDUTY_URL).expect("it is an absolute URL");
    if let Lookup::Found(text) = section.text("url") {
        match request_url(&text.value) {
            Ok(other) => url = other,
            Err(mistake) => {
                let hint = format!("remove it for {:?}", Channel::PAGERDUTY_URL);
                section.problem("url", text.place, mistake.to_owned(), &hint);
            }
        }
    }
    let routing_key = match credential::find(section, "routing_key", "routing_key_file", HINT) {
        _ if !reads_secrets => NOT_READ.into(),
        SecretLookup::Found(text) => text.value.into(),
        SecretLookup::Invalid => return None,
        SecretLookup::Missing => {
            let hint = "set routing_key, or routing_key_file to a file that contains it";
            section.missing("routing_key", hint);
            return None;
        }
    };
    Some(ChannelKind::Pagerduty { routing_key, url })
}
