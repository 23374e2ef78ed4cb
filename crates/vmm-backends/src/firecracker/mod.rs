//! Firecracker: one process per run, driven by REST on a unix socket.
//!
//! ```text
//!   launch: console.in (FIFO) ──► stdin ┌─────────────┐ stdout ──► the console's file, appended to
//!                                       │ firecracker │ stderr ──► vmm.log, --log-path ──► firecracker.log
//!           api.sock ◄──────────────────└─────────────┘ --metrics-path ──► metrics
//! ```
//!
//! Its serial console is its stdin and stdout. stdout is the console's file itself, opened for appending, so that no daemon is
//! needed for a byte to be kept. stdin is a FIFO that Firecracker holds open at both ends: whoever wants to type opens
//! `console.in` in the run folder for writing, whether this daemon or the next, and when he goes the guest sees no end of input.

pub(crate) mod attached;
mod check;
pub(crate) mod client;
pub mod convert;
mod describe;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub(crate) mod metrics;
mod vmm;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::{FileType, Mode, OFlags};
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, KernelFormat, LaunchRequest,
    Launched, SpareRequest, SweepRequest,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::report::Report;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::kvm::kvm_usable;
use vmm_host::process::{Command, Process, ProcessExit, Stdin};

use self::client::Client;
use self::convert::Config;
use self::metrics::{METRICS, Metrics};
use crate::launch;
use crate::program::{Kind, Program, Version};
use crate::rest::adopt::{LOG, SOCKET, Trace, failed, has_ended, look, new_run, set_aside};
use crate::rest::options::check_taps;
use crate::rest::spare::Fresh;
use crate::rest::start::start;
use crate::search::Unproven;
use crate::spares::Spares;

/// The backend's name.
pub const NAME: &str = "firecracker";
/// The FIFO in the run folder that takes what is typed at the console.
pub const CONSOLE_INPUT: &str = "console.in";

/// Firecracker's own log in the run folder. Not its stderr's file, because Firecracker does not append.
const OWN_LOG: &str = "firecracker.log";
/// The oldest Firecracker with everything that is used; `huge_pages` came last.
pub(crate) const OLDEST: Version = Version::new(1, 7, 0);
/// Its program.
const PROGRAM: Kind = Kind {
    backend: NAME,
    title: "Firecracker",
    usual_name: "firecracker",
    oldest: OLDEST,
    read_version: Version::find,
    remedy: "UNKEY_VMCP_FC_BINARY names another",
};

/// The Firecracker backend.
#[derive(Debug)]
pub struct Firecracker {
    program: Arc<Program>,
    capabilities: Capabilities,
    spares: Spares<Fresh<Client>>,
}

impl Firecracker {
    /// A backend that starts `program`: a name on the PATH, or a path.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: Arc::new(Program::new(program, PROGRAM)),
            capabilities: capabilities(),
            spares: Spares::default(),
        }
    }

    async fn start(&self, request: &LaunchRequest) -> Result<Launched, BackendError> {
        check_taps(&request.spec, &request.taps)?;
        let dir = request.dir.as_path();
        let waiting =
            self.spares.take_for(request, &self.program, async |client: &Client| client.instance().await);
        let fresh = match waiting.await {
            Some(spare) => spare,
            None => self.begin(request.uid, dir, request.console.clone()).await?,
        };
        let Fresh { guard, client, program, .. } = fresh;
        if let Err(error) = configure(guard.process(), &client, request).await {
            return Err(failed(guard, error, &dir.join(LOG)).await);
        }
        let process = guard.keep();
        let run = new_run(process.identity().clone(), dir.join(SOCKET), program.version.to_string());
        let client = client.of_process(process.pid());
        Ok(vmm::attend(run, process, client, dir))
    }

    /// Starts a VMM in the run folder `dir` of `uid`, up to where it can be told what to run.
    async fn begin(
        &self,
        uid: VmUid,
        dir: &Path,
        console: Option<PathBuf>,
    ) -> Result<Fresh<Client>, BackendError> {
        let prepare = move |program: &Path, dir: &Path| {
            set_aside(dir, OWN_LOG)?;
            Metrics::begin(dir)?;
            let own_log = dir.join(OWN_LOG);
            let arguments = convert::arguments(uid, &dir.join(SOCKET), &own_log, &dir.join(METRICS));
            Ok(Command {
                stdin: Stdin::File(console_input(&dir.join(CONSOLE_INPUT))?),
                ..Command::new(program, arguments, dir.join(LOG))
            })
        };
        // It has a serial port even where nobody wants it.
        start(&self.program, dir, console, prepare, Client::over).await
    }
}

/// From a VMM that has been told nothing to a guest that runs.
async fn configure(process: &Process, client: &Client, request: &LaunchRequest) -> Result<(), BackendError> {
    launch::pass(&request.gate, process).await?;
    client.configure(&Config::of(&request.spec, &request.taps)).await?;
    point(FaultPoint::LaunchConfigured);
    client.start().await?;
    point(FaultPoint::LaunchStarted);
    Ok(())
}

/// Makes the FIFO of what is typed, and opens it as Firecracker's input.
fn console_input(path: &Path) -> std::io::Result<OwnedFd> {
    match rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    // For reading and writing, so that there is always somebody who may write, and Firecracker never reads an end.
    // Non-blocking, because it reads on the thread that serves its API.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[async_trait]
impl Backend for Firecracker {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> Report {
        check::check(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<Launched, BackendError> {
        self.start(&request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let (process, mut run) = match look(&request, self.program.running_names().await).await {
            Trace::Alive(process, run) => (process, *run),
            Trace::Gone => return Ok(gone(&request.dir).await),
            Trace::Unprovable(Unproven { reason, message }) => {
                return Ok(Adoption::Unreachable { reason, message, launched: None });
            }
        };
        let client = Client::new(&run.socket).of_process(process.pid());
        let answer = client.instance().await;
        if has_ended(&process, &answer).await {
            return Ok(gone(&request.dir).await);
        }
        if let Ok((_, version)) = &answer {
            run.version.clone_from(version);
        }
        let launched = vmm::attend(run, process, client, &request.dir);
        Ok(match answer {
            Ok((guest, _)) => Adoption::Alive { launched, guest },
            Err(error) => Adoption::Unreachable {
                reason: "vmm-silent",
                message: error.message,
                launched: Some(launched),
            },
        })
    }

    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError> {
        let fresh = self.begin(request.uid, &request.dir, Some(request.console)).await?;
        self.spares.keep(request.uid, fresh);
        Ok(())
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        self.spares.dismiss(uid).await;
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.spares.dismiss(request.uid).await;
        launch::sweep(&request.dir, &self.program.running_names().await).await
    }

    async fn ping(&self) -> BackendHealth {
        self.program.health(kvm_usable).await
    }
}

/// What is known of a run that has ended unwatched.
async fn gone(dir: &Path) -> Adoption {
    let exit = vmm::explain(ProcessExit::UNKNOWN, false, &Metrics::new(dir), dir).await;
    Adoption::Gone { exit }
}

pub(crate) fn capabilities() -> Capabilities {
    let facts = [
        ("accelerator", "kvm"),
        ("console", "serial, with input"),
        ("cpu-time", "of the VMM's process"),
        ("disk-formats", "raw"),
        ("disk-rate-limits", "yes"),
        ("guest-panic", "not seen: have the guest reset itself (panic=1)"),
        ("guest-power-off", "not seen on x86: the VM stays RUNNING; let guests end by a reset"),
        ("guest-reset", "ends the run"),
        ("guest-triple-fault", "ends the run, as a failure"),
        ("network-rate-limits", "yes"),
        ("reboot", "a new process"),
        ("shutdown", "Ctrl+Alt+Del, on x86 only"),
    ];
    let limits = [("max-devices", check::MAX_DEVICES as i64), ("max-vcpus", i64::from(check::MAX_VCPUS))];
    Capabilities {
        name: BackendName::new(NAME),
        endpoint_mode: "managed",
        default_restart_mode: RestartMode::Never,
        kernel_formats: &[KernelFormat::Elf, KernelFormat::PvhElf],
        facts: facts.map(|(name, fact)| (name, fact.to_owned())).into_iter().collect(),
        limits: limits.into_iter().collect(),
    }
}
