//! Counts the operations in progress, so that the end of the daemon can wait for them.

use std::time::Duration;

use tokio::sync::watch;

/// The number of operations in progress.
#[derive(Clone)]
pub(crate) struct OperationCounter(watch::Sender<usize>);

/// An operation in progress. It is counted until this value is dropped.
pub(crate) struct OperationGuard(watch::Sender<usize>);

impl Default for OperationCounter {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl OperationCounter {
    /// Counts one more operation.
    pub(crate) fn begin(&self) -> OperationGuard {
        self.0.send_modify(|count| *count += 1);
        OperationGuard(self.0.clone())
    }

    /// Waits until no operation is in progress.
    pub(crate) async fn idle(&self) {
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Waits for `first`, and then until no operation is in progress, for at most `timeout`.
    /// Returns the number of operations that are left.
    pub(crate) async fn drain(&self, first: impl Future<Output = ()>, timeout: Duration) -> usize {
        let drained = async {
            first.await;
            self.idle().await;
        };
        let _ = tokio::time::timeout(timeout, drained).await;
        *self.0.borrow()
    }
}

impl Drop for OperationGuard {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}
