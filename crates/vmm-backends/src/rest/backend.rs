//! The backend that starts VMMs of a hypervisor with a REST API.
//!
//! ```text
//!   launch ─ a spare VMM, or a new one ─► UnconfiguredVmm ─┬─ by calls ──► attend ─► LaunchedVmm
//!                                               ▲          └─ by its pipe ─┘
//!                 a new one, for the reason ────┴── refused ─────┘
//!   adopt  ─ the process on record, or of the run folder ─ asked ─────► attend ─► Adoption
//! ```

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    Exit, LaunchRequest, LaunchedVmm, SpareRequest, SpareVmms, SweepRequest,
};
use vmm_core::id::VmUid;
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::kvm::kvm_usable;
use vmm_host::process::{Command, Process, ProcessExit, ProcessGuard};

use super::adopt::{LOG, SOCKET, VmmSearch, failed, find_vmm, has_ended, new_run};
use super::client::RestApi;
use super::config_pipe::ConfigPipe;
use super::options::check_taps;
use super::spare::{ConfigIntake, UnconfiguredVmm};
use super::start::{PreparedStart, REST_LISTEN_TIMEOUT, start};
use crate::launch;
use crate::program::{InstalledProgram, Program, ProgramSpec};
use crate::search::UnprovenVmm;
use crate::spares::SpareTable;
use crate::timeouts::REAP_TIMEOUT;

/// The way in which a VMM ended that was sent its configuration through a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlyEnd {
    /// The guest ran, and ended its run.
    GuestRan,
    /// The VMM refused the configuration, and its reason may be lost.
    Refused,
    /// The VMM failed.
    Failed,
}

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

    /// True if a VMM can read its whole configuration from a pipe at its start.
    const READS_PIPE: bool = false;

    /// Creates the files of a VMM in the run folder `dir` of `uid`, and returns the command that
    /// starts `program` there. The VMM reads its configuration from `pipe`, if there is one. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error.
    fn prepare(program: &Path, uid: VmUid, dir: &Path, pipe: Option<OwnedFd>) -> io::Result<Command>;

    /// Returns the configuration of `request` in the form that a VMM reads from a pipe. Empty unless
    /// [`Self::READS_PIPE`].
    fn piped_config(_request: &LaunchRequest) -> String {
        String::new()
    }

    /// Waits until the guest of a VMM runs that has read its configuration from a pipe.
    async fn wait_for_guest(client: &Self::Client) -> Result<(), BackendError> {
        client.instance().await.map(drop)
    }

    /// Returns the way in which a VMM in the run folder `dir` ended that had read its configuration
    /// from a pipe.
    async fn explain_early(_exit: ProcessExit, _dir: &Path) -> EarlyEnd {
        EarlyEnd::Failed
    }

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
    /// configuration, which a VMM with `piped` reads from a pipe.
    async fn begin(
        &self,
        uid: VmUid,
        dir: &Path,
        console: Option<PathBuf>,
        piped: bool,
    ) -> Result<UnconfiguredVmm<H::Client>, BackendError> {
        let prepare = move |program: &Path, dir: &Path| {
            let (pipe, output) = if piped { Some(ConfigPipe::new()?) } else { None }.unzip();
            let command = H::prepare(program, uid, dir, output)?;
            Ok(PreparedStart { command, pipe })
        };
        start(&self.program, dir, console, prepare).await
    }

    /// Configures a VMM and starts its guest, after the run permit. Returns `None` if the VMM has
    /// ended and gave no reason, because it read its configuration from a pipe.
    async fn configure(
        &self,
        fresh: UnconfiguredVmm<H::Client>,
        request: &LaunchRequest,
    ) -> Result<Option<ConfiguredVmm<H::Client>>, BackendError> {
        let UnconfiguredVmm { guard, intake, program, .. } = fresh;
        let piped = matches!(intake, ConfigIntake::Pipe(_));
        let configured = async {
            launch::wait_for_permit(&request.permit, guard.process()).await?;
            match intake {
                ConfigIntake::Calls(client) => {
                    H::configure(&client, request).await?;
                    Ok(client)
                }
                ConfigIntake::Pipe(pipe) => send_config::<H>(pipe, &guard, request).await,
            }
        };
        // The VMM has started by now, but its configuration waits for the permit, because the VM's
        // record must be durable before a guest runs. A failure from here on must end the process,
        // so it passes `failed`.
        let error = match configured.await {
            Ok(client) => return Ok(Some(ConfiguredVmm { guard, client, program })),
            Err(error) => error,
        };
        let dir = request.dir.as_path();
        let lost = matches!(error.kind, BackendErrorKind::Gone | BackendErrorKind::Unreachable);
        if piped
            && lost
            && let Some(exit) = guard.wait_for(REAP_TIMEOUT).await
        {
            match H::explain_early(exit, dir).await {
                // A start by calls reports such a guest as running too, and its end afterwards.
                EarlyEnd::GuestRan => {
                    let client = H::Client::of_process(&dir.join(SOCKET), guard.pid());
                    return Ok(Some(ConfiguredVmm { guard, client, program }));
                }
                EarlyEnd::Refused => return Ok(None),
                EarlyEnd::Failed => {}
            }
        }
        Err(failed(guard, error, &dir.join(LOG)).await)
    }
}

/// A VMM whose guest runs.
struct ConfiguredVmm<C> {
    guard: ProcessGuard,
    client: C,
    program: InstalledProgram,
}

/// Sends a VMM its configuration through its pipe, and waits until the guest runs.
///
/// The call that waits is sent while the VMM makes the VM, so that the VMM answers it before it
/// looks at its guest for the first time. An answer therefore proves that the guest was started,
/// even if the guest ends at once.
async fn send_config<H: RestHypervisor>(
    pipe: ConfigPipe,
    process: &Process,
    request: &LaunchRequest,
) -> Result<H::Client, BackendError> {
    pipe.send(&H::piped_config(request)).await?;
    point(FaultPoint::LaunchConfigured);
    let socket = request.dir.join(SOCKET);
    let stream = launch::wait_for_socket(process, &socket, REST_LISTEN_TIMEOUT).await?;
    let client = H::Client::over(&socket, stream, process.pid()).await?;
    H::wait_for_guest(&client).await?;
    point(FaultPoint::LaunchStarted);
    Ok(client)
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
            None => self.begin(request.uid, dir, request.console.clone(), H::READS_PIPE).await?,
        };
        let mut configured = self.configure(fresh, &request).await?;
        if configured.is_none() {
            // Another VMM gets the same configuration by calls, because a refused call is answered
            // with the reason. No guest has run, and the first VMM has ended.
            let again = self.begin(request.uid, dir, request.console.clone(), false).await?;
            configured = self.configure(again, &request).await?;
        }
        let Some(ConfiguredVmm { guard, client, program }) = configured else {
            let message = "the VMM ended while it started, and gave no reason";
            return Err(BackendError::refused(Effect::NotApplied, message));
        };
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
        let fresh = self.begin(request.uid, &request.dir, Some(request.console), H::READS_PIPE).await?;
        // A VMM that reads a pipe may still load its program.
        let answers = async {
            tokio::select! {
                answers = fresh.intake.answers() => answers,
                _ = fresh.guard.process().wait() => false,
            }
        };
        if tokio::time::timeout(REST_LISTEN_TIMEOUT, answers).await != Ok(true) {
            let message =
                format!("the VMM did not wait for its configuration within {REST_LISTEN_TIMEOUT:?}");
            let error = BackendError::new(BackendErrorKind::Timeout, Effect::NotApplied, message);
            return Err(failed(fresh.guard, error, &request.dir.join(LOG)).await);
        }
        self.spares.keep(request.uid, fresh);
        Ok(())
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        self.spares.dismiss(uid).await;
    }
}
