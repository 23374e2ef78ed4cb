//! Spare VMMs: an ability that not every hypervisor has.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::backend::BackendError;
use crate::id::VmUid;

/// Starts VMMs ahead of their VMs.
///
/// A spare VMM has been told nothing and waits, within its run folder, for the VM of one uid. The
/// [`crate::backend::Backend::launch`] of that uid uses the VMM if the VM suits it, and else ends it;
/// [`crate::backend::Backend::sweep`] ends it too. A spare VMM ends with the backend.
#[async_trait]
pub trait SpareVmms: Send + Sync {
    /// Starts the spare VMM of `request`'s uid. A failed start leaves nothing running.
    ///
    /// # Errors
    /// [`crate::backend::BackendErrorKind::Unsupported`] where the installed program cannot wait for its VM; else as a launch
    /// fails.
    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError>;

    /// Ends the VMM that waits for `uid`, and waits until it has gone. Does nothing where none waits, and to one that a launch
    /// has taken.
    async fn dismiss_spare(&self, uid: VmUid);
}

/// What the start of a spare VMM needs to know.
#[derive(Clone, Debug)]
pub struct SpareRequest {
    /// The uid of a VM to come.
    pub uid: VmUid,
    /// That VM's run folder: exists, is ours alone, and takes sockets, log and console.
    pub dir: PathBuf,
    /// Where that VM's console output goes, if its configuration does not say otherwise. The file exists.
    pub console: PathBuf,
}
