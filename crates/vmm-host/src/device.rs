//! Opens device files of the host, and names the remedy where one cannot be opened.

use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::{getegid, geteuid, getgroups};

use crate::accounts::{group_name, has_group, user_name};

/// The reason why a device file cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// The fault that was found, with the path of the device.
    pub finding: String,
    /// The remedy.
    pub remedy: String,
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.finding, self.remedy)
    }
}

impl std::error::Error for DeviceFault {}

/// The facts about a kind of device from which remedies follow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceKind {
    /// The remedy where the device does not exist or has no driver.
    pub(crate) driver: &'static str,
    /// The group that may open the device by custom; `None` where every user may.
    pub(crate) group: Option<&'static str>,
    /// The remedy where the kernel refuses for a reason that is not known here.
    pub(crate) otherwise: &'static str,
}

/// The user and the groups of a process, as far as access to files depends on them.
struct Credentials {
    user: u32,
    groups: Vec<u32>,
}

impl Credentials {
    fn of_this_process() -> Self {
        let groups = getgroups().unwrap_or_default().into_iter().chain([getegid()]);
        Self { user: geteuid().as_raw(), groups: groups.map(|group| group.as_raw()).collect() }
    }

    /// Returns true if the mode of a file lets this user read and write the file.
    fn may_open(&self, owner: u32, group: u32, mode: u32) -> bool {
        // The kernel applies the bits of exactly one class, and root needs none of them.
        let shift = match () {
            () if self.user == 0 => return true,
            () if self.user == owner => 6,
            () if self.groups.contains(&group) => 3,
            () => 0,
        };
        mode >> shift & 0o6 == 0o6
    }
}

/// Opens a device for reading and writing, and closes it again. Takes microseconds.
///
/// # Errors
///
/// Returns the fault and its remedy.
pub(crate) fn usable(device: &Path, kind: DeviceKind) -> Result<(), DeviceFault> {
    let Err(error) = OpenOptions::new().read(true).write(true).open(device) else { return Ok(()) };
    let shown = device.display();
    let (finding, remedy) = match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotFound, _) => (format!("{shown} does not exist"), kind.driver.to_owned()),
        (io::ErrorKind::PermissionDenied, _) => {
            denied(device, kind, std::fs::metadata(device).ok().as_ref(), &Credentials::of_this_process())
        }
        (_, Some(nix::libc::ENODEV | nix::libc::ENXIO)) => {
            (format!("{shown} has no driver ({error})"), kind.driver.to_owned())
        }
        _ => (format!("{shown} cannot be opened: {error}"), kind.otherwise.to_owned()),
    };
    Err(DeviceFault { finding, remedy })
}

/// Returns the finding and the remedy where permission is denied. `facts` is `None` if the device
/// cannot even be looked at.
fn denied(device: &Path, kind: DeviceKind, facts: Option<&Metadata>, user: &Credentials) -> (String, String) {
    let shown = device.display();
    let refused = format!("{shown} may not be opened by user {}", named(user.user, user_name(user.user)));
    let Some(facts) = facts else {
        let remedy = format!("let that user search the folders above {shown}");
        return (refused, remedy);
    };
    let (owner, group, mode) = (facts.uid(), facts.gid(), facts.mode() & 0o777);
    let finding = format!(
        "{refused}: it belongs to user {} and group {}, with mode {mode:04o}",
        named(owner, user_name(owner)),
        named(group, group_name(group))
    );
    (finding, permission(device, kind, (owner, group, mode), user))
}

/// Returns the remedy for a device whose owner, group and mode are known.
fn permission(
    device: &Path,
    kind: DeviceKind,
    (owner, group, mode): (u32, u32, u32),
    user: &Credentials,
) -> String {
    let shown = device.display();
    // Permission was denied although the mode grants it, so that something else than the mode
    // denies it.
    if user.may_open(owner, group, mode) {
        return format!(
            "the mode of the device allows that, so a control group or a mount option forbids it: allow the device in the \
             service's unit (DeviceAllow={shown} rw), or mount its file system without nodev"
        );
    }
    // Membership in root's group would grant far more than this device.
    if group != 0 && mode & 0o060 == 0o060 {
        return format!(
            "add that user to the group {}, and start the daemon anew",
            named(group, group_name(group))
        );
    }
    let rule = |mode: &str, group: &str| {
        let kernel = device.file_name().unwrap_or_default().to_string_lossy();
        format!("a udev rule keeps that: KERNEL==\"{kernel}\", {group}MODE=\"{mode}\"")
    };
    match kind.group {
        Some(usual) => {
            let make =
                if has_group(usual) { String::new() } else { format!("groupadd --system {usual} && ") };
            format!(
                "no group may open it, so membership in a group does not help: run `{make}chgrp {usual} {shown} && chmod 0660 {shown}` \
                 as root, add that user to the group {usual}, and start the daemon anew; {}",
                rule("0660", &format!("GROUP=\"{usual}\", "))
            )
        }
        None => format!(
            "run `chmod 0666 {shown}` as root, which is its usual mode, because its use needs further rights; {}",
            rule("0666", "")
        ),
    }
}

/// Returns a number with the name that belongs to it.
fn named(number: u32, name: Option<String>) -> String {
    name.unwrap_or_else(|| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPED: DeviceKind =
        DeviceKind { driver: "load it", group: Some("root"), otherwise: "see the log" };
    const OPEN: DeviceKind = DeviceKind { group: None, ..GROUPED };
    const NOBODY: u32 = 65_534;

    fn user(number: u32, groups: &[u32]) -> Credentials {
        Credentials { user: number, groups: groups.to_vec() }
    }

    #[test]
    fn a_missing_device_needs_its_driver() {
        let missing = usable(Path::new("/nowhere/device"), OPEN).unwrap_err();
        assert_eq!(missing.to_string(), "/nowhere/device does not exist; load it");
        assert_eq!(usable(Path::new("/dev/null"), OPEN), Ok(()));
        let socket = tempfile::tempdir().unwrap();
        let socket = socket.path().join("socket");
        let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(usable(&socket, OPEN).unwrap_err().remedy, "load it", "a socket opens with ENXIO");
    }

    #[test]
    fn the_remedy_for_permission_follows_from_owner_and_mode() {
        let remedy = |kind, facts, user: &Credentials| permission(Path::new("/dev/thing"), kind, facts, user);
        let nobody = user(NOBODY, &[NOBODY]);
        // A group that may open the device: membership is enough.
        let text = remedy(GROUPED, (0, 4_000_000, 0o660), &nobody);
        assert!(text.starts_with("add that user to the group 4000000"), "{text}");
        // No group may open the device, or it is the group of root.
        for facts in [(0, 0, 0o600), (0, 0, 0o660), (0, 4_000_000, 0o640), (0, 4_000_000, 0o600)] {
            let text = remedy(GROUPED, facts, &nobody);
            assert!(text.contains("`chgrp root /dev/thing && chmod 0660 /dev/thing`"), "{facts:?}: {text}");
            assert!(text.contains("KERNEL==\"thing\", GROUP=\"root\", MODE=\"0660\""), "{facts:?}: {text}");
            let text = remedy(OPEN, (0, 0, 0o600), &nobody);
            assert!(text.contains("`chmod 0666 /dev/thing`") && !text.contains("load"), "{text}");
        }
        // The mode is no obstacle.
        for user in [user(0, &[]), user(NOBODY, &[4_000_000])] {
            let text = remedy(GROUPED, (0, 4_000_000, 0o660), &user);
            assert!(text.contains("DeviceAllow=/dev/thing rw"), "{text}");
        }
        let text = remedy(DeviceKind { group: Some("no-such-group"), ..GROUPED }, (0, 0, 0o600), &nobody);
        assert!(text.contains("`groupadd --system no-such-group && chgrp"), "{text}");
    }

    #[test]
    fn a_denied_device_is_shown_with_its_owner_and_its_mode() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
        let facts = std::fs::metadata(file.path()).unwrap();
        let (finding, _) = denied(file.path(), GROUPED, Some(&facts), &user(4_000_001, &[]));
        let owner = named(facts.uid(), user_name(facts.uid()));
        assert!(finding.contains("may not be opened by user 4000001: it belongs to user "), "{finding}");
        assert!(finding.contains(&format!("user {owner} ")) && finding.ends_with("mode 0600"), "{finding}");
        let (_, remedy) = denied(file.path(), GROUPED, None, &user(4_000_001, &[]));
        assert!(remedy.contains("search the folders"), "{remedy}");
    }
}
