//! WriteConsole.

use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, ConsoleInputError, ConsoleInputFailure};
use vmm_core::kind::VmKind;
use vmm_core::state::Phase;
use vmm_core::store::VmRecord;
use vmm_host::fault::{FaultPoint, point};

use super::ConsoleFile;
use crate::error::ServiceError;
use crate::failure::{ConsoleFailure, Failure};
use crate::shared::Shared;

/// The most bytes of one call.
const MAX_BYTES: usize = 64 << 10;
/// The time in which the console must take the bytes of one call.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// Writes `data` into the console of a VM, and returns the record of the VM.
pub(crate) async fn write(shared: &Shared, vm_id: &str, data: &[u8]) -> Result<Arc<VmRecord>, ServiceError> {
    let found = vm_id.parse().ok().and_then(|id| shared.index.get(&id));
    let record = found.ok_or_else(|| ServiceError::not_found(vm_id))?.record;
    if data.len() > MAX_BYTES {
        let text = format!("has {} bytes, and one call takes at most {MAX_BYTES}: send several", data.len());
        return Err(ServiceError::invalid("data", text));
    }
    if !record.imported {
        ConsoleFile::of_record(&record, &shared.settings.runtime_dir)?;
    }
    if !record.state.is_live() {
        let (vm_id, state) = (record.vm_id.clone(), record.state);
        return Err(Failure::NotLegal { method: "WriteConsole", vm_id, state }.into());
    }
    let unreachable =
        || Failure::OutOfReach { vm_id: record.vm_id.clone(), message: record.status.message.clone() };
    if record.status.phase == Phase::Unreachable {
        return Err(unreachable().into());
    }
    let vmm = shared.index.held_vmm(record.uid).ok_or_else(unreachable)?;
    let input = vmm.console_input().ok_or_else(|| no_input(&record))?;
    let written = input.write_console(data, WRITE_TIMEOUT).await;
    point(FaultPoint::ConsoleWritten);
    written.map_err(|error| failed(&record, data.len(), error))?;
    Ok(record)
}

/// Returns the failure for a VMM whose console takes no input.
fn no_input(record: &VmRecord) -> ConsoleFailure {
    let why = match &record.kind {
        VmKind::Managed => "its VMM offers no way to write to it",
        _ => "another program started its VMM and has the VMM's input",
    };
    ConsoleFailure::NoInput { vm_id: record.vm_id.clone(), why }
}

fn failed(record: &VmRecord, bytes: usize, error: ConsoleInputError) -> ConsoleFailure {
    let (vm_id, taken) = (record.vm_id.clone(), error.taken);
    match error.cause {
        ConsoleInputFailure::Unread => ConsoleFailure::Unread { vm_id, taken, bytes, waited: WRITE_TIMEOUT },
        ConsoleInputFailure::Failed(cause) if cause.kind == BackendErrorKind::Gone => {
            ConsoleFailure::VmmGone { vm_id, taken, bytes }
        }
        ConsoleInputFailure::Failed(error) => ConsoleFailure::NotWritten { vm_id, error },
    }
}
