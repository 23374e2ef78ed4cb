//! Spare VMMs, an ability of some hypervisors.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::backend::BackendError;
use crate::id::VmUid;

/// Starts VMMs ahead of their VMs.
///
/// A spare VMM has no configuration, and waits within its run folder for the VM of one uid. The
/// [`crate::backend::Backend::launch`] of that uid uses the VMM if it suits the VM, and ends it
/// otherwise. [`crate::backend::Backend::sweep`] ends it too. A spare VMM ends with the backend.
#[async_trait]
pub trait SpareVmms: Send + Sync {
    /// Starts the spare VMM of `request`'s uid. A failed start leaves nothing running.
    ///
    /// # Errors
    /// Returns [`crate::backend::BackendErrorKind::Unsupported`] where the installed program cannot
    /// wait for its VM, and otherwise fails like a launch.
    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError>;

    /// Ends the VMM that waits for `uid`, and waits until its process has ended. Does nothing where
    /// no VMM waits, and to a VMM that a launch has taken.
    async fn dismiss_spare(&self, uid: VmUid);
}

/// The request for the start of a spare VMM.
#[derive(Clone, Debug)]
pub struct SpareRequest {
    /// The uid of a VM to come.
    pub uid: VmUid,
    /// The run folder of that VM. It exists, belongs to the daemon alone, and takes sockets, log
    /// and console.
    pub dir: PathBuf,
    /// The file for that VM's console output, unless its configuration names another. The file
    /// exists.
    pub console: PathBuf,
}
