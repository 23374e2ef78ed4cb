//! Sizes, ages and times for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The binary units, from the largest.
const UNITS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];

/// Returns a size with the largest unit that it fills, and one decimal digit if the size is no
/// multiple of it.
pub(crate) fn size(bytes: i64) -> String {
    let Ok(bytes) = u64::try_from(bytes) else { return format!("{bytes} B") };
    let Some((unit, name)) = UNITS.iter().find(|(unit, _)| bytes >= *unit) else {
        return format!("{bytes} B");
    };
    let (whole, rest) = (bytes / unit, bytes % unit);
    // The rest is less than 2^40, so ten times the rest fits.
    match rest * 10 / unit {
        0 => format!("{whole} {name}"),
        tenths => format!("{whole}.{tenths} {name}"),
    }
}

/// Returns the time since a Unix time in seconds, in its largest unit.
pub(crate) fn age(since: i64, now: SystemTime) -> String {
    let Ok(since) = u64::try_from(since) else { return "-".to_owned() };
    if since == 0 {
        return "-".to_owned();
    }
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    span(now.saturating_sub(since))
}

/// Returns a number of seconds in its largest unit.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Returns a Unix time in milliseconds as the API's logs write it, in UTC.
pub(crate) fn time(milliseconds: i64) -> String {
    let since = u64::try_from(milliseconds).unwrap_or_default();
    // The last second that the format can write; a larger number is a fault of the server.
    let bounded = since.min(253_402_300_799_000);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(bounded)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_printed_in_the_largest_fitting_unit() {
        for (bytes, wanted) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (512 << 20, "512 MiB"),
            (2 << 30, "2 GiB"),
            (1_610_612_736, "1.5 GiB"),
            (-1, "-1 B"),
            (i64::MAX, "8388607.9 TiB"),
        ] {
            assert_eq!(size(bytes), wanted);
        }
    }

    #[test]
    fn an_age_is_printed_in_one_unit() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (since, wanted) in
            [(999_999, "1s"), (999_000, "16m"), (900_000, "27h"), (1, "11d"), (0, "-"), (2_000_000, "0s")]
        {
            assert_eq!(age(since, now), wanted);
        }
    }

    #[test]
    fn times_are_printed_in_utc_for_every_number() {
        assert_eq!(time(1_795_323_329_384), "2026-11-22T04:55:29Z");
        assert_eq!(time(i64::MAX), "9999-12-31T23:59:59Z");
        assert_eq!(time(-5), "1970-01-01T00:00:00Z");
    }
}
