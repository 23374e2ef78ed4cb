//! The end of the log in memory, so that a thousand watchers cost one read of the store.

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_core::event::{EventSeq, VmEvent};

/// A stretch of the log without gaps: everything after `base` up to `head`.
#[derive(Debug)]
pub(super) struct Recent {
    base: EventSeq,
    events: VecDeque<Arc<VmEvent>>,
    capacity: usize,
}

impl Recent {
    /// Begins, empty, at the end of the log.
    pub(super) fn new(end: EventSeq, capacity: usize) -> Self {
        Self { base: end, events: VecDeque::new(), capacity }
    }

    /// The last place that it reaches to.
    pub(super) fn head(&self) -> EventSeq {
        self.events.back().map_or(self.base, |event| event.seq)
    }

    /// Up to `limit` events after `after`; `None` if the stretch does not reach so far back, or not so far forward.
    pub(super) fn after(&self, after: EventSeq, limit: usize) -> Option<Vec<Arc<VmEvent>>> {
        let skipped = usize::try_from(after.0.checked_sub(self.base.0)?).ok()?;
        (skipped <= self.events.len())
            .then(|| self.events.iter().skip(skipped).take(limit).map(Arc::clone).collect())
    }

    /// Appends `page`, which begins right after `after`. Where that is not the head, the stretch begins anew there.
    pub(super) fn append(&mut self, after: EventSeq, page: &[Arc<VmEvent>]) {
        if after != self.head() {
            self.events.clear();
            self.base = after;
        }
        self.events.extend(page.iter().map(Arc::clone));
        while self.events.len() > self.capacity {
            if let Some(oldest) = self.events.pop_front() {
                self.base = oldest.seq;
            }
        }
    }
}
