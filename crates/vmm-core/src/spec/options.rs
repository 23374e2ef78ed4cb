//! The free maps: which keys there are, and how their values are read.
//!
//! A plain key means the same on every backend. A key with a backend's prefix (`qemu.`, `ch.`, `fc.`) concerns that backend
//! alone, which checks it; elsewhere it is a warning. Any other key is a violation: a typo is never dropped in silence.

use crate::config::Options;
use crate::report::Report;

/// Plain keys of `cpu.features`.
pub const CPU_KEYS: &[&str] = &[];
/// Plain keys of `memory.backing`.
pub const BACKING_KEYS: &[&str] = &["hugepages", "shared"];
/// Plain keys of `boot.boot_options`.
pub const BOOT_KEYS: &[&str] = &["firmware"];
/// Plain keys of a disk's `options`.
pub const DISK_KEYS: &[&str] = &[
    "format",
    "backing_files",
    "cache",
    "direct_io",
    "rate_limit.bytes_per_second",
    "rate_limit.operations_per_second",
];
/// Plain keys of a network interface's `options`.
pub const NIC_KEYS: &[&str] = &["rate_limit.bytes_per_second", "rate_limit.packets_per_second"];

/// Prefixes that tie a key to one backend.
const PREFIXES: &[&str] = &["qemu.", "ch.", "fc."];

/// Whom a key concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionScope<'a> {
    /// Every backend.
    Plain,
    /// One backend: its prefix with the dot, and the rest of the key.
    Backend(&'a str, &'a str),
}

/// Tells whom `key` concerns.
pub fn scope_of(key: &str) -> OptionScope<'_> {
    for prefix in PREFIXES {
        if let Some(rest) = key.strip_prefix(prefix) {
            return OptionScope::Backend(&key[..prefix.len()], rest);
        }
    }
    OptionScope::Plain
}

/// Reports plain keys of the map at `field` that are not among `known`.
pub(super) fn check_plain_keys(report: &mut Report, field: &str, options: &Options, known: &[&str]) {
    for key in options.keys() {
        if scope_of(key) == OptionScope::Plain && !known.contains(&key.as_str()) {
            let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
            report.reject(
                format!("{field}[\"{key}\"]"),
                format!("unknown key; known keys: {known}; keys of one backend begin with qemu., ch. or fc."),
            );
        }
    }
}

/// Reads a key that is `true` or `false`; absent is false.
///
/// # Errors
///
/// The message of a violation.
pub fn option_is_true(options: &Options, key: &str) -> Result<bool, String> {
    match options.get(key).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(format!("must be \"true\" or \"false\", not \"{other}\"")),
    }
}

/// Ceilings on the traffic of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes in a second.
    pub bytes_per_second: Option<u64>,
    /// Requests or packets in a second.
    pub operations_per_second: Option<u64>,
}

/// Reads the ceilings of one device, whose second one is called `operations_key`.
///
/// # Errors
///
/// The key at fault and the message of a violation.
pub fn rate_limit(
    options: &Options,
    operations_key: &'static str,
) -> Result<RateLimit, (&'static str, String)> {
    let read = |key: &'static str| match options.get(key) {
        None => Ok(None),
        Some(text) => match text.parse::<u64>() {
            Ok(number @ 1..=1_000_000_000_000) => Ok(Some(number)),
            Ok(_) | Err(_) => {
                Err((key, format!("must be a whole number from 1 to 1000000000000, not \"{text}\"")))
            }
        },
    };
    Ok(RateLimit {
        bytes_per_second: read("rate_limit.bytes_per_second")?,
        operations_per_second: read(operations_key)?,
    })
}
