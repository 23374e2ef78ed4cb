//! Events of VMs: one log that is both the watch stream and the audit trail.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::caller::Caller;
use crate::cause::Cause;
#[cfg(doc)]
use crate::config_part::ConfigPart;
use crate::id::{BackendName, VmId, VmUid};
use crate::state::{EndedBy, Status, VmState};
use crate::store::VmRecord;

/// Position of an event in the log. The first is 1, and each later event has the next number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventSeq(pub u64);

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A VM was recorded.
    Created,
    /// An operation was admitted and its intent recorded.
    OperationStarted,
    /// The state or the status changed.
    StateChanged,
    /// An operation failed. The event's state is the present one.
    OperationFailed,
    /// The guest reset itself and runs on.
    GuestReset,
    /// The VMM ended without a request.
    VmmExited,
    /// The VMM does not answer.
    Unreachable,
    /// The VMM answers again.
    Reachable,
    /// A restarted daemon found the VM's VMM and took it over.
    Adopted,
    /// UpdateVm changed the configuration.
    Updated,
    /// A VM was removed.
    Deleted,
    /// A kind that this release does not know. A newer release wrote the event. Never written.
    Unknown,
}

impl EventKind {
    /// Returns the word of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::OperationStarted => "operation-started",
            Self::StateChanged => "state-changed",
            Self::OperationFailed => "operation-failed",
            Self::GuestReset => "guest-reset",
            Self::VmmExited => "vmm-exited",
            Self::Unreachable => "unreachable",
            Self::Reachable => "reachable",
            Self::Adopted => "adopted",
            Self::Updated => "updated",
            Self::Deleted => "deleted",
            Self::Unknown => "unknown",
        }
    }
}

/// An event without a position in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewEvent {
    /// The time of the event in Unix milliseconds.
    pub time_ms: i64,
    /// The VM's name.
    pub vm_id: VmId,
    /// The VM's creation.
    pub uid: VmUid,
    /// The kind.
    pub kind: EventKind,
    /// The state after the event.
    pub state: VmState,
    /// The status after the event.
    pub status: Status,
    /// The cause.
    pub cause: Cause,
    /// The caller: a client, or the program itself.
    #[serde(flatten)]
    pub caller: Caller,
    /// The rung that ended the run, if the event is an end.
    pub ended_by: Option<EndedBy>,
    /// The VM's metadata, because a filter must find the events of a deleted VM too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// The change of the configuration, if the event is one of an UpdateVm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Box<ConfigChange>>,
    /// The part of the VM that the other fields lack and that ListVms shows. `None` in events of
    /// earlier releases and in the event of a deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<VmSummary>,
}

/// A change of a VM's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigChange {
    /// The names of the parts that changed, as in [`ConfigPart::name`].
    pub parts: Vec<String>,
    /// The metadata before the change, if the metadata changed. A filter must find the event by
    /// these labels too, because a watcher must learn that the VM has left its filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_before: Option<BTreeMap<String, String>>,
}

/// The properties of a VM that ListVms shows and that no other field of its events has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    /// The backend.
    pub backend: BackendName,
    /// The virtual CPUs.
    pub vcpus: i32,
    /// The memory in bytes.
    pub memory_bytes: i64,
    /// The time of the creation in Unix milliseconds.
    pub created_ms: i64,
    /// The generation of the record with this event.
    pub generation: u64,
}

impl VmSummary {
    /// Returns the summary of `record`.
    pub fn of(record: &VmRecord) -> Self {
        Self {
            backend: record.backend.clone(),
            vcpus: record.config.cpu.as_ref().map_or(0, |cpu| cpu.vcpu_count),
            memory_bytes: record.config.memory.as_ref().map_or(0, |memory| memory.size_bytes),
            created_ms: record.created_ms,
            generation: record.generation,
        }
    }
}

/// An event with its position in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEvent {
    /// The position.
    pub seq: EventSeq,
    /// The event.
    pub event: NewEvent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::CallerMethod;

    /// An event in the form of an earlier release: the caller is one text.
    const EARLIER: &str = r#"{"time_ms":1,"vm_id":"vm","uid":"0192f7a0-0000-7000-8000-000000000001","kind":"created",
        "state":"created","status":{"phase":"created","reason":"","message":"","observed_at_ms":1,"restarts":0},
        "cause":"CreateVm","actor":"anonymous@10.0.0.1","ended_by":null}"#;

    #[test]
    fn events_of_earlier_releases_are_read_and_shown_unchanged() {
        let event: NewEvent = serde_json::from_str(EARLIER).unwrap();
        assert_eq!(event.caller.to_string(), "anonymous@10.0.0.1");
        let by_itself = EARLIER.replace("anonymous@10.0.0.1", "system");
        let event: NewEvent = serde_json::from_str(&by_itself).unwrap();
        assert_eq!(event.caller, Caller::system());
    }

    #[test]
    fn a_caller_is_written_whole_beside_the_text_that_earlier_releases_read() {
        let event: NewEvent = serde_json::from_str(EARLIER).unwrap();
        let caller = Caller::anonymous(Some("10.0.0.1".to_owned()));
        let event = NewEvent { caller, ..event };
        let json = serde_json::to_string(&event).unwrap();
        assert!(json.contains(r#""actor":"anonymous@10.0.0.1""#), "{json}");
        assert_eq!(serde_json::from_str::<NewEvent>(&json).unwrap(), event);
        let newer = json.replace("unauthenticated", "a-way-that-is-not-known-yet");
        let newer: NewEvent = serde_json::from_str(&newer).unwrap();
        assert_eq!(newer.caller.method, CallerMethod::Unknown);
    }
}
