//! Spare VMMs: processes that are started before their VM is created, if the operator wants some.
//!
//! ```text
//!              ┌──────────── a VM was started: refill ───────────┐
//!              ▼                                                 │
//!   a new uid, its folder, a mark ─► start_spare ─► free ─► reserved ─► launch uses it
//!                                                    │ CreateVm  │ BootVm
//!                                     the daemon ends └───────────┴─► dismissed
//! ```
//!
//! A spare VMM has a uid of its own, and with it a run folder. CreateVm gives this uid to the VM,
//! so that it starts nothing and no name on the host ever changes. A reservation is broken, the
//! oldest first, if so many others wait for their BootVm that processes would accumulate. Such a VM
//! is started in the ordinary way.
//!
//! A spare VMM has received no data and has no guest. It ends with the daemon. If the daemon dies,
//! the mark in the run folder names the owner, and the next daemon ends the VMM. The mark is
//! removed before the VMM receives any data, so that a marked VMM never runs a guest.
//!
//! [`crate::spare_pool`] counts the spare VMMs, and this module starts and ends them.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::Instrument as _;
use uuid::Uuid;
use vmm_core::backend::{Backend, BackendErrorKind, SpareRequest, SweepRequest};
use vmm_core::id::{BackendName, InstanceId, VmUid};
use vmm_core::kind::VmKind;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::run_dir::{self, SpareMark};
use vmm_host::survey::{self, RuntimeDirUsers};

use crate::panics::report_panic;
use crate::run_folders;
use crate::shared::Shared;
use crate::spare_pool::{RemainingSpares, SparePool};

/// The time between an answer to a client and the start of a process, so that the answer is sent
/// first.
const REFILL_DELAY: Duration = Duration::from_millis(5);
/// The time that a spare VMM of a dead daemon may take to end.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// The spare VMMs of every backend.
#[derive(Default)]
pub(crate) struct SpareManager(Mutex<SparePool>);

impl SpareManager {
    pub(crate) fn new(wanted: usize) -> Self {
        Self(Mutex::new(SparePool::new(wanted)))
    }

    fn pool(&self) -> MutexGuard<'_, SparePool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the VMM of `uid` from the count, because a VM uses it or it has been ended.
    pub(crate) fn forget(&self, backend: &BackendName, uid: VmUid) {
        self.pool().forget(backend, uid);
    }

    /// Ends all spare VMMs, and starts no more.
    pub(crate) async fn stop(&self, shared: &Arc<Shared>) {
        let left = self.pool().stop();
        for RemainingSpares { backend, reserved, free } in left {
            let Ok(backend) = shared.backends.get(backend.as_str()) else { continue };
            for uid in reserved {
                // The folder belongs to a VM on record, so only the VMM is ended.
                dismiss(&*backend, uid).await;
            }
            for uid in free {
                discard(shared, &*backend, uid).await;
            }
        }
    }
}

/// A spare VMM that is held for a VM which is being created. If the reservation is dropped, the VMM
/// is free again.
pub(crate) struct SpareReservation {
    shared: Arc<Shared>,
    backend: Arc<dyn Backend>,
    uid: Option<VmUid>,
}

/// Takes a spare VMM of `backend`, if one is free.
pub(crate) fn reserve(shared: &Arc<Shared>, backend: &Arc<dyn Backend>) -> Option<SpareReservation> {
    let uid = shared.spares.pool().take(&backend.capabilities().name)?;
    Some(SpareReservation { shared: Arc::clone(shared), backend: Arc::clone(backend), uid: Some(uid) })
}

impl SpareReservation {
    /// Returns the uid that the VM gets, or `None` after the reservation was redeemed or discarded.
    pub(crate) fn uid(&self) -> Option<VmUid> {
        self.uid
    }

    /// Keeps the reservation, because the VM is on record. Its BootVm finds the VMM waiting, unless
    /// too many others wait as well.
    pub(crate) fn keep_for_boot(mut self) {
        let Some(uid) = self.uid.take() else { return };
        // The pool may break a reservation, that of this VM included. The VMM of a broken
        // reservation is ended and its folder stays, because the folder belongs to a VM on record.
        let broken = self.shared.spares.pool().reserve(&self.backend.capabilities().name, uid);
        if let Some(uid) = broken {
            let backend = Arc::clone(&self.backend);
            spawn(&self.shared, async move { dismiss(&*backend, uid).await });
        }
    }

    /// Ends the VMM of a reservation whose VM may be on record. The uid is not used again, because
    /// nobody knows whether a VM has it.
    pub(crate) async fn discard(mut self) {
        if let Some(uid) = self.uid.take() {
            discard(&self.shared, &*self.backend, uid).await;
        }
    }
}

impl Drop for SpareReservation {
    fn drop(&mut self) {
        let Some(uid) = self.uid.take() else { return };
        // The creation has failed for certain, so that the VMM is free again. A pool that was
        // stopped meanwhile does not take it back, and then it is ended with its folder.
        let unwanted = self.shared.spares.pool().give_back(&self.backend.capabilities().name, uid);
        let Some(uid) = unwanted else { return };
        let (shared, backend) = (Arc::clone(&self.shared), Arc::clone(&self.backend));
        spawn(&self.shared, async move { discard(&shared, &*backend, uid).await });
    }
}

/// Starts a task that starts as many spare VMMs of `backend` as are wanted. Returns at once.
pub(crate) fn refill(shared: &Arc<Shared>, backend: &Arc<dyn Backend>) {
    let name = &backend.capabilities().name;
    // A spare waits for a new VM, so a kind of which no new VMs are created needs none.
    // `begin_filling` returns true to one caller at a time, so that two starts at once do not fill
    // the pool twice.
    if !shared.backends.is_current(backend) || !shared.spares.pool().begin_filling(name) {
        return;
    }
    let (shared_with, backend) = (Arc::clone(shared), Arc::clone(backend));
    spawn(shared, async move {
        tokio::time::sleep(REFILL_DELAY).await;
        if report_panic("the spare VMMs", fill(&shared_with, &*backend)).await.is_none() {
            // The next start of a VM fills the pool again.
            shared_with.spares.pool().end_filling(&backend.capabilities().name, false);
        }
    });
}

/// Runs a task for which the end of the daemon waits.
fn spawn(shared: &Shared, task: impl Future<Output = ()> + Send + 'static) {
    let under_way = shared.under_way.begin();
    let span = tracing::info_span!(parent: None, "spares");
    tokio::spawn(
        async move {
            let _under_way = under_way;
            task.await;
        }
        .instrument(span),
    );
}

/// Starts spare VMMs until enough are free.
///
/// The first failure ends the attempt. A backend that has no spare VMMs is not asked again, and any
/// other failure is tried again after the next start of a VM. The pool may have been stopped while
/// a VMM was started, and then that VMM is ended here.
async fn fill(shared: &Arc<Shared>, backend: &dyn Backend) {
    let name = &backend.capabilities().name;
    loop {
        let uid = VmUid::new(Uuid::now_v7());
        if let Err(failed) = start(shared, backend, uid).await {
            if let NoSpareReason::Problem(problem) = &failed {
                tracing::warn!(backend = %name, error = problem, "no spare VMM could be started; the next VM starts its own");
            }
            shared.spares.pool().end_filling(name, matches!(failed, NoSpareReason::Unsupported));
            return;
        }
        let added = shared.spares.pool().add(name, uid);
        match added {
            Ok(true) => {}
            Ok(false) => return,
            Err(uid) => return discard(shared, backend, uid).await,
        }
    }
}

/// The reason why there is no spare VMM.
enum NoSpareReason {
    /// The backend cannot start spare VMMs.
    Unsupported,
    /// The start failed, and another attempt may succeed. The text is for people.
    Problem(String),
}

/// Starts one VMM in the run folder of `uid`. If that fails, nothing is left.
async fn start(shared: &Arc<Shared>, backend: &dyn Backend, uid: VmUid) -> Result<(), NoSpareReason> {
    let Some(spares) = backend.spares() else { return Err(NoSpareReason::Unsupported) };
    let name = &backend.capabilities().name;
    let mark = SpareMark { instance: shared.instance, backend: name.clone() };
    let runtime_dir = shared.settings.runtime_dir.clone();
    // The folder gets its mark before the VMM starts, so that the next daemon can attribute the VMM
    // at every moment.
    let made = tokio::task::spawn_blocking(move || make_folder(&runtime_dir, uid, &mark)).await;
    let failed = match made.map_err(|error| error.to_string()).and_then(|made| made) {
        Ok((dir, console)) => match spares.start_spare(SpareRequest { uid, dir, console }).await {
            Ok(()) => {
                point(FaultPoint::SpareStarted);
                tracing::debug!(backend = %name, %uid, "a spare VMM waits for a VM");
                return Ok(());
            }
            Err(error) if matches!(error.kind, BackendErrorKind::Unsupported(_)) => {
                NoSpareReason::Unsupported
            }
            Err(error) => NoSpareReason::Problem(error.to_string()),
        },
        Err(problem) => NoSpareReason::Problem(problem),
    };
    discard(shared, backend, uid).await;
    Err(failed)
}

/// Makes the run folder of a spare VMM with its mark, and the console's file in it.
fn make_folder(runtime_dir: &Path, uid: VmUid, mark: &SpareMark) -> Result<(PathBuf, PathBuf), String> {
    let dir = run_dir::create(runtime_dir, uid).map_err(|error| error.to_string())?;
    point(FaultPoint::SpareFolderMade);
    mark.put(&dir).map_err(|error| error.to_string())?;
    point(FaultPoint::SpareMarked);
    let console = dir.join(run_folders::KEPT_CONSOLE);
    run_folders::create_private_file(&console).map_err(|error| format!("{}: {error}", console.display()))?;
    Ok((dir, console))
}

/// Ends the VMM of a uid that no VM has, and removes its folder.
async fn discard(shared: &Shared, backend: &dyn Backend, uid: VmUid) {
    dismiss(backend, uid).await;
    remove(uid.run_dir(&shared.settings.runtime_dir)).await;
}

/// Ends the spare VMM of `uid`, if there is one.
pub(crate) async fn dismiss(backend: &dyn Backend, uid: VmUid) {
    if let Some(spares) = backend.spares() {
        spares.dismiss_spare(uid).await;
    }
}

async fn remove(dir: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || run_dir::remove(&dir)).await;
    if let Ok(Err(problem)) = removed {
        tracing::warn!(error = %problem, "the folder of a spare VMM could not be removed; `reconcile` lists it");
    }
}

/// Ends the spare VMMs that a dead daemon has left. A VMM whose folder has this instance's mark
/// has received no data. If a VM on record had been reserved the VMM, its folder stays.
pub(crate) async fn clear(shared: &Shared, on_record: HashSet<VmUid>) {
    let (runtime_dir, instance) = (shared.settings.runtime_dir.clone(), shared.instance);
    let left = tokio::task::spawn_blocking(move || {
        let left = left_behind(&runtime_dir, instance, &on_record);
        left.map(|left| (left, on_record))
    });
    let (left, on_record) = match left.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            return tracing::warn!(%error, "the spare VMMs of an earlier daemon could not be listed");
        }
        Err(error) => {
            return tracing::warn!(%error, "the spare VMMs of an earlier daemon could not be listed");
        }
    };
    // A VMM is ended before its mark or folder is removed. If the daemon dies in between, the mark
    // is still there, and the next start repeats the sweep.
    for (uid, dir, mark) in left {
        let Ok(backend) = shared.backends.of_kind(mark.backend.as_str(), &VmKind::Managed) else {
            tracing::warn!(backend = %mark.backend, dir = %dir.display(), "a spare VMM of an earlier daemon has a backend that this daemon does not serve; `reconcile` lists it");
            continue;
        };
        let sweeping = backend.sweep(SweepRequest::of_folder(uid, &dir));
        match tokio::time::timeout(CLEAR_TIMEOUT, sweeping).await {
            Ok(Ok(())) if on_record.contains(&uid) => unmark(dir, mark).await,
            Ok(Ok(())) => remove(dir).await,
            Ok(Err(error)) => {
                tracing::warn!(%error, dir = %dir.display(), "a spare VMM of an earlier daemon could not be ended");
            }
            Err(_) => {
                tracing::warn!(dir = %dir.display(), "a spare VMM of an earlier daemon did not end in time")
            }
        }
    }
}

async fn unmark(dir: PathBuf, mark: SpareMark) {
    // BootVm removes the mark as well, so a failure is harmless.
    let _ = tokio::task::spawn_blocking(move || mark.take_off(&dir)).await;
}

/// Returns the folders with this instance's mark. Removes empty folders that belong to no VM,
/// because they were left by an interrupted start of a spare.
fn left_behind(
    runtime_dir: &Path,
    instance: InstanceId,
    on_record: &HashSet<VmUid>,
) -> io::Result<Vec<(VmUid, PathBuf, SpareMark)>> {
    let ours_alone =
        matches!(survey::users_of(runtime_dir), Ok(RuntimeDirUsers::One(owner)) if owner == instance);
    let mut left = Vec::new();
    for (uid, dir) in run_dir::list(runtime_dir)? {
        match SpareMark::read(&dir) {
            Ok(Some(mark)) if mark.instance == instance => left.push((uid, dir, mark)),
            // Only an empty folder is removed, because the contents of any other belong to another
            // program.
            Ok(None) if ours_alone && !on_record.contains(&uid) => drop(std::fs::remove_dir(&dir)),
            Ok(Some(_) | None) | Err(_) => {}
        }
    }
    Ok(left)
}
