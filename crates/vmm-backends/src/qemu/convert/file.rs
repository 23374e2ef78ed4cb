//! A configuration file of QEMU, as `-readconfig` reads it: the language in which a spare is told its VM.
//!
//! ```text
//!   [device "disk0"]            a group, and the id of one of it
//!    driver = "virtio-blk-pci"  its keys; what is nested gets a dotted name
//! ```
//!
//! The file has no word for a block node. It has `drive`, which makes one by the rules of old: it inherits, and it probes what
//! is not stated. So all nodes of a disk are stated within one another, in the JSON that a drive's file name can be, and what a
//! drive presumes of the topmost node is stated beside it. What comes of it differs from the command line by a name alone: the
//! backend between device and nodes is called after the disk, where there it has no name.
//!
//! QEMU reads the file line by line, without escapes: a value ends at the next quotation mark, a line at 1,023 bytes.

use std::error::Error;
use std::ffi::OsStr;
use std::io;

use serde::Serialize as _;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Value, json};

use super::PathNotUtf8;
use super::option::{DiskOption, Opt};

/// The most that QEMU reads as one line, its end included, in bytes.
const MAX_LINE: usize = 1023;
/// The group without which no QEMU of ours gets ready, because its serial port is one of these.
const NEEDED: &str = "chardev";

/// Why a VM cannot be told by a configuration file, though it can be by the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untellable {
    /// A path that the command line cannot carry either.
    #[error(transparent)]
    NotUtf8(#[from] PathNotUtf8),
    /// A value.
    #[error("QEMU's configuration file cannot carry the {key} of {of}: {why}")]
    Value {
        /// Whose value it is.
        of: String,
        /// Its name.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// Writes what a file can say of `options`. Whatever of it is cut off, QEMU does not get ready with what is left.
pub(super) fn write(options: &[Opt]) -> Result<String, Untellable> {
    let mut file = File::default();
    // The rest of a file that is cut off must be refused, so what is needed comes last.
    let (last, first): (Vec<&Opt>, Vec<&Opt>) =
        options.iter().partition(|option| matches!(option, Opt::Pairs { group, .. } if *group == NEEDED));
    for option in first.into_iter().chain(last) {
        match option {
            Opt::Ahead { .. } => {}
            Opt::Property { key, value, .. } => {
                file.begin("machine", None)?;
                file.setting(key, utf8(value, "machine", key)?)?;
            }
            Opt::Pairs { group, kind, pairs, .. } => {
                let id = pairs.iter().find(|(key, _)| *key == "id");
                file.begin(group, id.map(|(key, id)| utf8(id, group, key)).transpose()?)?;
                // The kind comes last, because without it nothing is made.
                for (key, value) in pairs.iter().filter(|(key, _)| *key != "id").chain(kind) {
                    file.setting(key, utf8(value, group, key)?)?;
                }
            }
            Opt::Json { group, value, .. } => file.object(group, value)?,
            Opt::Disk(disk) => write_disk(&mut file, disk)?,
        }
    }
    Ok(file.text)
}

/// A drive with everything below it, and its device.
fn write_disk(file: &mut File, disk: &DiskOption) -> Result<(), Untellable> {
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
    // A drive's own settings come before those of its file name, and it has defaults for these. That a disk which cannot be
    // written is opened all the same is one of them.
    let nodes = single_quoted(&top).map_err(|_| file.untellable("file", "it cannot be written as JSON"))?;
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
struct File {
    text: String,
    /// What is being told of.
    of: String,
}

impl File {
    fn begin(&mut self, group: &str, id: Option<&str>) -> Result<(), Untellable> {
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

    fn setting(&mut self, key: &str, value: &str) -> Result<(), Untellable> {
        self.sound(key, value)?;
        self.line(key, format!(" {key} = \"{value}\"\n"))
    }

    fn object(&mut self, group: &str, object: &Value) -> Result<(), Untellable> {
        self.begin(group, object.get("id").and_then(Value::as_str))?;
        self.settings("", object)
    }

    fn settings(&mut self, prefix: &str, object: &Value) -> Result<(), Untellable> {
        for (key, value) in object.as_object().into_iter().flatten() {
            let name = format!("{prefix}{key}");
            match value {
                Value::String(_) if name == "id" => {}
                Value::String(text) => self.setting(&name, text)?,
                Value::Bool(true) => self.setting(&name, "on")?,
                Value::Bool(false) => self.setting(&name, "off")?,
                Value::Number(number) => self.setting(&name, &number.to_string())?,
                Value::Object(_) => self.settings(&format!("{name}."), value)?,
                Value::Null | Value::Array(_) => return Err(self.untellable(&name, "it has no form there")),
            }
        }
        Ok(())
    }

    fn sound(&self, key: &str, value: &str) -> Result<(), Untellable> {
        if value.contains('"') {
            return Err(self.untellable(key, "it has a quotation mark"));
        }
        if value.chars().any(char::is_control) {
            return Err(self.untellable(key, "it has a control character"));
        }
        Ok(())
    }

    fn line(&mut self, key: &str, line: String) -> Result<(), Untellable> {
        if line.len() > MAX_LINE {
            return Err(self.untellable(key, "it is too long"));
        }
        self.text.push_str(&line);
        Ok(())
    }

    fn untellable(&self, key: &str, why: &'static str) -> Untellable {
        Untellable::Value { of: self.of.clone(), key: key.to_owned(), why }
    }
}

fn utf8<'a>(value: &'a OsStr, of: &str, key: &str) -> Result<&'a str, Untellable> {
    value.to_str().ok_or_else(|| Untellable::Value {
        of: of.to_owned(),
        key: key.to_owned(),
        why: "it is not UTF-8",
    })
}

/// Writes JSON without a quotation mark: QEMU takes strings in apostrophes as well.
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
