//! A demo or a drill in a process of its own, whose output is read line by line until a test has seen enough.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Ends one that never gets where a test wants it.
const GIVE_UP: Duration = Duration::from_secs(150);

/// One of them, killed where it takes too long.
pub struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// The lines that were read.
    pub told: Vec<String>,
    finished: mpsc::Sender<()>,
    watchdog: thread::JoinHandle<()>,
}

impl Running {
    pub fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_livekit-canary"))
            .args(args)
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
        Self {
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
            told: Vec::new(),
            finished,
            watchdog,
        }
    }

    /// Reads on to the next line that has `what`.
    pub fn read_to(&mut self, what: &str) -> String {
        self.read_to_any(&[what])
    }

    pub fn read_to_any(&mut self, what: &[&str]) -> String {
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert!(read > 0, "no {what:?}:\n{}", self.told.join("\n"));
            line.truncate(line.trim_end().len());
            self.told.push(line.clone());
            if what.iter().any(|what| line.contains(what)) {
                return line;
            }
        }
    }

    /// Its exit status, and what it said since.
    pub fn interrupt(mut self) -> (Option<i32>, String) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        let code = self.child.wait().unwrap().code();
        drop(self.finished);
        self.watchdog.join().unwrap();
        (code, rest)
    }
}
