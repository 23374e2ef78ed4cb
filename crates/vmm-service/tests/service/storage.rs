//! A store that fails: nothing runs that is not on record, and what is shown is true.

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause};
use vmm_core::state::{Phase, VmState};
use vmm_core::store::StoreErrorKind::{Full, Io};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment::{self, Lose, Pass, Refuse, WriteAndFail};

use crate::common::*;

const FAILURES: [CommitTreatment; 3] = [Refuse(Full), Lose(Io), WriteAndFail(Io)];

fn code(verdict: CommitTreatment) -> &'static str {
    if verdict == Refuse(Full) { "exhausted" } else { "unavailable" }
}

#[tokio::test(start_paused = true)]
async fn no_operation_begins_without_a_recorded_intent() {
    for verdict in FAILURES {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.create("a", bed.config()).await;
        bed.store.next([verdict]);
        refused(vms.boot("a").await, code(verdict));
        assert_eq!((vms.world.calls(ScriptedMethod::Launch), vms.state("a")), (0, VmState::Created));
        assert_eq!(vms.phase("a"), Phase::Created);
        vms.boot("a").await.expect("whether the last commit was written or not");
        bed.store.next([verdict]);
        refused(vms.pause("a").await, code(verdict));
        bed.store.next([verdict]);
        refused(vms.shutdown("a").await, code(verdict));
        assert_eq!(
            (vms.world.calls(ScriptedMethod::Pause), vms.world.calls(ScriptedMethod::Shutdown)),
            (0, 0)
        );
        assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Running));
        vms.pause("a").await.expect("however many commits in a row nobody knows of");
        assert_eq!(bed.stored("a"), *vms.record("a"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_cannot_be_recorded_runs_no_guest() {
    for verdict in FAILURES {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.create("a", bed.with_disk("d")).await;
        bed.store.next([Pass, verdict]);
        refused(vms.boot("a").await, code(verdict));
        assert_eq!((vms.world.calls(ScriptedMethod::Launch), vms.world.living()), (1, 0), "{verdict:?}");
        assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Created, "boot-failed"));
        assert_eq!(bed.stored("a"), *vms.record("a"), "{verdict:?}");
        vms.boot("a").await.expect("the disk was given back");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_boot_that_cannot_be_killed_is_swept() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    bed.store.next([Pass, Refuse(Full)]);
    vms.world.next(ScriptedMethod::Kill, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    refused(vms.boot("a").await, "exhausted");
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Created, 0));
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_cannot_be_recorded_cancels_the_waiting_restart() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ALWAYS, 0)).await.power_off();
    vms.until_phase("a", Phase::Restarting).await;
    bed.store.next([Pass, Refuse(Full)]);
    refused(vms.delete("a").await, "exhausted");
    tokio::time::sleep(std::time::Duration::from_secs(120)).await;
    assert_eq!((vms.phase("a"), vms.world.living()), (Phase::Stopped, 0));
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_outcome_is_shown() {
    for verdict in FAILURES {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.run("a", bed.config()).await;
        bed.store.next([Pass, verdict]);
        refused(vms.pause("a").await, code(verdict));
        assert_eq!(vms.state("a"), VmState::Paused, "{verdict:?}");
        eventually("the record of the pause", || bed.stored("a").state == VmState::Paused).await;
        bed.store.next([Pass, verdict]);
        refused(vms.shutdown("a").await, code(verdict));
        assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0), "{verdict:?}");
        vms.boot("a").await.unwrap();
        assert_eq!(bed.stored("a"), *vms.record("a"), "the next commit catches up");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_end_is_found_by_the_next_daemon() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    bed.store.always(Refuse(Full));
    machine.power_off();
    vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!(bed.stored("a").state, VmState::Running);
    refused(vms.boot("a").await, "exhausted");
    bed.store.behave();
    let vms = bed.start().await;
    assert_eq!((vms.state("a"), bed.stored("a").state), (VmState::Shutdown, VmState::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_deletion_keeps_the_vm_and_can_be_repeated() {
    for verdict in [Refuse(Io), Lose(Io)] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.run("a", bed.config()).await;
        bed.store.next([Pass, verdict, verdict]);
        refused(vms.force_delete("a").await, code(verdict));
        assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Shutdown, "delete-failed"));
        assert_eq!(vms.world.living(), 0);
        vms.boot("a").await.expect("the VM is whole");
        vms.force_delete("a").await.unwrap();
        assert!(bed.store.vms().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_with_a_lost_store_answer_is_confirmed() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    bed.store.next([Pass, WriteAndFail(Io)]);
    vms.delete("a").await.unwrap();
    refused(vms.service.get("a").map(drop), "not-found");
    vms.create("a", bed.config()).await;
}

#[tokio::test(start_paused = true)]
async fn only_forced_operations_work_on_a_full_disk() {
    for deletes in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        let machine = vms.run("a", bed.config()).await;
        bed.store.always(Refuse(Full));
        refused(vms.try_create("b", bed.config()).await, "exhausted");
        refused(vms.pause("a").await, "exhausted");
        refused(vms.shutdown("a").await, "exhausted");
        assert!(machine.lives());
        if deletes {
            assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
            assert!(bed.store.vms().is_empty());
        } else {
            vms.force_shutdown("a").await.unwrap();
            assert_eq!((bed.stored("a").state, vms.state("a")), (VmState::Shutdown, VmState::Shutdown));
            refused(vms.boot("a").await, "exhausted");
            refused(vms.delete("a").await, "exhausted");
            vms.force_delete("a").await.unwrap();
        }
        assert!(!machine.lives());
        // It is durable: another daemon knows of it.
        drop(vms);
        let vms = bed.start().await;
        refused(vms.service.get("a").map(drop), "not-found");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_forced_end_is_reported_and_can_be_repeated() {
    for verdict in [Refuse(Io), Lose(Io), WriteAndFail(Io)] {
        for deletes in [false, true] {
            let bed = Bed::new();
            let vms = bed.start().await;
            let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
            bed.store.always(verdict);
            let text = if deletes {
                refused(vms.force_delete("a").await, "unavailable")
            } else {
                refused(vms.force_shutdown("a").await, "unavailable")
            };
            assert!(text.contains("was ended all the same"), "{text}");
            assert!(!machine.lives(), "{verdict:?}");
            assert_eq!(vms.state("a"), VmState::Shutdown, "what is shown is true");
            bed.store.behave();
            tokio::time::sleep(std::time::Duration::from_secs(60)).await;
            assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0), "no policy undoes it");
            vms.boot("a").await.expect("the VM is whole");
            vms.force_delete("a").await.unwrap();
            assert_eq!((bed.store.vms().len(), vms.world.living()), (0, 0));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_unrecorded_forced_deletion_of_a_stopped_vm_changes_nothing() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    bed.store.always(Refuse(Io));
    let text = refused(vms.force_delete("a").await, "unavailable");
    assert!(!text.contains("ended"), "{text}");
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Created, Phase::Created));
}

#[tokio::test(start_paused = true)]
async fn a_deletion_with_a_lost_store_answer_has_one_event() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    bed.store.next([Pass, WriteAndFail(Io)]);
    vms.delete("a").await.unwrap();
    let kinds: Vec<_> = bed.store.log().iter().map(|it| it.event.kind.as_str()).collect();
    assert_eq!(kinds, ["created", "operation-started", "deleted"]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_outcome_is_recorded_later_and_once() {
    for verdict in FAILURES {
        for times in [1, 4] {
            let bed = Bed::new();
            let vms = bed.start().await;
            let machine = vms.run("a", bed.config()).await;
            bed.store.next(vec![verdict; times]);
            machine.power_off();
            vms.until("a", |record| record.state == VmState::Shutdown).await;
            // Nobody calls: the record and the watchers come to know of it all the same.
            eventually("the end on record", || bed.stored("a") == *vms.record("a")).await;
            tokio::time::sleep(std::time::Duration::from_secs(120)).await;
            let ends =
                bed.store.log().into_iter().filter(|it| it.event.kind.as_str() == "vmm-exited").count();
            assert_eq!(ends, 1, "{verdict:?}");
            bed.store.behave();
            vms.boot("a").await.unwrap();
            assert_eq!(bed.stored("a"), *vms.record("a"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_outcome_is_recorded_before_later_events() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    bed.store.next([Refuse(Full)]);
    machine.power_off();
    vms.until("a", |record| record.state == VmState::Shutdown).await;
    vms.boot("a").await.expect("the end is recorded first");
    let kinds: Vec<_> = bed.store.log().iter().map(|it| it.event.kind.as_str()).collect();
    assert_eq!(kinds[kinds.len() - 3..], ["vmm-exited", "operation-started", "state-changed"]);
}

#[tokio::test(start_paused = true)]
async fn the_process_of_an_unrecorded_boot_is_reported_and_ended_by_the_next_boot() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    bed.store.next([Refuse(Full)]);
    vms.world.next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    refused(vms.boot("a").await, "exhausted");
    assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Created, "vmm-does-not-end"));
    vms.world.next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    refused(vms.boot("a").await, "unavailable");
    assert_eq!(vms.world.calls(ScriptedMethod::Launch), 0, "nothing is started in its folder");
    vms.boot("a").await.expect("it is swept first");
}

#[test]
fn a_leftover_of_a_cancelled_boot_makes_no_vm_unreachable_after_a_restart() {
    let timeout = || ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown);
    for ends in [false, true] {
        let bed = Bed::new();
        bed.life(async |vms| {
            vms.create("a", bed.config()).await;
            bed.store.next([Refuse(Full)]);
            vms.world.next(ScriptedMethod::Sweep, timeout());
            refused(vms.boot("a").await, "exhausted");
        });
        if !ends {
            bed.world.next(ScriptedMethod::Sweep, timeout());
        }
        bed.life(async |vms| {
            let reported =
                if ends { (Phase::Created, "vmm-gone") } else { (Phase::Failed, "vmm-does-not-end") };
            assert_eq!((vms.phase("a"), vms.reason("a").as_str()), reported);
            let (stored, shown) = (bed.stored("a"), vms.record("a"));
            assert_eq!((stored.pending, stored.generation), (shown.pending, shown.generation));
            vms.boot("a").await.expect("the process is ended before the VM starts");
        });
    }
}

#[test]
fn a_process_in_the_run_folder_of_a_vm_at_rest_is_a_leftover() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("a", bed.config()).await;
    });
    let dir = bed.run_dir(&bed.stored("a"));
    std::fs::create_dir_all(&dir).unwrap();
    let user = ProcessOf::using(&dir);
    bed.world.next(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
    bed.life(async |vms| {
        assert_eq!((vms.phase("a"), vms.reason("a").as_str()), (Phase::Failed, "vmm-does-not-end"));
        vms.boot("a").await.expect("the process is ended before the VM starts");
    });
    drop(user);
}

/// A process whose arguments name a run folder.
struct ProcessOf(std::process::Child);

impl ProcessOf {
    fn using(dir: &std::path::Path) -> Self {
        let script = format!("read line; : {}", dir.display());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script]).stdin(std::process::Stdio::piped());
        Self(command.spawn().unwrap())
    }
}

impl Drop for ProcessOf {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(start_paused = true)]
async fn a_forced_end_that_failed_unrecorded_is_never_undone() {
    for delete in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
        machine.set_unkillable(true);
        // Even the room for forced operations is refused.
        bed.store.always(Refuse(Io));
        let result = if delete { vms.force_delete("a").await } else { vms.force_shutdown("a").await };
        let text = refused(result, "unavailable");
        assert!(text.contains("could not be ended either"), "{text}");
        bed.store.behave();
        machine.set_unkillable(false);
        machine.end(ExitCause::Requested);
        tokio::time::sleep(std::time::Duration::from_secs(120)).await;
        assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Shutdown, Phase::Stopped), "{delete}");
        assert_eq!((vms.reason("a").as_str(), vms.world.living()), ("shutdown", 0));
        assert_eq!(bed.stored("a"), *vms.record("a"));
    }
}
