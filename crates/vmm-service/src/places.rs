//! VMs at places that the operator or another program determines: the holder of each place, and the
//! VMs that are found at a place.
//!
//! ```text
//!   CreateVm ── claims the first free place ────────┐
//!                                                   ├──► one lock, so that a place has one record
//!   Backend ── DiscoveredVm ─┬─ place of no record ─┘    (import: a record, an event, an actor)
//!                            └─ place of a record ──► its actor decides (actor/discovered.rs)
//! ```
//!
//! Two locks are held together: the lock of a name, and the lock of the places. CreateVm and an
//! import both take the lock of the name first. Apart from commits, no action that may take long
//! happens under the lock of the places. The check of a VM's files happens outside it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;
use vmm_core::backend::Backend;
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::discovery::{DiscoveredVm, Discovery, DiscoveryEvent, Places};
use vmm_core::event::{EventKind, NewEvent, VmSummary};
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::spec::{NamedFiles, VmSpec};
use vmm_core::state::{Phase, Status, VmOperation};
use vmm_core::store::{
    Commit, HostClaim, PackedVmRequest, PendingWork, RecordChange, RunRecord, VmRecord, VmRequest,
};
use vmm_host::fault::{FaultPoint, point};

use crate::actor::{ActorOrigin, NewActor};
use crate::check::{self, FileCheckPurpose, FileCheckTerms};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::failure::Failure;
use crate::mailbox::{ActorHandle, OperationRequest};
use crate::operation_log::{self, Ending};
use crate::panics::report_panic;
use crate::shared::Shared;

/// The wait before a discovery that panicked is begun again.
const DISCOVERY_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Refuses to create a VM if the backend only imports VMs.
pub(crate) fn refuse_import_only(backend: &dyn Backend) -> Result<(), ServiceError> {
    match backend.places() {
        Places::Imported { why, .. } => Err(Failure::ImportsOnly { why }.into()),
        Places::Made | Places::Fixed { .. } => Ok(()),
    }
}

/// A place for a new VM. No other VM gets a place while this value is held, which is until the VM's
/// record is in the index.
pub(crate) struct PlaceClaim<'a> {
    pub(crate) place: VmKind,
    _alone: MutexGuard<'a, ()>,
}

/// Finds a place for a new VM of `backend`. Returns `None` if it needs none.
pub(crate) async fn claim<'a>(
    shared: &'a Shared,
    backend: &dyn Backend,
) -> Result<Option<PlaceClaim<'a>>, ServiceError> {
    let (places, setting) = match backend.places() {
        Places::Made => return Ok(None),
        Places::Imported { why, .. } => return Err(Failure::ImportsOnly { why }.into()),
        Places::Fixed { places, setting } => (places, setting),
    };
    let name = &backend.capabilities().name;
    let alone = shared.places.lock().await;
    match places.iter().find(|place| shared.index.at_place(name, place).is_none()) {
        Some(place) => Ok(Some(PlaceClaim { place: place.clone(), _alone: alone })),
        None => Err(Failure::NoPlaceLeft { backend: name.clone(), places, setting }.into()),
    }
}

/// Takes up the VMs that every backend has found so far, and continues to listen. Every VM on
/// record has been adopted before.
pub(crate) async fn discover_all(shared: &Arc<Shared>) {
    let discoveries = shared.backends.objects().into_iter().map(async |backend| {
        let Some(discovery) = backend.discovery() else { return };
        let task = format!("the discovery of {}", backend.capabilities().name);
        let Discovery { present, mut later } = loop {
            match report_panic(&task, discovery.discover()).await {
                Some(discovery) => break discovery,
                None => tokio::time::sleep(DISCOVERY_RETRY_DELAY).await,
            }
        };
        for found in present {
            report_panic(&task, accept(shared, &backend, found)).await;
        }
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let mut leaving = PlaceRemovals::default();
            while let Some(finding) = later.recv().await {
                report_panic(&task, follow_discovery(&shared, &backend, finding, &mut leaving)).await;
            }
        });
    });
    futures::future::join_all(discoveries).await;
}

/// The places whose VM is being removed from the record, each with the task that removes it. A VM
/// that is shut down for an hour may delay its removal for an hour, and VMs that are found at other
/// places do not wait for that.
type PlaceRemovals = HashMap<VmKind, JoinHandle<()>>;

async fn follow_discovery(
    shared: &Arc<Shared>,
    backend: &Arc<dyn Backend>,
    finding: DiscoveryEvent,
    leaving: &mut PlaceRemovals,
) {
    leaving.retain(|_, task| !task.is_finished());
    let (shared, backend) = (Arc::clone(shared), Arc::clone(backend));
    match finding {
        DiscoveryEvent::Found(found) => match leaving.remove(&found.place) {
            None => accept(&shared, &backend, *found).await,
            // A VM that is found at a place after its loss is taken up after the removal.
            Some(removal) => {
                let place = found.place.clone();
                let after_it = async move {
                    let _ = removal.await;
                    let taking = accept(&shared, &backend, *found);
                    report_panic("the discovery of a place whose VM has left", taking).await;
                };
                leaving.insert(place, tokio::spawn(after_it));
            }
        },
        DiscoveryEvent::Lost { place } => {
            // Removals at one place run one after the other, in the order of the findings.
            let before = leaving.remove(&place);
            let lost = place.clone();
            let removal = async move {
                if let Some(before) = before {
                    let _ = before.await;
                }
                let name = &backend.capabilities().name;
                report_panic("the removal of a VM whose place is gone", forget(&shared, name, &lost)).await;
            };
            leaving.insert(place, tokio::spawn(removal));
        }
        DiscoveryEvent::Health => shared.backends.refresh_one(&backend.capabilities().name).await,
    }
}

/// Passes a found VM to its owner, or imports it.
async fn accept(shared: &Arc<Shared>, backend: &Arc<dyn Backend>, found: DiscoveredVm) {
    let Some(found) = give_to_owner(shared, backend, found).await else { return };
    if found.uid.is_some() {
        tracing::warn!(
            found = ?found,
            "a VM was found that bears the mark of a VM which is not on record; it is left alone"
        );
        return;
    }
    let place = found.place.clone();
    if let Err(error) = import(shared, backend, found).await {
        tracing::error!(%place, %error, "a VM that another program made could not be imported");
    }
}

/// Passes a found VM to the VM on record that it belongs to. Returns the found VM if it belongs to
/// none.
async fn give_to_owner(
    shared: &Shared,
    backend: &Arc<dyn Backend>,
    found: DiscoveredVm,
) -> Option<DiscoveredVm> {
    let _no_place_is_given_out = shared.places.lock().await;
    match owner(shared, backend, &found) {
        Some(handle) => {
            handle.found(found);
            None
        }
        None => Some(found),
    }
}

fn owner(shared: &Shared, backend: &Arc<dyn Backend>, found: &DiscoveredVm) -> Option<ActorHandle> {
    let holder = match found.uid {
        Some(uid) => shared.index.record(uid).filter(|record| record.kind.place() == found.place.place()),
        None => shared.index.at_place(&backend.capabilities().name, &found.place),
    };
    holder.and_then(|record| shared.index.actor(&record.vm_id))
}

/// Records a VM that another program made.
async fn import(
    shared: &Arc<Shared>,
    backend: &Arc<dyn Backend>,
    found: DiscoveredVm,
) -> Result<(), ServiceError> {
    let uid = VmUid::new(Uuid::now_v7());
    let spec = VmSpec::imported(&found.config);
    let run = match &found.launched {
        Some(launched) => Some(claimed(shared, &spec, backend, launched.vmm.run().clone()).await),
        None => None,
    };
    let Some((vm_id, _creating)) = free_name(shared, &found.names).await else {
        return Err(Failure::EveryNameTaken { names: found.names }.into());
    };
    let _no_place_is_given_out = shared.places.lock().await;
    if let Some(handle) = owner(shared, backend, &found) {
        // A client has created a VM at this place during the file check.
        handle.found(found);
        return Ok(());
    }
    let mut found = found;
    let launched = found.launched.take();
    let record = record_of_import(shared, &**backend, uid, vm_id, run, found);
    if let Some(run) = &record.run
        && let Err(taken) = shared.claims.acquire(uid, &record.vm_id, &run.claims)
    {
        tracing::error!(detail = %taken, "a running VM uses a disk or TAP that another VM has claimed");
    }
    let event = event_of_import(&record);
    point(FaultPoint::ImportTaken);
    let insert =
        Commit { change: RecordChange::Insert(Box::new(record.clone())), event: Some(event.clone()) };
    let committed = match shared.events.commit(insert).await {
        Ok(committed) => committed,
        Err(error) => {
            shared.claims.release(uid);
            return Err(error.into());
        }
    };
    point(FaultPoint::ImportCommitted);
    operation_log::unrequested(&event, &record.backend, shared.beginnings.count(event.kind));
    NewActor {
        shared: Arc::clone(shared),
        record: Arc::new(record),
        backend: Arc::clone(backend),
        committed: committed.seq,
        origin: ActorOrigin::Imported { launched },
    }
    .start();
    Ok(())
}

/// Returns the record of a VM that another program made, without an operation in progress.
fn record_of_import(
    shared: &Shared,
    backend: &dyn Backend,
    uid: VmUid,
    vm_id: VmId,
    run: Option<RunRecord>,
    found: DiscoveredVm,
) -> VmRecord {
    let name = backend.capabilities().name.clone();
    let now = now_ms();
    VmRecord {
        uid,
        vm_id,
        backend: name.clone(),
        requested: PackedVmRequest::pack(&VmRequest {
            backend: name.to_string(),
            config: found.config.clone(),
        }),
        config: found.config,
        state: found.state,
        status: Status::plain(Phase::at_rest(found.state), now).because(
            Reason::Imported,
            format!("another program made the VM, which was found at {}", found.place),
        ),
        generation: 1,
        created_ms: shared.index.creation_time(now),
        modified_ms: now,
        intent: None,
        run,
        owns_console_output: false,
        ended_by: None,
        kind: found.place,
        imported: true,
        unrepresented: found.unrepresented,
        pending: Some(PendingWork::default()),
        keyed: None,
    }
}

/// Returns the event of the import that `record` begins with.
fn event_of_import(record: &VmRecord) -> NewEvent {
    NewEvent {
        time_ms: record.modified_ms,
        vm_id: record.vm_id.clone(),
        uid: record.uid,
        kind: EventKind::Created,
        state: record.state,
        status: record.status.clone(),
        cause: Cause::Imported,
        caller: Caller::system(),
        ended_by: None,
        metadata: record.config.metadata.clone(),
        update: None,
        summary: Some(VmSummary::of(record)),
    }
}

/// Returns the run with its claims on the host, as far as the host shows them.
pub(crate) async fn claimed(
    shared: &Shared,
    spec: &VmSpec,
    backend: &Arc<dyn Backend>,
    mut run: RunRecord,
) -> RunRecord {
    let terms = FileCheckTerms {
        owns_output: true,
        ..FileCheckTerms::of(FileCheckPurpose::Boot, Some(backend.capabilities()))
    };
    run.claims = match shared.file_checks.check(NamedFiles::of(spec), terms).await {
        Ok(facts) => facts.claims,
        Err(silent) => {
            tracing::error!(
                pid = run.process.pid,
                error = %silent,
                "a VM was found running whose files do not answer; its disks are claimed by their paths until they do"
            );
            check::claims_by_path(spec)
        }
    };
    run.claims.extend(spec.nics.iter().filter_map(|nic| nic.tap.clone()).map(|name| HostClaim::Tap { name }));
    run
}

/// Returns the first of `names` that no VM has, with the lock that keeps it free.
async fn free_name(shared: &Shared, names: &[VmId]) -> Option<(VmId, tokio::sync::OwnedMutexGuard<()>)> {
    for name in names {
        let guard = shared.names.of(name).lock_owned().await;
        if shared.index.get(name).is_none() {
            return Some((name.clone(), guard));
        }
    }
    None
}

/// Removes the record of a VM that was imported from a place which does not exist any more.
async fn forget(shared: &Arc<Shared>, backend: &BackendName, place: &VmKind) {
    let Some(record) = shared.index.at_place(backend, place).filter(|record| record.imported) else { return };
    let Some(handle) = shared.index.actor(&record.vm_id) else { return };
    let operation = OperationRequest {
        request: VmOperation::Delete,
        guest_timeout: None,
        caller: Caller::system(),
        update: None,
        key: None,
    };
    let (actor, asked) = (operation.caller.clone(), Instant::now());
    let ending = Ending {
        operation: VmOperation::Delete.method(),
        force: false,
        actor: &actor,
        record: &record,
        asked,
    };
    if let Some(Err(error)) = handle.ask(operation, shared.under_way.begin()).await {
        ending.failed(&error);
    }
}
