//! Force: it waits for nobody, and ends what can be ended.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect};
use vmm_core::state::{EndedBy, Phase, VmState};
use vmm_core::store::StoreErrorKind;
use vmm_service::{ListQuery, OperationOutcome, ServiceError};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment::Refuse;

use crate::common::*;

/// What a forced operation may take, on the paused clock.
const FORCE_LIMIT: Duration = Duration::from_secs(5);

/// An operation that hangs, on a VM called `a`; answers its task once it hangs.
async fn hang(
    bed: &Bed,
    vms: &Vms,
    method: ScriptedMethod,
    act: ScriptedResult,
) -> tokio::task::JoinHandle<Result<OperationOutcome, ServiceError>> {
    let start = match method {
        ScriptedMethod::Launch => VmState::Created,
        ScriptedMethod::Resume => VmState::Paused,
        _ => VmState::Running,
    };
    vms.bring_to("a", bed.config(), start).await;
    let before = vms.world.calls(method);
    vms.world.next(method, act);
    let task = tokio::spawn({
        let vms = vms.clone();
        async move {
            match method {
                ScriptedMethod::Launch => vms.boot("a").await,
                ScriptedMethod::Pause => vms.pause("a").await,
                ScriptedMethod::Resume => vms.resume("a").await,
                ScriptedMethod::Reset => vms.force_reboot("a").await,
                _ => vms.shutdown("a").await,
            }
        }
    });
    eventually("the call that hangs", || vms.world.calls(method) > before).await;
    task
}

const HANGING: [ScriptedMethod; 5] = [
    ScriptedMethod::Launch,
    ScriptedMethod::Pause,
    ScriptedMethod::Resume,
    ScriptedMethod::Reset,
    ScriptedMethod::Shutdown,
];

#[tokio::test(start_paused = true)]
async fn a_forced_deletion_ends_a_vm_with_a_hanging_operation() {
    for method in HANGING {
        for act in [ScriptedResult::hang(), ScriptedResult::do_then_hang()] {
            let bed = Bed::new();
            let vms = bed.start().await;
            let task = hang(&bed, &vms, method, act).await;
            let began = tokio::time::Instant::now();
            let outcome = vms.force_delete("a").await.expect("force succeeds");
            assert!(began.elapsed() < FORCE_LIMIT, "{method:?}");
            assert!(outcome.left_behind.is_empty(), "{method:?}: {:?}", outcome.left_behind);
            let text = refused(task.await.unwrap(), "aborted");
            assert!(text.contains("pre-empted"), "{text}");
            assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0), "{method:?}");
            vms.create("a", bed.config()).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_forced_shutdown_ends_a_vm_with_a_hanging_operation() {
    for method in HANGING {
        for act in [ScriptedResult::hang(), ScriptedResult::do_then_hang()] {
            let bed = Bed::new();
            let vms = bed.start().await;
            let task = hang(&bed, &vms, method, act).await;
            let began = tokio::time::Instant::now();
            let outcome = vms.force_shutdown("a").await.expect("force succeeds");
            assert!(began.elapsed() < FORCE_LIMIT, "{method:?}");
            refused(task.await.unwrap(), "aborted");
            assert_eq!(outcome.record.state, VmState::Shutdown, "{method:?}");
            assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0), "{method:?}");
            assert_eq!(bed.stored("a"), *vms.record("a"));
            vms.boot("a").await.expect("the VM is none the worse");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn operations_queued_behind_a_deletion_are_not_found() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let task = hang(&bed, &vms, ScriptedMethod::Pause, ScriptedResult::hang()).await;
    // Queued, and not looked at again until the name lives on as another VM.
    let waiting = vms.resume("a");
    tokio::pin!(waiting);
    assert!(futures::poll!(&mut waiting).is_pending());
    vms.force_delete("a").await.unwrap();
    vms.create("a", bed.config()).await;
    refused(waiting.await, "not-found");
    refused(task.await.unwrap(), "aborted");
}

#[tokio::test(start_paused = true)]
async fn a_silent_vmm_is_ended_by_force() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for vm_id in ["shut-down", "deleted"] {
        let machine = vms.run(vm_id, bed.config()).await;
        machine.stop();
        vms.until_phase(vm_id, Phase::Unreachable).await;
        refused(vms.shutdown(vm_id).await, "unavailable");
        let began = tokio::time::Instant::now();
        if vm_id == "deleted" {
            assert!(vms.force_delete(vm_id).await.unwrap().left_behind.is_empty());
        } else {
            let outcome = vms.force_shutdown(vm_id).await.unwrap();
            assert_eq!((outcome.ended_by, vms.state(vm_id)), (Some(EndedBy::Sigkill), VmState::Shutdown));
        }
        assert!(began.elapsed() < FORCE_LIMIT);
        assert!(!machine.lives());
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_cannot_be_killed_is_reported_as_left_behind() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.set_unkillable(true);
    // A shutdown that does not end it says so, and the VM is shown as it is.
    refused(vms.force_shutdown("a").await, "unavailable");
    assert_eq!(vms.state("a"), VmState::Running);
    let began = tokio::time::Instant::now();
    let outcome = vms.force_delete("a").await.expect("a forced deletion succeeds");
    assert!(began.elapsed() < FORCE_LIMIT);
    assert_eq!(outcome.left_behind.len(), 1);
    assert_eq!(outcome.left_behind[0].field, "process");
    assert!(outcome.left_behind[0].message.contains(&machine.pid().to_string()));
    assert!(machine.lives());
    vms.create("a", bed.config()).await;
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_vm_stays_unreachable_if_force_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.stop();
    vms.until_phase("a", Phase::Unreachable).await;
    vms.world
        .next(ScriptedMethod::Shutdown, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    refused(vms.force_shutdown("a").await, "precondition");
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
    machine.go_on();
    vms.until_phase("a", Phase::Running).await;
}

#[tokio::test(start_paused = true)]
async fn no_hanging_call_delays_a_forced_deletion() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    vms.world.always(ScriptedMethod::Kill, ScriptedResult::hang());
    vms.world.always(ScriptedMethod::Sweep, ScriptedResult::hang());
    let began = tokio::time::Instant::now();
    let outcome = vms.force_delete("a").await.unwrap();
    assert!(began.elapsed() < FORCE_LIMIT);
    assert_eq!(outcome.left_behind.len(), 1, "{:?}", outcome.left_behind);
    refused(vms.service.get("a").map(drop), "not-found");
    machine.end(vmm_core::backend::ExitCause::Unknown);
}

#[tokio::test(start_paused = true)]
async fn a_slow_deletion_is_pre_empted_by_force() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    // What a start has left is not cleared away at once.
    bed.store.next([Refuse(StoreErrorKind::Full)]);
    vms.world.next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    refused(vms.boot("a").await, "exhausted");
    vms.world.next(ScriptedMethod::Sweep, ScriptedResult::hang());
    let deleting = tokio::spawn({
        let vms = vms.clone();
        async move { vms.delete("a").await }
    });
    eventually("the deletion sweeps", || vms.world.calls(ScriptedMethod::Sweep) == 2).await;
    let began = tokio::time::Instant::now();
    vms.force_delete("a").await.unwrap();
    assert!(began.elapsed() < FORCE_LIMIT);
    refused(deleting.await.unwrap(), "aborted");
}

#[tokio::test(start_paused = true)]
async fn a_hanging_forced_shutdown_fails_in_time() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.world.next(ScriptedMethod::Shutdown, ScriptedResult::hang());
    vms.world.always(ScriptedMethod::Probe, ScriptedResult::hang());
    let began = tokio::time::Instant::now();
    refused(vms.force_shutdown("a").await, "unavailable");
    assert!(began.elapsed() < FORCE_LIMIT);
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
    vms.world.behave();
    vms.force_shutdown("a").await.expect("it can be tried again");
}

#[tokio::test(start_paused = true)]
async fn a_second_forced_operation_behind_a_hanging_one_answers_in_time() {
    for last_deletes in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        let machine = vms.run("a", bed.config()).await;
        for method in
            [ScriptedMethod::Shutdown, ScriptedMethod::Probe, ScriptedMethod::Kill, ScriptedMethod::Sweep]
        {
            vms.world.always(method, ScriptedResult::hang());
        }
        let began = tokio::time::Instant::now();
        let mut tasks = Vec::new();
        for _ in 0..4 {
            let vms = vms.clone();
            tasks.push(tokio::spawn(async move { vms.force_shutdown("a").await }));
            tokio::task::yield_now().await;
        }
        if last_deletes {
            assert_eq!(vms.force_delete("a").await.unwrap().left_behind.len(), 1);
        } else {
            refused(vms.force_shutdown("a").await, "unavailable");
        }
        assert!(began.elapsed() <= FORCE_LIMIT + Duration::from_millis(500), "{:?}", began.elapsed());
        for task in tasks {
            refused(task.await.unwrap(), "unavailable");
        }
        machine.end(vmm_core::backend::ExitCause::Unknown);
    }
}

#[tokio::test(start_paused = true)]
async fn force_answers_in_time_if_the_pre_empted_boot_cannot_clean_up() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let _task = hang(&bed, &vms, ScriptedMethod::Launch, ScriptedResult::do_then_hang()).await;
    vms.world.always(ScriptedMethod::Sweep, ScriptedResult::hang());
    let began = tokio::time::Instant::now();
    assert_eq!(vms.force_delete("a").await.unwrap().left_behind.len(), 1);
    assert!(began.elapsed() < FORCE_LIMIT, "{:?}", began.elapsed());
    vms.machine("a").end(vmm_core::backend::ExitCause::Unknown);
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_with_a_remaining_process_is_reported_as_such() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.with_disk("d")).await;
    vms.create("b", bed.with_disk("d")).await;
    vms.world.next(
        ScriptedMethod::Launch,
        ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
    );
    vms.world.next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    refused(vms.boot("a").await, "unavailable");
    assert_eq!((vms.world.living(), vms.phase("a")), (1, Phase::Unreachable));
    refused(vms.boot("a").await, "unavailable");
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("VM \"a\""), "its disk stays claimed: {text}");
    // It is looked for again, and found to be the VM's own.
    vms.until_phase("a", Phase::Running).await;
    assert_eq!(vms.state("a"), VmState::Running);
    vms.shutdown("a").await.unwrap();
    vms.boot("b").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn force_ends_the_orphan_of_a_failed_boot() {
    for deletes in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.bring_to("a", bed.with_disk("d"), VmState::Shutdown).await;
        vms.create("b", bed.with_disk("d")).await;
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        );
        vms.world
            .next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
        refused(vms.boot("a").await, "unavailable");
        assert_eq!((vms.phase("a"), vms.world.living()), (Phase::Unreachable, 1));
        if deletes {
            vms.force_delete("a").await.unwrap();
        } else {
            let record = vms.force_shutdown("a").await.unwrap().record;
            assert_eq!((record.state, record.status.phase), (VmState::Shutdown, Phase::Stopped));
        }
        assert_eq!(vms.world.living(), 0);
        vms.boot("b").await.expect("its disk is given back");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_mailbox_refuses_operations_and_delays_no_reader() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let task = hang(&bed, &vms, ScriptedMethod::Pause, ScriptedResult::hang()).await;
    let mut waiting = Vec::new();
    for _ in 0..40 {
        let vms = vms.clone();
        waiting.push(tokio::spawn(async move { vms.resume("a").await }));
        tokio::task::yield_now().await;
    }
    let began = tokio::time::Instant::now();
    refused(vms.resume("a").await, "unavailable");
    assert_eq!(vms.service.list(&ListQuery::default()).unwrap().total_count, 1);
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Pausing));
    vms.run("b", bed.config()).await;
    assert!(began.elapsed() < Duration::from_secs(1), "on the paused clock");
    vms.force_shutdown("a").await.expect("force has a way of its own");
    refused(task.await.unwrap(), "aborted");
    let mut refusals = std::collections::BTreeMap::<_, usize>::new();
    for waiting in waiting {
        *refusals.entry(kind(&waiting.await.unwrap().unwrap_err())).or_default() += 1;
    }
    assert_eq!(refusals["illegal-state"], 32, "those that waited were answered: {refusals:?}");
    assert_eq!(refusals["unavailable"], 8);
}

#[tokio::test(start_paused = true)]
async fn an_operation_completes_without_its_client() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let latch = vmm_testkit::fake::CallLatch::default();
    let task = hang(&bed, &vms, ScriptedMethod::Launch, ScriptedResult::Wait(latch.clone())).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(vms.service.drain(Duration::from_millis(10)).await, 1, "it still counts as under way");
    latch.open();
    assert_eq!(vms.service.drain(Duration::from_secs(5)).await, 0);
    assert_eq!(vms.state("a"), VmState::Running);
}

#[tokio::test(start_paused = true)]
async fn an_operation_on_a_hanging_vmm_fails_in_time() {
    let limit = Duration::from_secs(30);
    for method in
        [ScriptedMethod::Launch, ScriptedMethod::Pause, ScriptedMethod::Resume, ScriptedMethod::Reset]
    {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.world.always(ScriptedMethod::Probe, ScriptedResult::hang());
        let began = tokio::time::Instant::now();
        let task = hang(&bed, &vms, method, ScriptedResult::hang()).await;
        refused(task.await.unwrap(), "unavailable");
        assert!(began.elapsed() <= limit, "{method:?} took {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_forced_shutdown_succeeds_only_after_the_end_of_the_process() {
    for ran in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.bring_to("a", bed.config(), if ran { VmState::Shutdown } else { VmState::Created }).await;
        vms.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        );
        vms.world
            .next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
        refused(vms.boot("a").await, "unavailable");
        let machine = vms.machine("a");
        machine.set_unkillable(true);
        machine.stop();
        // It is looked for meanwhile, and found to be the VM's own, so that a handle of it is held.
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(vms.phase("a"), Phase::Unreachable);
        refused(vms.force_shutdown("a").await, "unavailable");
        assert_eq!((vms.phase("a"), vms.world.living()), (Phase::Unreachable, 1));
        machine.set_unkillable(false);
        let result = vms.force_shutdown("a").await;
        if ran {
            assert_eq!(result.unwrap().record.state, VmState::Shutdown);
        } else {
            refused(result, "illegal-state");
        }
        assert_eq!(vms.world.living(), 0);
        vms.boot("a").await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn slow_taps_do_not_delay_force() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.with_tap("tap-x")).await;
    bed.taps.hang_once_made(true);
    let booting = vms
        .begin({
            let vms = vms.clone();
            async move { vms.boot("a").await }
        })
        .await;
    eventually("the TAP is being made", || !bed.taps.names().is_empty()).await;
    let began = tokio::time::Instant::now();
    vms.force_delete("a").await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    refused(booting.await.unwrap(), "aborted");
    assert_eq!(bed.taps.names(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_reboot_with_slow_halves_ends_within_its_budget() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.world.next(ScriptedMethod::Shutdown, ScriptedResult::Delay(Duration::from_secs(48)));
    vms.world.next(ScriptedMethod::Launch, ScriptedResult::hang());
    let began = tokio::time::Instant::now();
    refused(vms.reboot("a").await, "precondition");
    assert!(began.elapsed() <= Duration::from_secs(60), "30 s and the guest's 30 s: {:?}", began.elapsed());
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_adopted_again_after_a_panic_of_its_actor() {
    for (method, state) in
        [(ScriptedMethod::Pause, VmState::Running), (ScriptedMethod::Launch, VmState::Created)]
    {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.bring_to("a", bed.with_disk("d"), state).await;
        vms.world.next(method, ScriptedResult::Panic);
        let result = if method == ScriptedMethod::Pause { vms.pause("a").await } else { vms.boot("a").await };
        refused(result, "internal");
        assert_eq!(vms.reason("a"), "internal");
        vms.until("a", |record| record.status.reason.as_str() != "internal").await;
        assert_eq!((vms.state("a"), &vms.record("a").intent), (state, &None));
        vms.boot("a").await.unwrap();
        vms.pause("a").await.unwrap();
        assert_eq!(bed.stored("a"), *vms.record("a"));
        vms.world.next(ScriptedMethod::Resume, ScriptedResult::Panic);
        refused(vms.resume("a").await, "internal");
        let began = tokio::time::Instant::now();
        vms.force_delete("a").await.expect("and force does not wait for that");
        assert!(began.elapsed() < FORCE_LIMIT);
        assert_eq!(vms.world.living(), 0);
    }
}
