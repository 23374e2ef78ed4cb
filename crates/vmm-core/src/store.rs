//! The port to durable state: what is kept of a VM, and what a store must promise.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::VmConfig;
use crate::event::{EventSeq, NewEvent, VmEvent};
use crate::id::{BackendName, InstanceId, VmId, VmUid};
pub use crate::intent::{Intent, IntentKind};
use crate::kind::VmKind;
use crate::state::{EndedBy, Status, VmState};

/// Everything that is kept of one VM. Written only by the VM's own actor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// This creation.
    pub uid: VmUid,
    /// The name; at most one living record bears it.
    pub vm_id: VmId,
    /// Which hypervisor runs it.
    pub backend: BackendName,
    /// What CreateVm was sent, to recognise a repeated call.
    pub requested: Sent,
    /// The configuration in force: as sent, with ids, MACs and the default kernel filled in.
    pub config: VmConfig,
    /// Where it is.
    pub state: VmState,
    /// Why it is there.
    pub status: Status,
    /// Counts every change of this record, from 1.
    pub generation: u64,
    /// When it was created, in Unix milliseconds.
    pub created_ms: i64,
    /// When it last changed, in Unix milliseconds.
    pub modified_ms: i64,
    /// The operation under way: committed before anything is touched, cleared with its outcome.
    pub intent: Option<Intent>,
    /// The VMM that holds it.
    pub run: Option<RunRecord>,
    /// Whether this VM has made, or was about to make, the file that `console.output` names.
    pub owns_console_output: bool,
    /// What ended the last run.
    pub ended_by: Option<EndedBy>,
    /// The origin of its VMM. Earlier releases kept a place instead, and that only of some VMs.
    #[serde(default, alias = "place")]
    pub kind: VmKind,
    /// Whether somebody else made it: its configuration is what its VMM told, and may not tell all.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub imported: bool,
    /// What it has beside its configuration, of a VM that was imported; see [`crate::place::Found::untold`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub untold: Vec<String>,
}

/// What CreateVm was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requested {
    /// The backend as sent; empty means the default.
    pub backend: String,
    /// The configuration as sent.
    pub config: VmConfig,
}

/// The request of CreateVm in the least room, because every VM keeps its request and only a repeated call reads it. In memory the
/// request is one text, in a database the [`Requested`] itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent(Box<str>);

impl Sent {
    /// Packs what was sent. Equal ones are packed alike, because the maps of a configuration have one order.
    pub fn pack(requested: &Requested) -> Self {
        // JSON has a form for each text and number, so this does not fail.
        Self(serde_json::to_string(requested).unwrap_or_default().into())
    }

    /// Unpacks what was sent.
    pub fn unpack(&self) -> Requested {
        // The text is one that `pack` has made.
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

impl Serialize for Sent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.unpack().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Sent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Requested::deserialize(deserializer).map(|requested| Self::pack(&requested))
    }
}

/// Proof of identity of a process: a pid alone may be somebody else's by now.
///
/// Two identities are equal if pid, start time and boot are. The namespaces say only whether the numbers can be compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// Start time in clock ticks since the host booted, as in `/proc/PID/stat`.
    pub start_ticks: u64,
    /// The host's boot, as in `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// The namespaces in which the pid and the start time were read. `None` in records of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Namespaces>,
}

impl PartialEq for ProcessIdentity {
    fn eq(&self, other: &Self) -> bool {
        let Self { pid, start_ticks, boot_id, namespaces: _ } = self;
        (*pid, *start_ticks, boot_id) == (other.pid, other.start_ticks, &other.boot_id)
    }
}

impl Eq for ProcessIdentity {}

/// The namespaces that give a pid and a start time their meaning, by the inodes of `/proc/self/ns/pid` and `time`. The inode of
/// the time namespace is 0 where the kernel has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// The PID namespace.
    pub pid: u64,
    /// The time namespace.
    pub time: u64,
}

/// The VMM of one run: who it is, how to reach it, and what it holds of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The process.
    pub process: ProcessIdentity,
    /// Its control socket.
    pub socket: PathBuf,
    /// The hypervisor's version, as it says itself.
    pub version: String,
    /// `kvm`, `tcg` or what else runs the guest's CPUs.
    pub accelerator: String,
    /// The machine model, where the hypervisor has several.
    pub machine: String,
    /// When the run began, in Unix milliseconds.
    pub started_ms: i64,
    /// What no other running VM may use.
    pub claims: Vec<HostClaim>,
    /// The TAPs whose counters are the VM's, where they do not follow from its configuration: those of an imported domain, to
    /// which libvirt gives new ones with each run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<String>,
}

/// Something on the host that serves one running VM at a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostClaim {
    /// A disk, known by where it really is rather than by its path.
    Disk {
        /// Device number of the file system that holds the image, or of the block device itself.
        device: u64,
        /// Inode of the image; 0 for a block device.
        inode: u64,
        /// Whether this VM may write.
        writable: bool,
        /// The path it was named by, for messages.
        path: PathBuf,
        /// The disks that this one is a part of, or is made of: the whole disk of a partition, the slaves of a device mapper,
        /// and so on downwards. A writer of one of them writes this disk too.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        lies_on: Vec<DiskKey>,
    },
    /// A disk that is known by its path alone, because its file did not answer when the VM was found running. Replaced when the
    /// file answers.
    Path {
        /// The path.
        path: PathBuf,
        /// Whether this VM may write.
        writable: bool,
    },
    /// A TAP interface, by name.
    Tap {
        /// The interface.
        name: String,
    },
}

/// The identity of a disk, whatever path leads to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskKey {
    /// Device number of the file system that holds the image, or of the block device itself.
    pub device: u64,
    /// Inode of the image; 0 for a block device.
    pub inode: u64,
}

/// One atomic change: a record and the event that tells of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// What happens to the record.
    pub change: Change,
    /// The event, committed in the same transaction.
    pub event: Option<NewEvent>,
}

/// The record of a deleted VM whose process may live: the process, and the claims that the process may still use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The VM as it was last. Its run says which process it is, where that is known.
    pub vm: VmRecord,
    /// The claims of the process. No other VM may use them until the process has provably gone.
    pub claims: Vec<HostClaim>,
}

/// What happens to a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A new VM. Fails with [`StoreErrorKind::NameTaken`] if a living record bears the name.
    Insert(Box<VmRecord>),
    /// A changed VM. Fails with [`StoreErrorKind::Conflict`] unless the stored generation is one less.
    Update(Box<VmRecord>),
    /// A VM that is gone; its events stay. Removing what is not there is harmless and logs nothing.
    Remove(VmUid),
    /// A VM that is gone while a process of it may live. Like [`Change::Remove`], and the tombstone stays on record.
    Bury(Box<Tombstone>),
    /// The process of a deleted VM has provably gone: its tombstone goes. Repeating this is harmless.
    Unbury(VmUid),
}

/// What a store holds when it is opened.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The identity of this state directory, made when it was first opened.
    pub instance: InstanceId,
    /// Every VM whose record can be read, oldest first.
    pub vms: Vec<VmRecord>,
    /// Every other VM, oldest first.
    pub unreadable: Vec<Unreadable>,
    /// The last event in the log; 0 if there is none.
    pub last_event: EventSeq,
    /// The deleted VMs whose processes may live.
    pub tombstones: Vec<Tombstone>,
}

/// A VM whose record this program cannot read, as after a step back to an older release. [`Store::commit`] keeps of such a
/// record all that it does not have to change.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// The part of the record that can be read. The rest is left at a value that does nothing: an empty configuration, no
    /// operation under way.
    pub record: Box<VmRecord>,
    /// Why, for people.
    pub why: String,
}

/// Which events to read.
#[derive(Clone, Debug, Default)]
pub struct EventQuery {
    /// Only events after this one.
    pub after: EventSeq,
    /// Only events of this name.
    pub vm_id: Option<VmId>,
    /// At most so many.
    pub limit: usize,
}

/// Durable state. Whatever has been acknowledged survives the death of the process and of the host.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads everything. Called once, at start.
    async fn load(&self) -> Result<Snapshot, StoreError>;

    /// Commits one change durably and answers with the place of its event, if it had one.
    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError>;

    /// Commits like [`Store::commit`] what a client forces: a store that keeps room for that uses it where none is left.
    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.commit(commit).await
    }

    /// Reads events, oldest first.
    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError>;

    /// Removes the oldest events, up to the first in the order of the log that is not older than `before_ms` (Unix
    /// milliseconds), and answers how many went. Later events stay, whatever their time: the log never gets a hole.
    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError>;
}

/// Why a store could not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// The kind, to decide by.
    pub kind: StoreErrorKind,
    /// What happened and what to do, for people.
    pub message: String,
    /// Whether the change was written.
    pub effect: crate::backend::Effect,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Kinds of [`StoreError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// A living record bears the name.
    NameTaken,
    /// Somebody else changed the record.
    Conflict,
    /// No room is left, or the database is read-only.
    Full,
    /// The database is damaged.
    Corrupt,
    /// The database was written by a newer program.
    Newer,
    /// Reading or writing failed otherwise.
    Io,
    /// The store has been closed.
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_stored_as_it_always_was() {
        let stored = r#"{"backend":"qemu","config":{"cpu":{"vcpu_count":2},"metadata":{"b":"2","a":"1"}}}"#;
        let sent: Sent = serde_json::from_str(stored).unwrap();
        let requested: Requested = serde_json::from_str(stored).unwrap();
        assert_eq!(sent, Sent::pack(&requested), "packed alike, whatever its fields and keys were sorted by");
        assert_eq!(sent.unpack(), requested);
        let written = serde_json::to_string(&sent).unwrap();
        assert_eq!(written, serde_json::to_string(&requested).unwrap());
    }
}
