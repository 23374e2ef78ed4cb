//! Columns that only import VMs: the cases for VMs that another program has made, and the refusal
//! of all other cases.

use vmm_core::store::VmRequest;
use vmm_service::ServiceError;

use super::case::CaseStep;
use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM};
use crate::guests::TinyGuest;

/// The cases that an imported VM can go through.
pub(super) const CASES: &[&str] = &[
    "boot_in_every_state",
    "shutdown_in_every_state",
    "pause_in_every_state",
    "resume_in_every_state",
    "reboot_in_every_state",
    "delete_in_every_state",
    "force_delete_in_every_state",
    "force_reboot",
    "a_paused_guest_stands_still",
    "guest_obeys_shutdown",
    "paused_guest_obeys_shutdown",
    "guest_ignores_shutdown",
    "forced_shutdown",
    "guest_powers_off",
    "vmm_killed_while_running",
    "vmm_killed_while_paused",
    "vmm_crashes_while_running",
    "vmm_crashes_while_paused",
    "vmm_killed_while_stopping",
    "vmm_hangs",
    "hanging_vmm_is_deleted",
    "vmm_comes_back",
    "metrics_move",
    "daemon_restart_while_running",
    "daemon_restart_while_paused",
    "vmm_dies_while_no_daemon_runs",
    "hanging_vmm_at_daemon_start",
];

/// The step that replaces every other case.
pub(super) const REFUSED: CaseStep = CaseStep::Life(|vms| Box::pin(refused(vms)));

/// Checks that CreateVm refuses before any other check, and that ValidateVm agrees.
async fn refused(vms: DaemonLife) -> CaseVerdict {
    let config = vms.config(TinyGuest::Idle);
    let requested = VmRequest { backend: String::new(), config: config.clone() };
    let judged = vms.service.validate(&requested).await.expect("the files answer");
    assert!(judged.violations.iter().any(|found| found.field == "backend"), "{judged:?}");
    match vms.try_create(VM, config).await {
        Err(ServiceError::Unsupported(why)) => {
            assert!(why.to_string().contains("imported"), "{why}");
            CaseVerdict::Rejected(
                "CreateVm is UNIMPLEMENTED: a running QEMU is imported, not created".to_owned(),
            )
        }
        other => panic!("it must not be created: {other:?}"),
    }
}
