//! Spare VMMs: one that waits serves the next VM that is created, none holds a guest, and none outlives its use.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect};
use vmm_core::id::VmUid;
use vmm_core::state::VmState;
use vmm_core::store::StoreErrorKind;
use vmm_host::run_dir::{self, SpareMark};
use vmm_service::ListQuery;
use vmm_testkit::fake::{CallLatch, ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment::{Pass, Refuse};

use crate::common::{Bed, Vms, refused};

const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

fn bed(spare_vmms: usize) -> Bed {
    let mut bed = Bed::new();
    bed.spare_vmms = spare_vmms;
    bed
}

/// Waits until so many spare VMMs wait, and answers their uids.
async fn until_waiting(vms: &Vms, count: usize) -> Vec<VmUid> {
    tokio::time::timeout(Duration::from_secs(60), async {
        while vms.world.spares().len() != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("so many spare VMMs wait");
    vms.world.spares()
}

/// A service whose backend has been used once: its VM is called `first`.
async fn warm(bed: &Bed) -> (Vms, Vec<VmUid>) {
    let vms = bed.start().await;
    vms.run("first", bed.config()).await;
    let waiting = until_waiting(&vms, bed.spare_vmms).await;
    (vms, waiting)
}

/// The folders that bear a mark.
fn marked(bed: &Bed) -> Vec<PathBuf> {
    let folders = run_dir::list(&bed.runtime_dir()).unwrap().into_iter().map(|(_, dir)| dir);
    folders.filter(|dir| SpareMark::read(dir).unwrap().is_some()).collect()
}

#[tokio::test(start_paused = true)]
async fn the_next_vm_gets_the_spare_vmm_and_the_pool_is_refilled() {
    let bed = bed(1);
    let (vms, waiting) = warm(&bed).await;
    assert_eq!(marked(&bed), [waiting[0].run_dir(&bed.runtime_dir())]);

    let second = vms.create("second", bed.with_disk("d")).await;
    assert_eq!(second.uid, waiting[0]);
    assert_eq!((vms.state("second"), vms.world.calls(ScriptedMethod::StartSpare)), (VmState::Created, 1));
    vms.boot("second").await.unwrap();
    assert!(vms.world.was_spare(second.uid));
    assert_eq!(SpareMark::read(&bed.run_dir(&second)).unwrap(), None, "it has been told what to run");
    assert_ne!(until_waiting(&vms, 1).await, waiting);

    vms.shutdown("second").await.unwrap();
    vms.boot("second").await.unwrap();
    assert_eq!(vms.world.living(), 2);
}

#[tokio::test(start_paused = true)]
async fn spare_vmms_need_the_setting_and_an_earlier_boot_on_the_backend() {
    let bed = bed(0);
    let vms = bed.start().await;
    vms.run("first", bed.config()).await;
    tokio::time::sleep(DRAIN_TIMEOUT).await;
    assert_eq!(vms.world.calls(ScriptedMethod::StartSpare), 0);
    drop(vms);

    let bed = self::bed(2);
    let vms = bed.start().await;
    vms.create("first", bed.config()).await;
    tokio::time::sleep(DRAIN_TIMEOUT).await;
    assert_eq!(vms.world.calls(ScriptedMethod::StartSpare), 0);
    vms.boot("first").await.unwrap();
    until_waiting(&vms, 2).await;
    let other = vms.try_create_on("other", "other", bed.config()).await.unwrap().record;
    assert!(!vms.world.spares().contains(&other.uid), "they are not that backend's");
}

/// Lets the host's clock, by which VMs are created, go on.
#[expect(
    clippy::disallowed_methods,
    reason = "the runtime's clock stands still, and nobody else is on this thread"
)]
fn a_moment_later() {
    std::thread::sleep(Duration::from_millis(2));
}

#[tokio::test(start_paused = true)]
async fn lists_are_ordered_by_creation_with_uids_of_spare_vmms() {
    let bed = bed(1);
    let (vms, waiting) = warm(&bed).await;
    a_moment_later();
    vms.try_create_on("other", "between", bed.config()).await.unwrap();
    a_moment_later();
    assert_eq!(vms.create("last", bed.config()).await.uid, waiting[0]);
    let mut names = Vec::new();
    let mut query = ListQuery { page_size: 1, ..ListQuery::default() };
    loop {
        let page = vms.service.list(&query).unwrap();
        names.extend(page.vms.iter().map(|vm| vm.vm_id.to_string()));
        if page.next_page_token.is_empty() {
            break;
        }
        query.page_token = page.next_page_token;
    }
    assert_eq!(names, ["first", "between", "last"]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_creation_returns_its_spare_reservation() {
    let bed = bed(1);
    let (vms, waiting) = warm(&bed).await;
    let mut bad = bed.config();
    bad.boot.as_mut().unwrap().kernel_path = bed.path("invalid");
    refused(vms.try_create("second", bad).await, "invalid");
    bed.store.next([Refuse(StoreErrorKind::Full)]);
    refused(vms.try_create("second", bed.config()).await, "exhausted");
    assert_eq!(vms.world.spares(), waiting);
    assert_eq!(vms.create("second", bed.config()).await.uid, waiting[0]);
}

#[tokio::test(start_paused = true)]
async fn a_deletion_ends_the_reserved_spare_vmm_and_removes_its_folder() {
    let bed = bed(1);
    for force in [false, true] {
        let (vms, _) = warm(&bed).await;
        let second = vms.create("second", bed.config()).await;
        let deleted = if force { vms.force_delete("second").await } else { vms.delete("second").await };
        deleted.unwrap();
        assert_eq!(vms.world.spares(), []);
        assert!(!bed.run_dir(&second).exists());
        vms.force_delete("first").await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn unbooted_vms_hold_a_bounded_number_of_spare_vmms() {
    let bed = bed(1);
    let (vms, _) = warm(&bed).await;
    let mut created = Vec::new();
    for number in 0..4 {
        created.push(vms.create(&format!("idle{number}"), bed.config()).await);
        vms.run(&format!("busy{number}"), bed.config()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let spares = vms.world.spares();
        assert!(spares.len() <= 2, "one is free and one promised: {spares:?}");
    }
    let last = Arc::clone(created.last().unwrap());
    assert!(vms.world.spares().contains(&last.uid), "the oldest promise is the one that is broken");
    for (number, vm) in created.iter().enumerate() {
        vms.boot(vm.vm_id.as_str()).await.unwrap();
        assert_eq!(vms.world.was_spare(vm.uid), number == 3);
    }
}

/// Lets two VMs be started though no spare VMM can be, and answers how often one was tried.
async fn tried_in_vain(bed: &Bed, vms: &Vms, kind: BackendErrorKind) -> usize {
    vms.world.always(ScriptedMethod::StartSpare, ScriptedResult::Fail(kind, Effect::NotApplied));
    for name in ["a", "b"] {
        vms.run(name, bed.config()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(marked(bed), Vec::<PathBuf>::new());
    }
    vms.world.behave();
    vms.world.calls(ScriptedMethod::StartSpare)
}

#[tokio::test(start_paused = true)]
async fn a_spare_vmm_that_fails_to_start_leaves_nothing_and_is_tried_again() {
    let bed = bed(1);
    let vms = bed.start().await;
    assert_eq!(tried_in_vain(&bed, &vms, BackendErrorKind::NotInstalled).await, 2);
    vms.run("c", bed.config()).await;
    until_waiting(&vms, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_backend_without_spare_vmms_is_asked_once() {
    let bed = bed(1);
    let vms = bed.start().await;
    assert_eq!(tried_in_vain(&bed, &vms, BackendErrorKind::Unsupported("spare VMMs")).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_boot_without_a_recorded_intent_leaves_no_process() {
    let bed = bed(1);
    let (vms, waiting) = warm(&bed).await;
    vms.create("second", bed.config()).await;
    bed.store.next([Refuse(StoreErrorKind::Full)]);
    refused(vms.boot("second").await, "exhausted");
    assert_eq!((vms.state("second"), vms.world.spares()), (VmState::Created, vec![]));
    bed.store.next([Pass]);
    vms.boot("second").await.unwrap();
    assert!(!vms.world.was_spare(waiting[0]));
}

#[tokio::test(start_paused = true)]
async fn a_stopping_daemon_leaves_no_spare_vmm() {
    let bed = bed(2);
    let (vms, _) = warm(&bed).await;
    let promised = vms.create("second", bed.config()).await;
    let latch = CallLatch::default();
    vms.world.next(ScriptedMethod::StartSpare, ScriptedResult::Wait(latch.clone()));
    vms.run("third", bed.config()).await;
    while vms.world.calls(ScriptedMethod::StartSpare) < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (left, ()) = tokio::join!(vms.service.drain(DRAIN_TIMEOUT), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        latch.open();
    });
    assert_eq!((left, vms.world.spares()), (0, vec![]));
    assert!(marked(&bed).iter().all(|dir| *dir == bed.run_dir(&promised)), "the folder is that VM's own");
    assert_eq!(vms.world.living(), 2, "VMs go on");
}

#[test]
fn spare_vmms_of_a_killed_daemon_are_ended_by_the_next() {
    let bed = bed(2);
    let (promised, strange) = bed.life(async |vms| {
        vms.run("first", bed.config()).await;
        until_waiting(&vms, 2).await;
        let promised = vms.create("second", bed.config()).await;
        // A folder without a mark that holds something is nobody's business.
        let uid = VmUid::new(uuid::Uuid::now_v7());
        (promised, run_dir::create(&bed.runtime_dir(), uid).unwrap())
    });
    std::fs::write(strange.join("something"), "").unwrap();
    bed.life(async |vms| {
        assert_eq!(vms.world.spares(), [], "no guest was in them");
        assert_eq!(marked(&bed), Vec::<PathBuf>::new());
        assert!(strange.is_dir() && bed.run_dir(&promised).is_dir());
        assert_eq!((vms.state("first"), vms.state("second")), (VmState::Running, VmState::Created));
        vms.boot("second").await.unwrap();
        assert!(!vms.world.was_spare(promised.uid));
    });
}

#[test]
fn a_spare_vmm_of_another_instance_is_kept() {
    let bed = bed(1);
    let uid = VmUid::new(uuid::Uuid::now_v7());
    let dir = run_dir::create(&bed.runtime_dir(), uid).unwrap();
    let stranger = SpareMark {
        instance: vmm_core::id::InstanceId::new(uuid::Uuid::now_v7()),
        backend: vmm_core::id::BackendName::new("fake"),
    };
    stranger.put(&dir).unwrap();
    bed.life(async |vms| {
        assert_eq!(vms.world.calls(ScriptedMethod::Sweep), 0);
        assert_eq!(marked(&bed), [dir]);
    });
}
