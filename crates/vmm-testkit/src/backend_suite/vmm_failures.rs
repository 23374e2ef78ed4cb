//! Cases about faults of the VMM: it dies, it hangs, or its kernel is broken.

use std::time::Duration;

use vmm_core::state::{EndedBy, Phase, VmState};
use vmm_core::store::VmRecord;
use vmm_host::process::Signal;
use vmm_service::{ListQuery, ServiceError};

use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM, pid_of};
use crate::guests::TinyGuest;

pub(super) async fn vmm_killed_while_running(vms: DaemonLife) -> CaseVerdict {
    dies(&vms, Signal::KILL, false).await
}

pub(super) async fn vmm_killed_while_paused(vms: DaemonLife) -> CaseVerdict {
    dies(&vms, Signal::KILL, true).await
}

pub(super) async fn vmm_crashes_while_running(vms: DaemonLife) -> CaseVerdict {
    dies(&vms, Signal::SEGV, false).await
}

pub(super) async fn vmm_crashes_while_paused(vms: DaemonLife) -> CaseVerdict {
    dies(&vms, Signal::SEGV, true).await
}

async fn dies(vms: &DaemonLife, signal: Signal, paused: bool) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    if paused {
        vms.pause(VM).await.expect("PauseVm succeeds");
    }
    let running = vms.record(VM);
    while vms.record(VM).state.is_live() {
        // The signal is repeated, because a program in Rust ignores the first SIGSEGV from outside:
        // its handler restores the default action and returns.
        vms.column().signal(&running, signal);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let down = vms.until_down(VM).await;
    let found = (down.status.phase, down.status.reason.as_str(), down.ended_by);
    // An attached VMM is not the daemon's child, so its exit status is unknown.
    let reason = if vms.facts.attached { "unknown" } else { "vmm-failed" };
    assert_eq!(found, (Phase::Failed, reason, None), "{down:#?}");
    assert_ne!(down.status.message, "", "it says what is known of the end");
    // The files that the dead VMM left must not prevent the next boot.
    assert_eq!(vms.boot_again(VM).await.expect("BootVm succeeds").record.state, VmState::Running);
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 2).await;
    CaseVerdict::Served
}

/// The end of a VMM during ShutdownVm fulfils the request, so ShutdownVm succeeds.
pub(super) async fn vmm_killed_while_stopping(vms: DaemonLife) -> CaseVerdict {
    let running = vms.run_tiny(TinyGuest::Idle).await;
    let asking = tokio::spawn({
        let vms = vms.clone();
        async move { vms.shutdown(VM, 60).await }
    });
    vms.until(VM, "being shut down", |record| record.status.phase == Phase::Stopping).await;
    vms.column().signal(&running, Signal::KILL);
    let down = asking.await.expect("the call ends").expect("ShutdownVm succeeds");
    assert_eq!(down.record.state, VmState::Shutdown);
    let rungs = [Some(EndedBy::Guest), Some(vms.facts.asked)];
    assert!(rungs.contains(&down.ended_by), "{:?}", down.ended_by);
    CaseVerdict::Served
}

/// Reads work, operations return UNAVAILABLE, and force works.
pub(super) async fn vmm_hangs(vms: DaemonLife) -> CaseVerdict {
    let running = vms.run_tiny(TinyGuest::Idle).await;
    vms.create("other", vms.config(TinyGuest::Idle)).await;
    vms.column().signal(&running, Signal::STOP);
    let error = vms.pause(VM).await.expect_err("a VMM that hangs pauses nothing");
    assert!(matches!(error, ServiceError::Unavailable(_)), "{error:?}");
    assert_eq!(vms.service.list(&ListQuery::default()).expect("ListVms answers").total_count, 2);
    let shown = vms.record(VM);
    assert_eq!(
        (shown.state, shown.status.phase),
        (VmState::Running, Phase::Unreachable),
        "the last proven state"
    );
    for answer in [vms.resume(VM).await, vms.shutdown(VM, 1).await, vms.reboot(VM, false).await] {
        let error = answer.expect_err("every operation but force is refused");
        assert!(matches!(error, ServiceError::Unavailable(_)), "{error:?}");
    }
    vms.boot("other").await.expect("another VM is not concerned");
    let down = vms.force_shutdown(VM).await.expect("ShutdownVm with force succeeds");
    assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(EndedBy::Sigkill)));
    vms.boot_again(VM).await.expect("BootVm succeeds");
    CaseVerdict::Served
}

pub(super) async fn hanging_vmm_is_deleted(vms: DaemonLife) -> CaseVerdict {
    let running = vms.run_tiny(TinyGuest::Idle).await;
    vms.column().signal(&running, Signal::STOP);
    vms.delete(VM, true).await.expect("DeleteVm with force succeeds");
    assert!(matches!(vms.get(VM), Err(ServiceError::NotFound(_))));
    assert!(vms.column().processes(&vms.rig.runtime_dir()).is_empty());
    CaseVerdict::Served
}

/// A VMM that stops answering is shown as unreachable, and is in use again when it answers.
pub(super) async fn vmm_comes_back(vms: DaemonLife) -> CaseVerdict {
    let running = vms.run_tiny(TinyGuest::Idle).await;
    vms.column().signal(&running, Signal::STOP);
    vms.until(VM, "unreachable", |record| record.status.phase == Phase::Unreachable).await;
    vms.column().signal(&running, Signal::CONT);
    let back = |record: &VmRecord| record.status.phase == Phase::Running;
    let back = vms.until(VM, "reachable again", back).await;
    assert_eq!((back.state, pid_of(&back)), (VmState::Running, pid_of(&running)));
    vms.pause(VM).await.expect("PauseVm succeeds");
    CaseVerdict::Served
}

/// A kernel that looks right and cannot be loaded is reported, the start is undone, and the VM can
/// be deleted.
pub(super) async fn broken_kernel_leaves_nothing(vms: DaemonLife) -> CaseVerdict {
    let mut config = vms.config(TinyGuest::Idle);
    let whole = TinyGuest::Idle.elf();
    let broken = vms.rig.dir().join("broken.elf");
    // The file ends after the ELF header, so its program headers are missing.
    std::fs::write(&broken, &whole[..64]).expect("the file can be written");
    if let Some(boot) = &mut config.boot {
        boot.kernel_path = broken.display().to_string();
    }
    if let Err(error) = vms.try_create(VM, config).await {
        assert!(matches!(error, ServiceError::Invalid(_)), "{error:?}");
        return CaseVerdict::Served;
    }
    let error = vms.boot(VM).await.expect_err("there is no code to run");
    assert!(matches!(error, ServiceError::Precondition(_)), "{error:?}");
    let record = vms.record(VM);
    assert_eq!((record.state, record.status.phase), (VmState::Created, Phase::Failed), "{record:#?}");
    assert!(vms.column().processes(&vms.rig.runtime_dir()).is_empty(), "nothing runs");
    CaseVerdict::Served
}
