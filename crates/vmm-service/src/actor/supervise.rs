//! Starts actors, and starts an actor again after a panic.
//!
//! ```text
//!   NewActor ─► into the index, with the way to its mailbox ─► Beginning ─► run ──► the VM is deleted: the mailbox is closed
//!                                                                 ▲          │ panic
//!                                                                 └─ recover ┘ from the record that readers see
//! ```
//!
//! There is one way to start an actor, in one order: what the actor publishes or removes must find its entry in the index.
//!
//! A panic is a fault of this program, and costs the operation that met it, not the VM: the record and the process are still
//! there, so the VM is taken up again as after a restart of the daemon.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::oneshot;
use tracing::Instrument as _;
use vmm_core::backend::{Backend, Launched};
use vmm_core::event::EventSeq;
use vmm_core::spec::VmSpec;
use vmm_core::state::{Phase, Status};
use vmm_core::store::VmRecord;

use super::hold::{Hold, Next};
use super::journal::Journal;
use super::quarantine::{Nobody, no_spec};
use super::{Actor, Flow};
use crate::clock::now_ms;
use crate::mailbox::{ActorHandle, Mailbox};
use crate::metrics::MetricsCell;
use crate::shared::Shared;

/// The wait before an actor that has panicked is made anew. Force does not wait.
const AFTER_A_PANIC: Duration = Duration::from_secs(1);

/// The way in which the actor of a VM begins.
pub(crate) enum Beginning {
    /// The VM was just created.
    Created,
    /// A daemon before this one knew the VM. `in_use` says that a process may use its run folder.
    Recovered { in_use: bool },
    /// Somebody else made the VM, and runs it where there is a handle.
    Imported { launched: Option<Launched> },
    /// This program cannot take up the record. `why` says why.
    Quarantined { why: String },
}

/// An actor that is to begin.
pub(crate) struct NewActor {
    pub(crate) shared: Arc<Shared>,
    /// The VM as it is on record.
    pub(crate) record: Arc<VmRecord>,
    pub(crate) spec: VmSpec,
    pub(crate) backend: Arc<dyn Backend>,
    /// The event that the record shows.
    pub(crate) committed: EventSeq,
    pub(crate) beginning: Beginning,
}

impl NewActor {
    /// Returns the actor of a VM that this program cannot take up. `known` is its backend, where only its configuration is not
    /// understood.
    pub(crate) fn quarantined(
        shared: Arc<Shared>,
        record: VmRecord,
        known: Option<Arc<dyn Backend>>,
        why: String,
    ) -> Self {
        let backend = Arc::new(Nobody::new(&record, known, why.clone()));
        let (record, committed) = (Arc::new(record), EventSeq::default());
        Self {
            shared,
            record,
            spec: no_spec(),
            backend,
            committed,
            beginning: Beginning::Quarantined { why },
        }
    }

    /// Puts the VM into the index and starts its actor. The receiver hears when the VM's fate is known.
    pub(crate) fn start(self) -> oneshot::Receiver<()> {
        let Self { shared, record, spec, backend, committed, beginning } = self;
        let (metrics, mailbox) = (MetricsCell::default(), Arc::<Mailbox>::default());
        let handle = ActorHandle::new(record.uid, Arc::clone(&mailbox));
        shared.index.insert(Arc::clone(&record), committed, metrics.clone(), handle);
        let span = tracing::info_span!("vm", vm_id = %record.vm_id, uid = %record.uid);
        let (known, fate) = oneshot::channel();
        let seed = Seed { shared, spec, backend, metrics, mailbox };
        tokio::spawn(seed.live_on(record, beginning, known).instrument(span));
        fate
    }
}

/// The parts from which every life of an actor is made.
struct Seed {
    shared: Arc<Shared>,
    spec: VmSpec,
    backend: Arc<dyn Backend>,
    metrics: MetricsCell,
    mailbox: Arc<Mailbox>,
}

impl Seed {
    /// Lives until the VM is deleted, through panics.
    async fn live_on(self, record: Arc<VmRecord>, beginning: Beginning, known: oneshot::Sender<()>) {
        let uid = record.uid;
        let mut known = Some(known);
        let mut life = self.life(record, beginning, Journal::default(), &mut known);
        while let Err(panic) = AssertUnwindSafe(life).catch_unwind().await {
            drop(panic);
            // Deleted, as far as readers know, which is after the commit.
            let Some(record) = self.shared.index.record(uid) else { break };
            tracing::error!(
                "the actor of a VM has panicked, which is a fault of this program; the VM is taken up again"
            );
            self.shared.index.publish(Arc::new(as_after_a_panic(&record)));
            let force = self.mailbox.forced();
            let _ = tokio::time::timeout(AFTER_A_PANIC, force).await;
            let beginning = match record.status.reason.as_str() {
                super::quarantine::REASON => Beginning::Quarantined { why: record.status.message.clone() },
                _ => Beginning::Recovered { in_use: true },
            };
            life = self.life(record, beginning, Journal::after_a_panic(), &mut known);
        }
        self.mailbox.close();
    }

    /// One life of the actor. Boxed, because most actors are idle and what they do takes more room than what they are.
    fn life<'a>(
        &'a self,
        record: Arc<VmRecord>,
        beginning: Beginning,
        journal: Journal,
        known: &'a mut Option<oneshot::Sender<()>>,
    ) -> futures::future::BoxFuture<'a, ()> {
        let actor = Actor {
            shared: Arc::clone(&self.shared),
            record,
            journal,
            spec: self.spec.clone(),
            backend: Arc::clone(&self.backend),
            metrics: self.metrics.clone(),
            mailbox: Arc::clone(&self.mailbox),
            hold: Hold::Nothing,
            next: Next::Idle,
            answered: None,
            signs_in_a_row: 0,
        };
        Box::pin(async move {
            let mut actor = actor;
            let flow = Box::pin(actor.begin(beginning)).await;
            actor.keep_looking();
            if let Some(known) = known.take() {
                let _ = known.send(());
            }
            if let Flow::GoOn = flow {
                actor.run().await;
            }
        })
    }
}

impl Actor {
    async fn begin(&mut self, beginning: Beginning) -> Flow {
        match beginning {
            Beginning::Created => Flow::GoOn,
            Beginning::Recovered { in_use } => {
                // The budgets of a recovery begin when it has its slot.
                let slot = Arc::clone(&self.shared.recoveries).acquire_owned().await;
                let flow = self.recover(in_use).await;
                drop(slot);
                flow
            }
            Beginning::Imported { launched } => {
                if let Some((launched, run)) = launched.zip(self.record.run.clone()) {
                    self.hold = Hold::Vmm(self.live(launched, run));
                }
                Flow::GoOn
            }
            Beginning::Quarantined { why } => self.quarantine(why).await,
        }
    }
}

/// Returns a record as it is shown until the actor has found out what is true of the VM.
fn as_after_a_panic(record: &VmRecord) -> VmRecord {
    let status = Status { restarts: record.status.restarts, ..Status::plain(Phase::Unreachable, now_ms()) }
        .because("internal", "this program failed while it looked after the VM, and takes the VM up again");
    VmRecord { status, ..record.clone() }
}
