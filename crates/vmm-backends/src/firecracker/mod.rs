//! Firecracker: one process per run, driven by REST on a unix socket.
//!
//! ```text
//!   console.in (FIFO) ──► stdin ┌─────────────┐ stdout ──► the console's file, appended to
//!   the configuration (pipe) ──►│ firecracker │ stderr ──► vmm.log
//!   api.sock ◄──────────────────│             │ --log-path ──► firecracker.log
//!                               └─────────────┘ --metrics-path ──► metrics
//! ```
//!
//! Firecracker's serial console is its stdin and stdout. stdout is the console's file itself,
//! opened for appending, so no daemon is needed to keep the output. stdin is a FIFO that
//! Firecracker holds open for reading and writing. A writer opens `console.in` in the run folder,
//! under this daemon or the next, and a writer that closes it causes no end of input for the guest.
//!
//! Firecracker reads its whole configuration from a pipe as its `--config-file`, and starts the
//! guest. If Firecracker refuses it, a call that waits for the guest makes the API thread panic, and
//! the reason is lost. The configuration then goes to another Firecracker by calls, for the reason.

pub(crate) mod attached;
mod check;
pub(crate) mod client;
pub mod convert;
mod describe;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub(crate) mod metrics;
mod vmm;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, BackendError, Capabilities, Exit, KernelFormat, LaunchRequest, LaunchedVmm,
};
use vmm_core::capabilities::{
    AcceleratorFact, BackendFacts, ConsoleFact, CpuTimeFact, EndpointMode, PanicFact, PowerOffFact,
    RebootFact, ResetFact, ShutdownFact, TripleFaultFact,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::report::CheckReport;
use vmm_core::spec::{DiskFormat, RestartMode, VmSpec};
use vmm_host::console_input;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Command, ExitStatus, ProcessExit, Stdin};

use self::client::FirecrackerClient;
use self::convert::FirecrackerConfig;
use self::metrics::{FirecrackerMetrics, METRICS};
use crate::console_input::CONSOLE_INPUT;
use crate::program::{ProgramSpec, Version};
use crate::rest::adopt::{LOG, SOCKET, rotate_log};
use crate::rest::backend::{EarlyEnd, RestBackend, RestHypervisor, RestVmmParts};
use crate::rest::config_pipe::ConfigPipe;

/// The backend's name.
pub const NAME: &str = "firecracker";
/// Firecracker's own log in the run folder. A separate file from its stderr's, because Firecracker
/// does not append.
const OWN_LOG: &str = "firecracker.log";
/// The oldest Firecracker with all features in use; `huge_pages` came last.
const OLDEST: Version = Version::new(1, 7, 0);
/// The number of SIGABRT, by which a panic ends Firecracker.
const ABORTED: i32 = 6;
/// The backend that starts Firecrackers.
pub type FirecrackerBackend = RestBackend<Firecracker>;

/// Firecracker as a [`RestHypervisor`].
#[derive(Debug, Default)]
pub struct Firecracker;

#[async_trait]
impl RestHypervisor for Firecracker {
    type Client = FirecrackerClient;

    const PROGRAM: ProgramSpec = ProgramSpec {
        backend: NAME,
        title: "Firecracker",
        usual_name: "firecracker",
        oldest: OLDEST,
        read_version: Version::find,
        remedy: "UNKEY_VMCP_FC_BINARY names another",
    };

    fn capabilities() -> Capabilities {
        let facts = BackendFacts {
            accelerator: Some(AcceleratorFact::Kvm),
            console: Some(ConsoleFact::InputAndOutput),
            cpu_time: Some(CpuTimeFact::OfProcess),
            disk_formats: Some(&[DiskFormat::Raw]),
            disk_rate_limits: Some(true),
            guest_panic: Some(PanicFact::Unseen),
            guest_power_off: Some(PowerOffFact::UnseenOnX86),
            guest_reset: Some(ResetFact::EndsRun),
            guest_triple_fault: Some(TripleFaultFact::EndsRun),
            network_rate_limits: Some(true),
            reboot: Some(RebootFact::NewProcess),
            shutdown: Some(ShutdownFact::CtrlAltDel),
            ..BackendFacts::default()
        };
        let limits = [("max-devices", check::MAX_DEVICES as i64), ("max-vcpus", i64::from(check::MAX_VCPUS))];
        Capabilities {
            name: BackendName::new(NAME),
            endpoint_mode: EndpointMode::Managed,
            default_restart_mode: RestartMode::Never,
            kernel_formats: &[KernelFormat::Elf, KernelFormat::PvhElf],
            extended_l2: false,
            facts,
            limits: limits.into_iter().collect(),
        }
    }

    fn check(spec: &VmSpec) -> CheckReport {
        check::check(spec)
    }

    fn kernel_args(spec: &VmSpec) -> String {
        convert::kernel_args(spec)
    }

    const READS_PIPE: bool = true;

    fn prepare(program: &Path, uid: VmUid, dir: &Path, pipe: Option<OwnedFd>) -> io::Result<Command> {
        rotate_log(dir, OWN_LOG)?;
        FirecrackerMetrics::begin(dir)?;
        let mut arguments =
            convert::arguments(uid, &dir.join(SOCKET), &dir.join(OWN_LOG), &dir.join(METRICS));
        if pipe.is_some() {
            arguments.extend(["--config-file".into(), ConfigPipe::file().into()]);
        }
        let input = dir.join(CONSOLE_INPUT);
        console_input::make_fifo(&input)?;
        Ok(Command {
            // Firecracker has a serial port even if the specification turns the console off. The
            // FIFO does not block, because Firecracker reads on the thread that serves its API.
            stdin: Stdin::File(console_input::open_fifo_reader(&input)?),
            kept: pipe,
            ..Command::new(program, arguments, dir.join(LOG))
        })
    }

    async fn configure(client: &FirecrackerClient, request: &LaunchRequest) -> Result<(), BackendError> {
        client.configure(&FirecrackerConfig::of(&request.spec, &request.taps)).await?;
        point(FaultPoint::LaunchConfigured);
        client.start().await?;
        point(FaultPoint::LaunchStarted);
        Ok(())
    }

    fn piped_config(request: &LaunchRequest) -> String {
        FirecrackerConfig::of(&request.spec, &request.taps).file()
    }

    async fn wait_for_guest(client: &FirecrackerClient) -> Result<(), BackendError> {
        client.wait_for_guest().await
    }

    async fn explain_early(exit: ProcessExit, dir: &Path) -> EarlyEnd {
        let sums = FirecrackerMetrics::new(dir).sums().await.ok();
        if sums.is_some_and(|sums| sums.guest_reset() || sums.cpu_failed()) {
            return EarlyEnd::GuestRan;
        }
        match exit.status {
            // Only the end of a guest's run is a success.
            Some(ExitStatus::Code(0)) => EarlyEnd::GuestRan,
            // A refusal ends in 1. The panic of the API thread ends in SIGABRT.
            Some(ExitStatus::Code(1) | ExitStatus::Signal(ABORTED)) | None => EarlyEnd::Refused,
            Some(ExitStatus::Code(_) | ExitStatus::Signal(_)) => EarlyEnd::Failed,
        }
    }

    fn attend(&self, run: RestVmmParts<'_, FirecrackerClient>) -> LaunchedVmm {
        vmm::attend(run)
    }

    async fn explain_past(request: &AdoptRequest) -> Exit {
        let dir = request.dir.as_path();
        vmm::explain(ProcessExit::UNKNOWN, false, &FirecrackerMetrics::new(dir), dir).await
    }
}
