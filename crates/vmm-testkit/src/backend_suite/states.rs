//! The state table of the contract, row by row, and further cases about states.

use vmm_core::state::VmState;
use vmm_core::store::VmRecord;
use vmm_service::{OperationOutcome, ServiceError};

use super::column::ObeyingGuest;
use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM, pid_of};
use crate::guests::TinyGuest;

/// An operation.
#[derive(Clone, Copy)]
enum TableOperation {
    Boot,
    Shutdown,
    Pause,
    Resume,
    Reboot,
    Delete,
    ForceDelete,
}

/// An entry of the state table. The table is repeated here and not taken from the code, because it
/// is a guarantee to clients.
#[derive(Clone, Copy)]
enum TableEntry {
    /// The operation leads to this state.
    To(VmState),
    /// The VM is in the wanted state already, so nothing changes.
    Same,
    /// The state forbids the operation.
    No,
    /// The VM is deleted.
    Gone,
}

use TableEntry::{Gone, No, Same, To};

const RUNNING: TableEntry = To(VmState::Running);
const PAUSED: TableEntry = To(VmState::Paused);
const SHUTDOWN: TableEntry = To(VmState::Shutdown);

pub(super) async fn boot_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Boot, [RUNNING, Same, No, RUNNING]).await
}

pub(super) async fn shutdown_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Shutdown, [No, SHUTDOWN, SHUTDOWN, Same]).await
}

pub(super) async fn pause_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Pause, [No, PAUSED, Same, No]).await
}

pub(super) async fn resume_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Resume, [No, Same, RUNNING, No]).await
}

pub(super) async fn reboot_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Reboot, [No, RUNNING, No, No]).await
}

pub(super) async fn delete_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::Delete, [Gone, No, No, Gone]).await
}

pub(super) async fn force_delete_in_every_state(vms: DaemonLife) -> CaseVerdict {
    row(&vms, TableOperation::ForceDelete, [Gone, Gone, Gone, Gone]).await
}

/// Runs `op` on a new VM in each state. `entries` are in the order of [`VmState::ALL`].
async fn row(vms: &DaemonLife, op: TableOperation, entries: [TableEntry; 4]) -> CaseVerdict {
    let mut verdict = CaseVerdict::Served;
    for (state, entry) in VmState::ALL.into_iter().zip(entries) {
        if state == VmState::Created && vms.column().imports() {
            // An imported VM runs already.
            continue;
        }
        let vm_id = state.name().to_lowercase();
        bring_to(vms, &vm_id, state, guest_for(vms, op)).await;
        // The record is compared before and after, because a refused operation must not change it.
        let before = vms.record(&vm_id);
        let answer = carry_out(vms, &vm_id, op).await;
        let said = format!("from {}: {answer:?}", state.name());
        match entry {
            To(VmState::Running) if matches!(op, TableOperation::Reboot) && !vms.facts.reboots => {
                verdict = reboot_is_refused(answer);
                assert_eq!(vms.record(&vm_id).state, state, "it goes on");
            }
            To(wanted) => {
                assert_eq!(answer.expect(&said).record.state, wanted, "{said}");
                let now = vms.record(&vm_id);
                assert_eq!(now.state, wanted, "a read reflects the answer");
                assert!(now.generation > before.generation && now.intent.is_none(), "{now:#?}");
            }
            Same => {
                assert_eq!(answer.expect(&said).record.state, state, "{said}");
                assert_eq!(essence(&vms.record(&vm_id)), essence(&before), "nothing was touched");
            }
            No => {
                let Err(error @ ServiceError::IllegalState { .. }) = answer else { panic!("{said}") };
                assert!(error.to_string().contains(state.name()), "it names the state: {error}");
                assert!(error.to_string().contains("DeleteVm"), "it names what is legal: {error}");
                assert_eq!(essence(&vms.record(&vm_id)), essence(&before), "nothing was touched");
            }
            Gone => {
                answer.expect(&said);
                assert!(matches!(vms.get(&vm_id), Err(ServiceError::NotFound(_))));
                let dir = before.uid.run_dir(&vms.rig.runtime_dir());
                assert!(!dir.exists(), "its folder is gone");
            }
        }
    }
    verdict
}

/// Returns the guest for the row of an operation. An obeying guest is needed if only a guest can
/// end its run without force.
fn guest_for(vms: &DaemonLife, op: TableOperation) -> TinyGuest {
    match (op, vms.column().obeying()) {
        (TableOperation::Shutdown, ObeyingGuest::Tiny(obeying)) if !vms.facts.powers_off => obeying,
        _ => TinyGuest::Idle,
    }
}

/// Checks the refusal of a reboot that needs another attached VMM.
fn reboot_is_refused(answer: Result<OperationOutcome, ServiceError>) -> CaseVerdict {
    let Err(ServiceError::Unavailable(why)) = answer else {
        panic!("a reboot takes another VMM: {answer:?}")
    };
    assert!(why.to_string().contains("start another VMM there"), "it says what to do: {why}");
    CaseVerdict::Rejected("RebootVm is UNAVAILABLE, naming the socket to start another VMM on".to_owned())
}

async fn bring_to(vms: &DaemonLife, vm_id: &str, state: VmState, guest: TinyGuest) {
    vms.create(vm_id, vms.config(guest)).await;
    if state == VmState::Created {
        return;
    }
    vms.boot_again(vm_id).await.expect("BootVm succeeds");
    vms.console_shows(vm_id, &guest.banner(), 1).await;
    match state {
        VmState::Created | VmState::Running => {}
        VmState::Paused => drop(vms.pause(vm_id).await.expect("PauseVm succeeds")),
        VmState::Shutdown => drop(vms.force_shutdown(vm_id).await.expect("ShutdownVm succeeds")),
    }
}

/// Returns the part of a record that a refused operation must not change. The time of the last
/// observation is not included, because samples change it.
fn essence(record: &VmRecord) -> (u64, VmState, Option<u32>) {
    (record.generation, record.state, record.run.as_ref().map(|run| run.process.pid))
}

async fn carry_out(
    vms: &DaemonLife,
    vm_id: &str,
    op: TableOperation,
) -> Result<OperationOutcome, ServiceError> {
    match op {
        TableOperation::Boot => vms.boot_again(vm_id).await,
        TableOperation::Shutdown if !vms.facts.powers_off => vms.shutdown_obeying(vm_id).await,
        TableOperation::Shutdown => vms.shutdown(vm_id, 1).await,
        TableOperation::Pause => vms.pause(vm_id).await,
        TableOperation::Resume => vms.resume(vm_id).await,
        TableOperation::Reboot => vms.reboot(vm_id, false).await,
        TableOperation::Delete => vms.delete(vm_id, false).await,
        TableOperation::ForceDelete => vms.delete(vm_id, true).await,
    }
}

/// RebootVm with force is immediate, and stays in the same process if the hypervisor can do that.
pub(super) async fn force_reboot(vms: DaemonLife) -> CaseVerdict {
    let before = vms.run_tiny(TinyGuest::Idle).await;
    if !vms.facts.reboots {
        return reboot_is_refused(vms.reboot(VM, true).await);
    }
    let after = vms.reboot(VM, true).await.expect("RebootVm succeeds").record;
    assert_eq!(after.state, VmState::Running);
    let boots = if vms.column().is_real() { 2 } else { 1 };
    vms.console_shows(VM, &TinyGuest::Idle.banner(), boots).await;
    assert_eq!(pid_of(&before) == pid_of(&after), vms.facts.reboot_in_place, "as its capabilities say");
    if vms.facts.reboot_in_place {
        return CaseVerdict::Served;
    }
    CaseVerdict::Emulated("its process can be used once: a new one is started".to_owned())
}

/// Each boot after a shutdown starts a new process from the stored configuration.
pub(super) async fn boot_after_shutdown(vms: DaemonLife) -> CaseVerdict {
    let mut pids = vec![pid_of(&*vms.run_tiny(TinyGuest::Idle).await)];
    for boot in 2..=3 {
        let down = vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
        assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(vms.facts.ordered)));
        pids.push(pid_of(&vms.boot_again(VM).await.expect("BootVm succeeds").record));
        vms.console_shows(VM, &TinyGuest::Idle.banner(), boot).await;
    }
    pids.sort_unstable();
    pids.dedup();
    // An attached VMM that outlives its VM is used again.
    let one = vms.facts.attached && vms.facts.powers_off;
    assert_eq!(pids.len(), if one { 1 } else { 3 }, "the processes: {pids:?}");
    CaseVerdict::Served
}

/// PauseVm stops the guest's CPUs, and ResumeVm starts them again.
pub(super) async fn a_paused_guest_stands_still(vms: DaemonLife) -> CaseVerdict {
    let busy = vms.run_tiny(TinyGuest::Echo).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    vms.until_still(&busy, true).await;
    vms.resume(VM).await.expect("ResumeVm succeeds");
    vms.until_still(&busy, false).await;
    CaseVerdict::Served
}
