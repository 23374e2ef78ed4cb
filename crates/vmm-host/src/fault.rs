//! Fault points: the places between two steps of an operation where the daemon may die.
//!
//! ```text
//!   CreateVm   checked ─ committed ─ shown ──► answer
//!   BootVm     reserved ─ taps ┬ intent ─────────────────────┬ configured ─ started ─ launched ─ outcome ──► answer
//!                              └ folder ─ spawned ─ connected ┘
//!   PauseVm, ResumeVm          intent ─ applied ─ outcome ──► answer
//!   ShutdownVm                 intent ─ (resumed) ─ asked … signalled ─ ended ─ outcome ──► answer
//!   RebootVm   in place:       intent ─ applied ─ outcome ──► answer
//!              otherwise:      intent ─ asked … ─ ended ─ reserved … launched ─ outcome ──► answer
//!   DeleteVm   intent ─ (run-ended) ─ vmm-ended ─ taps-freed ─ folder-removed ─ outcome ──► answer
//!   a spare    folder-made ─ marked ─ (spawned ─ connected) ─ started
//!   import     taken ─ committed        found again   taken ─ (committed with its state)
//! ```
//!
//! A test kills the daemon at each of them, starts it again and looks at the world. The code that does the steps calls [`point`]
//! between them and knows no more. Without the feature `fault-points`, which only tests switch on, that is an empty function and
//! nothing of this is in the program. With it, the variable `FAILPOINTS` of the `fail` crate says what happens where:
//! `launch.spawned=return` ends the process by SIGKILL, as no code of its own could soften, and `1*off->return` does so the
//! second time. `FAULTS_PASSED` names a file that gets a line for each point that is passed.

use vmm_core::state::Request;

/// Declares the points, and with them the list of all.
macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A place between two steps of an operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum FaultPoint {
            $($(#[$doc])* $point,)*
        }

        impl FaultPoint {
            /// Every point.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// The name by which it is armed.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// CreateVm has checked everything and recorded nothing.
    CreateChecked = "create.checked",
    /// The new VM is on record.
    CreateCommitted = "create.committed",
    /// Readers see the new VM; the client does not know yet.
    CreateShown = "create.shown",

    /// A start has claimed disks and TAPs. A reboot has ended its first half by then; a boot has recorded nothing.
    StartReserved = "start.reserved",
    /// A start has made its TAPs.
    StartTapsProvided = "start.taps-provided",
    /// A start has made its run folder.
    StartFolderMade = "start.folder-made",
    /// The VMM's process has been started.
    LaunchSpawned = "launch.spawned",
    /// The VMM's socket is connected.
    LaunchConnected = "launch.connected",
    /// The VMM has been told a part of its VM.
    LaunchPartlyConfigured = "launch.partly-configured",
    /// The VMM knows its VM; the guest does not run yet.
    LaunchConfigured = "launch.configured",
    /// The guest runs; its VMM is still to be taken charge of.
    LaunchStarted = "launch.started",
    /// The backend has answered.
    StartLaunched = "start.launched",

    /// The intent of BootVm is on record.
    BootIntentCommitted = "boot.intent-committed",
    /// What came of it is on record; the client does not know yet. So for all.
    BootOutcomeCommitted = "boot.outcome-committed",

    /// The intent of PauseVm is on record.
    PauseIntentCommitted = "pause.intent-committed",
    /// The guest stands still.
    PauseApplied = "pause.applied",
    /// The outcome is on record.
    PauseOutcomeCommitted = "pause.outcome-committed",

    /// The intent of ResumeVm is on record.
    ResumeIntentCommitted = "resume.intent-committed",
    /// The guest goes on.
    ResumeApplied = "resume.applied",
    /// The outcome is on record.
    ResumeOutcomeCommitted = "resume.outcome-committed",

    /// The intent of ShutdownVm is on record.
    ShutdownIntentCommitted = "shutdown.intent-committed",
    /// The run has ended.
    ShutdownApplied = "shutdown.applied",
    /// The outcome is on record.
    ShutdownOutcomeCommitted = "shutdown.outcome-committed",

    /// A paused guest goes on, so that it can be asked to end.
    LadderResumed = "ladder.resumed",
    /// The guest has been asked to end, and has not been waited for.
    LadderAsked = "ladder.asked",
    /// The VMM has been ordered to power off, and has not been waited for.
    LadderOrdered = "ladder.ordered",
    /// The VMM's process has been signalled, and has not been waited for.
    LadderSignalled = "ladder.signalled",

    /// The intent of RebootVm is on record.
    RebootIntentCommitted = "reboot.intent-committed",
    /// The guest was reset in place, or its run has ended.
    RebootApplied = "reboot.applied",
    /// The outcome is on record.
    RebootOutcomeCommitted = "reboot.outcome-committed",

    /// The intent of DeleteVm is on record.
    DeleteIntentCommitted = "delete.intent-committed",
    /// The run has ended, and what outlives runs still knows the VM: its VMM, or libvirt.
    DeleteRunEnded = "delete.run-ended",
    /// No VMM of the VM is left.
    DeleteVmmEnded = "delete.vmm-ended",
    /// No TAP of the VM is left.
    DeleteTapsFreed = "delete.taps-freed",
    /// The run folder is gone.
    DeleteFolderRemoved = "delete.folder-removed",
    /// The VM is off the record.
    DeleteOutcomeCommitted = "delete.outcome-committed",

    /// A guest whose own resets end its run would be started again by one now; it has not been reset yet.
    ResetPrepared = "reset.prepared",
    /// It has been reset, and its own resets would not end its run yet.
    ResetOrdered = "reset.ordered",

    /// The run folder of a spare VMM is there, without its mark.
    SpareFolderMade = "spare.folder-made",
    /// It bears its mark; nothing runs there yet.
    SpareMarked = "spare.marked",
    /// A spare VMM waits; nobody can be promised it yet.
    SpareStarted = "spare.started",

    /// A VM that somebody else made is held, and is on no record.
    ImportTaken = "import.taken",
    /// It is on record; nobody sees it yet.
    ImportCommitted = "import.committed",
    /// A VM on record was found running again and is held; that is not on record.
    FoundTaken = "found.taken",
}

impl FaultPoint {
    /// The point behind the commit of the intent of `request`.
    pub const fn intent_committed(request: Request) -> Self {
        match request {
            Request::Boot => Self::BootIntentCommitted,
            Request::Pause => Self::PauseIntentCommitted,
            Request::Resume => Self::ResumeIntentCommitted,
            Request::Shutdown => Self::ShutdownIntentCommitted,
            Request::Reboot => Self::RebootIntentCommitted,
            Request::Delete | Request::ForceDelete => Self::DeleteIntentCommitted,
        }
    }

    /// The point behind the effect of `request` on a VMM. A boot has its own, [`FaultPoint::StartLaunched`].
    pub const fn applied(request: Request) -> Self {
        match request {
            Request::Boot => Self::StartLaunched,
            Request::Pause => Self::PauseApplied,
            Request::Resume => Self::ResumeApplied,
            Request::Shutdown => Self::ShutdownApplied,
            Request::Reboot => Self::RebootApplied,
            Request::Delete | Request::ForceDelete => Self::DeleteVmmEnded,
        }
    }

    /// The point behind the commit of the outcome of `request`.
    pub const fn outcome_committed(request: Request) -> Self {
        match request {
            Request::Boot => Self::BootOutcomeCommitted,
            Request::Pause => Self::PauseOutcomeCommitted,
            Request::Resume => Self::ResumeOutcomeCommitted,
            Request::Shutdown => Self::ShutdownOutcomeCommitted,
            Request::Reboot => Self::RebootOutcomeCommitted,
            Request::Delete | Request::ForceDelete => Self::DeleteOutcomeCommitted,
        }
    }
}

/// Passes a point; in a test, perhaps no further.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub const fn point(_: FaultPoint) {}

/// Passes a point; in a test, perhaps no further.
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

    /// Where passed points are written down.
    static PASSED: OnceLock<Option<File>> = OnceLock::new();

    pub(super) fn pass(name: &str) {
        let passed = PASSED.get_or_init(|| {
            // For as long as the process lives.
            std::mem::forget(FailScenario::setup());
            let file = std::env::var_os("FAULTS_PASSED")?;
            File::options().append(true).create(true).open(file).ok()
        });
        if let Some(mut file) = passed.as_ref() {
            // In one piece: other threads pass points too, and writeln! writes twice.
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
        fail::fail_point!(name, |_| die());
    }

    /// Ends the process as nothing in it can soften or survive.
    fn die() {
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            // The kernel lets no thread come this far; a sandbox might.
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let names: BTreeSet<_> = FaultPoint::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), FaultPoint::ALL.len());
    }
}
