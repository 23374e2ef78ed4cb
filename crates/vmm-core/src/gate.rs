//! The gate between a VMM that has been started and a guest that may run.
//!
//! ```text
//!   intent ──► commit ───────────────────────► open()
//!   launch ──► process ─► socket ─► passed() ····┴──► configure ─► guest runs
//! ```
//!
//! Starting a VMM's process and writing the intent to disk both take time, and neither needs the
//! other, so they run at once. The guest needs both. Before the intent is durable, a launch does
//! only what the recovery can undo without an intent.

use tokio::sync::watch;

use crate::backend::{BackendError, BackendErrorKind, Effect};

/// The condition that a launch awaits before its guest may run. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate(watch::Receiver<bool>);

/// Opens a [`Gate`]. Dropping the keeper unopened calls the launch off.
#[derive(Debug)]
pub struct GateKeeper(watch::Sender<bool>);

impl Gate {
    /// Returns a shut gate and the keeper that can open it.
    pub fn shut() -> (GateKeeper, Self) {
        let (keeper, gate) = watch::channel(false);
        (GateKeeper(keeper), Self(gate))
    }

    /// Returns an open gate.
    pub fn open() -> Self {
        Self(watch::channel(true).1)
    }

    /// Waits until the gate is open.
    ///
    /// # Errors
    /// Returns [`BackendErrorKind::Rejected`] if the keeper was dropped without opening the gate.
    pub async fn passed(&self) -> Result<(), BackendError> {
        match self.0.clone().wait_for(|open| *open).await {
            Ok(_) => Ok(()),
            Err(_) => Err(BackendError::new(
                BackendErrorKind::Rejected,
                Effect::NotApplied,
                "the start was cancelled before the guest could run",
            )),
        }
    }
}

impl GateKeeper {
    /// Opens the gate for good.
    pub fn open(self) {
        self.0.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll_once(gate: &Gate) -> Poll<bool> {
        let mut cx = Context::from_waker(Waker::noop());
        pin!(gate.passed()).poll(&mut cx).map(|passed| passed.is_ok())
    }

    #[test]
    fn a_gate_is_passed_once_it_is_open_and_never_if_nobody_can_open_it() {
        assert_eq!(poll_once(&Gate::open()), Poll::Ready(true));
        let (keeper, gate) = Gate::shut();
        assert_eq!(poll_once(&gate), Poll::Pending);
        keeper.open();
        assert_eq!([poll_once(&gate), poll_once(&gate.clone())], [Poll::Ready(true); 2]);
        let (keeper, gate) = Gate::shut();
        drop(keeper);
        assert_eq!(poll_once(&gate), Poll::Ready(false));
    }
}
