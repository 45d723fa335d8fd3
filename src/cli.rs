//! Commands, flags and exit codes; data on stdout, all else on stderr.
//!
//! It knows no WebRTC.

use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    todo!("cli")
}
