//! Cloud Hypervisor's API, typed: one method for each request that is made.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use tokio::net::UnixStream;
use vmm_core::backend::{BackendError, BackendErrorKind, GuestState, NetworkCounters, StorageCounters};

use super::convert::Config;
use crate::rest::client::{BOOT, CALL, RestClient};

/// The API of one Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct Client(RestClient);

/// What a request without a body carries.
type Nothing = ();

#[derive(Debug, Deserialize)]
struct Ping {
    version: String,
}

#[derive(Debug, Deserialize)]
struct Info {
    state: State,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum State {
    Created,
    Running,
    Shutdown,
    Paused,
    /// In a debugger's hands.
    BreakPoint,
}

/// Counters by device, and by name.
#[derive(Debug, Deserialize)]
pub(super) struct Counters(BTreeMap<String, BTreeMap<String, u64>>);

impl Counters {
    /// Disk counters over all disks.
    pub(super) fn storage(&self) -> StorageCounters {
        StorageCounters {
            bytes_read: self.sum("disk", "read_bytes"),
            bytes_written: self.sum("disk", "write_bytes"),
            read_operations: self.sum("disk", "read_ops"),
            write_operations: self.sum("disk", "write_ops"),
        }
    }

    /// Network counters over all interfaces.
    pub(super) fn network(&self) -> NetworkCounters {
        NetworkCounters {
            bytes_received: self.sum("net", "rx_bytes"),
            bytes_transmitted: self.sum("net", "tx_bytes"),
            packets_received: self.sum("net", "rx_frames"),
            packets_transmitted: self.sum("net", "tx_frames"),
        }
    }

    /// Devices bear the names that the conversion gave them.
    fn sum(&self, kind: &str, counter: &str) -> u64 {
        let devices = self.0.iter().filter(|(device, _)| device.starts_with(kind));
        devices
            .filter_map(|(_, counters)| counters.get(counter))
            .fold(0, |sum, more| sum.saturating_add(*more))
    }
}

impl Client {
    /// The API at `socket`, connected to at the first call.
    pub(super) fn new(socket: &Path) -> Self {
        Self(RestClient::new(socket, explain))
    }

    /// The API at `socket`, to which `stream` is connected.
    ///
    /// # Errors
    /// As [`RestClient::over`].
    pub(super) async fn over(socket: &Path, stream: UnixStream) -> Result<Self, BackendError> {
        RestClient::over(socket, stream, explain).await.map(Self)
    }

    /// Asks for the version.
    ///
    /// # Errors
    /// As [`RestClient::get`] and [`RestClient::put`], which holds for all that follow.
    pub(super) async fn version(&self) -> Result<String, BackendError> {
        self.0.get::<Ping>("/api/v1/vmm.ping").await.map(|ping| ping.version)
    }

    /// Makes the VM, without running it.
    pub(super) async fn create(&self, config: &Config) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.create", Some(config), CALL).await
    }

    /// Starts the guest; its CPUs run when this answers.
    pub(super) async fn boot(&self) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.boot", None::<&Nothing>, BOOT).await
    }

    /// Stops the guest's CPUs; an error where they stand still.
    pub(super) async fn pause(&self) -> Result<(), BackendError> {
        self.order("vm.pause").await
    }

    /// Lets the guest's CPUs go on; an error where they run.
    pub(super) async fn resume(&self) -> Result<(), BackendError> {
        self.order("vm.resume").await
    }

    /// Resets the guest in place.
    pub(super) async fn reboot(&self) -> Result<(), BackendError> {
        self.0.put("/api/v1/vm.reboot", None::<&Nothing>, BOOT).await
    }

    /// Presses the ACPI power button. Says nothing about what the guest makes of it.
    pub(super) async fn power_button(&self) -> Result<(), BackendError> {
        self.order("vm.power-button").await
    }

    /// Powers the VM off and ends the process.
    pub(super) async fn end(&self) -> Result<(), BackendError> {
        self.order("vmm.shutdown").await
    }

    /// Asks what the guest is doing. One that was made and does not run, or was never made, counts as ended.
    pub(super) async fn state(&self) -> Result<GuestState, BackendError> {
        let info: Info = match self.0.get("/api/v1/vm.info").await {
            Err(error) if error.kind == BackendErrorKind::Rejected && error.message.contains(NO_VM) => {
                return Ok(GuestState::Ended);
            }
            answer => answer?,
        };
        Ok(match info.state {
            State::Running => GuestState::Running,
            State::Paused | State::BreakPoint => GuestState::Paused,
            State::Created | State::Shutdown => GuestState::Ended,
        })
    }

    /// Reads the counters of all devices since the guest last started.
    pub(super) async fn counters(&self) -> Result<Counters, BackendError> {
        self.0.get("/api/v1/vm.counters").await
    }

    async fn order(&self, name: &str) -> Result<(), BackendError> {
        self.0.put(&format!("/api/v1/{name}"), None::<&Nothing>, CALL).await
    }
}

/// What a VMM says that was started and given nothing to run, as after a launch that was cut short.
const NO_VM: &str = "VM is not created";

/// An error is a list of sentences, from the general to the particular.
fn explain(body: &[u8]) -> Option<String> {
    let chain: Vec<String> = serde_json::from_slice(body).ok()?;
    // The first says "Error from API" and nothing else.
    let told = if chain.len() > 1 { &chain[1..] } else { &chain[..] };
    (!told.is_empty()).then(|| told.join(": "))
}
