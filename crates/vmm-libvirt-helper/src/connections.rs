//! Chooses the connection to libvirtd for each call.
//!
//! libvirtd serves five calls of one connection at a time, and a call that needs a hanging QEMU
//! does not come back. Five such calls would silence the whole connection. Therefore calls that
//! wait for a QEMU go over lanes: connections of their own that carry fewer calls than libvirtd
//! serves. All other calls go over the main connection, on which only a hanging libvirtd can stop
//! them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use virt::connect::Connect;
use virt::error::Error;
use vmm_libvirt_wire::{Call, CallFailure, CallResult};

use crate::calls;

/// The most calls under way on one lane. libvirtd's own limit is five.
const LANE_CALLS: usize = 4;
/// The most lanes that are being opened at a time. A call that finds no room and may open no lane
/// waits for one of these.
const OPENING: usize = 4;
/// The interval between two keep-alive messages in seconds, and the number of missing answers that
/// ends the connection.
const KEEP_ALIVE: (i32, u32) = (5, 4);

/// The connections to libvirtd: the main one, and the lanes.
pub(crate) struct Connections {
    uri: String,
    main: Connect,
    pool: Mutex<ConnectionPool>,
    /// Notified when a lane has room, and when an attempt to open one has ended.
    changed: Condvar,
}

#[derive(Default)]
struct ConnectionPool {
    lanes: Vec<PooledConnection>,
    opening: usize,
}

struct PooledConnection {
    connect: Arc<Connect>,
    calls: usize,
}

/// Lets libvirt close the connection after about 20 s without a sign of life of libvirtd.
pub(crate) fn keep_alive(connect: &Connect) -> Result<(), Error> {
    connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1).map(|_| ())
}

/// Formats a version that libvirt has packed into a number, as in `9.0.0`.
pub(crate) fn version(packed: u32) -> String {
    format!("{}.{}.{}", packed / 1_000_000, packed / 1000 % 1000, packed % 1000)
}

impl Connections {
    pub(crate) fn new(uri: String, main: Connect) -> Self {
        Self { uri, main, pool: Mutex::default(), changed: Condvar::new() }
    }

    /// Makes one call over the connection for its kind, and returns libvirt's answer or failure.
    /// Blocks until libvirtd answers.
    pub(crate) fn make(&self, call: &Call) -> Result<CallResult, CallFailure> {
        if !call.needs_qemu() {
            return calls::run(&self.main, call).map_err(|error| calls::failure(&error));
        }
        let connect = self.enter(call).map_err(|error| calls::failure(&error))?;
        let got = calls::run(&connect, call).map_err(|error| calls::failure(&error));
        self.leave(&connect);
        got
    }

    /// Returns a lane with room, and opens one if there is none. An error of opening is returned.
    fn enter(&self, call: &Call) -> Result<Arc<Connect>, Error> {
        // Opening a connection may block for as long as libvirtd is silent. The lock is therefore
        // released around it: other calls still find room on the lanes that exist, and finished
        // calls give theirs back.
        let mut pool = lock(&self.pool);
        loop {
            if let Some(lane) = pool.lanes.iter_mut().find(|lane| lane.calls < LANE_CALLS) {
                lane.calls += 1;
                return Ok(Arc::clone(&lane.connect));
            }
            // A Destroy opens a lane even past the limit, because it may be the only way to free
            // the calls that occupy all lanes.
            if pool.opening < OPENING || matches!(call, Call::Destroy { .. }) {
                break;
            }
            // A wake-up proves nothing, because another thread may have taken the room first. The
            // loop looks again.
            pool = self.changed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
        pool.opening += 1;
        drop(pool);
        let opened = open(&self.uri).map(Arc::new);
        let mut pool = lock(&self.pool);
        pool.opening -= 1;
        if let Ok(connect) = &opened {
            pool.lanes.push(PooledConnection { connect: Arc::clone(connect), calls: 1 });
        }
        drop(pool);
        // Success makes room for three more calls, and failure lets a waiting call try to open. All
        // waiting threads must look, so all are woken.
        self.changed.notify_all();
        opened
    }

    /// Gives back the room on a lane. One idle lane is kept for the next call, and further idle
    /// lanes are closed.
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
        // Closing a connection asks libvirtd and may block, so it happens after the lock was
        // released.
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
    fn libvirt_version_numbers_are_unpacked() {
        assert_eq!(version(7_002_022), "7.2.22");
        assert_eq!(version(9_000_000), "9.0.0");
        assert_eq!(version(11_010_003), "11.10.3");
    }
}
