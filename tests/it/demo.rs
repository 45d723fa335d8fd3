//! The demo: a server, an agent and the canary in one process, and faults that the canary names.

use crate::canary;
use crate::running::Running;

#[test]
fn one_batch_prints_an_ok_row_a_room_whatever_the_environment_names() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = [("LIVEKIT_URL", "ws://127.0.0.1:1")];
    let run = canary(
        folder.path(),
        ["demo", "--once", "--rooms", "2"],
        &elsewhere,
    );
    let ok = run.stdout.lines().filter(|line| line.ends_with("  ok"));
    assert_eq!((run.code, ok.count()), (Some(0), 2), "{}", run.output());
    assert_eq!(run.stderr, "");
}

#[test]
fn faults_follow_good_batches_and_an_interrupt_ends_it_well() {
    let mut demo = Running::start(&["demo", "--rooms", "1", "--every", "1s"]);
    for _ in 0..3 {
        demo.read_to_any(&["As expected", "NOT what"]);
    }
    let told = demo.told.join("\n");
    let (code, rest) = demo.interrupt();

    assert_eq!(told.matches("no fault").count(), 2, "{told}");
    assert_eq!(told.matches("As expected.").count(), 3, "{told}");
    assert!(
        told.contains("fault: the agent takes 3 s to join"),
        "{told}"
    );
    assert!(rest.ends_with("none is left.\n"), "{rest}");
    assert_eq!(code, Some(0), "{told}\n{rest}");
}
