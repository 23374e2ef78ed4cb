//! The time that the end of a VMM's process may take, on every way to that end.
//!
//! A forced end stays within 5 s in all, so each of these counts in the sum of [`crate::ladder`] and of a sweep.

use std::time::Duration;

/// The time that a process has to end after SIGTERM, after an order that was taken, and after each signal of the ladder.
pub(crate) const ENDING: Duration = Duration::from_secs(1);
/// The time that a process has to end after SIGKILL, where no gentler rung follows or went before.
pub(crate) const KILLING: Duration = Duration::from_secs(2);
/// The time that each process has to end after SIGKILL in a sweep, which may end several.
pub(crate) const SWEEPING: Duration = Duration::from_secs(1);
/// The time that the kernel has to report an end that a broken connection has shown already.
pub(crate) const REPORTING: Duration = Duration::from_millis(500);
/// The time in which a VMM that broke its connection while it started is reaped, so that its exit status can be told.
pub(crate) const REAPING: Duration = Duration::from_secs(1);
