//! The calls of WaitVm for one VM. They are grouped by the states that they wait for, in at most
//! fifteen groups. A change therefore wakes the calls whose wait is over and does not walk over the
//! others.

use std::sync::Arc;

use tokio::sync::watch;
use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use super::{StateList, contains};

/// The receiver of a waiting call. It gets one message, the record that ended the wait. Its sender
/// is dropped with the VM.
pub(crate) type Waiter = watch::Receiver<Option<Arc<VmRecord>>>;

/// The groups of one VM. They take no memory if no call waits.
#[derive(Debug, Default)]
pub(super) struct Waiters(Vec<(StateList, watch::Sender<Option<Arc<VmRecord>>>)>);

impl Waiters {
    /// Adds a waiter for `states`.
    pub(super) fn add(&mut self, states: StateList) -> Waiter {
        self.0.retain(|(_, group)| group.receiver_count() > 0);
        if let Some((_, group)) = self.0.iter().find(|(wanted, _)| *wanted == states) {
            return group.subscribe();
        }
        let (group, waiter) = watch::channel(None);
        self.0.push((states, group));
        self.0.shrink_to_fit();
        waiter
    }

    /// Takes the groups whose wait ends with `state`.
    pub(super) fn take(&mut self, state: VmState) -> WokenWaiters {
        WokenWaiters(
            self.0.extract_if(.., |(states, _)| contains(*states, state)).map(|(_, group)| group).collect(),
        )
    }
}

/// The groups whose wait is over. They are woken after all locks are released.
#[must_use = "a group that is dropped takes its VM for removed"]
pub(super) struct WokenWaiters(Vec<watch::Sender<Option<Arc<VmRecord>>>>);

impl WokenWaiters {
    /// Sends `record` to every waiter.
    pub(super) fn send(self, record: &Arc<VmRecord>) {
        for group in self.0 {
            group.send_replace(Some(Arc::clone(record)));
        }
    }
}
