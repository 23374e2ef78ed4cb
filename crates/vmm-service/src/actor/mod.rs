//! The actor of a VM: one task per VM, and the only writer of that VM's record.
//!
//! ```text
//!             ┌──────────────── one step at a time ────────────────┐
//!  force  ───►│ 1. forced operations                               │
//!             │ 2. an interrupted operation                        │
//!  VMM    ───►│ 3. VMM events, lost contact                        │─► commit ─► publish ─► answer
//!  timer  ───►│ 4. a restart, a search, refused outcomes           │
//!  inbox  ───►│ 5. operations, in the order they came              │
//!             └────────────────────────────────────────────────────┘
//! ```
//!
//! The actor's hold on its VM's process ([`hold::Hold`]) decides which operations are admitted:
//!
//! ```text
//!                 start                        no answer
//!   Nothing ──────────────────────► Vmm ◄────────────────────► Silent
//!     ▲ ▲ ▲                          │ ▲  answers                 │
//!     │ │ └── gone ─────────────────┴─┼─────────────── gone ─────┘
//!     │ │                             │ found                   the daemon starts
//!     │ └── gone ──── Lost ───────────┤ ◄────────────────────── a run is on record
//!     │ └── gone ──── Orphan ─────────┘ ◄─ a start is on record, or has left a process
//!     └─── swept ──── Leftover ◄──────────────────── a start whose VMM has received no data
//!
//!   Nothing, Vmm, Leftover: every operation that the state admits.
//!   Silent, Lost, Orphan, Quarantined: forced operations alone.
//! ```
//!
//! Every operation has three steps: intent, effect, outcome. A forced operation or the end of the
//! budget ([`budget`]) can interrupt the effect alone. A commit is never interrupted, because
//! memory and store must hold the same record. A forced operation does not wait behind a call that
//! hangs, because it cancels that call. State, status and event change together ([`journal`]).

mod budget;
mod delete;
mod discovered;
mod discovered_files;
mod hold;
mod journal;
mod keyed;
mod launch;
mod observe;
mod operations;
mod quarantine;
mod record_update;
mod recover;
mod resets;
mod restart;
mod shutdown;
mod start;
mod supervise;
mod taps;
mod unfinished;
mod update;

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::Instrument as _;
use vmm_core::backend::Backend;
use vmm_core::discovery::DiscoveredVm;
use vmm_core::spec::VmSpec;
use vmm_core::state::VmOperation;

use crate::mailbox::{AnswerState, Mailbox, MailboxMessage, OperationRequest, QueuedOperation};
use crate::operation_log::Ending;
use crate::shared::Shared;

use budget::Budget;
use hold::{Hold, NextStep, VmmMessage};
use journal::{ActorRecord, Journal};
use keyed::CallInHand;
use quarantine::no_spec;

pub(crate) use supervise::{ActorOrigin, NewActor, RecoveryOccasion};
pub(crate) use taps::{KnownTaps, remove_orphans};

/// The number of signs of a VMM after which one operation has its update, because a guest that
/// sends signs without end must not block the operations on its own VM.
const SIGNS_IN_A_ROW: u8 = 4;

/// The decision to continue the actor's loop or to leave it after a step.
enum Flow {
    GoOn,
    /// The VM has been deleted.
    End,
}

struct Actor {
    shared: Arc<Shared>,
    record: ActorRecord,
    journal: Journal,
    backend: Arc<dyn Backend>,
    mailbox: Arc<Mailbox>,
    hold: Hold,
    next: NextStep,
    /// True while the VM is recovered at the start of the daemon.
    at_start: bool,
    /// The instant of the VMM's last answer to an operation. News that was requested before this
    /// instant is out of date.
    answered: Option<Instant>,
    /// The number of signs of the VMM since an operation last had its update.
    messages_in_a_row: u8,
    /// The slot of the recovery or start in progress, see [`crate::check::without_slot_if_slow`].
    slot: Option<OwnedSemaphorePermit>,
    /// The call with an idempotency key that is being carried out.
    call: Option<Box<CallInHand>>,
}

/// The next step of an actor.
enum ActorStep {
    Forced(Box<QueuedOperation>),
    Asked(Box<QueuedOperation>),
    Message(VmmMessage),
    /// An interrupted operation continues.
    Finish(Box<OperationRequest>),
    /// A restart by policy is due. The step owns the slot for it.
    Restart(OwnedSemaphorePermit),
    /// The actor searches for a process that may live.
    Look,
    /// A VM was found at this VM's place.
    Found(Box<DiscoveredVm>),
    /// The resets in place that are not on record yet are recorded.
    Resets,
    /// The files of a VM whose disks are claimed by path are looked at again.
    Files,
    /// An outcome that the store refused is written again.
    Rewrite,
}

impl From<MailboxMessage> for ActorStep {
    fn from(mail: MailboxMessage) -> Self {
        match mail {
            MailboxMessage::Forced(queued) => Self::Forced(queued),
            MailboxMessage::Found(found) => Self::Found(found),
            MailboxMessage::Asked(queued) => Self::Asked(queued),
        }
    }
}

impl Actor {
    async fn run(&mut self) {
        loop {
            let step = self.next_step().await;
            // The step is boxed, because most actors are idle and a step takes more room than the
            // wait for one.
            let span = self.span();
            if let Flow::End = Box::pin(self.take(step).instrument(span)).await {
                return;
            }
            self.schedule_search();
        }
    }

    /// Returns the span of one step. An idle actor holds no span, because a span takes as much
    /// memory as the actor.
    fn span(&self) -> tracing::Span {
        // The span has the level ERROR, so that a filter that shows any line shows its keys, too.
        let record = &self.record;
        tracing::error_span!("vm", vm_id = %record.vm_id, uid = %record.uid, backend = %record.backend)
    }

    /// Returns the checked form of the configuration in force. The form is made for each use and
    /// not kept, because it takes as much memory as the configuration, and most VMs are idle.
    fn spec(&self) -> VmSpec {
        match &self.hold {
            Hold::Quarantined { .. } => no_spec(),
            _ if self.record.imported => VmSpec::imported(&self.record.config),
            // A record whose configuration does not parse is in quarantine.
            _ => VmSpec::parse(&self.record.config).unwrap_or_else(|_| no_spec()),
        }
    }

    async fn take(&mut self, step: ActorStep) -> Flow {
        match step {
            ActorStep::Forced(queued) => return self.operate(Budget::of_force(queued.asked), queued).await,
            ActorStep::Asked(queued) => {
                self.messages_in_a_row = 0;
                let budget = Budget::of_operation(queued.operation.guest_timeout);
                return self.operate(budget, queued).await;
            }
            ActorStep::Message(sign) => {
                self.messages_in_a_row = self.messages_in_a_row.saturating_add(1);
                self.on_message(sign).await;
            }
            ActorStep::Finish(operation) => self.finish(*operation).await,
            ActorStep::Restart(slot) => {
                self.slot = Some(slot);
                self.restart_by_policy().await;
                self.slot = None;
            }
            ActorStep::Look => self.search_process().await,
            ActorStep::Found(found) => self.found(*found).await,
            ActorStep::Resets => self.record_resets().await,
            ActorStep::Files => self.claim_files().await,
            ActorStep::Rewrite => drop(self.write_what_was_refused(Budget::of_own_step()).await),
        }
        Flow::GoOn
    }

    /// Waits for the next step.
    ///
    /// The sources are asked in the order of the module's picture. Signs of the VMM come before
    /// operations, because an operation must not be admitted on a state that has ended. A guest
    /// that sends signs without end must not starve the operations, so that the order is reversed
    /// once after [`SIGNS_IN_A_ROW`] signs.
    async fn next_step(&mut self) -> ActorStep {
        // A forced operation comes first, because it must answer within 5 s.
        if let Some(queued) = self.mailbox.take_forced() {
            return ActorStep::Forced(queued);
        }
        // An operation that a crash of the daemon interrupted comes before new ones, because it was
        // admitted before them. The `let` matches by reference first, so that no other `NextStep`
        // is replaced by `Idle`.
        if let NextStep::Finish(_) = self.next
            && let NextStep::Finish(operation) = std::mem::replace(&mut self.next, NextStep::Idle)
        {
            return ActorStep::Finish(operation);
        }
        // The signs have had their turns, so one queued operation is taken although signs may wait.
        // The counter restarts in both cases: with no operation queued, nothing is starved.
        if self.messages_in_a_row >= SIGNS_IN_A_ROW {
            self.messages_in_a_row = 0;
            if let Some(queued) = self.mailbox.take_asked() {
                return ActorStep::Asked(queued);
            }
        }
        // From here on the actor waits. `biased` makes the select ask its branches in order: a sign
        // before a timer, because a timer acts on the state that the sign ends, and both before the
        // mailbox. All three futures can be dropped without loss: a message that was not received
        // stays in its channel or in the mailbox, and a timer is computed anew from the actor's
        // fields on the next call. A forced operation that arrives during the wait wakes
        // `mailbox.next()`, which returns forced operations before others.
        let mailbox = Arc::clone(&self.mailbox);
        let due = timers(&self.hold, &self.next, self.journal.retry_at(), &self.shared.policy_starts);
        let due = async {
            match due {
                Some(due) => due.await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            sign = self.hold.next_message() => ActorStep::Message(sign),
            step = due => step,
            mail = mailbox.next() => ActorStep::from(mail),
        }
    }

    async fn operate(&mut self, budget: Budget, queued: Box<QueuedOperation>) -> Flow {
        let QueuedOperation { operation, reply, span, under_way, asked } = *queued;
        // The server logs the failure of this request, and knows the VM's name only.
        span.record("uid", tracing::field::display(self.record.uid));
        span.record("backend", tracing::field::display(&self.record.backend));
        let outcome = self.carry_out_once(budget, &operation).instrument(span.clone()).await;
        let (request, record) = (operation.request, self.record.share());
        let ending = Ending {
            operation: request.method(),
            force: operation.has_force(),
            actor: &operation.caller,
            record: &record,
            asked,
        };
        let replayed =
            outcome.as_ref().is_ok_and(|outcome| matches!(outcome.answer, AnswerState::Replayed(_)));
        if let Ok(outcome) = &outcome
            && !replayed
        {
            span.in_scope(|| ending.done(outcome));
        }
        let deleted =
            outcome.is_ok() && !replayed && matches!(request, VmOperation::Delete | VmOperation::ForceDelete);
        // The reply cannot be sent if the client has left. The operation has been carried out
        // nevertheless, and nobody else logs its failure.
        if let Err(Err(error)) = reply.send(outcome) {
            span.in_scope(|| ending.failed(&error));
        }
        // The count of operations falls after the answer is sent, because the end of the daemon
        // waits for the count.
        drop(under_way);
        if deleted { Flow::End } else { Flow::GoOn }
    }

    /// Returns the folder of sockets, log and console.
    fn dir(&self) -> PathBuf {
        self.record.uid.run_dir(&self.shared.settings.runtime_dir)
    }
}

/// Returns the wait for the first timer that is due, or `None` where no timer is set. The wait is
/// boxed, because most actors have none.
fn timers(
    hold: &Hold,
    next: &NextStep,
    retry: Option<Instant>,
    slots: &Arc<Semaphore>,
) -> Option<BoxFuture<'static, ActorStep>> {
    let (look_at, restart_at) = match next {
        NextStep::Idle | NextStep::Finish(_) => (None, None),
        NextStep::RestartAt(at, _) => (None, Some(*at)),
        NextStep::LookAt(at) => (Some(*at), None),
    };
    let (resets, files) = (hold.resets_due(), hold.files_due());
    resets.or(look_at).or(restart_at).or(retry).or(files)?;
    let slots = Arc::clone(slots);
    Some(Box::pin(async move {
        tokio::select! {
            biased;
            () = until(resets) => ActorStep::Resets,
            () = until(look_at) => ActorStep::Look,
            slot = slot_at(restart_at, slots) => ActorStep::Restart(slot),
            () = until(retry) => ActorStep::Rewrite,
            () = until(files) => ActorStep::Files,
        }
    }))
}

/// Waits until a restart is due and one of `slots` is free. Until then a client can start, shut
/// down and delete the VM.
async fn slot_at(at: Option<Instant>, slots: Arc<Semaphore>) -> OwnedSemaphorePermit {
    until(at).await;
    match slots.acquire_owned().await {
        Ok(slot) => slot,
        // No code closes the semaphore.
        Err(_) => pending().await,
    }
}

/// Waits until `at`, or for ever if `at` is `None`.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) if at <= Instant::now() => {}
        Some(at) => tokio::time::sleep_until(at).await,
        None => pending().await,
    }
}
