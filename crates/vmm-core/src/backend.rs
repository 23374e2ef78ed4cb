//! The port to a hypervisor.
//!
//! ```text
//!   Backend ── check(spec) ──► CheckReport  rejected, ignored, emulated
//!      │
//!      ├─ launch(request) ─► LaunchedVmm ─┐  the one path for first boot, later boots, reboot
//!      │    └ ─ ─ spares()                │  may use a VMM that was started ahead
//!      ├─ adopt(run) ──────► Adoption ────┤  after a restart of the daemon
//!      └─ sweep(request)                  │  kills what a broken launch left
//!                                         ▼
//!                         Vmm (a handle of one run)  +  events
//!                         pause resume shutdown reset sample probe kill
//! ```
//!
//! A [`Backend`] makes whole VMs only. Its product, a [`Vmm`], lives as long as one process,
//! because the process of one hypervisor can be used once only. A second run (a reboot there, a
//! boot after shutdown everywhere) is a second [`Backend::launch`]. A method that a hypervisor
//! lacks returns a typed value ([`ResetOutcome::NeedsRelaunch`]) or
//! [`BackendErrorKind::Unsupported`], never success.
//!
//! An ability of some hypervisors is a trait of its own ([`SpareVmms`], [`Discoverer`]), and the
//! [`Backend`] returns the object that has the ability. Of a [`Vmm`] the ability is
//! [`ConsoleInput`].

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

pub use crate::backend_error::{BackendError, BackendErrorKind, ContactProof, Effect};
pub use crate::capabilities::{Capabilities, EndpointMode, KernelFormat};
pub use crate::console::{ConsoleInput, ConsoleInputError, ConsoleInputFailure};
use crate::discovery::{Discoverer, Places};
pub use crate::health::BackendHealth;
use crate::id::{InstanceId, VmId, VmUid};
use crate::kind::VmKind;
use crate::reason::Reason;
use crate::report::CheckReport;
use crate::run_permit::RunPermit;
pub use crate::spare::{SpareRequest, SpareVmms};
use crate::spec::VmSpec;
use crate::state::EndedBy;
use crate::store::RunRecord;
pub use crate::sweep::{SweepPurpose, SweepRequest};

/// A hypervisor that can start VMs.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Returns the abilities of this hypervisor. Constant for the life of the daemon.
    fn capabilities(&self) -> &Capabilities;

    /// Finds the parts of `spec` that this hypervisor rejects, ignores or emulates. Reads nothing
    /// but `spec` and, where the hypervisor has a choice, the accelerator that a VM would get now.
    fn check(&self, spec: &VmSpec) -> CheckReport;

    /// Adds warnings about a VM of `spec` that boots on this host as the host is now. Does not
    /// block.
    fn advise_on_host(&self, spec: &VmSpec, report: &mut CheckReport) {
        let _ = (spec, report);
    }

    /// Returns the kernel command line that this hypervisor is given for `spec`:
    /// [`VmSpec::kernel_args`], with the words that guests of this hypervisor need. Pure.
    fn kernel_args(&self, spec: &VmSpec) -> String {
        spec.kernel_args()
    }

    /// Starts a VMM and its guest. The guest's CPUs run when the call returns.
    ///
    /// The VMM's process may start at once. It is configured only after
    /// [`LaunchRequest::permit`] was granted.
    ///
    /// A failed launch leaves nothing running. A launch that is dropped half-way may leave a
    /// process, which [`Backend::sweep`] finds.
    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError>;

    /// Finds the VMM of an earlier run for a restarted daemon. Kills nothing.
    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError>;

    /// Ends every process that provably belongs to `request`'s run folder, and removes the sockets
    /// in it. May be repeated.
    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError>;

    /// Checks that this hypervisor can serve now. The check is cheap, because it is repeated
    /// regularly.
    async fn ping(&self) -> BackendHealth;

    /// Returns the places of VMs that are created from now on, the best place first. The set of
    /// places is constant.
    fn places(&self) -> Places {
        Places::Made
    }

    /// Returns the kind of a new VM where [`Backend::places`] is [`Places::Made`]. Depends on
    /// nothing but `uid`.
    fn kind_of_new(&self, uid: VmUid) -> VmKind {
        let _ = uid;
        VmKind::Managed
    }

    /// Returns true if this object runs VMs of `kind`. The service passes it no others. Constant.
    fn serves(&self, kind: &VmKind) -> bool {
        match self.places() {
            Places::Made => *kind == VmKind::Managed,
            places => places.contains(kind),
        }
    }

    /// Returns the ability to start VMMs ahead of their VMs, where this hypervisor has it.
    /// Constant.
    fn spares(&self) -> Option<&dyn SpareVmms> {
        None
    }

    /// Returns the ability to find VMs that another program made or started, where there can be
    /// such VMs. Constant.
    fn discovery(&self) -> Option<&dyn Discoverer> {
        None
    }
}

/// The handle of one run of one VM.
///
/// Every method ends within a bounded time, whatever the VMM does. Dropping the handle leaves the
/// VMM running.
#[async_trait]
pub trait Vmm: Send + Sync + 'static {
    /// Returns the record of the run: the VMM's identity, its socket, and its claims.
    fn run(&self) -> &RunRecord;

    /// Stops the guest's CPUs.
    async fn pause(&self) -> Result<(), BackendError>;

    /// Resumes the guest's CPUs.
    async fn resume(&self) -> Result<(), BackendError>;

    /// Climbs the shutdown ladder, and returns the rung that ended the VM after its process has
    /// really ended. The caller resumes a paused guest first, because a paused guest cannot obey.
    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError>;

    /// Resets the guest at once, without asking it. Sends no event, because the caller reports the
    /// reset.
    async fn reset(&self) -> Result<ResetOutcome, BackendError>;

    /// Starts the guest again. A guest that is asked first is shut down and launched again
    /// ([`ResetOutcome::NeedsRelaunch`]), unless the hypervisor has a way of its own.
    async fn reboot(&self, ladder: LadderOptions) -> Result<ResetOutcome, BackendError> {
        match ladder.guest_timeout {
            None => self.reset().await,
            Some(_) => Ok(ResetOutcome::NeedsRelaunch),
        }
    }

    /// Reads the counters of this run, as far as they can be read. A missing counter proves no loss
    /// of contact.
    async fn sample(&self) -> Sample;

    /// Frees the disk space of all but the end of each log that this program keeps of the VMM. Asks
    /// the VMM nothing, so that a VMM that does not answer cannot fill the run folder. A VMM that
    /// another program started has no such log.
    async fn trim_logs(&self) {}

    /// Asks the VMM for the state of its guest. This question alone decides the contact with the
    /// VMM ([`BackendErrorKind::contact`]), so the answer of the VMM itself is the only thing that
    /// is read.
    async fn probe(&self) -> Result<GuestState, BackendError>;

    /// Kills the VMM and waits until its process has ended. Needs no answer of the VMM.
    ///
    /// A VMM that another program started is ordered to end its VM, and is not killed by this
    /// method. A forced [`Backend::sweep`] may kill it.
    async fn kill(&self) -> Result<(), BackendError>;

    /// Returns the ability to take console input, where this VMM has it. Constant.
    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        None
    }
}

/// The request for a launch.
#[derive(Clone, Debug)]
pub struct LaunchRequest {
    /// The instance of this daemon.
    pub instance: InstanceId,
    /// The VM's creation.
    pub uid: VmUid,
    /// The VM's name, for the process list and logs.
    pub vm_id: VmId,
    /// The VM's specification.
    pub spec: VmSpec,
    /// The run folder. It exists, belongs to the daemon alone, and takes sockets, log and console.
    pub dir: PathBuf,
    /// The file for console output; `None` means no console.
    pub console: Option<PathBuf>,
    /// The permit. Before it is granted, the guest must not run, and nothing may change but a
    /// process of this VM.
    pub permit: RunPermit,
    /// The TAPs of the network interfaces, in the order of the interfaces. They exist.
    pub taps: Vec<String>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// True if another program made the VM. A VM that still exists is then started as it is,
    /// whatever `spec` holds.
    pub imported: bool,
    /// The reason why `spec` does not suffice to make the VM anew, if it does not; for people.
    pub incomplete: Option<String>,
}

/// A VMM that was just started or found.
pub struct LaunchedVmm {
    /// The VMM's handle.
    pub vmm: Arc<dyn Vmm>,
    /// The VMM's events. The last one is [`VmmEvent::Gone`].
    pub events: mpsc::Receiver<VmmEvent>,
}

impl fmt::Debug for LaunchedVmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launched").field("run", self.vmm.run()).finish_non_exhaustive()
    }
}

/// The request for an adoption.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// The instance of this daemon.
    pub instance: InstanceId,
    /// The VM's creation.
    pub uid: VmUid,
    /// The VM's name.
    pub vm_id: VmId,
    /// The specification that the VM was started with.
    pub spec: VmSpec,
    /// The run folder.
    pub dir: PathBuf,
    /// The recorded run. `None` where a launch was interrupted before its outcome was recorded. A
    /// VMM of such a launch is found by its run folder.
    pub run: Option<RunRecord>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// True if another program made the VM.
    pub imported: bool,
    /// The time of the record's last change, in Unix milliseconds. The record covers every earlier
    /// act of the VMM.
    pub changed_ms: i64,
}

/// The result of an adoption.
#[derive(Debug)]
pub enum Adoption {
    /// The VMM runs on and answers.
    Alive {
        /// The VMM's handle and events.
        launched: LaunchedVmm,
        /// The state of the guest.
        guest: GuestState,
    },
    /// The VMM has provably ended.
    Gone {
        /// The facts about the end.
        exit: Exit,
    },
    /// The VMM may run, but is not proven to be this VM's, or does not answer. Nothing was changed.
    Unreachable {
        /// The cause as programs read it.
        reason: Reason,
        /// The reason as a sentence for people.
        message: String,
        /// A handle that can still kill the VMM, where its process is proven to be this VM's.
        launched: Option<LaunchedVmm>,
    },
}

/// The extent of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LadderOptions {
    /// The guest's time to obey; `None` begins at the last rung without asking the guest.
    pub guest_timeout: Option<Duration>,
}

/// The way in which a reset was done, or is left to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetOutcome {
    /// The guest starts again in the same VMM.
    InPlace,
    /// The process of this hypervisor can be used once. The caller ends it and launches another.
    NeedsRelaunch,
}

/// The state of a guest, as its VMM reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// The guest's CPUs run.
    Running,
    /// The guest's CPUs are stopped.
    Paused,
    /// The VMM holds a guest that has ended or cannot go on.
    Ended,
}

/// An act of a VMM or its guest without a request of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmEvent {
    /// The guest reset itself and runs on in the same process.
    GuestReset,
    /// Another program reset the guest, which runs on in the same process.
    ResetFromOutside,
    /// Another program stopped the guest's CPUs.
    Paused,
    /// Another program resumed the guest's CPUs.
    Resumed,
    /// The guest cannot run on, though the VMM lives. The text has the reason.
    GuestFailed(String),
    /// The process has ended. No event follows. After [`Vmm::shutdown`] or [`Vmm::kill`] the cause
    /// is [`ExitCause::Requested`], and the result of that call has the details.
    Gone(Exit),
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The cause.
    pub cause: ExitCause,
    /// The exit status or signal, where it could be read, and the last lines of the VMM's log.
    pub message: String,
}

impl Exit {
    /// Returns the account of the end for people. The exit status of a VMM whose guest ended by
    /// itself explains nothing, so it is left to the log.
    pub fn account(&self) -> &str {
        match self.cause {
            ExitCause::GuestPowerOff => "the guest powered itself off",
            ExitCause::GuestReset => "the guest reset itself",
            ExitCause::GuestCrash | ExitCause::Requested | ExitCause::VmmFailed | ExitCause::Unknown => {
                &self.message
            }
        }
    }
}

/// The cause of the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCause {
    /// The guest powered off.
    GuestPowerOff,
    /// The guest reset itself where a reset ends the run.
    GuestReset,
    /// The guest crashed, and the hypervisor distinguishes a crash from a reset.
    GuestCrash,
    /// The VMM was ordered to end through its own interface.
    Requested,
    /// The VMM failed or was killed.
    VmmFailed,
    /// Nothing proves the cause, as for an end while no daemon ran.
    Unknown,
}

impl ExitCause {
    /// Returns the reason of the status after such an end.
    pub const fn reason(self) -> Reason {
        match self {
            Self::GuestPowerOff => Reason::GuestPowerOff,
            Self::GuestReset => Reason::GuestReset,
            Self::GuestCrash => Reason::GuestCrash,
            Self::Requested => Reason::VmmToldToEnd,
            Self::VmmFailed => Reason::VmmFailed,
            Self::Unknown => Reason::Unknown,
        }
    }

    /// Returns true if a restart policy counts this end as a failure.
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
    /// CPU time of all vCPUs, or of the VMM's process where only that is known.
    pub cpu_time: Option<Duration>,
    /// Resident memory of the VMM's process, in bytes.
    pub memory_bytes: Option<u64>,
    /// Network counters from the guest's point of view. The counters of an interface that cannot
    /// be read are missing from the sum.
    pub network: Option<NetworkCounters>,
    /// Disk counters from the guest's point of view.
    pub storage: Option<StorageCounters>,
    /// The counters that could not be read, each with the reason, for the log.
    pub missing: Vec<String>,
}

/// Network counters over all interfaces, from the guest's point of view.
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
