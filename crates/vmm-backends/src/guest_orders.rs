//! Records which states this program ordered for a guest, so that any other change is known to come
//! from the guest or from another client of the VMM.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};
use vmm_core::backend::VmmEvent;

use crate::resets::ResetTracker;

/// The orders that the guest of one run was given. The VM's handle and its monitor share them.
#[derive(Debug)]
pub(crate) struct GuestOrders {
    runs: AtomicBool,
    is_to_end: AtomicBool,
    has_shut_down: AtomicBool,
    /// Locked while a call changes `runs`, so that the event of the change is not taken for the
    /// work of another client.
    changing: Mutex<()>,
    /// The resets that were ordered. Used where another client can order a reset as well.
    pub(crate) resets: ResetTracker,
}

impl GuestOrders {
    pub(crate) fn new(runs: bool) -> Self {
        Self {
            runs: AtomicBool::new(runs),
            is_to_end: AtomicBool::new(false),
            has_shut_down: AtomicBool::new(false),
            changing: Mutex::new(()),
            resets: ResetTracker::default(),
        }
    }

    /// Returns true if the run was ordered to end.
    pub(crate) fn is_to_end(&self) -> bool {
        self.is_to_end.load(Ordering::Relaxed)
    }

    /// Records that the run was ordered to end. With `false` records that the order had no effect,
    /// so that a later end is reported.
    pub(crate) fn order_end(&self, ordered: bool) {
        self.is_to_end.store(ordered, Ordering::Relaxed);
    }

    /// Returns true if QEMU has reported to this program that its guest is shut down, and has not
    /// reported since that the guest runs. Always false under libvirt, because QEMU reports to
    /// libvirt there.
    pub(crate) fn has_shut_down(&self) -> bool {
        self.has_shut_down.load(Ordering::Relaxed)
    }

    /// Records the last report of QEMU about the guest's shutdown.
    pub(crate) fn note_shut_down(&self, shut_down: bool) {
        self.has_shut_down.store(shut_down, Ordering::Relaxed);
    }

    /// Carries out `order`, which starts or stops the guest's CPUs, and records `runs` if the order
    /// succeeds. No other call changes the record meanwhile. Returns the error of `order`.
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

    /// Waits until no other call changes the record of the guest's CPUs, and locks that record.
    pub(crate) async fn change(&self) -> OrderLock<'_> {
        OrderLock { _turn: self.changing.lock().await, runs: &self.runs }
    }
}

/// The lock on the record of the guest's CPUs.
pub(crate) struct OrderLock<'a> {
    _turn: MutexGuard<'a, ()>,
    runs: &'a AtomicBool,
}

impl OrderLock<'_> {
    pub(crate) fn runs(&self) -> bool {
        self.runs.load(Ordering::Relaxed)
    }

    pub(crate) fn set_runs(&self, runs: bool) {
        self.runs.store(runs, Ordering::Relaxed);
    }
}

/// Waits until both the receiver of the events and the handle have been dropped. The monitor then
/// closes its connection, because QEMU serves one client at a time.
pub(crate) async fn wait_for_last_user(events: &mpsc::Sender<VmmEvent>, handle: &mut oneshot::Receiver<()>) {
    events.closed().await;
    // No value is ever sent on this channel. The error means that the handle, which owns the other
    // half, has been dropped.
    let _ = handle.await;
}
