//! The restart policy: which ends are undone, how soon, how often, and who calls it off.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause};
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{PendingWork, StoreErrorKind, VmRecord};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment;

use crate::common::*;

#[tokio::test(start_paused = true)]
async fn each_restart_mode_restarts_after_its_own_ends() {
    use ExitCause::{GuestCrash, GuestPowerOff, GuestReset, Requested, Unknown, VmmFailed};
    // The least mode that undoes each end; 0 is unset, which is GUEST_REBOOT on this hypervisor.
    let least = [
        (GuestReset, GUEST_REBOOT),
        (GuestCrash, ON_FAILURE),
        (VmmFailed, ON_FAILURE),
        (Unknown, ON_FAILURE),
        (GuestPowerOff, ALWAYS),
        (Requested, ALWAYS),
    ];
    let bed = Bed::new();
    let vms = bed.start().await;
    for mode in [0, NEVER, GUEST_REBOOT, ON_FAILURE, ALWAYS] {
        for (cause, least) in least {
            let vm_id = format!("{mode}-{}", cause.reason());
            let machine = vms.run(&vm_id, bed.with_policy(mode, 0)).await;
            machine.end(cause);
            let record = vms.until(&vm_id, |record| record.state == VmState::Shutdown).await;
            assert_eq!(record.status.reason, cause.reason());
            let in_force = if mode == 0 { GUEST_REBOOT } else { mode };
            if in_force >= least {
                assert_eq!((record.status.phase, record.status.restarts), (Phase::Restarting, 1), "{vm_id}");
                let running = vms.until_phase(&vm_id, Phase::Running).await;
                assert_eq!(running.status.restarts, 1);
                // The status keeps the reason for which the guest was started again.
                assert_eq!(running.status.reason, record.status.reason, "{vm_id}");
                assert_eq!(running.status.message, record.status.message, "{vm_id}");
            } else {
                let expected = if cause.is_failure() { Phase::Failed } else { Phase::Stopped };
                assert_eq!(record.status.phase, expected, "{vm_id}");
                tokio::time::sleep(Duration::from_secs(120)).await;
                assert_eq!(vms.state(&vm_id), VmState::Shutdown, "{vm_id}");
            }
            vms.force_delete(&vm_id).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn restart_delays_grow_and_a_restart_loop_is_ended() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ON_FAILURE, 4)).await;
    let mut waits = Vec::new();
    for _ in 1..=4 {
        vms.machine("a").end(ExitCause::VmmFailed);
        vms.until_phase("a", Phase::Restarting).await;
        let began = tokio::time::Instant::now();
        vms.until_phase("a", Phase::Running).await;
        waits.push(began.elapsed());
    }
    for pair in waits.windows(2) {
        assert!(pair[1] > pair[0], "{waits:?}");
    }
    vms.machine("a").end(ExitCause::VmmFailed);
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Failed, "restart-loop"));
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
}

#[tokio::test(start_paused = true)]
async fn a_minute_without_an_end_resets_the_restart_count() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ON_FAILURE, 2)).await;
    for (quiet, expected) in [(1, 1), (59, 2), (61, 1), (61, 1), (5, 2)] {
        tokio::time::sleep(Duration::from_secs(quiet)).await;
        vms.machine("a").end(ExitCause::VmmFailed);
        let record = vms.until_phase("a", Phase::Restarting).await;
        assert_eq!(record.status.restarts, expected, "after {quiet} s");
        vms.until_phase("a", Phase::Running).await;
    }
    // A reset in place ends a quiet minute like a restart.
    for (quiet, expected) in [(61, 1), (50, 2), (61, 1)] {
        tokio::time::sleep(Duration::from_secs(quiet)).await;
        let before = vms.record("a").generation;
        vms.machine("a").reset();
        let record = vms.until("a", |record| record.generation > before).await;
        assert_eq!(record.status.restarts, expected, "after {quiet} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_restart_is_tried_again_and_counted() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ON_FAILURE, 3)).await;
    for _ in 0..2 {
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied),
        );
    }
    vms.machine("a").end(ExitCause::VmmFailed);
    let record =
        vms.until("a", |record| record.status.restarts == 3 && record.state == VmState::Running).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Running, "vmm-failed"));
    vms.world
        .always(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    vms.machine("a").end(ExitCause::VmmFailed);
    vms.until("a", |record| {
        record.status.phase == Phase::Failed && record.status.reason.as_str() == "restart-loop"
    })
    .await;
    assert_eq!(bed.stored("a"), *vms.record("a"));
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_after_a_guest_reset_is_not_tried_again() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(GUEST_REBOOT, 0)).await;
    vms.world
        .next(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    vms.machine("a").end(ExitCause::GuestReset);
    let record = vms.until_phase("a", Phase::Failed).await;
    assert_eq!((record.state, record.status.reason.as_str()), (VmState::Shutdown, "boot-failed"));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!((vms.world.calls(ScriptedMethod::Launch), vms.world.living()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_boot_after_a_guest_reset_without_a_launch_is_tried_again() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(GUEST_REBOOT, 1)).await;
    for _ in 0..3 {
        vms.world
            .next(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Host, Effect::NotApplied));
    }
    vms.machine("a").end(ExitCause::GuestReset);
    vms.until("a", |record| record.status.reason.as_str() == "start-not-begun").await;
    let record = vms.until("a", |record| record.state == VmState::Running).await;
    assert_eq!((record.status.restarts, vms.world.calls(ScriptedMethod::Launch)), (1, 5));
}

/// A VM that waits for its restart.
async fn waiting(bed: &Bed, vms: &Vms) {
    vms.run("a", bed.with_policy(ALWAYS, 0)).await.power_off();
    let record = vms.until_phase("a", Phase::Restarting).await;
    assert_eq!(record.state, VmState::Shutdown);
}

#[tokio::test(start_paused = true)]
async fn a_boot_by_a_client_replaces_the_waiting_restart() {
    let bed = Bed::new();
    let vms = bed.start().await;
    waiting(&bed, &vms).await;
    let outcome = vms.boot("a").await.unwrap();
    let status = &outcome.record.status;
    assert_eq!((outcome.record.state, status.restarts, status.reason.as_str()), (VmState::Running, 0, ""));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!((vms.world.calls(ScriptedMethod::Launch), vms.world.living()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_or_deletion_cancels_the_waiting_restart() {
    for force in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        waiting(&bed, &vms).await;
        let outcome = if force { vms.force_shutdown("a").await } else { vms.shutdown("a").await };
        assert_eq!(outcome.unwrap().record.status.phase, Phase::Stopped);
        assert_eq!(bed.stored("a").status.phase, Phase::Stopped);
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));

        let bed = Bed::new();
        let vms = bed.start().await;
        waiting(&bed, &vms).await;
        let deleted = if force { vms.force_delete("a").await } else { vms.delete("a").await };
        deleted.unwrap();
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_operation_keeps_the_waiting_restart() {
    let bed = Bed::new();
    let vms = bed.start().await;
    // Neither a start that the host forbids …
    waiting(&bed, &vms).await;
    std::fs::rename(bed.path("vmlinux"), bed.path("away")).unwrap();
    refused(vms.boot("a").await, "precondition");
    let status = vms.record("a").status.clone();
    assert_eq!(
        (status.phase, status.restarts, status.reason.as_str()),
        (Phase::Restarting, 1, "boot-failed")
    );
    std::fs::rename(bed.path("away"), bed.path("vmlinux")).unwrap();
    vms.until_phase("a", Phase::Running).await;
    // … nor one or a deletion that cannot be recorded.
    for deletes in [false, true] {
        vms.machine("a").power_off();
        vms.until_phase("a", Phase::Restarting).await;
        bed.store.next([CommitTreatment::Refuse(StoreErrorKind::Full)]);
        let answer = if deletes { vms.delete("a").await } else { vms.boot("a").await };
        refused(answer, "exhausted");
        assert_eq!(vms.phase("a"), Phase::Restarting);
        vms.until_phase("a", Phase::Running).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_is_never_undone_by_the_policy() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ALWAYS, 0)).await.power_off();
    vms.until("a", |record| record.state == VmState::Running && record.status.restarts == 1).await;
    vms.shutdown("a").await.unwrap();
    assert_eq!(vms.record("a").status.restarts, 0, "it ends the count");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(vms.state("a"), VmState::Shutdown);
}

#[test]
fn a_waiting_restart_survives_a_restart_of_the_daemon() {
    let bed = Bed::new();
    bed.life(async |vms| waiting(&bed, &vms).await);
    bed.life(async |vms| {
        let status = vms.until_phase("a", Phase::Running).await.status.clone();
        assert_eq!((status.restarts, status.reason.as_str()), (1, "guest-power-off"));
    });
}

#[test]
fn a_waiting_restart_is_read_from_the_record_and_not_from_the_status() {
    for (written, phase, restart, runs) in [
        (Some(true), Phase::Stopped, true, true),
        (Some(false), Phase::Restarting, false, false),
        // Earlier releases recorded the phase alone.
        (None, Phase::Restarting, true, true),
        (None, Phase::Stopped, false, false),
    ] {
        let bed = Bed::new();
        bed.life(async |vms| waiting(&bed, &vms).await);
        let stored = bed.stored("a");
        assert!(stored.pending_work().restart, "the wait is on record");
        let status = Status { phase, ..stored.status.clone() };
        let pending = written.map(|restart| PendingWork { restart, ..PendingWork::default() });
        let generation = stored.generation + 1;
        bed.store.put(VmRecord { status, pending, generation, ..stored });
        assert_eq!(bed.stored("a").pending_work().restart, restart);
        bed.life(async |vms| {
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(vms.state("a") == VmState::Running, runs, "{written:?} {phase:?}");
        });
    }
}

#[tokio::test(start_paused = true)]
async fn boots_without_a_launch_are_not_counted_as_restarts() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ON_FAILURE, 2)).await;
    vms.machine("a").end(ExitCause::VmmFailed);
    vms.until_phase("a", Phase::Restarting).await;
    bed.store.always(CommitTreatment::Refuse(StoreErrorKind::Full));
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!((vms.phase("a"), vms.record("a").status.restarts), (Phase::Restarting, 1));
    bed.store.behave();
    // A hypervisor that is missing for a while launches nothing either.
    for _ in 0..5 {
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::Fail(BackendErrorKind::NotInstalled, Effect::NotApplied),
        );
    }
    tokio::time::sleep(Duration::from_secs(300)).await;
    let record = vms.until_phase("a", Phase::Running).await;
    assert_eq!(record.status.restarts, 1);
}

#[tokio::test(start_paused = true)]
async fn the_policy_starts_no_vmm_beside_an_orphan() {
    for mode in [GUEST_REBOOT, ON_FAILURE] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.run("a", bed.with_policy(mode, 0)).await;
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        );
        vms.world
            .next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
        let before = vms.world.calls(ScriptedMethod::Launch);
        vms.machine("a").end(ExitCause::GuestReset);
        vms.until_phase("a", Phase::Unreachable).await;
        let left = vms.machine("a");
        left.set_unprovable(true);
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!((vms.phase("a"), vms.world.living()), (Phase::Unreachable, 1));
        assert_eq!(vms.world.calls(ScriptedMethod::Launch), before + 1);
        left.set_unprovable(false);
        left.end(ExitCause::VmmFailed);
        vms.until_phase("a", Phase::Running).await;
        assert_eq!(vms.world.living(), 1, "once it has gone, the policy goes on");
    }
}

#[test]
fn a_shutdown_that_timed_out_is_never_undone() {
    for forced in [false, true] {
        for restarted in [false, true] {
            let bed = Bed::new();
            bed.life(async |vms| {
                let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
                machine.set_unkillable(true);
                let result = if forced { vms.force_shutdown("a").await } else { vms.shutdown("a").await };
                refused(result, "unavailable");
                if !restarted {
                    machine.end(ExitCause::Requested);
                    tokio::time::sleep(Duration::from_secs(120)).await;
                    assert_eq!((vms.phase("a"), vms.world.living()), (Phase::Stopped, 0));
                }
            });
            bed.world.host_dies();
            bed.life(async |vms| {
                tokio::time::sleep(Duration::from_secs(120)).await;
                assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Shutdown, Phase::Stopped));
                assert_eq!((vms.reason("a").as_str(), vms.world.living()), ("shutdown", 0));
            });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_policy_applies_again_after_a_failed_shutdown() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
    machine.set_unkillable(true);
    refused(vms.force_shutdown("a").await, "unavailable");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!((vms.phase("a"), &vms.record("a").intent), (Phase::Running, &None));
    machine.end(ExitCause::GuestPowerOff);
    vms.until("a", |record| record.status.restarts == 1 && record.state == VmState::Running).await;
}
