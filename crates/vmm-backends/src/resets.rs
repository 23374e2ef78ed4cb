//! Distinguishes a reset that this program ordered from one that another client of the VMM ordered,
//! because the VMM reports both with the same event.
//!
//! ```text
//!   reset() ── order ──────────► the VMM ──┐
//!      ▲         awaited: true             │ its event
//!      └── seen ◄──────────────────────────┤
//!                awaited: false            ├──► news: by another client
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// The longest wait for the event of a reset that was carried out. The reset is complete without
/// the event.
const RESET_EVENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The resets of one guest. At most one is in progress, because the owner of the VM's handle makes
/// one call at a time.
#[derive(Debug, Default)]
pub(crate) struct ResetTracker {
    awaited: AtomicBool,
    seen: Notify,
}

impl ResetTracker {
    /// Carries out `order` and waits until its event was seen, so that a later event is not taken
    /// for this one. Returns the error of `order`.
    pub(crate) async fn order<E>(&self, order: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        self.awaited.store(true, Ordering::Relaxed);
        let _expected = ExpectedReset(self);
        order.await?;
        // A lost event costs only the time of the wait, because the order itself has succeeded.
        let _ = tokio::time::timeout(RESET_EVENT_TIMEOUT, async {
            while self.awaited.load(Ordering::Relaxed) {
                self.seen.notified().await;
            }
        })
        .await;
        Ok(())
    }

    /// Records the event of a reset that the guest did not do, and returns true if another client
    /// ordered that reset.
    pub(crate) fn is_foreign(&self) -> bool {
        let awaited = self.awaited.swap(false, Ordering::Relaxed);
        self.seen.notify_one();
        !awaited
    }
}

/// Ends the wait for an event when dropped, also if the order fails or its future is dropped.
struct ExpectedReset<'a>(&'a ResetTracker);

impl Drop for ExpectedReset<'_> {
    fn drop(&mut self) {
        self.0.awaited.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_reset_that_was_not_ordered_is_foreign() {
        let resets = ResetTracker::default();
        assert!(resets.is_foreign());
        for _ in 0..2 {
            let reported = async {
                tokio::task::yield_now().await;
                assert!(!resets.is_foreign(), "it was ordered");
            };
            let (ordered, ()) = tokio::join!(resets.order(std::future::ready(Ok::<_, ()>(()))), reported);
            ordered.unwrap();
            assert!(resets.is_foreign(), "one event for one order");
        }
        resets.order(std::future::ready(Err(()))).await.unwrap_err();
        assert!(resets.is_foreign(), "what failed is not waited for");
        let begun = tokio::time::Instant::now();
        resets.order(std::future::ready(Ok::<_, ()>(()))).await.unwrap();
        assert_eq!(begun.elapsed(), RESET_EVENT_TIMEOUT, "an event that was lost holds nobody up for long");
        assert!(resets.is_foreign());
    }
}
