//! Fault points: the points between two steps of an operation at which a test ends the daemon.
//!
//! ```text
//!   CreateVm   checked ─ committed ─ shown ──► answer
//!   BootVm     reserved ─ taps ┬ intent ─────────────────────┬ configured ─ …
//!                              └ folder ─ spawned ─ connected ┘
//!              … ─ started ─ launched ─ outcome ──► answer
//!   PauseVm, ResumeVm          intent ─ applied ─ outcome ──► answer
//!   ShutdownVm                 intent ─ (resumed) ─ asked … signalled ─ ended ─ outcome ──► answer
//!   RebootVm   in place:       intent ─ applied ─ outcome ──► answer
//!              otherwise:      intent ─ asked … ─ ended ─ reserved … launched ─ outcome ──► answer
//!   UpdateVm   checked ─ outcome ─ taps-freed ──► answer
//!   WriteConsole  written ──► answer
//!   DeleteVm   intent ─ (run-ended) ─ vmm-ended ─ taps-freed ─ folder-removed ─ outcome ──► answer
//!   a spare    folder-made ─ marked ─ (spawned ─ connected) ─ started
//!   import     taken ─ committed        found again   taken ─ (committed with its state)
//! ```
//!
//! A test kills the daemon at each point, starts the daemon again and examines the world. The code
//! of the steps calls [`point`] between them. Without the feature `fault-points`, which only tests
//! switch on, [`point`] is empty and the program contains nothing of this module. With the feature,
//! the variable `FAILPOINTS` of the `fail` crate arms points: `launch.spawned=return` ends the
//! process by SIGKILL, because no code of the process can soften that, and `1*off->return` does so
//! at the second passage. `FAULTS_PASSED` names a file that gets a line for each passed point.

use vmm_core::state::VmOperation;

/// Declares the points and the list of all points.
macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A point between two steps of an operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum FaultPoint {
            $($(#[$doc])* $point,)*
        }

        impl FaultPoint {
            /// Every point.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// Returns the name by which a test arms the point.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// CreateVm has made all checks and recorded nothing.
    CreateChecked = "create.checked",
    /// The new VM is on record.
    CreateCommitted = "create.committed",
    /// Readers see the new VM; the client has no answer yet.
    CreateShown = "create.shown",

    /// A start has claimed disks and TAPs. A reboot has ended its first half by then; a boot has
    /// recorded nothing.
    StartReserved = "start.reserved",
    /// A start has made its TAPs.
    StartTapsProvided = "start.taps-provided",
    /// A start has made its run folder.
    StartFolderMade = "start.folder-made",
    /// The VMM's process has been started.
    LaunchSpawned = "launch.spawned",
    /// The VMM's socket is connected.
    LaunchConnected = "launch.connected",
    /// The VMM is partly configured.
    LaunchPartlyConfigured = "launch.partly-configured",
    /// The VMM is configured; the guest does not run yet.
    LaunchConfigured = "launch.configured",
    /// The guest runs; the backend has not returned its handle yet.
    LaunchStarted = "launch.started",
    /// The backend has answered.
    StartLaunched = "start.launched",

    /// The intent of BootVm is on record.
    BootIntentCommitted = "boot.intent-committed",
    /// The outcome of BootVm is on record; the client has no answer yet.
    BootOutcomeCommitted = "boot.outcome-committed",

    /// The intent of PauseVm is on record.
    PauseIntentCommitted = "pause.intent-committed",
    /// The guest is paused.
    PauseApplied = "pause.applied",
    /// The outcome is on record.
    PauseOutcomeCommitted = "pause.outcome-committed",

    /// The intent of ResumeVm is on record.
    ResumeIntentCommitted = "resume.intent-committed",
    /// The guest is resumed.
    ResumeApplied = "resume.applied",
    /// The outcome is on record.
    ResumeOutcomeCommitted = "resume.outcome-committed",

    /// The intent of ShutdownVm is on record.
    ShutdownIntentCommitted = "shutdown.intent-committed",
    /// The run has ended.
    ShutdownApplied = "shutdown.applied",
    /// The outcome is on record.
    ShutdownOutcomeCommitted = "shutdown.outcome-committed",

    /// A paused guest is resumed, so that it can be asked to end.
    LadderResumed = "ladder.resumed",
    /// The guest has been asked to end; the wait has not begun.
    LadderAsked = "ladder.asked",
    /// The VMM has been ordered to power off; the wait has not begun.
    LadderOrdered = "ladder.ordered",
    /// The VMM's process has been signalled; the wait has not begun.
    LadderSignalled = "ladder.signalled",

    /// The intent of RebootVm is on record.
    RebootIntentCommitted = "reboot.intent-committed",
    /// The guest was reset in place, or its run has ended.
    RebootApplied = "reboot.applied",
    /// The outcome is on record.
    RebootOutcomeCommitted = "reboot.outcome-committed",

    /// An UpdateVm has been checked; nothing of it is on record.
    UpdateChecked = "update.checked",
    /// The new configuration is on record; the TAPs of removed interfaces exist.
    UpdateOutcomeCommitted = "update.outcome-committed",
    /// The TAPs of removed interfaces are gone; the client has no answer yet.
    UpdateTapsFreed = "update.taps-freed",

    /// The console has taken the bytes of a WriteConsole; the client has no answer yet.
    ConsoleWritten = "console.written",

    /// The intent of DeleteVm is on record.
    DeleteIntentCommitted = "delete.intent-committed",
    /// The run has ended. The VMM or libvirt, where one outlives runs, still has the VM.
    DeleteRunEnded = "delete.run-ended",
    /// No VMM of the VM is left.
    DeleteVmmEnded = "delete.vmm-ended",
    /// No TAP of the VM is left.
    DeleteTapsFreed = "delete.taps-freed",
    /// The run folder is gone.
    DeleteFolderRemoved = "delete.folder-removed",
    /// The VM's record is removed.
    DeleteOutcomeCommitted = "delete.outcome-committed",

    /// A guest whose own resets end its run has been set to start again at the next reset. No reset
    /// has been ordered yet.
    ResetPrepared = "reset.prepared",
    /// The reset has been ordered. The guest's own resets do not end its run yet.
    ResetOrdered = "reset.ordered",

    /// The run folder of a spare VMM exists without its mark.
    SpareFolderMade = "spare.folder-made",
    /// The run folder bears its mark; no process runs there yet.
    SpareMarked = "spare.marked",
    /// A spare VMM waits; the pool does not offer it yet.
    SpareStarted = "spare.started",

    /// A VM that another program made is held and on no record.
    ImportTaken = "import.taken",
    /// The imported VM is on record; no reader sees it yet.
    ImportCommitted = "import.committed",
    /// A recorded VM was found running again and is held. Its state is not on record.
    FoundTaken = "found.taken",
}

impl FaultPoint {
    /// Returns the point behind the commit of the intent of `request`.
    pub const fn intent_committed(request: VmOperation) -> Self {
        match request {
            VmOperation::Boot => Self::BootIntentCommitted,
            VmOperation::Pause => Self::PauseIntentCommitted,
            VmOperation::Resume => Self::ResumeIntentCommitted,
            VmOperation::Shutdown => Self::ShutdownIntentCommitted,
            VmOperation::Reboot => Self::RebootIntentCommitted,
            // UpdateVm has no intent and no effect on a VMM: one commit is the whole of it.
            VmOperation::Update => Self::UpdateChecked,
            VmOperation::Delete | VmOperation::ForceDelete => Self::DeleteIntentCommitted,
        }
    }

    /// Returns the point behind the effect of `request` on a VMM. A boot has its own,
    /// [`FaultPoint::StartLaunched`].
    pub const fn applied(request: VmOperation) -> Self {
        match request {
            VmOperation::Boot => Self::StartLaunched,
            VmOperation::Pause => Self::PauseApplied,
            VmOperation::Resume => Self::ResumeApplied,
            VmOperation::Shutdown => Self::ShutdownApplied,
            VmOperation::Reboot => Self::RebootApplied,
            VmOperation::Update => Self::UpdateChecked,
            VmOperation::Delete | VmOperation::ForceDelete => Self::DeleteVmmEnded,
        }
    }

    /// Returns the point behind the commit of the outcome of `request`.
    pub const fn outcome_committed(request: VmOperation) -> Self {
        match request {
            VmOperation::Boot => Self::BootOutcomeCommitted,
            VmOperation::Pause => Self::PauseOutcomeCommitted,
            VmOperation::Resume => Self::ResumeOutcomeCommitted,
            VmOperation::Shutdown => Self::ShutdownOutcomeCommitted,
            VmOperation::Reboot => Self::RebootOutcomeCommitted,
            VmOperation::Update => Self::UpdateOutcomeCommitted,
            VmOperation::Delete | VmOperation::ForceDelete => Self::DeleteOutcomeCommitted,
        }
    }
}

/// Passes a point. Does nothing in a build without `fault-points`.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub const fn point(_: FaultPoint) {}

/// Passes a point. Ends the process if a test has armed the point.
#[cfg(feature = "fault-points")]
pub fn point(point: FaultPoint) {
    armed::pass(point.name());
}

#[cfg(feature = "fault-points")]
mod armed {
    use std::fs::File;
    use std::io::Write as _;
    use std::sync::OnceLock;

    use fail::FailScenario;
    use rustix::process::{Signal, getpid, kill_process};

    /// The file that lists passed points, if a test asks for one.
    static PASSED: OnceLock<Option<File>> = OnceLock::new();

    pub(super) fn pass(name: &str) {
        let passed = PASSED.get_or_init(|| {
            // Dropping the scenario would disarm all points, so it is kept while the process lives.
            std::mem::forget(FailScenario::setup());
            let file = std::env::var_os("FAULTS_PASSED")?;
            File::options().append(true).create(true).open(file).ok()
        });
        if let Some(mut file) = passed.as_ref() {
            // The line is written in one call, because other threads pass points too and writeln!
            // may write twice.
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
        fail::fail_point!(name, |_| die());
    }

    /// Ends the process in a way that no code of it can soften or survive.
    fn die() {
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            // No thread comes here after SIGKILL, but a sandbox may suppress the signal.
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_point_has_its_own_name() {
        let names: BTreeSet<_> = FaultPoint::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), FaultPoint::ALL.len());
    }
}
