//! What was ordered of a guest, so that what differs from it is known to be somebody else's doing.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};
use vmm_core::backend::VmmEvent;

use crate::resets::Resets;

/// The orders that the guest of one run was given, shared by the VM's handle and its watch.
#[derive(Debug)]
pub(crate) struct Ordered {
    runs: AtomicBool,
    is_to_end: AtomicBool,
    has_shut_down: AtomicBool,
    /// Held while a call changes it, so that its echo among the events is not taken for somebody else's doing.
    changing: Mutex<()>,
    /// The resets that were ordered, where somebody else can order one too.
    pub(crate) resets: Resets,
}

impl Ordered {
    pub(crate) fn new(runs: bool) -> Self {
        Self {
            runs: AtomicBool::new(runs),
            is_to_end: AtomicBool::new(false),
            has_shut_down: AtomicBool::new(false),
            changing: Mutex::new(()),
            resets: Resets::default(),
        }
    }

    /// Returns true if the run was ordered to end.
    pub(crate) fn is_to_end(&self) -> bool {
        self.is_to_end.load(Ordering::Relaxed)
    }

    /// Remembers that the run was ordered to end; with false, that the order came to nothing, so that a later end is news.
    pub(crate) fn order_end(&self, ordered: bool) {
        self.is_to_end.store(ordered, Ordering::Relaxed);
    }

    /// Returns true if QEMU has told this program itself that its guest is shut down, and not that the guest runs again.
    /// False under libvirt, which QEMU tells instead.
    pub(crate) fn has_shut_down(&self) -> bool {
        self.has_shut_down.load(Ordering::Relaxed)
    }

    /// Remembers what QEMU tells of that.
    pub(crate) fn note_shut_down(&self, shut_down: bool) {
        self.has_shut_down.store(shut_down, Ordering::Relaxed);
    }

    /// Carries out `order`, which lets the guest's CPUs run or stops them, and remembers what was ordered. Nothing else changes
    /// that meanwhile. Fails as `order` does.
    pub(crate) async fn order_runs<E>(
        &self,
        runs: bool,
        order: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        let change = self.change().await;
        order.await?;
        change.set_runs(runs);
        Ok(())
    }

    /// Waits until no other call changes what is known of the guest's CPUs.
    pub(crate) async fn change(&self) -> Change<'_> {
        Change { _turn: self.changing.lock().await, runs: &self.runs }
    }
}

/// The right to change what is known of the guest's CPUs.
pub(crate) struct Change<'a> {
    _turn: MutexGuard<'a, ()>,
    runs: &'a AtomicBool,
}

impl Change<'_> {
    pub(crate) fn runs(&self) -> bool {
        self.runs.load(Ordering::Relaxed)
    }

    pub(crate) fn set_runs(&self, runs: bool) {
        self.runs.store(runs, Ordering::Relaxed);
    }
}

/// Waits until nobody wants the VM any more, neither its events nor its handle. The watch then gives back its connection,
/// because QEMU serves one client at a time.
pub(crate) async fn unwanted(events: &mpsc::Sender<VmmEvent>, handle: &mut oneshot::Receiver<()>) {
    events.closed().await;
    // Nothing is ever sent: an error is what dropping looks like.
    let _ = handle.await;
}
