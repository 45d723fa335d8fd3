//! The demo: a server, an agent and the canary in one process, and faults that the canary names.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::canary;

/// Ends a demo that never gets where a test wants it.
const GIVE_UP: Duration = Duration::from_secs(150);

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
    let mut child = Command::new(env!("CARGO_BIN_EXE_livekit-canary"))
        .args(["demo", "--rooms", "1", "--every", "1s"])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let (finished, waiting) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if waiting.recv_timeout(GIVE_UP) == Err(RecvTimeoutError::Timeout) {
            kill_process(pid, Signal::KILL).unwrap();
        }
    });
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let told = read_through_first_fault(&mut stdout);
    kill_process(pid, Signal::INT).unwrap();
    let (code, rest) = end(&mut child, stdout);
    drop(finished);
    watchdog.join().unwrap();

    let told = told.join("\n");
    assert_eq!(told.matches("no fault").count(), 2, "{told}");
    assert_eq!(told.matches("As expected.").count(), 3, "{told}");
    assert!(
        told.contains("fault: the agent takes 3 s to join"),
        "{told}"
    );
    assert!(rest.ends_with("none is left.\n"), "{rest}");
    assert_eq!(code, Some(0), "{told}\n{rest}");
}

/// The lines up to what is said of the third batch.
fn read_through_first_fault(stdout: &mut impl BufRead) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut judged = 0;
    while judged < 3 {
        let mut line = String::new();
        let read = stdout.read_line(&mut line).unwrap();
        assert!(read > 0, "it ended early:\n{}", lines.join("\n"));
        judged += usize::from(line.contains("As expected") || line.contains("NOT what"));
        lines.push(line.trim_end().to_owned());
    }
    lines
}

fn end(child: &mut Child, mut stdout: BufReader<ChildStdout>) -> (Option<i32>, String) {
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    (child.wait().unwrap().code(), rest)
}
