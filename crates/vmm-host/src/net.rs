//! Reads network interfaces from `/sys/class/net`. [`tap`] makes and removes the program's own.

mod netlink;
pub mod tap;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vmm_core::backend::NetworkCounters;

/// The longest name of an interface, in bytes.
pub const MAX_INTERFACE_NAME: usize = 15;

/// The bit of a tun device's flags that makes it a TAP, which carries Ethernet frames.
const IFF_TAP: u32 = 0x0002;
/// The bit of a tun device that must be opened with several queues.
const IFF_MULTI_QUEUE: u32 = 0x0100;

/// Returns true if there is an interface with this name.
pub fn interface_exists(name: &str) -> bool {
    folder(Path::new(CLASS_NET), name).is_ok_and(|folder| folder.exists())
}

/// Returns true if the interface with this name is a TAP.
pub fn is_tap(name: &str) -> bool {
    is_tap_below(Path::new(CLASS_NET), name)
}

/// Returns true if the interface with this name is a tun device with several queues.
fn is_multi_queue(name: &str) -> bool {
    tun_flags(Path::new(CLASS_NET), name).is_some_and(|flags| flags & IFF_MULTI_QUEUE != 0)
}

/// Reads the counters of a TAP from the guest's point of view: the guest receives what the host
/// sends.
///
/// # Errors
/// Returns the kernel's error; `NotFound` where there is no such interface.
pub fn counters(name: &str) -> io::Result<NetworkCounters> {
    counters_below(Path::new(CLASS_NET), name)
}

const CLASS_NET: &str = "/sys/class/net";

fn is_tap_below(class: &Path, name: &str) -> bool {
    tun_flags(class, name).is_some_and(|flags| flags & IFF_TAP != 0)
}

/// Reads the flags of a tun device; `None` for every other kind of interface.
fn tun_flags(class: &Path, name: &str) -> Option<u32> {
    let flags = fs::read_to_string(folder(class, name).ok()?.join("tun_flags")).ok()?;
    u32::from_str_radix(flags.trim().strip_prefix("0x")?, 16).ok()
}

fn counters_below(class: &Path, name: &str) -> io::Result<NetworkCounters> {
    let statistics = folder(class, name)?.join("statistics");
    let read = |counter: &str| {
        let text = fs::read_to_string(statistics.join(counter))?;
        text.trim().parse::<u64>().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    };
    Ok(NetworkCounters {
        bytes_received: read("tx_bytes")?,
        bytes_transmitted: read("rx_bytes")?,
        packets_received: read("tx_packets")?,
        packets_transmitted: read("rx_packets")?,
    })
}

/// Returns the folder of an interface. Refuses a name that would lead to another folder.
fn folder(class: &Path, name: &str) -> io::Result<PathBuf> {
    if name.is_empty()
        || name.len() > MAX_INTERFACE_NAME
        || matches!(name, "." | "..")
        || name.contains(['/', '\0'])
    {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{name:?} is no interface name")));
    }
    Ok(class.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for `/sys/class/net` with one interface.
    fn class(flags: &str) -> tempfile::TempDir {
        let class = tempfile::tempdir().unwrap();
        let statistics = class.path().join("tap0/statistics");
        fs::create_dir_all(&statistics).unwrap();
        fs::write(class.path().join("tap0/tun_flags"), flags).unwrap();
        for (counter, value) in
            [("tx_bytes", "10"), ("rx_bytes", "20"), ("tx_packets", "1"), ("rx_packets", "2")]
        {
            fs::write(statistics.join(counter), format!("{value}\n")).unwrap();
        }
        class
    }

    #[test]
    fn bytes_sent_by_the_host_are_received_by_the_guest() {
        let class = class("0x1002\n");
        let counters = counters_below(class.path(), "tap0").unwrap();
        assert_eq!((counters.bytes_received, counters.bytes_transmitted), (10, 20));
        assert_eq!((counters.packets_received, counters.packets_transmitted), (1, 2));
    }

    #[test]
    fn a_tap_differs_from_a_tun() {
        assert!(is_tap_below(class("0x1002\n").path(), "tap0"));
        assert!(is_tap_below(class("0x5102\n").path(), "tap0"));
        assert!(!is_tap_below(class("0x1001\n").path(), "tap0"));
        assert!(!is_tap_below(class("").path(), "tap0"));
    }

    #[test]
    fn the_loopback_interface_exists_and_is_no_tap() {
        assert!(interface_exists("lo"));
        assert!(!is_tap("lo"));
        assert!(counters("lo").is_ok());
    }

    #[test]
    fn an_interface_name_cannot_contain_a_path() {
        for name in ["", ".", "..", "lo/..", "../net/lo", "a-name-too-long0"] {
            assert!(!interface_exists(name), "{name}");
            assert_eq!(counters(name).unwrap_err().kind(), io::ErrorKind::NotFound, "{name}");
        }
    }
}
