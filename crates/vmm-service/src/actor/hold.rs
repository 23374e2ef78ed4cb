//! The actor's hold on its VM's process, and the actor's next step that no client requests.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmm_core::backend::{LaunchedVmm, Vmm, VmmEvent};
use vmm_core::store::{Intent, PendingProcess, PendingWork, RunRecord};

use super::restart::{self, LastEnd};
use super::{Actor, discovered_files, resets::ResetCounter};
use crate::clock::now_ms;
use crate::console::ConsoleTrimmer;
use crate::mailbox::OperationRequest;
use crate::metrics::{ContactReport, LatestMetrics, Sampler};
use crate::sockets::Sockets;

/// The time between two searches for a process that may live and of which no handle is held.
const SEARCH_INTERVAL: Duration = Duration::from_secs(10);

/// The actor's hold on its VM's process. The admission of operations depends on the hold, and not
/// on the status that is shown.
pub(super) enum Hold {
    /// The VM has no process.
    Nothing,
    /// A VMM runs the VM and answers.
    Vmm(Box<HeldVmm>),
    /// A VMM runs the VM and does not answer. It may be killed.
    Silent(Box<HeldVmm>),
    /// The VMM on record may run the VM. No handle is held.
    Lost,
    /// A start has left a process, or may have, and its guest may run. The VM counts as not
    /// running.
    Orphan(Option<Box<HeldVmm>>),
    /// A start was cancelled before its VMM received any data, and the process may be left. It runs
    /// no guest.
    Leftover,
    /// This program cannot take up the record.
    Quarantined {
        /// The reason.
        why: String,
        /// True if a process of the VM may exist.
        process: bool,
    },
}

/// The next step of an actor that no client requests.
pub(super) enum NextStep {
    /// The actor waits.
    Idle,
    /// The actor starts the VM by its restart policy, because its last run ended.
    RestartAt(Instant, Box<LastEnd>),
    /// The actor searches for a process that may live and of which no handle is held.
    LookAt(Instant),
    /// The actor carries on an operation that the death of a daemon interrupted.
    Finish(Box<OperationRequest>),
}

/// A VMM that is held, with its events and samples.
pub(super) struct HeldVmm {
    pub(super) vmm: Arc<dyn Vmm>,
    pub(super) events: mpsc::Receiver<VmmEvent>,
    sampler: Sampler,
    /// The run as it goes on record.
    pub(super) run: RunRecord,
    /// The instant since which the VMM has run without a reset of its guest in place.
    pub(super) quiet_since: Instant,
    /// Resets in place that are not on record yet.
    pub(super) resets: ResetCounter,
    /// The instant of the next look at the files, if disks are claimed by their paths.
    pub(super) files_due: Option<Instant>,
    /// Bounds the kept console for as long as the VMM is held.
    _trimmer: Option<ConsoleTrimmer>,
}

/// A message from a VMM.
pub(super) enum VmmMessage {
    Event(VmmEvent),
    Contact(ContactReport),
}

impl Hold {
    fn live(&self) -> Option<&HeldVmm> {
        match self {
            Self::Vmm(live) | Self::Silent(live) | Self::Orphan(Some(live)) => Some(live),
            Self::Nothing | Self::Lost | Self::Orphan(None) | Self::Leftover | Self::Quarantined { .. } => {
                None
            }
        }
    }

    pub(super) fn live_mut(&mut self) -> Option<&mut HeldVmm> {
        match self {
            Self::Vmm(live) | Self::Silent(live) | Self::Orphan(Some(live)) => Some(live),
            Self::Nothing | Self::Lost | Self::Orphan(None) | Self::Leftover | Self::Quarantined { .. } => {
                None
            }
        }
    }

    /// Returns the handle of the VMM, if one is held.
    pub(super) fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        self.live().map(|live| Arc::clone(&live.vmm))
    }

    /// Returns the process that is held.
    pub(super) fn run(&self) -> Option<&RunRecord> {
        self.live().map(|live| &live.run)
    }

    /// Returns the run for the next record. `recorded` is the run on record now.
    ///
    /// The process of an orphan is no run of the VM. The intent of its start records what that
    /// process may use.
    pub(super) fn run_on_record(&self, recorded: Option<RunRecord>) -> Option<RunRecord> {
        match self {
            Self::Vmm(live) | Self::Silent(live) => Some(live.run.clone()),
            Self::Lost | Self::Quarantined { process: true, .. } => recorded,
            Self::Nothing | Self::Orphan(_) | Self::Leftover | Self::Quarantined { process: false, .. } => {
                None
            }
        }
    }

    /// Returns the instant since which the VMM has run without a reset of its guest in place.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        self.live().map(|live| live.quiet_since)
    }

    /// Returns true if only a forced operation may touch the VM, because its process does not
    /// answer or is not held.
    pub(super) fn is_out_of_reach(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Lost | Self::Orphan(_) => true,
            Self::Nothing | Self::Vmm(_) | Self::Leftover | Self::Quarantined { .. } => false,
        }
    }

    /// Returns true if a process of the VM may exist.
    pub(super) fn may_be_a_process(&self) -> bool {
        !matches!(self, Self::Nothing | Self::Quarantined { process: false, .. })
    }

    /// Returns the process that may be left and that the daemon does not reach.
    fn pending_process(&self) -> PendingProcess {
        match self {
            Self::Leftover => PendingProcess::Leftover,
            Self::Silent(_) | Self::Lost | Self::Orphan(_) | Self::Quarantined { process: true, .. } => {
                PendingProcess::OutOfReach
            }
            Self::Nothing | Self::Vmm(_) | Self::Quarantined { process: false, .. } => PendingProcess::None,
        }
    }

    /// Returns true if no run of the VM was ever recorded as begun, or none since the last run
    /// ended.
    pub(super) fn never_ran(&self) -> bool {
        match self {
            Self::Nothing | Self::Orphan(_) | Self::Leftover | Self::Quarantined { process: false, .. } => {
                true
            }
            Self::Vmm(_) | Self::Silent(_) | Self::Lost | Self::Quarantined { process: true, .. } => false,
        }
    }

    /// Waits for the next sign of the VMM. Waits for ever if no VMM is held.
    pub(super) async fn next_message(&mut self) -> VmmMessage {
        match self.live_mut() {
            None => pending().await,
            Some(live) => tokio::select! {
                biased;
                // A backend promises that `Gone` is the last event. A channel that closes without
                // it is ignored.
                Some(event) = live.events.recv() => VmmMessage::Event(event),
                news = live.sampler.news() => VmmMessage::Contact(news),
            },
        }
    }

    /// Returns the instant of the next look at the VM's files.
    pub(super) fn files_due(&self) -> Option<Instant> {
        self.live().and_then(|live| live.files_due)
    }

    /// Returns the instant at which the resets in place are to be recorded.
    pub(super) fn resets_due(&self) -> Option<Instant> {
        self.live().and_then(|live| live.resets.due())
    }
}

impl NextStep {
    /// Returns true if the VM waits for a start by its restart policy.
    pub(super) const fn is_restart(&self) -> bool {
        matches!(self, Self::RestartAt(..))
    }

    /// Returns the next search for a process, after [`SEARCH_INTERVAL`].
    pub(super) fn search_later() -> Self {
        Self::LookAt(Instant::now() + SEARCH_INTERVAL)
    }

    /// Cancels a restart by policy. Returns true if one was due.
    pub(super) fn call_off_restart(&mut self) -> bool {
        let waits = self.is_restart();
        if waits {
            *self = Self::Idle;
        }
        waits
    }
}

impl Actor {
    /// Returns the work that the next record shows. `intent` is the intent of that record. An
    /// operation in progress takes the place of a restart that is due.
    pub(super) fn pending_work(&self, intent: Option<&Intent>) -> PendingWork {
        let restart = intent.is_none() && self.next.is_restart();
        PendingWork { restart, process: self.hold.pending_process() }
    }

    /// Makes a `HeldVmm` of a VMM that was launched or found. `run` is the run for the record.
    pub(super) fn live(&self, launched: LaunchedVmm, run: RunRecord) -> Box<HeldVmm> {
        self.live_with(launched, run, self.spec().cpu.count)
    }

    /// Makes a `HeldVmm` of a VMM that runs a guest with `vcpus` CPUs.
    pub(super) fn live_with(&self, launched: LaunchedVmm, run: RunRecord, vcpus: u32) -> Box<HeldVmm> {
        let LaunchedVmm { vmm, events } = launched;
        let interval = self.shared.settings.metrics_interval;
        let metrics = LatestMetrics::default();
        self.shared.index.show_run(self.record.uid, metrics.clone(), Arc::downgrade(&vmm));
        let trimmer = ConsoleTrimmer::start_for(&self.shared, &self.record, &self.spec());
        let vm_id = self.record.vm_id.clone();
        let sockets = Sockets::of(&self.record, &run, self.dir());
        let sampler = Sampler::start(Arc::clone(&vmm), sockets, (vm_id, vcpus), interval, metrics);
        let quiet_since = run_start(&run);
        let files_due = discovered_files::next_look(&run);
        Box::new(HeldVmm {
            vmm,
            events,
            sampler,
            run,
            quiet_since,
            resets: ResetCounter::default(),
            files_due,
            _trimmer: trimmer,
        })
    }

    /// Replaces the hold. The next step is cleared, because it belonged to the hold before.
    pub(super) fn take_hold(&mut self, hold: Hold) {
        self.hold = hold;
        self.next = NextStep::Idle;
    }

    /// Drops the hold on a VMM that has provably gone, and releases its claims on the host.
    pub(super) fn drop_hold_and_claims(&mut self) {
        self.drop_hold();
        self.shared.claims.release(self.record.uid);
    }

    /// Drops the hold on a VMM that has provably gone. Its claims on the host stay.
    pub(super) fn drop_hold(&mut self) {
        let nothing = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Quarantined { why, .. } => Hold::Quarantined { why, process: false },
            _ => Hold::Nothing,
        };
        self.take_hold(nothing);
    }

    /// Marks a held VMM as silent.
    pub(super) fn mark_silent(&mut self) {
        self.hold = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Vmm(live) => Hold::Silent(live),
            other => other,
        };
    }

    /// Marks a held VMM as one that answers.
    pub(super) fn mark_answering(&mut self) {
        self.hold = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Silent(live) => Hold::Vmm(live),
            Hold::Orphan(Some(mut live)) => {
                // The process becomes a run of the VM, and goes on record with all claims of its
                // start.
                live.run.claims = self.shared.claims.held_by(self.record.uid);
                Hold::Vmm(live)
            }
            other => other,
        };
    }

    /// Schedules a search for a process that may live, if no handle will report it.
    pub(super) fn schedule_search(&mut self) {
        let unseen = matches!(self.hold, Hold::Lost | Hold::Orphan(None));
        if unseen && matches!(self.next, NextStep::Idle | NextStep::RestartAt(..)) {
            self.next = NextStep::search_later();
        }
    }
}

/// Returns the instant at which a run began, at most [`restart::COUNT_RESET_INTERVAL`] ago. The
/// process may be older than the run, because a spare VMM may run it.
pub(super) fn run_start(run: &RunRecord) -> Instant {
    let since = u64::try_from(now_ms().saturating_sub(run.started_ms)).unwrap_or_default();
    let age = vmm_host::process::age(&run.process).unwrap_or_default();
    let age = age.min(Duration::from_millis(since)).min(restart::COUNT_RESET_INTERVAL);
    let now = Instant::now();
    now.checked_sub(age).unwrap_or(now)
}
