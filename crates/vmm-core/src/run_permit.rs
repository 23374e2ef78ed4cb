//! The permit that separates a VMM that has been started from a guest that may run.
//!
//! ```text
//!   intent ──► commit ────────────────────► grant()
//!   launch ──► process ─► socket ─► wait() ····┴──► configure ─► guest runs
//! ```
//!
//! Starting a VMM's process and writing the intent to disk both take time, and neither needs the
//! other, so they run at once. The guest needs both. Before the intent is durable, a launch does
//! only what the recovery can undo without an intent.

use tokio::sync::watch;

use crate::backend::{BackendError, BackendErrorKind, Effect};

/// The permit that a launch awaits before its guest may run. Clones are the same permit.
#[derive(Clone, Debug)]
pub struct RunPermit(watch::Receiver<bool>);

/// Grants a [`RunPermit`]. Dropping the issuer without a grant cancels the launch.
#[derive(Debug)]
pub struct RunPermitIssuer(watch::Sender<bool>);

impl RunPermit {
    /// Returns a permit that is not granted yet, and the issuer that can grant it.
    pub fn pending() -> (RunPermitIssuer, Self) {
        let (issuer, permit) = watch::channel(false);
        (RunPermitIssuer(issuer), Self(permit))
    }

    /// Returns a permit that is granted from the start.
    pub fn granted() -> Self {
        Self(watch::channel(true).1)
    }

    /// Waits until the permit is granted.
    ///
    /// # Errors
    /// Returns [`BackendErrorKind::Rejected`] if the issuer was dropped without a grant.
    pub async fn wait(&self) -> Result<(), BackendError> {
        match self.0.clone().wait_for(|granted| *granted).await {
            Ok(_) => Ok(()),
            Err(_) => Err(BackendError::new(
                BackendErrorKind::Rejected,
                Effect::NotApplied,
                "the start was cancelled before the guest could run",
            )),
        }
    }
}

impl RunPermitIssuer {
    /// Grants the permit for good.
    pub fn grant(self) {
        self.0.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll_once(permit: &RunPermit) -> Poll<bool> {
        let mut cx = Context::from_waker(Waker::noop());
        pin!(permit.wait()).poll(&mut cx).map(|granted| granted.is_ok())
    }

    #[test]
    fn a_run_permit_is_granted_or_fails_with_a_dropped_issuer() {
        assert_eq!(poll_once(&RunPermit::granted()), Poll::Ready(true));
        let (issuer, permit) = RunPermit::pending();
        assert_eq!(poll_once(&permit), Poll::Pending);
        issuer.grant();
        assert_eq!([poll_once(&permit), poll_once(&permit.clone())], [Poll::Ready(true); 2]);
        let (issuer, permit) = RunPermit::pending();
        drop(issuer);
        assert_eq!(poll_once(&permit), Poll::Ready(false));
    }
}
