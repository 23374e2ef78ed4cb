//! The port to a hypervisor.
//!
//! ```text
//!   Backend ── check(spec) ──► Report            pure: rejected, ignored, emulated
//!      │
//!      ├─ launch(request) ──► Launched ─┐        the one path for first boot, boot after shutdown, reboot
//!      │    └ ─ ─ spares()              │        which may find its process started, where the operator wants that
//!      ├─ adopt(run) ───────► Adoption ─┤        after a restart of the daemon
//!      └─ sweep(request)                │        kills what a broken launch left
//!                                       ▼
//!                         Vmm (a handle of one run)  +  events
//!                         pause resume shutdown reset sample probe kill
//! ```
//!
//! A [`Backend`] is a factory: there is no half-built VM. What it makes, a [`Vmm`], lives as long as one process does, because
//! one hypervisor's process can be used once only; whatever needs a second run (a reboot there, a boot after shutdown
//! everywhere) is a second [`Backend::launch`]. A method that a hypervisor lacks answers with a typed value that says so
//! ([`Reset::NeedsRelaunch`]) or with [`BackendErrorKind::Unsupported`], never with success.
//!
//! An ability that only some hypervisors have is a trait of its own ([`SpareVmms`], [`Discover`]), and the [`Backend`] returns
//! the object that has the ability.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

pub use crate::capabilities::{Capabilities, KernelFormat};
use crate::gate::Gate;
use crate::id::{InstanceId, VmId, VmUid};
use crate::kind::VmKind;
use crate::place::{Discover, Places};
use crate::report::Report;
pub use crate::spare::{SpareRequest, SpareVmms};
use crate::spec::VmSpec;
use crate::state::EndedBy;
use crate::store::RunRecord;
pub use crate::sweep::{Sweep, SweepRequest};

/// One hypervisor, able to start VMs.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// What this hypervisor can do. Constant for the life of the daemon.
    fn capabilities(&self) -> &Capabilities;

    /// Finds what this hypervisor rejects, ignores or emulates of `spec`. Pure: touches nothing and asks nobody.
    fn check(&self, spec: &VmSpec) -> Report;

    /// Starts a VMM and its guest. The guest's CPUs run when this answers.
    ///
    /// The VMM's process may start at once; what it is to run is told to it behind [`LaunchRequest::gate`].
    ///
    /// A failed launch leaves nothing running. A launch that is dropped half-way may leave a process, which
    /// [`Backend::sweep`] finds.
    async fn launch(&self, request: LaunchRequest) -> Result<Launched, BackendError>;

    /// Looks for the VMM of an earlier run, as a restarted daemon does. Kills nothing.
    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError>;

    /// Ends any process that provably belongs to `request`'s run folder, and removes the sockets in it. Harmless when repeated.
    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError>;

    /// Says whether this hypervisor can serve now. Cheap, because it is asked again and again.
    async fn ping(&self) -> BackendHealth;

    /// Returns where the VMs that are created from now on live, the best place first. Which places there are is constant.
    fn places(&self) -> Places {
        Places::Made
    }

    /// Returns the kind of a new VM where [`Backend::places`] is [`Places::Made`]. Constant but for `uid`.
    fn kind_of_new(&self, uid: VmUid) -> VmKind {
        let _ = uid;
        VmKind::Managed
    }

    /// Returns true if this object runs VMs of `kind`. It is given no others. Constant.
    fn serves(&self, kind: &VmKind) -> bool {
        match self.places() {
            Places::Made => *kind == VmKind::Managed,
            places => places.contains(kind),
        }
    }

    /// Returns the ability to start VMMs ahead of their VMs, where this hypervisor has that. Constant.
    fn spares(&self) -> Option<&dyn SpareVmms> {
        None
    }

    /// Returns the ability to find VMs that somebody else made or started, where there can be such VMs. Constant.
    fn discovery(&self) -> Option<&dyn Discover> {
        None
    }
}

/// The handle of one run of one VM.
///
/// Every method ends within a bounded time, whatever the VMM does. Dropping the handle leaves the VMM running.
#[async_trait]
pub trait Vmm: Send + Sync + 'static {
    /// Who the VMM is and how it is reached.
    fn run(&self) -> &RunRecord;

    /// Stops the guest's CPUs.
    async fn pause(&self) -> Result<(), BackendError>;

    /// Lets the guest's CPUs go on.
    async fn resume(&self) -> Result<(), BackendError>;

    /// Climbs the shutdown ladder and answers with the rung that ended the VM, once its process has really gone. A guest that
    /// stands still cannot obey: the caller resumes it first.
    async fn shutdown(&self, ladder: Ladder) -> Result<EndedBy, BackendError>;

    /// Resets the guest at once, without asking it. Not an event: nobody is told twice.
    async fn reset(&self) -> Result<Reset, BackendError>;

    /// Starts the guest again. A guest that is to be asked first is shut down and launched again
    /// ([`Reset::NeedsRelaunch`]), unless the hypervisor has a way of its own.
    async fn reboot(&self, ladder: Ladder) -> Result<Reset, BackendError> {
        match ladder.ask_guest_for {
            None => self.reset().await,
            Some(_) => Ok(Reset::NeedsRelaunch),
        }
    }

    /// Reads the counters of this run, as far as they can be read. Says nothing about the VMM: a counter that is missing is
    /// no silence.
    async fn sample(&self) -> Sample;

    /// Asks the VMM what its guest is doing. This alone decides whether the VMM is there ([`BackendErrorKind::contact`]), so
    /// nothing is read here but the answer of the VMM itself.
    async fn probe(&self) -> Result<GuestState, BackendError>;

    /// Kills the VMM and waits until it has gone. Does not need the VMM to answer.
    ///
    /// A VMM that somebody else started is told to end its VM, and never killed by this: [`Backend::sweep`] may be, by force.
    async fn kill(&self) -> Result<(), BackendError>;
}

/// What a launch needs to know.
#[derive(Clone, Debug)]
pub struct LaunchRequest {
    /// This installation.
    pub instance: InstanceId,
    /// The VM's creation.
    pub uid: VmUid,
    /// The VM's name, for the process list and logs.
    pub vm_id: VmId,
    /// What to run.
    pub spec: VmSpec,
    /// The run folder: exists, is ours alone, and takes sockets, log and console.
    pub dir: PathBuf,
    /// Where console output goes; `None` means no console.
    pub console: Option<PathBuf>,
    /// What has to be passed before the guest may run, or anything but a process of this VM is touched.
    pub gate: Gate,
    /// The TAP of each network interface, by the interface's order. They exist.
    pub taps: Vec<String>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// Whether somebody else made the VM: where it is still there it is started as it is, not as `spec` says.
    pub imported: bool,
    /// Why `spec` does not suffice to make the VM anew, where it does not; for people.
    pub incomplete: Option<String>,
}

/// A VMM that was just started.
pub struct Launched {
    /// Its handle.
    pub vmm: Arc<dyn Vmm>,
    /// What it does by itself. Ends with [`VmmEvent::Gone`].
    pub events: mpsc::Receiver<VmmEvent>,
}

impl fmt::Debug for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launched").field("run", self.vmm.run()).finish_non_exhaustive()
    }
}

/// What an adoption needs to know.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// This installation.
    pub instance: InstanceId,
    /// The VM's creation.
    pub uid: VmUid,
    /// The VM's name.
    pub vm_id: VmId,
    /// What it was started with.
    pub spec: VmSpec,
    /// The run folder.
    pub dir: PathBuf,
    /// The run as it was recorded. `None` where a launch was interrupted before its outcome was: the VMM, if there is one,
    /// is then found by its run folder.
    pub run: Option<RunRecord>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// Whether somebody else made the VM.
    pub imported: bool,
}

/// What became of an earlier run.
#[derive(Debug)]
pub enum Adoption {
    /// It goes on, and answers.
    Alive {
        /// Its handle and events.
        launched: Launched,
        /// What its guest is doing.
        guest: GuestState,
    },
    /// It has provably ended.
    Gone {
        /// What is known of the end.
        exit: Exit,
    },
    /// It is there, or may be, but cannot be proven ours or does not answer. Nothing was touched.
    Unreachable {
        /// Machine-readable cause in kebab-case.
        reason: &'static str,
        /// The reason as a sentence for people.
        message: String,
        /// A handle that can still kill it, where the process is proven ours.
        launched: Option<Launched>,
    },
}

/// How far a shutdown may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// How long the guest has to obey; `None` starts at the last rung, without asking it.
    pub ask_guest_for: Option<Duration>,
}

/// How a reset was, or was not, done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The guest starts again in the same VMM.
    InPlace,
    /// This hypervisor's process can be used once: end it and launch another.
    NeedsRelaunch,
}

/// What a guest is doing, as its VMM says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// Its CPUs run.
    Running,
    /// Its CPUs stand still.
    Paused,
    /// The VMM holds a guest that has ended or cannot go on.
    Ended,
}

/// What a VMM or its guest did without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmEvent {
    /// The guest reset itself and goes on in the same process.
    GuestReset,
    /// The guest was reset by somebody else, and goes on in the same process.
    ResetFromOutside,
    /// The guest's CPUs were stopped by somebody else.
    Paused,
    /// The guest's CPUs were let go on by somebody else.
    Resumed,
    /// The guest cannot go on, though the VMM lives; the text says why.
    GuestFailed(String),
    /// The process has gone. Nothing follows. After [`Vmm::shutdown`] or [`Vmm::kill`] the cause is
    /// [`ExitCause::Requested`], and what those answer says more.
    Gone(Exit),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub cause: ExitCause,
    /// The exit status or signal, where it could be read, and the last lines of the VMM's log.
    pub message: String,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCause {
    /// The guest powered off.
    GuestPowerOff,
    /// The guest reset itself where a reset ends the run.
    GuestReset,
    /// The guest crashed in a way that the hypervisor tells from a reset.
    GuestCrash,
    /// The VMM was told to end by its own interface.
    Requested,
    /// The VMM failed or was killed.
    VmmFailed,
    /// Nothing proves why, as when it happened while no daemon watched.
    Unknown,
}

impl ExitCause {
    /// The reason of a status, in kebab-case.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::GuestPowerOff => "guest-power-off",
            Self::GuestReset => "guest-reset",
            Self::GuestCrash => "guest-crash",
            Self::Requested => "vmm-told-to-end",
            Self::VmmFailed => "vmm-failed",
            Self::Unknown => "unknown",
        }
    }

    /// Says whether a restart policy counts this end as a failure.
    pub const fn is_failure(self) -> bool {
        match self {
            Self::GuestPowerOff | Self::GuestReset | Self::Requested => false,
            Self::GuestCrash | Self::VmmFailed | Self::Unknown => true,
        }
    }
}

/// Counters of one run since it began. A part that could not be read is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// CPU time used by all vCPUs, or by the VMM's process where that is all that can be told.
    pub cpu_time: Option<Duration>,
    /// Resident memory of the VMM's process, in bytes.
    pub memory_bytes: Option<u64>,
    /// Network, seen from the guest. Counters of one interface that cannot be read are missing from the sum.
    pub network: Option<NetworkCounters>,
    /// Disks, seen from the guest.
    pub storage: Option<StorageCounters>,
    /// The counters that could not be read, each with the reason, for the log.
    pub missing: Vec<String>,
}

/// Network counters over all interfaces, seen from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkCounters {
    /// Bytes the guest received.
    pub bytes_received: u64,
    /// Bytes the guest sent.
    pub bytes_transmitted: u64,
    /// Packets the guest received.
    pub packets_received: u64,
    /// Packets the guest sent.
    pub packets_transmitted: u64,
}

/// Block counters over all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StorageCounters {
    /// Bytes the guest read.
    pub bytes_read: u64,
    /// Bytes the guest wrote.
    pub bytes_written: u64,
    /// Read requests.
    pub read_operations: u64,
    /// Write requests.
    pub write_operations: u64,
}

/// Whether a hypervisor can serve, and if not, why and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendHealth {
    /// `Ok` with the version, or why not.
    pub version: Result<String, String>,
    /// What of it cannot serve, and why, where the rest can; as one of several sockets.
    pub problems: Vec<String>,
}

impl From<Result<String, String>> for BackendHealth {
    fn from(version: Result<String, String>) -> Self {
        Self { version, problems: Vec::new() }
    }
}

/// Whether a failed call had an effect. `Unknown` means: look again, never retry blindly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing was changed.
    NotApplied,
    /// The change was made all the same.
    Applied,
    /// Nobody can tell from the answer.
    Unknown,
}

/// Why a hypervisor could not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// The kind, to decide by.
    pub kind: BackendErrorKind,
    /// Whether something changed.
    pub effect: Effect,
    /// What happened and what to do, for people. Carries the VMM's own words where it had any.
    pub message: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Kinds of [`BackendError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// The hypervisor truly cannot; the feature is named.
    Unsupported(&'static str),
    /// The hypervisor's program is missing, too old or not usable.
    NotInstalled,
    /// The VMM refused or died, and said why.
    Rejected,
    /// The host lacks something: a device, a permission, room.
    Host,
    /// The VMM does not answer within its deadline. It may be alive.
    Timeout,
    /// The VMM cannot be reached. It may be alive.
    Unreachable,
    /// The VMM's answer makes no sense.
    Protocol,
    /// The VMM has gone.
    Gone,
    /// The VM did not end by all that may be done to it without force.
    StillRuns,
    /// The configuration names no way to the VM any more, and therefore nothing was touched.
    NotServed,
}

/// Contact with a VMM, as the error of a question to the VMM proves or disproves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContactProof {
    /// The VMM answered, though with a refusal.
    Made,
    /// The VMM did not answer, or what answered makes no sense.
    Lost,
    /// The VMM was not asked, or is known to have ended, which is told elsewhere.
    None,
}

impl BackendErrorKind {
    /// Tells what a failed question to a VMM says about the contact with that VMM.
    pub const fn contact(self) -> ContactProof {
        match self {
            Self::Timeout | Self::Unreachable | Self::Protocol => ContactProof::Lost,
            Self::Rejected | Self::Unsupported(_) | Self::StillRuns => ContactProof::Made,
            Self::Host | Self::NotInstalled | Self::Gone | Self::NotServed => ContactProof::None,
        }
    }
}

impl BackendError {
    /// An error without an underlying cause.
    pub fn new(kind: BackendErrorKind, effect: Effect, message: impl Into<String>) -> Self {
        Self { kind, effect, message: message.into(), source: None }
    }

    /// The same error with its cause.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}
