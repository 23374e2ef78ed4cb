//! Shares the file descriptors of this process out among its VMs and clients.
//!
//! ```text
//!   0                                                                    limit
//!   ├── the daemon itself, and its VMs ──────────┬── clients ──┬── RESERVE ──┤
//!   │   VM_STEADY each, VM_START while one starts │  an eighth  │ samples, files, health and force
//! ```
//!
//! A process without a free descriptor can neither accept a connection nor read a counter of a VM.
//! Therefore a VM is started only if its descriptors are free beside the share of the clients, and
//! clients cannot take more than their share.
//!
//! The kernel counts descriptors per process, so the counters here are statics.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The descriptors that neither clients nor VMs get.
const RESERVE: u64 = 32;
/// The descriptors that a start needs at its peak: the program, its log, TAPs, pipes, sockets.
const VM_START: u64 = 8;
/// The descriptors that a running VM keeps on each hypervisor: the pidfd of its VMM, and the
/// connection to the VMM.
const VM_STEADY: u64 = 2;
/// The descriptors of a daemon without VMs and clients.
pub const DAEMON: u64 = 24;
/// The most descriptors that clients get.
const MOST_CLIENTS: u64 = 1024;
/// The fewest descriptors that clients get, so that clients of a daemon with a very low limit can
/// still end its VMs.
const LEAST_CLIENTS: u64 = 16;
/// The value that stands for no limit.
const UNLIMITED: u64 = 1 << 30;

static CLIENTS: AtomicU64 = AtomicU64::new(0);
static STARTS: AtomicU64 = AtomicU64::new(0);

/// Raises the soft limit on descriptors to the hard limit. Returns the soft limits before and
/// after.
///
/// # Errors
///
/// Returns the kernel's error. The limit is then unchanged.
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

/// Returns the number of clients that may be connected under `limit`: an eighth of it, within
/// bounds.
pub fn for_clients(limit: u64) -> u64 {
    (limit / 8).clamp(LEAST_CLIENTS, MOST_CLIENTS)
}

/// Returns the number of VMs that fit beside `used` descriptors under `limit`. No client counts as
/// connected.
pub fn vms_that_fit(limit: u64, used: u64) -> u64 {
    let taken = used + RESERVE + for_clients(limit) + VM_START;
    limit.checked_sub(taken).map_or(0, |left| left / VM_STEADY + 1)
}

/// Counts the descriptors of a process. `process` is `self` or a process id.
///
/// # Errors
///
/// Returns the kernel's error: there is no such process, its user is another, or this process has
/// no descriptor left for the count.
pub fn in_use(process: &str) -> io::Result<u64> {
    let folder = format!("/proc/{process}/fd");
    // Linux 6.2 and later report the count as the folder's size. Earlier kernels report 0.
    match fs::metadata(&folder)?.size() {
        0 => Ok(fs::read_dir(&folder)?.count() as u64),
        counted => Ok(counted),
    }
}

/// A connected client, counted while the value lives.
pub struct CountedClient(());

impl CountedClient {
    /// Counts a client until the value is dropped.
    #[expect(clippy::new_without_default, reason = "a default value must not count a client")]
    pub fn new() -> Self {
        CLIENTS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for CountedClient {
    fn drop(&mut self) {
        CLIENTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The descriptors of a VM that is being started.
#[derive(Debug)]
pub struct StartDescriptors(());

impl StartDescriptors {
    /// Reserves descriptors for a start until the value is dropped. Blocks for as long as `/proc`
    /// takes.
    ///
    /// # Errors
    ///
    /// Returns [`TooFewDescriptors`] where too few are left.
    pub fn reserve() -> Result<Self, TooFewDescriptors> {
        // The counter rises before the check, so the later of two concurrent starts counts the
        // earlier one, and they cannot both take the last room. `start` exists before the check as
        // well: if the check fails, its drop lowers the counter again.
        let starts = STARTS.fetch_add(1, Ordering::Relaxed);
        let start = Self(());
        let limit = limit();
        // A process that cannot count its descriptors is treated as having none left, because the
        // count itself needs one.
        let used = in_use("self").unwrap_or(limit);
        let clients = CLIENTS.load(Ordering::Relaxed);
        if fits(limit, used, clients, starts) { Ok(start) } else { Err(TooFewDescriptors { limit, used }) }
    }
}

impl Drop for StartDescriptors {
    fn drop(&mut self) {
        STARTS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn fits(limit: u64, used: u64, clients: u64, other_starts: u64) -> bool {
    // Descriptors of connected clients are in `used` already, so only the rest of the clients'
    // share is kept free.
    let free_for_clients = for_clients(limit).saturating_sub(clients);
    used + free_for_clients + RESERVE + VM_START * (other_starts + 1) <= limit
}

/// The error that too few descriptors are left for another VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFewDescriptors {
    limit: u64,
    used: u64,
}

impl fmt::Display for TooFewDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the daemon may have {} open files, {} are in use, and the rest is kept for its clients and the VMs that run; \
             shut down other VMs, or start the daemon with a higher hard limit (`ulimit -Hn`, or LimitNOFILE= of its unit)",
            self.limit, self.used
        )
    }
}

impl std::error::Error for TooFewDescriptors {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_clients_and_the_reserve_are_kept_free_of_vms() {
        for limit in [160, 1024, 4096, 1 << 20] {
            let used = 30 + vms_that_fit(limit, 30) * VM_STEADY;
            assert!(used + for_clients(limit) + RESERVE <= limit, "{limit}");
            assert!(!fits(limit, used, 0, 0), "{limit}: one more does not fit");
            assert!(fits(limit, used - VM_STEADY, 0, 0), "{limit}: the last one does");
        }
        // These numbers were counted with each hypervisor at a limit of 104.
        assert_eq!(vms_that_fit(104, DAEMON), 13);
        assert!(vms_that_fit(1 << 20, 30) > 300_000);
        assert_eq!(vms_that_fit(64, 60), 0);
    }

    #[test]
    fn connected_clients_do_not_reduce_the_descriptors_for_vms() {
        let used = 160 - RESERVE - VM_START - for_clients(160);
        assert!(fits(160, used, 0, 0));
        assert!(fits(160, used + for_clients(160), for_clients(160), 0));
        assert!(!fits(160, used + 1, 0, 0));
        assert!(!fits(160, used, 0, 1), "another start has its share");
    }

    #[test]
    fn open_descriptors_are_counted() {
        let before = in_use("self").unwrap();
        let held: Vec<_> = (0..50).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = in_use("self").unwrap();
        // Other tests of this process open and close files meanwhile.
        assert!(after + 20 > before + held.len() as u64, "{before} and {after}");
    }

    #[test]
    fn a_refusal_for_descriptors_names_the_limit_and_the_remedy() {
        let text = TooFewDescriptors { limit: 160, used: 130 }.to_string();
        assert!(text.contains("160 open files") && text.contains("LimitNOFILE="), "{text}");
    }
}
