//! Tombstones: deleted VMs whose processes could not be ended, and the claims that those processes
//! may still use.
//!
//! ```text
//!   DeleteVm with force, a process outlives it ─► tombstone on record ─► claims held for it
//!                                           │ looked at after 1 s, doubled up to 10 s
//!                                           └─ provably gone ─► off the record, claims released
//! ```
//!
//! The name of a deleted VM is free at once. A disk that its process may write is not free, because
//! two writers would destroy it.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;
use vmm_core::backend::{AdoptRequest, Adoption, Backend, LaunchedVmm};
use vmm_core::kind::VmKind;
use vmm_core::spec::VmSpec;
use vmm_core::store::{Commit, RecordChange, Tombstone, VmRecord};
use vmm_host::process::{Lookup, adopt, can_search, search_by_argument};

use crate::panics::report_panic;
use crate::shared::Shared;

/// The wait before the first search for a process that was left.
const FIRST_CHECK_DELAY: Duration = Duration::from_secs(1);
/// The longest wait between two searches.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// The time that one search, or one further kill, may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// Holds the claims that the process of a deleted VM may use until that process has provably gone.
/// The tombstone is on record.
pub(crate) fn hold_claims(shared: &Arc<Shared>, tombstone: Tombstone) {
    let process = tombstone.vm.run.as_ref().map(|run| run.process.pid);
    let holder = match process {
        Some(pid) => format!("process {pid}, left by the deleted VM \"{}\"", tombstone.vm.vm_id),
        None => format!("a process that was left by the deleted VM \"{}\"", tombstone.vm.vm_id),
    };
    shared.claims.leave_to(tombstone.vm.uid, &tombstone.vm.vm_id, &tombstone.claims, &holder);
    let span =
        tracing::info_span!(parent: None, "tombstone", vm_id = %tombstone.vm.vm_id, uid = %tombstone.vm.uid);
    // The reference is weak, so that this task does not keep a service alive that has ended.
    let shared = Arc::downgrade(shared);
    let watching = async move {
        let mut wait = FIRST_CHECK_DELAY;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(CHECK_INTERVAL);
            let Some(shared) = shared.upgrade() else { return };
            let check = async { is_gone(&shared, &tombstone.vm).await && remove(&shared, &tombstone).await };
            if report_panic("the watch of a deleted VM's process", check).await == Some(true) {
                return;
            }
        }
    };
    tokio::spawn(watching.instrument(span));
}

/// Removes a tombstone from the record, and releases its claims. Returns true if that could be
/// recorded.
async fn remove(shared: &Shared, tombstone: &Tombstone) -> bool {
    let uid = tombstone.vm.uid;
    let unbury = Commit { change: RecordChange::Unbury(uid), event: None };
    match shared.events.commit(unbury).await {
        Ok(committed) => {
            drop(committed);
            shared.claims.release(uid);
            tracing::info!("the process of a deleted VM has ended; its disks and TAPs are free");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "the process of a deleted VM has ended, which could not be recorded yet");
            false
        }
    }
}

/// Returns true if the process of a deleted VM has provably gone. A process that this program
/// started is killed again.
///
/// If the VMM was external, another VM may be at its place by now, which must not be touched. Such
/// a process is therefore never killed.
async fn is_gone(shared: &Shared, vm: &VmRecord) -> bool {
    let scope = vm.intent.as_ref().and_then(|intent| intent.scope.as_ref());
    if vm.run.is_none() && can_search(scope).is_err() {
        // The process may live where the daemon does not see it.
        return false;
    }
    let known = shared.backends.of_kind(vm.backend.as_str(), &vm.kind).ok();
    match (&vm.run, known) {
        // The first two branches cover external VMMs. The next asks the backend, which can also
        // find a process that the record does not name. The last two serve VMs whose backend this
        // daemon does not have.
        (Some(run), _) if vm.kind != VmKind::Managed => matches!(adopt(&run.process), Lookup::Gone),
        (None, Some(backend)) if vm.kind != VmKind::Managed => {
            // Without a run, the place alone shows whether something of the VM runs. A VM on record
            // has the monitor of its place, which another adoption would replace.
            let taken = shared.index.at_place(&vm.backend, &vm.kind).is_some();
            !taken && matches!(adopted(shared, &*backend, vm).await, Some(Adoption::Gone { .. }))
        }
        (_, Some(backend)) => match adopted(shared, &*backend, vm).await {
            Some(Adoption::Gone { .. }) => true,
            Some(
                Adoption::Alive { launched, .. } | Adoption::Unreachable { launched: Some(launched), .. },
            ) => {
                kill(launched).await;
                false
            }
            Some(Adoption::Unreachable { launched: None, .. }) | None => false,
        },
        (Some(run), None) => matches!(adopt(&run.process), Lookup::Gone),
        (None, None) => nobody_uses_the_folder(shared, vm).await,
    }
}

async fn adopted(shared: &Shared, backend: &dyn Backend, vm: &VmRecord) -> Option<Adoption> {
    let request = AdoptRequest {
        instance: shared.instance,
        uid: vm.uid,
        vm_id: vm.vm_id.clone(),
        spec: VmSpec::parse(&vm.config).unwrap_or_else(|_| VmSpec::imported(&vm.config)),
        dir: vm.uid.run_dir(&shared.settings.runtime_dir),
        run: vm.run.clone(),
        kind: vm.kind.clone(),
        imported: vm.imported,
        changed_ms: vm.modified_ms,
    };
    tokio::time::timeout(CHECK_TIMEOUT, backend.adopt(request)).await.ok()?.ok()
}

async fn kill(launched: LaunchedVmm) {
    let _ = tokio::time::timeout(CHECK_TIMEOUT, launched.vmm.kill()).await;
}

async fn nobody_uses_the_folder(shared: &Shared, vm: &VmRecord) -> bool {
    let dir = vm.uid.run_dir(&shared.settings.runtime_dir);
    matches!(search_by_argument(dir).await, Ok(users) if users.is_empty())
}
