//! The failures of StreamConsole and WriteConsole.

use std::path::PathBuf;
use std::time::Duration;

use vmm_core::backend::BackendError;
use vmm_core::id::VmId;
use vmm_core::report::FieldReport;

use crate::error::list;

/// A failure of a console.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleFailure {
    #[error(
        "the console of VM \"{vm_id}\" is not kept: another program made the VM, and its console is where that program has put it"
    )]
    NotKept { vm_id: VmId },
    #[error("the console of VM \"{vm_id}\" is not known: {}", list(problems))]
    NotKnown { vm_id: VmId, problems: Vec<FieldReport> },
    #[error("VM \"{vm_id}\" has no console, because its config.console.enabled is false")]
    Disabled { vm_id: VmId },
    #[error("the console's file {} cannot be read: {why}; try again", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error(
        "offset: {offset} is past the end of the console's output, {end}; the output begins anew after a reboot of the host: \
         begin without an offset"
    )]
    PastTheEnd { offset: u64, end: u64 },
    #[error("the console of VM \"{vm_id}\" takes no input: {why}")]
    NoInput { vm_id: VmId, why: &'static str },
    #[error(
        "the guest of VM \"{vm_id}\" does not read its console: {taken} of {bytes} bytes were taken within {} s; send the rest \
         when the guest reads",
        waited.as_secs()
    )]
    Unread { vm_id: VmId, taken: usize, bytes: usize, waited: Duration },
    #[error(
        "the VMM of VM \"{vm_id}\" has ended, or is being replaced: {taken} of {bytes} bytes were taken; try again"
    )]
    VmmGone { vm_id: VmId, taken: usize, bytes: usize },
    #[error("could not write to the console of VM \"{vm_id}\": {error}")]
    NotWritten {
        vm_id: VmId,
        #[source]
        error: BackendError,
    },
}
