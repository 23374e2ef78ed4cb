//! WaitVm: until a VM is in a state. Each VM's place in the index tells its followers of every change, so nobody asks again and
//! again.

use std::sync::Arc;
use std::time::Duration;

use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::index::Index;

/// Waits until the VM that bears `vm_id` now is in one of `states`, at most for `deadline`. A later namesake is another VM.
pub(crate) async fn wait(
    index: &Index,
    vm_id: &str,
    states: &[VmState],
    deadline: Duration,
) -> Result<Arc<VmRecord>, ServiceError> {
    if states.is_empty() {
        return Err(ServiceError::invalid("states", "must name at least one state to wait for"));
    }
    let unknown = || ServiceError::NotFound(vm_id.to_owned());
    let mut vm = vm_id.parse().ok().and_then(|id| index.follow(&id)).ok_or_else(unknown)?;
    let reached = vm.wait_for(|record| states.contains(&record.state));
    match tokio::time::timeout(deadline, reached).await {
        Ok(Ok(record)) => return Ok(Arc::clone(&record)),
        Ok(Err(_)) => return Err(unknown()),
        Err(_) => {}
    }
    let record = Arc::clone(&vm.borrow());
    let wanted: Vec<_> = states.iter().map(|state| state.name()).collect();
    Err(ServiceError::Deadline(format!(
        "VM \"{vm_id}\" is in state {} ({}), and did not come to {} within {:.1} s; wait again, or see what keeps it with GetVmInfo",
        record.state.name(),
        record.status.phase.as_str(),
        wanted.join(" or "),
        deadline.as_secs_f32(),
    )))
}
