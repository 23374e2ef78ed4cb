//! The wall clock for records and events.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the present time in Unix milliseconds. A clock before 1970 reads as 0.
pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
