//! WatchVms: a watch is a cursor into the log with a filter.
//!
//! ```text
//!   without a token ──► present states, "synced" ──┐    (present.rs)
//!                                                  ├──► catching up ──► caught up ◄──► waiting
//!   with one ── still valid? ──────────────────────┘    (any pace)         │
//!                  │ no                                                    │ fell too far behind
//!                  ▼                                                       ▼
//!             OUT_OF_RANGE                                         RESOURCE_EXHAUSTED
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::VmId;

use super::present::{PresentVm, ReplayProgress};
use super::token::{self, Token, TokenKind};
use super::{Events, RECENT, RecordedEvent, parse_vm_id};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::failure::{Failure, LogMismatch};
use crate::index::Index;

/// The pause after the first page of a beginning. The server sends nothing while more notices are
/// ready, up to a quarter of a MiB, so that without a pause the first of many VMs would wait for
/// the thousandth.
const FIRST_PAGE_DELAY: Duration = Duration::from_millis(1);

/// The selection of the VMs to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchQuery {
    /// The token of the last event seen. Empty begins with the present state.
    pub resume_token: String,
    /// The VM to watch, which need not exist. Empty means all VMs.
    pub vm_id: String,
    /// The labels that a VM must bear, all of them.
    pub metadata: BTreeMap<String, String>,
}

/// A message to a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchMessage {
    /// The present state of one VM, at the beginning of a watch without a token.
    Present(PresentVm),
    /// The marker after the last present state.
    Synced {
        /// The token that resumes a watch from here.
        token: String,
        /// The time of the marker, in Unix milliseconds.
        time_ms: i64,
    },
    /// A change of a VM. Before [`WatchMessage::Synced`] it is a change of a VM whose state was
    /// sent, and has no token.
    Change(RecordedEvent),
}

/// The filter of a watch.
#[derive(Clone, Debug)]
pub(super) struct WatchFilter {
    pub(super) vm_id: Option<VmId>,
    metadata: BTreeMap<String, String>,
}

impl WatchFilter {
    pub(super) fn matches(&self, vm_id: &VmId, metadata: &BTreeMap<String, String>) -> bool {
        self.vm_id.as_ref().is_none_or(|wanted| wanted == vm_id)
            && self.metadata.iter().all(|(key, value)| metadata.get(key) == Some(value))
    }

    /// Returns true if the VM matches after `event`.
    pub(super) fn matches_after(&self, event: &VmEvent) -> bool {
        self.matches(&event.event.vm_id, &event.event.metadata)
    }

    /// Returns true if the watcher must see `event`: the VM matches after it, or did before an
    /// UpdateVm changed its labels.
    pub(super) fn matches_event(&self, event: &VmEvent) -> bool {
        let before = event.event.update.as_ref().and_then(|update| update.metadata_before.as_ref());
        self.matches_after(event) || before.is_some_and(|before| self.matches(&event.event.vm_id, before))
    }
}

/// A watch. The service keeps its position in the log and, at its beginning, its position among the
/// VMs. A client that does not read uses no more memory than the few notices in `ready`.
pub struct Watch {
    events: Arc<Events>,
    index: Arc<Index>,
    filter: WatchFilter,
    settled: watch::Receiver<EventSeq>,
    /// The part that is sent before the changes. `None` after the marker has been sent.
    beginning: Option<ReplayProgress>,
    /// The position up to which every event was sent or lies in `ready`.
    cursor: EventSeq,
    /// True if the watch has been at the end of the log. Before that it may be as far behind as its
    /// token is old.
    caught_up: bool,
    ready: VecDeque<WatchMessage>,
    first_page: FirstPageProgress,
}

/// The progress of the first page of a beginning.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FirstPageProgress {
    /// The page has not been read.
    Ahead,
    /// The page has been read, and others follow. It must be sent before them.
    Read,
    /// The page has been sent, as far as this watch knows.
    Behind,
}

impl Watch {
    /// Begins to watch. Does not read the VMs, because they are read as the client reads.
    pub(crate) async fn start(
        events: Arc<Events>,
        index: Arc<Index>,
        query: WatchQuery,
    ) -> Result<Self, ServiceError> {
        let filter = WatchFilter { vm_id: parse_vm_id(&query.vm_id)?, metadata: query.metadata };
        let mut settled = events.settled.subscribe();
        let (beginning, cursor) = if query.resume_token.is_empty() {
            (Some(ReplayProgress::new()), *settled.borrow_and_update())
        } else {
            (None, events.resume(&query.resume_token).await?)
        };
        let ready = VecDeque::new();
        let first_page = FirstPageProgress::Ahead;
        Ok(Self { events, index, filter, settled, beginning, cursor, caught_up: false, ready, first_page })
    }

    /// Waits for the next notice. Nothing is lost if the wait is cancelled.
    ///
    /// # Errors
    ///
    /// Ends the watch with [`ServiceError::Exhausted`] if it fell behind,
    /// [`ServiceError::OutOfRange`] if its next event has expired, or the store's failure. The
    /// watch can be resumed from the last token.
    pub async fn next(&mut self) -> Result<WatchMessage, ServiceError> {
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Ok(notice);
            }
            if let Some(beginning) = &mut self.beginning {
                if matches!(beginning, ReplayProgress::Ended) {
                    let marker = self.events.marker(self.cursor).await?;
                    self.beginning = None;
                    return Ok(marker);
                }
                if self.first_page == FirstPageProgress::Read {
                    self.first_page = FirstPageProgress::Behind;
                    tokio::time::sleep(FIRST_PAGE_DELAY).await;
                }
                let notices =
                    beginning.step(&self.events, &self.index, &self.filter, &mut self.cursor).await?;
                if self.first_page == FirstPageProgress::Ahead && !notices.is_empty() {
                    self.first_page = FirstPageProgress::Read;
                }
                self.ready.extend(notices);
                // A filter that matches few of many VMs takes many steps before there is a notice.
                tokio::task::coop::consume_budget().await;
                continue;
            }
            let settled = *self.settled.borrow_and_update();
            // The watch is at the end of the log. The channel closes when the daemon stops.
            if self.cursor >= settled {
                self.caught_up = true;
                self.settled.changed().await.map_err(|_| Failure::Stopping { synced: true })?;
                continue;
            }
            // A watch that has not caught up may read at any pace, because its token may be old. A
            // watch that has caught up is limited to the events in memory, because each watch
            // behind them would read the store by itself.
            if self.caught_up && settled.0 - self.cursor.0 > u64::from(RECENT) {
                return Err(Failure::WatchTooSlow { limit: RECENT }.into());
            }
            for event in self.events.read(self.cursor, settled).await? {
                self.cursor = event.seq;
                if self.filter.matches_event(&event) {
                    self.ready.push_back(WatchMessage::Change(self.events.recorded(event)));
                }
            }
        }
    }
}

impl Events {
    /// Returns the marker of a beginning that is true at `position`.
    async fn marker(&self, position: EventSeq) -> Result<WatchMessage, ServiceError> {
        let check = self.event_at(position).await?.as_ref().map_or(0, token::check_of);
        Ok(WatchMessage::Synced { token: self.token(TokenKind::Synced, position, check), time_ms: now_ms() })
    }

    /// Returns the position that a token names, if every event after it is still kept.
    async fn resume(&self, text: &str) -> Result<EventSeq, ServiceError> {
        let malformed = |why: &str| {
            let what_to_do =
                "use the token of the last event received, or none to begin with the present state";
            ServiceError::invalid("resume_token", format!("{why}; {what_to_do}"))
        };
        let Token { kind, instance, seq, check } =
            text.parse().map_err(|_| malformed("is not a token of this service"))?;
        if kind == TokenKind::Page {
            return Err(malformed("is a page_token of ListVmEvents"));
        }
        if instance != self.instance {
            return Err(unknown_log(LogMismatch::OtherInstance));
        }
        let answered = self.settled.answered();
        match self.event_at(seq).await? {
            Some(event) if check != 0 && check != token::check_of(&event) => {
                Err(unknown_log(LogMismatch::OtherEvent))
            }
            Some(_) => Ok(seq),
            None if seq > answered => Err(unknown_log(LogMismatch::Ahead)),
            // The event of the token has expired, so the next one must still exist.
            None if seq < answered => self.read_store(seq, answered).await.map(|_| seq),
            None => Ok(seq),
        }
    }
}

fn unknown_log(why: LogMismatch) -> ServiceError {
    Failure::UnknownLog { why }.into()
}
