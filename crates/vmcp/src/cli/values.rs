//! Values of arguments: states, sizes, times, pairs, disks, network interfaces.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap_complete::engine::ArgValueCompleter;
use vmm_proto::v1 as pb;

use super::console::EscapeKey;
use crate::commands::completion::names;
use crate::output::words;

/// The names of the backends, for errors and completion.
const BACKENDS: [&str; 3] = ["cloudhypervisor", "firecracker", "qemu"];
/// The smallest memory of a VM, in bytes. A smaller size is a number without its unit.
const SMALLEST_MEMORY: i64 = 1 << 20;
/// The longest time that the API takes, in seconds.
const LONGEST_SECONDS: u64 = 3_600;
/// The states of a VM.
const STATES: [pb::VmState; 4] =
    [pb::VmState::Created, pb::VmState::Running, pb::VmState::Paused, pb::VmState::Shutdown];
/// The restart modes, by the words that are typed.
const RESTARTS: [(&str, pb::RestartMode); 4] = [
    ("never", pb::RestartMode::Never),
    ("guest-reboot", pb::RestartMode::GuestReboot),
    ("on-failure", pb::RestartMode::OnFailure),
    ("always", pb::RestartMode::Always),
];

/// Makes an argument complete the names of VMs.
pub(super) fn name_argument() -> ArgValueCompleter {
    ArgValueCompleter::new(names)
}

/// Parses a state by its name.
pub(super) fn state() -> impl TypedValueParser<Value = pb::VmState> {
    let names = STATES.map(words::name);
    PossibleValuesParser::new(names).map(|typed| {
        // The parser has refused every other word.
        STATES.into_iter().find(|state| words::name(*state) == typed).unwrap_or_default()
    })
}

/// Parses a restart mode by its name.
pub(super) fn restart() -> impl TypedValueParser<Value = pb::RestartMode> {
    PossibleValuesParser::new(RESTARTS.map(|(name, _)| name)).map(|typed| {
        // The parser has refused every other word.
        RESTARTS.into_iter().find(|(name, _)| *name == typed).map(|(_, mode)| mode).unwrap_or_default()
    })
}

/// Parses an escape key: a letter, `^]` for a control key, or `none`.
pub(super) fn escape_key(text: &str) -> Result<EscapeKey, String> {
    match *text.as_bytes() {
        _ if text == "none" => Ok(EscapeKey(None)),
        [key] if key.is_ascii_graphic() => Ok(EscapeKey(Some(key))),
        [b'^', key @ b'@'..=b'_'] => Ok(EscapeKey(Some(key & 0x1f))),
        [b'^', key @ b'a'..=b'z'] => Ok(EscapeKey(Some(key & 0x1f))),
        _ => Err("write one character, a control key as ^], or none".to_owned()),
    }
}

impl fmt::Display for EscapeKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) if key < b' ' => write!(out, "^{}", char::from(key | 0x40)),
            Some(key) => write!(out, "{}", char::from(key)),
            None => out.write_str("none"),
        }
    }
}

/// Parses the name of a backend.
pub(super) fn backend() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(BACKENDS)
}

/// Parses the memory of a VM in bytes: a number, with a unit if it is not bytes.
///
/// # Errors
///
/// The text is no size, or the size is below 1 MiB or above the range of the API.
pub(super) fn memory(text: &str) -> Result<i64, String> {
    let size = parse_size::Config::new().with_binary().parse_size(text);
    let size = size.map_err(|error| format!("{error}; write a size as 512MiB or 2GiB"))?;
    let size = i64::try_from(size).map_err(|_| "is more than the API can carry".to_owned())?;
    if size >= SMALLEST_MEMORY {
        return Ok(size);
    }
    let example = match text.parse::<u64>() {
        Ok(number) if number > 0 => format!("{number}MiB"),
        _ => "512MiB".to_owned(),
    };
    Err(format!("{text} is {size} bytes; write {example}"))
}

/// Parses a time, as `90s` or `1h 30m`. A bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; write a time as 90s or 5m"))
}

/// Parses a time that the API takes in seconds.
pub(super) fn seconds(text: &str) -> Result<i32, String> {
    let time = duration(text)?;
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    match i32::try_from(seconds) {
        // The API reads 0 as its default of 30 seconds, which a user who types 0 does not mean.
        Ok(0) => Err("is no time; --force asks nobody".to_owned()),
        Ok(fitting) if seconds <= LONGEST_SECONDS => Ok(fitting),
        _ => Err("is more than an hour".to_owned()),
    }
}

/// A key and a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { key: key.into(), value: value.into() }),
            _ => Err("is not KEY=VALUE".to_owned()),
        }
    }
}

/// A disk, as `--disk` describes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Disk(pub(crate) pb::StorageDevice);

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let path = words.next().unwrap_or_default();
        if path.is_empty() || (!path.starts_with('/') && path.contains('=')) {
            return Err("does not begin with the path of a file or block device".to_owned());
        }
        let mut disk = pb::StorageDevice { path: path.to_owned(), ..Default::default() };
        for word in words {
            match word.split_once('=') {
                None if word == "root" => disk.is_root_device = true,
                None if word == "ro" => disk.read_only = true,
                Some(("id", id)) => disk.id = id.to_owned(),
                Some(("interface", kind)) => disk.interface_type = kind.to_owned(),
                Some((key, value)) if !key.is_empty() => {
                    disk.options.insert(key.to_owned(), value.to_owned());
                }
                _ => {
                    return Err(format!(
                        "has \"{word}\", which is none of root, ro, id=ID, interface=TYPE, KEY=VALUE"
                    ));
                }
            }
        }
        Ok(Self(disk))
    }
}

/// A network interface, as `--net` describes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Nic(pub(crate) pb::NetworkInterface);

impl FromStr for Nic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut nic = pb::NetworkInterface::default();
        if text == "auto" {
            return Ok(Self(nic));
        }
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("tap", name)) => nic.tap_device = name.to_owned(),
                Some(("mac", address)) => nic.mac_address = address.to_owned(),
                Some(("id", id)) => nic.id = id.to_owned(),
                Some(("interface", kind)) => nic.interface_type = kind.to_owned(),
                _ => {
                    return Err(format!(
                        "has \"{word}\", which is none of auto, tap=NAME, mac=ADDRESS, id=ID, interface=TYPE"
                    ));
                }
            }
        }
        Ok(Self(nic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_with_each_spelling_of_the_unit() {
        for (text, wanted) in [
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("2GiB", 2_i64 << 30),
            ("2G", 2_i64 << 30),
            ("1.5 GiB", 1_610_612_736),
        ] {
            assert_eq!(memory(text), Ok(wanted), "{text}");
        }
        for text in ["", "many", "-1", "9EiB"] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_without_a_unit_is_refused_with_advice() {
        assert_eq!(memory("512"), Err("512 is 512 bytes; write 512MiB".to_owned()));
        assert_eq!(memory("1KiB"), Err("1KiB is 1024 bytes; write 512MiB".to_owned()));
        assert_eq!(memory("0"), Err("0 is 0 bytes; write 512MiB".to_owned()));
        assert_eq!(memory("1MiB"), Ok(1 << 20));
    }

    #[test]
    fn timeouts_are_whole_seconds_up_to_an_hour() {
        assert_eq!(seconds("90"), Ok(90));
        assert_eq!(seconds("1m 30s"), Ok(90));
        assert_eq!(seconds("1ms"), Ok(1));
        assert_eq!(seconds("1h"), Ok(3600));
        for text in ["0", "61m", "soon", "-5s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_has_a_path_and_options() {
        let Disk(disk) = "/srv/a.qcow2,root,ro,id=boot,format=qcow2".parse().unwrap();
        assert_eq!((disk.path.as_str(), disk.id.as_str()), ("/srv/a.qcow2", "boot"));
        assert!(disk.is_root_device && disk.read_only);
        assert_eq!(disk.options["format"], "qcow2");
        for text in ["", "path=/a", "/a,rw", "/a,=x", "/a,"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_interface_has_a_generated_or_a_given_tap() {
        assert_eq!("auto".parse::<Nic>().unwrap().0, pb::NetworkInterface::default());
        let Nic(nic) = "tap=tap0,mac=02:00:00:00:00:01,id=a".parse().unwrap();
        assert_eq!((nic.tap_device.as_str(), nic.id.as_str()), ("tap0", "a"));
        assert!("bridge=br0".parse::<Nic>().is_err());
        assert!("".parse::<Nic>().is_err());
    }

    #[test]
    fn a_pair_has_a_key_and_a_free_value() {
        let pair: Pair = "a=b=c".parse().unwrap();
        assert_eq!((pair.key.as_str(), pair.value.as_str()), ("a", "b=c"));
        assert!("a=".parse::<Pair>().is_ok());
        assert!("=b".parse::<Pair>().is_err() && "a".parse::<Pair>().is_err());
    }

    #[test]
    fn an_escape_key_is_a_character_a_control_key_or_none() {
        for (text, key, shown) in
            [("~", Some(b'~'), "~"), ("^]", Some(0x1d), "^]"), ("^a", Some(1), "^A"), ("none", None, "none")]
        {
            let parsed = escape_key(text).unwrap();
            assert_eq!((parsed.0, parsed.to_string().as_str()), (key, shown), "{text}");
        }
        for text in ["", "ab", "^1", "ü", " "] {
            assert!(escape_key(text).is_err(), "{text:?}");
        }
    }
}
