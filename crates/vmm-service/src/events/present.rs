//! The beginning of a watch: every VM as it is at one place in the log.
//!
//! The index is read at once, but what it shows is not of one place: changes of different VMs come in any order. So it is read
//! between two places, the start, up to which it surely shows everything, and the fence, after which it surely shows nothing.
//! What the log holds in between is replayed on top; a change that the index shows already is passed over. The result is true at
//! the fence, and the watch goes on from there.
//!
//! ```text
//!   log:  … 41 ┃ 42  43  44 ┃ 45 …
//!            start        fence
//!              ┃ replayed   ┃ told as changes
//! ```

use std::collections::{BTreeMap, HashMap};

use vmm_core::event::{EventKind, EventSeq, VmEvent};
use vmm_core::id::{VmId, VmUid};
use vmm_core::state::{EndedBy, Status, VmState};
use vmm_core::store::VmRecord;

use super::Events;
use super::watch::Filter;
use crate::error::ServiceError;
use crate::index::Index;

/// One VM as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    /// The name.
    pub vm_id: VmId,
    /// The creation.
    pub uid: VmUid,
    /// When it came to be so, in Unix milliseconds.
    pub time_ms: i64,
    /// The state.
    pub state: VmState,
    /// The status.
    pub status: Status,
    /// What ended the last run.
    pub ended_by: Option<EndedBy>,
}

impl Present {
    fn of_record(record: &VmRecord) -> Self {
        Self {
            vm_id: record.vm_id.clone(),
            uid: record.uid,
            time_ms: record.modified_ms,
            state: record.state,
            status: record.status.clone(),
            ended_by: record.ended_by,
        }
    }

    fn of_event(event: &VmEvent, before: Option<&Self>) -> Self {
        let told = &event.event;
        let ended_before = before.filter(|_| !told.state.is_live()).and_then(|present| present.ended_by);
        Self {
            vm_id: told.vm_id.clone(),
            uid: told.uid,
            time_ms: told.time_ms,
            state: told.state,
            status: told.status.clone(),
            ended_by: told.ended_by.or(ended_before),
        }
    }
}

/// Every VM that matches, by uid, and the place at which this is so.
pub(super) async fn states(
    events: &Events,
    index: &Index,
    filter: &Filter,
) -> Result<(Vec<Present>, EventSeq), ServiceError> {
    let mut settled = events.settled.subscribe();
    let start = *settled.borrow_and_update();
    let mut shown = Shown::default();
    index.for_each_at(|record, seq| shown.insert(record, seq, filter));
    let fence = events.settled.answered();
    // Commits that were under way; a store takes milliseconds over them.
    settled.wait_for(|settled| *settled >= fence).await.map_err(|_| {
        ServiceError::Unavailable("the daemon is stopping: watch again when it is back".to_owned())
    })?;
    let mut cursor = start;
    while cursor < fence {
        for event in events.read(cursor, fence).await?.iter().take_while(|event| event.seq <= fence) {
            cursor = event.seq;
            shown.replay(event, filter);
        }
    }
    Ok((shown.matching.into_values().collect(), fence))
}

/// What the index showed, and what is made of it.
#[derive(Default)]
struct Shown {
    matching: BTreeMap<VmUid, Present>,
    /// The last event that each VM, matching or not, shows.
    up_to: HashMap<VmUid, EventSeq>,
}

impl Shown {
    fn insert(&mut self, record: &VmRecord, seq: EventSeq, filter: &Filter) {
        self.up_to.insert(record.uid, seq);
        if filter.matches(&record.vm_id, &record.config.metadata) {
            self.matching.insert(record.uid, Present::of_record(record));
        }
    }

    fn replay(&mut self, event: &VmEvent, filter: &Filter) {
        let uid = event.event.uid;
        if event.event.kind == EventKind::Created {
            self.up_to.entry(uid).or_default();
        }
        // A VM that neither was there nor is created here had been removed before the index was read.
        let Some(seen) = self.up_to.get_mut(&uid).filter(|seen| **seen < event.seq) else { return };
        *seen = event.seq;
        if event.event.kind == EventKind::Deleted {
            self.matching.remove(&uid);
        } else if filter.matches_event(event) {
            let present = Present::of_event(event, self.matching.get(&uid));
            self.matching.insert(uid, present);
        }
    }
}
