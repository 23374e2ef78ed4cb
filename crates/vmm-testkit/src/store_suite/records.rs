//! The cases about records: names, generations, tombstones, and commits whose caller goes away.

use std::collections::BTreeSet;
use std::sync::Arc;

use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::VmUid;
use vmm_core::reason::Reason;
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{Commit, HostClaim, RecordChange, StoreErrorKind, Tombstone, VmRecord};

use super::StoreFixture;
use super::samples::{
    all_events, assert_refused, commit, event, events, insert, load, next, positions, race, record, remove,
    update,
};

/// VMs, events and the identity are present after reopening, and the oldest VM comes first.
pub async fn all_data_survives_a_reopening(fixture: &impl StoreFixture) {
    let (a, b) = (record("a"), record("b"));
    let store = fixture.open().await;
    let before = load(&*store).await;
    assert!(before.vms.is_empty());
    assert_eq!(before.last_event, EventSeq(0));
    // The younger VM is inserted first, because the order of VMs is by age and not by insertion.
    assert_eq!(commit(&*store, insert(&b)).await, EventSeq(1));
    assert_eq!(commit(&*store, insert(&a)).await, EventSeq(2));
    let changed = VmRecord {
        intent: None,
        run: None,
        ended_by: None,
        state: VmState::Shutdown,
        status: Status::plain(Phase::Failed, 9).because(Reason::BootFailed, "because"),
        ..next(&a)
    };
    let silent = Commit { change: RecordChange::Update(Box::new(changed.clone())), event: None };
    assert_eq!(store.commit(silent).await.expect("the commit is legal"), None);
    drop(store);

    let store = fixture.open().await;
    let after = load(&*store).await;
    assert_eq!(after.vms, [changed, b.clone()]);
    assert_eq!(after.instance, before.instance);
    assert_eq!(after.last_event, EventSeq(2));
    let expected = [
        VmEvent { seq: EventSeq(1), event: event(&b, 0) },
        VmEvent { seq: EventSeq(2), event: event(&a, 0) },
    ];
    assert_eq!(all_events(&*store).await, expected);
}

/// A read that begins after a commit was answered sees the commit.
pub async fn a_read_reflects_every_answered_commit(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let mut vm = record("vm");
    let mut last = commit(&*store, insert(&vm)).await;
    for _ in 0..50 {
        let snapshot = load(&*store).await;
        assert_eq!(snapshot.vms, [vm.clone()]);
        assert_eq!(snapshot.last_event, last);
        let newest = events(&*store, EventSeq(last.0 - 1), None, 10).await;
        assert_eq!(newest, [VmEvent { seq: last, event: event(&vm, 0) }]);
        vm = next(&vm);
        last = commit(&*store, update(&vm)).await;
    }
}

/// A second VM with a name in use is refused and leaves no event. The name of a removed VM is free.
pub async fn a_name_belongs_to_one_living_vm(fixture: &impl StoreFixture) {
    let (first, second, other) = (record("name"), record("name"), record("Name"));
    let store = fixture.open().await;
    commit(&*store, insert(&first)).await;
    assert_refused(store.commit(insert(&second)).await, StoreErrorKind::NameTaken);
    assert_refused(store.commit(insert(&first)).await, StoreErrorKind::NameTaken);
    assert_eq!(load(&*store).await.vms, std::slice::from_ref(&first));
    assert_eq!(positions(&*store).await, [1], "a refused commit leaves no event");
    commit(&*store, insert(&other)).await;
    commit(&*store, remove(&first)).await;
    commit(&*store, insert(&second)).await;
    assert_eq!(load(&*store).await.vms, [second, other]);
    assert_eq!(load(&*store).await.last_event, EventSeq(4));
}

/// Of many concurrent inserts with one name, one is recorded.
pub async fn one_of_many_inserts_of_a_name_succeeds(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let rivals: Vec<VmRecord> = (0..32).map(|_| record("name")).collect();
    let results = race(&store, rivals.iter().map(insert).collect()).await;
    let mut winners = Vec::new();
    for (rival, result) in rivals.into_iter().zip(results) {
        match result {
            Ok(seq) => winners.push((rival, seq)),
            Err(error) => assert_refused(Err(error), StoreErrorKind::NameTaken),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(winners[0].1, Some(EventSeq(1)));
    assert_eq!(load(&*store).await.vms, [winners[0].0.clone()]);
    assert_eq!(positions(&*store).await, [1]);
}

/// An update that does not follow the stored generation is refused and leaves no event.
pub async fn an_update_needs_the_previous_generation(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    assert_refused(store.commit(update(&next(&vm))).await, StoreErrorKind::Conflict);
    commit(&*store, insert(&vm)).await;
    let second = next(&vm);
    let third = next(&second);
    assert_refused(store.commit(update(&vm)).await, StoreErrorKind::Conflict);
    assert_refused(store.commit(update(&third)).await, StoreErrorKind::Conflict);
    commit(&*store, update(&second)).await;
    assert_refused(store.commit(update(&second)).await, StoreErrorKind::Conflict);
    assert_eq!(load(&*store).await.vms, std::slice::from_ref(&second));
    commit(&*store, remove(&second)).await;
    assert_refused(store.commit(update(&third)).await, StoreErrorKind::Conflict);
    assert!(load(&*store).await.vms.is_empty());
    assert_eq!(positions(&*store).await, [1, 2, 3]);
}

/// Of many concurrent updates to one generation, one is recorded.
pub async fn one_of_many_updates_of_a_generation_succeeds(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    commit(&*store, insert(&vm)).await;
    let rivals: Vec<VmRecord> = (0..16).map(|at| VmRecord { modified_ms: 1_000 + at, ..next(&vm) }).collect();
    let results = race(&store, rivals.iter().map(update).collect()).await;
    let won: Vec<&VmRecord> =
        rivals.iter().zip(&results).filter(|(_, r)| r.is_ok()).map(|(v, _)| v).collect();
    assert_eq!(load(&*store).await.vms.iter().collect::<Vec<_>>(), won);
    for result in results.into_iter().filter(Result::is_err) {
        assert_refused(result, StoreErrorKind::Conflict);
    }
    assert_eq!(positions(&*store).await, [1, 2]);
}

/// Burying a VM removes the VM and logs its event. The tombstone stays across openings until it is
/// removed.
pub async fn a_tombstone_stays_until_its_removal(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    let grave = Tombstone { claims: vec![HostClaim::Tap { name: "tap0".to_owned() }], vm: vm.clone() };
    let bury = Commit { change: RecordChange::Bury(Box::new(grave.clone())), event: Some(event(&vm, 0)) };
    assert_eq!(store.commit(bury.clone()).await.expect("burying nothing is legal"), None);
    assert!(load(&*store).await.tombstones.is_empty(), "a VM that never was leaves none");
    commit(&*store, insert(&vm)).await;
    assert_eq!(commit(&*store, bury).await, EventSeq(2));
    // The name is free again, although a process of the first VM may live.
    commit(&*store, insert(&record("vm"))).await;
    drop(store);
    let store = fixture.open().await;
    let found = load(&*store).await;
    assert_eq!((found.tombstones, found.vms.len()), (vec![grave], 1));
    for _ in 0..2 {
        let unbury = Commit { change: RecordChange::Unbury(vm.uid), event: None };
        assert_eq!(store.commit(unbury).await.expect("repeating it is harmless"), None);
    }
    assert!(load(&*store).await.tombstones.is_empty());
}

/// A commit whose caller goes away is applied fully or not at all, and delays no other commit.
pub async fn a_cancelled_commit_is_complete_or_absent(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vms: Vec<VmRecord> = (0..32).map(|number| record(&format!("vm-{number}"))).collect();
    for vm in &vms {
        let store = Arc::clone(&store);
        let commit = insert(vm);
        let caller = tokio::spawn(async move { store.commit(commit).await });
        tokio::task::yield_now().await;
        caller.abort();
        // Waits for the end of the task. Both results are legal, because the abort may come too
        // late.
        let _ = caller.await;
    }
    commit(&*store, insert(&record("last"))).await;
    drop(store);
    let store = fixture.open().await;
    let recorded: BTreeSet<VmUid> = load(&*store).await.vms.iter().map(|vm| vm.uid).collect();
    let log = all_events(&*store).await;
    assert_eq!(log.iter().map(|e| e.event.uid).collect::<BTreeSet<_>>(), recorded);
    assert_eq!(log.len(), recorded.len(), "one event each");
}

/// A forced commit obeys the rules of an ordinary one.
pub async fn a_forced_commit_obeys_the_rules_of_a_plain_one(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    assert_refused(store.commit_forced(update(&next(&vm))).await, StoreErrorKind::Conflict);
    commit(&*store, insert(&vm)).await;
    let changed = next(&vm);
    assert_eq!(store.commit_forced(update(&changed)).await.expect("it is legal"), Some(EventSeq(2)));
    assert_eq!(load(&*store).await.vms, [changed]);
    assert_eq!(store.commit_forced(remove(&vm)).await.expect("it is legal"), Some(EventSeq(3)));
    drop(store);
    let store = fixture.open().await;
    assert!(load(&*store).await.vms.is_empty());
    assert_eq!(positions(&*store).await, [1, 2, 3]);
}
