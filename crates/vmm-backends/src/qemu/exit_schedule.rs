//! Makes sure that a QEMU which has announced its shutdown really exits.
//!
//! QEMU 7.2 hangs at its end if it was answering a command at that moment, for example if a guest
//! powers off while its counters are read. A signal wakes it. At that point SIGTERM only sets a
//! flag, so the signal neither kills QEMU nor disturbs its last writes.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};
use vmm_host::process::{Process, Signal};

/// The longest time from the announcement to SIGKILL. Closing the disks takes as long as the host
/// takes to write. A QEMU that still runs after this time hangs in a way that no signal ends.
pub(crate) const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// The time limits for a QEMU that has announced its shutdown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitTimeouts {
    /// The time until the first SIGTERM.
    pub(crate) first: Duration,
    /// The time between two signals.
    pub(crate) again: Duration,
    /// The time from the announcement to SIGKILL.
    pub(crate) last: Duration,
}

impl ExitTimeouts {
    /// For a QEMU that this program started.
    pub(crate) const WITH_OURS: Self =
        Self { first: Duration::from_millis(300), again: Duration::from_secs(1), last: EXIT_LIMIT };
    /// For a QEMU that libvirt started. libvirt sends such a signal itself, or resets the guest
    /// instead, which takes it a moment.
    pub(crate) const WITH_LIBVIRTS: Self =
        Self { first: Duration::from_secs(5), again: Duration::from_secs(1), last: EXIT_LIMIT };
}

/// The schedule of signals to a QEMU that has announced its shutdown.
#[derive(Debug)]
pub(crate) struct ExitSchedule {
    next: Instant,
    again: Duration,
    last: Instant,
}

impl ExitSchedule {
    /// Returns the schedule that begins now.
    pub(crate) fn starting_now(exit_timeouts: ExitTimeouts) -> Self {
        let now = Instant::now();
        Self { next: now + exit_timeouts.first, again: exit_timeouts.again, last: now + exit_timeouts.last }
    }

    /// Waits until a signal is due, and returns it. Waits for ever without a schedule. Cancel-safe.
    pub(crate) async fn is_due(end: &mut Option<Self>) -> Signal {
        let Some(end) = end else { return std::future::pending().await };
        sleep_until(end.next.min(end.last)).await;
        let now = Instant::now();
        end.next = now + end.again;
        if now < end.last {
            return Signal::TERM;
        }
        end.last = end.next;
        Signal::KILL
    }
}

/// Sends the due signal to a QEMU.
pub(crate) fn send_due_signal(process: &Process, signal: Signal) {
    if signal == Signal::KILL {
        warn!("QEMU announced its shutdown and still runs after several signals, so QEMU is killed");
    } else {
        debug!("QEMU announced its shutdown and still runs, so QEMU gets SIGTERM");
    }
    if let Err(error) = process.signal(signal) {
        warn!(%error, "QEMU could not be signalled");
    }
}
