//! The gate between a VMM that has been started and a guest that may run.
//!
//! ```text
//!   intent ──► commit ───────────────────────► open()
//!   launch ──► process ─► socket ─► passed() ····┴──► configure ─► guest runs
//! ```
//!
//! To start a VMM's process and to put the intent on the disk take their time, and neither needs the other. The guest needs
//! both: before its intent is durable, nothing is done that the recovery could not take back without it.

use tokio::sync::watch;

use crate::backend::{BackendError, BackendErrorKind, Effect};

/// What a launch passes before its guest may run. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate(watch::Receiver<bool>);

/// Opens a [`Gate`]. If it is dropped before that, the launch is called off.
#[derive(Debug)]
pub struct GateKeeper(watch::Sender<bool>);

impl Gate {
    /// A gate that is shut, and who can open it.
    pub fn shut() -> (GateKeeper, Self) {
        let (keeper, gate) = watch::channel(false);
        (GateKeeper(keeper), Self(gate))
    }

    /// A gate that stands open.
    pub fn open() -> Self {
        Self(watch::channel(true).1)
    }

    /// Waits until the gate is open.
    ///
    /// # Errors
    /// [`BackendErrorKind::Rejected`] where it will never be.
    pub async fn passed(&self) -> Result<(), BackendError> {
        match self.0.clone().wait_for(|open| *open).await {
            Ok(_) => Ok(()),
            Err(_) => Err(BackendError::new(
                BackendErrorKind::Rejected,
                Effect::NotApplied,
                "the start was called off before its guest could run",
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
