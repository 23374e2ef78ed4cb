//! A [`Store`] in memory that keeps every guarantee except durability, and fails on demand.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use uuid::Uuid;
use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::idempotency::{AnswerLookup, KeptAnswer, KeyChange};
use vmm_core::store::{
    Commit, EventQuery, RecordChange, Snapshot, Store, StoreError, StoreErrorKind, Tombstone, Unreadable,
    VmRecord,
};

/// The store. Its data exists as long as the value, so a second service on the value finds the data
/// again.
#[derive(Debug)]
pub struct MemoryStore {
    instance: InstanceId,
    inner: Mutex<StoreState>,
}

#[derive(Debug, Default)]
struct StoreState {
    vms: BTreeMap<VmUid, VmRecord>,
    unreadable: BTreeMap<VmUid, String>,
    tombstones: BTreeMap<VmUid, Tombstone>,
    events: Vec<VmEvent>,
    last_event: EventSeq,
    answers: BTreeMap<String, KeptAnswer>,
    max_answers: Option<usize>,
    next: VecDeque<CommitTreatment>,
    always: Option<CommitTreatment>,
}

/// The treatment of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitTreatment {
    /// The commit is applied if the rules allow it.
    Pass,
    /// The commit is refused, and nothing is written.
    Refuse(StoreErrorKind),
    /// The commit is not written, and the answer leaves that open.
    Lose(StoreErrorKind),
    /// The commit is written if the rules allow it, and the answer leaves that open.
    WriteAndFail(StoreErrorKind),
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { instance: InstanceId::new(Uuid::now_v7()), inner: Mutex::default() }
    }
}

impl MemoryStore {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the treatment of the next commits that the rules allow, in their order.
    pub fn next(&self, verdicts: impl IntoIterator<Item = CommitTreatment>) {
        self.lock().next.extend(verdicts);
    }

    /// Sets the treatment of every commit for which [`MemoryStore::next`] has none left.
    pub fn always(&self, verdict: CommitTreatment) {
        self.lock().always = Some(verdict);
    }

    /// Ends the scripted failures, so that later commits succeed or fail by the rules alone.
    pub fn behave(&self) {
        let mut inner = self.lock();
        inner.next.clear();
        inner.always = None;
    }

    /// Returns every VM, oldest first.
    pub fn vms(&self) -> Vec<VmRecord> {
        self.lock().vms.values().cloned().collect()
    }

    /// Returns the VM with this name.
    pub fn vm(&self, vm_id: &str) -> Option<VmRecord> {
        self.lock().vms.values().find(|vm| vm.vm_id.as_str() == vm_id).cloned()
    }

    /// Returns every tombstone.
    pub fn tombstones(&self) -> Vec<Tombstone> {
        self.lock().tombstones.values().cloned().collect()
    }

    /// Returns every event, oldest first.
    pub fn log(&self) -> Vec<VmEvent> {
        self.lock().events.clone()
    }

    /// Stores a record without applying the rules, like a daemon that died may have left it.
    pub fn put(&self, record: VmRecord) {
        self.lock().vms.insert(record.uid, record);
    }

    /// Removes events anywhere in the log, which no real store does.
    pub fn lose_events(&self, mut lost: impl FnMut(&VmEvent) -> bool) {
        self.lock().events.retain(|event| !lost(event));
    }

    /// Makes the record of a VM unreadable to this release, like a newer release may have left it.
    pub fn make_unreadable(&self, vm_id: &str, why: &str) {
        let mut inner = self.lock();
        let found = inner.vms.values().find(|vm| vm.vm_id.as_str() == vm_id).map(|vm| vm.uid);
        inner.unreadable.extend(found.map(|uid| (uid, why.to_owned())));
    }

    /// Returns every kept answer.
    pub fn answers(&self) -> Vec<KeptAnswer> {
        self.lock().answers.values().cloned().collect()
    }

    /// Leaves no room for further answers once `most` are kept.
    pub fn limit_answers(&self, most: usize) {
        self.lock().max_answers = Some(most);
    }

    fn lock(&self) -> MutexGuard<'_, StoreState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn load(&self) -> Result<Snapshot, StoreError> {
        let inner = self.lock();
        let (mut vms, mut unreadable) = (Vec::new(), Vec::new());
        for record in inner.vms.values().cloned() {
            match inner.unreadable.get(&record.uid) {
                Some(why) => unreadable.push(Unreadable { record: Box::new(record), why: why.clone() }),
                None => vms.push(record),
            }
        }
        let tombstones = inner.tombstones.values().cloned().collect();
        Ok(Snapshot { instance: self.instance, vms, unreadable, last_event: inner.last_event, tombstones })
    }

    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.decide(Some(commit), None, false).await
    }

    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.decide(Some(commit), None, true).await
    }

    async fn commit_keyed(
        &self,
        commit: Option<Commit>,
        key: KeyChange,
        forced: bool,
    ) -> Result<Option<EventSeq>, StoreError> {
        self.decide(commit, Some(key), forced).await
    }

    async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, StoreError> {
        let inner = self.lock();
        let has_room = inner.max_answers.is_none_or(|most| inner.answers.len() < most);
        Ok(AnswerLookup { kept: inner.answers.get(id).cloned(), has_room })
    }

    async fn expire_answers(&self, kept_ms: Range<i64>) -> Result<u64, StoreError> {
        let mut inner = self.lock();
        let before = inner.answers.len();
        inner.answers.retain(|_, answer| kept_ms.contains(&answer.time_ms));
        Ok((before - inner.answers.len()).try_into().unwrap_or(u64::MAX))
    }

    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
        let inner = self.lock();
        let wanted = |event: &&VmEvent| {
            event.seq > query.after && query.vm_id.as_ref().is_none_or(|vm_id| event.event.vm_id == *vm_id)
        };
        Ok(inner.events.iter().filter(wanted).take(query.limit).cloned().collect())
    }

    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError> {
        let mut inner = self.lock();
        let younger = |event: &VmEvent| event.event.time_ms >= before_ms;
        let expired = inner.events.iter().position(younger).unwrap_or(inner.events.len());
        Ok(inner.events.drain(..expired).count().try_into().unwrap_or(u64::MAX))
    }
}

impl MemoryStore {
    /// Applies or refuses a commit by its treatment. A forced commit always has room.
    async fn decide(
        &self,
        commit: Option<Commit>,
        key: Option<KeyChange>,
        forced: bool,
    ) -> Result<Option<EventSeq>, StoreError> {
        // A real store takes time, in which other tasks run.
        tokio::task::yield_now().await;
        let mut inner = self.lock();
        // The rules come first, because an illegal commit must not use up a scripted treatment.
        commit.as_ref().map_or(Ok(()), |commit| inner.judge(&commit.change))?;
        let verdict = inner.next.pop_front().or(inner.always).unwrap_or(CommitTreatment::Pass);
        match verdict {
            CommitTreatment::Pass => Ok(inner.apply_keyed(commit, key)),
            CommitTreatment::Refuse(StoreErrorKind::Full) if forced => Ok(inner.apply_keyed(commit, key)),
            CommitTreatment::Refuse(kind) => Err(error(kind, Effect::NotApplied, "the script refuses it")),
            CommitTreatment::Lose(kind) => Err(error(kind, Effect::Unknown, "the script loses it")),
            CommitTreatment::WriteAndFail(kind) => {
                inner.apply_keyed(commit, key);
                Err(error(kind, Effect::Unknown, "the script loses the answer"))
            }
        }
    }
}

impl StoreState {
    /// Checks whether the rules of the port allow a change.
    fn judge(&self, change: &RecordChange) -> Result<(), StoreError> {
        let (allowed, kind, message) = match change {
            RecordChange::Insert(new) => (
                self.vms.values().all(|vm| vm.vm_id != new.vm_id && vm.uid != new.uid),
                StoreErrorKind::NameTaken,
                "the name is taken",
            ),
            RecordChange::Update(new) => (
                self.vms.get(&new.uid).is_some_and(|vm| vm.generation + 1 == new.generation),
                StoreErrorKind::Conflict,
                "the record has changed",
            ),
            RecordChange::Remove(_) | RecordChange::Bury(_) | RecordChange::Unbury(_) => return Ok(()),
        };
        if allowed { Ok(()) } else { Err(error(kind, Effect::NotApplied, message)) }
    }

    fn apply_keyed(&mut self, commit: Option<Commit>, key: Option<KeyChange>) -> Option<EventSeq> {
        match key {
            Some(KeyChange::Keep(kept)) => drop(self.answers.insert(kept.call.id.clone(), *kept)),
            Some(KeyChange::Forget(id)) => drop(self.answers.remove(&id)),
            None => {}
        }
        commit.and_then(|commit| self.apply(commit))
    }

    fn apply(&mut self, commit: Commit) -> Option<EventSeq> {
        match commit.change {
            RecordChange::Insert(new) | RecordChange::Update(new) => {
                self.vms.insert(new.uid, *new);
            }
            RecordChange::Remove(uid) => {
                // A removal of nothing logs no event, as the port demands.
                self.vms.remove(&uid)?;
            }
            RecordChange::Bury(tombstone) => {
                self.vms.remove(&tombstone.vm.uid)?;
                self.tombstones.insert(tombstone.vm.uid, *tombstone);
            }
            RecordChange::Unbury(uid) => {
                self.tombstones.remove(&uid);
            }
        }
        commit.event.map(|event| {
            self.last_event.0 += 1;
            self.events.push(VmEvent { seq: self.last_event, event });
            self.last_event
        })
    }
}

fn error(kind: StoreErrorKind, effect: Effect, message: &str) -> StoreError {
    StoreError { kind, message: message.to_owned(), effect, source: None }
}
