//! Cloud Hypervisor's API as Rust methods, one for each request in use.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::Deserialize;
use vmm_core::backend::{BackendError, BackendErrorKind, GuestState, NetworkCounters, StorageCounters};

use super::convert::CloudHypervisorConfig;
use crate::program::reported_version;
use crate::rest::client::{BOOT_TIMEOUT, CALL_TIMEOUT, ErrorText, RestApi, RestClient};

/// The API of one Cloud Hypervisor.
#[derive(Debug)]
pub struct CloudHypervisorClient(RestClient);

/// The body of a request without one.
type NoRequestBody = ();

#[derive(Debug, Deserialize)]
struct Ping {
    version: String,
}

#[derive(Debug, Deserialize)]
struct VmInfo {
    state: VmInfoState,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum VmInfoState {
    Created,
    Running,
    Shutdown,
    Paused,
    /// Stopped by a debugger.
    BreakPoint,
}

impl VmInfoState {
    fn guest(self) -> GuestState {
        match self {
            Self::Running => GuestState::Running,
            Self::Paused | Self::BreakPoint => GuestState::Paused,
            Self::Created | Self::Shutdown => GuestState::Ended,
        }
    }
}

#[derive(Debug, Deserialize)]
struct VmDescription {
    state: VmInfoState,
    config: serde_json::Value,
}

/// Counters by device, and then by name.
#[derive(Debug, Deserialize)]
pub(crate) struct DeviceCounters(BTreeMap<String, BTreeMap<String, u64>>);

impl DeviceCounters {
    /// Returns the disk counters, summed over all disks.
    pub(crate) fn storage(&self) -> StorageCounters {
        StorageCounters {
            bytes_read: self.sum("read_bytes"),
            bytes_written: self.sum("write_bytes"),
            read_operations: self.sum("read_ops"),
            write_operations: self.sum("write_ops"),
        }
    }

    /// Returns the network counters, summed over all interfaces.
    pub(crate) fn network(&self) -> NetworkCounters {
        NetworkCounters {
            bytes_received: self.sum("rx_bytes"),
            bytes_transmitted: self.sum("tx_bytes"),
            packets_received: self.sum("rx_frames"),
            packets_transmitted: self.sum("tx_frames"),
        }
    }

    /// Sums a counter over all devices. The name of the counter selects the kind of device, because
    /// another client may have chosen the names of the devices.
    fn sum(&self, counter: &str) -> u64 {
        self.0
            .values()
            .filter_map(|counters| counters.get(counter))
            .fold(0, |sum, more| sum.saturating_add(*more))
    }
}

impl From<RestClient> for CloudHypervisorClient {
    fn from(client: RestClient) -> Self {
        Self(client)
    }
}

#[async_trait]
impl RestApi for CloudHypervisorClient {
    const EXPLAIN: ErrorText = explain;

    async fn version(&self) -> Result<String, BackendError> {
        self.0.get::<Ping>("/api/v1/vmm.ping").await.map(|ping| reported_version(&ping.version))
    }

    async fn instance(&self) -> Result<(GuestState, String), BackendError> {
        Ok((self.state().await?, self.version().await?))
    }
}

impl CloudHypervisorClient {
    /// Closes the connection as [`RestClient::hang_up`] does.
    pub(crate) fn hang_up(&self) {
        self.0.hang_up();
    }

    /// Creates the VM without starting it.
    ///
    /// # Errors
    /// Fails as [`RestClient::get`] and [`RestClient::put`] do. The same holds for all methods
    /// below.
    pub(crate) async fn create(&self, config: &CloudHypervisorConfig) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.create", Some(config), CALL_TIMEOUT).await
    }

    /// Starts the guest. Its CPUs run when this returns.
    pub(crate) async fn boot(&self) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.boot", None::<&NoRequestBody>, BOOT_TIMEOUT).await
    }

    /// Stops the guest's CPUs. Returns an error if they are stopped already.
    pub(crate) async fn pause(&self) -> Result<(), BackendError> {
        self.order("vm.pause").await
    }

    /// Starts the guest's CPUs. Returns an error if they run already.
    pub(crate) async fn resume(&self) -> Result<(), BackendError> {
        self.order("vm.resume").await
    }

    /// Resets the guest in place.
    pub(crate) async fn reboot(&self) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.reboot", None::<&NoRequestBody>, BOOT_TIMEOUT).await
    }

    /// Presses the ACPI power button. Success does not mean that the guest reacts.
    pub(crate) async fn power_button(&self) -> Result<(), BackendError> {
        self.order("vm.power-button").await
    }

    /// Powers the VM off. The VMM keeps the VM, which can be booted again.
    pub(crate) async fn shutdown(&self) -> Result<(), BackendError> {
        self.order("vm.shutdown").await
    }

    /// Makes the VMM forget the VM.
    pub(crate) async fn delete(&self) -> Result<(), BackendError> {
        self.order("vm.delete").await
    }

    /// Asks which VM the VMM holds. Returns the state and the configuration in the VMM's own form,
    /// or `None` without a VM.
    pub(crate) async fn describe(&self) -> Result<Option<(GuestState, serde_json::Value)>, BackendError> {
        match self.0.get::<VmDescription>("/api/v1/vm.info").await {
            Ok(reported) => Ok(Some((reported.state.guest(), reported.config))),
            Err(error) if is_no_vm(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Powers the VM off and ends the process.
    pub(crate) async fn end(&self) -> Result<(), BackendError> {
        self.order("vmm.shutdown").await
    }

    /// Asks for the state of the guest. A VM that does not run, or does not exist, counts as ended.
    pub(crate) async fn state(&self) -> Result<GuestState, BackendError> {
        // A VMM without a VM answers with an error. It holds nothing that runs, so it counts as
        // ended.
        let info: VmInfo = match self.0.get("/api/v1/vm.info").await {
            Err(error) if is_no_vm(&error) => return Ok(GuestState::Ended),
            answer => answer?,
        };
        Ok(info.state.guest())
    }

    /// Reads the counters of all devices since the guest last started.
    pub(crate) async fn counters(&self) -> Result<DeviceCounters, BackendError> {
        self.0.get("/api/v1/vm.counters").await
    }

    async fn order(&self, name: &str) -> Result<(), BackendError> {
        self.0.put(&format!("/api/v1/{name}"), None::<&NoRequestBody>, CALL_TIMEOUT).await
    }
}

/// The error message of a VMM that has no VM, as after an interrupted launch.
const NO_VM: &str = "VM is not created";

fn is_no_vm(error: &BackendError) -> bool {
    error.kind == BackendErrorKind::Rejected && error.message.contains(NO_VM)
}

/// Joins the sentences of an error answer, which go from the general to the particular.
fn explain(body: &[u8]) -> Option<String> {
    let chain: Vec<String> = serde_json::from_slice(body).ok()?;
    // The first sentence is always "Error from API", so it is left out.
    let reported = if chain.len() > 1 { &chain[1..] } else { &chain[..] };
    (!reported.is_empty()).then(|| reported.join(": "))
}
