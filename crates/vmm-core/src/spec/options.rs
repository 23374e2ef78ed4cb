//! The keys of the free maps, and the reading of their values.
//!
//! A plain key means the same on every backend. [`VmSpec::parse`](super::VmSpec::parse) reads its
//! value into a field, so that no other code reads the text. A key with a backend's prefix
//! (`qemu.`, `ch.`, `fc.`) concerns that backend alone, which reads the value from
//! [`BackendOptions`]; every other backend warns of the key. Any other key is a violation, because
//! a misspelt key must not be ignored silently.

use super::RateLimit;
use crate::config::{Options, VmConfig};
use crate::report::CheckReport;

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

/// The map that a key of one backend stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeMap {
    /// `cpu.features`.
    Cpu,
    /// `memory.backing`.
    Memory,
    /// `boot.boot_options`.
    Boot,
    /// `options` of the disk with this index in the configuration.
    Disk(usize),
    /// `options` of the network interface with this index in the configuration.
    Nic(usize),
}

impl FreeMap {
    /// Returns the path of the map from the request's root.
    fn field(self) -> String {
        match self {
            Self::Cpu => "config.cpu.features".to_owned(),
            Self::Memory => "config.memory.backing".to_owned(),
            Self::Boot => "config.boot.boot_options".to_owned(),
            Self::Disk(index) => format!("config.storage[{index}].options"),
            Self::Nic(index) => format!("config.network[{index}].options"),
        }
    }
}

/// One key that concerns one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendOption {
    /// The map that holds the key.
    pub map: FreeMap,
    /// The key with the backend's prefix.
    pub key: String,
    /// The value as sent. Only the backend that the prefix names knows its form.
    pub value: String,
}

impl BackendOption {
    /// Returns the path of the value from the request's root.
    pub fn field(&self) -> String {
        format!("{}[\"{}\"]", self.map.field(), self.key)
    }
}

/// All keys that concern one backend each, in the order of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackendOptions(Vec<BackendOption>);

impl BackendOptions {
    /// Collects the keys with a backend's prefix from every map of `config`.
    pub(super) fn of(config: &VmConfig) -> Self {
        let VmConfig { cpu, memory, boot, storage, network, .. } = config;
        let one = |map| move |options| (map, options);
        let maps = cpu.iter().map(|cpu| &cpu.features).map(one(FreeMap::Cpu));
        let maps = maps.chain(memory.iter().map(|memory| &memory.backing).map(one(FreeMap::Memory)));
        let maps = maps.chain(boot.iter().map(|boot| &boot.boot_options).map(one(FreeMap::Boot)));
        let disks = storage.iter().enumerate().map(|(index, disk)| (FreeMap::Disk(index), &disk.options));
        let nics = network.iter().enumerate().map(|(index, nic)| (FreeMap::Nic(index), &nic.options));
        let keys = maps.chain(disks).chain(nics).flat_map(|(map, options)| {
            options
                .iter()
                .filter(|(key, _)| prefix_of(key).is_some())
                .map(move |(key, value)| BackendOption { map, key: key.clone(), value: value.clone() })
        });
        Self(keys.collect())
    }

    /// Returns the keys of the backend whose keys begin with `prefix`, and warns of every other
    /// key.
    pub fn own<'a>(&'a self, prefix: &str, report: &mut CheckReport) -> Vec<&'a BackendOption> {
        let (own, others): (Vec<_>, Vec<_>) =
            self.0.iter().partition(|option| prefix_of(&option.key) == Some(prefix));
        for option in others {
            report.ignore(option.field(), "is not used: it concerns another backend");
        }
        own
    }
}

/// Returns the backend's prefix of `key`, with its dot.
pub fn prefix_of(key: &str) -> Option<&'static str> {
    PREFIXES.iter().find(|prefix| key.starts_with(**prefix)).copied()
}

/// Reports plain keys of the map at `field` that are not among `known`.
pub(super) fn check_plain_keys(report: &mut CheckReport, field: &str, options: &Options, known: &[&str]) {
    for key in options.keys() {
        if prefix_of(key).is_none() && !known.contains(&key.as_str()) {
            let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
            report.reject(
                format!("{field}[\"{key}\"]"),
                format!("unknown key; known keys: {known}; keys of one backend begin with qemu., ch. or fc."),
            );
        }
    }
}

/// Reads a key that is `true` or `false`. Returns false for a missing key and for a value that is
/// reported.
pub(super) fn flag(report: &mut CheckReport, field: &str, options: &Options, key: &str) -> bool {
    match options.get(key).map(String::as_str) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            report.reject(
                format!("{field}[\"{key}\"]"),
                format!("must be \"true\" or \"false\", not \"{other}\""),
            );
            false
        }
    }
}

/// Reads the ceilings of one device. `operations_key` is the key of the second ceiling. A value
/// that is reported sets no ceiling.
pub(super) fn limits(
    report: &mut CheckReport,
    field: &str,
    options: &Options,
    operations_key: &str,
) -> RateLimit {
    let mut read = |key: &str| {
        let text = options.get(key)?;
        match text.parse::<u64>() {
            Ok(number @ 1..=1_000_000_000_000) => Some(number),
            Ok(_) | Err(_) => {
                report.reject(
                    format!("{field}[\"{key}\"]"),
                    format!("must be a whole number from 1 to 1000000000000, not \"{text}\""),
                );
                None
            }
        }
    };
    RateLimit {
        bytes_per_second: read("rate_limit.bytes_per_second"),
        operations_per_second: read(operations_key),
    }
}
