//! A limit for what a VMM tells of its guest: each change that is told on becomes a durable event.

use std::time::Duration;

use tokio::time::Instant;

/// The number of changes that are told at once.
const BURST: u32 = 16;
/// The interval after which one more change may be told.
const REFILL: Duration = Duration::from_secs(1);

/// Lets a burst through, and then one change for each [`REFILL`].
#[derive(Debug)]
pub(crate) struct Throttle {
    /// The number of changes that may be told now.
    left: u32,
    /// Since when `left` has not been refilled.
    since: Instant,
}

impl Throttle {
    pub(crate) fn new() -> Self {
        Self { left: BURST, since: Instant::now() }
    }

    /// Lets one change through.
    ///
    /// # Errors
    /// Answers when to ask again, where no change may be told now. What counts then is the state at that time.
    pub(crate) fn pass(&mut self) -> Result<(), Instant> {
        let now = Instant::now();
        while self.left < BURST && now.saturating_duration_since(self.since) >= REFILL {
            self.left += 1;
            self.since += REFILL;
        }
        if self.left == BURST {
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.since + REFILL),
        }
    }
}

/// Waits until `at`; for ever where there is nothing to wait for.
pub(crate) async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_told_slowly_and_a_few_changes_at_once() {
        let mut throttle = Throttle::new();
        tokio::time::sleep(Duration::from_secs(100)).await;
        for _ in 0..BURST {
            throttle.pass().unwrap();
        }
        let again = throttle.pass().unwrap_err();
        assert_eq!(again, Instant::now() + REFILL);
        tokio::time::sleep_until(again).await;
        throttle.pass().unwrap();
        throttle.pass().unwrap_err();
        let mut told = 0;
        for _ in 0..1000 {
            told += u32::from(throttle.pass().is_ok());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!((9..=10).contains(&told), "{told} in 10 s");
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!((0..1000).filter(|_| throttle.pass().is_ok()).count(), BURST as usize);
    }
}
