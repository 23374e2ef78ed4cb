//! Removes events that have been kept for long enough.

use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use super::Events;
use crate::clock::now_ms;

/// The least time between two removals.
const OFTEN: Duration = Duration::from_secs(1);
/// The most.
const SELDOM: Duration = Duration::from_secs(3600);

/// Removes old events again and again, for as long as the log is used. An event outlives its time by a twentieth of it, or by an
/// hour where that is less.
pub(crate) async fn expire_for_ever(events: Weak<Events>) {
    while let Some(events) = events.upgrade() {
        expire(&events).await;
        let pause = (events.retention / 20).clamp(OFTEN, SELDOM);
        drop(events);
        tokio::time::sleep(pause).await;
    }
}

async fn expire(events: &Arc<Events>) {
    let kept_ms = i64::try_from(events.retention.as_millis()).unwrap_or(i64::MAX);
    match events.store.expire_events(now_ms().saturating_sub(kept_ms)).await {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "events past their retention were removed"),
        Err(error) => tracing::warn!(%error, "old events could not be removed; trying again later"),
    }
}
