//! Runs the canary's binary as a user does, and reads what it prints.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::report::Batch;
use crate::stack::Stack;
use crate::{SECRET, wait_for};

/// The limit for every run of the canary that ends by itself, and for every line that a test waits for.
const RUN_TIMEOUT: Duration = Duration::from_mins(3);

/// The WebRTC stack that joins rooms: the variable `ENGINE`. The binary must be built with it.
pub fn engine() -> &'static str {
    static ENGINE: LazyLock<String> =
        LazyLock::new(|| env::var("ENGINE").unwrap_or_else(|_| "native".to_owned()));
    &ENGINE
}

/// The path of the binary that cargo built for this test.
pub fn binary() -> PathBuf {
    // Cargo sets this variable for each test and benchmark. As it does so at run time, a library can read it, too.
    let path = env::var_os("CARGO_BIN_EXE_livekit-canary");
    path.expect("cargo runs the tests").into()
}

/// One command line of the canary, without the environment of the test.
pub struct Canary {
    command: Command,
    dir: TempDir,
}

impl Canary {
    pub fn new<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(binary());
        command.args(arguments).env_clear().stdin(Stdio::null());
        Self {
            command,
            dir: tempfile::tempdir().expect("a temporary folder can be created"),
        }
    }

    /// A command line with a limit on its open files.
    pub fn with_descriptors(descriptors: u32, arguments: &[&str]) -> Self {
        let mut canary = Self::new([""; 0]);
        let limit = format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limit]).arg(binary()).args(arguments);
        command.env_clear().stdin(Stdio::null());
        canary.command = command;
        canary
    }

    /// `once` with JSON as its output.
    pub fn once() -> Self {
        Self::new(["once", "--format", "json", "--engine", engine()])
    }

    /// Writes a settings file, and adds it to the arguments.
    pub fn config(mut self, text: &str) -> anyhow::Result<Self> {
        let path = self.dir.path().join("canary.toml");
        fs::write(&path, text)?;
        self.command.arg("--config").arg(path);
        Ok(self)
    }

    #[must_use]
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    #[must_use]
    pub fn current_dir(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Puts the URL and the key pair of a stack into the environment.
    #[must_use]
    pub fn on(self, stack: &Stack) -> Self {
        self.envs(&[
            ("LIVEKIT_URL", &stack.url),
            ("LIVEKIT_API_KEY", &stack.key),
            ("LIVEKIT_API_SECRET", &stack.secret),
        ])
    }

    #[must_use]
    pub fn envs(mut self, variables: &[(&str, &str)]) -> Self {
        self.command.envs(variables.iter().copied());
        self
    }

    pub fn start(mut self) -> anyhow::Result<Running> {
        let stdout = self.dir.path().join("stdout");
        let stderr = self.dir.path().join("stderr");
        let child = self
            .command
            .stdout(fs::File::create(&stdout)?)
            .stderr(fs::File::create(&stderr)?)
            .spawn()?;
        Ok(Running {
            child,
            stdout,
            stderr,
            read: 0,
            _dir: self.dir,
        })
    }

    /// Runs the canary until it ends.
    pub fn run(self) -> anyhow::Result<Finished> {
        self.start()?.finish()
    }
}

/// A running canary. Dropping it kills the process, and prints its log if the test panics.
pub struct Running {
    pub child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Bytes of `stdout` that [`Running::read_to`] has read.
    read: usize,
    _dir: TempDir,
}

impl Running {
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    pub fn stdout(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.stdout)?)
    }

    /// The part of stdout that [`Running::read_to`] has read.
    pub fn stdout_read(&self) -> anyhow::Result<String> {
        let mut stdout = self.stdout()?;
        stdout.truncate(self.read);
        Ok(stdout)
    }

    pub fn stderr(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.stderr)?)
    }

    /// The log of a daemon: all whole lines of stderr, as JSON.
    pub fn log(&self) -> anyhow::Result<Vec<Value>> {
        let stderr = self.stderr()?;
        parse_log(&stderr[..stderr.rfind('\n').map_or(0, |end| end + 1)])
    }

    /// Waits for the next line of stdout that contains one of these texts, and returns it. Later calls begin after it.
    pub fn read_to(&mut self, texts: &[&str]) -> anyhow::Result<String> {
        let what = format!("{texts:?} in the output");
        let found = wait_for(&what, RUN_TIMEOUT, || {
            // Before the output is read: after the end no more can be written.
            let ended = self.has_ended()?;
            let stdout = self.stdout()?;
            let lines = stdout[self.read..].split_inclusive('\n');
            for line in lines.filter(|line| line.ends_with('\n')) {
                self.read += line.len();
                if texts.iter().any(|text| line.contains(text)) {
                    return Ok(Some(line.trim_end().to_owned()));
                }
            }
            ensure!(!ended, "the canary ended without {texts:?}");
            Ok(None)
        });
        found.with_context(|| self.stdout().unwrap_or_default())
    }

    /// Waits until the canary has ended.
    ///
    /// # Errors
    /// If the canary doesn't end, or if a credential is in its output.
    pub fn finish(mut self) -> anyhow::Result<Finished> {
        let waited = wait_for("livekit-canary to end", RUN_TIMEOUT, || {
            Ok(self.child.try_wait()?)
        });
        let (stdout, stderr) = (self.stdout()?, self.stderr()?);
        let status = waited.with_context(|| stderr.clone())?;
        for output in [&stdout, &stderr] {
            expect_no_secret(output)?;
        }
        rooms_in_doubt().extend(named_rooms(&stderr));
        Ok(Finished {
            code: status.code(),
            stdout,
            stderr,
        })
    }
}

impl Drop for Running {
    #[expect(clippy::print_stderr, reason = "the log of a failed test")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.stderr().unwrap_or_default());
        }
        // Both fail only if the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rooms of which a canary that has ended said that they may still exist: it had to end before an agent on its way to them
/// could connect.
pub fn rooms_in_doubt() -> MutexGuard<'static, BTreeSet<String>> {
    static ROOMS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    ROOMS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn named_rooms(stderr: &str) -> impl Iterator<Item = String> + '_ {
    let rooms = stderr.split("room ").skip(1);
    let rooms = rooms.filter_map(|rest| rest.split_once(" may still exist"));
    rooms.map(|(room, _)| room.to_owned())
}

/// # Errors
/// If the secret or a token is in `output`.
pub fn expect_no_secret(output: &str) -> anyhow::Result<()> {
    ensure!(!output.contains(SECRET), "the secret is in {output}");
    ensure!(!has_token(output), "a token is in {output}");
    Ok(())
}

/// Whether `text` contains the beginning of a JWT: base64 of `{"`, and at least 16 characters more. The random ids of a
/// server are shorter.
fn has_token(text: &str) -> bool {
    const MIN_LENGTH: usize = 16;
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let mut beginnings = text.split("eyJ").skip(1);
    beginnings.any(|rest| rest.bytes().take_while(base64).count() >= MIN_LENGTH)
}

fn parse_log(lines: &str) -> anyhow::Result<Vec<Value>> {
    let lines = lines.lines();
    lines
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

/// The result of a run.
#[derive(Debug)]
pub struct Finished {
    /// `None` if a signal ended the process.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// The batch that `once --format json` prints.
    pub fn batch(&self) -> anyhow::Result<Batch> {
        serde_json::from_str(&self.stdout).with_context(|| self.output())
    }

    /// The log of a daemon.
    pub fn log(&self) -> anyhow::Result<Vec<Value>> {
        parse_log(&self.stderr)
    }

    /// The exit status and all output, for the message of a failed test.
    pub fn output(&self) -> String {
        format!(
            "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.code, self.stdout, self.stderr
        )
    }

    /// # Errors
    /// If the exit status isn't `code`.
    pub fn expect_code(self, code: i32) -> anyhow::Result<Self> {
        if self.code != Some(code) {
            bail!("expected exit {code}: {}", self.output());
        }
        Ok(self)
    }
}
