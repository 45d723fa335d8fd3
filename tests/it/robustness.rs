//! Settings of any form never cause a panic. A rejection always has a reason, and never contains a secret.

use std::path::Path;

use livekit_canary::config::{Config, RawConfig};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::Config as Cases;

/// The API secret, in the environment and at the right place in the settings.
const SECRET: &str = "an-API-secret-that-nobody-may-see";

/// A secret as the value of another setting, by mistake. The settings don't hide it, but no rejection may contain it.
const MISPLACED: &str = "a-secret-in-a-wrong-place";

/// A failure prints the smallest settings that cause it. Nothing is written to files.
fn cases(cases: u32) -> Cases {
    Cases {
        cases,
        failure_persistence: None,
        ..Cases::default()
    }
}

fn read(text: &[u8]) -> Result<Config, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("canary.toml");
    std::fs::write(&file, text).unwrap();
    let credentials = [
        ("LIVEKIT_URL", "wss://canary.example"),
        ("LIVEKIT_API_KEY", "key"),
        ("LIVEKIT_API_SECRET", SECRET),
    ];
    let environment = credentials.map(|(name, value)| (name.into(), value.into()));
    let draft =
        RawConfig::read(Some(&file), environment).map_err(|problems| problems.to_string())?;
    draft.validate().map_err(|problems| problems.to_string())
}

/// A rejection has a text, and no secret is in it.
fn expect_reason_without_secret(result: &Result<Config, String>) {
    if let Err(reason) = result {
        assert!(!reason.trim().is_empty());
        assert!(
            !reason.contains(SECRET) && !reason.contains(MISPLACED),
            "{reason}"
        );
    }
    if let Ok(config) = result {
        assert!(!format!("{config:?}").contains(SECRET));
    }
}

fn documented() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/canary.toml");
    std::fs::read_to_string(path).unwrap()
}

#[derive(Debug, Clone)]
enum Change {
    Remove(Index),
    Repeat(Index, Index),
    /// Replaces the value in this line.
    Value(Index, String),
    /// Inserts a line.
    Line(Index, String),
    /// Removes the comment sign of this line.
    Uncomment(Index),
}

fn value() -> impl Strategy<Value = String> {
    let words = [
        "\"\"",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "true",
        "[]",
        "{}",
        "\"5m\"",
        "\"999999999999d\"",
        "\"1ns\"",
        "\"every day\"",
        "\"0 0 31 2 *\"",
        "\"*/0 * * * *\"",
        "\"Europe/Nowhere\"",
        "9223372036854775807",
        "1979-05-27T07:32:00Z",
        "\"a-secret-in-a-wrong-place\"",
        "\"ws://\"",
        "\"https://user:pw@host/?a=b\"",
        "\"\\u0000\"",
    ];
    prop_oneof![
        select(words.to_vec()).prop_map(str::to_owned),
        any::<i64>().prop_map(|number| number.to_string()),
        "[ -~]{0,20}",
        "\\PC{0,10}".prop_map(|text| format!("{text:?}")),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        1 => index().prop_map(Change::Remove),
        1 => (index(), index()).prop_map(|(from, to)| Change::Repeat(from, to)),
        6 => (index(), value()).prop_map(|(at, value)| Change::Value(at, value)),
        1 => (index(), "[ -~]{0,30}").prop_map(|(at, line)| Change::Line(at, line)),
        3 => index().prop_map(Change::Uncomment),
    ]
}

fn changed(changes: &[Change]) -> String {
    let secret = format!("#api_secret = \"{SECRET}\"");
    let text = documented()
        .replace("#agent_name", "agent_name")
        .replace("#api_secret = \"…\"", &secret);
    // Without comments, so that every change is one of a setting.
    let mut lines: Vec<_> = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("# "))
        .map(str::to_owned)
        .collect();
    for change in changes {
        if lines.is_empty() {
            break;
        }
        let many = lines.len();
        match change {
            Change::Remove(at) => drop(lines.remove(at.index(many))),
            Change::Repeat(from, to) => {
                let line = lines[from.index(many)].clone();
                lines.insert(to.index(many), line);
            }
            Change::Value(at, value) => {
                let line = &mut lines[at.index(many)];
                let key = line.split('=').next().unwrap_or_default();
                *line = format!("{} = {value}", key.trim().trim_start_matches('#'));
            }
            Change::Line(at, line) => lines.insert(at.index(many), line.clone()),
            Change::Uncomment(at) => {
                let line = &mut lines[at.index(many)];
                *line = line.trim_start_matches('#').to_owned();
            }
        }
    }
    lines.join("\n")
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn any_bytes_are_valid_settings_or_rejected_with_a_reason(
        bytes in prop_oneof![
            vec(any::<u8>(), 0..200),
            "\\PC{0,200}".prop_map(String::into_bytes),
            "(\\[[a-z.]{0,8}\\]\n|[a-z]{1,6} = [ -~]{0,10}\n){0,10}".prop_map(String::into_bytes),
        ],
    ) {
        expect_reason_without_secret(&read(&bytes));
    }

    #[test]
    fn documented_settings_with_any_change_are_valid_or_rejected_with_a_reason(
        changes in vec(change(), 1..5),
    ) {
        expect_reason_without_secret(&read(changed(&changes).as_bytes()));
    }

    #[test]
    fn any_cron_expression_is_valid_or_rejected_with_a_reason(expression in prop_oneof![
        "[0-9*/,LW#?-]{1,4}( [0-9*/,LW#?-]{1,4}){4,5}",
        "[0-9]{1,2}(-[0-9]{1,2})?(/[0-9]{1,3})?( (\\*|[0-9]{1,2})){4}",
        "\\PC{0,40}",
    ]) {
        let text = format!(
            "[targets.support]\nagent_name = \"a\"\n[targets.support.schedule]\ncron = {}\n",
            toml::Value::from(expression),
        );
        expect_reason_without_secret(&read(text.as_bytes()));
    }
}

#[test]
fn documented_settings_without_a_change_are_valid() {
    // Otherwise every change above would only cause the first error again.
    let text = changed(&[]);
    assert!(text.contains(SECRET), "there is no secret to hide");
    let config = read(text.as_bytes()).unwrap();
    assert_eq!(
        config.targets["support"].agent_name.as_deref(),
        Some("my-agent")
    );
}
