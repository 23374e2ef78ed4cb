//! Names of VMs, of each creation, of this instance, and of everything that the program makes on
//! the host.
//!
//! Every name on the host is a pure function of the [`VmUid`], because a restarted daemon must find
//! the leftovers of a crash and distinguish them from those of a VM with the same name.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The name of a VM, chosen by the client or generated: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

/// The error that a text is no [`VmId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be 1 to 63 characters, begin with a letter or digit, and go on with letters, digits, '.', '_' or '-'"
)]
pub struct InvalidVmId;

impl VmId {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 63;

    /// Derives the name of a VM for which the client gave none: `vm-` and the uid.
    pub fn generated(uid: VmUid) -> Self {
        Self(format!("vm-{}", uid.0.simple()))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmId {
    type Err = InvalidVmId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_name(text) { Ok(Self(text.to_owned())) } else { Err(InvalidVmId) }
    }
}

impl TryFrom<String> for VmId {
    type Error = InvalidVmId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns true if `text` has the form of a VM's name or a device's id.
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= VmId::MAX_LEN
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// The identity of one creation of a VM. Every creation gets a new one, even if it reuses a name.
///
/// The value is a version 7 UUID. The order of uids is not the order of creation, because a spare
/// VMM has its uid before its VM is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmUid(Uuid);

impl VmUid {
    /// Wraps a UUID. The caller makes it with [`Uuid::now_v7`].
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// Returns the UUID.
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }

    /// Returns the run folder of this VM below the runtime folder, for sockets, log and console.
    ///
    /// The path is short, because the path of a unix socket has at most 107 bytes.
    pub fn run_dir(&self, runtime_dir: &Path) -> PathBuf {
        runtime_dir.join("vms").join(self.0.simple().to_string())
    }

    /// Returns the name of the TAP for network interface `index`, for a client that names none. The
    /// name has at most 15 bytes, which is the kernel's limit.
    pub fn tap_name(&self, index: usize) -> String {
        format!("{}{:02x}", self.tap_prefix(), index & 0xff)
    }

    /// Returns true if [`VmUid::tap_name`] makes `name` for an interface of this VM. No client can
    /// choose such a name, because the uid is drawn after the client has named its TAPs.
    pub fn made_tap_name(&self, name: &str) -> bool {
        let index = name.strip_prefix(&self.tap_prefix());
        index.is_some_and(|index| index.len() == 2 && index.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }

    fn tap_prefix(&self) -> String {
        // The random part of the uid is used and not its time, because uids of one millisecond
        // share the time. Prefix, five random bytes and a two-digit index fill the 15 bytes of a
        // name.
        format!("vmt{:010x}", self.random_tail() & 0xff_ffff_ffff)
    }

    /// Returns a locally administered unicast MAC for network interface `index`.
    pub fn mac(&self, index: usize) -> [u8; 6] {
        // Adding the index gives each interface of one VM an address of its own. 0x02 marks the
        // address as unicast and locally administered.
        let tail = self.random_tail().wrapping_add(index as u64).to_be_bytes();
        [0x02, tail[3], tail[4], tail[5], tail[6], tail[7]]
    }

    fn random_tail(&self) -> u64 {
        self.0.as_u64_pair().1
    }
}

impl fmt::Display for VmUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VmUid {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

/// The identity of one state directory, made with the directory. It distinguishes the leftovers of
/// this daemon from those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(Uuid);

impl InstanceId {
    /// Wraps a UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for InstanceId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

/// The name of a hypervisor backend, such as `qemu`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackendName(String);

impl BackendName {
    /// Wraps a name. The names that exist are decided where the backends are put together.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_ids_follow_the_pattern() {
        for good in ["a", "0", "vm-1", "A.b_c-d", &"x".repeat(63)] {
            assert!(good.parse::<VmId>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a/b", "../x", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<VmId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn derived_names_fit_the_limits_of_the_host() {
        let uid = VmUid::new(Uuid::now_v7());
        assert!(uid.tap_name(255).len() <= 15);
        assert_ne!(uid.tap_name(0), uid.tap_name(1));
        assert!(uid.made_tap_name(&uid.tap_name(0)) && uid.made_tap_name(&uid.tap_name(255)));
        for other in
            ["", "vmt", "tap0", &format!("{}0", uid.tap_name(1)), &VmUid::new(Uuid::now_v7()).tap_name(0)]
        {
            assert!(!uid.made_tap_name(other), "{other}");
        }
        assert_eq!(uid.mac(0)[0] & 0b11, 0b10, "locally administered, unicast");
        assert_ne!(uid.mac(0), uid.mac(1));
        assert!(VmId::generated(uid).as_str().parse::<VmId>().is_ok());
    }
}
