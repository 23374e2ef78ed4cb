//! The states of a VM, and the two pure functions that move it between them.
//!
//! ```text
//!              BootVm                 PauseVm
//!  CREATED ──────────────► RUNNING ◄───────────► PAUSED
//!     │                    │  ▲  ▲    ResumeVm     │
//!     │      ShutdownVm,   │  │  └─ RebootVm       │ ShutdownVm,
//!     │      guest ends,   │  │                    │ VMM dies
//!     │      VMM dies      ▼  │ BootVm             │
//!     │                  SHUTDOWN ◄────────────────┘
//!     │ DeleteVm           │ DeleteVm        (DeleteVm with force: from everywhere)
//!     ▼                    ▼
//!   gone                 gone
//! ```
//!
//! [`admit`] answers requests, and [`observe`] follows observations. Neither has a `_` arm, so a
//! new state or request does not compile until both functions treat it. [`Status`] has the activity
//! and its cause.

#![warn(clippy::wildcard_enum_match_arm)] // a new state must not compile until every match treats it

use serde::{Deserialize, Serialize};

use crate::reason::Reason;

/// The four states that clients see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The VM is recorded and was never started.
    Created,
    /// A VMM holds the VM and its CPUs run.
    Running,
    /// A VMM holds the VM and its CPUs are stopped.
    Paused,
    /// The VM ran, and no VMM holds it any more.
    Shutdown,
}

impl VmState {
    /// Every state, in the order of the wire.
    pub const ALL: [Self; 4] = [Self::Created, Self::Running, Self::Paused, Self::Shutdown];

    /// Returns the name without the wire's prefix, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "CREATED",
            Self::Running => "RUNNING",
            Self::Paused => "PAUSED",
            Self::Shutdown => "SHUTDOWN",
        }
    }

    /// Returns true if a VMM holds the VM in this state.
    pub const fn is_live(self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Created | Self::Shutdown => false,
        }
    }
}

/// A request of a client to an existing VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmOperation {
    /// BootVm.
    Boot,
    /// ShutdownVm.
    Shutdown,
    /// PauseVm.
    Pause,
    /// ResumeVm.
    Resume,
    /// RebootVm.
    Reboot,
    /// UpdateVm.
    Update,
    /// DeleteVm without force.
    Delete,
    /// DeleteVm with force.
    ForceDelete,
}

impl VmOperation {
    /// Every request, in the order that messages list them.
    pub const ALL: [Self; 8] = [
        Self::Boot,
        Self::Shutdown,
        Self::Pause,
        Self::Resume,
        Self::Reboot,
        Self::Update,
        Self::Delete,
        Self::ForceDelete,
    ];

    /// Returns the method's name, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Boot => "BootVm",
            Self::Shutdown => "ShutdownVm",
            Self::Pause => "PauseVm",
            Self::Resume => "ResumeVm",
            Self::Reboot => "RebootVm",
            Self::Update => "UpdateVm",
            Self::Delete => "DeleteVm",
            Self::ForceDelete => "DeleteVm with force",
        }
    }

    /// Returns the method's name alone, for programs that read the log.
    pub const fn method(self) -> &'static str {
        if matches!(self, Self::ForceDelete) { Self::Delete.name() } else { self.name() }
    }
}

/// The answer of [`admit`] to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The request is carried out.
    Do,
    /// The VM is in the requested state already.
    AlreadyDone,
    /// The request is not legal in this state.
    Denied,
}

/// Decides whether `request` is legal for a VM in `state`.
pub const fn admit(state: VmState, request: VmOperation) -> Admission {
    use Admission::{AlreadyDone, Denied, Do};
    match (state, request) {
        (VmState::Created | VmState::Shutdown, VmOperation::Boot) => Do,
        (VmState::Running, VmOperation::Boot) => AlreadyDone,
        (VmState::Paused, VmOperation::Boot) => Denied,

        (VmState::Running | VmState::Paused, VmOperation::Shutdown) => Do,
        (VmState::Shutdown, VmOperation::Shutdown) => AlreadyDone,
        (VmState::Created, VmOperation::Shutdown) => Denied,

        (VmState::Running, VmOperation::Pause) => Do,
        (VmState::Paused, VmOperation::Pause) => AlreadyDone,
        (VmState::Created | VmState::Shutdown, VmOperation::Pause) => Denied,

        (VmState::Paused, VmOperation::Resume) => Do,
        (VmState::Running, VmOperation::Resume) => AlreadyDone,
        (VmState::Created | VmState::Shutdown, VmOperation::Resume) => Denied,

        (VmState::Running, VmOperation::Reboot) => Do,
        (VmState::Created | VmState::Paused | VmState::Shutdown, VmOperation::Reboot) => Denied,

        // The state decides which parts of the configuration can change, not whether any can.
        (VmState::Created | VmState::Running | VmState::Paused | VmState::Shutdown, VmOperation::Update) => {
            Do
        }

        (VmState::Created | VmState::Shutdown, VmOperation::Delete) => Do,
        (VmState::Running | VmState::Paused, VmOperation::Delete) => Denied,
        (
            VmState::Created | VmState::Running | VmState::Paused | VmState::Shutdown,
            VmOperation::ForceDelete,
        ) => Do,
    }
}

/// Lists the requests that `state` admits, for the message of a refusal.
pub fn legal_requests(state: VmState) -> impl Iterator<Item = VmOperation> {
    VmOperation::ALL.into_iter().filter(move |request| !matches!(admit(state, *request), Admission::Denied))
}

/// An observation of a VM or its VMM. The observed change may have been requested or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observation {
    /// The VMM holds the VM, and its CPUs run.
    Runs,
    /// The VMM holds the VM, and its CPUs are stopped.
    StandsStill,
    /// The guest reset itself and runs on in the same VMM.
    ResetInPlace,
    /// The VMM has provably ended, for whatever reason.
    VmmGone,
}

/// Returns the state after `observation`. The end of a VMM does not move a VM that never ran,
/// because such a VM has no VMM.
pub const fn observe(state: VmState, observation: Observation) -> VmState {
    match (state, observation) {
        (VmState::Created, Observation::ResetInPlace | Observation::VmmGone) => VmState::Created,
        (VmState::Shutdown, Observation::ResetInPlace | Observation::VmmGone) => VmState::Shutdown,
        (VmState::Running | VmState::Paused, Observation::VmmGone) => VmState::Shutdown,
        (VmState::Running | VmState::Paused, Observation::ResetInPlace) => state,
        // A VMM that holds the VM proves a live state, whatever the record holds. A daemon that
        // died between effect and outcome has left the older state on record.
        (VmState::Created | VmState::Running | VmState::Paused | VmState::Shutdown, Observation::Runs) => {
            VmState::Running
        }
        (
            VmState::Created | VmState::Running | VmState::Paused | VmState::Shutdown,
            Observation::StandsStill,
        ) => VmState::Paused,
    }
}

/// The activity of a VM, in more detail than its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The VM waits for its first BootVm.
    Created,
    /// A VMM is being started.
    Starting,
    /// The guest runs.
    Running,
    /// The guest's CPUs are being stopped.
    Pausing,
    /// The guest's CPUs are stopped.
    Paused,
    /// The guest's CPUs are being resumed.
    Resuming,
    /// The VM is being shut down.
    Stopping,
    /// The VM is being shut down and booted again.
    Rebooting,
    /// The run ended as a client asked, or by the guest itself.
    Stopped,
    /// The VM waits for its next start by policy.
    Restarting,
    /// The run ended or a start failed because of a fault.
    Failed,
    /// A VMM may hold the VM, but does not answer.
    Unreachable,
    /// The VM is being deleted.
    Deleting,
}

impl Phase {
    /// Returns the word of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Rebooting => "rebooting",
            Self::Stopped => "stopped",
            Self::Restarting => "restarting",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
            Self::Deleting => "deleting",
        }
    }

    /// Returns the phase of a VM in `state` with no operation under way.
    pub const fn at_rest(state: VmState) -> Self {
        match state {
            VmState::Created => Self::Created,
            VmState::Running => Self::Running,
            VmState::Paused => Self::Paused,
            VmState::Shutdown => Self::Stopped,
        }
    }
}

/// The activity of a VM, its cause, and the time of the last observation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The activity.
    pub phase: Phase,
    /// The cause as programs read it.
    pub reason: Reason,
    /// The cause for people.
    pub message: String,
    /// When this was last observed to be true, in Unix milliseconds.
    pub observed_at_ms: i64,
    /// Restarts by policy, in place or not, without a quiet minute between.
    pub restarts: u32,
}

impl Status {
    /// A status without a cause, observed at `now_ms` (Unix milliseconds).
    pub fn plain(phase: Phase, now_ms: i64) -> Self {
        Self { phase, reason: Reason::Nothing, message: String::new(), observed_at_ms: now_ms, restarts: 0 }
    }

    /// Returns the status with a machine-readable `reason` and a `message` for people.
    pub fn because(mut self, reason: Reason, message: impl Into<String>) -> Self {
        self.reason = reason;
        self.message = message.into();
        self
    }
}

/// The rung of the shutdown ladder that ended a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndedBy {
    /// The VM had ended before.
    AlreadyStopped,
    /// The guest ended by itself without a request.
    Guest,
    /// The guest obeyed its ACPI power button.
    Acpi,
    /// The guest obeyed Ctrl+Alt+Del.
    CtrlAltDel,
    /// The VMM powered the VM off on request.
    Vmm,
    /// The VMM obeyed SIGTERM.
    Sigterm,
    /// The VMM was killed.
    Sigkill,
}

impl EndedBy {
    /// Returns the word of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AlreadyStopped => "already-stopped",
            Self::Guest => "guest",
            Self::Acpi => "acpi",
            Self::CtrlAltDel => "ctrl-alt-del",
            Self::Vmm => "vmm",
            Self::Sigterm => "sigterm",
            Self::Sigkill => "sigkill",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_state() -> impl Strategy<Value = VmState> {
        proptest::sample::select(VmState::ALL.to_vec())
    }

    fn any_request() -> impl Strategy<Value = VmOperation> {
        proptest::sample::select(VmOperation::ALL.to_vec())
    }

    fn any_observation() -> impl Strategy<Value = Observation> {
        proptest::sample::select(vec![
            Observation::Runs,
            Observation::StandsStill,
            Observation::ResetInPlace,
            Observation::VmmGone,
        ])
    }

    /// The state that a request leads to when it succeeds; `None` means that the VM is gone.
    fn target(state: VmState, request: VmOperation) -> Option<VmState> {
        match request {
            VmOperation::Boot | VmOperation::Resume | VmOperation::Reboot => Some(VmState::Running),
            VmOperation::Shutdown => Some(observe(state, Observation::VmmGone)),
            VmOperation::Pause => Some(VmState::Paused),
            VmOperation::Update => Some(state),
            VmOperation::Delete | VmOperation::ForceDelete => None,
        }
    }

    #[test]
    fn admission_follows_the_table_of_the_contract() {
        use Admission::{AlreadyDone as Same, Denied as No, Do as Yes};
        use VmOperation as R;
        let table = [
            (R::Boot, [Yes, Same, No, Yes]),
            (R::Shutdown, [No, Yes, Yes, Same]),
            (R::Pause, [No, Yes, Same, No]),
            (R::Resume, [No, Same, Yes, No]),
            (R::Reboot, [No, Yes, No, No]),
            (R::Update, [Yes, Yes, Yes, Yes]),
            (R::Delete, [Yes, No, No, Yes]),
            (R::ForceDelete, [Yes, Yes, Yes, Yes]),
        ];
        for (request, row) in table {
            for (state, expected) in VmState::ALL.into_iter().zip(row) {
                assert_eq!(admit(state, request), expected, "{} in {}", request.name(), state.name());
            }
        }
    }

    proptest! {
        #[test]
        fn a_forced_deletion_is_legal_in_every_state(
            start in any_state(),
            steps in proptest::collection::vec((any_request(), any_observation()), 0..40),
        ) {
            let mut state = start;
            for (request, observation) in steps {
                if admit(state, request) == Admission::Do {
                    match target(state, request) {
                        Some(next) => state = next,
                        None => return Ok(()),
                    }
                }
                if state.is_live() {
                    state = observe(state, observation);
                }
                prop_assert_eq!(admit(state, VmOperation::ForceDelete), Admission::Do);
                prop_assert!(legal_requests(state).count() >= 2, "every state has a way out");
            }
        }

        #[test]
        fn a_repeated_operation_is_already_done_or_denied(state in any_state(), request in any_request()) {
            if admit(state, request) == Admission::Do
                && let Some(next) = target(state, request)
                && !matches!(request, VmOperation::Reboot | VmOperation::Update)
            {
                prop_assert_eq!(admit(next, request), Admission::AlreadyDone);
            }
        }

        #[test]
        fn no_state_is_live_after_the_end_of_the_vmm(state in any_state(), observation in any_observation()) {
            let after = observe(observe(state, observation), Observation::VmmGone);
            prop_assert!(!after.is_live());
            prop_assert_eq!(observe(after, Observation::VmmGone), after);
        }

        #[test]
        fn already_done_means_that_the_state_is_the_target(state in any_state(), request in any_request()) {
            if admit(state, request) == Admission::AlreadyDone {
                prop_assert_eq!(target(state, request), Some(state));
            }
        }
    }
}
