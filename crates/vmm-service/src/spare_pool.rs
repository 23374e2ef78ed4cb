//! The pool of spare VMMs as data: the free ones, the reserved ones, and the number to have ready.

use std::collections::{BTreeMap, VecDeque};

use vmm_core::id::{BackendName, VmUid};

/// The spare VMMs of every backend.
#[derive(Debug, Default)]
pub(crate) struct SparePool {
    /// The number of VMMs that are to be free, for each backend in use.
    wanted: usize,
    backends: BTreeMap<BackendName, BackendSpares>,
    stopped: bool,
}

/// The spare VMMs of one backend, the oldest first.
#[derive(Debug, Default)]
struct BackendSpares {
    free: VecDeque<VmUid>,
    reserved: VecDeque<VmUid>,
    filling: bool,
    /// True if this backend has answered that it cannot start a spare VMM.
    has_none: bool,
}

/// The spare VMMs of one backend that waited when the pool was stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RemainingSpares {
    pub(crate) backend: BackendName,
    /// The VMMs whose folders belong to VMs on record.
    pub(crate) reserved: Vec<VmUid>,
    /// The VMMs whose folders belong to no VM.
    pub(crate) free: Vec<VmUid>,
}

impl SparePool {
    /// Creates an empty pool, in which `wanted` spare VMMs of each backend are to be free.
    pub(crate) fn new(wanted: usize) -> Self {
        Self { wanted, ..Self::default() }
    }

    /// Takes the free VMM that has waited longest.
    pub(crate) fn take(&mut self, backend: &BackendName) -> Option<VmUid> {
        self.backends.get_mut(backend)?.free.pop_front()
    }

    /// Puts back a VMM that was taken and not used. Returns the VMM if it must be ended, because
    /// the pool has been stopped.
    pub(crate) fn give_back(&mut self, backend: &BackendName, uid: VmUid) -> Option<VmUid> {
        if self.stopped {
            return Some(uid);
        }
        self.entry(backend).free.push_front(uid);
        None
    }

    /// Reserves a VMM that was taken for its VM. Returns the VMM whose reservation is cancelled, if
    /// too many wait for their BootVm or the pool has been stopped.
    pub(crate) fn reserve(&mut self, backend: &BackendName, uid: VmUid) -> Option<VmUid> {
        if self.stopped {
            return Some(uid);
        }
        let wanted = self.wanted;
        let reserved = &mut self.entry(backend).reserved;
        reserved.push_back(uid);
        if reserved.len() > wanted { reserved.pop_front() } else { None }
    }

    /// Removes the VMM of `uid` from the count, because a VM uses it or it has been ended.
    pub(crate) fn forget(&mut self, backend: &BackendName, uid: VmUid) {
        if let Some(spares) = self.backends.get_mut(backend) {
            spares.reserved.retain(|reserved| *reserved != uid);
        }
    }

    /// Returns true if the caller must fill the pool with VMMs of `backend`. Only one caller at a
    /// time gets true.
    pub(crate) fn begin_filling(&mut self, backend: &BackendName) -> bool {
        if self.stopped || self.wanted == 0 {
            return false;
        }
        let wanted = self.wanted;
        let spares = self.entry(backend);
        let begins = !spares.filling && !spares.has_none && spares.free.len() < wanted;
        spares.filling |= begins;
        begins
    }

    /// Adds a VMM that was started. Returns true if another one is needed.
    ///
    /// # Errors
    ///
    /// Returns the uid if the pool has been stopped, because the VMM is not needed any more.
    pub(crate) fn add(&mut self, backend: &BackendName, uid: VmUid) -> Result<bool, VmUid> {
        if self.stopped {
            return Err(uid);
        }
        let wanted = self.wanted;
        let spares = self.entry(backend);
        spares.free.push_back(uid);
        spares.filling = spares.free.len() < wanted;
        Ok(spares.filling)
    }

    /// Notes that the caller that filled the pool with VMMs of `backend` has given up. `for_ever`
    /// is true if this backend has no spare VMMs.
    pub(crate) fn end_filling(&mut self, backend: &BackendName, for_ever: bool) {
        if let Some(spares) = self.backends.get_mut(backend) {
            spares.filling = false;
            spares.has_none = for_ever;
        }
    }

    /// Returns all waiting VMMs, and accepts no more.
    pub(crate) fn stop(&mut self) -> Vec<RemainingSpares> {
        self.stopped = true;
        let backends = std::mem::take(&mut self.backends).into_iter();
        backends
            .map(|(backend, spares)| RemainingSpares {
                backend,
                reserved: spares.reserved.into(),
                free: spares.free.into(),
            })
            .collect()
    }

    fn entry(&mut self, backend: &BackendName) -> &mut BackendSpares {
        self.backends.entry(backend.clone()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn uid(number: u128) -> VmUid {
        VmUid::new(Uuid::from_u128(number))
    }

    fn fake() -> BackendName {
        BackendName::new("fake")
    }

    /// Returns a pool with `wanted` free VMMs.
    fn full(wanted: usize) -> SparePool {
        let mut pool = SparePool::new(wanted);
        assert!(pool.begin_filling(&fake()));
        for number in 1..=wanted {
            assert_eq!(pool.add(&fake(), uid(number as u128)), Ok(number < wanted));
        }
        pool
    }

    #[test]
    fn one_caller_at_a_time_fills_the_pool() {
        let mut pool = SparePool::new(2);
        assert!(pool.begin_filling(&fake()));
        assert!(!pool.begin_filling(&fake()), "one fills it already");
        assert!(pool.begin_filling(&BackendName::new("other")), "each backend has its own");
        assert_eq!(pool.add(&fake(), uid(1)), Ok(true));
        assert!(!pool.begin_filling(&fake()));
        assert_eq!(pool.add(&fake(), uid(2)), Ok(false));
        assert!(!pool.begin_filling(&fake()), "it is full");
        assert_eq!(pool.take(&fake()), Some(uid(1)), "the oldest");
        assert!(pool.begin_filling(&fake()));
        assert!(!SparePool::new(0).begin_filling(&fake()), "none is wanted");
    }

    #[test]
    fn a_failed_fill_is_tried_again_unless_the_backend_has_no_spares() {
        let mut pool = SparePool::new(1);
        for for_ever in [false, true] {
            assert!(pool.begin_filling(&fake()));
            pool.end_filling(&fake(), for_ever);
        }
        assert!(!pool.begin_filling(&fake()));
    }

    #[test]
    fn a_returned_spare_vmm_is_the_next_to_be_reserved() {
        let mut pool = full(2);
        assert_eq!(pool.take(&fake()), Some(uid(1)));
        assert_eq!(pool.give_back(&fake(), uid(1)), None);
        assert_eq!([pool.take(&fake()), pool.take(&fake())], [Some(uid(1)), Some(uid(2))]);
        assert_eq!(pool.take(&fake()), None);
        assert_eq!(pool.take(&BackendName::new("other")), None);
    }

    #[test]
    fn the_oldest_reservation_is_cancelled_beyond_the_wanted_number() {
        let mut pool = full(2);
        assert_eq!(pool.reserve(&fake(), uid(1)), None);
        assert_eq!(pool.reserve(&fake(), uid(2)), None);
        assert_eq!(pool.reserve(&fake(), uid(3)), Some(uid(1)));
        pool.forget(&fake(), uid(2));
        pool.forget(&fake(), uid(2));
        assert_eq!(pool.reserve(&fake(), uid(4)), None, "one of them is in use and counts no more");
    }

    #[test]
    fn a_stopped_pool_returns_all_spare_vmms_and_accepts_none() {
        let mut pool = full(3);
        let taken = [pool.take(&fake()).unwrap(), pool.take(&fake()).unwrap()];
        assert_eq!(pool.reserve(&fake(), taken[0]), None);
        let left = RemainingSpares { backend: fake(), reserved: vec![taken[0]], free: vec![uid(3)] };
        assert_eq!(pool.stop(), [left]);
        assert_eq!(pool.give_back(&fake(), taken[1]), Some(taken[1]));
        assert_eq!(pool.reserve(&fake(), taken[1]), Some(taken[1]));
        assert_eq!(pool.add(&fake(), uid(4)), Err(uid(4)));
        assert!(!pool.begin_filling(&fake()));
        assert_eq!(pool.stop(), []);
    }
}
