//! What happened to VMs: one log that is both the watch stream and the audit trail.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::caller::Caller;
use crate::id::{VmId, VmUid};
use crate::state::{EndedBy, Status, VmState};

/// Position of an event in the log; later events have larger ones, without gaps. The first is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventSeq(pub u64);

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A VM was recorded.
    Created,
    /// An operation was admitted and its intent recorded.
    OperationStarted,
    /// The state, or the status beside it, changed.
    StateChanged,
    /// An operation failed; the state is what it says.
    OperationFailed,
    /// The guest reset itself and goes on.
    GuestReset,
    /// The VMM went away by itself.
    VmmExited,
    /// The VMM does not answer.
    Unreachable,
    /// The VMM answers again.
    Reachable,
    /// A restarted daemon found the VM's VMM and carries on.
    Adopted,
    /// A VM was removed.
    Deleted,
    /// Something that this release has no word for: a newer one wrote the event. Never written.
    Unknown,
}

impl EventKind {
    /// The word on the wire.
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
            Self::Deleted => "deleted",
            Self::Unknown => "unknown",
        }
    }
}

/// An event that has not been given its place in the log yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewEvent {
    /// When, in Unix milliseconds.
    pub time_ms: i64,
    /// The VM's name.
    pub vm_id: VmId,
    /// The VM's creation.
    pub uid: VmUid,
    /// What happened.
    pub kind: EventKind,
    /// The state afterwards.
    pub state: VmState,
    /// The status afterwards.
    pub status: Status,
    /// What brought it about: a method's name, or what was observed (kebab-case).
    pub cause: String,
    /// The caller: a client, or the program itself.
    #[serde(flatten)]
    pub caller: Caller,
    /// What ended the run, where this event is an end.
    pub ended_by: Option<EndedBy>,
    /// The VM's metadata, so that a filter finds the events of a VM that is gone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// An event in its place in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEvent {
    /// The place.
    pub seq: EventSeq,
    /// What happened.
    pub event: NewEvent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::CallerMethod;

    /// An event as an earlier release wrote it: the caller is one text.
    const EARLIER: &str = r#"{"time_ms":1,"vm_id":"vm","uid":"0192f7a0-0000-7000-8000-000000000001","kind":"created",
        "state":"created","status":{"phase":"created","reason":"","message":"","observed_at_ms":1,"restarts":0},
        "cause":"CreateVm","actor":"anonymous@10.0.0.1","ended_by":null}"#;

    #[test]
    fn what_earlier_releases_wrote_is_read_and_shown_as_before() {
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
