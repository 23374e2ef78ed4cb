//! WatchVms: one watcher, a cursor into the log with a filter.
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

use super::present::{Beginning, Present};
use super::token::{self, Kind, Token};
use super::{Events, RECENT, Recorded, parse_vm_id};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::index::Index;

/// The pause after the first page of a beginning. What serves the watch sends nothing while there is more to be had at once,
/// up to a quarter of a MiB, so without a pause the first of many VMs waits for the thousandth.
const HAND_OVER: Duration = Duration::from_millis(1);

/// What to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchQuery {
    /// Token of the last event seen; empty begins with the present state.
    pub resume_token: String,
    /// Only this VM, which need not exist; empty means all.
    pub vm_id: String,
    /// Only VMs that bear all of these labels.
    pub metadata: BTreeMap<String, String>,
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The present state of one VM, at the beginning of a watch without a token.
    Present(Present),
    /// Every present state has been told.
    Synced {
        /// Resumes a watch from here.
        token: String,
        /// When, in Unix milliseconds.
        time_ms: i64,
    },
    /// Something happened. Before [`Notice::Synced`] it happened to a VM whose state was told, and bears no token.
    Change(Recorded),
}

/// Which VMs a watcher wants to hear of.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) vm_id: Option<VmId>,
    metadata: BTreeMap<String, String>,
}

impl Filter {
    pub(super) fn matches(&self, vm_id: &VmId, metadata: &BTreeMap<String, String>) -> bool {
        self.vm_id.as_ref().is_none_or(|wanted| wanted == vm_id)
            && self.metadata.iter().all(|(key, value)| metadata.get(key) == Some(value))
    }

    pub(super) fn matches_event(&self, event: &VmEvent) -> bool {
        self.matches(&event.event.vm_id, &event.event.metadata)
    }
}

/// A watch. Nothing is kept for it but its place in the log and, at its beginning, its place among the VMs: a client that does
/// not ask takes no more room than the few notices in `ready`.
pub struct Watch {
    events: Arc<Events>,
    index: Arc<Index>,
    filter: Filter,
    settled: watch::Receiver<EventSeq>,
    /// The part that is told before the changes; `None` once the marker has been told.
    beginning: Option<Beginning>,
    /// Everything up to here is told, or lies in `ready`.
    cursor: EventSeq,
    /// Whether it has been at the end of the log. Before that it may be as far behind as its token is old.
    caught_up: bool,
    ready: VecDeque<Notice>,
    first_page: FirstPage,
}

/// How far the first page of a beginning has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FirstPage {
    /// It has not been read.
    Ahead,
    /// It has been read, and others follow. It is to be sent before them.
    Read,
    /// It has been sent, as far as this watch knows.
    Behind,
}

impl Watch {
    /// Begins to watch. Reads nothing of the VMs: that is done as the client reads.
    pub(crate) async fn start(
        events: Arc<Events>,
        index: Arc<Index>,
        query: WatchQuery,
    ) -> Result<Self, ServiceError> {
        let filter = Filter { vm_id: parse_vm_id(&query.vm_id)?, metadata: query.metadata };
        let mut settled = events.settled.subscribe();
        let (beginning, cursor) = if query.resume_token.is_empty() {
            (Some(Beginning::new()), *settled.borrow_and_update())
        } else {
            (None, events.resume(&query.resume_token).await?)
        };
        let ready = VecDeque::new();
        let first_page = FirstPage::Ahead;
        Ok(Self { events, index, filter, settled, beginning, cursor, caught_up: false, ready, first_page })
    }

    /// Waits for the next notice. Nothing is lost if the wait is given up.
    ///
    /// # Errors
    ///
    /// The watch is over: [`ServiceError::Exhausted`] if it fell behind, [`ServiceError::OutOfRange`] if what it was to tell
    /// next has expired, or the store's failure. It can be resumed from the last token.
    pub async fn next(&mut self) -> Result<Notice, ServiceError> {
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Ok(notice);
            }
            if let Some(beginning) = &mut self.beginning {
                if matches!(beginning, Beginning::Ended) {
                    let marker = self.events.marker(self.cursor).await?;
                    self.beginning = None;
                    return Ok(marker);
                }
                if self.first_page == FirstPage::Read {
                    self.first_page = FirstPage::Behind;
                    tokio::time::sleep(HAND_OVER).await;
                }
                let told = beginning.step(&self.events, &self.index, &self.filter, &mut self.cursor).await?;
                if self.first_page == FirstPage::Ahead && !told.is_empty() {
                    self.first_page = FirstPage::Read;
                }
                self.ready.extend(told);
                // A filter that matches few of many VMs takes many steps before there is something to tell.
                tokio::task::coop::consume_budget().await;
                continue;
            }
            let settled = *self.settled.borrow_and_update();
            if self.cursor >= settled {
                self.caught_up = true;
                self.settled.changed().await.map_err(|_| {
                    ServiceError::unavailable("the daemon is stopping: resume with the last token".to_owned())
                })?;
                continue;
            }
            if self.caught_up && settled.0 - self.cursor.0 > u64::from(RECENT) {
                return Err(ServiceError::exhausted(format!(
                    "this watch fell more than {RECENT} events behind and was cut off: read faster or filter more, and resume \
                     with the token of the last event received, which loses nothing"
                )));
            }
            for event in self.events.read(self.cursor, settled).await? {
                self.cursor = event.seq;
                if self.filter.matches_event(&event) {
                    self.ready.push_back(Notice::Change(self.events.recorded(event)));
                }
            }
        }
    }
}

impl Events {
    /// The marker of a beginning that is true at `place`.
    async fn marker(&self, place: EventSeq) -> Result<Notice, ServiceError> {
        let check = self.event_at(place).await?.as_ref().map_or(0, token::check_of);
        Ok(Notice::Synced { token: self.token(Kind::Synced, place, check), time_ms: now_ms() })
    }

    /// The place that a token names, if everything after it is still kept.
    async fn resume(&self, text: &str) -> Result<EventSeq, ServiceError> {
        let malformed = |why: &str| {
            let what_to_do =
                "use the token of the last event received, or none to begin with the present state";
            ServiceError::invalid("resume_token", format!("{why}; {what_to_do}"))
        };
        let Token { kind, instance, seq, check } =
            text.parse().map_err(|_| malformed("is not a token of this service"))?;
        if kind == Kind::Page {
            return Err(malformed("is a page_token of ListVmEvents"));
        }
        if instance != self.instance {
            return Err(self.unknown_log("is of another daemon, or of another state directory"));
        }
        let answered = self.settled.answered();
        match self.event_at(seq).await? {
            Some(event) if check != 0 && check != token::check_of(&event) => {
                Err(self.unknown_log("is of a log that is no longer in place, as after a restored backup"))
            }
            Some(_) => Ok(seq),
            None if seq > answered => {
                Err(self.unknown_log("is ahead of the log, as after a restored backup"))
            }
            // Its own event has expired; the one after it must not have.
            None if seq < answered => self.read_store(seq, answered).await.map(|_| seq),
            None => Ok(seq),
        }
    }

    fn unknown_log(&self, why: &str) -> ServiceError {
        ServiceError::out_of_range(format!(
            "resume_token: {why}, so what happened since cannot be told: begin again without a resume_token, which tells the \
             present state of every VM first"
        ))
    }
}
