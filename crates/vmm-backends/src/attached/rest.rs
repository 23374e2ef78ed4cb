//! Implements [`AttachedHypervisor`] once for all attached VMMs with a REST API.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{BackendError, Capabilities, LaunchRequest, LaunchedVmm, SweepRequest};
use vmm_core::capabilities::{BackendFacts, EndpointMode};
use vmm_core::discovery::Places;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_host::endpoint::{EndpointConnection, EndpointError};
use vmm_host::process::Process;

use super::handle::{self, AttachedVmmApi};
use super::{AttachedHypervisor, AttachedVmFacts, AttachedVmmParts, IdentifiedVmm, identify};
use crate::program::Version;
use crate::rest::backend::RestHypervisor;
use crate::rest::client::RestApi;

/// The part in which attached hypervisors with a REST API differ, from each other and from managed
/// ones.
#[async_trait]
pub(crate) trait AttachedRestApi: RestHypervisor<Client: AttachedVmmApi> {
    /// Returns the facts, of which those of managed VMMs are `managed`.
    fn facts(managed: BackendFacts) -> BackendFacts;

    /// The variable of the setting that names the sockets.
    const SETTING: &'static str;

    /// The oldest version that can be used.
    const OLDEST: Version;

    /// True if the start of a VM that the VMM already holds sets the file of its console anew.
    const NAMES_CONSOLE_AT_START: bool;

    /// Returns the shell command that starts a VMM which waits at `socket`.
    fn how_to_start(socket: &Path) -> String;

    /// Adds the findings about `spec` that do not hold for a managed VMM.
    fn check_attached(spec: &VmSpec, report: &mut CheckReport);

    /// Asks the VMM which VM it holds.
    async fn holding(client: &Self::Client) -> Result<Option<AttachedVmFacts>, BackendError>;

    /// Returns true if `holds` equals the VM that this program would create of `spec` for `uid`,
    /// with the console in `console`.
    fn equals_request(holds: &AttachedVmFacts, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool;

    /// Starts a VM as [`AttachedHypervisor::start`] does.
    async fn start(
        met: &IdentifiedVmm<Self::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError>;

    /// Ends a VM as [`AttachedHypervisor::power_off`] does.
    async fn power_off(client: &Self::Client) -> Result<bool, BackendError>;

    /// Makes the VMM forget a VM that does not run. Returns false where the VMM cannot.
    async fn forget(client: &Self::Client) -> Result<bool, BackendError>;
}

/// The hypervisor `H` with VMMs that another program started.
#[derive(Debug)]
pub(crate) struct AttachedRestHypervisor<H> {
    capabilities: Capabilities,
    hypervisor: PhantomData<H>,
}

impl<H: AttachedRestApi> AttachedRestHypervisor<H> {
    pub(crate) fn new() -> Self {
        let mut capabilities = H::capabilities();
        capabilities.endpoint_mode = EndpointMode::Attached;
        capabilities.facts = H::facts(capabilities.facts);
        Self { capabilities, hypervisor: PhantomData }
    }
}

#[async_trait]
impl<H: AttachedRestApi> AttachedHypervisor for AttachedRestHypervisor<H> {
    type Client = H::Client;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn title(&self) -> &'static str {
        H::PROGRAM.title
    }

    fn program(&self) -> &'static str {
        H::PROGRAM.usual_name
    }

    fn how_to_start(&self, socket: &Path) -> String {
        H::how_to_start(socket)
    }

    fn setting(&self) -> &'static str {
        H::SETTING
    }

    fn places(&self, places: Vec<VmKind>) -> Places {
        Places::Fixed { places, setting: H::SETTING }
    }

    fn check(&self, spec: &VmSpec, report: &mut CheckReport) {
        H::check_attached(spec, report);
    }

    async fn identify(
        &self,
        socket: &Path,
        visit: EndpointConnection,
    ) -> Result<IdentifiedVmm<H::Client>, EndpointError> {
        let failed = |error: BackendError| EndpointError::Failed(error.message);
        let client = H::Client::over(socket, visit.stream, visit.process.pid()).await.map_err(failed)?;
        // The version is asked for first, because a program that is no VMM of this kind fails here,
        // before anything else is read from it.
        let version = match client.version().await {
            Ok(version) => version,
            Err(error) => return Err(not_this_hypervisor(self.title(), socket, error).await),
        };
        if let Some(why) = too_old::<H>(&version) {
            return Err(EndpointError::Refused(why));
        }
        let holds = H::holding(&client).await.map_err(failed)?;
        Ok(IdentifiedVmm { version, holds, ..identified(client, visit.process) })
    }

    fn equals_request(
        &self,
        holds: &AttachedVmFacts,
        uid: VmUid,
        spec: &VmSpec,
        console: Option<&Path>,
    ) -> bool {
        H::equals_request(holds, uid, spec, console)
    }

    async fn start(
        &self,
        met: &IdentifiedVmm<H::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError> {
        H::start(met, request, console, make).await
    }

    fn names_console_at_start(&self) -> bool {
        H::NAMES_CONSOLE_AT_START
    }

    fn attend(&self, met: IdentifiedVmm<H::Client>, parts: AttachedVmmParts) -> LaunchedVmm {
        handle::attend(met.client, met.process, self.program(), parts)
    }

    fn unanswering(&self, socket: &Path, process: &Process) -> IdentifiedVmm<H::Client> {
        identified(H::Client::of_process(socket, process.pid()), process.clone())
    }

    async fn power_off(&self, client: &H::Client) -> Result<bool, BackendError> {
        H::power_off(client).await
    }

    async fn forget(&self, client: &H::Client, _request: &SweepRequest) -> Result<bool, BackendError> {
        H::forget(client).await
    }
}

/// Returns a VMM of which only the process is known.
fn identified<C>(client: C, process: Process) -> IdentifiedVmm<C> {
    IdentifiedVmm {
        client: Arc::new(client),
        process,
        version: String::new(),
        accelerator: "kvm".to_owned(),
        machine: String::new(),
        holds: None,
    }
}

/// Returns the reason why a VMM of this `version` cannot be used, or `None` if it can. A version
/// that cannot be parsed is accepted.
pub(crate) fn too_old<H: AttachedRestApi>(version: &str) -> Option<String> {
    let (found, title, oldest) = (Version::find(&format!("v{version}"))?, H::PROGRAM.title, H::OLDEST);
    (found < oldest).then(|| {
        format!(
            "{title} {version} listens there, and {oldest} is the oldest that can be used where this program does not start it \
             itself: start a newer one"
        )
    })
}

async fn not_this_hypervisor(title: &str, socket: &Path, error: BackendError) -> EndpointError {
    match identify::program_on_socket(socket).await {
        Some(other) if !other.starts_with(title) => {
            EndpointError::Refused(format!("the process that listens there is not {title} but {other}"))
        }
        Some(_) | None => EndpointError::Failed(error.message),
    }
}
