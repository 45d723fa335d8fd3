//! The demo: a server, an agent and the canary in one process, with faults that the canary must report.

use rustix::process::Signal;
use support::canary::Canary;

use crate::canary;

#[test]
fn demo_ignores_the_environment_and_prints_an_ok_row_per_room() {
    let folder = tempfile::tempdir().unwrap();
    let other_server = [("LIVEKIT_URL", "ws://127.0.0.1:1")];
    let run = canary(
        folder.path(),
        ["demo", "--once", "--rooms", "2"],
        &other_server,
    );
    let ok = run.stdout.lines().filter(|line| line.ends_with("  ok"));
    assert_eq!((run.code, ok.count()), (Some(0), 2), "{}", run.output());
    assert_eq!(run.stderr, "");
}

#[test]
fn faults_follow_good_batches_and_an_interrupt_exits_0() -> anyhow::Result<()> {
    let mut demo = Canary::new(["demo", "--rooms", "1", "--every", "1s"]).start()?;
    for _ in 0..3 {
        demo.read_to(&["As expected", "NOT as expected"])?;
    }
    let batches = demo.stdout_read()?;
    demo.signal(Signal::INT)?;
    let finished = demo.finish()?.expect_code(0)?;

    assert_eq!(batches.matches(" UTC, no fault").count(), 2, "{batches}");
    assert_eq!(batches.matches("As expected.").count(), 3, "{batches}");
    assert!(
        batches.contains("fault: the agent leaves while it greets"),
        "{batches}"
    );
    let stdout = finished.stdout;
    assert!(stdout.ends_with("none of them remains.\n"), "{stdout}");
    Ok(())
}
