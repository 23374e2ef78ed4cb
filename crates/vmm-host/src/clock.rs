//! The wall clock, as records and events use it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the time now, in Unix milliseconds. A clock before 1970 reads as 0.
pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
