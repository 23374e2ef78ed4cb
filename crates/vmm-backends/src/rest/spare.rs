//! VMMs that listen and have been told nothing: one on the way to its VM, or a spare one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::LaunchRequest;
use vmm_core::id::VmUid;

use super::client::RestApi;
use crate::launch::{self, Guarded};
use crate::program::{Installed, Program};
use crate::spares::Spares;

/// How long one that has waited may take to say that it is still there; else another is started.
const ANSWERING: Duration = Duration::from_millis(250);

/// A VMM that listens and has been told nothing.
#[derive(Debug)]
pub(crate) struct Fresh<C> {
    /// Its process, which ends when this is dropped.
    pub(crate) guard: Guarded,
    /// The connection to it.
    pub(crate) client: C,
    /// The program that it runs.
    pub(crate) program: Installed,
    /// Where its console output goes; `None` means nowhere.
    pub(crate) console: Option<PathBuf>,
}

impl<C: RestApi> Spares<Fresh<C>> {
    /// Hands out the VMM that waits for the VM of `request`, if that VMM can serve the VM: it writes to the right console, runs
    /// the program that is installed now, and answers. A VMM that cannot serve is ended.
    pub(crate) async fn take_for(&self, request: &LaunchRequest, program: &Arc<Program>) -> Option<Fresh<C>> {
        let spare = self.take(request.uid)?;
        let why = if spare.console != request.console {
            "the VM has another console"
        } else if !is_installed(program, &spare.program).await {
            "its program has been replaced"
        } else if !matches!(tokio::time::timeout(ANSWERING, spare.client.version()).await, Ok(Ok(_))) {
            "it does not answer"
        } else {
            return Some(spare);
        };
        tracing::info!(pid = spare.guard.pid(), why, "a spare VMM cannot be used; another VMM is started");
        end(spare).await;
        None
    }

    /// Ends the VMM that waits for `uid`, if one does.
    pub(crate) async fn dismiss(&self, uid: VmUid) {
        if let Some(spare) = self.take(uid) {
            end(spare).await;
        }
    }
}

async fn end<C>(spare: Fresh<C>) {
    if let Err(error) = launch::kill(spare.guard.process()).await {
        tracing::warn!(%error, "a spare VMM could not be ended");
    }
}

async fn is_installed(program: &Arc<Program>, started: &Installed) -> bool {
    let program = Arc::clone(program);
    let now = tokio::task::spawn_blocking(move || program.known());
    matches!(now.await, Ok(Ok(Some(now))) if now == *started)
}
