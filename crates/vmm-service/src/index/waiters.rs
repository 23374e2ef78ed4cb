//! The calls of WaitVm for one VM. They stand in groups by the states they wait for, at most fifteen, so that a change wakes
//! those whose wait is over and does not walk over the others.

use std::sync::Arc;

use tokio::sync::watch;
use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use super::{States, contains};

/// Hears once: of the record that ended the wait. Its sender is dropped with the VM.
pub(crate) type Waiter = watch::Receiver<Option<Arc<VmRecord>>>;

/// The groups of one VM. Takes no room where nobody waits.
#[derive(Debug, Default)]
pub(super) struct Waiters(Vec<(States, watch::Sender<Option<Arc<VmRecord>>>)>);

impl Waiters {
    /// Adds a waiter for `states`.
    pub(super) fn add(&mut self, states: States) -> Waiter {
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
    pub(super) fn take(&mut self, state: VmState) -> Woken {
        Woken(self.0.extract_if(.., |(states, _)| contains(*states, state)).map(|(_, group)| group).collect())
    }
}

/// Groups whose wait is over, to be told when no lock is held.
#[must_use = "a group that is dropped takes its VM for removed"]
pub(super) struct Woken(Vec<watch::Sender<Option<Arc<VmRecord>>>>);

impl Woken {
    /// Tells every waiter of `record`.
    pub(super) fn tell(self, record: &Arc<VmRecord>) {
        for group in self.0 {
            group.send_replace(Some(Arc::clone(record)));
        }
    }
}
