//! The port to durable state: the records of VMs, and the guarantees of a store.

use std::ops::Range;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::VmConfig;
use crate::event::{EventSeq, NewEvent, VmEvent};
use crate::id::{BackendName, InstanceId, VmId, VmUid};
use crate::idempotency::{AnswerLookup, KeyChange, KeyedCall};
pub use crate::intent::{Intent, IntentKind};
use crate::kind::VmKind;
pub use crate::pending::{PendingProcess, PendingWork};
use crate::state::{EndedBy, Status, VmState};

/// The record of one VM. Only the VM's own actor writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The uid of this creation.
    pub uid: VmUid,
    /// The name. At most one living record has it.
    pub vm_id: VmId,
    /// The backend that runs the VM.
    pub backend: BackendName,
    /// The request of CreateVm, which serves to recognise a repeated call.
    pub requested: PackedVmRequest,
    /// The configuration in force: as sent, with ids, MACs and the default kernel filled in.
    pub config: VmConfig,
    /// The state.
    pub state: VmState,
    /// The status beside the state.
    pub status: Status,
    /// The number of changes of this record, from 1.
    pub generation: u64,
    /// The time of the creation in Unix milliseconds.
    pub created_ms: i64,
    /// The time of the last change in Unix milliseconds.
    pub modified_ms: i64,
    /// The operation under way. It is committed before anything is changed on the host, and cleared
    /// with its outcome.
    pub intent: Option<Intent>,
    /// The VMM that holds the VM.
    pub run: Option<RunRecord>,
    /// True if this VM has made, or was about to make, the file that `console.output` names.
    pub owns_console_output: bool,
    /// The rung that ended the last run.
    pub ended_by: Option<EndedBy>,
    /// The origin of the VM's VMM. Earlier releases recorded a place instead, and only for some
    /// VMs.
    #[serde(default, alias = "place")]
    pub kind: VmKind,
    /// True if another program made the VM. Its configuration is then the VMM's report, which may
    /// be incomplete.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub imported: bool,
    /// The properties of an imported VM that its configuration cannot express; see
    /// [`crate::discovery::DiscoveredVm::unrepresented`].
    #[serde(default, rename = "untold", skip_serializing_if = "Vec::is_empty")]
    pub unrepresented: Vec<String>,
    /// The work that is left beside the run and the intent; `None` in records of earlier releases.
    /// [`VmRecord::pending_work`] reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingWork>,
    /// The call with an idempotency key whose operation is under way and whose answer is not kept
    /// yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyed: Option<Box<KeyedCall>>,
}

impl VmRecord {
    /// Returns the work that is left on the VM beside its run and its intent.
    pub fn pending_work(&self) -> PendingWork {
        self.pending.unwrap_or_else(|| PendingWork::of_earlier_release(&self.status))
    }
}

/// The request of CreateVm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRequest {
    /// The backend as sent; empty means the default.
    pub backend: String,
    /// The configuration as sent.
    pub config: VmConfig,
}

/// The request of CreateVm in the least room, because every VM keeps its request and only a
/// repeated call reads it. In memory the request is one text, in a database it is the [`VmRequest`]
/// itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedVmRequest(Box<str>);

impl PackedVmRequest {
    /// Packs a request. Equal requests give equal texts, because the maps of a configuration have
    /// one order.
    pub fn pack(requested: &VmRequest) -> Self {
        // JSON has a form for each text and number, so the serialisation cannot fail.
        Self(serde_json::to_string(requested).unwrap_or_default().into())
    }

    /// Unpacks the request.
    pub fn unpack(&self) -> VmRequest {
        // `pack` made the text, so it can be parsed.
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

impl Serialize for PackedVmRequest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.unpack().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PackedVmRequest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        VmRequest::deserialize(deserializer).map(|requested| Self::pack(&requested))
    }
}

/// The identity of a process. A pid alone may belong to another process by now.
///
/// Two identities are equal if pid, start time and boot are equal. The namespaces only decide
/// whether the numbers can be compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// Start time in clock ticks since the host booted, as in `/proc/PID/stat`.
    pub start_ticks: u64,
    /// The host's boot, as in `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// The namespaces in which the pid and the start time were read; `None` in records of earlier
    /// releases.
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

/// The namespaces in which a pid and a start time have their meaning, by the inodes of
/// `/proc/self/ns/pid` and `time`. The inode of the time namespace is 0 where the kernel has no
/// time namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// The PID namespace.
    pub pid: u64,
    /// The time namespace.
    pub time: u64,
}

/// The boot and the namespaces in which a process was started. No process survives its boot. Within
/// the boot, a search proves that there is no such process only in the same namespaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessScope {
    /// The host's boot, as in [`ProcessIdentity::boot_id`].
    pub boot_id: String,
    /// The namespaces of the daemon that started the process.
    pub namespaces: Namespaces,
}

impl ProcessIdentity {
    /// Returns the scope in which the process was seen; `None` in records of earlier releases.
    pub fn scope(&self) -> Option<ProcessScope> {
        let namespaces = self.namespaces?;
        Some(ProcessScope { boot_id: self.boot_id.clone(), namespaces })
    }
}

/// The VMM of one run, the way to reach it, and its claims on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The process.
    pub process: ProcessIdentity,
    /// The VMM's control socket.
    pub socket: PathBuf,
    /// The hypervisor's version, as it reports it.
    pub version: String,
    /// The accelerator of the guest's CPUs, such as `kvm` or `tcg`.
    pub accelerator: String,
    /// The machine model, where the hypervisor has several.
    pub machine: String,
    /// The start of the run in Unix milliseconds.
    pub started_ms: i64,
    /// The claims of the run. No other running VM may use them.
    pub claims: Vec<HostClaim>,
    /// The TAPs whose counters are the VM's, where they do not follow from its configuration.
    /// libvirt gives an imported domain new TAPs with each run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<String>,
}

/// A thing on the host that serves one running VM at a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostClaim {
    /// A disk, identified by its file or device and not by its path.
    Disk {
        /// Device number of the file system that holds the image, or of the block device itself.
        device: u64,
        /// Inode of the image; 0 for a block device.
        inode: u64,
        /// True if this VM may write.
        writable: bool,
        /// The path in the configuration, for messages.
        path: PathBuf,
        /// The disks that this disk is a part of or consists of: the whole disk of a partition, the
        /// slaves of a device mapper, and the layers below those. A writer of one of them writes
        /// this disk too.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        lies_on: Vec<DiskKey>,
    },
    /// A disk that is identified by its path alone, because its file did not answer when the VM was
    /// found running. The claim is replaced when the file answers.
    Path {
        /// The path.
        path: PathBuf,
        /// True if this VM may write.
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

/// One atomic change of a record, with its event.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// The change of the record.
    pub change: RecordChange,
    /// The event, committed in the same transaction.
    pub event: Option<NewEvent>,
}

/// The record of a deleted VM whose process may live: the process, and the claims that it may still
/// use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The last record of the VM. Its run identifies the process, where the process is known. Its
    /// intent tells the scope of the process otherwise.
    pub vm: VmRecord,
    /// The claims of the process. No other VM may use them until the process has provably ended.
    pub claims: Vec<HostClaim>,
}

/// A change of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum RecordChange {
    /// Inserts a new VM. Fails with [`StoreErrorKind::NameTaken`] if a living record has the name.
    Insert(Box<VmRecord>),
    /// Replaces a VM. Fails with [`StoreErrorKind::Conflict`] unless the stored generation is one
    /// less.
    Update(Box<VmRecord>),
    /// Removes a VM. Its events stay. If the VM has no record, nothing happens and the event is not
    /// logged.
    Remove(VmUid),
    /// Removes a VM whose process may live. The tombstone stays on record.
    Bury(Box<Tombstone>),
    /// Removes the tombstone of a deleted VM whose process has provably ended. May be repeated.
    Unbury(VmUid),
}

/// The content of a store when it is opened.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The identity of this state directory, made when it was first opened.
    pub instance: InstanceId,
    /// The VMs whose records can be read, oldest first.
    pub vms: Vec<VmRecord>,
    /// The other VMs, oldest first.
    pub unreadable: Vec<Unreadable>,
    /// The last event in the log; 0 if there is none.
    pub last_event: EventSeq,
    /// The deleted VMs whose processes may live.
    pub tombstones: Vec<Tombstone>,
}

/// A VM whose record this program cannot read, as after a downgrade. [`Store::commit`] keeps every
/// part of such a record that it does not have to change.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// The readable part of the record. The other parts have values without effect: an empty
    /// configuration, no operation under way.
    pub record: Box<VmRecord>,
    /// The reason, for people.
    pub why: String,
}

/// A selection of events.
#[derive(Clone, Debug, Default)]
pub struct EventQuery {
    /// The position after which events are read.
    pub after: EventSeq,
    /// The name whose events are read; `None` means every name.
    pub vm_id: Option<VmId>,
    /// The most events that are read.
    pub limit: usize,
}

/// Durable state. An acknowledged change survives the death of the process and of the host.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads the whole state. Called once, at start.
    async fn load(&self) -> Result<Snapshot, StoreError>;

    /// Commits one change durably and returns the position of its event, if it had one.
    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError>;

    /// Commits a change that a client forces. A store that reserves space for such changes uses it
    /// where none is left.
    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.commit(commit).await
    }

    /// Commits a change of the kept answers, in one transaction with `commit` if there is one.
    /// Returns the position of the event of `commit`. The change is made also where `commit` removes
    /// a VM that is gone already. If a client forces the change, it has the space of
    /// [`Store::commit_forced`].
    async fn commit_keyed(
        &self,
        commit: Option<Commit>,
        key: KeyChange,
        forced: bool,
    ) -> Result<Option<EventSeq>, StoreError>;

    /// Finds the answer that is kept for the id of a call, see [`KeyedCall::id`].
    async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, StoreError>;

    /// Removes the answers whose time is not in `kept_ms` (Unix milliseconds), and returns their
    /// number.
    async fn expire_answers(&self, kept_ms: Range<i64>) -> Result<u64, StoreError>;

    /// Reads events, oldest first.
    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError>;

    /// Removes the oldest events and returns their number. The first event in log order that is not
    /// older than `before_ms` (Unix milliseconds) and all events behind it stay, because the log
    /// must not get a gap.
    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError>;
}

/// The failure of a store.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// The kind, for decisions.
    pub kind: StoreErrorKind,
    /// The fault and the remedy, for people.
    pub message: String,
    /// The knowledge of whether the change was written.
    pub effect: crate::backend::Effect,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Kinds of [`StoreError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// A living record has the name.
    NameTaken,
    /// Another writer changed the record.
    Conflict,
    /// No space is left, or the database is read-only.
    Full,
    /// The database is damaged.
    Corrupt,
    /// The database was written by a newer program.
    Newer,
    /// Reading or writing failed for another reason.
    Io,
    /// The store has been closed.
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_request_has_the_stored_form_of_earlier_releases() {
        let stored = r#"{"backend":"qemu","config":{"cpu":{"vcpu_count":2},"metadata":{"b":"2","a":"1"}}}"#;
        let sent: PackedVmRequest = serde_json::from_str(stored).unwrap();
        let requested: VmRequest = serde_json::from_str(stored).unwrap();
        assert_eq!(
            sent,
            PackedVmRequest::pack(&requested),
            "packed alike, whatever its fields and keys were sorted by"
        );
        assert_eq!(sent.unpack(), requested);
        let written = serde_json::to_string(&sent).unwrap();
        assert_eq!(written, serde_json::to_string(&requested).unwrap());
    }
}
