//! Time limits for the end of a VMM's process.
//!
//! A forced end takes at most 5 s in all, so each limit counts in the sums of [`crate::ladder`] and
//! of a sweep.

use std::time::Duration;

/// The time that a process has to end after SIGTERM, after an accepted order to power off, and
/// after each signal of the ladder.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The time that a process has to end after SIGKILL, where no other rung precedes or follows.
pub(crate) const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// The time that each process has to end after SIGKILL in a sweep, which may end several.
pub(crate) const SWEEP_KILL_TIMEOUT: Duration = Duration::from_secs(1);
/// The time in which the kernel reports the end of a process after its connection has broken.
pub(crate) const EXIT_REPORT_TIMEOUT: Duration = Duration::from_millis(500);
/// The time in which a VMM that broke its connection during the start is reaped, so that the error
/// can name its exit status.
pub(crate) const REAP_TIMEOUT: Duration = Duration::from_secs(1);
