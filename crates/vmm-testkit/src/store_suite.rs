//! The suite that every [`Store`] must pass.
//!
//! A case gets a [`Place`], which keeps the data of a store so that the store can be opened again.
//! Put `vmm_testkit::store_suite!(make_place);` into a test file, where `make_place` is a function
//! that makes an empty place. Each case becomes a test there (which needs `tokio` with `macros` and
//! `rt-multi-thread`).

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmm_core::backend::Effect;
use vmm_core::caller::Caller;
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, StorageDevice, VmConfig};
use vmm_core::event::{EventKind, EventSeq, NewEvent, VmEvent};
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::state::{EndedBy, Phase, Status, VmState};
use vmm_core::store::{
    Change, Commit, DiskKey, EventQuery, HostClaim, Intent, IntentKind, Namespaces, ProcessIdentity,
    Requested, RunRecord, Sent, Snapshot, Store, StoreError, StoreErrorKind, Tombstone, VmRecord,
};

/// A place that keeps the data of a store.
pub trait Place: Send + Sync {
    /// Opens the store of this place, with the data that the previous one left.
    fn open(&self) -> impl Future<Output = Arc<dyn Store>> + Send;
}

/// Makes a test of each case of the suite, each with a place made by the function `$make`.
#[macro_export]
macro_rules! store_suite {
    ($make:path) => {
        $crate::store_suite!(@each $make:
            everything_survives_reopening
            a_read_reflects_every_answer
            a_name_belongs_to_one_living_vm
            of_many_inserts_of_a_name_one_wins
            an_update_needs_the_generation_before
            of_many_updates_to_a_generation_one_wins
            removing_twice_is_harmless_and_keeps_the_events
            a_tombstone_stays_until_it_is_taken_away
            events_have_no_gaps_and_follow_the_answers
            events_are_paged
            expiry_takes_the_old_and_no_place_is_given_twice
            expiry_digs_no_hole_where_the_clock_was_set_back
            a_caller_that_goes_away_leaves_all_or_nothing
            what_is_forced_follows_the_same_rules
        );
    };
    (@each $make:path: $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::store_suite::$case(&$make()).await;
            }
        )*
    };
}

/// Returns the record of a new VM called `name`, with a value in every field.
pub fn record(name: &str) -> VmRecord {
    let uid = VmUid::new(Uuid::now_v7());
    let config = VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: 512 << 20, ..MemoryConfig::default() }),
        boot: Some(BootConfig {
            kernel_path: "/boot/vmlinux".to_owned(),
            kernel_args: "console=ttyS0 note=\"ü\\\"".to_owned(),
            ..BootConfig::default()
        }),
        storage: vec![StorageDevice { id: "disk0".to_owned(), ..StorageDevice::default() }],
        metadata: [("team".to_owned(), "a'b\n\u{0}".to_owned())].into(),
        ..VmConfig::default()
    };
    VmRecord {
        uid,
        vm_id: id(name),
        backend: BackendName::new("fake"),
        requested: Sent::pack(&Requested { backend: String::new(), config: config.clone() }),
        config,
        state: VmState::Created,
        status: Status::plain(Phase::Created, 1),
        generation: 1,
        created_ms: 1_700_000_000_000,
        modified_ms: 1_700_000_000_000,
        intent: Some(Intent {
            kind: IntentKind::Reboot {
                ask_guest_for: Some(Duration::from_millis(1)),
                claims: vec![HostClaim::Tap { name: "tap1".to_owned() }],
            },
            caller: Caller::anonymous(Some("10.0.0.1".to_owned())),
            since_ms: -1,
        }),
        run: Some(RunRecord {
            process: ProcessIdentity {
                pid: 4711,
                start_ticks: u64::MAX,
                boot_id: "b-1".to_owned(),
                namespaces: Some(Namespaces { pid: 4, time: 5 }),
            },
            socket: "/run/x.sock".into(),
            version: "1.2.3".to_owned(),
            accelerator: "kvm".to_owned(),
            machine: "q35".to_owned(),
            started_ms: 3,
            taps: vec!["vnet0".to_owned()],
            claims: vec![
                HostClaim::Disk {
                    device: 1,
                    inode: 2,
                    writable: true,
                    path: "/d".into(),
                    lies_on: vec![DiskKey { device: 3, inode: 4 }],
                },
                HostClaim::Tap { name: "tap0".to_owned() },
            ],
        }),
        owns_console_output: true,
        ended_by: Some(EndedBy::CtrlAltDel),
        kind: VmKind::attached("/run/ch.sock"),
        imported: true,
        untold: vec!["a vsock device".to_owned()],
    }
}

/// Returns `record` with its next change.
pub fn next(record: &VmRecord) -> VmRecord {
    VmRecord { generation: record.generation + 1, modified_ms: record.modified_ms + 1, ..record.clone() }
}

/// Returns an event of `record` at `time_ms`.
pub fn event(record: &VmRecord, time_ms: i64) -> NewEvent {
    NewEvent {
        time_ms,
        vm_id: record.vm_id.clone(),
        uid: record.uid,
        kind: EventKind::StateChanged,
        state: record.state,
        status: record.status.clone(),
        cause: format!("generation-{}", record.generation),
        caller: Caller::named("suite"),
        ended_by: record.ended_by,
        metadata: record.config.metadata.clone(),
    }
}

/// Returns the commit of a new VM, with an event at time 0.
pub fn insert(record: &VmRecord) -> Commit {
    Commit { change: Change::Insert(Box::new(record.clone())), event: Some(event(record, 0)) }
}

/// Returns the commit of a changed VM, with an event at time 0.
pub fn update(record: &VmRecord) -> Commit {
    Commit { change: Change::Update(Box::new(record.clone())), event: Some(event(record, 0)) }
}

/// Returns the commit of a deleted VM, with an event at time 0.
pub fn remove(record: &VmRecord) -> Commit {
    Commit { change: Change::Remove(record.uid), event: Some(event(record, 0)) }
}

/// Returns all events of `store`, read page by page.
pub async fn all_events(store: &dyn Store) -> Vec<VmEvent> {
    let mut all: Vec<VmEvent> = Vec::new();
    loop {
        let after = all.last().map(|event| event.seq).unwrap_or_default();
        let page = events(store, after, None, 1000).await;
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

fn id(name: &str) -> VmId {
    name.parse().expect("a legal name")
}

async fn load(store: &dyn Store) -> Snapshot {
    store.load().await.expect("loading works")
}

async fn commit(store: &dyn Store, commit: Commit) -> EventSeq {
    store.commit(commit).await.expect("the commit is legal").expect("it has an event")
}

async fn events(store: &dyn Store, after: EventSeq, vm_id: Option<VmId>, limit: usize) -> Vec<VmEvent> {
    store.events(EventQuery { after, vm_id, limit }).await.expect("reading works")
}

async fn places(store: &dyn Store) -> Vec<u64> {
    all_events(store).await.into_iter().map(|event| event.seq.0).collect()
}

fn assert_refused(result: Result<Option<EventSeq>, StoreError>, kind: StoreErrorKind) {
    let error = result.expect_err("the commit is refused");
    assert_eq!((error.kind, error.effect), (kind, Effect::NotApplied), "{error}");
}

/// Runs all commits at once and returns their results in the order of `commits`.
async fn race(store: &Arc<dyn Store>, commits: Vec<Commit>) -> Vec<Result<Option<EventSeq>, StoreError>> {
    let tasks: Vec<_> = commits
        .into_iter()
        .map(|commit| {
            let store = Arc::clone(store);
            tokio::spawn(async move { store.commit(commit).await })
        })
        .collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no commit panics"));
    }
    results
}

/// VMs, events and the identity are present after reopening, and the oldest VM comes first.
pub async fn everything_survives_reopening(place: &impl Place) {
    let (a, b) = (record("a"), record("b"));
    let store = place.open().await;
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
        status: Status::plain(Phase::Failed, 9).because(vmm_core::reason::Reason::BootFailed, "because"),
        ..next(&a)
    };
    let silent = Commit { change: Change::Update(Box::new(changed.clone())), event: None };
    assert_eq!(store.commit(silent).await.expect("the commit is legal"), None);
    drop(store);

    let store = place.open().await;
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
pub async fn a_read_reflects_every_answer(place: &impl Place) {
    let store = place.open().await;
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
pub async fn a_name_belongs_to_one_living_vm(place: &impl Place) {
    let (first, second, other) = (record("name"), record("name"), record("Name"));
    let store = place.open().await;
    commit(&*store, insert(&first)).await;
    assert_refused(store.commit(insert(&second)).await, StoreErrorKind::NameTaken);
    assert_refused(store.commit(insert(&first)).await, StoreErrorKind::NameTaken);
    assert_eq!(load(&*store).await.vms, std::slice::from_ref(&first));
    assert_eq!(places(&*store).await, [1], "a refused commit leaves no event");
    commit(&*store, insert(&other)).await;
    commit(&*store, remove(&first)).await;
    commit(&*store, insert(&second)).await;
    assert_eq!(load(&*store).await.vms, [second, other]);
    assert_eq!(load(&*store).await.last_event, EventSeq(4));
}

/// Of many concurrent inserts with one name, one is recorded.
pub async fn of_many_inserts_of_a_name_one_wins(place: &impl Place) {
    let store = place.open().await;
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
    assert_eq!(places(&*store).await, [1]);
}

/// An update that does not follow the stored generation is refused and leaves no event.
pub async fn an_update_needs_the_generation_before(place: &impl Place) {
    let store = place.open().await;
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
    assert_eq!(places(&*store).await, [1, 2, 3]);
}

/// Of many concurrent updates to one generation, one is recorded.
pub async fn of_many_updates_to_a_generation_one_wins(place: &impl Place) {
    let store = place.open().await;
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
    assert_eq!(places(&*store).await, [1, 2]);
}

/// Burying a VM removes the VM and logs its event. The tombstone stays across openings until it is
/// removed.
pub async fn a_tombstone_stays_until_it_is_taken_away(place: &impl Place) {
    let store = place.open().await;
    let vm = record("vm");
    let grave = Tombstone { claims: vec![HostClaim::Tap { name: "tap0".to_owned() }], vm: vm.clone() };
    let bury = Commit { change: Change::Bury(Box::new(grave.clone())), event: Some(event(&vm, 0)) };
    assert_eq!(store.commit(bury.clone()).await.expect("burying nothing is legal"), None);
    assert!(load(&*store).await.tombstones.is_empty(), "a VM that never was leaves none");
    commit(&*store, insert(&vm)).await;
    assert_eq!(commit(&*store, bury).await, EventSeq(2));
    // The name is free again, although a process of the first VM may live.
    commit(&*store, insert(&record("vm"))).await;
    drop(store);
    let store = place.open().await;
    let found = load(&*store).await;
    assert_eq!((found.tombstones, found.vms.len()), (vec![grave], 1));
    for _ in 0..2 {
        let unbury = Commit { change: Change::Unbury(vm.uid), event: None };
        assert_eq!(store.commit(unbury).await.expect("repeating it is harmless"), None);
    }
    assert!(load(&*store).await.tombstones.is_empty());
}

/// Removing a VM again, or one that never existed, succeeds and logs nothing. The events of removed
/// VMs stay.
pub async fn removing_twice_is_harmless_and_keeps_the_events(place: &impl Place) {
    let store = place.open().await;
    let (vm, other) = (record("vm"), record("other"));
    commit(&*store, insert(&vm)).await;
    commit(&*store, insert(&other)).await;
    commit(&*store, remove(&vm)).await;
    for nothing in [remove(&vm), remove(&record("never"))] {
        assert_eq!(store.commit(nothing).await.expect("removing nothing is legal"), None);
    }
    drop(store);
    let store = place.open().await;
    assert_eq!(load(&*store).await.vms, [other]);
    let of_vm = events(&*store, EventSeq(0), Some(vm.vm_id.clone()), 10).await;
    assert_eq!(of_vm.iter().map(|e| e.seq.0).collect::<Vec<_>>(), [1, 3]);
}

/// Concurrent commits win or lose. The events of the winners fill the log without a gap, each in
/// the place of its answer.
pub async fn events_have_no_gaps_and_follow_the_answers(place: &impl Place) {
    let store = place.open().await;
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
    assert_eq!(places(&*store).await, (1..=8 * 9).collect::<Vec<u64>>());
    assert_eq!(all_events(&*store).await, expected);
    drop(store);
    assert_eq!(all_events(&*place.open().await).await, expected);
}

/// A query begins after its place, ends at its limit and returns one name only, for every VM that
/// had the name.
pub async fn events_are_paged(place: &impl Place) {
    let store = place.open().await;
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
    assert_eq!(places(&*store).await, (1..=40).collect::<Vec<u64>>());
    assert!(events(&*store, EventSeq(0), None, 0).await.is_empty());
    assert!(events(&*store, EventSeq(40), None, 10).await.is_empty());
    assert!(events(&*store, EventSeq(u64::MAX), None, 10).await.is_empty());
    assert!(events(&*store, EventSeq(0), Some(id("nobody")), 10).await.is_empty());
    assert_eq!(events(&*store, EventSeq(38), None, usize::MAX).await.len(), 2);
}

/// Expiry removes older events and nothing else. No place is given again, even if all events are
/// gone and the store was reopened.
pub async fn expiry_takes_the_old_and_no_place_is_given_twice(place: &impl Place) {
    let store = place.open().await;
    let mut vm = record("vm");
    for time_ms in 1..=10_i64 {
        let change = if time_ms == 1 { Change::Insert } else { Change::Update };
        let event = Some(event(&vm, time_ms));
        commit(&*store, Commit { change: change(Box::new(vm.clone())), event }).await;
        vm = next(&vm);
    }
    assert_eq!(store.expire_events(1).await.expect("expiry works"), 0);
    assert_eq!(store.expire_events(4).await.expect("expiry works"), 3);
    assert_eq!(places(&*store).await, (4..=10).collect::<Vec<u64>>());
    assert_eq!(store.expire_events(i64::MAX).await.expect("expiry works"), 7);
    assert!(places(&*store).await.is_empty());
    assert_eq!(load(&*store).await.last_event, EventSeq(10));
    drop(store);

    let store = place.open().await;
    let snapshot = load(&*store).await;
    assert_eq!(snapshot.last_event, EventSeq(10));
    assert_eq!(snapshot.vms.len(), 1, "expiry touches no VM");
    assert_eq!(commit(&*store, update(&vm)).await, EventSeq(11));
}

/// Expiry stops at the first event that is young enough, even if older events follow it.
pub async fn expiry_digs_no_hole_where_the_clock_was_set_back(place: &impl Place) {
    let store = place.open().await;
    let mut vm = record("vm");
    for (at, time_ms) in [10, 20, 5, 1, 30].into_iter().enumerate() {
        let change = if at == 0 { Change::Insert } else { Change::Update };
        let event = Some(event(&vm, time_ms));
        commit(&*store, Commit { change: change(Box::new(vm.clone())), event }).await;
        vm = next(&vm);
    }
    assert_eq!(store.expire_events(15).await.expect("expiry works"), 1);
    assert_eq!(places(&*store).await, [2, 3, 4, 5], "5 and 1 are behind 20");
    assert_eq!(store.expire_events(25).await.expect("expiry works"), 3);
    assert_eq!(places(&*store).await, [5]);
}

/// A commit whose caller goes away is applied fully or not at all, and delays no other commit.
pub async fn a_caller_that_goes_away_leaves_all_or_nothing(place: &impl Place) {
    let store = place.open().await;
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
    let store = place.open().await;
    let recorded: BTreeSet<VmUid> = load(&*store).await.vms.iter().map(|vm| vm.uid).collect();
    let log = all_events(&*store).await;
    assert_eq!(log.iter().map(|e| e.event.uid).collect::<BTreeSet<_>>(), recorded);
    assert_eq!(log.len(), recorded.len(), "one event each");
}

/// A forced commit obeys the rules of an ordinary one.
pub async fn what_is_forced_follows_the_same_rules(place: &impl Place) {
    let store = place.open().await;
    let vm = record("vm");
    assert_refused(store.commit_forced(update(&next(&vm))).await, StoreErrorKind::Conflict);
    commit(&*store, insert(&vm)).await;
    let changed = next(&vm);
    assert_eq!(store.commit_forced(update(&changed)).await.expect("it is legal"), Some(EventSeq(2)));
    assert_eq!(load(&*store).await.vms, [changed]);
    assert_eq!(store.commit_forced(remove(&vm)).await.expect("it is legal"), Some(EventSeq(3)));
    drop(store);
    let store = place.open().await;
    assert!(load(&*store).await.vms.is_empty());
    assert_eq!(places(&*store).await, [1, 2, 3]);
}
