//! The beginning of a watch: every VM with its present state, up to the marker `synced`.
//!
//! The VMs are read from the index in the order of their uids, one page at a time, as fast as the
//! client reads. They change meanwhile. A beginning therefore has two positions, and one sentence
//! is always true: *every VM up to the position in the index has been sent, with its state at the
//! position in the log.*
//!
//! ```text
//!   index (uids):  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓┃░░░░ page ░░░░┃               the rest is read later
//!                  sent           sent next
//!   log:           … 41 ┃ 42  43  44  45 ┃ 46 …
//!                     position             fence
//!                       ┃ replayed       ┃ the position, when the page has been sent
//! ```
//!
//! A page is read under the index's lock, but it does not show the state at one position, because
//! changes of different VMs are answered in any order. It certainly shows everything up to the
//! position, and nothing behind the fence, which is the last answer after the page was read. The
//! log is therefore replayed from the position to the fence:
//!
//! - A change of a VM that has been sent is sent as a change.
//! - A change of a VM of the page is applied to the page, unless the page shows it already.
//! - A change of a VM behind the page is skipped, because the index shows it by the time that VM is
//!   read.
//!
//! After that, the page is true at the fence, and is sent. At the end of the index the marker is
//! sent, whose token is the position, and the watch goes on from there. A beginning keeps two
//! positions and at most one page, for any number of VMs and any speed of the client.

use std::collections::{BTreeMap, HashMap};

#[cfg(doc)]
use vmm_core::event::NewEvent;
use vmm_core::event::{EventKind, EventSeq, VmEvent, VmSummary};
use vmm_core::id::{VmId, VmUid};
use vmm_core::state::{EndedBy, Status, VmState};
use vmm_core::store::VmRecord;

use super::Events;
use super::watch::{WatchFilter, WatchMessage};
use crate::error::ServiceError;
use crate::index::Index;

/// The present state of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentVm {
    /// The name.
    pub vm_id: VmId,
    /// The uid.
    pub uid: VmUid,
    /// The time of the change that led to this state, in Unix milliseconds.
    pub time_ms: i64,
    /// The state.
    pub state: VmState,
    /// The status.
    pub status: Status,
    /// The rung that ended the last run.
    pub ended_by: Option<EndedBy>,
    /// The client's own labels.
    pub metadata: BTreeMap<String, String>,
    /// The part that ListVms shows besides; see [`NewEvent::summary`].
    pub summary: Option<VmSummary>,
}

impl PresentVm {
    fn of_record(record: &VmRecord) -> Self {
        Self {
            vm_id: record.vm_id.clone(),
            uid: record.uid,
            time_ms: record.modified_ms,
            state: record.state,
            status: record.status.clone(),
            ended_by: record.ended_by,
            metadata: record.config.metadata.clone(),
            summary: Some(VmSummary::of(record)),
        }
    }

    fn of_event(event: &VmEvent, before: Option<&Self>) -> Self {
        let change = &event.event;
        let ended_before = before.filter(|_| !change.state.is_live()).and_then(|present| present.ended_by);
        Self {
            vm_id: change.vm_id.clone(),
            uid: change.uid,
            time_ms: change.time_ms,
            state: change.state,
            status: change.status.clone(),
            ended_by: change.ended_by.or(ended_before),
            metadata: change.metadata.clone(),
            summary: change.summary.clone(),
        }
    }
}

/// The number of VMs that are read from the index at once.
const PAGE: usize = 64;

/// The progress of a beginning.
pub(super) enum ReplayProgress {
    /// Every VM up to this one has been sent.
    Told(Option<VmUid>),
    /// A page has been read, and the log is being replayed up to the fence.
    Replaying(PresentPage),
    /// Every VM has been sent, and the marker has not.
    Ended,
}

impl ReplayProgress {
    pub(super) fn new() -> Self {
        Self::Told(None)
    }

    /// Takes one step, and returns the notices to send next, which may be none. `position` is the
    /// position of the beginning in the log. A step that is cancelled has changed nothing.
    pub(super) async fn step(
        &mut self,
        events: &Events,
        index: &Index,
        filter: &WatchFilter,
        position: &mut EventSeq,
    ) -> Result<Vec<WatchMessage>, ServiceError> {
        match self {
            Self::Told(last) => {
                let page = PresentPage::read(index, events, filter, *last);
                // Some commits up to the fence may be in progress. A store takes milliseconds for
                // them.
                events.settled_up_to(page.fence).await?;
                *self = Self::Replaying(page);
                Ok(Vec::new())
            }
            Self::Replaying(page) if *position < page.fence => {
                let fence = page.fence;
                // The changes up to the fence are applied in batches, so that a step holds one
                // batch at most.
                let batch = events.read(*position, fence).await?;
                let mut changes = Vec::new();
                for event in batch.into_iter().take_while(|event| event.seq <= fence) {
                    *position = event.seq;
                    if page.replay(&event, filter) {
                        changes.push(WatchMessage::Change(Events::recorded_without_token(event)));
                    }
                }
                Ok(changes)
            }
            Self::Replaying(page) => {
                let notices = std::mem::take(&mut page.matching);
                *self = page.last.map_or(Self::Ended, |last| Self::Told(Some(last)));
                Ok(notices.into_values().map(WatchMessage::Present).collect())
            }
            Self::Ended => Ok(Vec::new()),
        }
    }
}

/// Some VMs that follow each other in the index, with the changes of the replay.
pub(super) struct PresentPage {
    /// The last VM before the page.
    after: Option<VmUid>,
    /// The last VM of the page. `None` means that the page holds all VMs that follow, including
    /// those that do not exist yet.
    last: Option<VmUid>,
    matching: BTreeMap<VmUid, PresentVm>,
    /// The last event that each VM of the page shows, whether or not the VM matches the filter.
    up_to: HashMap<VmUid, EventSeq>,
    fence: EventSeq,
}

impl PresentPage {
    fn read(index: &Index, events: &Events, filter: &WatchFilter, after: Option<VmUid>) -> Self {
        // At most one VM has a name, so a filter by name needs one page.
        let records = match &filter.vm_id {
            Some(vm_id) => index.get_at(vm_id).into_iter().collect(),
            None => index.walk(after, PAGE),
        };
        let fence = events.settled.answered();
        let last = (records.len() == PAGE).then(|| records.last().map(|(record, _)| record.uid)).flatten();
        let matching = records
            .iter()
            .filter(|(record, _)| filter.matches(&record.vm_id, &record.config.metadata))
            .map(|(record, _)| (record.uid, PresentVm::of_record(record)))
            .collect();
        let up_to = records.iter().map(|(record, seq)| (record.uid, *seq)).collect();
        Self { after, last, matching, up_to, fence }
    }

    /// Applies an event to the page. Returns true if the event must be sent as a change instead,
    /// because the VM has been sent before.
    fn replay(&mut self, event: &VmEvent, filter: &WatchFilter) -> bool {
        let uid = event.event.uid;
        if self.after.is_some_and(|after| uid <= after) {
            return filter.matches_event(event);
        }
        if self.last.is_some_and(|last| uid > last) {
            return false;
        }
        if event.event.kind == EventKind::Created {
            self.up_to.entry(uid).or_default();
        }
        // A VM that is not on the page and is not created by this event was removed before the page
        // was read.
        let Some(seen) = self.up_to.get_mut(&uid).filter(|seen| **seen < event.seq) else { return false };
        *seen = event.seq;
        if event.event.kind == EventKind::Deleted {
            self.matching.remove(&uid);
        } else if filter.matches_after(event) {
            let present = PresentVm::of_event(event, self.matching.get(&uid));
            self.matching.insert(uid, present);
        } else {
            // An UpdateVm may have changed the labels, so that the VM does not match any more.
            self.matching.remove(&uid);
        }
        false
    }
}
