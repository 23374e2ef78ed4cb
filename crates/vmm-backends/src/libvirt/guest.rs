//! What was ordered of a guest, so that what differs from it is known to be somebody else's doing.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Mutex, MutexGuard};

use crate::resets::Resets;

/// What was ordered.
#[derive(Debug)]
pub(super) struct Guest {
    runs: AtomicBool,
    is_to_end: AtomicBool,
    /// Held while a call changes it, so that its echo among the events is not taken for somebody else's doing.
    changing: Mutex<()>,
    /// The resets that were ordered.
    pub(super) resets: Resets,
}

impl Guest {
    pub(super) fn new(runs: bool) -> Self {
        Self {
            runs: AtomicBool::new(runs),
            is_to_end: AtomicBool::new(false),
            changing: Mutex::new(()),
            resets: Resets::default(),
        }
    }

    /// Says whether the run was ordered to end.
    pub(super) fn is_to_end(&self) -> bool {
        self.is_to_end.load(Ordering::Relaxed)
    }

    pub(super) fn order_end(&self) {
        self.is_to_end.store(true, Ordering::Relaxed);
    }

    /// An order to end that came to nothing: what ends it later is news.
    pub(super) fn order_no_end(&self) {
        self.is_to_end.store(false, Ordering::Relaxed);
    }

    pub(super) async fn change(&self) -> Change<'_> {
        Change { _turn: self.changing.lock().await, runs: &self.runs }
    }
}

/// The right to change what is known of the guest's CPUs.
pub(super) struct Change<'a> {
    _turn: MutexGuard<'a, ()>,
    runs: &'a AtomicBool,
}

impl Change<'_> {
    pub(super) fn runs(&self) -> bool {
        self.runs.load(Ordering::Relaxed)
    }

    pub(super) fn set_runs(&self, runs: bool) {
        self.runs.store(runs, Ordering::Relaxed);
    }
}
