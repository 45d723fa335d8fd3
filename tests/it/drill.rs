//! The fire drill: the canary reports each reason that a drill causes, its series have the label `drill`, and it ends on time.

use anyhow::Context as _;
use livekit_canary::probe::{LimitKind, Reason};
use rustix::process::Signal;
use support::canary::{Canary, Running};
use support::http::HttpClient;
use support::scrape::Scrape;

use crate::{canary, in_parallel};

/// The arguments of every drill.
fn drills() -> Vec<Vec<&'static str>> {
    let mut drills = vec![vec!["ok"]];
    for reason in Reason::ALL {
        match reason {
            Reason::PlanLimit(_) => {
                let kinds = LimitKind::ALL.into_iter();
                drills.extend(kinds.map(|kind| vec![reason.label(), "--limit", kind.label()]));
            }
            reason => drills.push(vec![reason.label()]),
        }
    }
    drills
}

#[test]
fn every_reason_is_caused_and_reported() {
    let results = in_parallel(&drills(), |drill| {
        let result = run_drill(drill);
        result.err().map(|output| format!("{drill:?}: {output}"))
    });
    let wrong: Vec<_> = results.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Runs one batch of a drill.
///
/// # Errors
/// The output, if the batch doesn't have the reason of the drill.
fn run_drill(drill: &[&str]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--once", "--rooms", "1"];
    let args = ["drill"].iter().chain(drill).chain(&flags);
    let run = canary(folder.path(), args, &[("LIVEKIT_URL", "ws://127.0.0.1:1")]);
    let found = run.stdout.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("1") && words.next_back() == Some(drill[0])
    });
    let kind = drill.get(2).map(|kind| format!("({kind}"));
    let of_kind = kind.is_none_or(|kind| run.stdout.contains(&kind));
    if run.code == Some(0) && found && of_kind && run.stdout.contains("As expected.") {
        return Ok(());
    }
    Err(run.output())
}

/// Starts a drill with a batch every second.
fn start_drill(args: &[&str]) -> anyhow::Result<Running> {
    start_drill_every("1s", args)
}

fn start_drill_every(interval: &str, args: &[&str]) -> anyhow::Result<Running> {
    let fixed = ["drill", "--rooms", "1", "--every", interval];
    let page = ["--web.listen-address", "127.0.0.1:0"];
    Canary::new([&fixed[..], &page, args].concat()).start()
}

fn interrupt(drill: Running) -> anyhow::Result<()> {
    drill.signal(Signal::INT)?;
    drill.finish()?.expect_code(0)?;
    Ok(())
}

/// Waits for the line with the address of the page: `… at http://ADDRESS/ and …`.
fn page(drill: &mut Running) -> anyhow::Result<HttpClient> {
    let line = drill.read_to(&["The page is at"])?;
    let (_, rest) = line.split_once(" at http://").context("no address")?;
    let (address, _) = rest.split_once('/').context("no end of the address")?;
    Ok(HttpClient::new(address.parse()?))
}

#[test]
fn drill_without_a_reason_lists_them() {
    let folder = tempfile::tempdir().unwrap();
    let run = canary(folder.path(), ["drill"], &[]);
    assert_eq!(
        (run.code, run.stdout.as_str()),
        (Some(2), ""),
        "{}",
        run.output()
    );
    let widest = run.stderr.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "{}", run.stderr);
    insta::assert_snapshot!(run.stderr);
}

#[test]
fn drill_ends_with_the_sum_of_its_batches() -> anyhow::Result<()> {
    let mut drill = start_drill(&["room_create_failed"])?;
    for _ in 0..2 {
        drill.read_to(&["As expected."])?;
    }
    drill.signal(Signal::INT)?;
    let run = drill.finish()?.expect_code(0)?;
    let sum = run
        .stdout
        .trim_end()
        .rsplit('\n')
        .next()
        .unwrap_or_default();
    let compared = run.stdout.matches("As expected.").count();
    let expected = format!("Sum: {compared} batches, {compared} of {compared} rooms as expected.");
    assert_eq!(sum, expected, "{}", run.output());
    Ok(())
}

#[test]
fn series_of_a_drill_have_the_label_drill() -> anyhow::Result<()> {
    let mut drill = start_drill(&["plan_limit", "--limit", "api_rate"])?;
    let page = page(&mut drill)?;
    drill.read_to(&["As expected"])?;
    let scrape = Scrape::parse(&page.text("/metrics")?)?;
    let labels = [
        ("target", "drill-plan-limit-api-rate"),
        ("project", "drill"),
        ("drill", "true"),
    ];
    scrape.value("target_info", &labels)?;
    let rejections = scrape.count("plan_limit_rejections_total", &[("limit", "api_rate")])?;
    assert!(rejections >= 1, "{rejections}");
    interrupt(drill)
}

#[test]
fn good_batches_follow_the_end_of_a_fault_and_the_counters_continue() -> anyhow::Result<()> {
    // One reason of each kind: caused by the sandbox, by the settings, and by the probes.
    let reasons = ["room_create_failed", "unreachable", "internal"];
    let results = in_parallel(&reasons, |reason| expect_recovery(reason).context(*reason));
    results.into_iter().collect()
}

fn expect_recovery(reason: &str) -> anyhow::Result<()> {
    // A batch that starts within a second of the fault's end is not compared.
    let mut drill = start_drill_every("4s", &[reason, "--recover-after", "1500ms"])?;
    let page = page(&mut drill)?;
    drill.read_to(&["the fault ends"])?;
    drill.read_to(&["no fault"])?;
    drill.read_to(&["As expected"])?;
    let scrape = Scrape::parse(&page.text("/metrics")?)?;
    let failures = scrape.count("probe_failures_total", &[("reason", reason)])?;
    assert!(failures >= 1, "{failures}");
    assert_eq!(scrape.count("probe_failures_total", &[])?, failures);
    let good = scrape.count("slo_good_total", &[("sli", "availability")])?;
    assert!(good >= 1, "{good}");
    interrupt(drill)
}

#[test]
fn fault_begins_after_the_time_of_the_flag() -> anyhow::Result<()> {
    let mut drill = start_drill(&["config_rejected", "--after", "3s"])?;
    for text in ["no fault", "the fault begins", "Batch", "config_rejected"] {
        drill.read_to(&[text])?;
    }
    let stdout = drill.stdout_read()?;
    assert!(!stdout.contains("NOT"), "{stdout}");
    interrupt(drill)
}

#[test]
fn drill_ends_by_itself_after_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let history = folder.path().join("history");
    let args = [
        "drill",
        "agent_no_track",
        "--every",
        "1s",
        "--rooms",
        "1",
        "--for",
        "2s",
    ];
    let history_dir = ["--history-dir", history.to_str().unwrap()];
    let run = canary(folder.path(), args.iter().chain(&history_dir), &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(history.is_dir());
}

#[test]
fn flags_without_an_effect_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    for (args, message) in [
        (
            &["agent_silent", "--limit", "room"][..],
            "only with plan_limit",
        ),
        (&["ok", "--recover-after", "1m"], "injects no fault"),
        (
            &["removed", "--for", "1m", "--after", "1m"],
            "shorter than --for",
        ),
        (&["plan_limit"], "--limit"),
        (&["plan_limit", "--limit", "rooms"], "possible values"),
        (&["agent_asleep"], "agent_silent"),
    ] {
        let run = canary(folder.path(), ["drill"].iter().chain(args), &[]);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.output());
        assert!(run.stderr.contains(message), "{args:?}: {}", run.output());
    }
}
