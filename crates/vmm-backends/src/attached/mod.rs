//! VMMs that somebody else started: one socket, one VM.
//!
//! ```text
//!   Attached ── one Seat for each socket ──────────────────────────────────────────────┐
//!      │                                                                               │ visit: proven who listens
//!      │ launch   the VMM waits ──► configured and started                             ▼
//!      │ adopt    the VMM on record, and no other ──► Handle            ┌──────────────────────┐
//!      │ sweep    what a broken start made; by force the VM             │ a VMM of another's   │
//!      └ discover ──► Patrol: looks at every seat that no handle holds ─┤ no run folder, no    │
//!                                                                       │ log, not our child   │
//!                                                                       └──────────────────────┘
//! ```
//!
//! The rule here is that nothing is touched that is not proven to be what is meant. Every connection is made to a process that
//! a pidfd holds ([`vmm_host::endpoint`]); nothing is sent to another one that comes to listen on the same socket. Without
//! force a VMM is never signalled; a VM that it still runs when all that its API offers has been tried stays as it is.
//!
//! [`Hypervisor`] is the part in which hypervisors differ: what a VMM says of itself ([`Hypervisor::meet`]), how a VM that the
//! VMM holds is started, and the handle of a VM that runs. Each hypervisor implements it in `attached.rs` of its own folder.

mod backend;
mod console;
pub(crate) mod force;
pub(crate) mod handle;
mod patrol;
mod place;
pub(crate) mod rest;
pub(crate) mod seat;
pub(crate) mod stranger;
pub(crate) mod tell;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{
    Backend, BackendError, Capabilities, GuestState, LaunchRequest, Launched, SweepRequest,
};
use vmm_core::config::VmConfig;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::place::Places;
use vmm_core::report::Report;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::endpoint::{Visit, VisitError};
use vmm_host::process::Process;

use backend::Attached;
use rest::Rest;

/// The Cloud Hypervisors behind `sockets`, each of which is looked at every `interval`. The rules of
/// `managed` about configurations hold there too.
pub fn cloud_hypervisor(
    sockets: Vec<PathBuf>,
    managed: crate::cloud_hypervisor::CloudHypervisor,
    interval: Duration,
) -> impl Backend {
    Attached::new(Rest::<crate::cloud_hypervisor::Hypervisor>::new(), sockets, managed, interval)
}

/// The Firecrackers behind `sockets`, each of which is looked at every `interval`. The rules of
/// `managed` about configurations hold there too.
pub fn firecracker(
    sockets: Vec<PathBuf>,
    managed: crate::firecracker::Firecracker,
    interval: Duration,
) -> impl Backend {
    Attached::new(Rest::<crate::firecracker::Hypervisor>::new(), sockets, managed, interval)
}

/// The QEMUs whose QMP sockets are `sockets`, each of which is looked at every `interval`. The rules of
/// `managed` about configurations hold there too.
pub fn qemu(sockets: Vec<PathBuf>, managed: crate::qemu::QemuBackend, interval: Duration) -> impl Backend {
    Attached::new(crate::qemu::attached::Qemu::new(), sockets, managed, interval)
}

/// What is particular to one hypervisor.
#[async_trait]
pub(crate) trait Hypervisor: fmt::Debug + Send + Sync + 'static {
    /// The connection to a VMM, and what a look at it has brought.
    type Client: fmt::Debug + Send + Sync + 'static;

    /// What it can do where its VMMs are somebody else's.
    fn capabilities(&self) -> &Capabilities;

    /// What people call it.
    fn title(&self) -> &'static str;

    /// How its executables are called: what their file name begins with.
    fn program(&self) -> &'static str;

    /// The command that starts a VMM which waits at `socket`, for a shell, where nobody listens there any more.
    fn how_to_start(&self, socket: &Path) -> String;

    /// Where new VMs live, of these sockets.
    fn places(&self, sockets: Vec<VmKind>) -> Places;

    /// What it rejects, ignores or emulates beside what a managed one does.
    fn check(&self, spec: &VmSpec, report: &mut Report);

    /// Asks the VMM at the other end what it is and what it holds.
    async fn meet(&self, socket: &Path, visit: Visit) -> Result<Met<Self::Client>, VisitError>;

    /// Says whether what a VMM holds is what this program would make of `spec` for `uid`, with its console in `console`.
    fn is_made_of(&self, holds: &Holding, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool;

    /// Starts a VM in the VMM that was met: the one that it holds, or with `make` a new one. What failed is undone.
    ///
    /// What the VM's console says is to go to `console`.
    async fn start(
        &self,
        met: &Met<Self::Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError>;

    /// Says whether a VM that is held already is told anew where its console goes when it is started.
    fn names_console_at_start(&self) -> bool {
        false
    }

    /// Makes the handle of a VM that runs, and begins to watch it.
    fn attend(&self, met: Met<Self::Client>, parts: Parts) -> Launched;

    /// The connection to a VMM on record that is proven to live and does not answer.
    fn silent(&self, socket: &Path, process: &Process) -> Met<Self::Client>;

    /// Ends a VM through its VMM's own API, at most within a second, and says whether it has ended.
    async fn power_off(&self, client: &Self::Client) -> Result<bool, BackendError>;

    /// Makes the VMM forget a VM that does not run, so that it is not found again. `false` where it cannot.
    async fn forget(&self, client: &Self::Client, request: &SweepRequest) -> Result<bool, BackendError>;
}

/// A VMM that was met.
#[derive(Debug)]
pub(crate) struct Met<C> {
    /// The way to it.
    pub(crate) client: Arc<C>,
    /// The process that it is.
    pub(crate) process: Process,
    /// Its version.
    pub(crate) version: String,
    /// What runs its guest's CPUs.
    pub(crate) accelerator: String,
    /// Its machine model, where it has several.
    pub(crate) machine: String,
    /// The VM that it holds, if it holds one.
    pub(crate) holds: Option<Holding>,
}

/// A VM that a VMM holds.
#[derive(Clone, Debug)]
pub(crate) struct Holding {
    /// What its guest does.
    pub(crate) guest: Guest,
    /// Its configuration, as far as that can be said.
    pub(crate) config: VmConfig,
    /// What it has beside.
    pub(crate) untold: Vec<String>,
    /// Whether it could be started as it is, so that it counts as a VM.
    pub(crate) startable: bool,
    /// Its configuration in the VMM's own words.
    pub(crate) native: serde_json::Value,
}

/// What the guest of a VM that a VMM holds is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// It was not started, or has ended.
    AtRest,
    /// Its CPUs run.
    Running,
    /// Its CPUs stand still.
    Paused,
}

impl From<GuestState> for Guest {
    fn from(state: GuestState) -> Self {
        match state {
            GuestState::Running => Self::Running,
            GuestState::Paused => Self::Paused,
            GuestState::Ended => Self::AtRest,
        }
    }
}

impl Guest {
    /// Says whether a VMM runs it.
    pub(crate) const fn is_live(self) -> bool {
        match self {
            Self::AtRest => false,
            Self::Running | Self::Paused => true,
        }
    }
}

/// What a handle is made of, beside the connection.
#[derive(Debug)]
pub(crate) struct Parts {
    /// What is put on record.
    pub(crate) run: RunRecord,
    /// What the guest was doing when the VMM was met.
    pub(crate) guest: Guest,
    /// The run folder of a VM that this program started there.
    pub(crate) dir: Option<PathBuf>,
    /// Kept by the handle for as long as it holds the seat.
    pub(crate) held: seat::Held,
    /// The copy of its console, where it has one.
    pub(crate) console: Option<console::Mirror>,
}
