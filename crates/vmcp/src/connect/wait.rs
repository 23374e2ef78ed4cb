//! One call of WaitVm, short enough for a server that has vanished to be noticed.

use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc::client::CallOptions;
use vmm_proto::v1 as pb;

use super::Client;

/// The time that one call waits. A server that has vanished is noticed after that time.
pub(crate) const TURN_INTERVAL: Duration = Duration::from_secs(30);
/// The time that the answer may take beyond the turn.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// Waits for one of `states`, for `turn` rounded up to whole seconds.
///
/// # Errors
///
/// `deadline_exceeded` if the VM is in another state still, and the server's other errors.
pub(crate) async fn turn(
    client: &Client,
    vm_id: &str,
    states: &[pb::VmState],
    turn: Duration,
) -> Result<pb::WaitVmResponse, ConnectError> {
    let whole_seconds = i32::try_from(turn.as_millis().div_ceil(1000)).unwrap_or(1).max(1);
    let request = pb::WaitVmRequest {
        vm_id: vm_id.to_owned(),
        states: states.iter().map(|state| (*state).into()).collect(),
        timeout_seconds: whole_seconds,
        ..Default::default()
    };
    let options = CallOptions::default().with_timeout(turn + ANSWER_LIMIT);
    Ok(client.wait_vm_with_options(request, options).await?.into_owned())
}
