//! The spare VMMs of one backend, by the uid of the VM that each is reserved for.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use vmm_core::id::VmUid;

/// Spare VMMs of one backend. A `T` ends its process when it is dropped.
pub(crate) struct SpareTable<T>(Mutex<HashMap<VmUid, T>>);

impl<T> SpareTable<T> {
    /// Stores a VMM until [`Self::take`] removes it.
    pub(crate) fn keep(&self, uid: VmUid, spare: T) {
        self.waiting().insert(uid, spare);
    }

    /// Removes and returns the VMM that is reserved for `uid`. The caller owns it, so no second
    /// caller gets it.
    pub(crate) fn take(&self, uid: VmUid) -> Option<T> {
        self.waiting().remove(&uid)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<VmUid, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Default for SpareTable<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> fmt::Debug for SpareTable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Spares").field(&self.waiting().len()).finish()
    }
}
