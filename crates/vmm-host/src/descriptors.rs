//! File descriptors: how many this process may have, and what they are for.
//!
//! ```text
//!   0                                                                    limit
//!   ├── the daemon itself, and its VMs ──────────┬── clients ──┬── RESERVE ──┤
//!   │   VM_STEADY each, VM_START while one starts │  an eighth  │ samples, files, health and force
//! ```
//!
//! A process without a free descriptor can neither accept a connection nor read a counter of a VM. So a VM is started only
//! where what it needs is free beside what clients may take, and clients have a share of their own.
//!
//! The table of descriptors belongs to the process, so what is counted here is counted for the whole process.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The descriptors that neither clients nor VMs get.
const RESERVE: u64 = 32;
/// The descriptors that a start needs at its height: the program, its log, TAPs, pipes, sockets.
const VM_START: u64 = 8;
/// The descriptors that a running VM keeps on each hypervisor: the pidfd of its VMM, and the connection to it.
const VM_STEADY: u64 = 2;
/// The descriptors of a daemon without VMs and clients.
pub const DAEMON: u64 = 24;
/// The most that clients get.
const MOST_CLIENTS: u64 = 1024;
/// The least that clients get, so that a daemon with a very low limit can be told to end its VMs.
const LEAST_CLIENTS: u64 = 16;
/// A limit beyond this is none.
const UNLIMITED: u64 = 1 << 30;

static CLIENTS: AtomicU64 = AtomicU64::new(0);
static STARTS: AtomicU64 = AtomicU64::new(0);

/// Raises the soft limit on descriptors to the hard one. Returns the soft limit before and now.
///
/// # Errors
///
/// The kernel refuses. The limit is then as before.
pub fn raise_limit() -> io::Result<(u64, u64)> {
    let limits = getrlimit(Resource::Nofile);
    let before = limits.current.unwrap_or(UNLIMITED);
    if limits.current != limits.maximum {
        setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum })?;
    }
    Ok((before, limit()))
}

/// Returns the number of descriptors that this process may have.
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(UNLIMITED)
}

/// Returns how many clients may be connected under `limit`: an eighth of it.
pub fn for_clients(limit: u64) -> u64 {
    (limit / 8).clamp(LEAST_CLIENTS, MOST_CLIENTS)
}

/// Returns how many VMs fit beside `used` descriptors under `limit`, where no client is connected.
pub fn vms_that_fit(limit: u64, used: u64) -> u64 {
    let taken = used + RESERVE + for_clients(limit) + VM_START;
    limit.checked_sub(taken).map_or(0, |left| left / VM_STEADY + 1)
}

/// Counts the descriptors of a process: `self`, or its id.
///
/// # Errors
///
/// There is no such process, or this user may not look at it, or this process has no descriptor left to look with.
pub fn in_use(process: &str) -> io::Result<u64> {
    let folder = format!("/proc/{process}/fd");
    // Linux 6.2 and later give the number as the size.
    match fs::metadata(&folder)?.size() {
        0 => Ok(fs::read_dir(&folder)?.count() as u64),
        counted => Ok(counted),
    }
}

/// A connected client.
pub struct Client(());

impl Client {
    /// Counts a client, until the value is dropped.
    #[expect(clippy::new_without_default, reason = "a client is counted, not made up")]
    pub fn new() -> Self {
        CLIENTS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        CLIENTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The descriptors of a VM that is being started.
#[derive(Debug)]
pub struct Start(());

impl Start {
    /// Sets descriptors aside for a start, until the value is dropped. Blocks for as long as `/proc` takes.
    ///
    /// # Errors
    ///
    /// There are not so many left.
    pub fn reserve() -> Result<Self, NoRoom> {
        let starts = STARTS.fetch_add(1, Ordering::Relaxed);
        let start = Self(());
        let limit = limit();
        let used = in_use("self").unwrap_or(limit);
        let clients = CLIENTS.load(Ordering::Relaxed);
        if fits(limit, used, clients, starts) { Ok(start) } else { Err(NoRoom { limit, used }) }
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        STARTS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn fits(limit: u64, used: u64, clients: u64, other_starts: u64) -> bool {
    let free_for_clients = for_clients(limit).saturating_sub(clients);
    used + free_for_clients + RESERVE + VM_START * (other_starts + 1) <= limit
}

/// There are no descriptors left for another VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    limit: u64,
    used: u64,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the daemon may have {} open files, {} are in use, and the rest is kept for its clients and the VMs that run; \
             shut down other VMs, or start the daemon with a higher hard limit (`ulimit -Hn`, or LimitNOFILE= of its unit)",
            self.limit, self.used
        )
    }
}

impl std::error::Error for NoRoom {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_and_the_reserve_are_left_when_no_more_vms_fit() {
        for limit in [160, 1024, 4096, 1 << 20] {
            let used = 30 + vms_that_fit(limit, 30) * VM_STEADY;
            assert!(used + for_clients(limit) + RESERVE <= limit, "{limit}");
            assert!(!fits(limit, used, 0, 0), "{limit}: one more does not fit");
            assert!(fits(limit, used - VM_STEADY, 0, 0), "{limit}: the last one does");
        }
        // As counted with each hypervisor at a limit of 104.
        assert_eq!(vms_that_fit(104, DAEMON), 13);
        assert!(vms_that_fit(1 << 20, 30) > 300_000);
        assert_eq!(vms_that_fit(64, 60), 0);
    }

    #[test]
    fn clients_that_are_connected_take_nothing_from_vms() {
        let used = 160 - RESERVE - VM_START - for_clients(160);
        assert!(fits(160, used, 0, 0));
        assert!(fits(160, used + for_clients(160), for_clients(160), 0));
        assert!(!fits(160, used + 1, 0, 0));
        assert!(!fits(160, used, 0, 1), "another start has its share");
    }

    #[test]
    fn descriptors_are_counted() {
        let before = in_use("self").unwrap();
        let held: Vec<_> = (0..50).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = in_use("self").unwrap();
        // Other tests of this process open and close files meanwhile.
        assert!(after + 20 > before + held.len() as u64, "{before} and {after}");
    }

    #[test]
    fn the_message_names_the_limit_and_the_remedy() {
        let text = NoRoom { limit: 160, used: 130 }.to_string();
        assert!(text.contains("160 open files") && text.contains("LimitNOFILE="), "{text}");
    }
}
