//! The text of a key or a secret, from the settings, the environment or a file.
//!
//! No message of this module contains any part of such a text, or the name of its file, which may be the secret itself under
//! the wrong key.

use std::path::{Path, PathBuf};

use super::file::{MAX_FILE_BYTES, read_regular_text};
use super::problem::in_file;
use super::section::{Lookup, RawValue, Section};
use super::settings::Project;

/// A key or a secret, and its file if it has one.
pub(super) struct SecretText {
    pub(super) value: String,
    pub(super) file: Option<PathBuf>,
}

/// What the settings have of a secret.
pub(super) enum SecretLookup {
    Found(SecretText),
    Missing,
    /// The mistake is already reported.
    Invalid,
}

impl SecretLookup {
    fn of(read: Option<SecretText>) -> Self {
        read.map_or(Self::Invalid, Self::Found)
    }
}

/// Reads a secret that is set directly or in a file. `if_empty` is the hint about an empty value.
pub(super) fn find(
    section: &mut Section<'_>,
    key: &'static str,
    file_key: &'static str,
    if_empty: &'static str,
) -> SecretLookup {
    match (section.text(key), section.text(file_key)) {
        (Lookup::Invalid, _) | (_, Lookup::Invalid) => SecretLookup::Invalid,
        (Lookup::Found(text), Lookup::Found(file)) => {
            // An override by the environment wins over the settings file, whichever of the two keys it sets.
            match (is_override(&text), is_override(&file)) {
                (true, false) => SecretLookup::of(inline(section, key, text, if_empty)),
                (false, true) => SecretLookup::of(from_file(section, file_key, file)),
                _ => {
                    let message = format!("{file_key} is also set");
                    section.problem(key, text.place, message, "set only one of the two");
                    SecretLookup::Invalid
                }
            }
        }
        (Lookup::Found(text), Lookup::Missing) => {
            SecretLookup::of(inline(section, key, text, if_empty))
        }
        (Lookup::Missing, Lookup::Found(file)) => {
            SecretLookup::of(from_file(section, file_key, file))
        }
        (Lookup::Missing, Lookup::Missing) => SecretLookup::Missing,
    }
}

/// Whether the environment or a flag sets it.
pub(super) fn is_override(text: &RawValue) -> bool {
    text.place.as_deref().and_then(in_file).is_none()
}

/// Reads a secret that is set directly.
pub(super) fn inline(
    section: &mut Section<'_>,
    key: &'static str,
    text: RawValue,
    if_empty: &'static str,
) -> Option<SecretText> {
    let mistake = match cleaned(&text.value) {
        Ok(value) if !value.is_empty() => return Some(SecretText { value, file: None }),
        Ok(_) => CredentialMistake::new("empty", if_empty),
        Err(mistake) => mistake,
    };
    section.problem(key, text.place, mistake.message, mistake.hint);
    None
}

fn from_file(section: &mut Section<'_>, key: &'static str, text: RawValue) -> Option<SecretText> {
    let path = text.path();
    match read(&path) {
        Ok(value) => Some(SecretText {
            value,
            file: Some(path),
        }),
        Err(mistake) => {
            section.problem(key, text.place, mistake.message, mistake.hint);
            None
        }
    }
}

/// Why a text is no key and no secret, and what to do.
pub(super) struct CredentialMistake {
    pub(super) message: String,
    pub(super) hint: &'static str,
}

impl CredentialMistake {
    fn new(message: impl Into<String>, hint: &'static str) -> Self {
        Self {
            message: message.into(),
            hint,
        }
    }
}

/// Returns the credential without the white space around it, which editors and `echo` add.
///
/// Everything else that cannot be part of a credential is refused instead of removed, because LiveKit would only answer that
/// the token is invalid.
pub(super) fn cleaned(text: &str) -> Result<String, CredentialMistake> {
    const ONE_LINE: &str = "write only this value, on one line";
    // Editors on Windows begin a file with this mark.
    let text = text.trim_start_matches('\u{feff}').trim();
    let lines = text.lines().count();
    if lines > 1 {
        return Err(CredentialMistake::new(
            format!("it has {lines} lines"),
            ONE_LINE,
        ));
    }
    if is_quoted(text) {
        return Err(CredentialMistake::new(
            "it has quotation marks around it",
            "remove them: files and Docker's env files pass them on as part of the value",
        ));
    }
    if text.contains(char::is_whitespace) {
        return Err(CredentialMistake::new(
            "it contains white space",
            "write only this value: key and secret are set separately",
        ));
    }
    if text.contains(char::is_control) {
        return Err(CredentialMistake::new(
            "it contains a control character",
            ONE_LINE,
        ));
    }
    Ok(text.to_owned())
}

impl Project {
    /// The project with the key pair that its files hold now.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    /// A file cannot be used. The text names its key in the settings, and contains nothing of it.
    pub fn with_current_credentials(&self) -> Result<Self, String> {
        let mut project = self.clone();
        let files = &self.credential_files;
        for (key, file, value) in [
            ("api_key_file", &files.api_key, &mut project.api_key),
            (
                "api_secret_file",
                &files.api_secret,
                &mut project.api_secret,
            ),
        ] {
            if let Some(path) = file {
                let content =
                    read(path).map_err(|mistake| format!("{key}: {}", mistake.message))?;
                *value = content.into();
            }
        }
        Ok(project)
    }
}

/// Whether quotation marks enclose the whole text.
pub(super) fn is_quoted(text: &str) -> bool {
    let enclosed = |mark| text.len() > 1 && text.starts_with(mark) && text.ends_with(mark);
    enclosed('"') || enclosed('\'')
}

/// Reads the file of a credential.
fn read(path: &Path) -> Result<String, CredentialMistake> {
    const HINT: &str = "name a readable file that contains only this value";
    let content = read_regular_text(path, MAX_FILE_BYTES)
        .map_err(|error| CredentialMistake::new(format!("can't read this file: {error}"), HINT))?;
    if content.trim().is_empty() {
        return Err(CredentialMistake::new("this file is empty", HINT));
    }
    cleaned(&content).map_err(|mistake| CredentialMistake {
        message: format!("this file can't be used: {}", mistake.message),
        ..mistake
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_credential_is_removed() {
        for text in [
            "abc",
            " abc",
            "abc\n",
            "abc \r\n",
            "\n\nabc\t\n",
            "\u{feff}abc\n",
        ] {
            assert_eq!(cleaned(text).ok().as_deref(), Some("abc"), "{text:?}");
        }
        // A quotation mark at one end may be part of a secret.
        assert_eq!(cleaned("\"abc").ok().as_deref(), Some("\"abc"));
    }

    #[test]
    fn text_that_is_no_credential_is_refused_and_no_part_of_it_repeated() {
        for text in [
            "abc\ndef",
            "abc\r\ndef\r\n",
            "\"abc\"",
            "'abc'\n",
            "abc: def",
            "abc def",
            "abc\u{1}def",
        ] {
            let Err(mistake) = cleaned(text) else {
                panic!("{text:?} is accepted");
            };
            for part in ["abc", "def"] {
                assert!(!mistake.message.contains(part), "{}", mistake.message);
            }
        }
    }
}
