//! The end of the log in memory. A thousand watches cost one read of the store because of it.

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_core::event::{EventSeq, VmEvent};

/// A stretch of the log without gaps: every event after `base` up to `head`.
#[derive(Debug)]
pub(super) struct RecentEvents {
    base: EventSeq,
    events: VecDeque<Arc<VmEvent>>,
    /// The largest number of events.
    capacity: usize,
    /// The largest number of bytes of text in the events.
    room: usize,
    used: usize,
}

impl RecentEvents {
    /// Creates an empty stretch at the end of the log.
    pub(super) fn new(end: EventSeq, capacity: usize, room: usize) -> Self {
        Self { base: end, events: VecDeque::new(), capacity, room, used: 0 }
    }

    /// Returns the last position in the stretch.
    pub(super) fn head(&self) -> EventSeq {
        self.events.back().map_or(self.base, |event| event.seq)
    }

    /// Returns up to `limit` events after `after`, or `None` if the stretch does not reach that far
    /// back or forward.
    pub(super) fn after(&self, after: EventSeq, limit: usize) -> Option<Vec<Arc<VmEvent>>> {
        let skipped = usize::try_from(after.0.checked_sub(self.base.0)?).ok()?;
        (skipped <= self.events.len())
            .then(|| self.events.iter().skip(skipped).take(limit).map(Arc::clone).collect())
    }

    /// Appends `page`, which begins right after `after`. If `after` is not the head, the stretch
    /// begins anew there.
    pub(super) fn append(&mut self, after: EventSeq, page: &[Arc<VmEvent>]) {
        if after != self.head() {
            self.events.clear();
            self.used = 0;
            self.base = after;
        }
        self.used += page.iter().map(|event| text_of(event)).sum::<usize>();
        self.events.extend(page.iter().map(Arc::clone));
        while self.events.len() > self.capacity || self.used > self.room {
            let Some(oldest) = self.events.pop_front() else { return };
            self.used -= text_of(&oldest);
            self.base = oldest.seq;
        }
    }
}

/// Returns the bytes of an event whose number clients and VMMs determine.
fn text_of(event: &VmEvent) -> usize {
    let before = event.event.update.iter().flat_map(|update| update.metadata_before.iter().flatten());
    let metadata = event.event.metadata.iter().chain(before).map(|(key, value)| key.len() + value.len());
    event.event.status.message.len() + metadata.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use vmm_core::caller::Caller;
    use vmm_core::event::{EventKind, NewEvent};
    use vmm_core::state::{Phase, Status, VmState};

    use super::*;

    fn event(seq: u64, text: usize) -> Arc<VmEvent> {
        let event = NewEvent {
            time_ms: 0,
            vm_id: "vm".parse().unwrap(),
            uid: "00000000-0000-7000-8000-000000000001".parse().unwrap(),
            kind: EventKind::StateChanged,
            state: VmState::Running,
            status: Status::plain(Phase::Running, 0)
                .because(vmm_core::reason::Reason::Nothing, "x".repeat(text)),
            cause: vmm_core::cause::Cause::BootVm,
            caller: Caller::named(""),
            ended_by: None,
            metadata: [].into(),
            update: None,
            summary: None,
        };
        Arc::new(VmEvent { seq: EventSeq(seq), event })
    }

    fn positions(recent: &RecentEvents, after: u64) -> Option<Vec<u64>> {
        let found = recent.after(EventSeq(after), 100)?;
        Some(found.iter().map(|event| event.seq.0).collect())
    }

    #[test]
    fn recent_events_are_returned_only_without_a_gap() {
        let mut recent = RecentEvents::new(EventSeq(5), 3, 1000);
        assert_eq!(
            (positions(&recent, 4), positions(&recent, 5), positions(&recent, 6)),
            (None, Some(vec![]), None)
        );
        recent.append(EventSeq(5), &[event(6, 0), event(7, 0)]);
        assert_eq!((positions(&recent, 5), positions(&recent, 6)), (Some(vec![6, 7]), Some(vec![7])));
        recent.append(EventSeq(7), &[event(8, 0), event(9, 0)]);
        assert_eq!((positions(&recent, 5), positions(&recent, 6)), (None, Some(vec![7, 8, 9])));
        recent.append(EventSeq(20), &[event(21, 0)]);
        assert_eq!((positions(&recent, 9), positions(&recent, 20)), (None, Some(vec![21])));
    }

    #[test]
    fn long_events_stay_within_the_byte_limit() {
        let mut recent = RecentEvents::new(EventSeq(0), 100, 1000);
        recent.append(EventSeq(0), &[event(1, 400), event(2, 400), event(3, 400)]);
        assert_eq!((positions(&recent, 0), positions(&recent, 1)), (None, Some(vec![2, 3])));
        recent.append(EventSeq(3), &[event(4, 5000)]);
        assert_eq!((positions(&recent, 3), positions(&recent, 4)), (None, Some(vec![])));
        recent.append(EventSeq(4), &[event(5, 1000)]);
        assert_eq!(positions(&recent, 4), Some(vec![5]));
    }
}
