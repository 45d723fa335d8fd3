//! Settings: read from a file, the environment and flags, validated once, and offered as plain types to every module.
//!
//! It knows no other module of this crate, except the audio files that the settings name.

mod caller;
mod credential;
mod cron;
mod file;
mod notify;
mod problem;
mod raw;
mod section;
mod settings;
mod validate;

pub(crate) use file::{MAX_CA_BYTES, MAX_FILE_BYTES, read_regular, read_regular_text};
/// The project of the environment's variables, if the settings have none.
const DEFAULT_PROJECT: &str = "default";

pub use problem::{Problem, Problems};
pub use raw::RawConfig;
pub use settings::*;
