//! QEMU: one process per VM, controlled over QMP.
//!
//! ```text
//!   QemuBackend ── check ──► CheckReport                           convert, check: pure
//!      │ launch: start, connect, cont          adopt: prove, connect
//!      │    └─ or use a spare                   │
//!      ▼                                         ▼
//!   QemuVmm ─ QemuLink ─ Qmp ─► qmp.sock ─► qemu-system-x86_64 ─► console log, ◄─ console.in
//!   QemuMonitor ◄ events ─┘                          │
//!      └──────────────── pidfd ◄─────────────────────┘
//! ```
//!
//! QEMU is started with a stopped guest, and receives `cont` once the events are read, so that no
//! event is missed. A guest's reset and its power-off differ in QEMU's events, not in the exit
//! status.

mod accelerator;
mod adopt;
pub(crate) mod attached;
pub(crate) mod check;
pub mod client;
pub mod convert;
mod describe;
pub(crate) mod exit_schedule;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub(crate) mod images;
pub(crate) mod layout;
pub(crate) mod link;
pub(crate) mod monitor;
pub(crate) mod options;
mod orders;
pub mod qmp;
mod spare;
mod start;
mod trial;
pub(crate) mod vmm;

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    KernelFormat, LaunchRequest, LaunchedVmm, SpareRequest, SpareVmms, SweepRequest,
};
use vmm_core::capabilities::{
    BackendFacts, ConsoleFact, EndpointMode, MachineFact, PanicFact, PowerOffFact, RebootFact, ResetFact,
    ShutdownFact,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::report::CheckReport;
use vmm_core::spec::{DiskFormat, VmSpec};

pub use accelerator::KvmMode;
use convert::{Accelerator, QemuMachine};
use spare::SpareQemu;
use trial::{Trials, Verdict};

use crate::program::{InstalledProgram, Program, ProgramSpec, Version};
use crate::spares::SpareTable;

/// The name of this backend for clients.
pub const NAME: &str = "qemu";

/// The program. The oldest usable version is the first with JSON after `-device`, which [`convert`]
/// writes.
const PROGRAM: ProgramSpec = ProgramSpec {
    backend: NAME,
    title: "QEMU",
    usual_name: "qemu-system-x86_64",
    oldest: Version::new(6, 2, 0),
    read_version,
    remedy: "Debian and Ubuntu have it in the package qemu-system-x86; UNKEY_VMCP_QEMU_BINARY names another",
};

/// Reads the version from `QEMU emulator version 7.2.22 (Debian …)`.
fn read_version(said: &str) -> Option<Version> {
    Version::leading(said.split_once("QEMU emulator version ")?.1)
}

/// The settings of the backend.
#[derive(Clone, Debug)]
pub struct QemuOptions {
    /// The program: a name on the PATH, or a path.
    pub binary: PathBuf,
    /// The choice between KVM and emulation.
    pub kvm: KvmMode,
}

impl Default for QemuOptions {
    fn default() -> Self {
        Self { binary: PathBuf::from(PROGRAM.usual_name), kvm: KvmMode::Auto }
    }
}

/// The QEMU backend.
#[derive(Debug)]
pub struct QemuBackend {
    program: Program,
    kvm: KvmMode,
    trials: Trials,
    capabilities: Capabilities,
    spares: SpareTable<SpareQemu>,
}

impl QemuBackend {
    /// Returns the backend.
    pub fn new(options: QemuOptions) -> Self {
        Self {
            program: Program::new(options.binary, PROGRAM),
            kvm: options.kvm,
            trials: Trials::default(),
            capabilities: capabilities(),
            spares: SpareTable::default(),
        }
    }

    /// Returns the program, if it is usable and the host serves the configured accelerator.
    async fn ready(&self) -> Result<InstalledProgram, BackendError> {
        let program = self.program.find().await?;
        self.kvm
            .as_ordered()
            .map_err(|why| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why))?;
        Ok(program)
    }

    /// Returns the version of the program, and the machine models that do not start.
    async fn proven(&self, accelerator: Accelerator) -> BackendHealth {
        let program = match self.ready().await {
            Ok(program) => program,
            Err(error) => return BackendHealth::from(Err(error.message)),
        };
        match self.trials.verdict(&program, accelerator).await {
            // VMs that name no machine get a q35, so the backend cannot serve without this model.
            Ok(Verdict { q35: Err(why), microvm: _ }) | Err(why) => BackendHealth::from(Err(why)),
            Ok(Verdict { q35: Ok(()), microvm }) => BackendHealth {
                problems: microvm.err().into_iter().collect(),
                ..BackendHealth::from(Ok(program.version.to_string()))
            },
        }
    }
}

/// Returns the capabilities, without the accelerator, which each start chooses.
pub(crate) fn capabilities() -> Capabilities {
    let facts = BackendFacts {
        console: Some(ConsoleFact::InputAndOutput),
        disk_formats: Some(&[DiskFormat::Raw, DiskFormat::Qcow2]),
        disk_rate_limits: Some(true),
        guest_panic: Some(PanicFact::EndsRunButOnMicrovm),
        guest_power_off: Some(PowerOffFact::EndsRun),
        guest_reset: Some(ResetFact::InPlaceUnlessNever),
        machines: Some(&[MachineFact::Q35, MachineFact::Microvm]),
        network_rate_limits: Some(false),
        reboot: Some(RebootFact::InPlace),
        shutdown: Some(ShutdownFact::PowerButton),
        ..BackendFacts::default()
    };
    let limits = [
        ("max-disks", check::MAX_Q35_DEVICES as i64),
        ("max-microvm-devices", check::MAX_MICROVM_DEVICES as i64),
        ("max-network-interfaces", check::MAX_Q35_DEVICES as i64),
        ("max-vcpus", i64::from(check::MAX_VCPUS)),
    ];
    Capabilities {
        name: BackendName::new(NAME),
        endpoint_mode: EndpointMode::Managed,
        default_restart_mode: convert::DEFAULT_RESTART,
        kernel_formats: &[KernelFormat::BzImage, KernelFormat::PvhElf],
        extended_l2: true,
        facts,
        limits: BTreeMap::from(limits),
    }
}

#[async_trait]
impl Backend for QemuBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        check::check(spec, self.kvm.choose().accelerator)
    }

    fn advise_on_host(&self, spec: &VmSpec, report: &mut CheckReport) {
        self.kvm.choose().advise(report);
        // A q35 that does not start is the health of the whole backend, which the service reports.
        if QemuMachine::of(spec) == Some(QemuMachine::Microvm)
            && let Some(why) = self.trials.failure(QemuMachine::Microvm)
        {
            let field = format!("config.boot.boot_options[\"{}\"]", options::MACHINE_KEY);
            report.advise(field, format!("BootVm will fail: {why}"));
        }
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        // The spare is taken before the checks, so that a launch that fails ends it.
        let spare = self.spares.take(request.uid);
        match (self.ready().await, spare) {
            (Ok(program), spare) => {
                let choice = self.kvm.choose();
                choice.log();
                let launched = start::launch(program, choice.accelerator, spare, request).await;
                if launched.as_ref().is_err_and(|error| error.kind == BackendErrorKind::Rejected) {
                    self.trials.forget();
                }
                launched
            }
            (Err(error), None) => Err(error),
            (Err(error), Some(spare)) => {
                spare.end(&error).await;
                Err(error)
            }
        }
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let accelerator = self.kvm.choose().accelerator;
        Ok(adopt::adopt(request, self.program.running_names().await, accelerator).await)
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.dismiss_spare(request.uid).await;
        crate::launch::sweep(&request.dir, &self.program.running_names().await).await
    }

    async fn ping(&self) -> BackendHealth {
        let accelerator = self.kvm.choose().accelerator;
        let health = self.proven(accelerator).await;
        BackendHealth { accelerator: Some(accelerator.into()), ..health }
    }

    fn spares(&self) -> Option<&dyn SpareVmms> {
        Some(self)
    }
}

#[async_trait]
impl SpareVmms for QemuBackend {
    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError> {
        let program = self.ready().await?;
        self.dismiss_spare(request.uid).await;
        let uid = request.uid;
        let accelerator = self.kvm.choose().accelerator;
        self.spares.keep(uid, spare::start(program, accelerator, request).await?);
        Ok(())
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        if let Some(spare) = self.spares.take(uid) {
            spare.end("it is no longer needed").await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu_are_parsed() {
        let version = |major, minor, micro| Some(Version::new(major, minor, micro));
        assert_eq!(
            read_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"),
            version(7, 2, 22)
        );
        assert_eq!(read_version("QEMU emulator version 10.1.0\n"), version(10, 1, 0));
        assert_eq!(read_version("QEMU emulator version 9.0.50 (v9.0.0-rc1)"), version(9, 0, 50));
        assert_eq!(read_version("bash 5.2"), None);
        assert_eq!(read_version("QEMU emulator version x"), None);
    }
}
