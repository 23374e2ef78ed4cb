//! What is known of every VM, in memory: the only thing that reads touch.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;
use vmm_core::event::EventSeq;
use vmm_core::id::{VmId, VmUid};
use vmm_core::store::VmRecord;

use crate::actor::ActorHandle;
use crate::metrics::{Metrics, MetricsCell};

/// One VM at one moment.
#[derive(Clone, Debug)]
pub struct VmView {
    /// Its record, as last committed.
    pub record: Arc<VmRecord>,
    /// Its last sample, while it runs.
    pub metrics: Option<Metrics>,
}

/// Where a VM stands in the order of lists: the older first. A uid alone would not do, because the uid of a VM for which a spare
/// VMM waited is older than the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Age {
    /// When the VM was created, in Unix milliseconds.
    pub(crate) created_ms: i64,
    /// Which of those of one millisecond it is.
    pub(crate) uid: VmUid,
}

impl Age {
    pub(crate) fn of(record: &VmRecord) -> Self {
        Self { created_ms: record.created_ms, uid: record.uid }
    }
}

/// Every VM by name, by uid and by age.
#[derive(Default)]
pub(crate) struct Index {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    by_name: HashMap<VmId, VmUid>,
    by_uid: HashMap<VmUid, Entry>,
    by_age: BTreeSet<Age>,
}

struct Entry {
    /// The record. Whoever waits for the VM is told of each change, and of its end when the entry is dropped.
    record: watch::Sender<Arc<VmRecord>>,
    /// The last event that the record shows.
    seq: EventSeq,
    metrics: MetricsCell,
    actor: ActorHandle,
}

impl Entry {
    fn view(&self) -> VmView {
        VmView { record: Arc::clone(&self.record.borrow()), metrics: self.metrics.get() }
    }
}

impl Index {
    /// Adds a VM, as it is after the event `seq`, with the actor that writes it.
    pub(crate) fn insert(
        &self,
        record: Arc<VmRecord>,
        seq: EventSeq,
        metrics: MetricsCell,
        actor: ActorHandle,
    ) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.insert(record.vm_id.clone(), record.uid);
        inner.by_age.insert(Age::of(&record));
        let uid = record.uid;
        inner.by_uid.insert(uid, Entry { record: watch::Sender::new(record), seq, metrics, actor });
    }

    /// Replaces a VM's record by one that no event tells of. Called by its actor alone.
    pub(crate) fn publish(&self, record: Arc<VmRecord>) {
        self.publish_at(record, EventSeq::default());
    }

    /// Replaces a VM's record by that of the event `seq`. Called by its actor alone, after the commit and before the answer.
    pub(crate) fn publish_at(&self, record: Arc<VmRecord>, seq: EventSeq) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = inner.by_uid.get_mut(&record.uid) {
            entry.seq = entry.seq.max(seq);
            entry.record.send_replace(record);
        }
    }

    /// Forgets a VM; its name is free.
    pub(crate) fn remove(&self, uid: VmUid) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = inner.by_uid.remove(&uid) else { return };
        let record = entry.record.borrow();
        inner.by_age.remove(&Age::of(&record));
        if inner.by_name.get(&record.vm_id) == Some(&uid) {
            inner.by_name.remove(&record.vm_id);
        }
    }

    /// Finds a VM by name.
    pub(crate) fn get(&self, vm_id: &VmId) -> Option<VmView> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.get(vm_id).and_then(|uid| inner.by_uid.get(uid)).map(Entry::view)
    }

    /// Finds the record of one creation.
    pub(crate) fn record(&self, uid: VmUid) -> Option<Arc<VmRecord>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_uid.get(&uid).map(|entry| Arc::clone(&entry.record.borrow()))
    }

    /// Follows a VM, found by name: its record, each that takes its place, and the end of the VM.
    pub(crate) fn follow(&self, vm_id: &VmId) -> Option<watch::Receiver<Arc<VmRecord>>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.get(vm_id).and_then(|uid| inner.by_uid.get(uid)).map(|entry| entry.record.subscribe())
    }

    /// Finds the actor of a VM by name.
    pub(crate) fn actor(&self, vm_id: &VmId) -> Option<ActorHandle> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.get(vm_id).and_then(|uid| inner.by_uid.get(uid)).map(|entry| entry.actor.clone())
    }

    /// Walks over every VM, oldest first, under a lock that holds up writers: `visit` must be quick.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(&Arc<VmRecord>)) {
        self.for_each_at(|record, _| visit(record));
    }

    /// The same, with the last event that each record shows.
    pub(crate) fn for_each_at(&self, mut visit: impl FnMut(&Arc<VmRecord>, EventSeq)) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        for entry in inner.by_age.iter().filter_map(|age| inner.by_uid.get(&age.uid)) {
            visit(&entry.record.borrow(), entry.seq);
        }
    }
}
