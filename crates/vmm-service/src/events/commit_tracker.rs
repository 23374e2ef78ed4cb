//! The position up to which the log is settled: every event up to there is committed, and every
//! read shows the changes of these events.
//!
//! Commits of different VMs are answered in any order, and between its commit and its answer a
//! change is not yet shown to readers. A watch that ran ahead would report a change that
//! GetVmInfo does not show. Each commit is therefore open from before it is sent until the index
//! shows it. It remembers its floor: the last position that had been answered when it began. Its
//! own event comes after its floor. The log is settled up to the lowest floor of the open commits,
//! or up to the last answer if none is open.
//!
//! ```text
//!   log:   … 6   7   8   9  10  11
//!                    ▲       ▲
//!                    │       └ last answer
//!                    └ settled: a commit that began when 8 was the last answer is still open
//! ```
//!
//! No watch waits for a position to be filled. A commit that fails closes like any other, and its
//! result is read from the log.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use vmm_core::event::EventSeq;

/// The account of the commits in progress.
#[derive(Debug)]
pub(super) struct CommitTracker {
    ledger: Mutex<OpenCommits>,
    position: watch::Sender<EventSeq>,
}

#[derive(Debug)]
struct OpenCommits {
    /// The last position with which a commit was answered.
    answered: EventSeq,
    /// The floors of the open commits, in the order in which they began, so that the first is the
    /// lowest.
    open: BTreeMap<u64, EventSeq>,
    next: u64,
}

impl CommitTracker {
    /// Creates the account of a log that is settled up to `last`.
    pub(super) fn new(last: EventSeq) -> Self {
        let ledger = OpenCommits { answered: last, open: BTreeMap::new(), next: 0 };
        Self { ledger: Mutex::new(ledger), position: watch::Sender::new(last) }
    }

    /// Opens a commit that is about to be sent.
    pub(super) fn open(self: &Arc<Self>) -> OpenCommit {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let number = ledger.next;
        ledger.next += 1;
        let floor = ledger.answered;
        ledger.open.insert(number, floor);
        OpenCommit { settled: Arc::clone(self), number }
    }

    /// Returns the last position with which a commit was answered. It may not be settled yet.
    pub(super) fn answered(&self) -> EventSeq {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).answered
    }

    /// Returns a receiver of the position up to which the log is settled.
    pub(super) fn subscribe(&self) -> watch::Receiver<EventSeq> {
        self.position.subscribe()
    }

    fn close(&self, number: u64) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.open.remove(&number);
        // The open commits are numbered in the order in which they began, and the last answer never
        // decreases. The first floor is therefore the lowest.
        let position = ledger.open.values().next().copied().unwrap_or(ledger.answered);
        self.position.send_if_modified(|settled| {
            let moved = position > *settled;
            *settled = position.max(*settled);
            moved
        });
    }
}

/// A commit in progress. It closes when it is dropped.
#[derive(Debug)]
pub(super) struct OpenCommit {
    settled: Arc<CommitTracker>,
    number: u64,
}

impl OpenCommit {
    /// Notes the position of the commit's event.
    pub(super) fn answered(&self, seq: EventSeq) {
        let mut ledger = self.settled.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.answered = ledger.answered.max(seq);
    }
}

impl Drop for OpenCommit {
    fn drop(&mut self) {
        self.settled.close(self.number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position(settled: &CommitTracker) -> u64 {
        settled.position.borrow().0
    }

    #[test]
    fn an_open_commit_holds_back_only_later_positions() {
        let settled = Arc::new(CommitTracker::new(EventSeq(5)));
        let (a, b) = (settled.open(), settled.open());
        b.answered(EventSeq(7));
        drop(b);
        assert_eq!((position(&settled), settled.answered()), (5, EventSeq(7)), "6 may be a's");
        let c = settled.open();
        a.answered(EventSeq(6));
        drop(a);
        assert_eq!(position(&settled), 7, "c began when 7 had been answered");
        drop(c);
        assert_eq!(position(&settled), 7, "c failed, and nothing waits for it");
    }

    proptest! {
        /// Commits begin, are written, answered and shown in any order the rules allow; some fail,
        /// some are written unheard.
        #[test]
        fn every_settled_event_is_shown(steps in prop::collection::vec((0..4_u8, 0..8_usize), 0..200)) {
            let settled = Arc::new(CommitTracker::new(EventSeq(0)));
            let mut log = 0;
            let mut open: Vec<(OpenCommit, Option<u64>, bool)> = Vec::new();
            let mut unheard = Vec::new();
            let mut shown = Vec::new();
            for (step, which) in steps {
                let which = which % open.len().max(1);
                match (step, open.get_mut(which)) {
                    (0, _) | (_, None) => open.push((settled.open(), None, false)),
                    (1, Some((_, seq @ None, _))) => { log += 1; *seq = Some(log); }
                    (2, Some((ticket, Some(seq), answered))) => { ticket.answered(EventSeq(*seq)); *answered = true; }
                    (3, Some(_)) => match open.remove(which) {
                        (_ticket, Some(seq), true) => shown.push(seq),
                        (_ticket, Some(seq), false) => unheard.push(seq),
                        (_ticket, None, _) => {}
                    },
                    _ => {}
                }
                for seq in 1..=position(&settled) {
                    prop_assert!(shown.contains(&seq) || unheard.contains(&seq), "{} is settled, and not shown", seq);
                }
            }
            let last = open.iter().filter(|o| o.2).filter_map(|o| o.1).chain(shown.iter().copied()).max();
            open.clear();
            prop_assert_eq!(position(&settled), last.unwrap_or(0), "nothing is held back for ever");
        }
    }
}
