//! Limits how often the changes of one guest are reported, because each report becomes a durable
//! event and a guest can cause changes without end.

use std::time::Duration;

use tokio::time::Instant;

/// The number of changes that may be reported at once.
const BURST: u32 = 16;
/// The interval after which one more change may be reported.
const REFILL_INTERVAL: Duration = Duration::from_secs(1);

/// Allows a burst of [`BURST`] changes, and then one change for each [`REFILL_INTERVAL`].
#[derive(Debug)]
pub(crate) struct Throttle {
    /// The number of changes that may be reported now.
    left: u32,
    /// The time up to which `left` has been refilled.
    since: Instant,
}

impl Throttle {
    pub(crate) fn new() -> Self {
        Self { left: BURST, since: Instant::now() }
    }

    /// Allows one change.
    ///
    /// # Errors
    /// Returns the time of the next attempt if no change may be reported now. The caller then
    /// reports the state at that time, so the states in between are left out.
    pub(crate) fn admit(&mut self) -> Result<(), Instant> {
        let now = Instant::now();
        while self.left < BURST && now.saturating_duration_since(self.since) >= REFILL_INTERVAL {
            self.left += 1;
            self.since += REFILL_INTERVAL;
        }
        if self.left == BURST {
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.since + REFILL_INTERVAL),
        }
    }
}

/// Waits until `at`, or for ever if there is no `at`.
pub(crate) async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_few_changes_are_reported_at_once_and_a_flood_slowly() {
        let mut throttle = Throttle::new();
        tokio::time::sleep(Duration::from_secs(100)).await;
        for _ in 0..BURST {
            throttle.admit().unwrap();
        }
        let again = throttle.admit().unwrap_err();
        assert_eq!(again, Instant::now() + REFILL_INTERVAL);
        tokio::time::sleep_until(again).await;
        throttle.admit().unwrap();
        throttle.admit().unwrap_err();
        let mut reported = 0;
        for _ in 0..1000 {
            reported += u32::from(throttle.admit().is_ok());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!((9..=10).contains(&reported), "{reported} in 10 s");
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!((0..1000).filter(|_| throttle.admit().is_ok()).count(), BURST as usize);
    }
}
