//! Settings: read from a file, the environment and flags, validated once, and offered as plain types to every module.
//!
//! It knows no other module of this crate.

mod credential;
mod cron;
mod problem;
mod raw;
mod section;
mod settings;
mod validate;

/// The project of the environment's variables, if the settings have none.
const DEFAULT_PROJECT: &str = "default";

pub use problem::{Problem, Problems};
pub use raw::RawConfig;
pub use settings::*;
