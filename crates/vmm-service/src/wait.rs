//! WaitVm: waits until a VM is in a state. The index wakes the waiting calls, so none of them
//! polls.

use std::sync::Arc;
use std::time::Duration;

use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::failure::Failure;
use crate::index::{Index, WaitAnswer};

/// Waits until the VM that bears `vm_id` now is in one of `states`, at most for `timeout`. A later
/// VM of the same name is another VM.
pub(crate) async fn wait(
    index: &Index,
    vm_id: &str,
    states: &[VmState],
    timeout: Duration,
) -> Result<Arc<VmRecord>, ServiceError> {
    if states.is_empty() {
        return Err(ServiceError::invalid("states", "must name at least one state to wait for"));
    }
    let unknown = || ServiceError::not_found(vm_id);
    let wanted = VmState::ALL.map(|state| states.contains(&state));
    let wait = vm_id.parse().ok().and_then(|id| index.wait(&id, wanted)).ok_or_else(unknown)?;
    let (uid, mut waiter) = match wait {
        WaitAnswer::Over(record) => return Ok(record),
        WaitAnswer::Begun(uid, waiter) => (uid, waiter),
    };
    match tokio::time::timeout(timeout, waiter.wait_for(Option::is_some)).await {
        Ok(Ok(found)) => return found.clone().ok_or_else(unknown),
        Ok(Err(_)) => return Err(unknown()),
        Err(_) => {}
    }
    let record = index.record(uid).ok_or_else(unknown)?;
    let wanted: Vec<_> = VmState::ALL.into_iter().filter(|state| states.contains(state)).collect();
    let (vm_id, state, phase) = (record.vm_id.clone(), record.state, record.status.phase);
    Err(Failure::WaitTimedOut { vm_id, state, phase, wanted, waited: timeout }.into())
}
