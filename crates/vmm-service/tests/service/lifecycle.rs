//! The state table, cell by cell, and what CreateVm refuses.

use std::time::Duration;

use crate::common::*;
use vmm_core::backend::GuestState;
use vmm_core::event::EventKind;
use vmm_core::state::{Admission, EndedBy, Phase, VmOperation, VmState, admit, legal_requests};
use vmm_service::{OperationOutcome, ServiceError, ShutdownOptions};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

async fn ask(vms: &Vms, vm_id: &str, request: VmOperation) -> Result<OperationOutcome, ServiceError> {
    match request {
        VmOperation::Boot => vms.boot(vm_id).await,
        VmOperation::Shutdown => vms.shutdown(vm_id).await,
        VmOperation::Pause => vms.pause(vm_id).await,
        VmOperation::Resume => vms.resume(vm_id).await,
        VmOperation::Reboot => vms.reboot(vm_id).await,
        VmOperation::Update => vms.label(vm_id, "blue").await,
        VmOperation::Delete => vms.delete(vm_id).await,
        VmOperation::ForceDelete => vms.force_delete(vm_id).await,
    }
}

/// Where a request leads that is carried out; `None` means that the VM is gone.
fn target(state: VmState, request: VmOperation) -> Option<VmState> {
    match request {
        VmOperation::Boot | VmOperation::Resume | VmOperation::Reboot => Some(VmState::Running),
        VmOperation::Shutdown => Some(VmState::Shutdown),
        VmOperation::Pause => Some(VmState::Paused),
        VmOperation::Update => Some(state),
        VmOperation::Delete | VmOperation::ForceDelete => None,
    }
}

async fn every_cell(single_use: bool) {
    let mut bed = Bed::new();
    bed.single_use = single_use;
    let vms = bed.start().await;
    for state in VmState::ALL {
        for request in VmOperation::ALL {
            let vm_id = format!("{}-{request:?}", state.name());
            vms.bring_to(&vm_id, bed.config(), state).await;
            let before = vms.record(&vm_id);
            let answer = ask(&vms, &vm_id, request).await;
            let cell = format!("{} in {}", request.name(), state.name());
            match admit(state, request) {
                Admission::Do => {
                    let record = answer.expect(&cell).record;
                    match target(state, request) {
                        Some(next) => {
                            assert_eq!((record.state, vms.state(&vm_id)), (next, next), "{cell}");
                            assert!(record.generation > before.generation, "{cell}");
                        }
                        None => drop(refused(vms.service.get(&vm_id).map(drop), "not-found")),
                    }
                }
                Admission::AlreadyDone => {
                    assert_eq!(*answer.expect(&cell).record, *before, "{cell}");
                    assert_eq!(vms.record(&vm_id), before, "{cell}");
                }
                Admission::Denied => {
                    let text = refused(answer, "illegal-state");
                    assert!(text.contains(&format!("in state {}", state.name())), "{text}");
                    for legal in legal_requests(state) {
                        assert!(text.contains(legal.name()), "{text} names {}", legal.name());
                    }
                    assert_eq!(vms.record(&vm_id), before, "{cell}");
                }
            }
            let lives = vms.world.machine(&vm_id);
            let expected = vms.service.get(&vm_id).ok().filter(|view| view.record.state.is_live());
            assert_eq!(
                lives.is_some(),
                expected.is_some(),
                "{cell}: a machine lives exactly where one is shown"
            );
            if let (Some(machine), Some(view)) = (lives, expected) {
                let guest = if view.record.state == VmState::Paused {
                    GuestState::Paused
                } else {
                    GuestState::Running
                };
                assert_eq!(machine.guest(), Some(guest), "{cell}");
                assert_eq!(view.record.run.as_ref().unwrap().process.pid, machine.pid(), "{cell}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_entry_of_the_state_table() {
    every_cell(false).await;
}

#[tokio::test(start_paused = true)]
async fn every_entry_of_the_state_table_with_single_use_processes() {
    every_cell(true).await;
}

#[tokio::test(start_paused = true)]
async fn every_method_refuses_an_unknown_vm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for vm_id in ["nobody", "", "../etc/passwd", &"x".repeat(5000)] {
        // A request without a name is not one for a VM that does not exist.
        let kind = if vm_id.is_empty() { "invalid" } else { "not-found" };
        for request in VmOperation::ALL {
            refused(ask(&vms, vm_id, request).await, kind);
        }
        refused(vms.force_shutdown(vm_id).await, kind);
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_returns_the_rung_that_ended_the_vm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for (vm_id, expected) in [("obeys", EndedBy::Acpi), ("ignores", EndedBy::Vmm)] {
        let machine = vms.run(vm_id, bed.config()).await;
        if expected == EndedBy::Vmm {
            machine.ignore_shutdown();
        }
        let outcome = vms.shutdown(vm_id).await.unwrap();
        assert_eq!(outcome.ended_by, Some(expected), "{vm_id}");
        assert_eq!(vms.record(vm_id).ended_by, Some(expected), "{vm_id}");
        assert!(!machine.lives());
        let again = vms.shutdown(vm_id).await.unwrap();
        assert_eq!(again.ended_by, Some(EndedBy::AlreadyStopped));
    }
    let machine = vms.run("forced", bed.config()).await;
    assert_eq!(vms.force_shutdown("forced").await.unwrap().ended_by, Some(EndedBy::Vmm));
    assert!(!machine.lives());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_without_force_leaves_a_silent_vmm_running() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for reboots in [false, true] {
        let vm_id = if reboots { "reboots" } else { "ends" };
        let machine = vms.run(vm_id, bed.config()).await;
        machine.stop();
        let answer = if reboots { vms.reboot(vm_id).await } else { vms.shutdown(vm_id).await };
        let text = refused(answer, "unavailable");
        assert!(text.contains("force"), "{text}");
        assert!(machine.lives());
        assert_eq!((vms.state(vm_id), vms.phase(vm_id)), (VmState::Running, Phase::Unreachable));
        assert_eq!(vms.force_shutdown(vm_id).await.unwrap().ended_by, Some(EndedBy::Sigkill));
        assert!(!machine.lives());
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_still_delivers_the_shutdown_request() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.stop();
    let late = async {
        tokio::time::sleep(Duration::from_secs(9)).await;
        machine.go_on();
    };
    let (ended, ()) = tokio::join!(vms.shutdown("a"), late);
    assert_eq!(ended.unwrap().ended_by, Some(EndedBy::Acpi));
}

#[tokio::test(start_paused = true)]
async fn a_paused_guest_is_resumed_before_the_shutdown_request() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.pause("a").await.unwrap();
    assert_eq!(vms.shutdown("a").await.unwrap().ended_by, Some(EndedBy::Acpi));
    assert_eq!(vms.world.calls(ScriptedMethod::Resume), 1);
}

#[tokio::test(start_paused = true)]
async fn the_clients_timeout_is_the_guest_timeout() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await.ignore_shutdown();
    let began = tokio::time::Instant::now();
    let options = ShutdownOptions { force: false, timeout_seconds: 120 };
    vms.service.shutdown("a", options, me()).await.unwrap();
    assert!(began.elapsed().as_secs() >= 120, "on the paused clock");
    for seconds in [-1, 3601] {
        let options = ShutdownOptions { force: false, timeout_seconds: seconds };
        let found = violations(vms.service.shutdown("a", options, me()).await);
        assert_eq!(found[0].0, "timeout_seconds");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reboot_resets_in_place_or_starts_a_new_process() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    vms.force_reboot("a").await.unwrap();
    assert_eq!((machine.resets(), machine.lives()), (1, true), "force resets at once");
    let outcome = vms.reboot("a").await.unwrap();
    assert_eq!(outcome.ended_by, Some(EndedBy::Acpi), "without force the guest is asked");
    assert!(!machine.lives());
    assert_eq!(vms.state("a"), VmState::Running);

    let mut bed = Bed::new();
    bed.single_use = true;
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    vms.force_reboot("a").await.unwrap();
    assert!(!machine.lives());
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Running, 1));
}

#[tokio::test(start_paused = true)]
async fn a_reboot_whose_second_half_fails_leaves_the_vm_shut_down() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_disk("d")).await;
    vms.world.next(
        ScriptedMethod::Launch,
        ScriptedResult::Fail(
            vmm_core::backend::BackendErrorKind::Rejected,
            vmm_core::backend::Effect::NotApplied,
        ),
    );
    let text = refused(vms.reboot("a").await, "precondition");
    assert!(text.contains("SHUTDOWN"), "{text}");
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
    assert_eq!(vms.reason("a"), "boot-failed");
    vms.boot("a").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_first_boot_leaves_the_state_created() {
    use vmm_core::backend::{BackendErrorKind as Kind, Effect};
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.with_disk("d")).await;
    let acts = [
        (ScriptedResult::Fail(Kind::Rejected, Effect::NotApplied), "precondition"),
        (ScriptedResult::Fail(Kind::NotInstalled, Effect::NotApplied), "precondition"),
        (ScriptedResult::DoThenFail(Kind::Protocol, Effect::Unknown), "unavailable"),
        (ScriptedResult::Fail(Kind::Unsupported("a thing"), Effect::NotApplied), "unsupported"),
        (ScriptedResult::do_then_hang(), "unavailable"),
        (ScriptedResult::hang(), "unavailable"),
    ];
    for (act, expected) in acts {
        vms.world.next(ScriptedMethod::Launch, act);
        refused(vms.boot("a").await, expected);
        assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Created, "boot-failed"));
        assert_eq!(vms.world.living(), 0, "nothing of a failed start stays");
        assert_eq!(bed.stored("a"), *vms.record("a"));
    }
    vms.boot("a").await.expect("the VM is none the worse");
}

#[tokio::test(start_paused = true)]
async fn a_failed_pause_leaves_the_state_that_the_vmm_reports() {
    use vmm_core::backend::{BackendErrorKind as Kind, Effect};
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.world.next(ScriptedMethod::Pause, ScriptedResult::Fail(Kind::Rejected, Effect::NotApplied));
    refused(vms.pause("a").await, "precondition");
    assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Running, "operation-failed"));
    // The answer was lost, and the effect was not: the VMM is asked.
    vms.world.next(ScriptedMethod::Pause, ScriptedResult::DoThenFail(Kind::Protocol, Effect::Unknown));
    refused(vms.pause("a").await, "unavailable");
    assert_eq!(vms.state("a"), VmState::Paused);
    assert_eq!(vms.machine("a").guest(), Some(GuestState::Paused));
    vms.world.next(ScriptedMethod::Resume, ScriptedResult::do_then_hang());
    refused(vms.resume("a").await, "unavailable");
    assert_eq!(vms.state("a"), VmState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_vmm_that_ends_during_a_pause_ends_the_run() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    let latch = vmm_testkit::fake::CallLatch::default();
    vms.world.next(ScriptedMethod::Pause, ScriptedResult::Wait(latch.clone()));
    let paused = vms
        .begin({
            let vms = vms.clone();
            async move { vms.pause("a").await }
        })
        .await;
    eventually("the pause", || vms.world.calls(ScriptedMethod::Pause) == 1).await;
    machine.end(vmm_core::backend::ExitCause::VmmFailed);
    latch.open();
    let text = refused(paused.await.unwrap(), "precondition");
    assert!(text.contains("SHUTDOWN"), "{text}");
    assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Shutdown, "vmm-failed"));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_of_an_ended_vmm_succeeds() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
    let latch = vmm_testkit::fake::CallLatch::default();
    vms.world.next(ScriptedMethod::Shutdown, ScriptedResult::Wait(latch.clone()));
    let task = vms
        .begin({
            let vms = vms.clone();
            async move { vms.shutdown("a").await }
        })
        .await;
    eventually("the shutdown", || vms.world.calls(ScriptedMethod::Shutdown) == 1).await;
    machine.end(vmm_core::backend::ExitCause::VmmFailed);
    latch.open();
    assert_eq!(task.await.unwrap().unwrap().ended_by, Some(EndedBy::Guest));
    tokio::time::sleep(std::time::Duration::from_secs(120)).await;
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0), "a shutdown is never undone");
}

#[tokio::test(start_paused = true)]
async fn every_operation_has_an_intent_and_an_outcome_in_the_log() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.pause("a").await.unwrap();
    vms.shutdown("a").await.unwrap();
    vms.delete("a").await.unwrap();
    let log: Vec<_> = bed
        .store
        .log()
        .into_iter()
        .map(|event| (event.event.kind, event.event.cause.to_string(), event.event.state, event.event.caller))
        .collect();
    use EventKind::{Created, Deleted, OperationStarted as Started, StateChanged as Changed};
    let expected = [
        (Created, "CreateVm", VmState::Created),
        (Started, "BootVm", VmState::Created),
        (Changed, "BootVm", VmState::Running),
        (Started, "PauseVm", VmState::Running),
        (Changed, "PauseVm", VmState::Paused),
        (Started, "ShutdownVm", VmState::Paused),
        (Changed, "ShutdownVm", VmState::Shutdown),
        (Started, "DeleteVm", VmState::Shutdown),
        (Deleted, "DeleteVm", VmState::Shutdown),
    ];
    assert_eq!(log, expected.map(|(kind, cause, state)| (kind, cause.to_owned(), state, me())));
}

#[tokio::test(start_paused = true)]
async fn a_deletion_removes_only_files_of_this_program() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_disk("d");
    config.console = Some(vmm_core::config::ConsoleConfig {
        enabled: true,
        output: bed.path("console.txt"),
        ..Default::default()
    });
    vms.run("a", config).await;
    let folder = bed.run_dir(&vms.record("a"));
    assert!(folder.is_dir());
    vms.force_delete("a").await.unwrap();
    assert!(!folder.exists());
    for kept in ["d", "console.txt", "vmlinux"] {
        assert!(std::fs::exists(bed.path(kept)).unwrap(), "{kept} was named by the client");
    }
    assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_deleted_name_can_be_used_again_with_a_new_uid() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let first = vms.create("a", bed.config()).await;
    vms.delete("a").await.unwrap();
    let second = vms.create("a", bed.with_disk("d")).await;
    assert!(second.uid > first.uid);
}

#[tokio::test(start_paused = true)]
async fn a_reboot_with_a_missing_kernel_is_refused_before_the_end_of_the_run() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    std::fs::remove_file(bed.path("vmlinux")).unwrap();
    let text = refused(vms.reboot("a").await, "precondition");
    assert!(text.contains("vmlinux"), "{text}");
    assert!(machine.lives());
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Running));
}
