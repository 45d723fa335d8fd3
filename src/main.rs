//! The `livekit-canary` binary; everything of substance is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    livekit_canary::cli::main()
}
