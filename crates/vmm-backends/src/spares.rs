//! The VMMs that wait for their VMs, by the VMs' uids.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use vmm_core::id::VmUid;

/// Spare VMMs of one backend. A `T` ends its process when it is dropped.
pub(crate) struct Spares<T>(Mutex<HashMap<VmUid, T>>);

impl<T> Spares<T> {
    /// Keeps a VMM until it is taken.
    pub(crate) fn keep(&self, uid: VmUid, spare: T) {
        self.waiting().insert(uid, spare);
    }

    /// Hands out the VMM that waits for `uid`, if one does. Nobody else gets it.
    pub(crate) fn take(&self, uid: VmUid) -> Option<T> {
        self.waiting().remove(&uid)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<VmUid, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Default for Spares<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> fmt::Debug for Spares<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Spares").field(&self.waiting().len()).finish()
    }
}
