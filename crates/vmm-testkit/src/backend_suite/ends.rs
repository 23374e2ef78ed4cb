//! Cases about the end of a run: the shutdown ladder, and the guest's own actions.

use std::sync::Arc;

use vmm_core::spec::RestartMode;
use vmm_core::state::{EndedBy, Phase, VmState};
use vmm_core::store::VmRecord;
use vmm_service::ServiceError;

use super::column::Obeying;
use super::fields::{Judgement, judge};
use super::results::Verdict;
use super::rig::{VM, Vms, pid_of};
use crate::guests::Guest;

/// The numbers of RestartMode on the wire.
pub(super) const NEVER: i32 = 1;
pub(super) const GUEST_REBOOT: i32 = 2;
pub(super) const ON_FAILURE: i32 = 3;
pub(super) const ALWAYS: i32 = 4;

/// Starts the guest that ends when it is asked to.
///
/// # Errors
/// The reason why this machine cannot run one.
async fn run_obeying(vms: &Vms) -> Result<(), String> {
    match vms.column().obeying() {
        Obeying::Tiny(guest) => drop(vms.run_tiny(guest).await),
        Obeying::Linux => {
            let linux = vms.column().linux()?;
            vms.run(VM, vms.linux_config(&linux, "")).await;
            vms.console_shows(VM, "vmcp-guest: ready", 1).await;
        }
    }
    Ok(())
}

/// Shuts the obeying guest down. Returns true if the guest ended the run.
async fn obeys(vms: &Vms) -> bool {
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
fn attempts(vms: &Vms) -> usize {
    match vms.column().obeying() {
        Obeying::Tiny(_) => 1,
        Obeying::Linux => 4,
    }
}

pub(super) async fn guest_obeys_shutdown(vms: Vms) -> Verdict {
    asked_to_end(&vms, false).await
}

/// A paused guest is resumed first, because it could not obey otherwise.
pub(super) async fn paused_guest_obeys_shutdown(vms: Vms) -> Verdict {
    asked_to_end(&vms, true).await
}

async fn asked_to_end(vms: &Vms, paused: bool) -> Verdict {
    for _ in 0..attempts(vms) {
        if let Err(why) = run_obeying(vms).await {
            return Verdict::NotRun(why);
        }
        if paused {
            vms.pause(VM).await.expect("PauseVm succeeds");
        }
        if obeys(vms).await {
            let again = vms.shutdown(VM, 30).await.expect("ShutdownVm succeeds");
            assert_eq!(again.ended_by, Some(EndedBy::AlreadyStopped));
            return Verdict::Served;
        }
        vms.delete(VM, false).await.expect("DeleteVm succeeds");
    }
    panic!("the guest never obeyed")
}

pub(super) async fn guest_ignores_shutdown(vms: Vms) -> Verdict {
    vms.run_tiny(Guest::Idle).await;
    // Only force may end an attached VMM, so a VM without a power-off keeps running.
    if !vms.facts.powers_off {
        let refused = vms.shutdown(VM, 1).await;
        assert!(matches!(refused, Err(ServiceError::Deadline(_))), "{refused:?}");
        assert_eq!(vms.record(VM).state, VmState::Running, "it runs on");
        let text = "DEADLINE_EXCEEDED: only `force` ends a process that another program started";
        return Verdict::Rejected(text.to_owned());
    }
    let down = vms.shutdown(VM, 1).await.expect("ShutdownVm succeeds");
    assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(vms.facts.ordered)));
    Verdict::Served
}

pub(super) async fn forced_shutdown(vms: Vms) -> Verdict {
    vms.run_tiny(Guest::Idle).await;
    for paused in [false, true] {
        if paused {
            vms.boot_again(VM).await.expect("BootVm succeeds");
            vms.pause(VM).await.expect("PauseVm succeeds");
        }
        let down = vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
        assert_eq!((down.record.state, down.ended_by), (VmState::Shutdown, Some(vms.facts.ordered)));
        assert!(vms.column().processes(&vms.rig.runtime_dir()).is_empty(), "its process has really gone");
    }
    Verdict::Served
}

pub(super) async fn guest_powers_off(vms: Vms) -> Verdict {
    vms.run(VM, vms.config(Guest::PowerOff)).await;
    vms.console_shows(VM, &Guest::PowerOff.banner(), 1).await;
    if !vms.facts.power_off_seen {
        // The run continues, and operations on the VM succeed.
        vms.pause(VM).await.expect("PauseVm succeeds");
        assert_eq!(vms.resume(VM).await.expect("ResumeVm succeeds").record.state, VmState::Running);
        return Verdict::NotApplicable(vms.facts.power_off.to_owned());
    }
    let down = vms.until_down(VM).await;
    let told = vms.facts.power_off_told;
    if told {
        assert_end(&down, Phase::Stopped, "guest-power-off", Some(EndedBy::Guest));
    } else {
        // The VMM has gone without a reason that the backend can see, which counts as a failure.
        assert_end(&down, Phase::Failed, "unknown", None);
    }
    if vms.column().imports() {
        return Verdict::Served;
    }
    vms.boot_again(VM).await.expect("it can be booted again");
    vms.console_shows(VM, &Guest::PowerOff.banner(), 2).await;
    if told { Verdict::Served } else { Verdict::Emulated(vms.facts.power_off.to_owned()) }
}

pub(super) async fn power_off_under_always(vms: Vms) -> Verdict {
    if !vms.facts.power_off_seen {
        return Verdict::NotApplicable(vms.facts.power_off.to_owned());
    }
    if let Err(refused) = run_with_policy(&vms, Guest::PowerOff, ALWAYS, 1).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    assert_eq!(
        (down.status.phase, down.status.reason.as_str()),
        (Phase::Failed, "restart-loop"),
        "{down:#?}"
    );
    let console = vms.console_shows(VM, &Guest::PowerOff.banner(), 2).await;
    assert_eq!(console.matches(&Guest::PowerOff.banner()).count(), 2, "once, and once more by policy");
    Verdict::Served
}

pub(super) async fn reset_under_never(vms: Vms) -> Verdict {
    if let Err(refused) = run_with_policy(&vms, Guest::Reset, NEVER, 0).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
    Verdict::Served
}

pub(super) async fn reset_under_guest_reboot(vms: Vms) -> Verdict {
    // One boot and two restarts by policy make three banners.
    match run_with_policy(&vms, Guest::Reset, GUEST_REBOOT, 2).await {
        Ok(first) => assert_eq!(first.state, VmState::Running),
        Err(refused) => return refused,
    }
    if !vms.facts.reset_seen {
        return resets_unseen(&vms, Guest::Reset).await;
    }
    assert_restart_loop(&vms, Guest::Reset, 3).await;
    restarted(&vms)
}

pub(super) async fn triple_fault_under_never(vms: Vms) -> Verdict {
    if let Err(refused) = run_with_policy(&vms, Guest::TripleFault, NEVER, 0).await {
        return refused;
    }
    let down = vms.until_down(VM).await;
    if vms.facts.triple_fault_fails {
        // A software KVM reports some triple faults as a reset.
        assert!(matches!(down.status.reason.as_str(), "guest-crash" | "guest-reset"), "{down:#?}");
        return Verdict::Served;
    }
    assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
    Verdict::Served
}

pub(super) async fn triple_fault_under_guest_reboot(vms: Vms) -> Verdict {
    if let Err(refused) = run_with_policy(&vms, Guest::TripleFault, GUEST_REBOOT, 2).await {
        return refused;
    }
    if !vms.facts.reset_seen {
        return resets_unseen(&vms, Guest::TripleFault).await;
    }
    if vms.facts.triple_fault_fails {
        let down = vms.until_down(VM).await;
        assert_eq!(down.status.phase, Phase::Failed);
        assert!(matches!(down.status.reason.as_str(), "guest-crash" | "restart-loop"), "{down:#?}");
        return Verdict::NotApplicable("a triple fault ends the run as a failure".to_owned());
    }
    assert_restart_loop(&vms, Guest::TripleFault, 3).await;
    restarted(&vms)
}

pub(super) async fn panic_under_never(vms: Vms) -> Verdict {
    panic_under(vms, NEVER, "guest-crash", 1).await
}

pub(super) async fn panic_under_on_failure(vms: Vms) -> Verdict {
    panic_under(vms, ON_FAILURE, "restart-loop", 2).await
}

/// A panic that the VMM notices ends the run as a failure. If the VMM does not notice it, the VM
/// keeps running, and CreateVm warns of a policy that acts on failures.
async fn panic_under(vms: Vms, mode: i32, reason: &str, boots: usize) -> Verdict {
    let config = vms.config_with_policy(Guest::Panic, mode, 1);
    if let Err(refused) = run_with_policy(&vms, Guest::Panic, mode, 1).await {
        return refused;
    }
    let spec = vmm_core::spec::VmSpec::parse(&config).expect("it was accepted");
    let warnings = vms.backend.check(&spec).warnings;
    let warning = warnings.iter().find(|warning| warning.message.contains("panic=1"));
    let banner = Guest::Panic.banner();
    if vms.facts.panic_seen && vms.column().name() != "qemu-microvm" {
        assert_eq!(warning, None);
        let down = vms.until_down(VM).await;
        assert_end(&down, Phase::Failed, reason, None);
        let console = vms.console_shows(VM, &banner, boots).await;
        assert_eq!(console.matches(&banner).count(), boots);
        return Verdict::Served;
    }
    assert_eq!(warning.is_some(), mode == ON_FAILURE, "{warnings:?}");
    vms.console_shows(VM, &banner, 1).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    assert_eq!(vms.resume(VM).await.expect("ResumeVm succeeds").record.state, VmState::Running);
    Verdict::NotApplicable("its machine has no device that reports a panic".to_owned())
}

/// A killed VMM is a failure, so ON_FAILURE starts a new process.
pub(super) async fn on_failure_starts_again(vms: Vms) -> Verdict {
    let first = match run_with_policy(&vms, Guest::Idle, ON_FAILURE, 0).await {
        Ok(first) => first,
        Err(refused) => return refused,
    };
    vms.console_shows(VM, &Guest::Idle.banner(), 1).await;
    vms.column().signal(&first, vmm_host::process::Signal::KILL);
    let again = |record: &VmRecord| {
        record.state == VmState::Running
            && record.run.as_ref().is_some_and(|run| run.process.pid != pid_of(&first))
    };
    let second = vms.until(VM, "running in a new process", again).await;
    assert_eq!(second.status.restarts, 1);
    vms.console_shows(VM, &Guest::Idle.banner(), 2).await;
    Verdict::Served
}

/// The backend defines the meaning of an unset policy, and warns if its meaning differs from the
/// common one.
pub(super) async fn restart_policy_unset(vms: Vms) -> Verdict {
    let Judgement::Accepted(verdict) = judge(&vms, &vms.config(Guest::Reset), "config.restart_policy").await
    else {
        panic!("nothing is wrong with leaving it out")
    };
    vms.boot(VM).await.expect("BootVm succeeds");
    match vms.backend.capabilities().default_restart_mode {
        RestartMode::Never => {
            let down = vms.until_down(VM).await;
            assert_end(&down, Phase::Stopped, "guest-reset", Some(EndedBy::Guest));
            assert!(matches!(verdict, Verdict::Emulated(_)), "it differs, and says so: {verdict:?}");
        }
        RestartMode::GuestReboot if !vms.facts.reset_seen => return resets_unseen(&vms, Guest::Reset).await,
        RestartMode::GuestReboot => {
            let boots = 1 + vmm_core::spec::DEFAULT_MAX_RESTARTS as usize;
            assert_restart_loop(&vms, Guest::Reset, boots).await;
        }
        other @ (RestartMode::OnFailure | RestartMode::Always) => panic!("{other:?} is nobody's default"),
    }
    verdict
}

/// Creates and boots a VM with a restart policy. `Err` is the verdict if CreateVm refuses the
/// policy, as it does if the daemon cannot start the VMM.
async fn run_with_policy(
    vms: &Vms,
    guest: Guest,
    mode: i32,
    max_restarts: i32,
) -> Result<Arc<VmRecord>, Verdict> {
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
async fn resets_unseen(vms: &Vms, guest: Guest) -> Verdict {
    vms.console_shows(VM, &guest.banner(), 4).await;
    let record = vms.record(VM);
    assert_eq!((record.state, record.status.restarts), (VmState::Running, 0), "{record:#?}");
    Verdict::NotApplicable(vms.facts.reset.to_owned())
}

fn restarted(vms: &Vms) -> Verdict {
    if vms.facts.reset_in_place {
        return Verdict::Served;
    }
    Verdict::Emulated("its process ends with a reset: a new one is started".to_owned())
}

async fn assert_restart_loop(vms: &Vms, guest: Guest, boots: usize) {
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
