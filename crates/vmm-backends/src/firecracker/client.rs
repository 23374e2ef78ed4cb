//! Firecracker's API as Rust methods, one for each request in use.

use std::path::Path;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, GuestState};
use vmm_host::fault::{FaultPoint, point};

use super::convert::FirecrackerConfig;
use crate::program::reported_version;
use crate::rest::client::{BOOT_TIMEOUT, CALL_TIMEOUT, ErrorText, RestApi, RestClient};

/// The API of one Firecracker.
#[derive(Debug)]
pub struct FirecrackerClient(RestClient);

/// Firecracker's answer about itself.
#[derive(Debug, Deserialize)]
struct InstanceInfo {
    state: InstanceState,
    vmm_version: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

impl InstanceState {
    const fn guest(self) -> GuestState {
        match self {
            Self::NotStarted => GuestState::Ended,
            Self::Running => GuestState::Running,
            Self::Paused => GuestState::Paused,
        }
    }
}

#[derive(Serialize)]
struct ActionBody {
    action_type: &'static str,
}

#[derive(Serialize)]
struct SerialBody<'a> {
    serial_out_path: &'a Path,
}

#[derive(Serialize)]
struct MetricsBody<'a> {
    metrics_path: &'a Path,
}

#[derive(Serialize)]
struct StateBody {
    state: &'static str,
}

/// An error answer of Firecracker.
#[derive(Deserialize)]
struct ErrorBody {
    fault_message: String,
}

impl From<RestClient> for FirecrackerClient {
    fn from(client: RestClient) -> Self {
        Self(client)
    }
}

#[async_trait]
impl RestApi for FirecrackerClient {
    const EXPLAIN: ErrorText = explain;

    async fn version(&self) -> Result<String, BackendError> {
        self.instance().await.map(|(_, version)| version)
    }

    async fn instance(&self) -> Result<(GuestState, String), BackendError> {
        let instance: InstanceInfo = self.0.get("/").await?;
        Ok((instance.state.guest(), reported_version(&instance.vmm_version)))
    }
}

impl FirecrackerClient {
    /// Closes the connection as [`RestClient::hang_up`] does.
    pub(crate) fn hang_up(&self) {
        self.0.hang_up();
    }

    /// Sends the configuration of a VM without starting it.
    ///
    /// # Errors
    /// Fails as [`RestClient::put`] does. The same holds for all methods below.
    pub(crate) async fn configure(&self, config: &FirecrackerConfig) -> Result<(), BackendError> {
        self.0.put("/machine-config", Some(&config.machine), CALL_TIMEOUT).await?;
        self.0.put("/boot-source", Some(&config.boot), CALL_TIMEOUT).await?;
        point(FaultPoint::LaunchPartlyConfigured);
        for drive in &config.drives {
            self.0.put(&format!("/drives/{}", drive.drive_id), Some(drive), CALL_TIMEOUT).await?;
        }
        for interface in &config.interfaces {
            let path = format!("/network-interfaces/{}", interface.iface_id);
            self.0.put(&path, Some(interface), CALL_TIMEOUT).await?;
        }
        Ok(())
    }

    /// Sets the file of the serial port's output. Firecracker writes from the beginning of the
    /// file.
    pub(crate) async fn write_console_to(&self, file: &Path) -> Result<(), BackendError> {
        self.0.put("/serial", Some(&SerialBody { serial_out_path: file }), CALL_TIMEOUT).await
    }

    /// Sets the file of the counters.
    pub(crate) async fn write_metrics_to(&self, file: &Path) -> Result<(), BackendError> {
        self.0.put("/metrics", Some(&MetricsBody { metrics_path: file }), CALL_TIMEOUT).await
    }

    /// Reads the VM's configuration in Firecracker's own form.
    pub(crate) async fn describe(&self) -> Result<serde_json::Value, BackendError> {
        self.0.get("/vm/config").await
    }

    /// Starts the guest. Its CPUs run when this returns.
    pub(crate) async fn start(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&ActionBody { action_type: "InstanceStart" }), BOOT_TIMEOUT).await
    }

    /// Waits until a Firecracker with a configuration file has started its guest. Firecracker answers
    /// no call before.
    pub(crate) async fn wait_for_guest(&self) -> Result<(), BackendError> {
        let instance: InstanceInfo = self.0.get_within("/", BOOT_TIMEOUT).await?;
        match instance.state.guest() {
            GuestState::Running | GuestState::Paused => Ok(()),
            GuestState::Ended => {
                let message = "Firecracker answered, and has not started the guest of its configuration";
                Err(BackendError::new(BackendErrorKind::Protocol, Effect::Unknown, message))
            }
        }
    }

    /// Stops the guest's CPUs. Succeeds if they are stopped already.
    pub(crate) async fn pause(&self) -> Result<(), BackendError> {
        self.0.patch("/vm", &StateBody { state: "Paused" }).await
    }

    /// Starts the guest's CPUs. Succeeds if they run already.
    pub(crate) async fn resume(&self) -> Result<(), BackendError> {
        self.0.patch("/vm", &StateBody { state: "Resumed" }).await
    }

    /// Presses Ctrl+Alt+Del. Success does not mean that the guest reacts.
    pub(crate) async fn ctrl_alt_del(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&ActionBody { action_type: "SendCtrlAltDel" }), CALL_TIMEOUT).await
    }

    /// Makes Firecracker write its counters to the metrics file.
    pub(crate) async fn flush_metrics(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&ActionBody { action_type: "FlushMetrics" }), CALL_TIMEOUT).await
    }
}

fn explain(body: &[u8]) -> Option<String> {
    serde_json::from_slice::<ErrorBody>(body).ok().map(|fault| fault.fault_message)
}
