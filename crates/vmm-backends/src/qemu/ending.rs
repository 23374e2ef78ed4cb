//! The end of a QEMU that has told of it, and may not come to it.
//!
//! QEMU 7.2 hangs in its own end where it was just answering a command, as when a guest powers off while its counters are read. A
//! signal wakes it; by then one only sets a flag, so this neither kills it nor disturbs what it still writes.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};
use vmm_host::process::{Process, Signal};

/// How long a QEMU may take in all to end after it said so, until it is killed. Closing its disks takes as long as the host takes to
/// write; what has not ended after this long has hung in a way that no signal wakes it from.
pub(crate) const ENDING: Duration = Duration::from_secs(30);

/// How long a QEMU may take to end after it said so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Until it is woken.
    pub(crate) first: Duration,
    /// Until it is woken again.
    pub(crate) again: Duration,
    /// Until it is killed, from the beginning.
    pub(crate) last: Duration,
}

impl Patience {
    /// With a QEMU that nobody else looks after.
    pub(crate) const WITH_OURS: Self =
        Self { first: Duration::from_millis(300), again: Duration::from_secs(1), last: ENDING };
    /// With one of libvirt's. libvirt ends it by one such signal itself; or it resets the guest instead, which takes it a moment.
    pub(crate) const WITH_LIBVIRTS: Self =
        Self { first: Duration::from_secs(5), again: Duration::from_secs(1), last: ENDING };
}

/// The end of a QEMU that has told of it: when to send the next signal, and from when on it is SIGKILL.
#[derive(Debug)]
pub(crate) struct End {
    next: Instant,
    again: Duration,
    last: Instant,
}

impl End {
    /// It has been told now.
    pub(crate) fn told(patience: Patience) -> Self {
        let now = Instant::now();
        Self { next: now + patience.first, again: patience.again, last: now + patience.last }
    }

    /// Waits until a signal is due, and answers which: for ever, where there is no end. May be cancelled.
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

/// Wakes or kills a QEMU whose end is due.
pub(crate) fn hasten(process: &Process, signal: Signal) {
    if signal == Signal::KILL {
        warn!("QEMU has not ended though it said so, and nothing wakes it; killing it");
    } else {
        debug!("QEMU has not ended though it said so; waking it");
    }
    if let Err(error) = process.signal(signal) {
        warn!(%error, "QEMU could not be signalled");
    }
}
