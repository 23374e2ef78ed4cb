//! Hold and Next: what an actor has of its VM's process, and what it does next without being asked.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmm_core::backend::{Launched, Vmm, VmmEvent};
use vmm_core::store::RunRecord;

use super::{Actor, found_files, resets::Resets, restart};
use crate::clock::now_ms;
use crate::mailbox::Operation;
use crate::metrics::{MetricsCell, News, Sampler};

/// Time between two looks for a process that may live and of which no handle is held.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// The actor's hold on its VM's process. Admission of operations depends on the hold, and not on the status that is shown.
pub(super) enum Hold {
    /// No process of the VM exists.
    Nothing,
    /// A VMM runs the VM, and answers.
    Vmm(Box<Live>),
    /// A VMM runs the VM, and does not answer. It may be killed.
    Silent(Box<Live>),
    /// The VMM on record may run the VM. No handle is held.
    Lost,
    /// A start has left a process, or may have, and its guest may run. The VM counts as not running.
    Orphan(Option<Box<Live>>),
    /// A start was called off before its VMM was told anything, and the process may be left. It runs no guest.
    Leftover,
    /// This program cannot take up the record.
    Quarantined {
        /// Why.
        why: String,
        /// Says whether a process of the VM may exist.
        process: bool,
    },
}

/// The next step of an actor that no client asks for.
pub(super) enum Next {
    /// The actor waits.
    Idle,
    /// The actor starts the VM by its restart policy.
    RestartAt(Instant),
    /// The actor looks for a process that may live and of which no handle is held.
    LookAt(Instant),
    /// The actor carries on an operation that the death of a daemon cut short.
    Finish(Box<Operation>),
}

/// A VMM that is held, and what comes from it.
pub(super) struct Live {
    pub(super) vmm: Arc<dyn Vmm>,
    pub(super) events: mpsc::Receiver<VmmEvent>,
    sampler: Sampler,
    /// The run as it goes on record.
    pub(super) run: RunRecord,
    /// Since when the VMM has run without a reset of its guest in place.
    pub(super) quiet_since: Instant,
    /// Resets in place that are not on record yet.
    pub(super) resets: Resets,
    /// When the files are looked at again, where disks are claimed by their paths.
    pub(super) files_due: Option<Instant>,
}

/// A message from a VMM.
pub(super) enum Sign {
    Event(VmmEvent),
    News(News),
}

impl Hold {
    fn live(&self) -> Option<&Live> {
        match self {
            Self::Vmm(live) | Self::Silent(live) | Self::Orphan(Some(live)) => Some(live),
            Self::Nothing | Self::Lost | Self::Orphan(None) | Self::Leftover | Self::Quarantined { .. } => {
                None
            }
        }
    }

    pub(super) fn live_mut(&mut self) -> Option<&mut Live> {
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

    /// Returns the run that goes on record, where what is on record is `recorded`.
    ///
    /// An orphan's process is no run of the VM: what its process may use is on record with the intent of its start.
    pub(super) fn run_on_record(&self, recorded: Option<RunRecord>) -> Option<RunRecord> {
        match self {
            Self::Vmm(live) | Self::Silent(live) => Some(live.run.clone()),
            Self::Lost | Self::Quarantined { process: true, .. } => recorded,
            Self::Nothing | Self::Orphan(_) | Self::Leftover | Self::Quarantined { process: false, .. } => {
                None
            }
        }
    }

    /// Returns since when the VMM has run without a reset of its guest in place.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        self.live().map(|live| live.quiet_since)
    }

    /// Says whether nothing but force may touch the VM, because its process does not answer or is not held.
    pub(super) fn is_out_of_reach(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Lost | Self::Orphan(_) => true,
            Self::Nothing | Self::Vmm(_) | Self::Leftover | Self::Quarantined { .. } => false,
        }
    }

    /// Says whether a process of the VM may exist.
    pub(super) fn may_be_a_process(&self) -> bool {
        !matches!(self, Self::Nothing | Self::Quarantined { process: false, .. })
    }

    /// Waits for what comes from the VMM.
    pub(super) async fn sign(&mut self) -> Sign {
        match self.live_mut() {
            None => pending().await,
            Some(live) => tokio::select! {
                biased;
                // A backend promises that `Gone` is its last word; a channel that ends without it says nothing more.
                Some(event) = live.events.recv() => Sign::Event(event),
                news = live.sampler.news() => Sign::News(news),
            },
        }
    }

    /// Returns when the files of the VM are to be looked at again.
    pub(super) fn files_due(&self) -> Option<Instant> {
        self.live().and_then(|live| live.files_due)
    }

    /// Returns when resets in place are to be recorded.
    pub(super) fn resets_due(&self) -> Option<Instant> {
        self.live().and_then(|live| live.resets.due())
    }
}

impl Next {
    /// Returns a look for a process in a while.
    pub(super) fn look() -> Self {
        Self::LookAt(Instant::now() + LOOK_INTERVAL)
    }

    /// Says whether a restart by policy is waited for, and calls it off.
    pub(super) fn call_off_restart(&mut self) -> bool {
        let waits = matches!(self, Self::RestartAt(_));
        if waits {
            *self = Self::Idle;
        }
        waits
    }
}

impl Actor {
    /// Makes a VMM that was launched or found ready to be held. `run` is what the record is to know of it.
    pub(super) fn live(&self, launched: Launched, run: RunRecord) -> Box<Live> {
        let Launched { vmm, events } = launched;
        let interval = self.shared.settings.metrics_interval;
        let metrics = MetricsCell::default();
        self.shared.index.measure(self.record.uid, metrics.clone());
        let (vm_id, vcpus) = (self.record.vm_id.clone(), self.spec().cpu.count);
        let sampler = Sampler::start(Arc::clone(&vmm), vm_id, vcpus, interval, metrics);
        let quiet_since = begun(&run);
        let files_due = found_files::next_look(&run);
        Box::new(Live { vmm, events, sampler, run, quiet_since, resets: Resets::default(), files_due })
    }

    /// Takes hold of something else. What was to be done next belonged to what was held before.
    pub(super) fn take_hold(&mut self, hold: Hold) {
        self.hold = hold;
        self.next = Next::Idle;
    }

    /// Lets go of a VMM that has provably gone, and gives back what it held on the host.
    pub(super) fn let_go_and_release(&mut self) {
        self.let_go_keeping_claims();
        self.shared.claims.release(self.record.uid);
    }

    /// Lets go of a VMM that has provably gone. What it held on the host stays claimed.
    pub(super) fn let_go_keeping_claims(&mut self) {
        let nothing = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Quarantined { why, .. } => Hold::Quarantined { why, process: false },
            _ => Hold::Nothing,
        };
        self.take_hold(nothing);
    }

    /// A VMM that is held does not answer any more.
    pub(super) fn fall_silent(&mut self) {
        self.hold = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Vmm(live) => Hold::Silent(live),
            other => other,
        };
    }

    /// A VMM that is held answers.
    pub(super) fn speak(&mut self) {
        self.hold = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Silent(live) => Hold::Vmm(live),
            Hold::Orphan(Some(mut live)) => {
                // The process becomes a run of the VM, and goes on record with all that is claimed for it.
                live.run.claims = self.shared.claims.held_by(self.record.uid);
                Hold::Vmm(live)
            }
            other => other,
        };
    }

    /// Has a process that may live looked for, where nothing else will tell of it.
    pub(super) fn keep_looking(&mut self) {
        let unseen = matches!(self.hold, Hold::Lost | Hold::Orphan(None));
        if unseen && matches!(self.next, Next::Idle | Next::RestartAt(_)) {
            self.next = Next::look();
        }
    }
}

/// Returns when a run began, as far back as it matters. Its process may be older, where a spare VMM runs it.
pub(super) fn begun(run: &RunRecord) -> Instant {
    let since = u64::try_from(now_ms().saturating_sub(run.started_ms)).unwrap_or_default();
    let age = vmm_host::process::age(&run.process).unwrap_or_default();
    let age = age.min(Duration::from_millis(since)).min(restart::QUIET);
    let now = Instant::now();
    now.checked_sub(age).unwrap_or(now)
}
