//! Which call goes over which connection.
//!
//! libvirtd serves five calls of one connection at a time, and a call that needs a QEMU which hangs does not come back. So calls
//! that wait for a QEMU go over lanes, connections of their own with room to spare. Everything else goes over the main connection,
//! where nothing hangs but libvirtd itself.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use virt::connect::Connect;
use virt::error::Error;
use vmm_libvirt_wire::{Call, Failure, Got};

use crate::calls;

/// Calls under way on one lane; libvirtd's own limit is five.
const LANE_CALLS: usize = 4;
/// Lanes that are being opened at a time. More calls than these lanes will take wait for one of them.
const OPENING: usize = 4;
/// Seconds between two signs of life of libvirtd, and how many may be missing.
const KEEP_ALIVE: (i32, u32) = (5, 4);

/// The connections.
pub(crate) struct Lanes {
    uri: String,
    main: Connect,
    pool: Mutex<Pool>,
    /// A lane has room, or an attempt to open one is over.
    changed: Condvar,
}

#[derive(Default)]
struct Pool {
    lanes: Vec<Lane>,
    opening: usize,
}

struct Lane {
    connect: Arc<Connect>,
    calls: usize,
}

/// Has libvirtd's silence end the connection.
pub(crate) fn keep_alive(connect: &Connect) -> Result<(), Error> {
    connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1).map(|_| ())
}

/// A version as libvirt packs it, as people write it.
pub(crate) fn version(packed: u32) -> String {
    format!("{}.{}.{}", packed / 1_000_000, packed / 1000 % 1000, packed % 1000)
}

impl Lanes {
    pub(crate) fn new(uri: String, main: Connect) -> Self {
        Self { uri, main, pool: Mutex::default(), changed: Condvar::new() }
    }

    /// Makes one call, over the connection that is for it.
    pub(crate) fn make(&self, call: &Call) -> Result<Got, Failure> {
        if !call.needs_qemu() {
            return calls::run(&self.main, call).map_err(|error| calls::failure(&error));
        }
        let connect = self.enter(call).map_err(|error| calls::failure(&error))?;
        let got = calls::run(&connect, call).map_err(|error| calls::failure(&error));
        self.leave(&connect);
        got
    }

    /// Finds a lane with room, or opens one. Nobody else waits meanwhile for a lane that has room.
    fn enter(&self, call: &Call) -> Result<Arc<Connect>, Error> {
        let mut pool = lock(&self.pool);
        loop {
            if let Some(lane) = pool.lanes.iter_mut().find(|lane| lane.calls < LANE_CALLS) {
                lane.calls += 1;
                return Ok(Arc::clone(&lane.connect));
            }
            // The end of a domain waits behind nothing.
            if pool.opening < OPENING || matches!(call, Call::Destroy { .. }) {
                break;
            }
            pool = self.changed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
        pool.opening += 1;
        drop(pool);
        let opened = open(&self.uri).map(Arc::new);
        let mut pool = lock(&self.pool);
        pool.opening -= 1;
        if let Ok(connect) = &opened {
            pool.lanes.push(Lane { connect: Arc::clone(connect), calls: 1 });
        }
        drop(pool);
        self.changed.notify_all();
        opened
    }

    /// Gives back the room on a lane. One that is idle beside another is given up.
    fn leave(&self, connect: &Arc<Connect>) {
        let mut given_up = Vec::new();
        {
            let mut pool = lock(&self.pool);
            if let Some(lane) = pool.lanes.iter_mut().find(|lane| Arc::ptr_eq(&lane.connect, connect)) {
                lane.calls -= 1;
            }
            while pool.lanes.iter().filter(|lane| lane.calls == 0).count() > 1
                && let Some(idle) = pool.lanes.iter().position(|lane| lane.calls == 0)
            {
                given_up.push(pool.lanes.swap_remove(idle));
            }
        }
        self.changed.notify_all();
        // Closing a connection asks libvirtd, and therefore nothing is held here.
        drop(given_up);
    }
}

fn open(uri: &str) -> Result<Connect, Error> {
    let connect = Connect::open(Some(uri))?;
    keep_alive(&connect)?;
    Ok(connect)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_unpacked() {
        assert_eq!(version(7_002_022), "7.2.22");
        assert_eq!(version(9_000_000), "9.0.0");
        assert_eq!(version(11_010_003), "11.10.3");
    }
}
