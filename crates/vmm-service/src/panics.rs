//! The net below the tasks that run for as long as the service, or for as long as a VM.
//!
//! A panic is a defect of this program. Without a net it would end the whole task, and with it the
//! probes of a VM, the watch of a tombstone or the discovery of a backend, until the daemon is
//! started again. Each such task is a loop, so one step of the loop is lost instead.

use std::fmt::Display;
use std::panic::AssertUnwindSafe;

use futures::FutureExt as _;

/// Runs one step of a task. Returns `None` after a panic, which is logged. The panic may have
/// interrupted the step at any await, so the step must leave nothing half done that the next step
/// relies on.
pub(crate) async fn report_panic<T>(task: impl Display, step: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(step).catch_unwind().await {
        Ok(done) => Some(done),
        Err(panic) => {
            drop(panic);
            tracing::error!(%task, "a step of a task panicked, which is a defect of this program; the task goes on");
            None
        }
    }
}
