//! CreateVm: check, record, reserve. No VMM is started.

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;
use vmm_core::backend::{Backend, Effect};
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::config::VmConfig;
use vmm_core::event::{EventKind, NewEvent, VmSummary};
use vmm_core::id::{VmId, VmUid};
use vmm_core::idempotency::{CallAnswer, KeptAnswer, KeyChange, KeyedCall, VmAnswer};
use vmm_core::reason::Reason;
use vmm_core::report::{CheckReport, Warning};
use vmm_core::spec::{FIRMWARE_FIELD, VmSpec};
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{Commit, Intent, PackedVmRequest, PendingWork, RecordChange, VmRecord, VmRequest};
use vmm_host::fault::{FaultPoint, point};

use crate::actor::{ActorOrigin, NewActor};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::events::CommitReceipt;
use crate::failure::Failure;
use crate::mailbox::{AnswerState, OperationOutcome};
use crate::operation_log::Ending;
use crate::places;
use crate::shared::Shared;
use crate::spares::{self, SpareReservation};
use crate::validate::{CheckedRequest, check_config, check_spec};

/// The name of the method.
const OPERATION: &str = "CreateVm";

/// The request of a CreateVm.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The name. An empty name requests a generated one.
    pub vm_id: String,
    /// The backend and the configuration as requested.
    pub requested: VmRequest,
    /// The caller.
    pub caller: Caller,
}

/// The answer to a CreateVm.
#[derive(Clone, Debug)]
pub struct Created {
    /// The VM, new or as it exists.
    pub record: Arc<VmRecord>,
    /// The parts of the configuration that the backend ignores or emulates.
    pub warnings: Vec<Warning>,
    /// The state of the answer that is kept for an idempotency key.
    pub answer: AnswerState,
}

/// Creates a VM, or finds the VM that the same call created before, and logs a success. Keeps the
/// answer for the call `key` with the new VM.
pub(crate) async fn create(
    shared: &Arc<Shared>,
    request: CreateRequest,
    key: Option<KeyedCall>,
) -> Result<Created, ServiceError> {
    let (asked, caller) = (Instant::now(), request.caller.clone());
    let created = create_or_find(shared, request, key).await?;
    let ending =
        Ending { operation: OPERATION, force: false, actor: &caller, record: &created.record, asked };
    ending.done(&OperationOutcome {
        record: Arc::clone(&created.record),
        ended_by: None,
        left_behind: Vec::new(),
        warnings: Vec::new(),
        answer: AnswerState::Open,
    });
    Ok(created)
}

/// Logs a failure whose client has left. The span of the request has the other keys.
pub(crate) fn log_unread_failure(error: &ServiceError) {
    tracing::warn!(
        operation = OPERATION,
        outcome = "failed",
        reason = error.code(),
        detail = %error,
        "operation failed"
    );
}

async fn create_or_find(
    shared: &Arc<Shared>,
    request: CreateRequest,
    key: Option<KeyedCall>,
) -> Result<Created, ServiceError> {
    let fresh = VmUid::new(Uuid::now_v7());
    let vm_id = match request.vm_id.as_str() {
        "" => VmId::generated(fresh),
        text => match text.parse::<VmId>() {
            Ok(vm_id) => vm_id,
            Err(invalid) => return Err(refuse_name(shared, fresh, &request, &invalid.to_string()).await),
        },
    };
    // The lock is held to the end of the call. Of two calls with one name, the second therefore
    // sees the VM of the first and is answered as a repetition.
    let lock = shared.names.of(&vm_id);
    let _creating = lock.lock().await;
    if let Some(existing) = shared.index.get(&vm_id) {
        return answer_repeated_call(shared, existing.record, &request.requested);
    }
    let mut spare = None;
    if let Ok(backend) = shared.backends.get(&request.requested.backend) {
        // If the backend cannot create VMs at all, the other problems of the request do not matter.
        places::refuse_import_only(&*backend)?;
        spare = spares::reserve(shared, &backend);
    }
    // The uid is chosen before the checks, because MACs and TAP names are derived from it. If a
    // check fails, the reservation is dropped and the spare VMM is free again.
    let uid = spare.as_ref().and_then(SpareReservation::uid).unwrap_or(fresh);
    let CheckedRequest { config, report, accepted } = check_config(shared, uid, &request.requested).await?;
    let Some(backend) = accepted.filter(|_| report.is_ok()) else {
        return Err(refusal(report));
    };
    // The lock of the places in `claim` is held until the VM is in the index, so that no other VM
    // gets the same place.
    let claim = places::claim(shared, &*backend).await?;
    let mut record = new_record(shared, uid, vm_id, &*backend, request.requested, config);
    if let Some(claim) = &claim {
        record.kind.clone_from(&claim.place);
    }
    point(FaultPoint::CreateChecked);
    let kept = key.map(|call| answer_to(call, &record, &report.warnings));
    let answer = if kept.is_some() { AnswerState::Kept } else { AnswerState::Open };
    let committed = put_on_record(shared, &record, request.caller, spare, kept).await?;
    let shown = start_actor(shared, record, backend, committed);
    Ok(Created { record: shown, warnings: report.warnings, answer })
}

/// Returns the answer to the call that creates the VM of `record`.
fn answer_to(call: KeyedCall, record: &VmRecord, warnings: &[Warning]) -> KeptAnswer {
    let warnings = warnings.iter().cloned().map(Into::into).collect();
    let answer = CallAnswer::Done(Box::new(VmAnswer { warnings, ..VmAnswer::of(record) }));
    KeptAnswer { call, time_ms: record.modified_ms, answer }
}

/// Refuses a name that is not legal, together with all other problems of the request.
async fn refuse_name(shared: &Shared, uid: VmUid, request: &CreateRequest, invalid: &str) -> ServiceError {
    let mut report = CheckReport::default();
    report.reject("vm_id", invalid);
    if let Ok(checked) = check_config(shared, uid, &request.requested).await {
        report.merge(checked.report);
    }
    ServiceError::Invalid(report.into_violations())
}

/// Returns the record of a VM that has just been created.
fn new_record(
    shared: &Shared,
    uid: VmUid,
    vm_id: VmId,
    backend: &dyn Backend,
    requested: VmRequest,
    config: VmConfig,
) -> VmRecord {
    let now = now_ms();
    VmRecord {
        uid,
        vm_id,
        backend: backend.capabilities().name.clone(),
        requested: PackedVmRequest::pack(&requested),
        config,
        state: VmState::Created,
        status: Status::plain(Phase::Created, now),
        generation: 1,
        created_ms: shared.index.creation_time(now),
        modified_ms: now,
        intent: None,
        run: None,
        owns_console_output: false,
        ended_by: None,
        kind: backend.kind_of_new(uid),
        imported: false,
        unrepresented: Vec::new(),
        pending: Some(PendingWork::default()),
        keyed: None,
    }
}

/// Commits a new VM and its event. The spare VMM that was reserved for it is used, or discarded
/// if it may be lost.
async fn put_on_record(
    shared: &Shared,
    record: &VmRecord,
    caller: Caller,
    spare: Option<SpareReservation>,
    kept: Option<KeptAnswer>,
) -> Result<CommitReceipt, ServiceError> {
    let event = NewEvent {
        time_ms: record.modified_ms,
        vm_id: record.vm_id.clone(),
        uid: record.uid,
        kind: EventKind::Created,
        state: record.state,
        status: record.status.clone(),
        cause: Cause::CreateVm,
        caller,
        ended_by: None,
        metadata: record.config.metadata.clone(),
        update: None,
        summary: Some(VmSummary::of(record)),
    };
    let insert =
        Commit { change: RecordChange::Insert(Box::new(record.clone())), event: Some(event.clone()) };
    let key = kept.as_ref().map(|kept| kept.call.id.clone());
    let committed = match kept {
        None => shared.events.commit(insert).await,
        Some(kept) => shared.events.commit_keyed(insert, KeyChange::Keep(Box::new(kept)), false).await,
    };
    let committed = match committed {
        Ok(committed) => committed,
        Err(error) => {
            // The VM may be on record although the client gets an error. The spare VMM is ended,
            // because its uid may be in use, and the record is removed, because the client believes
            // that there is no VM.
            if error.effect != Effect::NotApplied {
                if let Some(spare) = spare {
                    spare.discard().await;
                }
                take_back(shared, record, event, key).await;
            }
            return Err(error.into());
        }
    };
    point(FaultPoint::CreateCommitted);
    if let Some(spare) = spare {
        spare.keep_for_boot();
    }
    Ok(committed)
}

/// Starts the actor of a VM that is on record, and puts the VM into the index.
fn start_actor(
    shared: &Arc<Shared>,
    record: VmRecord,
    backend: Arc<dyn Backend>,
    committed: CommitReceipt,
) -> Arc<VmRecord> {
    let shown = Arc::new(record);
    let (record, seq) = (Arc::clone(&shown), committed.seq);
    let origin = ActorOrigin::Created;
    NewActor { shared: Arc::clone(shared), record, backend, committed: seq, origin }.start();
    drop(committed);
    point(FaultPoint::CreateShown);
    shown
}

/// Removes a VM that may have been recorded although its creation failed, so that its name is free.
/// The log may contain its creation, so it gets its deletion too.
async fn take_back(shared: &Shared, record: &VmRecord, created: NewEvent, key: Option<String>) {
    let event = NewEvent {
        kind: EventKind::Deleted,
        status: created.status.clone().because(Reason::CreateFailed, "the creation could not be recorded"),
        summary: None,
        ..created
    };
    let removal = Commit { change: RecordChange::Remove(record.uid), event: Some(event) };
    let removed = match key {
        None => shared.events.commit(removal).await,
        Some(id) => shared.events.commit_keyed(removal, KeyChange::Forget(id), false).await,
    };
    if let Err(error) = removed {
        tracing::error!(uid = %record.uid, %error, "a VM whose creation failed may be on record; look for it with ListVms and delete it");
    }
}

/// Returns the refusal of a configuration. A feature that no backend serves yet is UNIMPLEMENTED
/// only if there is no other violation.
fn refusal(report: CheckReport) -> ServiceError {
    match report.violations.as_slice() {
        [only] if only.field == FIRMWARE_FIELD => Failure::NoFirmware(only.clone()).into(),
        _ => ServiceError::Invalid(report.into_violations()),
    }
}

/// Answers a call for a name that exists.
fn answer_repeated_call(
    shared: &Shared,
    existing: Arc<VmRecord>,
    requested: &VmRequest,
) -> Result<Created, ServiceError> {
    if existing.requested != PackedVmRequest::pack(requested) {
        return Err(ServiceError::AlreadyExists(existing.vm_id.clone()));
    }
    let leaving = existing.intent.as_ref().is_some_and(Intent::is_deletion);
    if leaving {
        return Err(Failure::BeingDeleted { vm_id: existing.vm_id.clone() }.into());
    }
    let warnings = match VmSpec::parse(&existing.config) {
        Ok(spec) => {
            let backend = shared.backends.get(existing.backend.as_str()).ok();
            check_spec(shared, backend.as_deref(), &spec, existing.uid).warnings
        }
        // A release that does not understand the configuration has no warnings about it.
        Err(_) => Vec::new(),
    };
    Ok(Created { record: existing, warnings, answer: AnswerState::Open })
}
