//! The failures of UpdateVm, and of the protection against deletion that UpdateVm sets.

use vmm_core::id::VmId;
use vmm_core::kind::VmKind;
use vmm_core::state::VmState;

/// A refusal of a change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpdateFailure {
    #[error(
        "VM \"{vm_id}\" has generation {present} and not {wanted}: it has changed since it was read; read it again with \
         GetVmInfo, and decide anew"
    )]
    OtherGeneration { vm_id: VmId, present: u64, wanted: i64 },
    #[error(
        "another program made VM \"{vm_id}\" ({kind}), and its {parts} belong to that program: change them there. metadata \
         and delete_protection can be changed here"
    )]
    Foreign { vm_id: VmId, kind: VmKind, parts: String },
    #[error(
        "VM \"{vm_id}\" is {}, and its {parts} can only change while it does not run: shut it down with ShutdownVm, update \
         it, and boot it again. metadata, restart_policy and delete_protection can be changed now",
        state.name()
    )]
    Runs { vm_id: VmId, state: VmState, parts: String },
    #[error(
        "VM \"{vm_id}\" is protected against deletion, also with force: clear delete_protection with UpdateVm first \
         (fields: [\"delete_protection\"])"
    )]
    Protected { vm_id: VmId },
    #[error("an UpdateVm reached its VM without a change")]
    NoChange,
}
