//! A daemon that ends in the middle of an operation: what the next one makes of it.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause, GuestState};
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::intent::DEFAULT_GUEST_TIMEOUT;
use vmm_core::state::{Phase, Status, VmOperation, VmState};
use vmm_core::store::{Intent, IntentKind, Namespaces, ProcessScope, VmRecord};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::causes::last_change;
use crate::common::*;
use crate::recover::{host_restarts, left_in};

/// Leaves the store as a daemon does that dies right after it has recorded what it is about to do.
fn interrupt(bed: &Bed, request: VmOperation, phase: Phase) {
    interrupt_by(bed, intent_of(request, Some(DEFAULT_GUEST_TIMEOUT)), phase);
}

/// An intent of `request` whose guest has `guest_timeout` to obey.
fn intent_of(request: VmOperation, guest_timeout: Option<Duration>) -> IntentKind {
    match request {
        VmOperation::Boot => IntentKind::Boot { claims: Vec::new() },
        VmOperation::Pause => IntentKind::Pause,
        VmOperation::Resume => IntentKind::Resume,
        VmOperation::Shutdown => IntentKind::Shutdown { guest_timeout, answered: false },
        VmOperation::Reboot => IntentKind::Reboot { guest_timeout, claims: Vec::new() },
        VmOperation::Update => unreachable!("UpdateVm has no intent"),
        VmOperation::Delete => IntentKind::Delete,
        VmOperation::ForceDelete => IntentKind::ForceDelete,
    }
}

fn interrupt_by(bed: &Bed, kind: IntentKind, phase: Phase) {
    let before = bed.stored("a");
    bed.store.put(VmRecord {
        intent: Some(Intent { kind, caller: me(), since_ms: 1, scope: None }),
        status: Status::plain(phase, 1),
        generation: before.generation + 1,
        ..before
    });
}

#[test]
fn an_interrupted_boot_without_a_process_is_undone() {
    for state in [VmState::Created, VmState::Shutdown] {
        let bed = Bed::new();
        left_in(&bed, state);
        interrupt(&bed, VmOperation::Boot, Phase::Starting);
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.reason.as_str()), (state, "boot-interrupted"));
            assert_eq!((&record.intent, vms.world.living()), (&None, 0));
            vms.boot("a").await.unwrap();
        });
    }
}

/// A boot whose daemon died after the launch and before the outcome was recorded.
fn boot_dies_after_launch(bed: &Bed) {
    bed.life(async |vms| {
        vms.create("a", bed.with_disk("d")).await;
        vms.create("b", bed.with_disk("d")).await;
        vms.world.next(ScriptedMethod::Launch, ScriptedResult::do_then_hang());
        let task = vms
            .begin({
                let vms = vms.clone();
                async move { vms.boot("a").await }
            })
            .await;
        eventually("the launch", || vms.world.living() == 1).await;
        assert!(!task.is_finished());
    });
    assert_eq!(bed.stored("a").intent.unwrap().request(), VmOperation::Boot);
}

#[test]
fn an_interrupted_boot_with_a_running_guest_is_completed() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    bed.life(async |vms| {
        let record = vms.record("a");
        assert_eq!(
            (record.state, record.status.reason.as_str()),
            (VmState::Running, "operation-interrupted")
        );
        assert_eq!(record.run.as_ref().unwrap().process.pid, vms.machine("a").pid());
        let text = refused(vms.boot("b").await, "precondition");
        assert!(text.contains("VM \"a\""), "it holds its disk: {text}");
        vms.shutdown("a").await.unwrap();
        vms.boot("b").await.unwrap();
    });
}

#[test]
fn an_interrupted_boot_without_a_running_guest_is_undone() {
    for guest in [GuestState::Paused, GuestState::Ended] {
        let bed = Bed::new();
        boot_dies_after_launch(&bed);
        bed.world.machine("a").unwrap().set_guest(guest);
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.reason.as_str()), (VmState::Created, "boot-interrupted"));
            assert_eq!(vms.world.living(), 0);
            vms.boot("b").await.expect("nothing is held");
        });
    }
}

#[test]
fn an_interrupted_boot_with_a_silent_vmm_stays_on_record() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    bed.world.machine("a").unwrap().set_unprovable(true);
    for _ in 0..2 {
        bed.life(async |vms| {
            assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Created, Phase::Unreachable));
            refused(vms.boot("a").await, "unavailable");
            assert_eq!(vms.world.living(), 1, "touched by nobody");
        });
    }
    bed.world.machine("a").unwrap().set_unprovable(false);
    bed.life(async |vms| assert_eq!(vms.state("a"), VmState::Running));
}

#[test]
fn force_ends_the_process_of_an_interrupted_boot() {
    for deletes in [false, true] {
        let bed = Bed::new();
        boot_dies_after_launch(&bed);
        bed.world.machine("a").unwrap().set_unprovable(true);
        bed.life(async |vms| {
            if deletes {
                assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
            } else {
                // A VM that never ran cannot be shut down; what its start has left is ended all the
                // same.
                refused(vms.force_shutdown("a").await, "illegal-state");
                assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Created, Phase::Created));
                assert_eq!(bed.stored("a"), *vms.record("a"));
            }
            assert_eq!(vms.world.living(), 0);
            vms.boot("b").await.expect("nothing is held");
        });
    }
}

#[test]
fn an_interrupted_operation_leaves_the_state_that_the_vmm_reports() {
    let cases = [
        (VmState::Running, VmOperation::Pause, Phase::Pausing),
        (VmState::Paused, VmOperation::Resume, Phase::Resuming),
    ];
    for (state, request, phase) in cases {
        for guest in [GuestState::Running, GuestState::Paused] {
            let bed = Bed::new();
            left_in(&bed, state);
            bed.world.machine("a").unwrap().set_guest(guest);
            interrupt(&bed, request, phase);
            bed.life(async |vms| {
                let record = vms.record("a");
                let expected = if guest == GuestState::Paused { VmState::Paused } else { VmState::Running };
                assert_eq!((record.state, &record.intent), (expected, &None), "{request:?}");
                assert_eq!(record.status.reason.as_str(), "operation-interrupted");
                assert!(record.status.message.contains(request.name()));
                vms.force_shutdown("a").await.unwrap();
            });
        }
    }
}

#[test]
fn an_interrupted_shutdown_is_completed() {
    for guest in [GuestState::Running, GuestState::Paused] {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.with_policy(ALWAYS, 0)).await));
        bed.world.machine("a").unwrap().set_guest(guest);
        interrupt(&bed, VmOperation::Shutdown, Phase::Stopping);
        bed.life(async |vms| {
            let record = vms.until_phase("a", Phase::Stopped).await;
            assert_eq!((record.state, record.status.reason.as_str()), (VmState::Shutdown, "shutdown"));
            assert_eq!((vms.world.living(), &record.intent), (0, &None));
        });
    }
}

#[test]
fn an_interrupted_reboot_is_completed() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    interrupt(&bed, VmOperation::Reboot, Phase::Rebooting);
    let before = bed.stored("a").run;
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Running).await;
        assert_eq!((record.state, vms.world.living(), &record.intent), (VmState::Running, 1, &None));
        assert_ne!(record.run, before, "asked to end, and booted again");
    });
}

#[test]
fn an_interrupted_reboot_of_a_paused_vm_is_cancelled() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    interrupt(&bed, VmOperation::Reboot, Phase::Rebooting);
    bed.world.machine("a").unwrap().set_guest(GuestState::Paused);
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Paused).await;
        assert_eq!((record.status.reason.as_str(), &record.intent), ("operation-failed", &None));
        assert_eq!(bed.stored("a"), *record, "and not tried for ever");
    });
}

#[test]
fn force_pre_empts_the_completion_of_an_interrupted_operation() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    bed.world.machine("a").unwrap().ignore_shutdown();
    interrupt(&bed, VmOperation::Shutdown, Phase::Stopping);
    bed.life(async |vms| {
        vms.force_delete("a").await.unwrap();
        assert_eq!(vms.world.living(), 0);
    });
}

#[test]
fn an_interrupted_start_by_policy_is_repeated() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("a", bed.with_policy(ON_FAILURE, 0)).await;
        vms.world.next(ScriptedMethod::Launch, ScriptedResult::hang());
        let before = vms.world.calls(ScriptedMethod::Launch);
        vms.machine("a").end(ExitCause::VmmFailed);
        eventually("the launch", || vms.world.calls(ScriptedMethod::Launch) > before).await;
    });
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Running).await;
        assert_eq!((record.state, record.status.restarts), (VmState::Running, 1), "and it counts");
    });
}

#[test]
fn an_interrupted_shutdown_that_succeeded_is_never_undone() {
    for restarted in [false, true] {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.with_policy(ALWAYS, 0)).await));
        interrupt(&bed, VmOperation::Shutdown, Phase::Stopping);
        if restarted {
            host_restarts(&bed);
        }
        bed.world.host_dies();
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.phase), (VmState::Shutdown, Phase::Stopped));
            assert_eq!(record.status.reason.as_str(), "shutdown");
            let cause = if restarted { Cause::HostReboot } else { Cause::VmmGoneAtStart };
            assert_eq!(last_change(&bed), (EventKind::StateChanged, cause));
            tokio::time::sleep(Duration::from_secs(120)).await;
            assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
        });
    }
}

#[test]
fn an_interrupted_reboot_continues_from_its_half() {
    // Dead after the first half; or after the second, whose machine is not the one on record.
    for second_half in [false, true] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        bed.life(async |vms| {
            vms.world.next(
                ScriptedMethod::Launch,
                if second_half { ScriptedResult::do_then_hang() } else { ScriptedResult::hang() },
            );
            let before = vms.world.calls(ScriptedMethod::Launch);
            let _task = vms
                .begin({
                    let vms = vms.clone();
                    async move { vms.reboot("a").await }
                })
                .await;
            eventually("the launch", || vms.world.calls(ScriptedMethod::Launch) > before).await;
        });
        assert_eq!(bed.world.living(), usize::from(second_half));
        let started = bed.world.machine("a").map(|machine| machine.pid());
        bed.life(async |vms| {
            let record = vms.until_phase("a", Phase::Running).await;
            assert_eq!((record.state, vms.world.living(), &record.intent), (VmState::Running, 1, &None));
            assert!(started.is_none_or(|pid| vms.machine("a").pid() == pid), "the second half stands");
            vms.force_shutdown("a").await.unwrap();
            vms.boot("a").await.unwrap();
        });
    }
}

#[test]
fn an_interrupted_forced_deletion_is_completed() {
    for (state, request) in [
        (VmState::Created, VmOperation::Delete),
        (VmState::Shutdown, VmOperation::Delete),
        (VmState::Running, VmOperation::ForceDelete),
        (VmState::Paused, VmOperation::ForceDelete),
    ] {
        let bed = Bed::new();
        left_in(&bed, state);
        let folder = bed.run_dir(&bed.stored("a"));
        interrupt(&bed, request, Phase::Deleting);
        bed.life(async |vms| {
            refused(vms.service.get("a").map(drop), "not-found");
            assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0), "{state:?}");
            assert!(!folder.exists());
            vms.create("a", bed.config()).await;
        });
    }
}

#[test]
fn an_interrupted_shutdown_of_a_silent_vmm_waits_unless_it_is_forced() {
    for (guest_timeout, ends) in [(None, true), (Some(Duration::from_secs(1)), false)] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        interrupt_by(&bed, intent_of(VmOperation::Shutdown, guest_timeout), Phase::Stopping);
        bed.world.machine("a").unwrap().stop();
        bed.life(async |vms| {
            if ends {
                vms.until("a", |record| record.state == VmState::Shutdown).await;
                assert_eq!(vms.world.living(), 0);
            } else {
                // Who asks gently does not kill what does not answer.
                assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
                assert_eq!(vms.world.living(), 1);
                assert!(vms.record("a").intent.is_some(), "it is not forgotten");
                vms.machine("a").go_on();
                vms.until("a", |record| record.state == VmState::Shutdown).await;
            }
            assert_eq!(vms.record("a").intent, None);
        });
    }
}

#[test]
fn an_interrupted_operation_waits_until_its_vmm_is_found_or_ends() {
    for (request, phase) in
        [(VmOperation::Shutdown, Phase::Stopping), (VmOperation::Reboot, Phase::Rebooting)]
    {
        for ends in [false, true] {
            let bed = Bed::new();
            bed.life(async |vms| drop(vms.run("a", bed.with_policy(ALWAYS, 0)).await));
            interrupt(&bed, request, phase);
            let machine = bed.world.machine("a").unwrap();
            machine.set_unprovable(true);
            bed.life(async |vms| {
                assert_eq!(vms.phase("a"), Phase::Unreachable);
                refused(vms.boot("a").await, "unavailable");
            });
            bed.life(async |vms| {
                assert_eq!(vms.phase("a"), Phase::Unreachable, "the next daemon does not forget it either");
                machine.set_unprovable(false);
                if ends {
                    machine.end(ExitCause::Unknown);
                }
                if request == VmOperation::Shutdown {
                    vms.until("a", |record| record.state == VmState::Shutdown).await;
                    tokio::time::sleep(Duration::from_secs(120)).await;
                    assert_eq!(
                        (vms.phase("a"), vms.world.living()),
                        (Phase::Stopped, 0),
                        "no policy undoes it"
                    );
                } else {
                    vms.until("a", |record| record.state.is_live() && record.intent.is_none()).await;
                    assert_eq!(vms.world.living(), 1);
                    let resets = vms.machine("a").resets();
                    assert!(resets == 1 || vms.machine("a").pid() != machine.pid(), "it was rebooted");
                }
                assert_eq!(vms.record("a").intent, None);
            });
        }
    }
}

#[test]
fn an_interrupted_boot_with_a_silent_vmm_keeps_its_claims() {
    // Silent, and its files would not answer either: what the intent says is claimed before
    // anything is asked.
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    bed.world.machine("a").unwrap().set_unprovable(true);
    bed.life(async |vms| {
        assert_eq!(vms.phase("a"), Phase::Unreachable);
        let text = refused(vms.boot("b").await, "precondition");
        assert!(text.contains("VM \"a\""), "{text}");
    });
}

#[test]
fn the_orphan_of_a_failed_boot_keeps_its_claims_across_a_restart() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("a", bed.with_disk("d")).await;
        vms.create("b", bed.with_disk("d")).await;
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        );
        vms.world
            .next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
        refused(vms.boot("a").await, "unavailable");
    });
    bed.world.machine("a").unwrap().set_unprovable(true);
    bed.life(async |vms| {
        refused(vms.boot("b").await, "precondition");
        vms.machine("a").set_unprovable(false);
        vms.until_phase("a", Phase::Running).await;
        refused(vms.boot("b").await, "precondition");
        let claims = vms.record("a").run.as_ref().unwrap().claims.len();
        assert_eq!(claims, 1, "and its run says so from then on");
        vms.shutdown("a").await.unwrap();
        vms.boot("b").await.expect("the disk is free once its process has gone");
    });
}

#[test]
fn an_interrupted_plain_deletion_is_completed_without_force() {
    let bed = Bed::new();
    left_in(&bed, VmState::Shutdown);
    interrupt(&bed, VmOperation::Delete, Phase::Deleting);
    bed.world
        .next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::StillRuns, Effect::NotApplied));
    bed.life(async |vms| {
        // Refused, as where somebody has started the VM again: it is shown, and not removed.
        assert_eq!((vms.state("a"), bed.store.vms().len()), (VmState::Shutdown, 1));
        vms.delete("a").await.unwrap();
    });
    let log = bed.store.log();
    let causes: Vec<_> =
        log.iter().map(|it| it.event.cause.as_str()).filter(|it| it.starts_with("Delete")).collect();
    assert!(
        !causes.is_empty() && causes.iter().all(|cause| *cause == "DeleteVm"),
        "nobody asked for force: {causes:?}"
    );
}

/// The scope of a process that a daemon in another PID namespace has started.
fn elsewhere() -> ProcessScope {
    let here = vmm_host::process::scope().unwrap();
    ProcessScope { namespaces: Namespaces { pid: here.namespaces.pid + 1, ..here.namespaces }, ..here }
}

/// Changes the scope of the intent on record.
fn move_daemon(bed: &Bed, scope: Option<ProcessScope>) {
    let before = bed.stored("a");
    let intent = before.intent.clone().map(|intent| Intent { scope, ..intent });
    bed.store.put(VmRecord { intent, generation: before.generation + 1, ..before });
}

#[test]
fn a_boot_in_another_pid_namespace_keeps_its_claims() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    let here = bed.stored("a").intent.unwrap().scope;
    assert_eq!(here, Some(vmm_host::process::scope().unwrap()), "a start is recorded with its scope");
    move_daemon(&bed, Some(elsewhere()));
    // The daemon does not see the processes of the other namespace.
    bed.world.host_dies();
    bed.life(async |vms| {
        assert_eq!((vms.phase("a"), vms.reason("a").as_str()), (Phase::Unreachable, "identity-unproven"));
        let text = refused(vms.boot("b").await, "precondition");
        assert!(text.contains("VM \"a\""), "{text}");
        // Force cannot prove the end either, and the disk stays held after the VM is gone.
        assert_eq!(vms.force_delete("a").await.unwrap().left_behind[0].field, "process");
        refused(vms.boot("b").await, "precondition");
    });
    for _ in 0..2 {
        bed.life(async |vms| {
            tokio::time::sleep(Duration::from_secs(60)).await;
            refused(vms.boot("b").await, "precondition");
            assert_eq!(bed.store.tombstones().len(), 1);
        });
    }
}

#[test]
fn a_boot_before_the_hosts_reboot_has_ended_in_every_namespace() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    move_daemon(&bed, Some(ProcessScope { boot_id: "an earlier one".to_owned(), ..elsewhere() }));
    bed.world.host_dies();
    bed.life(async |vms| {
        assert_eq!(vms.reason("a"), "boot-interrupted");
        vms.boot("b").await.expect("the disk is free");
    });
}
