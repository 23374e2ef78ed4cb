//! Implements [`Hypervisor`] once for all attached VMMs with a REST API.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{BackendError, Capabilities, LaunchRequest, Launched, SweepRequest};
use vmm_core::capabilities::{EndpointMode, Facts};
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::place::Places;
use vmm_core::report::Report;
use vmm_core::spec::VmSpec;
use vmm_host::endpoint::{Visit, VisitError};
use vmm_host::process::Process;

use super::handle::{self, Api};
use super::{Holding, Hypervisor, Met, Parts, identify};
use crate::program::Version;
use crate::rest::backend::RestHypervisor;
use crate::rest::client::RestApi;

/// The part in which attached hypervisors with a REST API differ, from each other and from managed
/// ones.
#[async_trait]
pub(crate) trait AttachedRest: RestHypervisor<Client: Api> {
    /// Returns the facts, of which those of managed VMMs are `managed`.
    fn facts(managed: Facts) -> Facts;

    /// The variable of the setting that names the sockets.
    const SETTING: &'static str;

    /// The oldest version that can be used.
    const OLDEST: Version;

    /// True if the start of a VM that the VMM already holds sets the file of its console anew.
    const NAMES_CONSOLE_AT_START: bool;

    /// Returns the shell command that starts a VMM which waits at `socket`.
    fn how_to_start(socket: &Path) -> String;

    /// Adds the findings about `spec` that do not hold for a managed VMM.
    fn check_attached(spec: &VmSpec, report: &mut Report);

    /// Asks the VMM which VM it holds.
    async fn holding(client: &Self::Client) -> Result<Option<Holding>, BackendError>;

    /// Returns true if `holds` equals the VM that this program would create of `spec` for `uid`,
    /// with the console in `console`.
    fn is_made_of(holds: &Holding, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool;

    /// Starts a VM as [`Hypervisor::start`] does.
    async fn start(
        met: &Met<Self::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError>;

    /// Ends a VM as [`Hypervisor::power_off`] does.
    async fn power_off(client: &Self::Client) -> Result<bool, BackendError>;

    /// Makes the VMM forget a VM that does not run. Returns false where the VMM cannot.
    async fn forget(client: &Self::Client) -> Result<bool, BackendError>;
}

/// The hypervisor `H` with VMMs that another program started.
#[derive(Debug)]
pub(crate) struct Rest<H> {
    capabilities: Capabilities,
    hypervisor: PhantomData<H>,
}

impl<H: AttachedRest> Rest<H> {
    pub(crate) fn new() -> Self {
        let mut capabilities = H::capabilities();
        capabilities.endpoint_mode = EndpointMode::Attached;
        capabilities.facts = H::facts(capabilities.facts);
        Self { capabilities, hypervisor: PhantomData }
    }
}

#[async_trait]
impl<H: AttachedRest> Hypervisor for Rest<H> {
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

    fn check(&self, spec: &VmSpec, report: &mut Report) {
        H::check_attached(spec, report);
    }

    async fn meet(&self, socket: &Path, visit: Visit) -> Result<Met<H::Client>, VisitError> {
        let failed = |error: BackendError| VisitError::Failed(error.message);
        let client = H::Client::over(socket, visit.stream, visit.process.pid()).await.map_err(failed)?;
        // The version is asked for first, because a program that is no VMM of this kind fails here,
        // before anything else is read from it.
        let version = match client.version().await {
            Ok(version) => version,
            Err(error) => return Err(not_one(self.title(), socket, error).await),
        };
        if let Some(why) = too_old::<H>(&version) {
            return Err(VisitError::Refused(why));
        }
        let holds = H::holding(&client).await.map_err(failed)?;
        Ok(Met { version, holds, ..met(client, visit.process) })
    }

    fn is_made_of(&self, holds: &Holding, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool {
        H::is_made_of(holds, uid, spec, console)
    }

    async fn start(
        &self,
        met: &Met<H::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError> {
        H::start(met, request, console, make).await
    }

    fn names_console_at_start(&self) -> bool {
        H::NAMES_CONSOLE_AT_START
    }

    fn attend(&self, met: Met<H::Client>, parts: Parts) -> Launched {
        handle::attend(met.client, met.process, self.program(), parts)
    }

    fn silent(&self, socket: &Path, process: &Process) -> Met<H::Client> {
        met(H::Client::of_process(socket, process.pid()), process.clone())
    }

    async fn power_off(&self, client: &H::Client) -> Result<bool, BackendError> {
        H::power_off(client).await
    }

    async fn forget(&self, client: &H::Client, _request: &SweepRequest) -> Result<bool, BackendError> {
        H::forget(client).await
    }
}

/// Returns a VMM of which only the process is known.
fn met<C>(client: C, process: Process) -> Met<C> {
    Met {
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
pub(crate) fn too_old<H: AttachedRest>(version: &str) -> Option<String> {
    let (found, title, oldest) = (Version::find(&format!("v{version}"))?, H::PROGRAM.title, H::OLDEST);
    (found < oldest).then(|| {
        format!(
            "{title} {version} listens there, and {oldest} is the oldest that can be used where this program does not start it \
             itself: start a newer one"
        )
    })
}

async fn not_one(title: &str, socket: &Path, error: BackendError) -> VisitError {
    match identify::who(socket).await {
        Some(other) if !other.starts_with(title) => {
            VisitError::Refused(format!("the process that listens there is not {title} but {other}"))
        }
        Some(_) | None => VisitError::Failed(error.message),
    }
}
