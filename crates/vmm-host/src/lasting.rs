//! Finds out that the runtime folder may vanish while VMMs still need their sockets in it.
//!
//! ```text
//!   beforehand   dangers()       a private /tmp, a user's session, a cleaner of temporary files
//!   afterwards   lost_sockets()  a socket that is on record and is not there any more
//! ```
//!
//! A VMM goes on without the name of its socket, and no other process can connect to it then.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use crate::accounts;

/// The remedy for a runtime folder that vanishes.
pub const REMEDY: &str = "let the runtime folder outlive the daemon: RuntimeDirectoryPreserve=yes and PrivateTmp=no in the \
                          daemon's systemd unit, no cleaner of temporary files in it, `loginctl enable-linger` for a folder of \
                          a user's session; or name a folder that lasts with UNKEY_VMCP_RUNTIME_DIR";

/// The folders that a cleaner of temporary files empties by age.
const CLEANED: [&str; 2] = ["/tmp", "/var/tmp"];
/// The folder that systemd makes if it runs the host.
const SYSTEMD: &str = "/run/systemd/system";
/// The folder with a file for each user whose session lasts.
const LINGER: &str = "/var/lib/systemd/linger";

/// A reason for which a folder may vanish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Danger {
    /// The finding, with the folder.
    pub finding: String,
    /// The remedy.
    pub remedy: String,
}

/// Returns the reason for which `dir` may vanish though VMMs run, or `None` if none is seen. `pid`
/// is the daemon, whose mounts count. systemd does not show RuntimeDirectoryPreserve= to a process,
/// so a folder that systemd removes when the daemon stops is not seen beforehand. Blocks.
pub fn danger(dir: &Path, pid: u32) -> Option<Danger> {
    let mounts = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let lingers =
        |user: u32| accounts::user_name(user).is_some_and(|name| Path::new(LINGER).join(name).exists());
    danger_in(dir, &mounts, Path::new(SYSTEMD).is_dir(), lingers)
}

fn danger_in(dir: &Path, mounts: &[u8], systemd: bool, lingers: impl Fn(u32) -> bool) -> Option<Danger> {
    let shown = dir.display();
    if is_private(dir, mounts) {
        let finding = format!(
            "{shown} is in the private /tmp of the daemon's unit, which is another one at each start"
        );
        let remedy =
            "set PrivateTmp=no in the unit, or name a folder outside /tmp with UNKEY_VMCP_RUNTIME_DIR";
        return Some(Danger { finding, remedy: remedy.to_owned() });
    }
    if let Some(user) = session_of(dir)
        && !lingers(user)
    {
        let finding = format!("{shown} is removed when the last session of user {user} ends");
        let remedy =
            format!("`loginctl enable-linger {user}`, or name another folder with UNKEY_VMCP_RUNTIME_DIR");
        return Some(Danger { finding, remedy });
    }
    if systemd && CLEANED.iter().any(|cleaned| dir.starts_with(cleaned)) {
        let finding = format!("{shown} is where systemd-tmpfiles removes old files, sockets of VMs included");
        let remedy = "name a folder outside /tmp and /var/tmp with UNKEY_VMCP_RUNTIME_DIR, or except this one in tmpfiles.d";
        return Some(Danger { finding, remedy: remedy.to_owned() });
    }
    None
}

/// Returns true if `dir` lies in a mount that systemd made for one start of one unit.
fn is_private(dir: &Path, mounts: &[u8]) -> bool {
    let parsed = mounts.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(3).map(OsStr::from_bytes).map(Path::new);
        Some((fields.next()?, fields.next()?))
    });
    // The last mount on the nearest mount point is the one that a path leads into.
    let nearest =
        parsed.filter(|(_, point)| dir.starts_with(point)).max_by_key(|(_, point)| point.as_os_str().len());
    let is_systemds = |part: Component<'_>| part.as_os_str().as_bytes().starts_with(b"systemd-private-");
    nearest.is_some_and(|(root, _)| root.components().any(is_systemds))
}

/// Returns the user whose session has `dir`, as user 1000 has `/run/user/1000/vms`.
fn session_of(dir: &Path) -> Option<u32> {
    let mut parts = dir.strip_prefix("/run/user").ok()?.components();
    parts.next()?.as_os_str().to_str()?.parse().ok()
}

/// Returns the text that names the missing folder or socket and the kernel's error, if `socket` is
/// not there. `None` where it is there, and where that cannot be told. Blocks.
pub fn lost_socket(socket: &Path) -> Option<String> {
    // The folder is named rather than the socket where both are gone, because the folder tells what
    // was removed.
    let gone: Option<(&str, PathBuf, io::Error)> = [("folder", socket.parent()), ("socket", Some(socket))]
        .into_iter()
        .filter_map(|(what, path)| Some((what, path?)))
        .find_map(|(what, path)| match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some((what, path.to_path_buf(), error)),
            Ok(_) | Err(_) => None,
        });
    let (what, path, error) = gone?;
    let of_sockets = if what == "folder" { "its folder of sockets" } else { "its socket" };
    Some(format!("{of_sockets}, {}, is gone: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
        90 22 8:1 /tmp/systemd-private-0a1b-vmm.service-x/tmp /tmp rw master:1 - ext4 /dev/sda1 rw\n\
        91 22 8:1 /var/tmp/systemd-private-0a1b-vmm.service-y/tmp /var/tmp rw - ext4 /dev/sda1 rw\n\
        92 90 0:40 / /tmp/own rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_folder_that_may_vanish_causes_a_warning_with_a_remedy() {
        let reported = |dir: &str, mounts: &[u8], systemd| {
            danger_in(Path::new(dir), mounts, systemd, |user| user == 7).map(|danger| danger.remedy)
        };
        for (dir, mounts, systemd, remedy) in [
            ("/tmp/vmm/run", MOUNTS, false, "PrivateTmp=no"),
            ("/var/tmp/run", MOUNTS, true, "PrivateTmp=no"),
            ("/run/user/1000/vmm", b"", true, "enable-linger 1000"),
            ("/run/user/1000", b"", false, "enable-linger 1000"),
            ("/tmp/own/run", MOUNTS, true, "tmpfiles.d"),
        ] {
            let reported = reported(dir, mounts, systemd).unwrap_or_else(|| panic!("{dir} is no danger"));
            assert!(reported.contains(remedy), "{dir}: {reported}");
        }
        for (dir, mounts, systemd) in [
            ("/run/vmm-controlplane", MOUNTS, true),
            ("/tmp/vmm", b"", false),
            ("/tmp/own/run", MOUNTS, false),
            ("/tmpfs/run", MOUNTS, true),
            ("/run/user/7/vmm", b"", true),
            ("/run/users/1000", b"", true),
        ] {
            assert_eq!(reported(dir, mounts, systemd), None, "{dir}");
        }
    }

    #[test]
    fn a_lost_socket_is_reported_with_its_path_and_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let socket = folder.join("api.sock");
        fs::create_dir(&folder).unwrap();
        let reported = lost_socket(&socket).unwrap();
        assert!(reported.contains(socket.to_str().unwrap()) && reported.contains("os error 2"), "{reported}");
        fs::write(&socket, "").unwrap();
        assert_eq!(lost_socket(&socket), None);
        fs::remove_dir_all(&folder).unwrap();
        let reported = lost_socket(&socket).unwrap();
        assert!(
            reported.starts_with("its folder of sockets") && reported.contains("os error 2"),
            "{reported}"
        );
    }
}
