//! WriteConsole.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, ConsoleInputError, ConsoleInputFailure};
use vmm_core::kind::VmKind;
use vmm_core::state::Phase;
use vmm_core::store::VmRecord;

use super::ConsoleFile;
use crate::error::ServiceError;
use crate::shared::Shared;

/// The most bytes of one call.
const MAX_BYTES: usize = 64 << 10;
/// The time in which the console must take the bytes of one call.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// Writes `data` into the console of a VM.
pub(crate) async fn write(shared: &Shared, vm_id: &str, data: &[u8]) -> Result<(), ServiceError> {
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
        return Err(ServiceError::not_legal("WriteConsole", &record));
    }
    let unreachable = || {
        ServiceError::unavailable(format!(
            "VM \"{}\" is unreachable ({}): its VMM may still run it. Try again, or use force to end it",
            record.vm_id, record.status.message
        ))
    };
    if record.status.phase == Phase::Unreachable {
        return Err(unreachable());
    }
    let vmm = shared.index.held_vmm(record.uid).ok_or_else(unreachable)?;
    let input = vmm.console_input().ok_or_else(|| no_input(&record))?;
    input.write_console(data, WRITE_TIMEOUT).await.map_err(|error| failed(&record, data.len(), &error))
}

/// Returns the error for a VMM whose console takes no input.
fn no_input(record: &VmRecord) -> ServiceError {
    let why = match &record.kind {
        VmKind::Managed => "its VMM offers no way to write to it",
        _ => "another program started its VMM and has the VMM's input",
    };
    ServiceError::unsupported(format!("the console of VM \"{}\" takes no input: {why}", record.vm_id))
}

fn failed(record: &VmRecord, bytes: usize, error: &ConsoleInputError) -> ServiceError {
    let (vm_id, taken) = (&record.vm_id, error.taken);
    match &error.cause {
        ConsoleInputFailure::Unread => ServiceError::deadline(format!(
            "the guest of VM \"{vm_id}\" does not read its console: {taken} of {bytes} bytes were taken within {} s; send \
             the rest when the guest reads",
            WRITE_TIMEOUT.as_secs()
        )),
        ConsoleInputFailure::Failed(cause) if cause.kind == BackendErrorKind::Gone => {
            ServiceError::unavailable(format!(
                "the VMM of VM \"{vm_id}\" has ended, or is being replaced: {taken} of {bytes} bytes were taken; try again"
            ))
        }
        ConsoleInputFailure::Failed(cause) => {
            ServiceError::from_backend("write to the console of", vm_id, cause)
        }
    }
}
