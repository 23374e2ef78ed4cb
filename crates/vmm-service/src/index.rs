//! The index: every VM in memory. Reads touch nothing else.
//!
//! ```text
//!   a name, a place ──► uid ──► entry: the record, its waiters, its metrics, its actor
//!   a filter ──► order (index/order.rs): uids by backend, state, label, oldest first ──► entries
//! ```
//!
//! One lock guards the maps, and each entry has a small lock for its record. A reader holds the
//! lock of the maps while it copies at most [`CHUNK`] pointers, for any listing. A writer takes
//! that lock exclusively only if a VM is added or removed, or if it changes in a property by which
//! VMs are found. Any other change replaces the record under the entry's own lock, beside all
//! readers.

mod macs;
mod order;
mod waiters;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use vmm_core::backend::Vmm;
use vmm_core::event::EventSeq;
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::spec::MacAddr;
use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use crate::mailbox::ActorHandle;
use crate::metrics::{LatestMetrics, Metrics};

use macs::MacTable;
pub(crate) use order::ListFilter;
use order::VmOrder;
pub(crate) use waiters::Waiter;
use waiters::Waiters;

/// The largest number of records that are copied under one hold of the lock.
pub(crate) const CHUNK: usize = 128;

/// Some states, in the order of [`VmState::ALL`].
pub(crate) type StateList = [bool; 4];

/// One VM at one moment.
#[derive(Clone, Debug)]
pub struct VmView {
    /// The record, as last committed.
    pub record: Arc<VmRecord>,
    /// The last sample, while the VM runs.
    pub metrics: Option<Metrics>,
}

/// The position of a VM in the order of lists: the older first. A uid alone is not enough, because
/// the uid of a VM for which a spare VMM waited is older than the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ListPosition {
    /// The time at which the VM was created, in Unix milliseconds.
    pub(crate) created_ms: i64,
    /// The uid, which orders the VMs of one millisecond.
    pub(crate) uid: VmUid,
}

impl ListPosition {
    pub(crate) fn of(record: &VmRecord) -> Self {
        Self { created_ms: record.created_ms, uid: record.uid }
    }
}

/// Every VM.
#[derive(Default)]
pub(crate) struct Index {
    inner: RwLock<IndexTables>,
    /// The time at which the youngest VM was created, in Unix milliseconds.
    youngest_ms: AtomicI64,
}

#[derive(Default)]
struct IndexTables {
    by_uid: BTreeMap<VmUid, IndexEntry>,
    by_name: HashMap<VmId, VmUid>,
    by_place: HashMap<(BackendName, String), VmUid>,
    by_mac: MacTable,
    order: VmOrder,
}

struct IndexEntry {
    shown: Mutex<ShownVm>,
    actor: ActorHandle,
}

struct ShownVm {
    record: Arc<VmRecord>,
    /// The last event that the record shows.
    seq: EventSeq,
    waiters: Waiters,
    /// The samples of the last run, if there was one.
    metrics: Option<LatestMetrics>,
    /// The VMM of the last run, which the actor owns.
    vmm: Option<Weak<dyn Vmm>>,
}

/// The answer to a WaitVm.
pub(crate) enum WaitAnswer {
    /// The VM is in one of the states.
    Over(Arc<VmRecord>),
    /// The VM is in none of the states. The waiter gets the record when it is.
    Begun(VmUid, Waiter),
}

impl IndexEntry {
    fn shown(&self) -> MutexGuard<'_, ShownVm> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self) -> Arc<VmRecord> {
        Arc::clone(&self.shown().record)
    }
}

impl IndexTables {
    fn named(&self, vm_id: &VmId) -> Option<&IndexEntry> {
        self.by_name.get(vm_id).and_then(|uid| self.by_uid.get(uid))
    }

    /// Enters `record` into the maps by name and place and into the order. The addresses have a
    /// map of their own kind ([`MacTable`]), because a change of the state leaves them alone.
    fn add_to_maps(&mut self, record: &VmRecord) {
        self.by_name.insert(record.vm_id.clone(), record.uid);
        if let Some(key) = place_of(record) {
            self.by_place.insert(key, record.uid);
        }
        self.order.insert(record);
    }

    /// Undoes [`IndexTables::add_to_maps`].
    fn remove_from_maps(&mut self, record: &VmRecord) {
        if self.by_name.get(&record.vm_id) == Some(&record.uid) {
            self.by_name.remove(&record.vm_id);
        }
        if let Some(key) = place_of(record)
            && self.by_place.get(&key) == Some(&record.uid)
        {
            self.by_place.remove(&key);
        }
        self.order.remove(record);
    }
}

impl Index {
    /// Adds a VM with its state after the event `seq`, and the actor that writes it.
    pub(crate) fn insert(&self, record: Arc<VmRecord>, seq: EventSeq, actor: ActorHandle) {
        self.youngest_ms.fetch_max(record.created_ms, Ordering::Relaxed);
        let mut inner = self.write();
        inner.add_to_maps(&record);
        inner.by_mac.insert(&record);
        let uid = record.uid;
        let shown =
            Mutex::new(ShownVm { record, seq, waiters: Waiters::default(), metrics: None, vmm: None });
        inner.by_uid.insert(uid, IndexEntry { shown, actor });
    }

    /// Returns the time of creation for a new VM, in Unix milliseconds: `now_ms`, or a later time
    /// if the clock was set back, so that the VM is younger than every other one.
    pub(crate) fn creation_time(&self, now_ms: i64) -> i64 {
        let next = |youngest: i64| now_ms.max(youngest.saturating_add(1));
        let before = self.youngest_ms.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| Some(next(it)));
        before.map_or(now_ms, next)
    }

    /// Replaces a VM's record without an event. Only the VM's actor calls this.
    pub(crate) fn publish(&self, record: Arc<VmRecord>) {
        self.publish_at(record, EventSeq::default());
    }

    /// Replaces a VM's record by that of the event `seq`. Only the VM's actor calls this, after the
    /// commit and before the answer.
    pub(crate) fn publish_at(&self, record: Arc<VmRecord>, seq: EventSeq) {
        {
            let inner = self.read();
            let Some(entry) = inner.by_uid.get(&record.uid) else { return };
            let mut shown = entry.shown();
            // The usual change keeps every key of the maps, so the lock of the entry is enough and
            // other readers go on. Waiters wait for states, and the state is the same here.
            if is_filed_alike(&shown.record, &record) {
                shown.seq = shown.seq.max(seq);
                shown.record = record;
                return;
            }
        }
        let woken = {
            let mut inner = self.write();
            // Nothing changes between the two locks, because a VM has one actor.
            let Some(before) = inner.by_uid.get(&record.uid).map(IndexEntry::record) else { return };
            inner.remove_from_maps(&before);
            inner.add_to_maps(&record);
            if before.config.network != record.config.network {
                inner.by_mac.remove(&before);
                inner.by_mac.insert(&record);
            }
            let Some(entry) = inner.by_uid.get(&record.uid) else { return };
            let mut shown = entry.shown();
            shown.seq = shown.seq.max(seq);
            shown.record = Arc::clone(&record);
            shown.waiters.take(record.state)
        };
        // The waiters are woken after both locks are released, so that none of them meets a held
        // lock.
        woken.send(&record);
    }

    /// Shows the samples and the VMM of a run that begins. Only the VM's actor calls this. The VMM
    /// stays the actor's: it is shown for as long as the actor holds it.
    pub(crate) fn show_run(&self, uid: VmUid, metrics: LatestMetrics, vmm: Weak<dyn Vmm>) {
        if let Some(entry) = self.read().by_uid.get(&uid) {
            let mut shown = entry.shown();
            shown.metrics = Some(metrics);
            shown.vmm = Some(vmm);
        }
    }

    /// Finds the VMM that the actor of a VM holds.
    pub(crate) fn held_vmm(&self, uid: VmUid) -> Option<Arc<dyn Vmm>> {
        self.read().by_uid.get(&uid)?.shown().vmm.as_ref().and_then(Weak::upgrade)
    }

    /// Returns a waiter that gets no message and whose sender is dropped with the VM. Returns `None`
    /// if the VM has been removed.
    pub(crate) fn until_removed(&self, uid: VmUid) -> Option<Waiter> {
        self.read().by_uid.get(&uid).map(|entry| entry.shown().waiters.add(StateList::default()))
    }

    /// Removes a VM, so that its name is free.
    pub(crate) fn remove(&self, uid: VmUid) {
        let mut inner = self.write();
        let Some(entry) = inner.by_uid.remove(&uid) else { return };
        let record = entry.record();
        inner.remove_from_maps(&record);
        inner.by_mac.remove(&record);
        drop(inner);
    }

    /// Finds a VM by name.
    pub(crate) fn get(&self, vm_id: &VmId) -> Option<VmView> {
        let inner = self.read();
        let entry = inner.named(vm_id)?;
        let shown = entry.shown();
        let metrics = shown.metrics.as_ref().and_then(LatestMetrics::get);
        Some(VmView { record: Arc::clone(&shown.record), metrics })
    }

    /// Returns the last sample of one creation, if its VMM runs.
    pub(crate) fn metrics(&self, uid: VmUid) -> Option<Metrics> {
        self.read().by_uid.get(&uid)?.shown().metrics.as_ref().and_then(LatestMetrics::get)
    }

    /// Finds a VM's record by name, with the last event that the record shows.
    pub(crate) fn get_at(&self, vm_id: &VmId) -> Option<(Arc<VmRecord>, EventSeq)> {
        let inner = self.read();
        let shown = inner.named(vm_id)?.shown();
        Some((Arc::clone(&shown.record), shown.seq))
    }

    /// Finds the record of one creation.
    pub(crate) fn record(&self, uid: VmUid) -> Option<Arc<VmRecord>> {
        self.read().by_uid.get(&uid).map(IndexEntry::record)
    }

    /// Finds the VM that lives at a place of a backend.
    pub(crate) fn at_place(&self, backend: &BackendName, place: &VmKind) -> Option<Arc<VmRecord>> {
        let place = place.place()?;
        let inner = self.read();
        let uid = inner.by_place.get(&(backend.clone(), place))?;
        inner.by_uid.get(uid).map(IndexEntry::record)
    }

    /// Finds a VM other than `uid` for which a client chose this hardware address.
    pub(crate) fn other_with_mac(&self, mac: MacAddr, uid: VmUid) -> Option<VmId> {
        let inner = self.read();
        let uid = inner.by_mac.other_holder(mac, uid)?;
        inner.by_uid.get(&uid).map(|entry| entry.record().vm_id.clone())
    }

    /// Finds the actor of a VM by name.
    pub(crate) fn actor(&self, vm_id: &VmId) -> Option<ActorHandle> {
        self.read().named(vm_id).map(|entry| entry.actor.clone())
    }

    /// Begins to wait until the VM that bears `vm_id` now is in one of `states`. Returns `None` if
    /// there is no such VM.
    pub(crate) fn wait(&self, vm_id: &VmId, states: StateList) -> Option<WaitAnswer> {
        let inner = self.read();
        let mut shown = inner.named(vm_id)?.shown();
        if contains(states, shown.record.state) {
            return Some(WaitAnswer::Over(Arc::clone(&shown.record)));
        }
        Some(WaitAnswer::Begun(shown.record.uid, shown.waiters.add(states)))
    }

    /// Reads up to `limit` records that follow `after` in the order of uids, each with the last
    /// event that it shows.
    pub(crate) fn walk(&self, after: Option<VmUid>, limit: usize) -> Vec<(Arc<VmRecord>, EventSeq)> {
        let inner = self.read();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let entries = inner.by_uid.range((from, Bound::Unbounded)).take(limit.min(CHUNK));
        entries.map(|(_, entry)| entry.shown()).map(|shown| (Arc::clone(&shown.record), shown.seq)).collect()
    }

    /// Reads the VMs that match `filter`, oldest first, behind `after`. The number is the count of
    /// all VMs that match, if it is known without a look at each.
    pub(crate) fn list<'a>(
        &'a self,
        filter: &'a ListFilter,
        after: Option<ListPosition>,
    ) -> (ListedRecords<'a>, Option<usize>) {
        let inner = self.read();
        let selection = inner.order.select(filter);
        let count = selection.exact.then_some(selection.count);
        drop(inner);
        (ListedRecords { index: self, filter, after, chunk: Vec::new().into_iter(), ended: false }, count)
    }

    /// Returns the number of VMs that listings have visited so far.
    #[cfg(test)]
    pub(crate) fn visited(&self) -> usize {
        self.read().order.visited.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn read(&self) -> RwLockReadGuard<'_, IndexTables> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, IndexTables> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The records that match a filter, read one chunk at a time. VMs may be added, removed and changed
/// between two chunks, so each record is as it was when its chunk was read.
pub(crate) struct ListedRecords<'a> {
    index: &'a Index,
    filter: &'a ListFilter,
    after: Option<ListPosition>,
    chunk: std::vec::IntoIter<Arc<VmRecord>>,
    ended: bool,
}

impl Iterator for ListedRecords<'_> {
    type Item = Arc<VmRecord>;

    fn next(&mut self) -> Option<Arc<VmRecord>> {
        loop {
            if let Some(record) = self.chunk.find(|record| self.filter.has_labels(record)) {
                return Some(record);
            }
            if self.ended {
                return None;
            }
            let inner = self.index.read();
            let selection = inner.order.select(self.filter);
            let ages = inner.order.after(&selection, self.after).take(CHUNK);
            let chunk: Vec<_> =
                ages.filter_map(|age| inner.by_uid.get(&age.uid)).map(IndexEntry::record).collect();
            drop(inner);
            self.ended = chunk.len() < CHUNK;
            self.after = chunk.last().map(|record| ListPosition::of(record)).or(self.after);
            self.chunk = chunk.into_iter();
        }
    }
}

fn place_of(record: &VmRecord) -> Option<(BackendName, String)> {
    record.kind.place().map(|place| (record.backend.clone(), place))
}

/// Returns true if `state` is one of `states`.
fn contains(states: StateList, state: VmState) -> bool {
    VmState::ALL.iter().zip(states).any(|(it, wanted)| *it == state && wanted)
}

/// Returns true if two records of one VM are found by the same properties.
fn is_filed_alike(before: &VmRecord, after: &VmRecord) -> bool {
    before.state == after.state
        && before.backend == after.backend
        && before.created_ms == after.created_ms
        && before.vm_id == after.vm_id
        && before.kind == after.kind
        && before.config.metadata == after.config.metadata
        && before.config.network == after.config.network
}

#[cfg(test)]
mod tests {
    use vmm_core::config::NetworkInterface;
    use vmm_testkit::store_suite::record;

    use super::*;

    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

    fn vm(name: &str, mac: &str) -> VmRecord {
        let mut vm = record(name);
        vm.config.network = vec![with_mac(mac)];
        vm
    }

    fn with_mac(mac: &str) -> NetworkInterface {
        NetworkInterface { mac_address: mac.to_owned(), ..NetworkInterface::default() }
    }

    fn index_of(vms: &[&VmRecord]) -> Index {
        let index = Index::default();
        for vm in vms {
            let actor = ActorHandle::new(vm.uid, Arc::default());
            index.insert(Arc::new((*vm).clone()), EventSeq::default(), actor);
        }
        index
    }

    #[test]
    fn a_change_of_state_keeps_the_order_of_the_owners_of_an_address() {
        let [mut first, second, third] = ["a", "b", "c"].map(|name| vm(name, "02:00:00:00:00:01"));
        let index = index_of(&[&first, &second]);
        first.state = VmState::Running;
        index.publish(Arc::new(first.clone()));
        assert_eq!(index.other_with_mac(MAC, third.uid), Some(first.vm_id));
        index.remove(first.uid);
        assert_eq!(index.other_with_mac(MAC, third.uid), Some(second.vm_id));
    }

    #[test]
    fn a_changed_configuration_changes_the_addresses() {
        let (mut changed, other) = (vm("a", "02:00:00:00:00:01"), vm("b", "02:00:00:00:00:02"));
        let index = index_of(&[&changed]);
        // The state is as before, so the network alone decides that the VM is filed anew.
        changed.config.network = vec![with_mac("02:00:00:00:00:03")];
        index.publish(Arc::new(changed.clone()));
        assert_eq!(index.other_with_mac(MAC, other.uid), None);
        assert_eq!(index.other_with_mac(MacAddr([2, 0, 0, 0, 0, 3]), other.uid), Some(changed.vm_id));
    }
}
