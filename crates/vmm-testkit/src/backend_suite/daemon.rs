//! Cases in which the daemon ends and another one takes over. The VMs continue, or their end is
//! reported truthfully.

use std::sync::Arc;

use vmm_core::state::{Phase, VmState};
use vmm_host::process::Signal;
use vmm_service::ServiceError;

use super::results::CaseVerdict;
use super::rig::{DaemonLife, Rig, VM, pid_of};
use crate::guests::TinyGuest;

/// First life: leaves a running VM.
pub(super) async fn leave_running(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    CaseVerdict::Served
}

/// First life: leaves a paused VM.
pub(super) async fn leave_paused(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    CaseVerdict::Served
}

pub(super) async fn find_running(vms: DaemonLife) -> CaseVerdict {
    find(&vms, VmState::Running).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    vms.resume(VM).await.expect("ResumeVm succeeds");
    carry_on(&vms).await
}

pub(super) async fn find_paused(vms: DaemonLife) -> CaseVerdict {
    find(&vms, VmState::Paused).await;
    vms.resume(VM).await.expect("ResumeVm succeeds");
    carry_on(&vms).await
}

async fn find(vms: &DaemonLife, state: VmState) {
    let found = vms.record(VM);
    assert_eq!((found.state, found.status.phase), (state, Phase::at_rest(state)), "{found:#?}");
    assert!(found.generation > 1 && found.intent.is_none());
}

/// Checks that an adopted VMM is watched and its VM can be booted again.
async fn carry_on(vms: &DaemonLife) -> CaseVerdict {
    let adopted = vms.record(VM);
    vms.column().signal(&adopted, Signal::KILL);
    let down = vms.until_down(VM).await;
    assert_eq!(down.status.phase, Phase::Failed, "{down:#?}");
    let again = vms.boot_again(VM).await.expect("BootVm succeeds").record;
    assert_ne!(pid_of(&again), pid_of(&adopted));
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 2).await;
    CaseVerdict::Served
}

/// Kills the VMM while no daemon runs.
pub(super) async fn vmm_dies(rig: Arc<Rig>) {
    rig.column.signal(&rig.stored(), Signal::KILL);
    let gone = || rig.column.processes(&rig.runtime_dir()).is_empty();
    super::rig::eventually(|| "the VMM is gone".to_owned(), gone).await;
}

pub(super) async fn find_dead(vms: DaemonLife) -> CaseVerdict {
    // A VMM that has not quite ended yet is unreachable for a moment.
    let down = vms.until_down(VM).await;
    assert_eq!((down.state, down.status.phase), (VmState::Shutdown, Phase::Failed), "{down:#?}");
    assert_ne!(down.status.reason.as_str(), "", "it says why, or that it is unknown");
    vms.boot_again(VM).await.expect("BootVm succeeds");
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 2).await;
    CaseVerdict::Served
}

/// Stops the VMM with SIGSTOP while no daemon runs.
pub(super) async fn vmm_hangs(rig: Arc<Rig>) {
    rig.column.signal(&rig.stored(), Signal::STOP);
}

/// Checks that a hanging VMM is shown as unreachable and left alone until force is used.
pub(super) async fn find_hanging(vms: DaemonLife) -> CaseVerdict {
    let shown = vms.record(VM);
    assert_eq!((shown.state, shown.status.phase), (VmState::Running, Phase::Unreachable), "{shown:#?}");
    let error = vms.pause(VM).await.expect_err("it is unreachable");
    assert!(matches!(error, ServiceError::Unavailable(_)), "{error:?}");
    assert_eq!(vms.column().processes(&vms.rig.runtime_dir()).len(), 1, "nobody touched it");
    let down = vms.force_shutdown(VM).await.expect("ShutdownVm with force succeeds");
    assert_eq!(down.record.state, VmState::Shutdown);
    vms.boot_again(VM).await.expect("BootVm succeeds");
    CaseVerdict::Served
}
