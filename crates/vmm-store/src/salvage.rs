//! Reads the readable part of a row that this program cannot read in full, such as a row with a
//! value of a newer release.
//!
//! An unreadable row concerns one VM or one event. The service lists the VM as not adopted, with
//! its name, its disks and its process, so that a forced call can end it. The event keeps its
//! position in the log, because a watch relies on positions without gaps.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::intent::{Intent, IntentKind};
use vmm_core::reason::Reason;
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{
    HostClaim, PackedVmRequest, ProcessIdentity, RunRecord, Tombstone, VmRecord, VmRequest,
};

use crate::codec::{EncodedEvent, EncodedRecord};

/// Returns the readable part of a record. `None` if the key of the row is not legal.
pub(crate) fn record(row: &EncodedRecord) -> Option<VmRecord> {
    let uid: VmUid = row.uid.parse().ok()?;
    let vm_id: VmId = row.vm_id.parse().ok()?;
    let object = JsonFields::of(&row.json);
    let run = object.0.get("run").filter(|run| !run.is_null()).map(run_record);
    // A recorded VMM means that the VM ran. Calling it running lets a client force it off, and a
    // forced call asks the process itself.
    let state = if run.is_some() { VmState::Running } else { VmState::Shutdown };
    let state = object.get("state").unwrap_or(state);
    Some(VmRecord {
        uid,
        vm_id,
        backend: object.get("backend").unwrap_or_else(|| BackendName::new("unknown")),
        requested: object.get("requested").unwrap_or_else(|| PackedVmRequest::pack(&VmRequest::default())),
        config: object.get("config").unwrap_or_default(),
        state,
        status: status(&object, state),
        generation: u64::try_from(row.generation).ok()?,
        created_ms: object.get("created_ms").unwrap_or(0),
        modified_ms: object.get("modified_ms").unwrap_or(0),
        intent: object.0.get("intent").filter(|intent| !intent.is_null()).map(intent),
        run,
        owns_console_output: object.get("owns_console_output").unwrap_or(false),
        ended_by: object.get("ended_by").unwrap_or(None),
        // Releases before kinds recorded a place.
        kind: object.get("kind").or_else(|| object.get("place")).unwrap_or_default(),
        imported: object.get("imported").unwrap_or(false),
        unrepresented: object.get("untold").unwrap_or_default(),
        pending: object.get("pending"),
        keyed: object.get("keyed"),
    })
}

/// Returns the readable part of a tombstone: each claim, and the VM's process. `None` if the key is
/// not legal, or neither can be read.
pub(crate) fn tombstone(uid: &str, json: &str) -> Option<Tombstone> {
    let object = JsonFields::of(json);
    let vm = JsonFields(object.0.get("vm").and_then(Value::as_object).cloned().unwrap_or_default());
    let row = EncodedRecord {
        uid: uid.to_owned(),
        vm_id: vm.get("vm_id").unwrap_or_else(|| uid.to_owned()),
        generation: vm.get("generation").unwrap_or(0),
        format: 0,
        json: Value::Object(vm.0).to_string(),
    };
    let part = Tombstone { vm: record(&row)?, claims: claims(&object) };
    (part.vm.run.is_some() || !part.claims.is_empty()).then_some(part)
}

/// Returns the readable part of an operation under way. An operation of an unknown kind is taken
/// for a start, because a start may have left a process, and the claims of that process must stay.
/// No operation of an unreadable VM is continued.
fn intent(intent: &Value) -> Intent {
    let object = JsonFields(intent.as_object().cloned().unwrap_or_default());
    read(intent).unwrap_or_else(|| Intent {
        kind: IntentKind::Boot { claims: claims(&object) },
        caller: read(intent).unwrap_or_else(|| Caller::named("")),
        since_ms: object.get("since_ms").unwrap_or(0),
        scope: object.get("scope"),
    })
}

/// Returns the claims that can be read.
fn claims(object: &JsonFields) -> Vec<HostClaim> {
    object.0.get("claims").and_then(Value::as_array).into_iter().flatten().filter_map(read).collect()
}

/// Returns the readable part of a run. The process matters most, because a forced call ends it, and
/// then the claims, because no other VM may have them.
fn run_record(run: &Value) -> RunRecord {
    let object = JsonFields(run.as_object().cloned().unwrap_or_default());
    // Process 0 does not exist, so its identity is never proven and nothing is signalled.
    let nobody = || ProcessIdentity { pid: 0, start_ticks: 0, boot_id: String::new(), namespaces: None };
    RunRecord {
        process: object.get("process").unwrap_or_else(nobody),
        socket: object.get("socket").unwrap_or_default(),
        version: object.get("version").unwrap_or_default(),
        accelerator: object.get("accelerator").unwrap_or_default(),
        machine: object.get("machine").unwrap_or_default(),
        taps: object.get("taps").unwrap_or_default(),
        started_ms: object.get("started_ms").unwrap_or(0),
        claims: claims(&object),
    }
}

/// Returns the readable part of an event. Its status states `why` the rest cannot be read.
pub(crate) fn event(row: &EncodedEvent, why: &str) -> Option<NewEvent> {
    let object = JsonFields::of(&row.json);
    let state = object.get("state").unwrap_or(VmState::Shutdown);
    let mut status = status(&object, state);
    if status.reason.is_nothing() {
        status.reason = Reason::UnreadableEvent;
    }
    if status.message.is_empty() {
        status.message = format!("this program cannot read the event: {why}");
    }
    Some(NewEvent {
        time_ms: row.time_ms,
        vm_id: row.vm_id.parse().ok()?,
        uid: object.get("uid").unwrap_or_else(|| VmUid::new(uuid::Uuid::nil())),
        kind: object.get("kind").unwrap_or(EventKind::Unknown),
        state,
        status,
        cause: object.get("cause").unwrap_or(Cause::UnreadableEvent),
        caller: read(&Value::Object(object.0.clone())).unwrap_or_else(|| Caller::named("")),
        ended_by: object.get("ended_by").unwrap_or(None),
        metadata: object.get("metadata").unwrap_or_default(),
        update: object.get("update").unwrap_or(None),
        summary: object.get("summary").unwrap_or(None),
    })
}

fn status(object: &JsonFields, state: VmState) -> Status {
    let status = object.0.get("status").and_then(Value::as_object).cloned().unwrap_or_default();
    let status = JsonFields(status);
    Status {
        phase: status.get("phase").unwrap_or(Phase::at_rest(state)),
        reason: status.get("reason").unwrap_or_default(),
        message: status.get("message").unwrap_or_default(),
        observed_at_ms: status.get("observed_at_ms").unwrap_or(0),
        restarts: status.get("restarts").unwrap_or(0),
    }
}

/// A JSON object whose fields are read one by one.
struct JsonFields(Map<String, Value>);

impl JsonFields {
    /// Parses the object in `json`. Text that is no object gives one without fields.
    fn of(json: &str) -> Self {
        Self(serde_json::from_str(json).unwrap_or_default())
    }

    /// Reads one field. `None` if the field is missing or unreadable.
    fn get<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        self.0.get(name).and_then(read)
    }
}

fn read<T: DeserializeOwned>(value: &Value) -> Option<T> {
    T::deserialize(value).ok()
}
