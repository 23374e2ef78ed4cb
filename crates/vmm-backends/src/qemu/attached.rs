//! QEMUs that another program started, reached by their QMP socket. They are imported, never
//! created.
//!
//! ```text
//!   Vmm ── QemuLink ── QMP ──► the attached QEMU   serves one client: the daemon
//!    ▲                            │
//!    └── QemuMonitor ◄── events ──┘   RESET, STOP, RESUME, SHUTDOWN
//! ```
//!
//! QEMU sends an event for every change of its guest, so nothing is polled. Calls that end the
//! process (`quit`, a signal) are left to force. A reset is refused if QEMU's command line makes a
//! reset end the process.

mod handle;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use vmm_core::backend::{
    BackendError, BackendErrorKind, Capabilities, Effect, GuestState, LaunchRequest, LaunchedVmm,
    SweepRequest,
};
use vmm_core::capabilities::{
    AcceleratorFact, BackendFacts, ConsoleFact, CreateFact, EndpointMode, PanicFact, RebootFact, ResetFact,
};
use vmm_core::discovery::Places;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_host::endpoint::{EndpointConnection, EndpointError};
use vmm_host::path::shell_word;
use vmm_host::process::Process;

use super::client::RunState;
use super::describe;
use super::link::{QMP_CONNECT_TIMEOUT, QemuLink};
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::{NAME, capabilities};
use crate::attached::{
    AttachedHypervisor, AttachedVmFacts, AttachedVmmParts, GuestPhase, IdentifiedVmm, identify,
};
use crate::program::Version;

/// The variable of the setting that names the sockets.
const SETTING: &str = "UNKEY_VMCP_QEMU_ENDPOINT";

/// The oldest QEMU whose events give the reason of its end.
const OLDEST: Version = Version::new(4, 2, 0);
/// The most events of QEMU that wait to be read.
const QMP_EVENTS: usize = 256;

/// QEMU with processes that another program started.
#[derive(Debug)]
pub(crate) struct AttachedQemu {
    capabilities: Capabilities,
}

/// The connection to one QEMU.
#[derive(Debug)]
pub(crate) struct AttachedQemuConnection {
    link: Arc<QemuLink>,
    events: Mutex<Option<mpsc::Receiver<QmpEvent>>>,
}

impl AttachedQemuConnection {
    fn new(socket: &Path, process: &Process) -> (Self, mpsc::Sender<QmpEvent>) {
        let (sender, events) = mpsc::channel(QMP_EVENTS);
        let link = QemuLink::new(socket.to_path_buf(), process.pid(), sender.clone());
        (Self { link: Arc::new(link), events: Mutex::new(Some(events)) }, sender)
    }

    fn take_events(&self) -> mpsc::Receiver<QmpEvent> {
        let taken = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The events were already taken. The returned channel has no sender, so it reports nothing.
        taken.unwrap_or_else(|| mpsc::channel(1).1)
    }
}

impl AttachedQemu {
    /// Returns the hypervisor with its capabilities.
    pub(crate) fn new() -> Self {
        let mut capabilities = capabilities();
        capabilities.endpoint_mode = EndpointMode::Attached;
        capabilities.facts = BackendFacts {
            accelerator: Some(AcceleratorFact::AsStarted),
            console: Some(ConsoleFact::Elsewhere),
            create: Some(CreateFact::ImportOnly),
            disk_formats: None,
            disk_rate_limits: None,
            guest_panic: Some(PanicFact::AsConfigured),
            guest_reset: Some(ResetFact::InPlaceUnlessConfiguredOtherwise),
            machines: None,
            network_rate_limits: None,
            reboot: Some(RebootFact::InPlaceAtOnce),
            ..capabilities.facts
        };
        Self { capabilities }
    }
}

#[async_trait]
impl AttachedHypervisor for AttachedQemu {
    type Client = AttachedQemuConnection;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn title(&self) -> &'static str {
        "QEMU"
    }

    fn program(&self) -> &'static str {
        "qemu-"
    }

    fn how_to_start(&self, socket: &Path) -> String {
        let socket = format!("unix:{},server=on,wait=off", socket.display());
        format!("qemu-system-x86_64 … -qmp {}", shell_word(&socket))
    }

    fn setting(&self) -> &'static str {
        SETTING
    }

    fn places(&self, sockets: Vec<VmKind>) -> Places {
        Places::Imported {
            places: sockets,
            why: format!(
                "{NAME} is attached to QEMUs that another program started, and a running QEMU is imported, not created: start one \
                 with the socket that {SETTING} names, or unset that to have QEMUs started"
            ),
        }
    }

    fn check(&self, _spec: &VmSpec, _report: &mut CheckReport) {}

    async fn identify(
        &self,
        socket: &Path,
        visit: EndpointConnection,
    ) -> Result<IdentifiedVmm<AttachedQemuConnection>, EndpointError> {
        let (connection, sender) = AttachedQemuConnection::new(socket, &visit.process);
        let qmp = match Qmp::over(visit.stream, QMP_CONNECT_TIMEOUT, sender).await {
            Ok(qmp) => qmp,
            Err(error) => return Err(not_qemu(socket, &error).await),
        };
        let failed = |error: BackendError| EndpointError::Failed(error.message);
        // The link keeps the connection for the handle, because QEMU accepts no second client
        // meanwhile.
        let qmp = connection.link.set(qmp).map_err(failed)?;
        let version = qmp.version();
        if version < OLDEST {
            return Err(EndpointError::Refused(format!(
                "QEMU {version} listens there, and {OLDEST} is the oldest that can be used: start a newer one"
            )));
        }
        let status = qmp.query_status().await.map_err(|error| EndpointError::Failed(error.to_string()))?;
        let reported = describe::describe(&qmp).await;
        Ok(IdentifiedVmm {
            client: Arc::new(connection),
            process: visit.process,
            version: version.to_string(),
            accelerator: reported.accelerator,
            machine: reported.machine,
            holds: holding(status).map(|guest| AttachedVmFacts {
                guest,
                config: reported.config,
                unrepresented: vec!["whatever QEMU's command line says".to_owned()],
                startable: false,
                native: serde_json::Value::Null,
            }),
        })
    }

    fn equals_request(
        &self,
        _holds: &AttachedVmFacts,
        _uid: VmUid,
        _spec: &VmSpec,
        _console: Option<&Path>,
    ) -> bool {
        false
    }

    async fn start(
        &self,
        _met: &IdentifiedVmm<AttachedQemuConnection>,
        _request: &LaunchRequest,
        _console: Option<&Path>,
        _make: bool,
    ) -> Result<(), BackendError> {
        let message =
            "a QEMU that another program started runs its guest once: start another on the same socket";
        Err(BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message))
    }

    fn attend(&self, met: IdentifiedVmm<AttachedQemuConnection>, parts: AttachedVmmParts) -> LaunchedVmm {
        let events = met.client.take_events();
        handle::attend(Arc::clone(&met.client.link), events, met.process, self.program(), parts)
    }

    fn unanswering(&self, socket: &Path, process: &Process) -> IdentifiedVmm<AttachedQemuConnection> {
        let (connection, _) = AttachedQemuConnection::new(socket, process);
        IdentifiedVmm {
            client: Arc::new(connection),
            process: process.clone(),
            version: String::new(),
            accelerator: String::new(),
            machine: String::new(),
            holds: None,
        }
    }

    /// Called by force only, because a VM is never started here and so no start is undone.
    async fn power_off(&self, client: &AttachedQemuConnection) -> Result<bool, BackendError> {
        let qmp = match client.link.get() {
            Ok(qmp) => qmp,
            Err(_) => client.link.connect().await?,
        };
        qmp.quit().await?;
        Ok(tokio::time::timeout(Duration::from_millis(500), qmp.closed()).await.is_ok())
    }

    async fn forget(
        &self,
        _client: &AttachedQemuConnection,
        _request: &SweepRequest,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// Returns the state of the guest in a QEMU with this status, or `None` if the guest has ended and
/// cannot be used.
fn holding(status: RunState) -> Option<GuestPhase> {
    match status.attached_guest_state() {
        GuestState::Running => Some(GuestPhase::Running),
        GuestState::Paused => Some(GuestPhase::Paused),
        GuestState::Ended => None,
    }
}

async fn not_qemu(socket: &Path, error: &QmpError) -> EndpointError {
    match identify::program_on_socket(socket).await {
        Some(other) if !other.starts_with("QEMU") => {
            EndpointError::Refused(format!("the process that listens there is not QEMU but {other}"))
        }
        Some(_) | None => match error {
            QmpError::NoGreeting(_) => EndpointError::Failed(
                "QEMU does not greet: QMP serves one client at a time, and another program holds it, or QEMU stands still. End \
                 that client, or start QEMU with a second -qmp socket for this daemon"
                    .to_owned(),
            ),
            other => EndpointError::Failed(other.to_string()),
        },
    }
}
