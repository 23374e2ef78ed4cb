//! The fuzz target for tokens: every text of a client is a position in the log or the list, or is
//! refused by name.
//!
//! The input has two lines: a token, and the filter of the listing. `make fuzz` runs the target,
//! and the tests run it over the kept corpus.

use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use uuid::Uuid;
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::event::{EventKind, EventSeq, NewEvent, VmEvent};
use vmm_core::id::{InstanceId, VmId, VmUid};
use vmm_core::idempotency::{AnswerLookup, KeyChange};
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{Commit, EventQuery, Snapshot, Store, StoreError};

use crate::error::ServiceError;
use crate::events::{Events, EventsQuery, Watch, WatchMessage, WatchQuery};
use crate::index::{Index, ListPosition};
use crate::listing::{ListQuery, fingerprint, list, page_token, read_token};

/// The events that the log still holds. Those before have expired.
const KEPT: std::ops::RangeInclusive<u64> = 5..=12;
/// The instance of the log. It is fixed, so that tokens in the corpus stay valid.
const INSTANCE: u128 = 0x5eed;

/// A log that never changes.
struct FixedLog(Vec<VmEvent>);

#[async_trait]
impl Store for FixedLog {
    async fn load(&self) -> Result<Snapshot, StoreError> {
        Ok(Snapshot {
            instance: instance(),
            vms: Vec::new(),
            unreadable: Vec::new(),
            last_event: EventSeq(*KEPT.end()),
            tombstones: Vec::new(),
        })
    }

    async fn commit(&self, _: Commit) -> Result<Option<EventSeq>, StoreError> {
        Ok(None)
    }

    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
        let wanted = |event: &&VmEvent| {
            event.seq > query.after && query.vm_id.as_ref().is_none_or(|name| event.event.vm_id == *name)
        };
        Ok(self.0.iter().filter(wanted).take(query.limit).cloned().collect())
    }

    async fn commit_keyed(
        &self,
        _: Option<Commit>,
        _: KeyChange,
        _: bool,
    ) -> Result<Option<EventSeq>, StoreError> {
        Ok(None)
    }

    async fn kept_answer(&self, _: &str) -> Result<AnswerLookup, StoreError> {
        Ok(AnswerLookup { kept: None, has_room: true })
    }

    async fn expire_answers(&self, _: Range<i64>) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn expire_events(&self, _: i64) -> Result<u64, StoreError> {
        Ok(0)
    }
}

static EVENTS: LazyLock<Arc<Events>> = LazyLock::new(|| {
    let log = Arc::new(FixedLog(KEPT.map(event).collect()));
    let retention = Duration::from_secs(3600);
    Arc::new(Events::new(log, instance(), EventSeq(*KEPT.end()), retention))
});

fn instance() -> InstanceId {
    InstanceId::new(Uuid::from_u128(INSTANCE))
}

fn event(seq: u64) -> VmEvent {
    let uid = VmUid::new(Uuid::from_u128(7));
    let event = NewEvent {
        time_ms: 1_700_000_000_000,
        vm_id: VmId::generated(uid),
        uid,
        kind: EventKind::StateChanged,
        state: VmState::Running,
        status: Status::plain(Phase::Running, 1_700_000_000_000),
        cause: Cause::BootVm,
        caller: Caller::named("somebody"),
        ended_by: None,
        metadata: [].into(),
        update: None,
        summary: None,
    };
    VmEvent { seq: EventSeq(seq), event }
}

/// Runs one input.
///
/// # Panics
///
/// Panics if a guarantee is broken, which is the finding.
pub fn tokens(input: &[u8]) {
    let Ok(input) = std::str::from_utf8(input) else { return };
    let (token, filter) = input.split_once('\n').unwrap_or((input, ""));
    listing(token, filter);
    audit_trail(token, filter);
    resumption(token);
    issued(input.len());
}

fn listing(token: &str, filter: &str) {
    let states = VmState::ALL.into_iter().filter(|state| filter.contains(state.name())).collect();
    let (backend, label) = filter.split_once(':').unwrap_or(("", filter));
    let metadata = [(label.to_owned(), filter.to_owned())].into();
    let query = ListQuery {
        states,
        metadata,
        backend: backend.to_owned(),
        page_size: 1,
        page_token: token.to_owned(),
    };
    let filter = fingerprint(&query);
    let read = list(&Index::default(), &query).map(|page| assert!(page.next_page_token.is_empty()));
    check_refusal("page_token", read.as_ref().err());
    match read_token(token, filter) {
        Ok(age) => assert_eq!(page_token(filter, age), token, "a token has one spelling"),
        Err(error) => assert!(token.is_empty() || read.is_err(), "{error}"),
    }
    let mut uid = [0; 16];
    uid.iter_mut().zip(token.bytes()).for_each(|(place, byte)| *place = byte);
    let created_ms = filter.cast_signed().rotate_left(7);
    let age = ListPosition { created_ms, uid: VmUid::new(Uuid::from_bytes(uid)) };
    let issued = page_token(filter, age);
    assert_eq!(read_token(&issued, filter).ok(), Some(age));
    assert!(read_token(&issued, !filter).is_err(), "it belongs to another filter");
}

fn audit_trail(token: &str, filter: &str) {
    let vm_id = filter.parse::<VmId>().map(String::from).unwrap_or_default();
    let query = EventsQuery { vm_id, page_size: 3, page_token: token.to_owned() };
    let page = now(EVENTS.list(&query));
    check_refusal("page_token", page.as_ref().err());
    let Ok(page) = page else { return };
    assert!(page.events.len() <= 3);
    if !page.next_page_token.is_empty() {
        let last = page.events.last().map_or(EventSeq(0), |last| last.event.seq);
        let next = now(EVENTS.list(&EventsQuery { page_token: page.next_page_token, ..query }));
        let first = next.ok().and_then(|page| page.events.first().map(|first| first.event.seq));
        assert_eq!(first, Some(EventSeq(last.0 + 1)), "pages meet");
    }
}

fn resumption(token: &str) {
    let query = WatchQuery { resume_token: token.to_owned(), ..WatchQuery::default() };
    match now(Watch::start(Arc::clone(&EVENTS), Arc::default(), query)) {
        Ok(mut watch) => {
            let received = std::iter::from_fn(|| watch.next().now_or_never());
            let changes: Vec<_> = received
                .take(16)
                .filter_map(|received| match received {
                    Ok(WatchMessage::Change(change)) => Some(change.event.seq.0),
                    Ok(WatchMessage::Synced { .. } | WatchMessage::Present(_)) => None,
                    Err(error) => unreachable!("a token that was taken holds: {error}"),
                })
                .collect();
            let begin = changes.first().copied().unwrap_or(KEPT.end() + 1);
            assert!(KEPT.contains(&begin) || begin == KEPT.end() + 1);
            assert_eq!(changes, (begin..=*KEPT.end()).collect::<Vec<_>>(), "none lost, none twice");
        }
        Err(ServiceError::OutOfRange(_)) => {}
        Err(error) => check_refusal("resume_token", Some(&error)),
    }
}

/// Checks that every issued token resumes right behind its event.
fn issued(which: usize) {
    let page = now(EVENTS.list(&EventsQuery::default()));
    let events = page.map(|page| page.events).unwrap_or_default();
    assert_eq!(events.len() as u64, KEPT.end() - KEPT.start() + 1);
    let chosen = &events[which % events.len()];
    let query = WatchQuery { resume_token: chosen.token.clone(), ..WatchQuery::default() };
    let watch = now(Watch::start(Arc::clone(&EVENTS), Arc::default(), query));
    let next = watch.ok().and_then(|mut watch| watch.next().now_or_never());
    let next = next.and_then(Result::ok).map(|notice| match notice {
        WatchMessage::Change(change) => change.event.seq.0,
        WatchMessage::Present(_) | WatchMessage::Synced { .. } => 0,
    });
    assert_eq!(next, Some(chosen.event.seq.0 + 1).filter(|seq| KEPT.contains(seq)));
}

fn check_refusal(field: &str, error: Option<&ServiceError>) {
    match error {
        None => {}
        Some(ServiceError::Invalid(violations)) => {
            assert!(matches!(violations.as_slice(), [only] if only.field == field), "{violations:?}");
        }
        Some(other) => unreachable!("a token is refused by name, not so: {other}"),
    }
}

/// Returns the result of a future that never waits, because the log is in memory.
fn now<T>(work: impl Future<Output = T>) -> T {
    work.now_or_never().expect("a log in memory answers at once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_corpus_passes() {
        let replayed = vmm_testkit::corpus::replay("tokens", tokens);
        assert!(replayed > 0);
    }
}
