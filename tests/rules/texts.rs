//! What the alerts of an outage say, and which batches the rules of a short interval see, in promtool's own unit tests.

use std::fmt::Write as _;
use std::fs;

/// Runs a unit test of promtool with the rules for these settings.
fn expect_pass(settings: &str, test: &str) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("canary.toml"), settings).unwrap();
    super::write_rules(dir, &["--config", "canary.toml"]);
    fs::write(dir.join("tests.yml"), test).unwrap();
    for promtool in &super::programs().promtools {
        let run = super::promtool_test(promtool, dir);
        assert!(run.passed, "{}: {}", promtool.display(), run.output);
    }
}

const LABELS: &str = "target=\"support\",job=\"livekit-canary\",region=\"eu\",instance=\"a\"";

/// One series of the target, as promtool reads it.
fn series(name: &str, labels: &str, values: &str) -> String {
    let labels = labels.replace('\'', "''");
    format!("  - series: 'livekit_canary_{name}{{{LABELS},{labels}}}'\n    values: '{values}'\n")
}

/// One expected alert of the target.
fn alert(minute: usize, name: &str, summary: &str, [differs, url]: [&str; 2]) -> String {
    let (fault, advice) = match name {
        "AgentFailing" => (
            "agent",
            "Look up the reason in docs/reasons.md, and read the agent's log for the failed rooms. If the agent was deployed \
             just before, roll it back.",
        ),
        _ => (
            "service",
            "The reason shows which step fails. Check LiveKit's status and the network between the canary and LiveKit. This \
             alert says nothing about the agent.",
        ),
    };
    let anchor = name.to_ascii_lowercase();
    format!(
        "  - eval_time: {minute}m
    alertname: {name}
    exp_alerts:
    - exp_labels: {{severity: page, component: livekit-canary, target: support, fault: {fault}, job: livekit-canary, region: eu}}
      exp_annotations:
        summary: \"{summary}\"
        description: \"{differs}{advice}{url}\"
        runbook_url: \"https://github.com/livekit-canary/livekit-canary/blob/main/docs/alerts.md#{anchor}\"
"
    )
}

/// 2026-09-21 14:13:20 UTC, with a fraction as in the series.
const SINCE: &str = "1790000000.25";

#[test]
fn alert_of_an_outage_names_its_reason_share_difference_and_address_while_they_are_known() {
    let info = |minutes: &str,
                incident: &str,
                reason: &str,
                share: &str,
                differs: &str,
                url: &str| {
        let labels = format!(
            "incident=\"{incident}\",reason=\"{reason}\",share=\"{share}\",differs=\"{differs}\",url=\"{url}\""
        );
        series("incident_info", &labels, minutes)
    };
    let input = [
        series("incident_open", "fault=\"agent\"", "0 1x7 stale"),
        series("incident_open", "fault=\"service\"", "0x8 stale"),
        series("target_paused", "", "0x8 stale"),
        series("build_info", "version=\"1\"", "1x8 stale").replace("target=\"support\",", ""),
        series("target_state", "state=\"failing\"", "0 1x3 0x3 1 stale"),
        series("target_state", "state=\"unknown\"", "0 0x3 1x3 0 stale"),
        series(
            "target_state_since_timestamp_seconds",
            "",
            &format!("0 {SINCE}x6 stale"),
        ),
        info("_ 1x1 stale", "one", "agent_silent", "100 %", "", ""),
        info(
            "_x2 1x1 stale",
            "one",
            "agent_silent",
            "86 %",
            "worker AW_1 fails in 6 of 6 rooms, all others in 0 of 7 (p = 0.0006)",
            "https://canary.example.com/incidents/one",
        ),
        // The same target in another region.
        info("1x9", "two", "agent_no_reply", "50 %", "", "").replace("\"eu\"", "\"us\""),
    ];
    let expected = [
        alert(
            1,
            "AgentFailing",
            "support: the agent fails: 100 % of its rooms, mostly agent_silent, since 2026-09-21 14:13:20 UTC",
            ["", ""],
        ),
        alert(
            3,
            "AgentFailing",
            "support: the agent fails: 86 % of its rooms, mostly agent_silent, since 2026-09-21 14:13:20 UTC",
            [
                "What differs: worker AW_1 fails in 6 of 6 rooms, all others in 0 of 7 (p = 0.0006). ",
                " The incident: https://canary.example.com/incidents/one",
            ],
        ),
        // The state is unknown.
        alert(5, "AgentFailing", "support: the agent fails", ["", ""]),
        // The canary is gone.
        alert(20, "AgentFailing", "support: the agent fails", ["", ""]),
        // More than an hour later.
        "  - {eval_time: 75m, alertname: AgentFailing}\n".to_owned(),
    ];
    let test = format!(
        "{}{}  alert_rule_test:
{}",
        super::test_head("1m", "1m"),
        input.concat(),
        expected.concat()
    );
    expect_pass("", &test);
}

#[test]
fn alert_of_a_service_outage_says_that_it_is_not_the_agent() {
    let input = [
        series("incident_open", "fault=\"service\"", "1x5"),
        series("target_paused", "", "0x5"),
    ];
    let expected = alert(
        1,
        "ServiceFailing",
        "support: LiveKit or the network fails",
        ["", ""],
    );
    let test = format!(
        "{}{}  alert_rule_test:
{expected}",
        super::test_head("1m", "1m"),
        input.concat(),
    );
    expect_pass("", &test);
}

/// A batch starts every ten seconds, but one whose rooms wait in vain for an agent lasts a minute, so its ticks are skipped.
/// A window of two and a half intervals would hold no batch at all.
#[test]
fn rules_see_two_batches_of_a_dead_worker_whose_interval_is_short() {
    let settings = "alerts.scrape_interval = \"1s\"\n[targets.support]\nagent_name = \"demo\"\nschedule.every = \"10s\"\n";
    // A batch ends every 70 s: at 60 s, at 130 s, and so on.
    let mut ends = "0x11".to_owned();
    for batch in 1..=12 {
        write!(ends, " {batch}x13").unwrap();
    }
    let input = [
        series(
            "batch_interval_effective_seconds",
            "",
            &format!("{}x180", longest_batch(settings)),
        ),
        series("target_paused", "", "0x180"),
        series(
            "batches_total",
            "purpose=\"scheduled\",result=\"failed\"",
            &ends,
        ),
        series(
            "probe_failures_total",
            "purpose=\"scheduled\",reason=\"auth_rejected\",origin=\"config\"",
            &ends,
        ),
        // Six of seven ticks.
        series("batches_skipped_total", "cause=\"overlap\"", "0+0.43x180"),
        series(
            "slo_eligible_total",
            "sli=\"availability\",in_incident=\"false\"",
            "0x180",
        ),
    ];
    let mut queries = String::new();
    for minute in 4..14 {
        for alert in ["CredentialsRejected", "CanaryBlind"] {
            writeln!(
                queries,
                "  - expr: \"count(ALERTS{{alertname='{alert}',alertstate='firing'}})\"
    eval_time: {minute}m
    exp_samples: [{{labels: '{{}}', value: 1}}]"
            )
            .unwrap();
        }
        writeln!(
            queries,
            "  - expr: \"ALERTS{{alertname='CanaryStuck'}}\"\n    eval_time: {minute}m"
        )
        .unwrap();
    }
    let test = format!(
        "{}{}  promql_expr_test:
{queries}",
        super::test_head("15s", "5s"),
        input.concat(),
    );
    expect_pass(settings, &test);
}

/// The seconds of the longest batch of the only target: the only class of intervals that the default rules lack.
fn longest_batch(settings: &str) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut classes = [settings, ""].map(|settings| {
        fs::write(dir.join("canary.toml"), settings).unwrap();
        super::write_rules(dir, &["--config", "canary.toml"]);
        let rules = fs::read_to_string(dir.join("rules.yml")).unwrap();
        let lines = rules
            .lines()
            .filter(|line| line.contains("(livekit_canary:batch_interval:effective"));
        let bounds = lines.filter_map(|line| line.split_once("<= ")?.1.strip_suffix(')'));
        bounds
            .map(|bound| bound.parse::<f64>().unwrap())
            .collect::<Vec<_>>()
    });
    let [own, known] = &mut classes;
    own.retain(|bound| !known.contains(bound));
    own.dedup();
    assert_eq!(own.len(), 1, "{own:?}");
    own[0]
}
