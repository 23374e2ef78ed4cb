//! The cases about the log of events: positions, pages and expiry.

use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::store::{Commit, RecordChange, VmRecord};

use super::StoreFixture;
use super::samples::{
    all_events, commit, event, events, id, insert, load, next, positions, race, record, remove, update,
};

/// Removing a VM again, or one that never existed, succeeds and logs nothing. The events of removed
/// VMs stay.
pub async fn a_second_removal_is_harmless_and_keeps_the_events(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let (vm, other) = (record("vm"), record("other"));
    commit(&*store, insert(&vm)).await;
    commit(&*store, insert(&other)).await;
    commit(&*store, remove(&vm)).await;
    for nothing in [remove(&vm), remove(&record("never"))] {
        assert_eq!(store.commit(nothing).await.expect("removing nothing is legal"), None);
    }
    drop(store);
    let store = fixture.open().await;
    assert_eq!(load(&*store).await.vms, [other]);
    let of_vm = events(&*store, EventSeq(0), Some(vm.vm_id.clone()), 10).await;
    assert_eq!(of_vm.iter().map(|e| e.seq.0).collect::<Vec<_>>(), [1, 3]);
}

/// Concurrent commits win or lose. The events of the winners fill the log without a gap, each in
/// the position of its answer.
pub async fn events_have_no_gaps_and_follow_the_order_of_the_answers(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let mut expected = Vec::new();
    for round in 0..8_i64 {
        let mut vms: Vec<VmRecord> = (0..8).map(|vm| record(&format!("vm-{round}-{vm}"))).collect();
        vms.extend((0..8).map(|_| record(&format!("rival-{round}"))));
        let results = race(&store, vms.iter().map(insert).collect()).await;
        let won = vms.iter().zip(results).filter_map(|(vm, result)| Some((result.ok()??, event(vm, 0))));
        expected.extend(won.map(|(seq, event)| VmEvent { seq, event }));
    }
    expected.sort_by_key(|event| event.seq);
    assert_eq!(expected.len(), 8 * 9);
    assert_eq!(positions(&*store).await, (1..=8 * 9).collect::<Vec<u64>>());
    assert_eq!(all_events(&*store).await, expected);
    drop(store);
    assert_eq!(all_events(&*fixture.open().await).await, expected);
}

/// A query begins after its position, ends at its limit and returns one name only, for every VM
/// that had the name.
pub async fn events_are_paged(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let mut of_even = Vec::new();
    for number in 0..20_u64 {
        let vm = record(if number % 2 == 0 { "even" } else { "odd" });
        let seq = commit(&*store, insert(&vm)).await;
        commit(&*store, remove(&vm)).await;
        if number % 2 == 0 {
            of_even.extend([seq.0, seq.0 + 1]);
        }
    }
    let mut paged = Vec::new();
    loop {
        let after = EventSeq(paged.last().copied().unwrap_or(0));
        let page = events(&*store, after, Some(id("even")), 3).await;
        assert!(page.len() <= 3);
        assert!(page.iter().all(|e| e.event.vm_id == id("even")));
        if page.is_empty() {
            break;
        }
        paged.extend(page.iter().map(|e| e.seq.0));
    }
    assert_eq!(paged, of_even);
    assert_eq!(positions(&*store).await, (1..=40).collect::<Vec<u64>>());
    assert!(events(&*store, EventSeq(0), None, 0).await.is_empty());
    assert!(events(&*store, EventSeq(40), None, 10).await.is_empty());
    assert!(events(&*store, EventSeq(u64::MAX), None, 10).await.is_empty());
    assert!(events(&*store, EventSeq(0), Some(id("nobody")), 10).await.is_empty());
    assert_eq!(events(&*store, EventSeq(38), None, usize::MAX).await.len(), 2);
}

/// Expiry removes older events and nothing else. No position is given again, even if all events are
/// gone and the store was reopened.
pub async fn expiry_removes_old_events_and_no_position_is_reused(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let mut vm = record("vm");
    for time_ms in 1..=10_i64 {
        let change = if time_ms == 1 { RecordChange::Insert } else { RecordChange::Update };
        let event = Some(event(&vm, time_ms));
        commit(&*store, Commit { change: change(Box::new(vm.clone())), event }).await;
        vm = next(&vm);
    }
    assert_eq!(store.expire_events(1).await.expect("expiry works"), 0);
    assert_eq!(store.expire_events(4).await.expect("expiry works"), 3);
    assert_eq!(positions(&*store).await, (4..=10).collect::<Vec<u64>>());
    assert_eq!(store.expire_events(i64::MAX).await.expect("expiry works"), 7);
    assert!(positions(&*store).await.is_empty());
    assert_eq!(load(&*store).await.last_event, EventSeq(10));
    drop(store);

    let store = fixture.open().await;
    let snapshot = load(&*store).await;
    assert_eq!(snapshot.last_event, EventSeq(10));
    assert_eq!(snapshot.vms.len(), 1, "expiry touches no VM");
    assert_eq!(commit(&*store, update(&vm)).await, EventSeq(11));
}

/// Expiry stops at the first event that is young enough, even if older events follow it.
pub async fn expiry_makes_no_gap_after_the_clock_was_set_back(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let mut vm = record("vm");
    for (at, time_ms) in [10, 20, 5, 1, 30].into_iter().enumerate() {
        let change = if at == 0 { RecordChange::Insert } else { RecordChange::Update };
        let event = Some(event(&vm, time_ms));
        commit(&*store, Commit { change: change(Box::new(vm.clone())), event }).await;
        vm = next(&vm);
    }
    assert_eq!(store.expire_events(15).await.expect("expiry works"), 1);
    assert_eq!(positions(&*store).await, [2, 3, 4, 5], "5 and 1 are behind 20");
    assert_eq!(store.expire_events(25).await.expect("expiry works"), 3);
    assert_eq!(positions(&*store).await, [5]);
}
