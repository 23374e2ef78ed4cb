//! Removes events whose retention has passed.
//!
//! The wall clock alone does not determine the removal, because an operator may set it. Events are
//! removed in the order of the log, and the cutoff moves forward only as fast as time passes for
//! this daemon:
//!
//! ```text
//!   the time of the oldest event, at the start ──┐
//!   + the time that has passed since             ├──► the earlier one is the cutoff
//!   now − retention, by the wall clock ──────────┘
//! ```
//!
//! A clock that jumps forward by years removes nothing at once, and a clock that was set back
//! removes nothing too early. If every event before a pause has been removed, the cutoff skips the
//! pause, because the pause contains no event. As a consequence, an event that expired while no
//! daemon ran is kept a while longer.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::event::EventSeq;
use vmm_core::store::{EventQuery, StoreError};

use super::Events;
use crate::clock::now_ms;
use crate::keys::KEY_RETENTION;
use crate::panics::report_panic;

/// The shortest time between two removals.
const MIN_REMOVAL_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time between two removals.
const MAX_REMOVAL_INTERVAL: Duration = Duration::from_secs(600);

/// Removes old events repeatedly, for as long as the log is used. An event is kept for a twentieth
/// of its retention longer, or for ten minutes if that is less.
pub(crate) async fn expire_for_ever(events: Weak<Events>) {
    let mut cutoff = Cutoff::default();
    while let Some(events) = events.upgrade() {
        report_panic("the removal of old events", expire(&events, &mut cutoff)).await;
        report_panic("the removal of old idempotency keys", expire_answers(&events)).await;
        let pause = (events.retention / 20).clamp(MIN_REMOVAL_INTERVAL, MAX_REMOVAL_INTERVAL);
        drop(events);
        tokio::time::sleep(pause).await;
    }
}

async fn expire(events: &Arc<Events>, cutoff: &mut Cutoff) {
    let removed = async {
        let Some(oldest_ms) = oldest(events).await? else { return Ok(0) };
        let kept_ms = millis(events.retention);
        let before_ms = cutoff.at(Instant::now(), oldest_ms, now_ms().saturating_sub(kept_ms));
        events.store.expire_events(before_ms).await
    };
    match removed.await {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "events past their retention were removed"),
        Err(error) => {
            tracing::warn!(%error, "events past their retention could not be removed; the daemon tries again later")
        }
    }
}

/// Removes the answers to calls whose keys are no longer kept. The wall clock decides. An answer from
/// the future is removed as well, because the clock was set back, and would keep the answer for ever.
async fn expire_answers(events: &Events) {
    let (now, kept) = (now_ms(), millis(KEY_RETENTION));
    let period = now.saturating_sub(kept)..now.saturating_add(kept);
    match events.store.expire_answers(period).await {
        Ok(0) => {}
        Ok(removed) => tracing::debug!(removed, "idempotency keys past their retention were removed"),
        Err(error) => {
            tracing::warn!(%error, "idempotency keys past their retention could not be removed; the daemon tries again later")
        }
    }
}

/// Returns the time of the oldest event, in Unix milliseconds of the clock at that time.
async fn oldest(events: &Events) -> Result<Option<i64>, StoreError> {
    let query = EventQuery { after: EventSeq(0), vm_id: None, limit: 1 };
    Ok(events.store.events(query).await?.first().map(|event| event.event.time_ms))
}

/// The time before which events may be removed.
#[derive(Debug, Default)]
struct Cutoff {
    /// The last cutoff in Unix milliseconds, and the instant at which it was correct.
    last: Option<(i64, Instant)>,
}

impl Cutoff {
    /// Returns the cutoff at the instant `now`. `oldest_ms` is the time of the oldest event, and
    /// `wall_ms` the wall clock less the retention.
    fn at(&mut self, now: Instant, oldest_ms: i64, wall_ms: i64) -> i64 {
        let moved = self.last.map_or(oldest_ms, |(time_ms, then)| {
            time_ms.saturating_add(millis(now.saturating_duration_since(then)))
        });
        // A skip over a time without events removes nothing.
        let cutoff = moved.max(oldest_ms).min(wall_ms);
        self.last = Some((cutoff, now));
        cutoff
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: i64 = 365 * 86_400_000;

    /// A cutoff, with a monotonic clock.
    struct Bed {
        cutoff: Cutoff,
        start: Instant,
    }

    impl Bed {
        fn new() -> Self {
            Self { cutoff: Cutoff::default(), start: Instant::now() }
        }

        fn at(&mut self, passed_ms: u64, oldest_ms: i64, wall_ms: i64) -> i64 {
            self.cutoff.at(self.start + Duration::from_millis(passed_ms), oldest_ms, wall_ms)
        }
    }

    #[test]
    fn events_expire_at_their_time_with_a_true_clock() {
        let mut bed = Bed::new();
        assert_eq!(bed.at(0, 1_000, -5_000), -5_000, "nothing is old enough yet");
        assert_eq!(bed.at(7_000, 1_000, 2_000), 2_000);
        assert_eq!(bed.at(8_000, 2_500, 3_000), 3_000);
    }

    #[test]
    fn a_clock_that_jumps_forward_expires_no_event() {
        let mut bed = Bed::new();
        bed.at(0, 1_000, 500);
        assert_eq!(bed.at(100, 1_000, 9 * YEAR), 1_000, "the oldest stays");
        assert_eq!(bed.at(700, 1_000, 9 * YEAR), 1_600, "only as time passes");
        // A daemon that starts after the jump does not know of it, and begins at the oldest event.
        assert_eq!(Bed::new().at(0, 1_000, 9 * YEAR), 1_000);
    }

    #[test]
    fn a_clock_that_was_set_back_neither_hurries_nor_stops_the_expiry() {
        let mut bed = Bed::new();
        bed.at(0, 1_000, 1_000);
        assert_eq!(bed.at(10, 1_000, -9 * YEAR), -9 * YEAR);
        assert_eq!(bed.at(20, 1_000, 1_030), 1_000, "set right again, it goes on from the oldest");
        assert_eq!(bed.at(50, 1_000, 1_060), 1_030);
    }

    #[test]
    fn an_interval_without_events_is_skipped() {
        let mut bed = Bed::new();
        assert_eq!(bed.at(0, 1_000, YEAR), 1_000);
        assert_eq!(bed.at(500, YEAR - 5_000, YEAR + 500), YEAR - 5_000, "all that was older has gone");
    }
}
