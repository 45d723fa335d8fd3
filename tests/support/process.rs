//! Programs that a test starts, and the ports that they listen on.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, setpriority_process};

use crate::network::Namespace;
use crate::wait_for;

/// A process in a process group of its own, with a log of all that it prints. Dropping it kills the group.
pub struct Process {
    pub name: String,
    pub child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its log in `dir`.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;

        let log = dir.join(format!("{name}.log"));
        let file = fs::File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Signals the process, but not the processes that it started.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub fn log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }

    /// Waits until `text` is in the log.
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let what = format!("{text:?} in the log of {}", self.name);
        wait_for(&what, limit, || {
            self.expect_running()?;
            Ok(self.log()?.contains(text).then_some(()))
        })
    }

    /// Waits until the process has ended.
    pub fn finish(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(&what, limit, || Ok(self.child.try_wait()?))
    }

    pub fn expect_running(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}\n{}", self.name, self.log()?),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if every process of the group has ended.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A command that ends with the thread that started it, so that a killed test run leaves no server behind.
pub fn command(program: &str) -> Command {
    command_in(None, program)
}

/// Such a command in a network namespace.
pub(crate) fn command_in(namespace: Option<&Namespace>, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if let Some(namespace) = namespace {
        command.args(["ip", "netns", "exec", namespace.name()]);
    }
    command.arg(program);
    command
}

/// The priority of everything that carries media on the real stack. What starts an interpreter has the usual one: otherwise it
/// takes the CPU time for which the audio of a call can't wait, and agents hear only parts of what the caller says.
pub(crate) const MEDIA_NICENESS: i32 = -10;

/// Gives that priority to this process, and so to all that it starts. It needs root.
pub fn prioritise_media() -> anyhow::Result<()> {
    setpriority_process(None, MEDIA_NICENESS).context("can't raise the priority")
}

/// A command with the usual priority, from a process that carries media.
pub(crate) fn background_in(namespace: Option<&Namespace>, program: &str) -> Command {
    let mut command = command_in(namespace, "nice");
    command.args(["-n", &(-MEDIA_NICENESS).to_string(), program]);
    command
}

/// Kills a process by its id.
pub fn kill(pid: f64) -> anyhow::Result<()> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a process id is an integer"
    )]
    let pid = Pid::from_raw(pid as i32).context("not a process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// The path of a program of the real stack, by the name under which `setup.sh` prints it. The script runs once per process.
pub fn program(name: &str) -> anyhow::Result<String> {
    static SETUP: OnceLock<String> = OnceLock::new();
    if SETUP.get().is_none() {
        let output = Command::new(source("setup.sh"))
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "setup.sh: {}", output.status);
        SETUP.get_or_init(|| String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let programs = SETUP.get().context("set above")?;
    let program = programs
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    program
        .map(str::to_owned)
        .with_context(|| format!("setup.sh names no {name}"))
}

/// The path of a file in `tests/real`.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../real")
        .join(name)
}

/// The first of three free ports in a row: API, media over TCP, media over UDP.
pub fn free_ports() -> anyhow::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(17_500);
    for _ in 0..100 {
        let port = NEXT.fetch_add(3, Ordering::Relaxed);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            && TcpListener::bind((Ipv4Addr::UNSPECIFIED, port + 1)).is_ok()
            && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port + 2)).is_ok();
        if free {
            return Ok(port);
        }
    }
    bail!("no three free ports in a row above 17500");
}
