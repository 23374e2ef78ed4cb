//! WatchVms, ListVmEvents and the log behind them.

use std::collections::{BTreeMap, HashSet};

use futures::FutureExt as _;
use vmm_core::config::VmConfig;
use vmm_core::event::{EventKind, VmEvent};
use vmm_core::id::{VmId, VmUid};
use vmm_core::state::{Phase, VmState};
use vmm_core::store::StoreErrorKind;
use vmm_service::{EventsQuery, PresentVm, RecordedEvent, ServiceError, Watch, WatchMessage, WatchQuery};
use vmm_testkit::memory_store::CommitTreatment;

use crate::common::*;

pub(crate) fn from(token: &str) -> WatchQuery {
    WatchQuery { resume_token: token.to_owned(), ..WatchQuery::default() }
}

pub(crate) async fn watch(vms: &Vms, query: WatchQuery) -> Watch {
    vms.service.watch(query).await.expect("the watch begins")
}

/// What a new watch is told before its marker, and the marker's token.
pub(crate) async fn presents(watch: &mut Watch) -> (Vec<PresentVm>, String) {
    let mut reported = Vec::new();
    loop {
        match watch.next().await.unwrap() {
            WatchMessage::Present(present) => reported.push(present),
            WatchMessage::Synced { token, .. } => return (reported, token),
            WatchMessage::Change(recorded) => panic!("a change before the marker: {recorded:?}"),
        }
    }
}

pub(crate) async fn change(watch: &mut Watch) -> RecordedEvent {
    match watch.next().await.unwrap() {
        WatchMessage::Change(recorded) => recorded,
        other => panic!("not a change: {other:?}"),
    }
}

/// Everything that can be told now. Unconstrained, or tokio would have the test pause in the middle
/// of a long log.
pub(crate) fn changes(watch: &mut Watch) -> Vec<RecordedEvent> {
    std::iter::from_fn(|| match tokio::task::unconstrained(watch.next()).now_or_never()?.unwrap() {
        WatchMessage::Change(recorded) => Some(recorded),
        other => panic!("not a change: {other:?}"),
    })
    .collect()
}

pub(crate) fn events(recorded: &[RecordedEvent]) -> Vec<VmEvent> {
    recorded.iter().map(|it| (*it.event).clone()).collect()
}

/// Every event, page by page.
pub(crate) async fn listed(vms: &Vms, vm_id: &str, page_size: i32) -> Vec<RecordedEvent> {
    let mut query = EventsQuery { vm_id: vm_id.to_owned(), page_size, ..EventsQuery::default() };
    let mut all = Vec::new();
    loop {
        let page = vms.service.list_events(&query).await.unwrap();
        assert!(page.events.len() <= usize::try_from(page_size).unwrap());
        all.extend(page.events);
        if page.next_page_token.is_empty() {
            return all;
        }
        query.page_token = page.next_page_token;
    }
}

/// The VMs as the log tells of them.
fn replay(log: &[VmEvent]) -> BTreeMap<VmUid, (VmId, VmState, Phase)> {
    let mut vms = BTreeMap::new();
    for VmEvent { event, .. } in log {
        if event.kind == EventKind::Deleted {
            vms.remove(&event.uid);
        } else {
            vms.insert(event.uid, (event.vm_id.clone(), event.state, event.status.phase));
        }
    }
    vms
}

/// One life of a VM, in eleven events.
pub(crate) async fn life_of(vms: &Vms, vm_id: &str, config: VmConfig) {
    vms.create(vm_id, config).await;
    vms.boot(vm_id).await.unwrap();
    vms.pause(vm_id).await.unwrap();
    vms.resume(vm_id).await.unwrap();
    vms.force_shutdown(vm_id).await.unwrap();
    vms.delete(vm_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn events_of_fifty_vms_arrive_in_the_order_of_the_log() {
    const VMS: usize = 50;
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut first = watch(&vms, WatchQuery::default()).await;
    assert_eq!(presents(&mut first).await.0, []);
    let workers: Vec<_> = (0..VMS)
        .map(|number| {
            let (vms, config) = (vms.clone(), bed.config());
            tokio::spawn(async move { life_of(&vms, &format!("vm-{number}"), config).await })
        })
        .collect();
    let mut reported = Vec::new();
    let mut deleted = 0;
    while deleted < VMS {
        let recorded = change(&mut first).await;
        let event = &recorded.event.event;
        match vms.service.get(event.vm_id.as_str()) {
            Ok(view) => {
                assert!(view.record.modified_ms >= event.time_ms, "a read is older than {event:?}");
                assert_ne!(event.kind, EventKind::Deleted);
            }
            Err(_) => assert!(
                bed.store
                    .log()
                    .iter()
                    .any(|it| { it.event.uid == event.uid && it.event.kind == EventKind::Deleted })
            ),
        }
        deleted += usize::from(event.kind == EventKind::Deleted);
        reported.push(recorded);
    }
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(events(&reported), bed.store.log(), "all of it, in order, once");
    let tokens: HashSet<_> = reported.iter().map(|it| &it.token).collect();
    assert_eq!(tokens.len(), reported.len());
    assert_eq!(
        listed(&vms, "", 7).await,
        reported,
        "the audit trail has the same events with the same tokens"
    );
}

#[test]
fn every_token_resumes_after_a_restart_without_loss_or_repetition() {
    let bed = Bed::new();
    let marker = bed.life(async |vms| {
        vms.create("kept", bed.config()).await;
        let mut watch = watch(&vms, WatchQuery::default()).await;
        let (present, marker) = presents(&mut watch).await;
        assert_eq!(present.iter().map(|vm| vm.vm_id.as_str()).collect::<Vec<_>>(), ["kept"]);
        life_of(&vms, "gone", bed.config()).await;
        assert_eq!(changes(&mut watch).len(), 11);
        vms.boot("kept").await.unwrap();
        marker
    });
    bed.life(async |vms| {
        life_of(&vms, "later", bed.config()).await;
        let all = listed(&vms, "", 1000).await;
        assert_eq!(events(&all), bed.store.log());
        assert!(all.iter().any(|it| it.event.event.kind == EventKind::Adopted), "the second life adopted it");
        for (place, recorded) in all.iter().enumerate() {
            let mut resumed = watch(&vms, from(&recorded.token)).await;
            assert_eq!(changes(&mut resumed), all[place + 1..], "after {}", place + 1);
        }
        let mut resumed = watch(&vms, from(&marker)).await;
        assert_eq!(changes(&mut resumed), all[1..], "after the marker, and without another one");
        assert!(all.iter().all(|it| it.token != marker), "no event bears the marker's token");
    });
}

#[tokio::test(start_paused = true)]
async fn a_slow_watch_is_ended_and_resumes_beside_a_fast_one() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let _machine = vms.run("vm", bed.config()).await;
    let mut slow = watch(&vms, WatchQuery::default()).await;
    let mut fast = watch(&vms, WatchQuery::default()).await;
    presents(&mut slow).await;
    presents(&mut fast).await;
    let mut seen_by_slow = Vec::new();
    let mut seen_by_fast = Vec::new();
    vms.pause("vm").await.unwrap();
    vms.resume("vm").await.unwrap();
    seen_by_slow.extend(changes(&mut slow));
    let mut rounds = 0;
    while rounds < 1100 {
        vms.pause("vm").await.unwrap();
        vms.resume("vm").await.unwrap();
        seen_by_fast.extend(changes(&mut fast));
        rounds += 1;
    }
    let log = bed.store.log();
    assert_eq!(events(&seen_by_fast), log[3..], "the fast one has it all");
    let text = refused(slow.next().await, "exhausted");
    assert!(text.contains("resume with the token"), "{text}");
    let mut again = watch(&vms, from(&seen_by_slow.last().unwrap().token)).await;
    seen_by_slow.extend(changes(&mut again));
    assert_eq!(seen_by_slow, seen_by_fast, "and being cut off has cost nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_watch_gets_a_consistent_snapshot_under_churn() {
    const VMS: usize = 12;
    const LIVES: usize = 20;
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut pace = watch(&vms, WatchQuery::default()).await;
    presents(&mut pace).await;
    let churn: Vec<_> = (0..VMS)
        .map(|number| {
            let (vms, config) = (vms.clone(), bed.config());
            tokio::spawn(async move {
                for _ in 0..LIVES {
                    life_of(&vms, &format!("vm-{number}"), config.clone()).await;
                }
            })
        })
        .collect();
    // Watches begin all along, one for every few events.
    let mut begun = Vec::new();
    let mut deleted = 0;
    for number in 1.. {
        deleted += usize::from(change(&mut pace).await.event.event.kind == EventKind::Deleted);
        if deleted == VMS * LIVES {
            break;
        }
        if number % 13 == 0 {
            let mut watch = watch(&vms, WatchQuery::default()).await;
            begun.push(presents(&mut watch).await);
        }
    }
    for worker in churn {
        worker.await.unwrap();
    }
    let log = bed.store.log();
    for (present, marker) in begun {
        let mut resumed = watch(&vms, from(&marker)).await;
        let after = changes(&mut resumed).len();
        let reported: BTreeMap<_, _> =
            present.into_iter().map(|vm| (vm.uid, (vm.vm_id, vm.state, vm.status.phase))).collect();
        assert_eq!(reported, replay(&log[..log.len() - after]), "with {after} changes to come");
    }
}

/// The picture that a client makes of the beginning of a watch.
#[derive(Default)]
struct Table {
    vms: BTreeMap<VmUid, (VmId, VmState, Phase)>,
    reported: HashSet<VmUid>,
    last: u64,
}

impl Table {
    /// Takes a notice. Answers the marker's token.
    fn take(&mut self, notice: WatchMessage) -> Option<String> {
        match notice {
            WatchMessage::Present(vm) => {
                assert!(self.reported.insert(vm.uid), "a VM is told once: {vm:?}");
                self.vms.insert(vm.uid, (vm.vm_id, vm.state, vm.status.phase));
            }
            WatchMessage::Change(RecordedEvent { token, event }) => {
                assert_eq!(token, "", "nothing can be resumed before the marker");
                assert!(event.seq.0 > self.last, "changes are told in order, and once");
                self.last = event.seq.0;
                let reported = &event.event;
                self.reported.insert(reported.uid);
                let known = self
                    .vms
                    .insert(reported.uid, (reported.vm_id.clone(), reported.state, reported.status.phase));
                assert!(
                    known.is_some() || reported.kind == EventKind::Created,
                    "of a VM that was told: {reported:?}"
                );
                if reported.kind == EventKind::Deleted {
                    self.vms.remove(&reported.uid);
                }
            }
            WatchMessage::Synced { token, .. } => return Some(token),
        }
        None
    }
}

#[test]
fn a_slowly_read_snapshot_is_consistent_at_its_marker() {
    const VMS: usize = 200;
    let mut choices = pseudo_random(1);
    for filtered in [false, true] {
        let bed = Bed::new();
        bed.life(async |vms| {
            let label = |number: usize| ("parity".to_owned(), (number % 2).to_string());
            let config = |number| VmConfig { metadata: [label(number)].into(), ..bed.config() };
            for number in 0..VMS {
                vms.create(&format!("vm-{number}"), config(number)).await;
            }
            let metadata = if filtered { [label(0)].into() } else { BTreeMap::new() };
            let mut slow = watch(&vms, WatchQuery { metadata, ..WatchQuery::default() }).await;
            let mut table = Table::default();
            let mut next = VMS;
            let marker = loop {
                // An operation makes up to four events, and the client must read faster than they
                // come.
                if choices().is_multiple_of(6) {
                    let number = choices() % next;
                    let name = format!("vm-{number}");
                    match (choices() % 4, vms.service.get(&name).map(|view| view.record.state)) {
                        (0, _) => {
                            vms.create(&format!("vm-{next}"), config(next)).await;
                            next += 1;
                        }
                        (1, Ok(_)) => drop(vms.force_delete(&name).await.unwrap()),
                        (_, Ok(VmState::Running)) => drop(vms.pause(&name).await.unwrap()),
                        (_, Ok(VmState::Paused)) => drop(vms.force_shutdown(&name).await.unwrap()),
                        (_, Ok(_)) => drop(vms.boot(&name).await.unwrap()),
                        (_, Err(_)) => drop(vms.create(&name, config(number)).await),
                    }
                }
                if let Some(marker) = table.take(slow.next().await.unwrap()) {
                    break marker;
                }
            };
            let mut resumed = watch(&vms, from(&marker)).await;
            let after = changes(&mut resumed).len();
            let log = bed.store.log();
            let all = replay(&log[..log.len() - after]);
            let (even, _): (BTreeMap<_, _>, BTreeMap<_, _>) = all.into_iter().partition(|(_, (name, ..))| {
                let number: usize = name.as_str()[3..].parse().unwrap();
                !filtered || number.is_multiple_of(2)
            });
            assert_eq!(table.vms, even, "with {after} changes to come");
        });
    }
}

/// Numbers that look random and are the same in each run.
fn pseudo_random(seed: u64) -> impl FnMut() -> usize {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn an_unread_watch_holds_at_most_a_page() {
    const VMS: usize = 300;
    let bed = Bed::new();
    let vms = bed.start().await;
    for number in 0..VMS {
        vms.create(&format!("vm-{number:03}"), bed.config()).await;
    }
    let mut unread = watch(&vms, WatchQuery::default()).await;
    let mut begun = watch(&vms, WatchQuery::default()).await;
    assert!(matches!(begun.next().await.unwrap(), WatchMessage::Present(_)));
    for number in 100..VMS {
        vms.delete(&format!("vm-{number:03}")).await.unwrap();
    }
    assert_eq!(presents(&mut unread).await.0.len(), 100, "it kept none of the VMs that have gone");
    assert_eq!(presents(&mut begun).await.0.len(), 99, "and the other one no more than its page");
}

#[tokio::test(start_paused = true)]
async fn the_first_page_of_a_snapshot_is_sent_before_the_next_is_read() {
    const PAGE: usize = 64;
    let bed = Bed::new();
    let vms = bed.start().await;
    for number in 0..=PAGE {
        vms.create(&format!("vm-{number}"), bed.config()).await;
    }
    let mut watch = watch(&vms, WatchQuery::default()).await;
    let mut reported = 0;
    while let Some(notice) = tokio::task::unconstrained(watch.next()).now_or_never() {
        assert!(matches!(notice.unwrap(), WatchMessage::Present(_)));
        reported += 1;
    }
    assert_eq!(reported, PAGE, "the watch pauses there, so that what serves it sends the page");
    let (rest, _) = presents(&mut watch).await;
    assert_eq!(rest.len(), 1);
    let few = WatchQuery { vm_id: "vm-0".to_owned(), ..WatchQuery::default() };
    let mut few = self::watch(&vms, few).await;
    let begins = async { (few.next().await, few.next().await) };
    let begun = tokio::task::unconstrained(begins).now_or_never().expect("one page needs no pause");
    assert!(matches!(begun, (Ok(WatchMessage::Present(_)), Ok(WatchMessage::Synced { .. }))));
}

#[tokio::test(start_paused = true)]
async fn failed_commits_do_not_delay_watches() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    vms.create("other", bed.config()).await;
    let mut watch = watch(&vms, WatchQuery::default()).await;
    presents(&mut watch).await;
    let before = bed.store.log().len();
    for verdict in [
        CommitTreatment::Refuse(StoreErrorKind::Io),
        CommitTreatment::Lose(StoreErrorKind::Io),
        CommitTreatment::WriteAndFail(StoreErrorKind::Io),
    ] {
        bed.store.next([verdict]);
        vms.boot("vm").await.unwrap_err();
        bed.store.next([verdict]);
        vms.try_create("new", bed.config()).await.unwrap_err();
        vms.boot("other").await.unwrap();
        vms.force_shutdown("other").await.unwrap();
    }
    assert_eq!(events(&changes(&mut watch)), bed.store.log()[before..]);
    assert!(!replay(&bed.store.log()).values().any(|(vm_id, ..)| vm_id.as_str() == "new"), "taken back");
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_an_event_can_be_cancelled() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let outcome: Result<Watch, ServiceError> = vms.service.watch(WatchQuery::default()).await;
    let mut watch = outcome.unwrap();
    assert_eq!(presents(&mut watch).await.0, []);
    assert!(watch.next().now_or_never().is_none(), "nothing happens, and nothing is told");
    vms.create("vm", bed.config()).await;
    assert_eq!(
        change(&mut watch).await.event.event.kind,
        EventKind::Created,
        "a wait given up loses nothing"
    );
}
