//! Passes the revision and the compiler version to the library, for the metric `build_info`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-env-changed=LIVEKIT_CANARY_REVISION");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    // An image is built without the Git repository, so its build sets this variable.
    let revision = std::env::var("LIVEKIT_CANARY_REVISION").ok();
    let revision = revision
        .filter(|revision| !revision.is_empty())
        .or_else(|| {
            first_word_of(
                &mut Command::new("git"),
                &["rev-parse", "--short=12", "HEAD"],
                0,
            )
        });
    let rustc = first_word_of(&mut Command::new(rustc), &["--version"], 1);
    let unknown = || "unknown".to_owned();
    println!(
        "cargo::rustc-env=BUILD_REVISION={}",
        revision.unwrap_or_else(unknown)
    );
    println!(
        "cargo::rustc-env=BUILD_RUSTC={}",
        rustc.unwrap_or_else(unknown)
    );
}

fn first_word_of(command: &mut Command, arguments: &[&str], index: usize) -> Option<String> {
    let output = command.args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output
        .status
        .success()
        .then(|| text.split_whitespace().nth(index).map(str::to_owned))?
}
