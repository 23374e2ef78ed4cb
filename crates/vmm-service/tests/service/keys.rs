//! Calls with an idempotency key: each is carried out once, whatever ends in between.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect, GuestState};
use vmm_core::caller::Caller;
use vmm_core::id::VmUid;
use vmm_core::idempotency::{CallAnswer, KeptAnswer, KeyChange};
use vmm_core::state::{EndedBy, VmState};
use vmm_core::store::{Store as _, StoreErrorKind, VmRequest};
use vmm_service::{Answered, Call, CallKind, IdempotencyKey, Operation, ServiceError, ShutdownOptions};
use vmm_testkit::fake::{CallLatch, ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment;

use crate::common::*;
use crate::recover::left_in;

const REBOOT: Operation = Operation::Reboot(ShutdownOptions { force: false, timeout_seconds: 0 });
const SHUTDOWN: Operation = Operation::Shutdown(ShutdownOptions { force: false, timeout_seconds: 0 });
const KILL: Operation = Operation::Shutdown(ShutdownOptions { force: true, timeout_seconds: 0 });

fn key(text: &str) -> Option<IdempotencyKey> {
    Some(text.parse().unwrap())
}

impl Vms {
    /// Calls with the key `k`.
    async fn keyed(&self, vm_id: &str, kind: impl Into<CallKind<'static>>) -> Result<Answered, ServiceError> {
        self.service.call(Call::new(vm_id.to_owned(), kind), me(), key("k")).await
    }

    /// Calls twice with the key `k`, and expects the answer of the first call from the second.
    async fn twice(&self, vm_id: &str, kind: impl Into<CallKind<'static>>) -> Answered {
        let kind = kind.into();
        let first = self.keyed(vm_id, kind.clone()).await.expect("the call succeeds");
        assert!(!first.replayed);
        self.again(vm_id, kind, &first).await;
        first
    }

    async fn again(&self, vm_id: &str, kind: impl Into<CallKind<'static>>, first: &Answered) {
        let second = self.keyed(vm_id, kind).await.expect("the answer is kept");
        assert_eq!((&second.answer, second.replayed), (&first.answer, true));
    }
}

fn create(bed: &Bed) -> CallKind<'static> {
    CallKind::Create(Box::new(VmRequest { backend: String::new(), config: bed.config() }))
}

/// Ends the life of a daemon in the middle of a keyed call: at the next call of `method`.
fn cut_short(bed: &Bed, kind: Operation, method: ScriptedMethod, act: ScriptedResult) {
    bed.life(async |vms| {
        vms.world.next(method, act);
        let before = vms.world.calls(method);
        let calling = vms.clone();
        let task = vms.begin(async move { calling.keyed("a", kind).await }).await;
        eventually("the call of the backend", || vms.world.calls(method) > before).await;
        assert!(!task.is_finished());
    });
    assert!(bed.stored("a").keyed.is_some(), "it is on record");
    assert_eq!(bed.store.answers(), [], "without an answer");
}

#[test]
fn a_repeated_key_gets_the_first_answer_and_nothing_is_done_again() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let created = vms.twice("", create(&bed)).await.answer;
        let vm = created.vm_id.as_str();
        assert_eq!((bed.store.vms().len(), bed.stored(vm).uid), (1, created.uid));
        assert_eq!(vms.twice(vm, Operation::Boot).await.answer.state, VmState::Running);
        let launches = vms.world.calls(ScriptedMethod::Launch);
        let rebooted = vms.twice(vm, REBOOT).await.answer;
        assert_eq!(rebooted.generation, bed.stored(vm).generation, "the generation of the outcome");
        assert_eq!(vms.world.calls(ScriptedMethod::Launch), launches + 1);
        assert_eq!(vms.twice(vm, Operation::Pause).await.answer.state, VmState::Paused);
        assert_eq!(vms.twice(vm, Operation::Resume).await.answer.state, VmState::Running);
        vms.twice(vm, CallKind::WriteConsole(b"typed"[..].into())).await;
        assert_eq!(vms.machine(vm).typed(), b"typed");
        let stopped = vms.twice(vm, KILL).await.answer;
        assert_eq!(stopped.ended_by, Some(EndedBy::Vmm));
        let updated = vms.twice(vm, Operation::Update(Box::new(labelled("blue")))).await.answer;
        assert_eq!(updated.generation, bed.stored(vm).generation);
        vms.twice(vm, Operation::Delete { force: false }).await;
        assert_eq!(bed.store.vms().len(), 0);
        // The answers outlive the VM, and a new VM of the same name is another one.
        vms.create(vm, bed.config()).await;
        vms.keyed(vm, Operation::Delete { force: false }).await.unwrap();
        assert_eq!(bed.store.vms().len(), 1, "the answer was kept for the first VM");
    });
}

#[test]
fn a_call_that_finds_its_result_in_place_keeps_its_answer_too() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("a", bed.config()).await;
        let before = bed.store.log().len();
        vms.twice("a", Operation::Boot).await;
        assert_eq!(bed.store.log().len(), before);
        vms.pause("a").await.unwrap();
        let first = vms.keyed("a", Operation::Boot).await.unwrap();
        assert_eq!((first.answer.state, first.replayed), (VmState::Running, true));
        let already = Operation::Update(Box::new(labelled("x")));
        vms.label("a", "x").await.unwrap();
        vms.twice("a", already).await;
    });
}

#[test]
fn a_duplicate_waits_for_the_first_call() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("a", bed.config()).await;
        let latch = CallLatch::default();
        vms.world.next(ScriptedMethod::Launch, ScriptedResult::Wait(latch.clone()));
        let boot = || {
            let calling = vms.clone();
            async move { calling.keyed("a", Operation::Boot).await }
        };
        let (first, second) = (vms.begin(boot()).await, vms.begin(boot()).await);
        eventually("the launch", || vms.world.calls(ScriptedMethod::Launch) == 1).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!first.is_finished() && !second.is_finished());
        // Another request under the same key does not wait.
        refused(vms.keyed("b", Operation::Boot).await, "key-reused");
        // The first client leaves; its call goes on.
        first.abort();
        latch.open();
        let second = second.await.unwrap().unwrap();
        assert_eq!((second.answer.state, second.replayed), (VmState::Running, true));
        assert_eq!(vms.world.calls(ScriptedMethod::Launch), 1);
    });
}

#[test]
fn a_key_belongs_to_a_request_a_method_and_a_caller() {
    let bed = Bed::new();
    bed.life(async |vms| {
        for vm in ["a", "b"] {
            vms.create(vm, bed.config()).await;
        }
        vms.keyed("a", Operation::Boot).await.unwrap();
        let text = refused(vms.keyed("b", Operation::Boot).await, "key-reused");
        assert!(text.contains("another BootVm request"), "{text}");
        assert_eq!(vms.state("b"), VmState::Created, "nothing was done");
        assert!(!vms.keyed("a", SHUTDOWN).await.unwrap().replayed, "another method");
        let other = Operation::Shutdown(ShutdownOptions { force: false, timeout_seconds: 7 });
        refused(vms.keyed("a", other).await, "key-reused");
        let boot = Call::new("b", Operation::Boot);
        let answered = vms.service.call(boot, Caller::named("another"), key("k")).await.unwrap();
        assert!(!answered.replayed, "another caller");
        assert_eq!(vms.state("b"), VmState::Running);
    });
}

#[test]
fn a_refusal_is_kept_and_a_transient_failure_is_not() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("a", bed.config()).await;
        let first = refused(vms.keyed("a", Operation::Pause).await, "illegal-state");
        vms.boot("a").await.unwrap();
        let second = refused(vms.keyed("a", Operation::Pause).await, "failed_precondition");
        assert_eq!((first, vms.state("a")), (second, VmState::Running), "a late duplicate does nothing");
        refused(vms.keyed("none", Operation::Resume).await, "not-found");
        vms.create("none", bed.config()).await;
        refused(vms.keyed("none", Operation::Resume).await, "not_found");
        let bad = CallKind::Create(Box::default());
        let first = vms.keyed("", bad.clone()).await.unwrap_err();
        let ServiceError::Invalid(violations) = first else { panic!("{first}") };
        let second = vms.keyed("", bad).await.unwrap_err();
        let ServiceError::Replayed(failed) = second else { panic!("{second}") };
        assert_eq!(failed.violations, violations, "with every violation");

        let lost = ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::NotApplied);
        vms.world.next(ScriptedMethod::Shutdown, lost);
        refused(vms.keyed("a", SHUTDOWN).await, "unavailable");
        assert!(!vms.keyed("a", SHUTDOWN).await.unwrap().replayed, "it was tried again");
        vms.boot("a").await.unwrap();
        vms.world.next(ScriptedMethod::WriteConsole, ScriptedResult::hang());
        let input = CallKind::WriteConsole(b"x"[..].into());
        refused(vms.keyed("a", input.clone()).await, "deadline");
        assert!(!vms.keyed("a", input).await.unwrap().replayed);
    });
}

#[test]
fn a_kept_answer_survives_a_restart_and_expires_after_24_hours() {
    let bed = Bed::new();
    let first = bed.life(async |vms| {
        vms.run("a", bed.config()).await;
        vms.twice("a", REBOOT).await
    });
    let launches = bed.world.calls(ScriptedMethod::Launch);
    bed.life(async |vms| {
        vms.again("a", REBOOT, &first).await;
        assert_eq!(bed.world.calls(ScriptedMethod::Launch), launches);
    });
    const DAY_MS: i64 = 24 * 60 * 60 * 1000;
    for (age_ms, is_kept) in [(DAY_MS - 60_000, true), (DAY_MS + 60_000, false), (-DAY_MS - 60_000, false)] {
        let before = bed.store.answers().remove(0);
        let now_ms = vmm_host::clock::now_ms();
        let aged = KeyChange::Keep(Box::new(KeptAnswer { time_ms: now_ms - age_ms, ..before }));
        bed.life(async |vms| {
            bed.store.commit_keyed(None, aged, false).await.unwrap();
            tokio::time::sleep(Duration::from_secs(601)).await;
            assert_eq!(bed.store.answers().len(), usize::from(is_kept), "{age_ms}");
            assert_eq!(vms.keyed("a", REBOOT).await.unwrap().replayed, is_kept);
        });
    }
}

#[test]
fn a_boot_that_a_crash_interrupted_is_answered_or_forgotten() {
    for guest in [GuestState::Running, GuestState::Paused] {
        let bed = Bed::new();
        left_in(&bed, VmState::Created);
        cut_short(&bed, Operation::Boot, ScriptedMethod::Launch, ScriptedResult::do_then_hang());
        bed.world.machine("a").unwrap().set_guest(guest);
        let launches = bed.world.calls(ScriptedMethod::Launch);
        bed.life(async |vms| {
            let stands = guest == GuestState::Running;
            let answered = vms.keyed("a", Operation::Boot).await.unwrap();
            assert_eq!((answered.answer.state, answered.replayed), (VmState::Running, stands));
            assert_eq!(vms.world.calls(ScriptedMethod::Launch), launches + usize::from(!stands));
            assert_eq!((vms.world.living(), bed.stored("a").keyed), (1, None));
        });
    }
}

#[test]
fn a_pause_that_a_crash_interrupted_is_answered_if_the_guest_is_paused() {
    for (act, replayed) in [(ScriptedResult::do_then_hang(), true), (ScriptedResult::hang(), false)] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        cut_short(&bed, Operation::Pause, ScriptedMethod::Pause, act);
        bed.life(async |vms| {
            let answered = vms.keyed("a", Operation::Pause).await.unwrap();
            assert_eq!((answered.answer.state, answered.replayed), (VmState::Paused, replayed));
        });
    }
}

#[test]
fn a_repetition_waits_for_the_operation_that_the_next_daemon_finishes() {
    for (operation, state) in [(SHUTDOWN, VmState::Shutdown), (REBOOT, VmState::Running)] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        cut_short(&bed, operation.clone(), ScriptedMethod::Shutdown, ScriptedResult::hang());
        bed.life(async |vms| {
            let answered = vms.keyed("a", operation.clone()).await.unwrap();
            assert_eq!((answered.answer.state, answered.replayed), (state, true));
            assert_eq!((vms.state("a"), bed.stored("a").keyed), (state, None));
        });
    }
}

#[test]
fn a_reboot_between_its_halves_is_carried_out_once() {
    for second_half in [false, true] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        let act = if second_half { ScriptedResult::do_then_hang() } else { ScriptedResult::hang() };
        cut_short(&bed, REBOOT, ScriptedMethod::Launch, act);
        let launches = bed.world.calls(ScriptedMethod::Launch);
        bed.life(async |vms| {
            let answered = vms.keyed("a", REBOOT).await.unwrap();
            assert_eq!((answered.answer.state, answered.replayed), (VmState::Running, true));
            assert_eq!(vms.world.calls(ScriptedMethod::Launch), launches + usize::from(!second_half));
            assert_eq!(vms.world.living(), 1);
        });
    }
}

#[test]
fn a_deletion_that_a_crash_interrupted_is_answered() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let delete = Operation::Delete { force: true };
    cut_short(&bed, delete.clone(), ScriptedMethod::Kill, ScriptedResult::hang());
    bed.life(async |vms| {
        assert!(vms.keyed("a", delete).await.unwrap().replayed);
        assert_eq!((bed.store.vms().len(), vms.world.living()), (0, 0));
    });
}

#[test]
fn input_that_a_crash_interrupted_is_never_typed_twice() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let input = || CallKind::WriteConsole(b"rm -r x\n"[..].into());
    bed.life(async |vms| {
        vms.world.next(ScriptedMethod::WriteConsole, ScriptedResult::do_then_hang());
        let calling = vms.clone();
        let _task = vms.begin(async move { calling.keyed("a", input()).await }).await;
        eventually("the input", || vms.world.calls(ScriptedMethod::WriteConsole) == 1).await;
    });
    bed.life(async |vms| {
        for _ in 0..2 {
            let text = refused(vms.keyed("a", input()).await, "aborted");
            assert!(text.contains("StreamConsole"), "{text}");
        }
        assert_eq!(vms.world.calls(ScriptedMethod::WriteConsole), 1);
    });
}

#[test]
fn another_request_under_the_key_of_an_interrupted_operation_is_refused() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    bed.life(async |vms| drop(vms.create("b", bed.config()).await));
    cut_short(&bed, Operation::Pause, ScriptedMethod::Pause, ScriptedResult::hang());
    bed.world.machine("a").unwrap().set_unprovable(true);
    bed.life(async |vms| {
        refused(vms.keyed("b", Operation::Pause).await, "key-reused");
        refused(vms.keyed("a", Operation::Pause).await, "unavailable");
        vms.force_shutdown("a").await.unwrap();
        refused(vms.keyed("b", Operation::Pause).await, "illegal-state");
    });
}

#[tokio::test(start_paused = true)]
async fn an_operation_is_carried_out_once_through_a_panic_of_its_actor() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.world.next(ScriptedMethod::Launch, ScriptedResult::Panic);
    let launches = vms.world.calls(ScriptedMethod::Launch);
    refused(vms.keyed("a", REBOOT).await, "internal");
    let answered = vms.keyed("a", REBOOT).await.unwrap();
    assert_eq!((answered.answer.state, answered.replayed), (VmState::Running, true));
    assert_eq!(vms.world.calls(ScriptedMethod::Launch), launches + 2, "the panic, and its repetition");
}

#[test]
fn an_outcome_that_the_store_refuses_at_first_is_the_answer_later() {
    use CommitTreatment::{Lose, Pass, Refuse, WriteAndFail};
    use StoreErrorKind::{Full, Io};
    for treatment in [Refuse(Full), Lose(Io), WriteAndFail(Io)] {
        let bed = Bed::new();
        bed.life(async |vms| {
            vms.run("a", bed.config()).await;
            bed.store.next([Pass, treatment, treatment]);
            vms.keyed("a", Operation::Pause).await.unwrap_err();
            assert_eq!(vms.state("a"), VmState::Paused, "it is shown");
            bed.store.behave();
            let answered = vms.keyed("a", Operation::Pause).await.unwrap();
            assert_eq!((answered.answer.state, answered.replayed), (VmState::Paused, true), "{treatment:?}");
            assert_eq!(vms.world.calls(ScriptedMethod::Pause), 1);
            vms.resume("a").await.unwrap();
            assert_eq!(bed.stored("a"), *vms.record("a"));
        });
    }
}

#[test]
fn a_creation_that_is_not_certain_is_taken_back_with_its_key() {
    use CommitTreatment::{Lose, WriteAndFail};
    for treatment in [Lose(StoreErrorKind::Io), WriteAndFail(StoreErrorKind::Io)] {
        let bed = Bed::new();
        bed.life(async |vms| {
            bed.store.next([treatment]);
            refused(vms.keyed("a", create(&bed)).await, "unavailable");
            assert_eq!((bed.store.vms().len(), bed.store.answers().len()), (0, 0));
            let created = vms.twice("a", create(&bed)).await.answer;
            assert_eq!(bed.stored("a").uid, created.uid);
        });
    }
}

#[test]
fn on_a_full_disk_a_call_with_a_key_touches_nothing() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("a", bed.config()).await;
        bed.store.always(CommitTreatment::Refuse(StoreErrorKind::Full));
        refused(vms.keyed("a", CallKind::WriteConsole(b"x"[..].into())).await, "exhausted");
        refused(vms.keyed("a", REBOOT).await, "exhausted");
        refused(vms.keyed("a", Operation::Resume).await, "exhausted");
        refused(vms.keyed("b", create(&bed)).await, "exhausted");
        assert_eq!((vms.machine("a").typed(), vms.world.calls(ScriptedMethod::Shutdown)), (Vec::new(), 0));
        vms.keyed("a", KILL).await.expect("the store keeps room for force");
        bed.store.behave();
        assert_eq!(bed.store.answers().len(), 1, "that of the forced call");
    });
}

#[test]
fn without_room_for_keys_only_calls_with_a_new_key_are_refused() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("a", bed.config()).await;
        let first = vms.twice("a", Operation::Boot).await;
        bed.store.limit_answers(1);
        let text = refused(vms.keyed("a", Operation::Pause).await, "exhausted");
        assert!(text.contains("without a key"), "{text}");
        assert_eq!(vms.state("a"), VmState::Running);
        vms.again("a", Operation::Boot, &first).await;
        vms.pause("a").await.unwrap();
    });
}

#[test]
fn a_call_without_a_key_keeps_no_answer() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let create = Call::new("a", create(&bed));
        let uid: VmUid = vms.service.call(create, me(), None).await.unwrap().answer.uid;
        assert_eq!(bed.stored("a").uid, uid);
        for operation in [Operation::Boot, REBOOT, KILL, Operation::Delete { force: false }] {
            vms.service.call(Call::new("a", operation), me(), None).await.unwrap();
        }
        assert_eq!(bed.store.answers(), []);
    });
}

#[test]
fn the_kept_answer_of_a_creation_has_its_warnings() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let created = vms.twice("a", create(&bed)).await;
        let kept = bed.store.answers().remove(0);
        assert_eq!(kept.answer, CallAnswer::Done(Box::new(created.answer)));
    });
}
