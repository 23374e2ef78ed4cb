//! Cases about the end of a run: the shutdown ladder, and the guest's own actions.

use std::sync::Arc;

use vmm_core::spec::RestartMode;
use vmm_core::state::{EndedBy, Phase, VmState};
use vmm_core::store::VmRecord;
use vmm_service::ServiceError;

use super::column::ObeyingGuest;
use super::fields::{Judgement, judge};
use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM, pid_of};
use crate::guests::TinyGuest;

/// The numbers of RestartMode on the wire.
pub(super) const NEVER: i32 = 1;
pub(super) const GUEST_REBOOT: i32 = 2;
pub(super) const ON_FAILURE: i32 = 3;
pub(super) const ALWAYS: i32 = 4;

/// Starts the guest that ends when it is asked to.
///
/// # Errors
/// The reason why this machine cannot run one.
async fn run_obeying(vms: &DaemonLife) -> Result<(), String> {
    match vms.column().obeying() {
        ObeyingGuest::Tiny(guest) => drop(vms.run_tiny(guest).await),
        ObeyingGuest::Linux => {
            let linux = vms.column().linux()?;
            vms.run(VM, vms.linux_config(&linux, "")).await;
            vms.console_shows(VM, "vmcp-guest: ready", 1).await;
        }
    }
    Ok(())
}

/// Shuts the obeying guest down. Returns true if the guest ended the run.
async fn obeys(vms: &DaemonLife) -> bool {
    let down = vms.shutdown_obeying(VM).await.expect("ShutdownVm succeeds");
    assert_eq!((down.record.state, down.record.status.phase), (VmState::Shutdown, Phase::Stopped));
    assert!([vms.facts.asked, vms.facts.ordered].map(Some).contains(&down.ended_by), "{:?}", down.ended_by);
    down.ended_by == Some(vms.facts.asked)
}

/// Returns the number of boots in which a guest may be asked until it obeys.
///
/// On an emulated microvm, a press of the power button has no effect in about one of thirty boots
/// of Linux, also if QEMU is driven by hand. The guest keeps running and answers at its console.
/// The tiny guests always obey.
fn attempts(vms: &DaemonLife) -> usize {
    match vms.column().obeying() {
        ObeyingGuest::Tiny(_) => 1,
        ObeyingGuest::Linux => 4,
    }
}

pub(super) async fn guest_obeys_shutdown(vms: DaemonLife) -> CaseVerdict {
    asked_to_end(&vms, false).await
}

/// A paused guest is resumed first, because it could not obey otherwise.
pub(super) async fn paused_guest_obeys_shutdown(vms: DaemonLife) -> CaseVerdict {
    asked_to_end(&vms, true).await
}

async fn asked_to_end(vms: &DaemonLife, paused: bool) -> CaseVerdict {
    for _ in 0..attempts(vms) {
        if let Err(why) = run_obeying(vms).await {
            return CaseVerdict::NotRun(why);
        }
        if paused {
            vms.pause(VM).await.expect("PauseVm succeeds");
        }
        if obeys(vms).await {
            let again = vms.shutdown(VM, 30).await.expect("ShutdownVm succeeds");
            assert_eq!(again.ended_by, Some(EndedBy::AlreadyStopped));
            return CaseVerdict::Served;
        }
        vms.delete(VM, false).await.expect("DeleteVm succeeds");
    }
    panic!("the guest never obeyed")
}

pub(super) async fn guest_ignores_shutdown(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    // Only force may end an attached VMM, so a VM without a power-off keeps running.
    if !vms.facts.powers_off {
        let refused = vms.shutdown(VM, 1).await;
        assert!(matches!(refused, Err(ServiceError::Deadline(_))), "{refused:?}");
        assert_eq!(vms.record(VM).state, VmState::Running, "it runs on");
        let text = "DEADLINE_EXCEEDED: only `force` ends a process that another program started";
        return CaseVerdict::Rejected(text.to_owned());
    }
    let down = vms.shutdown(VM, 1).await.expect("ShutdownVm succeeds");
    assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(vms.facts.ordered)));
    CaseVerdict::Served
}

pub(super) async fn forced_shutdown(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    for paused in [false, true] {
        if paused {
            vms.boot_again(VM).await.expect("BootVm succeeds");
            vms.pause(VM).await.expect("PauseVm succeeds");
        }
        let down = vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
        assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(vms.facts.ordered)));
        assert!(vms.column().processes(&vms.rig.runtime_dir()).is_empty(), "its process has really gone");
    }
    CaseVerdict::Served
}

pub(super) async fn guest_powers_off(vms: DaemonLife) -> CaseVerdict {
    vms.run(VM, vms.config(TinyGuest::PowerOff)).await;
    vms.console_shows(VM, &TinyGuest::PowerOff.banner(), 1).await;
    if !vms.facts.power_off_seen {
        // The run continues, and operations on the VM succeed.
        vms.pause(VM).await.expect("PauseVm succeeds");
        assert_eq!(vms.resume(VM).await.expect("ResumeVm succeeds").record.state, VmState::Running);
        return CaseVerdict::NotApplicable(vms.facts.power_off.to_owned());
    }
    let down = vms.until_down(VM).await;
    let reported = vms.facts.power_off_told;
    if reported {
        assert_end(&down, Phase::Stopped, "guest-power-off", Some(EndedBy::Guest));
    } else {
        // The VMM has gone without a reason that the backend can see, which counts as a failure.
        assert_end(&down, Phase::Failed, "unknown", None);
    }
    if vms.column().imports() {
        return CaseVerdict::Served;
    }
    vms.boot_again(VM).await.expect("it can be booted again");
    vms.console_shows(VM, &TinyGuest::PowerOff.banner(), 2).await;
    if reported { CaseVerdict::Served } else { CaseVerdict::Emulated(vms.facts.power_off.to_owned()) }
}

pub(super) async fn power_off_under_always(vms: DaemonLife) -> CaseVerdict {
    if !vms.facts.power_off_seen {
        return CaseVerdict::NotApplicable(vms.facts.power_off.to_owned());
    }
    if let Err(refused) = run_with_policy(&vms, TinyGuest::PowerOff, ALWAYS, 1).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    assert_eq!(
        (down.status.phase, down.status.reason.as_str()),
        (Phase::Failed, "restart-loop"),
        "{down:#?}"
    );
    let console = vms.console_shows(VM, &TinyGuest::PowerOff.banner(), 2).await;
    assert_eq!(console.matches(&TinyGuest::PowerOff.banner()).count(), 2, "once, and once more by policy");
    CaseVerdict::Served
}

pub(super) async fn reset_under_never(vms: DaemonLife) -> CaseVerdict {
    if let Err(refused) = run_with_policy(&vms, TinyGuest::Reset, NEVER, 0).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
    CaseVerdict::Served
}

pub(super) async fn reset_under_guest_reboot(vms: DaemonLife) -> CaseVerdict {
    // One boot and two restarts by policy make three banners.
    match run_with_policy(&vms, TinyGuest::Reset, GUEST_REBOOT, 2).await {
        Ok(first) => assert_eq!(first.state, VmState::Running),
        Err(refused) => return refused,
    }
    if !vms.facts.reset_seen {
        return resets_unseen(&vms, TinyGuest::Reset).await;
    }
    assert_restart_loop(&vms, TinyGuest::Reset, 3).await;
    restarted(&vms)
}

pub(super) async fn triple_fault_under_never(vms: DaemonLife) -> CaseVerdict {
    if let Err(refused) = run_with_policy(&vms, TinyGuest::TripleFault, NEVER, 0).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    if vms.facts.triple_fault_fails {
        // A software KVM reports some triple faults as a reset.
        assert!(matches!(down.status.reason.as_str(), "guest-crash" | "guest-reset"), "{down:#?}");
        return CaseVerdict::Served;
    }
    assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
    CaseVerdict::Served
}

pub(super) async fn triple_fault_under_guest_reboot(vms: DaemonLife) -> CaseVerdict {
    if let Err(refused) = run_with_policy(&vms, TinyGuest::TripleFault, GUEST_REBOOT, 2).await {
        return refused;
    }
    if !vms.facts.reset_seen {
        return resets_unseen(&vms, TinyGuest::TripleFault).await;
    }
    if vms.facts.triple_fault_fails {
        let down = vms.until_down(VM).await;
        assert_eq!(down.status.phase, Phase::Failed);
        assert!(matches!(down.status.reason.as_str(), "guest-crash" | "restart-loop"), "{down:#?}");
        return CaseVerdict::NotApplicable("a triple fault ends the run as a failure".to_owned());
    }
    assert_restart_loop(&vms, TinyGuest::TripleFault, 3).await;
    restarted(&vms)
}

pub(super) async fn panic_under_never(vms: DaemonLife) -> CaseVerdict {
    panic_under(vms, NEVER, "guest-crash", 1).await
}

pub(super) async fn panic_under_on_failure(vms: DaemonLife) -> CaseVerdict {
    panic_under(vms, ON_FAILURE, "restart-loop", 2).await
}

/// A panic that the VMM notices ends the run as a failure. If the VMM does not notice it, the VM
/// keeps running. CreateVm warns of a policy that acts on failures either way, because a guest may
/// panic before it has loaded the driver of the panic device.
async fn panic_under(vms: DaemonLife, mode: i32, reason: &str, boots: usize) -> CaseVerdict {
    let config = vms.config_with_policy(TinyGuest::Panic, mode, 1);
    if let Err(refused) = run_with_policy(&vms, TinyGuest::Panic, mode, 1).await {
        return refused;
    }
    let spec = vmm_core::spec::VmSpec::parse(&config).expect("it was accepted");
    let warnings = vms.backend.check(&spec).warnings;
    let warning = warnings.iter().find(|warning| warning.message.contains("panic=1"));
    let banner = TinyGuest::Panic.banner();
    if vms.facts.panic_seen && vms.column().name() != "qemu-microvm" {
        // The test's guest drives the device itself. Linux does so once its driver is loaded. The
        // fake has no device, and sees every panic.
        let is_late = mode == ON_FAILURE && vms.column().name() != "fake";
        let expected = is_late.then_some(true);
        assert_eq!(warning.map(|warning| warning.message.contains("pvpanic")), expected, "{warnings:?}");
        let down = vms.until_down(VM).await;
        assert_end(&down, Phase::Failed, reason, None);
        let console = vms.console_shows(VM, &banner, boots).await;
        assert_eq!(console.matches(&banner).count(), boots);
        return CaseVerdict::Served;
    }
    assert_eq!(warning.is_some(), mode == ON_FAILURE, "{warnings:?}");
    vms.console_shows(VM, &banner, 1).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    assert_eq!(vms.resume(VM).await.expect("ResumeVm succeeds").record.state, VmState::Running);
    CaseVerdict::NotApplicable("its machine has no device that reports a panic".to_owned())
}

/// A killed VMM is a failure, so ON_FAILURE starts a new process.
pub(super) async fn on_failure_starts_again(vms: DaemonLife) -> CaseVerdict {
    let first = match run_with_policy(&vms, TinyGuest::Idle, ON_FAILURE, 0).await {
        Ok(first) => first,
        Err(refused) => return refused,
    };
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 1).await;
    vms.column().signal(&first, vmm_host::process::Signal::KILL);
    let again = |record: &VmRecord| {
        record.state == VmState::Running
            && record.run.as_ref().is_some_and(|run| run.process.pid != pid_of(&first))
    };
    let second = vms.until(VM, "running in a new process", again).await;
    assert_eq!(second.status.restarts, 1);
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 2).await;
    CaseVerdict::Served
}

/// The backend defines the meaning of an unset policy, and warns if its meaning differs from the
/// common one.
pub(super) async fn restart_policy_unset(vms: DaemonLife) -> CaseVerdict {
    let Judgement::Accepted(verdict) =
        judge(&vms, &vms.config(TinyGuest::Reset), "config.restart_policy").await
    else {
        panic!("nothing is wrong with leaving it out")
    };
    vms.boot(VM).await.expect("BootVm succeeds");
    match vms.backend.capabilities().default_restart_mode {
        RestartMode::Never => {
            let down = vms.until_down(VM).await;
            assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
            assert!(matches!(verdict, CaseVerdict::Emulated(_)), "it differs, and says so: {verdict:?}");
        }
        RestartMode::GuestReboot if !vms.facts.reset_seen => {
            return resets_unseen(&vms, TinyGuest::Reset).await;
        }
        RestartMode::GuestReboot => {
            let boots = 1 + vmm_core::spec::DEFAULT_MAX_RESTARTS as usize;
            assert_restart_loop(&vms, TinyGuest::Reset, boots).await;
        }
        other @ (RestartMode::OnFailure | RestartMode::Always) => panic!("{other:?} is nobody's default"),
    }
    verdict
}

/// Creates and boots a VM with a restart policy. `Err` is the verdict if CreateVm refuses the
/// policy, as it does if the daemon cannot start the VMM.
async fn run_with_policy(
    vms: &DaemonLife,
    guest: TinyGuest,
    mode: i32,
    max_restarts: i32,
) -> Result<Arc<VmRecord>, CaseVerdict> {
    let config = vms.config_with_policy(guest, mode, max_restarts);
    match judge(vms, &config, "config.restart_policy").await {
        Judgement::Accepted(_) => Ok(vms.boot(VM).await.expect("BootVm succeeds").record),
        Judgement::Refused(verdict) => {
            assert!(vms.facts.attached, "only an attached VMM cannot be started again: {verdict:?}");
            Err(verdict)
        }
    }
}

/// Checks that a VM keeps running whose guest resets in place without the VMM's notice.
async fn resets_unseen(vms: &DaemonLife, guest: TinyGuest) -> CaseVerdict {
    vms.console_shows(VM, &guest.banner(), 4).await;
    let record = vms.record(VM);
    assert_eq!((record.state, record.status.restarts), (VmState::Running, 0), "{record:#?}");
    CaseVerdict::NotApplicable(vms.facts.reset.to_owned())
}

fn restarted(vms: &DaemonLife) -> CaseVerdict {
    if vms.facts.reset_in_place {
        return CaseVerdict::Served;
    }
    CaseVerdict::Emulated("its process ends with a reset: a new one is started".to_owned())
}

async fn assert_restart_loop(vms: &DaemonLife, guest: TinyGuest, boots: usize) {
    let down = vms.until_down(VM).await;
    assert_eq!(
        (down.status.phase, down.status.reason.as_str()),
        (Phase::Failed, "restart-loop"),
        "{down:#?}"
    );
    vms.console_shows(VM, &guest.banner(), boots).await;
}

fn assert_end(record: &VmRecord, phase: Phase, reason: &str, ended_by: Option<EndedBy>) {
    let found = (record.status.phase, record.status.reason.as_str(), record.ended_by);
    assert_eq!(found, (phase, reason, ended_by), "{record:#?}");
}
