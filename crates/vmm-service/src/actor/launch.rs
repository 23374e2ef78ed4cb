//! The launch of a VMM: the request to the backend, the run folder, and the run permit.

use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LaunchRequest, LaunchedVmm};
use vmm_core::id::VmUid;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::{Console, VmSpec};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::run_dir::{self, SpareMark};

use super::Actor;
use crate::error::ServiceError;
use crate::run_folders::{KEPT_CONSOLE, create_private_file};

/// A launch in progress. If it is dropped, it may leave a process, which a sweep finds.
pub(super) type LaunchInProgress = BoxFuture<'static, Result<LaunchedVmm, BackendError>>;

impl Actor {
    /// Returns the spec to start, and the reason where that spec is not enough to make the VM anew.
    fn what_to_start(&self) -> (VmSpec, Option<String>) {
        if !self.record.imported {
            return (self.spec(), None);
        }
        match VmSpec::parse(&self.record.config) {
            Err(report) => (self.spec(), Some(ServiceError::Invalid(report.into_violations()).to_string())),
            Ok(spec) if self.record.unrepresented.is_empty() => (spec, None),
            Ok(spec) => (spec, Some(format!("the VM also had {}", self.record.unrepresented.join(", ")))),
        }
    }

    /// Returns the start of a VMM whose guest waits for `permit`. Everything that is made before
    /// the permit is granted bears the VM's uid, which is on record since the VM's creation. The
    /// recovery therefore finds it with or without an intent.
    pub(super) fn begin_launch(&self, permit: RunPermit) -> LaunchInProgress {
        let name = self.backend.capabilities().name.clone();
        // The launch uses the spare VMM of this uid, if there is one, so the pool must not end it.
        self.shared.spares.forget(&name, self.record.uid);
        let dir = self.dir();
        let (spec, incomplete) = self.what_to_start();
        let console = match &spec.console {
            Console::Off => None,
            Console::Kept => Some(dir.join(KEPT_CONSOLE)),
            Console::File(path) => Some(path.clone()),
        };
        // A console file that the client named belongs to this VM only after the intent is on
        // record, so the launch waits for the permit before it creates the file.
        let waits = matches!(spec.console, Console::File(_)) && !self.record.owns_console_output;
        let request = LaunchRequest {
            instance: self.shared.instance,
            uid: self.record.uid,
            vm_id: self.record.vm_id.clone(),
            taps: self.taps().into_iter().map(|(name, _)| name).collect(),
            spec,
            dir,
            console: console.clone(),
            permit: permit.clone(),
            kind: self.record.kind.clone(),
            imported: self.record.imported,
            incomplete,
        };
        let backend = Arc::clone(&self.backend);
        let (runtime_dir, uid) = (self.shared.settings.runtime_dir.clone(), self.record.uid);
        let mark = SpareMark { instance: self.shared.instance, backend: name };
        Box::pin(async move {
            if waits {
                permit.wait().await?;
            }
            prepare(runtime_dir, uid, console, mark).await?;
            point(FaultPoint::StartFolderMade);
            backend.launch(request).await
        })
    }
}

/// Returns true if a launch failed before a process existed.
pub(super) fn launched_nothing(error: &BackendError) -> bool {
    error.effect == Effect::NotApplied
        && match error.kind {
            BackendErrorKind::NotInstalled
            | BackendErrorKind::NotServed
            | BackendErrorKind::Host
            | BackendErrorKind::Exhausted
            | BackendErrorKind::Unsupported(_) => true,
            BackendErrorKind::Rejected
            | BackendErrorKind::Timeout
            | BackendErrorKind::Unreachable
            | BackendErrorKind::Protocol
            | BackendErrorKind::Gone
            | BackendErrorKind::StillRuns => false,
        }
}

/// Makes the run folder with the mark of its owner, and the console's file. The mark of a spare VMM
/// in the folder is removed, because the spare will now run this VM.
async fn prepare(
    runtime_dir: PathBuf,
    uid: VmUid,
    console: Option<PathBuf>,
    mark: SpareMark,
) -> Result<(), BackendError> {
    let made = tokio::task::spawn_blocking(move || {
        let dir = run_dir::create(&runtime_dir, uid).map_err(|error| (runtime_dir, error))?;
        run_dir::own(&dir, mark.instance).map_err(|error| (dir.clone(), error))?;
        mark.take_off(&dir).map_err(|error| (dir, error))?;
        match console {
            Some(console) => create_private_file(&console).map_err(|error| (console, error)),
            None => Ok(()),
        }
    })
    .await;
    let failed = |text: String| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, text);
    match made {
        Ok(Ok(())) => Ok(()),
        Ok(Err((path, error))) => {
            Err(failed(format!("{} could not be made: {error}", path.display())).caused_by(error))
        }
        Err(error) => Err(failed(format!("the run folder could not be made: {error}"))),
    }
}
