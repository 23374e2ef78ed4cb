//! The locks of names. Of two calls that create a VM of one name, the second waits for the result
//! of the first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_core::id::VmId;

/// One lock for each name that is being created, so that the second of two calls waits for the
/// result of the first.
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
