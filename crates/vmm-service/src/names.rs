//! Locks of names: of two calls that create a VM of one name, the second sees what became of the first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_core::id::VmId;

/// One lock per name that is being created, so that of two calls the second sees what became of the first.
#[derive(Default)]
pub(crate) struct NameLocks {
    locks: Mutex<HashMap<VmId, Arc<tokio::sync::Mutex<()>>>>,
}

impl NameLocks {
    pub(crate) fn of(&self, vm_id: &VmId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(locks.entry(vm_id.clone()).or_default())
    }
}
