//! The commands that a handle gives alike to a QEMU of this daemon and to one of another program.

use std::sync::Arc;

use vmm_core::backend::{BackendError, StorageCounters};

use super::qmp::{Qmp, QmpError};
use crate::guest_orders::GuestOrders;

/// A handle of a QEMU.
pub(super) trait Commands: Sync {
    /// Returns the orders that the guest was given.
    fn guest(&self) -> &GuestOrders;

    /// Returns the connection, if QEMU may be sent a command now.
    fn qmp(&self) -> Result<Arc<Qmp>, BackendError>;

    /// Returns the error of a command, which is [`vmm_core::backend::BackendErrorKind::Gone`] if
    /// QEMU has ended.
    fn explain(&self, error: QmpError) -> BackendError;
}

/// Stops the guest's CPUs, and records the order.
pub(super) async fn pause(handle: &impl Commands) -> Result<(), BackendError> {
    let order = async { handle.qmp()?.stop().await.map_err(|error| handle.explain(error)) };
    handle.guest().order_runs(false, order).await
}

/// Resumes the guest's CPUs, and records the order.
pub(super) async fn resume(handle: &impl Commands) -> Result<(), BackendError> {
    let order = async { handle.qmp()?.cont().await.map_err(|error| handle.explain(error)) };
    handle.guest().order_runs(true, order).await
}

/// Returns the counters of the guest's disks.
pub(super) async fn block_counters(handle: &impl Commands) -> Result<StorageCounters, BackendError> {
    handle.qmp()?.query_blockstats().await.map_err(|error| handle.explain(error))
}
