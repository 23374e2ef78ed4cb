//! The start of actors, and their restart after a panic.
//!
//! ```text
//!   NewActor ─► entry in the index, with mailbox ─► ActorOrigin ─► run ─► VM deleted, mailbox shut
//!                                                     ▲          │ panic
//!                                                     └─ recover ┘ from the record readers see
//! ```
//!
//! There is one way to start an actor, and its order is fixed, because every record that the actor
//! publishes or removes must find its entry in the index.
//!
//! A panic is a fault of this program. It ends the operation in which it occurred, and not the VM:
//! the record and the process still exist, so the VM is recovered as after a restart of the daemon.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tracing::Instrument as _;
use vmm_core::backend::{Backend, LaunchedVmm};
use vmm_core::event::EventSeq;
use vmm_core::id::VmUid;
use vmm_core::reason::Reason;
use vmm_core::state::{Phase, Status};
use vmm_core::store::VmRecord;

use super::hold::{Hold, NextStep};
use super::journal::{ActorRecord, Journal};
use super::quarantine::QuarantineBackend;
use super::{Actor, Flow};
use crate::clock::now_ms;
use crate::mailbox::{ActorHandle, Mailbox};
use crate::shared::Shared;

/// The wait before an actor that has panicked is made again. A forced operation ends the wait.
const PANIC_RESTART_DELAY: Duration = Duration::from_secs(1);

/// The occasion on which an actor recovers its VM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecoveryOccasion {
    /// The daemon was started.
    DaemonStart,
    /// The actor panicked.
    Panic,
}

/// The situation in which the actor of a VM begins.
pub(crate) enum ActorOrigin {
    /// A client has just created the VM.
    Created,
    /// An earlier daemon or an actor that panicked knew the VM. `in_use` is true if a process may
    /// use its run folder.
    Recovered { in_use: bool, occasion: RecoveryOccasion },
    /// Another program made the VM. The VM runs if there is a handle.
    Imported { launched: Option<LaunchedVmm> },
    /// This program cannot take up the record. `why` is the reason.
    Quarantined { why: String },
}

/// The parts of an actor that is to begin.
pub(crate) struct NewActor {
    pub(crate) shared: Arc<Shared>,
    /// The VM as it is on record.
    pub(crate) record: Arc<VmRecord>,
    pub(crate) backend: Arc<dyn Backend>,
    /// The last event that the record shows.
    pub(crate) committed: EventSeq,
    pub(crate) origin: ActorOrigin,
}

impl NewActor {
    /// Returns the actor of a VM that this program cannot take up. `known` is the VM's backend, if
    /// only the configuration is not understood.
    pub(crate) fn quarantined(
        shared: Arc<Shared>,
        record: VmRecord,
        known: Option<Arc<dyn Backend>>,
        why: String,
    ) -> Self {
        let backend = Arc::new(QuarantineBackend::new(&record, known, why.clone()));
        let (record, committed) = (Arc::new(record), EventSeq::default());
        Self { shared, record, backend, committed, origin: ActorOrigin::Quarantined { why } }
    }

    /// Puts the VM into the index and starts its actor. The receiver gets a message when the
    /// recovery of the VM has a result.
    pub(crate) fn start(self) -> oneshot::Receiver<()> {
        let Self { shared, record, backend, committed, origin } = self;
        let mailbox = Arc::<Mailbox>::default();
        let handle = ActorHandle::new(record.uid, Arc::clone(&mailbox));
        // The entry must exist before the task runs, because the first act of the actor may be to
        // publish its record or to remove it.
        shared.index.insert(Arc::clone(&record), committed, handle);
        let (known, fate) = oneshot::channel();
        let quarantined = match &origin {
            ActorOrigin::Quarantined { why } => Some(why.clone()),
            ActorOrigin::Created | ActorOrigin::Recovered { .. } | ActorOrigin::Imported { .. } => None,
        };
        let seed = ActorSeed { shared, uid: record.uid, backend, mailbox, quarantined };
        tokio::spawn(seed.run_through_panics(record, origin, known));
        fate
    }
}

/// The parts from which the actor is made, at first and after each panic.
struct ActorSeed {
    shared: Arc<Shared>,
    uid: VmUid,
    backend: Arc<dyn Backend>,
    mailbox: Arc<Mailbox>,
    /// The reason why this program cannot take up the record, if it cannot.
    quarantined: Option<String>,
}

impl ActorSeed {
    /// Runs the actor until the VM is deleted, through panics. The awaited futures are boxed,
    /// because most actors are idle and a step takes more room than the wait for one.
    async fn run_through_panics(
        self,
        record: Arc<VmRecord>,
        origin: ActorOrigin,
        known: oneshot::Sender<()>,
    ) {
        let mut known = Some(known);
        let mut life = self.life(record, origin, Journal::default(), &mut known);
        // A panic drops the actor and its handle of the VMM. The record is in the index, the claims
        // are in `Shared`, and the process is found again by the recovery, so nothing else is lost.
        // The mailbox outlives the panic, and the operations that wait in it are carried out
        // afterwards. The new journal assumes one uncertain commit, because the panic may have come
        // between a commit and its answer.
        while let Err(panic) = AssertUnwindSafe(life).catch_unwind().await {
            drop(panic);
            let Some((record, origin)) = Box::pin(self.after_a_panic()).await else { break };
            life = self.life(record, origin, Journal::after_a_panic(), &mut known);
        }
        self.mailbox.close();
    }

    /// Waits until the actor is to run again after a panic, and returns the record and the
    /// beginning. Returns `None` if readers see the VM as deleted, which is the case only after the
    /// commit.
    async fn after_a_panic(&self) -> Option<(Arc<VmRecord>, ActorOrigin)> {
        let record = self.shared.index.record(self.uid)?;
        tracing::error!(
            vm_id = %record.vm_id,
            uid = %record.uid,
            "the actor of a VM panicked, which is a defect of this program; the VM is recovered"
        );
        self.shared.index.publish(Arc::new(record_after_panic(&record)));
        let force = self.mailbox.forced();
        let _ = tokio::time::timeout(PANIC_RESTART_DELAY, force).await;
        // The recovery must assume that a process uses the run folder, because the panic may have
        // come in the middle of a start.
        let origin = match &self.quarantined {
            Some(why) => ActorOrigin::Quarantined { why: why.clone() },
            None => ActorOrigin::Recovered { in_use: true, occasion: RecoveryOccasion::Panic },
        };
        Some((record, origin))
    }

    /// Returns the future of the actor, which ends with the actor or by a panic. `known` gets a
    /// message when the recovery of the VM has a result.
    fn life<'a>(
        &self,
        record: Arc<VmRecord>,
        origin: ActorOrigin,
        journal: Journal,
        known: &'a mut Option<oneshot::Sender<()>>,
    ) -> BoxFuture<'a, ()> {
        let mut actor = Actor {
            shared: Arc::clone(&self.shared),
            record: ActorRecord::new(record),
            journal,
            backend: Arc::clone(&self.backend),
            mailbox: Arc::clone(&self.mailbox),
            hold: Hold::Nothing,
            next: NextStep::Idle,
            at_start: false,
            answered: None,
            messages_in_a_row: 0,
            slot: None,
            call: None,
        };
        Box::pin(async move {
            if let Flow::GoOn = Box::pin(actor.begin_and_notify(origin, known)).await {
                actor.run().await;
            }
        })
    }
}

impl Actor {
    async fn begin_and_notify(
        &mut self,
        origin: ActorOrigin,
        known: &mut Option<oneshot::Sender<()>>,
    ) -> Flow {
        let span = self.span();
        let flow = self.begin(origin).instrument(span).await;
        self.schedule_search();
        if let Some(known) = known.take() {
            let _ = known.send(());
        }
        flow
    }

    async fn begin(&mut self, origin: ActorOrigin) -> Flow {
        match origin {
            ActorOrigin::Created => Flow::GoOn,
            ActorOrigin::Recovered { in_use, occasion } => {
                // The budgets of a recovery begin after it has its slot, because the wait for the
                // slot must not use them up.
                self.slot = Arc::clone(&self.shared.recoveries).acquire_owned().await.ok();
                let flow = self.recover(in_use, occasion).await;
                self.slot = None;
                flow
            }
            ActorOrigin::Imported { launched } => {
                if let Some((launched, run)) = launched.zip(self.record.run.clone()) {
                    self.hold = Hold::Vmm(self.live(launched, run));
                }
                Flow::GoOn
            }
            ActorOrigin::Quarantined { why } => self.quarantine(why).await,
        }
    }
}

/// Returns the record that is shown until the actor has determined the true state.
fn record_after_panic(record: &VmRecord) -> VmRecord {
    let status = Status { restarts: record.status.restarts, ..Status::plain(Phase::Unreachable, now_ms()) }
        .because(Reason::Internal, "a defect of this program ended the task of the VM; the VM is recovered");
    VmRecord { status, ..record.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the size of what `run` returns, in bytes.
    fn size_of_future<'a, F: Future>(_run: fn(&'a mut Actor) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_actor_uses_little_memory() {
        // Each VM has one actor and one such future. A step boxes what it needs, for the time that
        // it takes.
        let (actor, waits) = (size_of::<Actor>(), size_of_future(Actor::run));
        assert!(actor <= 256 && waits <= 448, "{actor} bytes, and {waits} to wait");
    }
}
