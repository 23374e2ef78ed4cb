//! The trait in which attached hypervisors differ, and the facts about a VMM that was visited.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{BackendError, Capabilities, GuestState, LaunchRequest, LaunchedVmm, SweepRequest};
use vmm_core::config::VmConfig;
use vmm_core::discovery::Places;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::endpoint::{EndpointConnection, EndpointError};
use vmm_host::process::Process;

use super::console::ConsoleCopy;
use super::socket::SocketLease;

/// The part in which attached hypervisors differ.
#[async_trait]
pub(crate) trait AttachedHypervisor: fmt::Debug + Send + Sync + 'static {
    /// The connection to a VMM, with the facts that the first visit has read.
    type Client: fmt::Debug + Send + Sync + 'static;

    /// Returns the capabilities of VMMs that another program started.
    fn capabilities(&self) -> &Capabilities;

    /// Returns the hypervisor's name for people.
    fn title(&self) -> &'static str;

    /// Returns the beginning of the file name of the hypervisor's executables.
    fn program(&self) -> &'static str;

    /// Returns the shell command that starts a VMM which waits at `socket`, for the message that no
    /// VMM listens there.
    fn how_to_start(&self, socket: &Path) -> String;

    /// Returns the variable of the setting that names the sockets, for messages.
    fn setting(&self) -> &'static str;

    /// Returns the places of new VMs among `sockets`.
    fn places(&self, sockets: Vec<VmKind>) -> Places;

    /// Adds the findings about `spec` that do not hold for a managed VMM.
    fn check(&self, spec: &VmSpec, report: &mut CheckReport);

    /// Asks the VMM on the connection `visit` for its version and for the VM that it holds.
    async fn identify(
        &self,
        socket: &Path,
        visit: EndpointConnection,
    ) -> Result<IdentifiedVmm<Self::Client>, EndpointError>;

    /// Returns true if `holds` equals the VM that this program would create of `spec` for `uid`,
    /// with its console in `console`.
    fn equals_request(
        &self,
        holds: &AttachedVmFacts,
        uid: VmUid,
        spec: &VmSpec,
        console: Option<&Path>,
    ) -> bool;

    /// Starts a VM in the VMM `met`: the VM that the VMM holds, or with `make` a new one. A start
    /// that fails is undone.
    ///
    /// The output of the VM's console goes to `console`.
    async fn start(
        &self,
        met: &IdentifiedVmm<Self::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError>;

    /// Returns true if the start of a VM that the VMM already holds sets the file of its console
    /// anew.
    fn names_console_at_start(&self) -> bool {
        false
    }

    /// Returns the handle of a running VM, and starts a task that watches the VM.
    fn attend(&self, met: IdentifiedVmm<Self::Client>, parts: AttachedVmmParts) -> LaunchedVmm;

    /// Returns a connection to the VMM `process`, which is proven to be alive and does not answer.
    fn unanswering(&self, socket: &Path, process: &Process) -> IdentifiedVmm<Self::Client>;

    /// Powers a VM off through its VMM's own API within one second. Returns true if the VM has
    /// ended.
    async fn power_off(&self, client: &Self::Client) -> Result<bool, BackendError>;

    /// Makes the VMM forget a VM that does not run, so that the next scan does not find it. Returns
    /// false if the VMM cannot.
    async fn forget(&self, client: &Self::Client, request: &SweepRequest) -> Result<bool, BackendError>;
}

/// A VMM that was visited.
#[derive(Debug)]
pub(crate) struct IdentifiedVmm<C> {
    /// The connection to the VMM.
    pub(crate) client: Arc<C>,
    /// The process of the VMM.
    pub(crate) process: Process,
    /// The VMM's version.
    pub(crate) version: String,
    /// The accelerator of its guest's CPUs.
    pub(crate) accelerator: String,
    /// The machine model, if the hypervisor has several.
    pub(crate) machine: String,
    /// The VM that the VMM holds, if there is one.
    pub(crate) holds: Option<AttachedVmFacts>,
}

/// A VM that a VMM holds.
#[derive(Clone, Debug)]
pub(crate) struct AttachedVmFacts {
    /// The state of its guest.
    pub(crate) guest: GuestPhase,
    /// Its configuration, as far as a [`VmConfig`] can express it.
    pub(crate) config: VmConfig,
    /// The settings that a [`VmConfig`] cannot express.
    pub(crate) unrepresented: Vec<String>,
    /// True if the VM is complete and could be started. Only such a VM is reported as found.
    pub(crate) startable: bool,
    /// Its configuration in the VMM's own form.
    pub(crate) native: serde_json::Value,
}

/// The state of the guest of a VM that a VMM holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestPhase {
    /// The guest was not started, or has ended.
    AtRest,
    /// The guest's CPUs run.
    Running,
    /// The guest's CPUs are stopped.
    Paused,
}

impl From<GuestState> for GuestPhase {
    fn from(state: GuestState) -> Self {
        match state {
            GuestState::Running => Self::Running,
            GuestState::Paused => Self::Paused,
            GuestState::Ended => Self::AtRest,
        }
    }
}

impl GuestPhase {
    /// Returns true if the VMM runs the guest, also if its CPUs are stopped.
    pub(crate) const fn is_live(self) -> bool {
        match self {
            Self::AtRest => false,
            Self::Running | Self::Paused => true,
        }
    }
}

/// The parts of a handle other than the connection.
#[derive(Debug)]
pub(crate) struct AttachedVmmParts {
    /// The record of the run.
    pub(crate) run: RunRecord,
    /// The state of the guest when the VMM was visited.
    pub(crate) guest: GuestPhase,
    /// The run folder, if this program started the VM.
    pub(crate) dir: Option<PathBuf>,
    /// Keeps the scanner away from the socket for as long as the handle lives.
    pub(crate) held: SocketLease,
    /// The copy of the VM's console, if it is copied.
    pub(crate) console: Option<ConsoleCopy>,
}
