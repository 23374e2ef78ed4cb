//! The mailbox of an actor: the operations that clients request for one VM, and the handle to it.
//!
//! ```text
//!   ask ───► asked  (32) ─┐
//!   force ─► forced (16) ─┼─► Actor, forced ones first; `forced` also ends the one in progress
//!   found ─► found   (1) ─┘
//! ```
//!
//! The queues use no memory while they are empty, because most VMs get no requests most of the
//! time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use vmm_core::caller::Caller;
use vmm_core::discovery::DiscoveredVm;
use vmm_core::id::VmUid;
use vmm_core::idempotency::{KeyedCall, VmAnswer};
use vmm_core::report::{FieldReport, Warning};
use vmm_core::state::{EndedBy, VmOperation};
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::failure::Failure;
use crate::operation_count::OperationGuard;
use crate::update::ConfigUpdate;

/// The number of operations that may wait for one VM.
const ASKED_LIMIT: usize = 32;
/// The number of forced operations that may wait for one VM.
const FORCED_LIMIT: usize = 16;

/// An operation on one VM.
#[derive(Clone, Debug)]
pub(crate) struct OperationRequest {
    /// The operation that the client requests.
    pub(crate) request: VmOperation,
    /// The time that the guest has to obey a shutdown or reboot. `None` means that the guest is not
    /// asked.
    pub(crate) guest_timeout: Option<Duration>,
    /// The caller.
    pub(crate) caller: Caller,
    /// The change of the configuration, for an UpdateVm. `None` for every other operation.
    pub(crate) update: Option<Box<ConfigUpdate>>,
    /// The call whose answer is kept, if the client sent an idempotency key.
    pub(crate) key: Option<Box<KeyedCall>>,
}

impl OperationRequest {
    /// Returns true if the client has set `force`.
    pub(crate) fn has_force(&self) -> bool {
        match self.request {
            VmOperation::ForceDelete => true,
            VmOperation::Shutdown | VmOperation::Reboot => self.guest_timeout.is_none(),
            VmOperation::Boot
            | VmOperation::Pause
            | VmOperation::Resume
            | VmOperation::Update
            | VmOperation::Delete => false,
        }
    }
}

/// The answer to a change.
#[derive(Clone, Debug)]
pub struct OperationOutcome {
    /// The VM as it is now, or its last record if it is deleted.
    pub record: Arc<VmRecord>,
    /// The rung that ended the VM, if one did.
    pub ended_by: Option<EndedBy>,
    /// The things on the host that could not be freed.
    pub left_behind: Vec<FieldReport>,
    /// The parts of a changed configuration that the backend ignores or emulates.
    pub warnings: Vec<Warning>,
    /// The state of the answer that is kept for an idempotency key.
    pub answer: AnswerState,
}

/// The state of the answer that is kept for an idempotency key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AnswerState {
    /// No answer is kept.
    #[default]
    Open,
    /// The answer was committed with the outcome.
    Kept,
    /// The operation was carried out by an earlier call, whose answer this is.
    Replayed(Box<VmAnswer>),
}

/// An operation that waits for its actor, with the channel to its client.
pub(crate) struct QueuedOperation {
    pub(crate) operation: OperationRequest,
    pub(crate) reply: oneshot::Sender<Result<OperationOutcome, ServiceError>>,
    pub(crate) span: tracing::Span,
    /// The instant of the request. The time of a forced operation counts from this instant.
    pub(crate) asked: Instant,
    /// The counter entry, held until the operation has ended, whether or not the client waits.
    pub(crate) under_way: OperationGuard,
}

/// The messages that wait for one actor.
#[derive(Default)]
pub(crate) struct Mailbox {
    queues: Mutex<MailboxQueues>,
    news: Notify,
}

#[derive(Default)]
struct MailboxQueues {
    asked: VecDeque<Box<QueuedOperation>>,
    forced: VecDeque<Box<QueuedOperation>>,
    found: Option<Box<DiscoveredVm>>,
    closed: bool,
}

/// A message that an actor has taken from its mailbox.
pub(crate) enum MailboxMessage {
    /// A forced operation.
    Forced(Box<QueuedOperation>),
    /// The VM that was found at this VM's place.
    Found(Box<DiscoveredVm>),
    /// An operation that is not forced.
    Asked(Box<QueuedOperation>),
}

impl MailboxQueues {
    fn take(&mut self) -> Option<MailboxMessage> {
        let forced = self.forced.pop_front().map(MailboxMessage::Forced);
        forced
            .or_else(|| self.found.take().map(MailboxMessage::Found))
            .or_else(|| self.asked.pop_front().map(MailboxMessage::Asked))
    }
}

impl Mailbox {
    fn queues(&self) -> MutexGuard<'_, MailboxQueues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the forced operation that has waited longest.
    pub(crate) fn take_forced(&self) -> Option<Box<QueuedOperation>> {
        self.queues().forced.pop_front()
    }

    /// Takes the operation that has waited longest, of those that are not forced.
    pub(crate) fn take_asked(&self) -> Option<Box<QueuedOperation>> {
        self.queues().asked.pop_front()
    }

    /// Waits for the next message and takes it: a forced operation first, then the VM that was
    /// found at this VM's place. Nothing is lost if the wait is cancelled. Only the actor may wait,
    /// because one waiter is woken.
    pub(crate) async fn next(&self) -> MailboxMessage {
        loop {
            if let Some(mail) = self.queues().take() {
                return mail;
            }
            // A message that came since has left a permit, with which this wait ends at once.
            self.news.notified().await;
        }
    }

    /// Waits until a forced operation is queued, and returns the instant of its request. The
    /// operation stays in its queue. Only the actor may wait, because one waiter is woken.
    pub(crate) async fn forced(&self) -> Instant {
        loop {
            if let Some(forced) = self.queues().forced.front() {
                return forced.asked;
            }
            self.news.notified().await;
        }
    }

    /// Refuses every message from now on, and drops the queued ones, because no actor will answer
    /// them.
    pub(crate) fn close(&self) {
        let dropped = {
            let mut queues = self.queues();
            queues.closed = true;
            (std::mem::take(&mut queues.asked), std::mem::take(&mut queues.forced), queues.found.take())
        };
        drop(dropped);
    }
}

/// The handle to one VM's actor.
#[derive(Clone)]
pub(crate) struct ActorHandle {
    /// The uid of the VM that this actor writes. The VM's name may belong to a later VM by the time
    /// the actor answers.
    pub(crate) uid: VmUid,
    mailbox: Arc<Mailbox>,
}

impl ActorHandle {
    pub(crate) fn new(uid: VmUid, mailbox: Arc<Mailbox>) -> Self {
        Self { uid, mailbox }
    }

    /// Sends the VM that was found at the place of this one. A second find is dropped while one
    /// waits, because a VM that is still there is found again.
    pub(crate) fn found(&self, found: DiscoveredVm) {
        {
            let mut queues = self.mailbox.queues();
            if queues.closed || queues.found.is_some() {
                return;
            }
            queues.found = Some(Box::new(found));
        }
        self.mailbox.news.notify_one();
    }

    /// Queues an operation and waits for its outcome. Returns `None` if the actor ended first.
    pub(crate) async fn ask(
        &self,
        operation: OperationRequest,
        under_way: OperationGuard,
    ) -> Option<Result<OperationOutcome, ServiceError>> {
        self.queue(operation, under_way, false).await
    }

    /// Queues a forced operation, which pre-empts the operation in progress, and waits for its
    /// outcome. Returns `None` if the actor ended first.
    pub(crate) async fn force(
        &self,
        operation: OperationRequest,
        under_way: OperationGuard,
    ) -> Option<Result<OperationOutcome, ServiceError>> {
        self.queue(operation, under_way, true).await
    }

    async fn queue(
        &self,
        operation: OperationRequest,
        under_way: OperationGuard,
        force: bool,
    ) -> Option<Result<OperationOutcome, ServiceError>> {
        let (reply, answer) = oneshot::channel();
        let asked = Instant::now();
        let span = tracing::Span::current();
        let queued = Box::new(QueuedOperation { operation, reply, span, asked, under_way });
        {
            let mut queues = self.mailbox.queues();
            if queues.closed {
                return None;
            }
            let (queue, limit) =
                if force { (&mut queues.forced, FORCED_LIMIT) } else { (&mut queues.asked, ASKED_LIMIT) };
            if queue.len() >= limit {
                return Some(Err(Failure::QueueFull { limit, force }.into()));
            }
            queue.push_back(queued);
        }
        self.mailbox.news.notify_one();
        answer.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use uuid::Uuid;

    use super::*;
    use crate::operation_count::OperationCounter;

    fn operation(request: VmOperation) -> OperationRequest {
        OperationRequest { request, guest_timeout: None, caller: Caller::system(), update: None, key: None }
    }

    #[tokio::test]
    async fn a_forced_operation_is_seen_in_the_queue_and_a_closed_mailbox_refuses() {
        let (mailbox, counter) = (Arc::<Mailbox>::default(), OperationCounter::default());
        let handle = ActorHandle::new(VmUid::new(Uuid::now_v7()), Arc::clone(&mailbox));
        let mut asks = std::pin::pin!(handle.ask(operation(VmOperation::Pause), counter.begin()));
        assert!(asks.as_mut().now_or_never().is_none());
        assert!(mailbox.forced().now_or_never().is_none(), "what is asked is not forced");
        let mut forces = std::pin::pin!(handle.force(operation(VmOperation::Shutdown), counter.begin()));
        assert!(forces.as_mut().now_or_never().is_none());
        for _ in 0..2 {
            mailbox.forced().now_or_never().expect("it waits, and goes on waiting");
        }
        assert_eq!(mailbox.take_forced().unwrap().operation.request, VmOperation::Shutdown);
        mailbox.close();
        assert!(asks.await.is_none() && forces.await.is_none());
        assert!(handle.ask(operation(VmOperation::Pause), counter.begin()).await.is_none());
        counter.idle().await;
    }
}
