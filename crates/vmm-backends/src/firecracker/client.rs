//! Firecracker's API, typed: one method for each request that is made.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use vmm_core::backend::{BackendError, GuestState};
use vmm_host::fault::{FaultPoint, point};

use super::convert::Config;
use crate::program::told_version;
use crate::rest::client::{BOOT, CALL, RestClient};

/// The API of one Firecracker.
#[derive(Debug)]
pub(crate) struct Client(RestClient);

/// What Firecracker says of itself.
#[derive(Debug, Deserialize)]
struct Instance {
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

#[derive(Serialize)]
struct Action {
    action_type: &'static str,
}

#[derive(Serialize)]
struct Serial<'a> {
    serial_out_path: &'a Path,
}

#[derive(Serialize)]
struct MetricsFile<'a> {
    metrics_path: &'a Path,
}

#[derive(Serialize)]
struct State {
    state: &'static str,
}

/// An error, in Firecracker's words.
#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

impl Client {
    /// The API at `socket`, connected to at the first call.
    pub(crate) fn new(socket: &Path) -> Self {
        Self(RestClient::new(socket, explain))
    }

    /// The same, of which nothing is sent to another process than `pid`.
    pub(crate) fn of_process(self, pid: u32) -> Self {
        Self(self.0.of_process(pid))
    }

    /// Closes the connection, as [`RestClient::hang_up`].
    pub(crate) fn hang_up(&self) {
        self.0.hang_up();
    }

    /// The API at `socket`, to which `stream` is connected.
    ///
    /// # Errors
    /// As [`RestClient::over`].
    pub(crate) async fn over(socket: &Path, stream: UnixStream) -> Result<Self, BackendError> {
        RestClient::over(socket, stream, explain).await.map(Self)
    }

    /// Tells Firecracker what to run, without running it.
    ///
    /// # Errors
    /// As [`RestClient::put`], which holds for all that follow.
    pub(crate) async fn configure(&self, config: &Config) -> Result<(), BackendError> {
        self.0.put("/machine-config", Some(&config.machine), CALL).await?;
        self.0.put("/boot-source", Some(&config.boot), CALL).await?;
        point(FaultPoint::LaunchPartlyConfigured);
        for drive in &config.drives {
            self.0.put(&format!("/drives/{}", drive.drive_id), Some(drive), CALL).await?;
        }
        for interface in &config.interfaces {
            let path = format!("/network-interfaces/{}", interface.iface_id);
            self.0.put(&path, Some(interface), CALL).await?;
        }
        Ok(())
    }

    /// Tells Firecracker where the serial port's output goes. It writes from the beginning of the file.
    pub(crate) async fn write_console_to(&self, file: &Path) -> Result<(), BackendError> {
        self.0.put("/serial", Some(&Serial { serial_out_path: file }), CALL).await
    }

    /// Tells Firecracker where its counters go.
    pub(crate) async fn write_metrics_to(&self, file: &Path) -> Result<(), BackendError> {
        self.0.put("/metrics", Some(&MetricsFile { metrics_path: file }), CALL).await
    }

    /// Asks what it was told to run, in its own words.
    pub(crate) async fn describe(&self) -> Result<serde_json::Value, BackendError> {
        self.0.get("/vm/config").await
    }

    /// Starts the guest; its CPUs run when this answers.
    pub(crate) async fn start(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&Action { action_type: "InstanceStart" }), BOOT).await
    }

    /// Stops the guest's CPUs. Harmless where they stand still.
    pub(crate) async fn pause(&self) -> Result<(), BackendError> {
        self.0.patch("/vm", &State { state: "Paused" }).await
    }

    /// Lets the guest's CPUs go on. Harmless where they run.
    pub(crate) async fn resume(&self) -> Result<(), BackendError> {
        self.0.patch("/vm", &State { state: "Resumed" }).await
    }

    /// Presses Ctrl+Alt+Del. Says nothing about what the guest makes of it.
    pub(crate) async fn ctrl_alt_del(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&Action { action_type: "SendCtrlAltDel" }), CALL).await
    }

    /// Writes the counters to the metrics file.
    pub(crate) async fn flush_metrics(&self) -> Result<(), BackendError> {
        self.0.put("/actions", Some(&Action { action_type: "FlushMetrics" }), CALL).await
    }

    /// Asks what the guest is doing, and which version this is. A guest that was never started counts as ended.
    pub(crate) async fn instance(&self) -> Result<(GuestState, String), BackendError> {
        let instance: Instance = self.0.get("/").await?;
        let state = match instance.state {
            InstanceState::NotStarted => GuestState::Ended,
            InstanceState::Running => GuestState::Running,
            InstanceState::Paused => GuestState::Paused,
        };
        Ok((state, told_version(&instance.vmm_version)))
    }
}

fn explain(body: &[u8]) -> Option<String> {
    serde_json::from_slice::<Fault>(body).ok().map(|fault| fault.fault_message)
}
