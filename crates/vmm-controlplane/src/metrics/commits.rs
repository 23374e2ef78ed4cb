//! The commits of the store, and the events that they record.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::idempotency::{AnswerLookup, KeyChange};
use vmm_core::store::{Commit, EventQuery, Snapshot, Store, StoreError};

use super::histogram;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    kind: String,
    cause: String,
}

/// The measurements of the commits.
pub(super) struct CommitMetrics {
    durations: Family<OutcomeLabel, Histogram, fn() -> Histogram>,
    events: Family<EventLabels, Counter>,
}

impl CommitMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self { durations: Family::new_with_constructor(histogram), events: Family::default() };
        registry.register(
            "vmcp_store_commit_seconds",
            "Time of a commit, from its request until it is durable",
            metrics.durations.clone(),
        );
        registry.register(
            "vmcp_events",
            "Recorded events, by the kind and the cause that ListVmEvents shows",
            metrics.events.clone(),
        );
        metrics
    }
}

/// A store whose commits are measured.
pub(super) struct MeasuredStore {
    inner: Arc<dyn Store>,
    metrics: Arc<CommitMetrics>,
}

impl MeasuredStore {
    pub(super) fn new(inner: Arc<dyn Store>, metrics: Arc<CommitMetrics>) -> Self {
        Self { inner, metrics }
    }

    async fn measure(
        &self,
        event: Option<EventLabels>,
        commit: impl Future<Output = Result<Option<EventSeq>, StoreError>>,
    ) -> Result<Option<EventSeq>, StoreError> {
        let begun = Instant::now();
        let result = commit.await;
        let outcome = if result.is_ok() { "done" } else { "failed" };
        self.metrics
            .durations
            .get_or_create(&OutcomeLabel { outcome })
            .observe(begun.elapsed().as_secs_f64());
        if let (Ok(_), Some(event)) = (&result, event) {
            self.metrics.events.get_or_create(&event).inc();
        }
        result
    }
}

fn labels(commit: &Commit) -> Option<EventLabels> {
    let event = commit.event.as_ref()?;
    Some(EventLabels { kind: event.kind.as_str().to_owned(), cause: event.cause.as_str().to_owned() })
}

#[async_trait]
impl Store for MeasuredStore {
    async fn load(&self) -> Result<Snapshot, StoreError> {
        self.inner.load().await
    }

    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.measure(labels(&commit), self.inner.commit(commit)).await
    }

    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        self.measure(labels(&commit), self.inner.commit_forced(commit)).await
    }

    async fn commit_keyed(
        &self,
        commit: Option<Commit>,
        key: KeyChange,
        forced: bool,
    ) -> Result<Option<EventSeq>, StoreError> {
        let event = commit.as_ref().and_then(labels);
        self.measure(event, self.inner.commit_keyed(commit, key, forced)).await
    }

    async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, StoreError> {
        self.inner.kept_answer(id).await
    }

    async fn expire_answers(&self, kept_ms: Range<i64>) -> Result<u64, StoreError> {
        self.inner.expire_answers(kept_ms).await
    }

    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
        self.inner.events(query).await
    }

    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError> {
        self.inner.expire_events(before_ms).await
    }
}
