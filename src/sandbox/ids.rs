//! Ids and timestamps in LiveKit's form.

use std::time::{SystemTime, UNIX_EPOCH};

/// An id in LiveKit's form: a prefix and twelve random letters and digits.
pub(crate) fn guid(prefix: &str) -> String {
    let random = std::iter::repeat_with(fastrand::alphanumeric).take(12);
    prefix.chars().chain(random).collect()
}

pub(crate) fn unix_millis() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}
