//! The events: the log of all changes, for watches and for later queries.
//!
//! ```text
//!   actors ── commit ──► store: the log, in one order, without gaps
//!      │                   ▲            │ read after a cursor
//!      │ shown to readers  │            ▼
//!      └──────► settled ───┼──► recent: its end, in memory ──► Watch (a cursor and a filter each)
//!               "up to 8"  │                                     ▲
//!                          └──── older pages ────────────────────┘
//! ```
//!
//! The log in the store is the only source. A watch is a cursor into it, so that no event is
//! lost, none comes twice, and the order is that of the positions in the log, whichever commit is
//! answered first. Writers pass a single number to watches: the position up to which the log is
//! [`settled`]. A commit that failed, or whose result is unknown, therefore blocks no watch,
//! because the log contains the result. Watches pull, and nothing is kept for a watch that does
//! not, not even at its beginning. A watch that has fallen too far behind gets an error and ends.
//!
//! [`watch`] is WatchVms, [`present`] its beginning, [`audit`] ListVmEvents, and [`retention`]
//! removes old events.

mod audit;
mod commit_tracker;
mod present;
mod recent;
mod retention;
mod token;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::{InstanceId, VmId};
use vmm_core::idempotency::{AnswerLookup, KeyChange};
use vmm_core::store::{Commit, EventQuery, Store, StoreError};

use crate::error::ServiceError;
use crate::failure::Failure;
use commit_tracker::{CommitTracker, OpenCommit};
use recent::RecentEvents;
use token::{Token, TokenKind};

pub use audit::{EventsPage, EventsQuery};
pub use present::PresentVm;
pub use watch::{Watch, WatchMessage, WatchQuery};

pub(crate) use retention::expire_for_ever;

/// The number of events that are read at once.
const BATCH: usize = 256;
/// The number of events that are kept in memory. A watch that has caught up may fall behind by the
/// same number.
const RECENT: u16 = 4096;
/// The bytes of text that the events in memory may have together.
const RECENT_BYTES: usize = 16 << 20;

/// An event with its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedEvent {
    /// The token that resumes a watch after this event. Empty before [`WatchMessage::Synced`].
    pub token: String,
    /// The event.
    pub event: Arc<VmEvent>,
}

/// The log of one state directory.
pub(crate) struct Events {
    store: Arc<dyn Store>,
    /// The fingerprint of the instance, with which tokens of this log are marked.
    instance: u64,
    retention: Duration,
    settled: Arc<CommitTracker>,
    /// The end of the log in memory. Locked while the store is read, so that one of many watches
    /// reads for all.
    recent: tokio::sync::Mutex<RecentEvents>,
}

/// A change that was committed and is not shown to readers yet. The owner drops it when readers see
/// the change.
#[must_use = "watches wait for it to be dropped"]
#[derive(Debug)]
pub(crate) struct CommitReceipt {
    /// The position of its event.
    pub(crate) seq: EventSeq,
    _open: OpenCommit,
}

impl CommitReceipt {
    fn at(seq: Option<EventSeq>, open: OpenCommit) -> Self {
        let seq = seq.unwrap_or_default();
        open.answered(seq);
        Self { seq, _open: open }
    }
}

impl Events {
    /// Creates the log of `store`, which ends with `last`.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        instance: InstanceId,
        last: EventSeq,
        retention: Duration,
    ) -> Self {
        Self {
            store,
            instance: token::fingerprint(instance),
            retention,
            settled: Arc::new(CommitTracker::new(last)),
            recent: tokio::sync::Mutex::new(RecentEvents::new(last, usize::from(RECENT), RECENT_BYTES)),
        }
    }

    /// Commits a change. Watches receive its event when the answer is dropped, which must happen
    /// when readers see the change.
    ///
    /// # Errors
    ///
    /// Returns the store's error.
    pub(crate) async fn commit(&self, commit: Commit) -> Result<CommitReceipt, StoreError> {
        let open = self.settled.open();
        let seq = self.store.commit(commit).await?;
        Ok(CommitReceipt::at(seq, open))
    }

    /// Commits a change of a forced operation, for which the store keeps room.
    ///
    /// # Errors
    ///
    /// Returns the store's error.
    pub(crate) async fn commit_forced(&self, commit: Commit) -> Result<CommitReceipt, StoreError> {
        let open = self.settled.open();
        let seq = self.store.commit_forced(commit).await?;
        Ok(CommitReceipt::at(seq, open))
    }

    /// Commits a change with the answer to its call in one transaction.
    ///
    /// # Errors
    ///
    /// Returns the store's error.
    pub(crate) async fn commit_keyed(
        &self,
        commit: Commit,
        key: KeyChange,
        forced: bool,
    ) -> Result<CommitReceipt, StoreError> {
        let open = self.settled.open();
        let seq = self.store.commit_keyed(Some(commit), key, forced).await?;
        Ok(CommitReceipt::at(seq, open))
    }

    /// Commits a change of the kept answers alone.
    ///
    /// # Errors
    ///
    /// Returns the store's error.
    pub(crate) async fn change_answers(&self, key: KeyChange, forced: bool) -> Result<(), StoreError> {
        self.store.commit_keyed(None, key, forced).await.map(drop)
    }

    /// Finds the answer that is kept for the id of a call.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Unavailable`] if the store cannot be read.
    pub(crate) async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, ServiceError> {
        self.store.kept_answer(id).await.map_err(|error| Failure::KeyNotRead(error).into())
    }

    /// Reads the events that follow `after`, at least one, from a log that is settled up to
    /// `until`. `until` is a later position than `after`.
    async fn read(&self, after: EventSeq, until: EventSeq) -> Result<Vec<Arc<VmEvent>>, ServiceError> {
        let mut recent = self.recent.lock().await;
        match recent.after(after, BATCH) {
            Some(known) if !known.is_empty() => return Ok(known),
            // `after` lies before the stretch in memory, so the watch reads from the store and
            // releases the lock.
            None if after < recent.head() => drop(recent),
            Some(_) | None => {
                let page = self.read_store(after, until).await?;
                recent.append(after, &page);
                return Ok(page);
            }
        }
        self.read_store(after, until).await
    }

    async fn read_store(&self, after: EventSeq, until: EventSeq) -> Result<Vec<Arc<VmEvent>>, ServiceError> {
        let query = EventQuery { after, vm_id: None, limit: BATCH };
        let found = self.store.events(query).await.map_err(unreadable)?;
        // Events expire from the oldest on. If the next one has expired, the first event found is a
        // later position, and the page stays empty. The page ends at `until`, because the store may
        // hold events that are not settled yet.
        let without_gap = (after.0 + 1..).zip(found).take_while(|(position, event)| event.seq.0 == *position);
        let page: Vec<_> =
            without_gap.map(|(_, event)| Arc::new(event)).take_while(|event| event.seq <= until).collect();
        // Positions have no gaps, so an event that is missing has expired.
        if page.is_empty() { Err(self.too_old()) } else { Ok(page) }
    }

    /// Returns the event at a position, if it is still kept.
    async fn event_at(&self, seq: EventSeq) -> Result<Option<VmEvent>, ServiceError> {
        let Some(before) = seq.0.checked_sub(1) else { return Ok(None) };
        let query = EventQuery { after: EventSeq(before), vm_id: None, limit: 1 };
        let found = self.store.events(query).await.map_err(unreadable)?;
        Ok(found.into_iter().next().filter(|event| event.seq == seq))
    }

    /// Waits until the log is settled up to `position`, with which a commit has been answered.
    async fn settled_up_to(&self, position: EventSeq) -> Result<(), ServiceError> {
        let settled = self.settled.subscribe().wait_for(|settled| *settled >= position).await.map(drop);
        settled.map_err(|_| Failure::Stopping { synced: false }.into())
    }

    /// Returns an event for the beginning of a watch. It has no token, because a client that
    /// resumed from there would miss the VMs that were not sent yet.
    fn recorded_without_token(event: Arc<VmEvent>) -> RecordedEvent {
        RecordedEvent { token: String::new(), event }
    }

    fn recorded(&self, event: Arc<VmEvent>) -> RecordedEvent {
        let check = token::check_of(&event);
        RecordedEvent { token: self.token(TokenKind::Event, event.seq, check), event }
    }

    fn token(&self, kind: TokenKind, seq: EventSeq, check: u32) -> String {
        Token { kind, instance: self.instance, seq, check }.to_string()
    }

    fn too_old(&self) -> ServiceError {
        Failure::EventsExpired { retention: self.retention }.into()
    }
}

/// Returns the name to filter by, or `None` for all VMs.
fn parse_vm_id(text: &str) -> Result<Option<VmId>, ServiceError> {
    match text {
        "" => Ok(None),
        name => name.parse().map(Some).map_err(|invalid: vmm_core::id::InvalidVmId| {
            ServiceError::invalid("vm_id", invalid.to_string())
        }),
    }
}

fn unreadable(error: StoreError) -> ServiceError {
    Failure::EventsNotRead(error).into()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use futures::FutureExt as _;
    use vmm_core::store::Snapshot;
    use vmm_testkit::memory_store::MemoryStore;
    use vmm_testkit::store_suite::{insert, next, record, update};

    use super::*;
    use crate::index::Index;

    /// Counts how often the log is read.
    #[derive(Default)]
    struct Counting {
        inner: MemoryStore,
        reads: AtomicUsize,
    }

    #[async_trait]
    impl Store for Counting {
        async fn load(&self) -> Result<Snapshot, StoreError> {
            self.inner.load().await
        }

        async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
            self.inner.commit(commit).await
        }

        async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.inner.events(query).await
        }

        async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError> {
            self.inner.expire_events(before_ms).await
        }

        async fn commit_keyed(
            &self,
            commit: Option<Commit>,
            key: KeyChange,
            forced: bool,
        ) -> Result<Option<EventSeq>, StoreError> {
            self.inner.commit_keyed(commit, key, forced).await
        }

        async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, StoreError> {
            self.inner.kept_answer(id).await
        }

        async fn expire_answers(&self, kept_ms: Range<i64>) -> Result<u64, StoreError> {
            self.inner.expire_answers(kept_ms).await
        }
    }

    #[tokio::test]
    async fn a_thousand_watches_cost_one_read() {
        const CHANGES: usize = 20;
        let store = Arc::new(Counting::default());
        let Snapshot { instance, last_event, .. } = store.load().await.unwrap();
        let retention = Duration::from_secs(3600);
        let events = Arc::new(Events::new(Arc::clone(&store) as _, instance, last_event, retention));
        let index = Arc::new(Index::default());
        let mut watches = Vec::new();
        for _ in 0..1000 {
            let query = WatchQuery::default();
            let mut watch = Watch::start(Arc::clone(&events), Arc::clone(&index), query).await.unwrap();
            assert!(matches!(watch.next().await.unwrap(), WatchMessage::Synced { .. }));
            watches.push(watch);
        }
        let mut vm = record("vm");
        for number in 1..=CHANGES {
            let commit = if number == 1 { insert(&vm) } else { update(&vm) };
            vm = next(&vm);
            let committed = events.commit(commit).await.unwrap();
            for watch in &mut watches {
                let next = tokio::task::unconstrained(watch.next()).now_or_never();
                assert!(next.is_none(), "not before readers see it");
            }
            drop(committed);
            for watch in &mut watches {
                let next = tokio::task::unconstrained(watch.next()).now_or_never().unwrap().unwrap();
                assert!(matches!(next, WatchMessage::Change(it) if it.event.seq.0 == number as u64));
            }
        }
        assert_eq!(store.reads.load(Ordering::Relaxed), CHANGES);
    }
}
