//! Tests that need nothing but this crate: they run the binary, and read the sources and the documentation.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

mod architecture;
mod command_line;
mod daemon;
mod dashboards;
mod demo;
mod docs;
mod drill;
mod forecast;
mod guard;
mod history;
mod http;
mod metrics;
mod robustness;
mod rules;
mod running;
mod sandbox;
mod settings;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a run of the binary left behind.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    /// Everything that was printed, for what must not be printed anywhere.
    fn output(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs the binary in `folder` with these arguments and with no variables but these. `once` joins with the engine that the
/// variable ENGINE names to these tests.
fn canary<A: AsRef<OsStr>>(
    folder: &Path,
    args: impl IntoIterator<Item = A>,
    variables: &[(&str, &str)],
) -> Run {
    let mut args: Vec<_> = args
        .into_iter()
        .map(|arg| arg.as_ref().to_owned())
        .collect();
    let chooses = args.iter().any(|arg| arg == "--engine" || arg == "--help");
    if let Some(engine) = std::env::var_os("ENGINE")
        && args.first().is_some_and(|command| command == "once")
        && !chooses
    {
        args.extend(["--engine".into(), engine]);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_livekit-canary"))
        .current_dir(folder)
        .args(args)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
