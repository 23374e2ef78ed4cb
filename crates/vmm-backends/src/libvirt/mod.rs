//! QEMU through libvirt: one domain per VM, which libvirtd defines, starts and ends.
//!
//! ```text
//!   LibvirtBackend ── check ──► CheckReport                   check, convert, cpu: pure
//!      │ launch: define, start, resume     adopt: look up, prove   discover: list, events
//!      ▼                                     ▼                       ▼
//!   LibvirtVmm, DomainMonitor ─► LibvirtLink ─► vmm-libvirt-helper ─► libvirtd ─► QEMU
//!      └────────────────────────────── pidfd ─────────────────────────────────────┘
//! ```
//!
//! The daemon does not link libvirt. [`helper`] finds a separate program that does, so the daemon
//! also runs on a host without libvirt. A domain bears its VM's uid as UUID, its vm_id as name, and
//! a mark of this instance in its metadata. The domain stays defined until the VM is deleted, so
//! other clients can start it, which discovery reports. Domains without the mark are not touched.

mod adopt;
mod check;
pub mod convert;
mod cpu;
mod describe;
mod discover;
mod domain;
pub mod helper;
mod helper_supervisor;
mod link;
mod monitor;
mod process;
mod run;
mod start;
mod sweep;
mod vmm;
mod xml;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, LaunchRequest, LaunchedVmm,
    SweepRequest,
};
use vmm_core::capabilities::{EndpointMode, MachineFact, PanicFact};
use vmm_core::discovery::Discoverer;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;

use crate::qemu::convert::Accelerator;
use crate::qemu::{self, KvmMode};
use convert::QemuUser;
use link::{LibvirtLink, LinkState};

pub use crate::qemu::NAME;

/// The longest wait of a health check for a connection.
const HEALTH_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The settings of the backend.
#[derive(Clone, Debug)]
pub struct LibvirtOptions {
    /// The connection's URI: `qemu:///system`, `qemu:///session` or `qemu+unix://…`.
    pub uri: String,
    /// The helper: a name that is searched beside the daemon and on PATH, or a path.
    pub helper: PathBuf,
    /// The QEMU: an absolute path, or a name, which leaves the choice to libvirt.
    pub emulator: PathBuf,
    /// The choice between KVM and emulation.
    pub kvm: KvmMode,
    /// True if domains of other clients are imported.
    pub import: bool,
}

impl LibvirtOptions {
    /// Returns the default options for a URI.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            helper: PathBuf::from(helper::PROGRAM),
            emulator: PathBuf::from("qemu-system-x86_64"),
            kvm: KvmMode::Auto,
            import: false,
        }
    }
}

/// The QEMU backend that goes through libvirt.
#[derive(Clone, Debug)]
pub struct LibvirtBackend {
    options: LibvirtOptions,
    /// The user that QEMU runs as, or `None` for libvirt's choice.
    label: Option<QemuUser>,
    /// The socket of libvirtd.
    socket: PathBuf,
    link: Arc<LibvirtLink>,
    capabilities: Capabilities,
}

impl LibvirtBackend {
    /// Returns the backend. The first use connects.
    pub fn new(options: LibvirtOptions) -> Self {
        // A user's own libvirtd runs every QEMU as that user.
        let label = (!helper::is_session(&options.uri)).then(|| QemuUser {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        });
        Self {
            label,
            socket: helper::socket_of(&options.uri, |name| std::env::var_os(name)),
            link: Arc::new(LibvirtLink::new(options.uri.clone(), options.helper.clone())),
            capabilities: capabilities(),
            options,
        }
    }

    /// Returns the kind of the VM that is libvirt's domain `domain`.
    fn kind_of(&self, domain: Uuid) -> VmKind {
        VmKind::Libvirt { uri: self.options.uri.clone(), domain }
    }

    /// Returns the version of QEMU, or an empty text without a connection.
    fn hypervisor(&self) -> String {
        match self.link.state() {
            LinkState::Up(up) => up.hypervisor,
            LinkState::Starting | LinkState::Down(..) => String::new(),
        }
    }

    /// Returns the accelerator of a domain that starts now.
    fn accelerator(&self) -> Accelerator {
        self.options.kvm.choose().accelerator
    }

    fn is_up(&self) -> bool {
        matches!(self.link.state(), LinkState::Up(_))
    }
}

fn capabilities() -> Capabilities {
    let mut capabilities = qemu::capabilities();
    capabilities.endpoint_mode = EndpointMode::Libvirt;
    capabilities.facts.guest_panic = Some(PanicFact::EndsRun);
    capabilities.facts.machines = Some(&[MachineFact::Q35]);
    capabilities.limits.remove("max-microvm-devices");
    capabilities
}

/// Returns the domain of a VM: the one on record, or the one that bears its uid.
fn domain_of(kind: &VmKind, uid: VmUid) -> Uuid {
    kind.domain().unwrap_or(*uid.as_uuid())
}

#[async_trait]
impl Backend for LibvirtBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        check::check(spec, self.accelerator())
    }

    fn advise_on_host(&self, _spec: &VmSpec, report: &mut CheckReport) {
        self.options.kvm.choose().advise(report);
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        start::launch(self, request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        Ok(adopt::adopt(self, request).await)
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        sweep::sweep(self, request).await
    }

    async fn ping(&self) -> BackendHealth {
        let version = match self.link.ready(HEALTH_CONNECT_TIMEOUT).await {
            Ok(up) => {
                let firmware = start::look_for_firmware().await;
                firmware.map(|()| format!("{} (libvirt {})", up.hypervisor, up.libvirt))
            }
            Err(down) => Err(down.message),
        };
        BackendHealth { accelerator: Some(self.accelerator().into()), ..BackendHealth::from(version) }
    }

    fn kind_of_new(&self, uid: VmUid) -> VmKind {
        self.kind_of(*uid.as_uuid())
    }

    fn serves(&self, kind: &VmKind) -> bool {
        matches!(kind, VmKind::Libvirt { uri, .. } if *uri == self.options.uri)
    }

    fn discovery(&self) -> Option<&dyn Discoverer> {
        Some(self)
    }
}
