//! Intents: the operations that are recorded before anything is changed on the host.
//!
//! ```text
//!   operation admitted ─► intent committed ─► effect ─► outcome committed, the intent is gone
//!                                   │
//!                                   └─ the daemon dies ─► the next one follows `recovery`
//! ```
//!
//! An intent carries all data that its recovery needs: the guest's time to obey, the claims of the
//! start under way, the caller. [`Intent::recovery`] has one arm for each kind, so a new kind does
//! not compile until its recovery is decided.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::caller::Caller;
use crate::state::VmOperation;
use crate::store::{HostClaim, ProcessScope};

/// An operation that was admitted and has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The operation with its data.
    #[serde(flatten)]
    pub kind: IntentKind,
    /// The caller.
    #[serde(flatten)]
    pub caller: Caller,
    /// The time of the admission in Unix milliseconds.
    pub since_ms: i64,
    /// The scope of the process that the operation may start, or of a process that an earlier
    /// operation may have left. `None` in records of earlier releases. It serves where no run on
    /// record identifies the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<ProcessScope>,
}

/// An operation, with the data that its recovery needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum IntentKind {
    /// A VMM is being started.
    Boot {
        /// The claims of the start on the host. They hold until its process has provably gone.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        claims: Vec<HostClaim>,
    },
    /// The guest's CPUs are being stopped.
    Pause,
    /// The guest's CPUs are being resumed.
    Resume,
    /// The run is being ended.
    Shutdown {
        /// The time that the guest has to obey; `None` means that the guest is not asked.
        #[serde(default = "default_guest_timeout", rename = "patience_ms", with = "millis")]
        guest_timeout: Option<Duration>,
        /// True if the shutdown was answered with a failure, although its VMM may still end because
        /// of it. If the run ends, that end is the outcome of this shutdown. A VMM that answers
        /// again has survived the shutdown.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        answered: bool,
    },
    /// The run is being ended, and another one started.
    Reboot {
        /// The time that the guest has to obey; `None` means that the guest is not asked.
        #[serde(default = "default_guest_timeout", rename = "patience_ms", with = "millis")]
        guest_timeout: Option<Duration>,
        /// The claims of the second half on the host, held from before the first half on.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        claims: Vec<HostClaim>,
    },
    /// The VM is being deleted and does not run.
    Delete,
    /// The VM is being deleted in any state.
    ForceDelete,
}

/// The guest's time to obey where the client gives none.
pub const DEFAULT_GUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The actions of a restarted daemon on an intent that is on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryAction {
    /// Nothing is carried on. The VM's state is the one that its VMM reports.
    AsFound,
    /// A start whose guest runs stands. A start that failed is undone, and made once more with
    /// `again`, because no client waits for its answer and could repeat it.
    Start {
        /// True if the start is made once more.
        again: bool,
    },
    /// The shutdown is repeated while its VMM lives. If the run has ended meanwhile, that end is
    /// the outcome.
    Shutdown {
        /// The time that the guest has to obey.
        guest_timeout: Option<Duration>,
    },
    /// The shutdown was answered with a failure. If the run has ended since, that end is the
    /// outcome. A VMM that lives runs on.
    ShutdownAnswered,
    /// The reboot is repeated while its VMM lives. If the VMM has ended, the VM is booted.
    Reboot {
        /// The time that the guest has to obey.
        guest_timeout: Option<Duration>,
    },
    /// The deletion is finished as it was asked for.
    Delete {
        /// True if the deletion was forced.
        force: bool,
    },
}

impl RecoveryAction {
    /// Returns true if the operation is carried on once its VMM is found.
    pub const fn waits_for_vmm(self) -> bool {
        match self {
            Self::Shutdown { .. } | Self::Reboot { .. } => true,
            Self::AsFound | Self::Start { .. } | Self::ShutdownAnswered | Self::Delete { .. } => false,
        }
    }
}

impl Intent {
    /// Returns the recovery of this intent.
    pub fn recovery(&self) -> RecoveryAction {
        match self.kind {
            // A client that asked for the start can ask again. A start by the restart policy has no
            // client, so the next daemon repeats it.
            IntentKind::Boot { .. } => RecoveryAction::Start { again: self.caller.is_system() },
            // Both are one call to the VMM, which either came about or not. The VMM's state shows
            // which.
            IntentKind::Pause | IntentKind::Resume => RecoveryAction::AsFound,
            // The client has its answer, so the shutdown is not repeated behind its back.
            IntentKind::Shutdown { answered: true, .. } => RecoveryAction::ShutdownAnswered,
            IntentKind::Shutdown { guest_timeout, answered: false } => {
                RecoveryAction::Shutdown { guest_timeout }
            }
            IntentKind::Reboot { guest_timeout, .. } => RecoveryAction::Reboot { guest_timeout },
            IntentKind::Delete => RecoveryAction::Delete { force: false },
            IntentKind::ForceDelete => RecoveryAction::Delete { force: true },
        }
    }

    /// Returns the operation.
    pub const fn request(&self) -> VmOperation {
        self.kind.request()
    }

    /// Returns the claims of the start under way; empty where none is under way.
    pub fn claims(&self) -> &[HostClaim] {
        match &self.kind {
            IntentKind::Boot { claims } | IntentKind::Reboot { claims, .. } => claims,
            IntentKind::Pause
            | IntentKind::Resume
            | IntentKind::Shutdown { .. }
            | IntentKind::Delete
            | IntentKind::ForceDelete => &[],
        }
    }

    /// Returns true if a VMM is being started.
    pub const fn is_start(&self) -> bool {
        matches!(self.kind, IntentKind::Boot { .. } | IntentKind::Reboot { .. })
    }

    /// Returns true if the VM is being deleted.
    pub const fn is_deletion(&self) -> bool {
        matches!(self.kind, IntentKind::Delete | IntentKind::ForceDelete)
    }
}

impl IntentKind {
    /// Returns the operation.
    pub const fn request(&self) -> VmOperation {
        match self {
            Self::Boot { .. } => VmOperation::Boot,
            Self::Pause => VmOperation::Pause,
            Self::Resume => VmOperation::Resume,
            Self::Shutdown { .. } => VmOperation::Shutdown,
            Self::Reboot { .. } => VmOperation::Reboot,
            Self::Delete => VmOperation::Delete,
            Self::ForceDelete => VmOperation::ForceDelete,
        }
    }
}

// serde's `default` needs a function that returns the field's type, an `Option`.
#[expect(clippy::unnecessary_wraps, reason = "serde asks for the type of the field")]
const fn default_guest_timeout() -> Option<Duration> {
    Some(DEFAULT_GUEST_TIMEOUT)
}

/// Serialises a time as milliseconds. 0 stands for a guest that is not asked, as in every release.
mod millis {
    use super::{Deserialize, Deserializer, Duration, Serializer, default_guest_timeout};

    pub(super) fn serialize<S: Serializer>(
        time: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let millis = time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        serializer.serialize_u64(millis)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(match Option::<u64>::deserialize(deserializer)? {
            None => default_guest_timeout(),
            Some(0) => None,
            Some(millis) => Some(Duration::from_millis(millis)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Namespaces;

    fn scope() -> ProcessScope {
        ProcessScope { boot_id: "boot".to_owned(), namespaces: Namespaces { pid: 1, time: 2 } }
    }

    fn disk() -> HostClaim {
        HostClaim::Disk { device: 1, inode: 2, writable: true, path: "/d".into(), lies_on: Vec::new() }
    }

    fn every_kind() -> Vec<IntentKind> {
        let guest_timeout = Some(Duration::from_millis(1500));
        vec![
            IntentKind::Boot { claims: vec![disk()] },
            IntentKind::Pause,
            IntentKind::Resume,
            IntentKind::Shutdown { guest_timeout: None, answered: true },
            IntentKind::Shutdown { guest_timeout, answered: false },
            IntentKind::Reboot { guest_timeout, claims: vec![disk()] },
            IntentKind::Delete,
            IntentKind::ForceDelete,
        ]
    }

    #[test]
    fn written_values_are_read_back() {
        let callers = [Caller::system(), Caller::anonymous(Some("10.0.0.1".to_owned())), Caller::named("me")];
        for (kind, caller) in
            every_kind().into_iter().flat_map(|kind| callers.clone().map(|c| (kind.clone(), c)))
        {
            for scope in [None, Some(scope())] {
                let intent = Intent { kind: kind.clone(), caller: caller.clone(), since_ms: -1, scope };
                let json = serde_json::to_string(&intent).unwrap();
                assert_eq!(serde_json::from_str::<Intent>(&json).unwrap(), intent, "{json}");
            }
        }
    }

    #[test]
    fn intents_of_earlier_releases_are_read() {
        let cases = [
            (r#"{"request":"boot","actor":"system","since_ms":1}"#, RecoveryAction::Start { again: true }),
            (
                r#"{"request":"boot","actor":"anonymous@::1","since_ms":1}"#,
                RecoveryAction::Start { again: false },
            ),
            (r#"{"request":"pause","actor":"a","since_ms":1}"#, RecoveryAction::AsFound),
            (
                r#"{"request":"shutdown","actor":"a","since_ms":1}"#,
                RecoveryAction::Shutdown { guest_timeout: Some(DEFAULT_GUEST_TIMEOUT) },
            ),
            (
                r#"{"request":"shutdown","actor":"a","since_ms":1,"patience_ms":0}"#,
                RecoveryAction::Shutdown { guest_timeout: None },
            ),
            (
                r#"{"request":"reboot","actor":"a","since_ms":1,"patience_ms":7}"#,
                RecoveryAction::Reboot { guest_timeout: Some(Duration::from_millis(7)) },
            ),
            (r#"{"request":"delete","actor":"a","since_ms":1}"#, RecoveryAction::Delete { force: false }),
            (
                r#"{"request":"force-delete","actor":"a","since_ms":1}"#,
                RecoveryAction::Delete { force: true },
            ),
        ];
        for (json, recovery) in cases {
            let intent: Intent = serde_json::from_str(json).unwrap();
            assert_eq!((intent.recovery(), intent.since_ms), (recovery, 1), "{json}");
            assert_eq!(intent.scope, None, "{json}");
            let caller = intent.caller.to_string();
            assert!(json.contains(&format!("\"actor\":\"{caller}\"")), "{json} is of {caller}");
        }
    }

    #[test]
    fn written_intents_are_readable_by_earlier_releases() {
        #[derive(Deserialize)]
        struct Earlier {
            request: VmOperation,
            actor: String,
            since_ms: i64,
            #[serde(default)]
            patience_ms: Option<u64>,
        }
        for kind in every_kind() {
            let caller = Caller::anonymous(Some("::1".to_owned()));
            let intent = Intent { kind, caller, since_ms: 5, scope: Some(scope()) };
            let earlier: Earlier = serde_json::from_str(&serde_json::to_string(&intent).unwrap()).unwrap();
            assert_eq!(earlier.request, intent.request());
            assert_eq!((earlier.actor.as_str(), earlier.since_ms), ("anonymous@::1", 5));
            let has_patience = matches!(intent.request(), VmOperation::Shutdown | VmOperation::Reboot);
            assert_eq!(earlier.patience_ms.is_some(), has_patience);
        }
    }
}
