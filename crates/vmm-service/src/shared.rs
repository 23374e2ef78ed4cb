//! Shared: the parts that every actor and use case works with.

use std::sync::Arc;

use tokio::sync::Semaphore;
use vmm_core::id::InstanceId;
use vmm_host::net::tap::Taps;

use crate::backends::Backends;
use crate::check::FileChecks;
use crate::claims::Claims;
use crate::console::ConsoleFiles;
use crate::events::Events;
use crate::index::Index;
use crate::keys::KeysInProgress;
use crate::names::NameLocks;
use crate::operation_count::OperationCounter;
use crate::operation_log::Beginnings;
use crate::settings::Settings;
use crate::spares::SpareManager;

/// The state that every actor and use case shares.
pub(crate) struct Shared {
    pub(crate) events: Arc<Events>,
    pub(crate) backends: Backends,
    pub(crate) settings: Settings,
    pub(crate) taps: Arc<dyn Taps>,
    pub(crate) instance: InstanceId,
    pub(crate) index: Arc<Index>,
    pub(crate) claims: Claims,
    pub(crate) names: NameLocks,
    /// The file checks of the files that clients name.
    pub(crate) file_checks: FileChecks,
    pub(crate) spares: SpareManager,
    /// The lock of the places, held from the choice of a place to the record that holds it.
    pub(crate) places: tokio::sync::Mutex<()>,
    /// The slots of recoveries, see [`crate::service::RECOVERIES`].
    pub(crate) recoveries: Arc<Semaphore>,
    /// The slots of starts by a restart policy, see [`crate::service::POLICY_STARTS`].
    pub(crate) policy_starts: Arc<Semaphore>,
    /// The count of operations in progress, so that the end of the daemon can wait for them.
    pub(crate) under_way: OperationCounter,
    /// The watch on the files of consoles.
    pub(crate) consoles: ConsoleFiles,
    /// The changes that the recovery of the VMs has found, for the log.
    pub(crate) beginnings: Beginnings,
    /// The calls with idempotency keys in progress.
    pub(crate) keys: KeysInProgress,
}
