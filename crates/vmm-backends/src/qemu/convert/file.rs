//! Writes a configuration file of QEMU for `-readconfig`, by which a spare receives its VM.
//!
//! ```text
//!   [device "disk0"]            a group, and the id of its member
//!    driver = "virtio-blk-pci"  its keys; nested keys get a dotted name
//! ```
//!
//! The file has no form for a block node. Its `drive` creates one by old rules: a drive inherits
//! settings, and it detects the format unless one is given. Therefore all nodes of a disk are
//! nested in the JSON text that a drive's file name may be, and the defaults of a drive for the
//! topmost node are overridden beside it. The result differs from the command line in one name: the
//! backend between device and nodes is named after the disk here and has no name there.
//!
//! QEMU reads the file line by line, without escapes. A value ends at the next quotation mark, and
//! a line at 1,023 bytes.

use std::error::Error;
use std::ffi::OsStr;
use std::io;

use serde::Serialize as _;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Value, json};

use super::PathNotUtf8;
use super::option::{DiskOption, QemuOption};

/// The longest line that QEMU reads, with its end, in bytes.
const MAX_LINE: usize = 1023;
/// The group without which QEMU does not start, because its serial port needs one of these.
const NEEDED: &str = "chardev";

/// The reason for which a configuration file cannot express a VM that the command line can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InexpressibleVm {
    /// A path that the command line cannot carry either.
    #[error(transparent)]
    NotUtf8(#[from] PathNotUtf8),
    /// A value that the file cannot express.
    #[error("QEMU's configuration file cannot carry the {key} of {of}: {why}")]
    Value {
        /// The group and the id of the value.
        of: String,
        /// The key of the value.
        key: String,
        /// The reason.
        why: &'static str,
    },
}

/// Writes the options that a file can express. If QEMU reads only the beginning of the file, it
/// refuses to start.
pub(super) fn write(options: &[QemuOption]) -> Result<String, InexpressibleVm> {
    let mut file = ConfigFile::default();
    // A file that is cut off must be refused, so the part that QEMU needs comes last.
    let (last, first): (Vec<&QemuOption>, Vec<&QemuOption>) = options
        .iter()
        .partition(|option| matches!(option, QemuOption::Pairs { group, .. } if *group == NEEDED));
    for option in first.into_iter().chain(last) {
        match option {
            QemuOption::Ahead { .. } => {}
            QemuOption::Property { key, value, .. } => {
                file.begin("machine", None)?;
                file.setting(key, utf8(value, "machine", key)?)?;
            }
            QemuOption::Pairs { group, kind, pairs, .. } => {
                let id = pairs.iter().find(|(key, _)| *key == "id");
                file.begin(group, id.map(|(key, id)| utf8(id, group, key)).transpose()?)?;
                // The kind comes last, because QEMU creates nothing without it.
                for (key, value) in pairs.iter().filter(|(key, _)| *key != "id").chain(kind) {
                    file.setting(key, utf8(value, group, key)?)?;
                }
            }
            QemuOption::Json { group, value, .. } => file.object(group, value)?,
            QemuOption::Disk(disk) => write_disk(&mut file, disk)?,
        }
    }
    Ok(file.text)
}

/// Writes a drive with all nodes below it, and its device.
fn write_disk(file: &mut ConfigFile, disk: &DiskOption) -> Result<(), InexpressibleVm> {
    if let Some(limit) = &disk.limit {
        file.object("object", limit)?;
    }
    let mut upwards = disk.nodes.iter().cloned();
    let mut top = upwards.next().unwrap_or_default();
    for mut node in upwards {
        node["file"] = top;
        top = node;
    }
    let backend = format!("{}-drive", top["node-name"].as_str().unwrap_or_default());
    // A drive's own settings precede those in its file name, and have defaults. One of the defaults
    // opens a disk read-only if it cannot be written.
    let nodes =
        single_quoted(&top).map_err(|_| file.inexpressible("file", "it cannot be written as JSON"))?;
    let drive = json!({
        "id": backend, "if": "none", "auto-read-only": false,
        "read-only": top.get("read-only").cloned().unwrap_or(false.into()),
        "discard": top.get("discard").cloned().unwrap_or("ignore".into()),
        "cache": top.get("cache").cloned().unwrap_or(json!({ "direct": false, "no-flush": false })),
        "file": format!("json:{nodes}"),
    });
    file.object("drive", &drive)?;
    let mut device = disk.device.clone();
    device["drive"] = backend.into();
    file.object("device", &device)
}

#[derive(Default)]
struct ConfigFile {
    text: String,
    /// The group and the id of the present option, for errors.
    of: String,
}

impl ConfigFile {
    fn begin(&mut self, group: &str, id: Option<&str>) -> Result<(), InexpressibleVm> {
        self.of = group.to_owned();
        match id {
            Some(id) => {
                self.sound("id", id)?;
                self.of = format!("{group} {id}");
                self.line("id", format!("[{group} \"{id}\"]\n"))
            }
            None => self.line("name", format!("[{group}]\n")),
        }
    }

    fn setting(&mut self, key: &str, value: &str) -> Result<(), InexpressibleVm> {
        self.sound(key, value)?;
        self.line(key, format!(" {key} = \"{value}\"\n"))
    }

    fn object(&mut self, group: &str, object: &Value) -> Result<(), InexpressibleVm> {
        self.begin(group, object.get("id").and_then(Value::as_str))?;
        self.settings("", object)
    }

    fn settings(&mut self, prefix: &str, object: &Value) -> Result<(), InexpressibleVm> {
        for (key, value) in object.as_object().into_iter().flatten() {
            let name = format!("{prefix}{key}");
            match value {
                Value::String(_) if name == "id" => {}
                Value::String(text) => self.setting(&name, text)?,
                Value::Bool(true) => self.setting(&name, "on")?,
                Value::Bool(false) => self.setting(&name, "off")?,
                Value::Number(number) => self.setting(&name, &number.to_string())?,
                Value::Object(_) => self.settings(&format!("{name}."), value)?,
                Value::Null | Value::Array(_) => {
                    return Err(self.inexpressible(&name, "it has no form there"));
                }
            }
        }
        Ok(())
    }

    fn sound(&self, key: &str, value: &str) -> Result<(), InexpressibleVm> {
        if value.contains('"') {
            return Err(self.inexpressible(key, "it has a quotation mark"));
        }
        if value.chars().any(char::is_control) {
            return Err(self.inexpressible(key, "it has a control character"));
        }
        Ok(())
    }

    fn line(&mut self, key: &str, line: String) -> Result<(), InexpressibleVm> {
        if line.len() > MAX_LINE {
            return Err(self.inexpressible(key, "it is too long"));
        }
        self.text.push_str(&line);
        Ok(())
    }

    fn inexpressible(&self, key: &str, why: &'static str) -> InexpressibleVm {
        InexpressibleVm::Value { of: self.of.clone(), key: key.to_owned(), why }
    }
}

fn utf8<'a>(value: &'a OsStr, of: &str, key: &str) -> Result<&'a str, InexpressibleVm> {
    value.to_str().ok_or_else(|| InexpressibleVm::Value {
        of: of.to_owned(),
        key: key.to_owned(),
        why: "it is not UTF-8",
    })
}

/// Writes JSON without a quotation mark, because QEMU accepts strings in apostrophes as well.
fn single_quoted(value: &Value) -> Result<String, Box<dyn Error>> {
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, Apostrophes))?;
    Ok(String::from_utf8(text)?)
}

struct Apostrophes;

impl Formatter for Apostrophes {
    fn begin_string<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"'")
    }

    fn end_string<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"'")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        writer.write_all(fragment.replace('\'', "\\u0027").as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\u0022"),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04x}"),
        }
    }
}
