//! What `rules` prints. tests/rules checks with promtool what the rules do.

use std::collections::BTreeSet;
use std::path::Path;

use livekit_canary::metrics::{CATALOGUE, MetricKind, PREFIX};

use crate::canary;

/// The output of `rules` for these settings, without credentials.
fn rules(settings: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("canary.toml"), settings).unwrap();
    let run = canary(folder.path(), ["rules", "--config", "canary.toml"], &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert_eq!(run.stderr, "");
    run.stdout
}

#[test]
fn deployed_rules_are_those_of_the_default_settings() {
    let file = "deploy/prometheus/livekit-canary.rules.yml";
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let folder = tempfile::tempdir().unwrap();
    let run = canary(folder.path(), ["rules"], &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    // `just regenerate` writes the file again.
    assert_eq!(std::fs::read_to_string(file).unwrap(), run.stdout);
}

#[test]
fn rules_have_windows_for_the_schedule_of_the_settings() {
    let settings = "[targets.support]\nagent_name = \"a\"\nschedule.every = \"20m\"\n";
    let rules = rules(settings);
    assert!(
        rules.contains(
            "[50m]))\n        and ignoring (result) (livekit_canary:batch_interval:effective > 900 <= 1200)"
        ),
        "{rules}"
    );
}

/// Ticks are skipped while a batch runs, so two batches can end later than two intervals.
#[test]
fn windows_of_a_short_interval_fit_the_longest_batch() {
    let settings = |every: &str| {
        format!(
            "alerts.scrape_interval = \"1s\"\n[targets.support]\nagent_name = \"a\"\nschedule.every = \"{every}\"\n"
        )
    };
    let classes = |rules: &str| -> BTreeSet<String> {
        let lines = rules
            .lines()
            .filter(|line| line.contains("batch_interval:effective"));
        let bounds = lines.filter_map(|line| line.split_once("<= "));
        bounds.map(|(_, bound)| bound.to_owned()).collect()
    };
    let known = classes(&rules(""));
    let own = |every| {
        let all = classes(&rules(&settings(every)));
        all.difference(&known).cloned().collect::<Vec<_>>()
    };
    // The longest batch of the default settings lasts longer than both of them, and not as long as the third.
    let short = own("10s");
    assert_eq!(short.len(), 1, "{short:?}");
    assert_eq!(own("20s"), short);
    assert_eq!(own("25m"), ["1500)"]);
}

#[test]
fn settings_of_alerts_are_in_the_rules() {
    let rules = rules(
        "[alerts]\nslo_window = \"7d\"\npage = \"critical\"\nticket = \"warning\"\nrunbook_base_url = \"https://wiki/a\"\n",
    );
    for part in [
        "--storage.tsdb.retention.time=8d",
        "increase(livekit_canary_slo_good_total[7d])",
        "severity: \"critical\"",
        "severity: \"warning\"",
        "runbook_url: \"https://wiki/a#agentfailing\"",
    ] {
        assert!(rules.contains(part), "no {part:?}");
    }
    assert!(!rules.contains("severity: \"page\"") && !rules.contains("github.com"));
}

#[test]
fn rules_read_no_credentials() {
    let missing =
        "api_key_file = \"missing\"\napi_secret_file = \"missing\"\nca_file = \"missing\"\n";
    let settings = format!("[projects.acme]\n{missing}[targets.support]\nagent_name = \"a\"\n");
    assert_eq!(rules(&settings), rules(""));
}

#[test]
fn every_series_that_a_rule_names_is_in_the_catalogue() {
    let rules = rules("");
    let names =
        rules.split(|char: char| !(char.is_ascii_alphanumeric() || char == '_' || char == ':'));
    let prefix = format!("{PREFIX}_");
    let mut seen = 0;
    for name in names.filter_map(|name| name.strip_prefix(&prefix)) {
        let known = CATALOGUE.iter().find(|family| family.name == name);
        let known = known.unwrap_or_else(|| panic!("{name} is not in the catalogue"));
        assert!(!matches!(known.kind, MetricKind::Histogram(_)), "{name}");
        seen += 1;
    }
    assert!(seen > 100, "{seen} series seen");
}
