//! Cloud Hypervisor: one process per run, driven by REST on a unix socket.
//!
//! ```text
//!   terminal ──► stdin  ┌──────────────────┐ stdout ──► the console's file, appended to
//!                       │ cloud-hypervisor │ stderr ──► vmm.log
//!   api.sock, .lock ◄───└──────────────────┘ --event-monitor ──► events
//! ```
//!
//! **Console.** Of the serial port modes of version 53 only `Tty` keeps all output without help.
//! The port writes to the VMM's own stdout, which is the console's file, opened for appending.
//! Therefore the first message of the boot is kept, resets in place and later runs are appended,
//! and no daemon is needed. `File` truncates the file at every boot. `Pty` and `Socket` keep 1 MiB
//! without a reader and lose it if the VMM ends. `Tty` reads its input from stdin, and only from a
//! terminal. The VMM holds both sides of that terminal open: the controlling side is its stdin, and
//! the device side is descriptor 3, which any daemon opens again through `/proc`.
//!
//! **Events** go to a file for the same reason.

pub(crate) mod attached;
mod check;
pub(crate) mod client;
pub mod convert;
mod describe;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
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
use vmm_host::file_watch::FileWatcher;
use vmm_host::process::{Command, Stdin};

use self::client::CloudHypervisorClient;
use self::convert::CloudHypervisorConfig;
use self::events::{EVENTS, EventFile};
use crate::program::{ProgramSpec, Version};
use crate::rest::adopt::{LOG, SOCKET};
use crate::rest::backend::{RestBackend, RestHypervisor, RestVmmParts};

/// The backend's name.
pub const NAME: &str = "cloudhypervisor";
/// The oldest Cloud Hypervisor that accepts an explicit image format and forbids backing files by
/// default.
pub(crate) const OLDEST: Version = Version::new(51, 0, 0);
/// The backend that starts Cloud Hypervisors.
pub type CloudHypervisorBackend = RestBackend<CloudHypervisor>;

/// Cloud Hypervisor as a [`RestHypervisor`].
#[derive(Debug, Default)]
pub struct CloudHypervisor {
    watcher: FileWatcher,
}

#[async_trait]
impl RestHypervisor for CloudHypervisor {
    type Client = CloudHypervisorClient;

    const PROGRAM: ProgramSpec = ProgramSpec {
        backend: NAME,
        title: "Cloud Hypervisor",
        usual_name: "cloud-hypervisor",
        oldest: OLDEST,
        read_version: Version::find,
        remedy: "UNKEY_VMCP_CH_BINARY names another",
    };

    fn capabilities() -> Capabilities {
        let facts = BackendFacts {
            accelerator: Some(AcceleratorFact::Kvm),
            console: Some(ConsoleFact::InputAndOutput),
            cpu_time: Some(CpuTimeFact::OfProcess),
            disk_formats: Some(&[DiskFormat::Raw, DiskFormat::Qcow2]),
            disk_rate_limits: Some(true),
            guest_panic: Some(PanicFact::EndsRun),
            guest_power_off: Some(PowerOffFact::EndsRun),
            guest_reset: Some(ResetFact::InPlaceUnlessNever),
            guest_triple_fault: Some(TripleFaultFact::AsReset),
            network_rate_limits: Some(true),
            reboot: Some(RebootFact::InPlace),
            shutdown: Some(ShutdownFact::PowerButton),
            ..BackendFacts::default()
        };
        let limits = [("max-devices", check::MAX_DEVICES as i64), ("max-vcpus", i64::from(check::MAX_VCPUS))];
        Capabilities {
            name: BackendName::new(NAME),
            endpoint_mode: EndpointMode::Managed,
            default_restart_mode: RestartMode::GuestReboot,
            kernel_formats: &[KernelFormat::BzImage, KernelFormat::PvhElf],
            extended_l2: false,
            facts,
            limits: limits.into_iter().collect(),
        }
    }

    fn check(spec: &VmSpec) -> CheckReport {
        check::check(spec)
    }

    fn kernel_args(spec: &VmSpec) -> String {
        spec.kernel_args()
    }

    fn prepare(program: &Path, _uid: VmUid, dir: &Path, _pipe: Option<OwnedFd>) -> io::Result<Command> {
        EventFile::begin(dir)?;
        let arguments = convert::arguments(&dir.join(SOCKET), &dir.join(EVENTS));
        let terminal = console_input::input_terminal()?;
        Ok(Command {
            stdin: Stdin::File(terminal.stdin),
            kept: Some(terminal.kept),
            ..Command::new(program, arguments, dir.join(LOG))
        })
    }

    async fn configure(client: &CloudHypervisorClient, request: &LaunchRequest) -> Result<(), BackendError> {
        client
            .create(&CloudHypervisorConfig::of(&request.spec, &request.taps).with_panic_device(&request.spec))
            .await?;
        point(FaultPoint::LaunchConfigured);
        client.boot().await?;
        point(FaultPoint::LaunchStarted);
        Ok(())
    }

    fn attend(&self, run: RestVmmParts<'_, CloudHypervisorClient>) -> LaunchedVmm {
        let reset_ends = reset_ends(run.spec);
        vmm::attend(run, reset_ends, &self.watcher)
    }

    async fn explain_past(request: &AdoptRequest) -> Exit {
        vmm::explain_past(request).await
    }
}

/// Returns true if a reset of the guest ends its run.
fn reset_ends(spec: &VmSpec) -> bool {
    spec.restart.mode == Some(RestartMode::Never)
}
