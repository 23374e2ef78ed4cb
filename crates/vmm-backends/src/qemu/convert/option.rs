//! QEMU's options before they are written in one of two languages: the command line, or a
//! configuration file.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde_json::Value;

/// One option.
#[derive(Clone, Debug)]
pub(super) enum QemuOption {
    /// An option that a spare is started with. It has no form in a file.
    Ahead {
        /// The option's name on the command line.
        flag: &'static str,
        /// The value on the command line.
        value: Option<OsString>,
    },
    /// A property of the machine with an option of its own, whose value is not parsed.
    Property {
        /// The option's name on the command line.
        flag: &'static str,
        /// The property's name.
        key: &'static str,
        /// The property's value.
        value: OsString,
    },
    /// Keys with values. A key `id` is the option's name.
    Pairs {
        /// The option's name on the command line.
        flag: &'static str,
        /// The name of the option's group in QEMU's configuration file.
        group: &'static str,
        /// The pair whose key the command line leaves out.
        kind: Option<(&'static str, OsString)>,
        /// The other pairs.
        pairs: Vec<(&'static str, OsString)>,
    },
    /// A device or an object, in JSON. A key `id` is its name.
    Json {
        /// The option's name on the command line.
        flag: &'static str,
        /// The name of the option's group in QEMU's configuration file.
        group: &'static str,
        /// The device or the object.
        value: Value,
    },
    /// A disk.
    Disk(DiskOption),
}

/// A disk: its block nodes, and the device that the guest sees.
#[derive(Clone, Debug)]
pub(super) struct DiskOption {
    /// The block nodes, the image's first. Each omits the reference to the node below it.
    pub(super) nodes: Vec<Value>,
    /// The throttle group that the last node needs, if it needs one.
    pub(super) limit: Option<Value>,
    /// The device, without its `drive`.
    pub(super) device: Value,
}

impl QemuOption {
    /// Returns an option that a spare is started with.
    pub(super) fn ahead(flag: &'static str, value: impl Into<OsString>) -> Self {
        Self::Ahead { flag, value: Some(value.into()) }
    }

    /// Returns a device.
    pub(super) const fn device(value: Value) -> Self {
        Self::Json { flag: "-device", group: "device", value }
    }

    /// Returns an object.
    pub(super) const fn object(value: Value) -> Self {
        Self::Json { flag: "-object", group: "object", value }
    }

    /// Appends the option's words on the command line.
    pub(super) fn write_words(&self, words: &mut Vec<OsString>) {
        match self {
            Self::Ahead { flag, value } => {
                words.push(flag.into());
                words.extend(value.clone());
            }
            Self::Property { flag, value, .. } => words.extend([flag.into(), value.clone()]),
            Self::Pairs { flag, kind, pairs, .. } => {
                words.extend([flag.into(), joined(kind.as_ref(), pairs)])
            }
            Self::Json { flag, value, .. } => words.extend([flag.into(), value.to_string().into()]),
            Self::Disk(disk) => disk.write_words(words),
        }
    }
}

impl DiskOption {
    /// Appends the block nodes, each of which names the node below it, and the device.
    fn write_words(&self, words: &mut Vec<OsString>) {
        let mut below = None;
        let top = self.nodes.len().saturating_sub(1);
        for (index, node) in self.nodes.iter().enumerate() {
            if index == top
                && let Some(limit) = &self.limit
            {
                words.extend(["-object".into(), limit.to_string().into()]);
            }
            let mut node = node.clone();
            if let Some(below) = below.replace(node["node-name"].clone()) {
                node["file"] = below;
            }
            words.extend(["-blockdev".into(), node.to_string().into()]);
        }
        let mut device = self.device.clone();
        device["drive"] = below.unwrap_or_default();
        words.extend(["-device".into(), device.to_string().into()]);
    }
}

/// Returns the pairs in the form of the command line.
pub(super) fn joined(
    kind: Option<&(&'static str, OsString)>,
    pairs: &[(&'static str, OsString)],
) -> OsString {
    let mut text = OsString::new();
    if let Some((_, value)) = kind {
        text.push(escaped(value));
    }
    for (key, value) in pairs {
        if !text.is_empty() {
            text.push(",");
        }
        text.push(key);
        text.push("=");
        text.push(escaped(value));
    }
    text
}

/// Returns `text` with each comma doubled, as QEMU's option syntax requires.
fn escaped(text: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    for byte in text.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}
