//! The fire drill: each reason is brought about and found, its series say so, and it ends as it is told.

use std::sync::Mutex;
use std::thread;

use livekit_canary::probe::{LimitKind, Reason};

use crate::canary;
use crate::running::Running;

/// Drills that run side by side.
const SIDE_BY_SIDE: usize = 8;

/// The arguments of every drill there is.
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
fn every_reason_is_brought_about_and_found() {
    let left = Mutex::new(drills());
    let wrong: Mutex<Vec<String>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                loop {
                    let Some(drill) = left.lock().unwrap().pop() else {
                        return;
                    };
                    if let Err(said) = once(&drill) {
                        wrong.lock().unwrap().push(format!("{drill:?}: {said}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Runs one batch; what was printed where it isn't of that drill.
fn once(drill: &[&str]) -> Result<(), String> {
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
    Err(format!("exit status {:?}\n{}", run.code, run.output()))
}

fn drill(args: &[&str]) -> Running {
    let fixed = ["drill", "--rooms", "1", "--every", "1s"];
    let page = ["--web.listen-address", "127.0.0.1:0"];
    Running::start(&[&fixed[..], &page, args].concat())
}

/// The address in a line that says `… at ADDRESS and …`.
fn page(line: &str) -> &str {
    let (_, rest) = line.split_once(" at ").unwrap();
    rest.split_once(' ').unwrap().0
}

fn metrics(page: &str) -> String {
    let answer = ureq::get(format!("{page}metrics")).call();
    answer.unwrap().body_mut().read_to_string().unwrap()
}

/// The value of the series whose line begins so.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in:\n{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn the_series_of_a_drill_say_that_it_is_one() {
    let mut drill = drill(&["plan_limit", "--limit", "api_rate"]);
    let page = page(&drill.read_to("Its page is at")).to_owned();
    drill.read_to("As expected");
    let metrics = metrics(&page);
    let info = metrics
        .lines()
        .find(|line| line.starts_with("livekit_canary_target_info{"))
        .unwrap();
    for label in [
        r#"target="drill-plan-limit-api-rate""#,
        r#"project="drill""#,
        r#"drill="true""#,
    ] {
        assert!(info.contains(label), "{info}");
    }
    let rejections = "livekit_canary_plan_limit_rejections_total{limit=\"api_rate\"";
    assert!(value(&metrics, rejections) >= 1.0, "{metrics}");
    assert_eq!(drill.interrupt().0, Some(0));
}

#[test]
fn a_fault_that_ends_is_followed_by_good_batches_and_its_counters_go_on() {
    // One of each kind: played by the sandbox, by the settings, by the probes themselves.
    thread::scope(|scope| {
        for reason in ["room_create_failed", "unreachable", "internal"] {
            scope.spawn(move || {
                let mut drill = drill(&[reason, "--recover-after", "5s"]);
                let page = page(&drill.read_to("Its page is at")).to_owned();
                drill.read_to("the fault ends");
                drill.read_to("no fault");
                drill.read_to("As expected");
                let metrics = metrics(&page);
                let failed = metrics.lines().filter(|line| {
                    line.starts_with("livekit_canary_probe_failures_total{")
                        && line.contains(&format!("reason=\"{reason}\""))
                        && !line.ends_with(" 0")
                });
                assert_eq!(failed.count(), 1, "{metrics}");
                let good = r#"livekit_canary_slo_good_total{sli="availability""#;
                assert!(value(&metrics, good) >= 1.0, "{metrics}");
                assert_eq!(drill.interrupt().0, Some(0), "{reason}");
            });
        }
    });
}

#[test]
fn a_fault_begins_when_it_is_told_to() {
    let mut drill = drill(&["config_rejected", "--after", "3s"]);
    drill.read_to("no fault");
    drill.read_to("the fault begins");
    drill.read_to("Batch");
    drill.read_to("config_rejected");
    let mut told = drill.told.iter();
    assert!(!told.any(|line| line.contains("NOT")), "{:?}", drill.told);
    assert_eq!(drill.interrupt().0, Some(0));
}

#[test]
fn a_drill_ends_by_itself_after_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("history");
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
    let keep = ["--history-dir", kept.to_str().unwrap()];
    let run = canary(folder.path(), args.iter().chain(&keep), &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(kept.is_dir());
}

#[test]
fn flags_that_would_change_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (args, said) in [
        (
            &["agent_silent", "--limit", "room"][..],
            "goes with plan_limit",
        ),
        (&["ok", "--recover-after", "1m"], "plays no fault"),
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
        assert!(run.stderr.contains(said), "{args:?}: {}", run.output());
    }
}
