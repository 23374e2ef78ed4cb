//! The backend that starts VMMs of a hypervisor with a REST API.
//!
//! ```text
//!   launch ─ a spare VMM, or a new one ─► UnconfiguredVmm ─ configure ─► attend ─► LaunchedVmm
//!   adopt  ─ the process on record, or of the run folder ─ asked ─────► attend ─► Adoption
//! ```

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, Exit, LaunchRequest,
    LaunchedVmm, SpareRequest, SpareVmms, SweepRequest,
};
use vmm_core::id::VmUid;
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::kvm::kvm_usable;
use vmm_host::process::{Command, Process};

use super::adopt::{LOG, SOCKET, VmmSearch, failed, find_vmm, has_ended, new_run};
use super::client::RestApi;
use super::options::check_taps;
use super::spare::UnconfiguredVmm;
use super::start::start;
use crate::launch;
use crate::program::{Program, ProgramSpec};
use crate::search::UnprovenVmm;
use crate::spares::SpareTable;

/// The part in which hypervisors with a REST API differ.
#[async_trait]
pub trait RestHypervisor: fmt::Debug + Default + Send + Sync + 'static {
    /// The typed API of one VMM.
    type Client: RestApi;

    /// The program of a VMM.
    const PROGRAM: ProgramSpec;

    /// Returns the capabilities of VMMs that this program starts.
    fn capabilities() -> Capabilities;

    /// Returns the findings about `spec`. Reads nothing but `spec`.
    fn check(spec: &VmSpec) -> CheckReport;

    /// Returns the kernel command line that a VMM is given for `spec`.
    fn kernel_args(spec: &VmSpec) -> String;

    /// Creates the files of a VMM in the run folder `dir` of `uid`, and returns the command that
    /// starts `program` there. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error.
    fn prepare(program: &Path, uid: VmUid, dir: &Path) -> io::Result<Command>;

    /// Sends the configuration of `request` to a VMM that has none yet, and starts the guest. The
    /// guest runs when this returns.
    async fn configure(client: &Self::Client, request: &LaunchRequest) -> Result<(), BackendError>;

    /// Returns the handle of a running VM, and starts a task that watches the VM.
    fn attend(&self, run: RestVmmParts<'_, Self::Client>) -> LaunchedVmm;

    /// Returns the cause of the end of the run of `request`, which no daemon watched. The cause is
    /// read from the files that the VMM left.
    async fn explain_past(request: &AdoptRequest) -> Exit;
}

/// The parts of a handle.
pub struct RestVmmParts<'a, C> {
    /// The run, as it is put on record.
    pub record: RunRecord,
    /// The process of the VMM.
    pub process: Process,
    /// The connection to the VMM.
    pub client: C,
    /// The run folder.
    pub dir: &'a Path,
    /// The specification that the VM was started with.
    pub spec: &'a VmSpec,
    /// False if an earlier daemon started the VMM.
    pub is_new: bool,
    /// The time of the record's last change, in Unix milliseconds, if an earlier daemon started the
    /// VMM.
    pub changed_ms: i64,
}

/// The backend that starts VMMs of the hypervisor `H`.
#[derive(Debug)]
pub struct RestBackend<H: RestHypervisor> {
    hypervisor: H,
    program: Arc<Program>,
    capabilities: Capabilities,
    spares: SpareTable<UnconfiguredVmm<H::Client>>,
}

impl<H: RestHypervisor> RestBackend<H> {
    /// Returns a backend that starts `program`, which is a name on the PATH or a path.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            hypervisor: H::default(),
            program: Arc::new(Program::new(program, H::PROGRAM)),
            capabilities: H::capabilities(),
            spares: SpareTable::default(),
        }
    }

    /// Starts a VMM in the run folder `dir` of `uid`, up to the point where the VMM waits for its
    /// configuration.
    async fn begin(
        &self,
        uid: VmUid,
        dir: &Path,
        console: Option<PathBuf>,
    ) -> Result<UnconfiguredVmm<H::Client>, BackendError> {
        let prepare = move |program: &Path, dir: &Path| H::prepare(program, uid, dir);
        start(&self.program, dir, console, prepare).await
    }
}

#[async_trait]
impl<H: RestHypervisor> Backend for RestBackend<H> {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        H::check(spec)
    }

    fn kernel_args(&self, spec: &VmSpec) -> String {
        H::kernel_args(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        check_taps(&request.spec, &request.taps)?;
        let dir = request.dir.as_path();
        // From here on the VMM belongs to this launch. Its guard kills the process if this future
        // is dropped, for example because a forced operation pre-empts the launch.
        let fresh = match self.spares.take_for(&request, &self.program).await {
            Some(spare) => spare,
            None => self.begin(request.uid, dir, request.console.clone()).await?,
        };
        let UnconfiguredVmm { guard, client, program, .. } = fresh;
        // The VMM has started by now, but its configuration waits for the permit, because the VM's
        // record must be durable before a guest runs. A failure from here on must end the process,
        // so it passes `failed`.
        let configured = async {
            launch::wait_for_permit(&request.permit, guard.process()).await?;
            H::configure(&client, &request).await
        };
        if let Err(error) = configured.await {
            return Err(failed(guard, error, &dir.join(LOG)).await);
        }
        // The guest runs, so the process must outlive this daemon from now on.
        let process = guard.keep();
        let record = new_run(process.identity().clone(), dir.join(SOCKET), program.version.to_string());
        let (spec, is_new, changed_ms) = (&request.spec, true, 0);
        Ok(self.hypervisor.attend(RestVmmParts { record, process, client, dir, spec, is_new, changed_ms }))
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let (dir, spec) = (request.dir.as_path(), &request.spec);
        let (process, mut record) = match find_vmm(&request, self.program.running_names().await).await {
            VmmSearch::Alive(process, run) => (process, *run),
            VmmSearch::Gone => return Ok(Adoption::Gone { exit: H::explain_past(&request).await }),
            VmmSearch::Unprovable(UnprovenVmm { reason, message }) => {
                return Ok(Adoption::Unreachable { reason, message, launched: None });
            }
        };
        // The process is proven alive, but it may be exiting. The VMM is asked before the handle is
        // made, because a handle of an ended VM would report the end as an event of this daemon's
        // time.
        let client = H::Client::of_process(&record.socket, process.pid());
        let answer = client.instance().await;
        // The identity was proven before the call. A failed call may mean that the process ended in
        // between, so the end is checked again before the VM counts as unreachable.
        if has_ended(&process, &answer).await {
            return Ok(Adoption::Gone { exit: H::explain_past(&request).await });
        }
        if let Ok((_, version)) = &answer {
            record.version.clone_from(version);
        }
        let (is_new, changed_ms) = (false, request.changed_ms);
        let launched =
            self.hypervisor.attend(RestVmmParts { record, process, client, dir, spec, is_new, changed_ms });
        Ok(match answer {
            Ok((guest, _)) => Adoption::Alive { launched, guest },
            Err(error) => Adoption::Unreachable {
                reason: Reason::VmmSilent,
                message: error.message,
                launched: Some(launched),
            },
        })
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.spares.dismiss(request.uid).await;
        launch::sweep(&request.dir, &self.program.running_names().await).await
    }

    async fn ping(&self) -> BackendHealth {
        self.program.health(kvm_usable).await
    }

    fn spares(&self) -> Option<&dyn SpareVmms> {
        Some(self)
    }
}

#[async_trait]
impl<H: RestHypervisor> SpareVmms for RestBackend<H> {
    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError> {
        let fresh = self.begin(request.uid, &request.dir, Some(request.console)).await?;
        self.spares.keep(request.uid, fresh);
        Ok(())
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        self.spares.dismiss(uid).await;
    }
}
