//! A VMM that is started with CreateVm: it serves BootVm, or it is gone soon.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect};
use vmm_core::state::VmState;
use vmm_core::store::StoreErrorKind;
use vmm_testkit::fake::{Act, Method};
use vmm_testkit::memory_store::Verdict::{Pass, Refuse};

use crate::common::{Bed, Vms, refused};

const WAIT: Duration = Duration::from_secs(2);

fn bed() -> Bed {
    let mut bed = Bed::new();
    bed.head_start = WAIT;
    bed
}

/// Waits until so many launches wait at their gates.
async fn until_waiting(vms: &Vms, count: usize) {
    tokio::time::timeout(Duration::from_secs(60), async {
        while vms.world.waiting().len() != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("the launches come to their gates, or leave them");
}

#[tokio::test(start_paused = true)]
async fn boot_goes_on_with_the_start_that_came_with_the_creation() {
    let bed = bed();
    let vms = bed.start().await;
    let created = vms.create("a", bed.with_disk("d")).await;
    until_waiting(&vms, 1).await;
    assert_eq!((vms.state("a"), vms.world.calls(Method::Launch)), (VmState::Created, 0), "no guest runs");
    assert_eq!(bed.stored("a"), *created, "and nobody is told of it");

    vms.boot("a").await.unwrap();
    assert_eq!((vms.world.calls(Method::Begin), vms.world.calls(Method::Launch)), (1, 1));
    assert_eq!((vms.world.waiting().len(), vms.world.living()), (0, 1));
    tokio::time::sleep(10 * WAIT).await;
    assert_eq!((vms.state("a"), vms.world.living()), (VmState::Running, 1), "nothing gives it up any more");

    vms.shutdown("a").await.unwrap();
    vms.boot("a").await.unwrap();
    assert_eq!(vms.world.calls(Method::Begin), 2, "the second boot has a start of its own");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_nobody_boots_has_no_vmm_for_long() {
    let bed = bed();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    until_waiting(&vms, 1).await;
    tokio::time::sleep(WAIT).await;
    until_waiting(&vms, 0).await;
    assert_eq!(vms.world.calls(Method::Sweep), 1, "what it may have left is looked for");
    vms.boot("a").await.unwrap();
    assert_eq!((vms.world.calls(Method::Begin), vms.world.living()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn deletion_ends_it_and_removes_its_folder() {
    let bed = bed();
    let vms = bed.start().await;
    for force in [false, true] {
        let created = vms.create("a", bed.config()).await;
        until_waiting(&vms, 1).await;
        assert!(bed.run_dir(&created).is_dir());
        if force {
            vms.force_delete("a").await.unwrap()
        } else {
            vms.delete("a").await.unwrap()
        };
        until_waiting(&vms, 0).await;
        assert!(!bed.run_dir(&created).exists());
    }
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_was_replaced_meanwhile_is_the_one_that_boots() {
    let bed = bed();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    until_waiting(&vms, 1).await;
    let kernel = bed.path("vmlinux");
    let mut other = std::fs::read(&kernel).unwrap();
    other.push(0);
    std::fs::write(&kernel, other).unwrap();
    vms.boot("a").await.unwrap();
    assert_eq!((vms.world.calls(Method::Begin), vms.world.living()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_is_told_to_nobody_and_boot_tries_for_itself() {
    let bed = bed();
    let vms = bed.start().await;
    vms.world.next(Method::Begin, Act::Fail(BackendErrorKind::NotInstalled, Effect::NotApplied));
    vms.create("a", bed.config()).await;
    while vms.world.calls(Method::Begin) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
    vms.boot("a").await.unwrap();
    assert_eq!((vms.world.calls(Method::Begin), vms.state("a")), (2, VmState::Running));
}

#[tokio::test(start_paused = true)]
async fn few_wait_at_once_and_every_vm_boots() {
    let bed = bed();
    let vms = bed.start().await;
    let most = std::thread::available_parallelism().unwrap().get();
    for number in 0..most + 3 {
        vms.create(&format!("vm{number}"), bed.config()).await;
    }
    until_waiting(&vms, most).await;
    for number in 0..most + 3 {
        vms.boot(&format!("vm{number}")).await.unwrap();
    }
    assert_eq!((vms.world.living(), vms.world.calls(Method::Begin)), (most + 3, most + 3));
    vms.create("later", bed.config()).await;
    until_waiting(&vms, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_cannot_be_recorded_begins_none() {
    let bed = bed();
    let vms = bed.start().await;
    bed.store.next([Refuse(StoreErrorKind::Full)]);
    refused(vms.try_create("a", bed.config()).await, "exhausted");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(vms.world.calls(Method::Begin), 0);
    assert!(!bed.runtime_dir().join("vms").exists());
}

#[tokio::test(start_paused = true)]
async fn a_start_whose_intent_cannot_be_recorded_is_taken_back() {
    let bed = bed();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    until_waiting(&vms, 1).await;
    bed.store.next([Refuse(StoreErrorKind::Full)]);
    refused(vms.boot("a").await, "exhausted");
    until_waiting(&vms, 0).await;
    assert_eq!((vms.state("a"), vms.world.calls(Method::Launch)), (VmState::Created, 0));
    bed.store.next([Pass]);
    vms.boot("a").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_stops_leaves_none_and_begins_no_more() {
    let bed = bed();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    until_waiting(&vms, 1).await;
    assert_eq!(vms.service.drain(WAIT / 2).await, 0, "it does not wait until it is given up by itself");
    assert!(vms.world.waiting().is_empty());
    vms.create("b", bed.config()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(vms.world.calls(Method::Begin), 1);
}

#[test]
fn what_a_killed_daemon_leaves_is_swept_and_the_vm_is_as_it_was() {
    let bed = bed();
    let created = bed.life(async |vms| {
        let created = vms.create("a", bed.config()).await;
        until_waiting(&vms, 1).await;
        created
    });
    bed.life(async |vms| {
        assert_eq!(*vms.record("a"), *created);
        vms.boot("a").await.unwrap();
    });
}
