//! VMMs that have no configuration yet: one that is about to get its VM, or a spare one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::LaunchRequest;
use vmm_core::id::VmUid;

use super::client::RestApi;
use super::config_pipe::ConfigPipe;
use crate::launch::{self, ProcessGuard};
use crate::program::{InstalledProgram, Program};
use crate::spares::SpareTable;

/// The longest time in which a spare VMM must answer. Another VMM is started otherwise.
const SPARE_ANSWER_TIMEOUT: Duration = Duration::from_millis(250);

/// The way in which a VMM takes its configuration.
#[derive(Debug)]
pub(crate) enum ConfigIntake<C> {
    /// By calls on a connection.
    Calls(C),
    /// From a pipe, before it listens.
    Pipe(ConfigPipe),
}

impl<C: RestApi> ConfigIntake<C> {
    /// Returns true if the VMM waits for its configuration. May not return if the VMM hangs.
    pub(crate) async fn answers(&self) -> bool {
        match self {
            Self::Calls(client) => client.version().await.is_ok(),
            Self::Pipe(pipe) => pipe.probe().await,
        }
    }
}

/// A VMM that has no configuration yet.
#[derive(Debug)]
pub(crate) struct UnconfiguredVmm<C> {
    /// The process, which is killed when the guard is dropped.
    pub(crate) guard: ProcessGuard,
    /// The way in which the VMM takes its configuration.
    pub(crate) intake: ConfigIntake<C>,
    /// The executable that the process runs.
    pub(crate) program: InstalledProgram,
    /// The file that receives the console's output, or `None` if the output is discarded.
    pub(crate) console: Option<PathBuf>,
}

impl<C: RestApi> SpareTable<UnconfiguredVmm<C>> {
    /// Returns the spare VMM that is reserved for the VM of `request`, if it can serve that VM: the
    /// VMM writes to the right console, runs the executable that is installed now, and answers. A
    /// VMM that cannot serve is ended.
    pub(crate) async fn take_for(
        &self,
        request: &LaunchRequest,
        program: &Arc<Program>,
    ) -> Option<UnconfiguredVmm<C>> {
        let spare = self.take(request.uid)?;
        // The console and the executable are fixed at the start of a VMM, so a difference cannot be
        // repaired. The call is last, because it costs time.
        let why = if spare.console != request.console {
            "the VM has another console"
        } else if !is_installed(program, &spare.program).await {
            "the program of the VMM has been replaced"
        } else if !matches!(
            tokio::time::timeout(SPARE_ANSWER_TIMEOUT, spare.intake.answers()).await,
            Ok(true)
        ) {
            "the VMM does not answer"
        } else {
            return Some(spare);
        };
        tracing::debug!(
            pid = spare.guard.pid(),
            detail = why,
            "a spare VMM cannot be used; another VMM is started"
        );
        end(spare).await;
        None
    }

    /// Ends the spare VMM that is reserved for `uid`, if there is one.
    pub(crate) async fn dismiss(&self, uid: VmUid) {
        if let Some(spare) = self.take(uid) {
            end(spare).await;
        }
    }
}

async fn end<C>(spare: UnconfiguredVmm<C>) {
    if let Err(error) = launch::kill(spare.guard.process()).await {
        tracing::warn!(%error, "a spare VMM could not be ended");
    }
}

async fn is_installed(program: &Arc<Program>, started: &InstalledProgram) -> bool {
    let program = Arc::clone(program);
    let now = tokio::task::spawn_blocking(move || program.known());
    matches!(now.await, Ok(Ok(Some(now))) if now == *started)
}
