//! Tests that need nothing except Rust: they run the binary, call the library, and read the sources and the documentation.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod architecture;
mod command_line;
mod daemon;
mod dashboards;
mod demo;
mod docs;
mod drill;
mod forecast;
mod plain_english;
mod robustness;
mod rules;
mod sandbox;
mod settings;
mod sources;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use support::canary::{Canary, Finished};

/// Runs the canary in `folder` until it ends, with these arguments and only these variables. The variable ENGINE of the test
/// selects the engine with which `once` joins.
fn canary<A: AsRef<OsStr>>(
    folder: &Path,
    args: impl IntoIterator<Item = A>,
    variables: &[(&str, &str)],
) -> Finished {
    let mut args: Vec<_> = args
        .into_iter()
        .map(|arg| arg.as_ref().to_owned())
        .collect();
    let selects = args.iter().any(|arg| arg == "--engine" || arg == "--help");
    if let Some(engine) = std::env::var_os("ENGINE")
        && args.first().is_some_and(|command| command == "once")
        && !selects
    {
        args.extend(["--engine".into(), engine]);
    }
    let canary = Canary::new(args).current_dir(folder).envs(variables);
    canary.run().unwrap()
}

/// How many cases of a test run at the same time. They mostly wait.
const MAX_PARALLEL: usize = 8;

/// Runs all cases, some at the same time, and returns their results in any order.
fn in_parallel<T: Sync, R: Send>(cases: &[T], case: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = Mutex::new(cases.iter());
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..MAX_PARALLEL.min(cases.len()) {
            scope.spawn(|| {
                loop {
                    let Some(one) = next.lock().unwrap().next() else {
                        return;
                    };
                    let result = case(one);
                    results.lock().unwrap().push(result);
                }
            });
        }
    });
    results.into_inner().unwrap()
}
