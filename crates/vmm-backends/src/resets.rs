//! Telling a reset that was ordered here from one that somebody else ordered: a VMM tells of both in the same words.
//!
//! ```text
//!   reset() ── order ──────────► the VMM ──┐
//!      ▲         awaited: true             │ its event
//!      └── seen ◄──────────────────────────┤
//!                awaited: false            ├──► news: another's
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// How long the event of a reset may take that was carried out. Without it the reset is no less done.
const SEEN: Duration = Duration::from_secs(2);

/// The resets of one guest. One is ordered at a time: the owner of the VM's handle does one thing after the other.
#[derive(Debug, Default)]
pub(crate) struct Resets {
    awaited: AtomicBool,
    seen: Notify,
}

impl Resets {
    /// Has a reset carried out, and waits until its event has been seen, so that no later one is taken for it.
    pub(crate) async fn order<E>(&self, order: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        self.awaited.store(true, Ordering::Relaxed);
        let _expected = Expected(self);
        order.await?;
        // An event that was lost costs the time, and nothing else.
        let _ = tokio::time::timeout(SEEN, async {
            while self.awaited.load(Ordering::Relaxed) {
                self.seen.notified().await;
            }
        })
        .await;
        Ok(())
    }

    /// Takes note of a reset that the guest did not do, and says whether somebody else ordered it.
    pub(crate) fn is_anothers(&self) -> bool {
        let awaited = self.awaited.swap(false, Ordering::Relaxed);
        self.seen.notify_one();
        !awaited
    }
}

/// Ends the wait for an event also where the order fails or is given up.
struct Expected<'a>(&'a Resets);

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.0.awaited.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_was_not_ordered_is_anothers() {
        let resets = Resets::default();
        assert!(resets.is_anothers());
        for _ in 0..2 {
            let told = async {
                tokio::task::yield_now().await;
                assert!(!resets.is_anothers(), "it was ordered");
            };
            let (ordered, ()) = tokio::join!(resets.order(std::future::ready(Ok::<_, ()>(()))), told);
            ordered.unwrap();
            assert!(resets.is_anothers(), "one event for one order");
        }
        resets.order(std::future::ready(Err(()))).await.unwrap_err();
        assert!(resets.is_anothers(), "what failed is not waited for");
        let begun = tokio::time::Instant::now();
        resets.order(std::future::ready(Ok::<_, ()>(()))).await.unwrap();
        assert_eq!(begun.elapsed(), SEEN, "an event that was lost holds nobody up for long");
        assert!(resets.is_anothers());
    }
}
