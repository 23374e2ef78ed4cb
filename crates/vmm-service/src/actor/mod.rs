//! One actor per VM: the only writer of its record.
//!
//! ```text
//!             ┌──────────────── one step at a time ────────────────┐
//!  force  ───►│ 1. forced operations                               │
//!  VMM    ───►│ 2. what the VMM did by itself, lost contact        │──► commit ──► publish ──► answer
//!  timer  ───►│ 3. a restart that is due, a search for a lost VMM  │
//!  inbox  ───►│ 4. operations, in the order they came              │
//!             └────────────────────────────────────────────────────┘
//! ```
//!
//! Every operation is intent → effect → outcome. Only the effect can be interrupted, by a forced operation or by its deadline;
//! commits are never cut short, so memory and store cannot part. `force` has a channel of its own: it does not wait behind a
//! stuck call, it ends it.

mod boot;
mod deadlines;
mod delete;
mod found;
mod observe;
mod operations;
mod persist;
mod recover;
mod restart;
mod taps;
mod unfinished;
mod untaken;

use std::collections::VecDeque;
use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tracing::Instrument as _;
use vmm_core::backend::{Backend, BackendError, Launched, Vmm, VmmEvent};
use vmm_core::caller::Caller;
use vmm_core::event::EventSeq;
use vmm_core::id::VmUid;
use vmm_core::place::Found;
use vmm_core::spec::VmSpec;
use vmm_core::state::Request;
use vmm_core::store::{RunRecord, VmRecord};

use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::metrics::{MetricsCell, News, Sampler};
use crate::service::{Outcome, Shared, UnderWay};

use deadlines::FORCE_LIMIT;

pub(crate) use taps::remove_orphans;
pub(crate) use untaken::show as show_untaken;

/// Operations that may wait for one VM.
const INBOX: usize = 32;
/// Forced operations that may wait for one VM.
const FORCE_INBOX: usize = 16;

/// An operation on one VM.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    /// What to do.
    pub(crate) request: Request,
    /// How long the guest has to obey a shutdown or reboot; `None` means that it is not asked.
    pub(crate) ask_guest_for: Option<Duration>,
    /// Who asks.
    pub(crate) caller: Caller,
}

struct Message {
    operation: Operation,
    reply: oneshot::Sender<Result<Outcome, ServiceError>>,
    span: tracing::Span,
    /// When it was asked: what is forced may have waited behind another.
    asked: Instant,
    /// Held until the operation has ended, whether or not the client waits.
    under_way: UnderWay,
}

/// The way to one VM's actor.
#[derive(Clone)]
pub(crate) struct ActorHandle {
    /// The creation that this actor writes; its name may belong to a later one by the time it answers.
    pub(crate) uid: VmUid,
    inbox: mpsc::Sender<Message>,
    force: mpsc::Sender<Message>,
    found: mpsc::Sender<Found>,
}

impl ActorHandle {
    /// Tells of the VM that was found at its place. An actor that is busy, or has ended, misses it: what still is there is
    /// found again.
    pub(crate) fn found(&self, found: Found) {
        let _ = self.found.try_send(found);
    }

    /// Queues an operation and waits for its outcome. `None` means that the actor ended first.
    pub(crate) async fn ask(
        &self,
        shared: &Shared,
        operation: Operation,
    ) -> Option<Result<Outcome, ServiceError>> {
        let (message, answer) = Message::new(shared, operation);
        match self.inbox.try_send(message) {
            Ok(()) => answer.await.ok(),
            Err(mpsc::error::TrySendError::Full(_)) => Some(Err(ServiceError::Unavailable(format!(
                "{INBOX} operations already wait for this VM; try again when some have ended, or use force"
            )))),
            Err(mpsc::error::TrySendError::Closed(_)) => None,
        }
    }

    /// Pre-empts what is under way. `None` means that the actor ended first.
    pub(crate) async fn force(
        &self,
        shared: &Shared,
        operation: Operation,
    ) -> Option<Result<Outcome, ServiceError>> {
        let (message, answer) = Message::new(shared, operation);
        self.force.send(message).await.ok()?;
        answer.await.ok()
    }
}

impl Message {
    fn new(
        shared: &Shared,
        operation: Operation,
    ) -> (Self, oneshot::Receiver<Result<Outcome, ServiceError>>) {
        let (reply, answer) = oneshot::channel();
        let under_way = UnderWay::new(shared);
        let asked = Instant::now();
        (Self { operation, reply, span: tracing::Span::current(), asked, under_way }, answer)
    }
}

/// Starts the actor of a VM that was just created.
pub(crate) fn spawn(
    shared: Arc<Shared>,
    record: VmRecord,
    spec: VmSpec,
    backend: Arc<dyn Backend>,
    metrics: MetricsCell,
) -> ActorHandle {
    let (actor, handle) = Actor::new(shared, record, spec, backend, metrics);
    let span = actor.span();
    tokio::spawn(actor.run().instrument(span));
    handle
}

/// Puts a VM that a daemon before this one knew into the index, and starts its actor. The receiver hears when the VM's fate is
/// known. `in_use` says that a process may use its run folder.
pub(crate) fn recover(
    shared: Arc<Shared>,
    record: VmRecord,
    spec: VmSpec,
    backend: Arc<dyn Backend>,
    in_use: bool,
) -> oneshot::Receiver<()> {
    let metrics = MetricsCell::default();
    let index_of = Arc::clone(&shared);
    let shown = Arc::new(record.clone());
    let (mut actor, handle) = Actor::new(shared, record, spec, backend, metrics.clone());
    actor.stray = in_use;
    // Before the actor runs: what it publishes or removes must find its entry.
    index_of.index.insert(shown, EventSeq::default(), metrics, handle);
    let (known, fate) = oneshot::channel();
    let span = actor.span();
    let slots = Arc::clone(&index_of.recoveries);
    let task = async move {
        // The deadlines of a recovery begin when it has its slot.
        let slot = slots.acquire_owned().await;
        let flow = actor.recover().await;
        drop(slot);
        let _ = known.send(());
        match flow {
            Flow::GoOn => actor.run().await,
            Flow::End => {}
        }
    };
    tokio::spawn(task.instrument(span));
    fate
}

/// Starts the actor of a VM that somebody else made, with the handle of its VMM if it runs.
pub(crate) fn import(
    shared: Arc<Shared>,
    record: VmRecord,
    spec: VmSpec,
    backend: Arc<dyn Backend>,
    committed: EventSeq,
    launched: Option<Launched>,
) {
    let index_of = Arc::clone(&shared);
    let shown = Arc::new(record.clone());
    let metrics = MetricsCell::default();
    let (mut actor, handle) = Actor::new(shared, record, spec, backend, metrics.clone());
    // Before the actor runs: what it publishes or removes must find its entry.
    index_of.index.insert(shown, committed, metrics, handle);
    if let Some((launched, run)) = launched.zip(actor.record.run.clone()) {
        actor.hold(launched, run);
    }
    let span = actor.span();
    tokio::spawn(actor.run().instrument(span));
}

/// Whether the actor goes on after a step.
enum Flow {
    GoOn,
    /// The VM has been deleted.
    End,
}

/// Why an effect was not carried through.
enum Broken {
    /// A forced operation came.
    Preempted,
    /// The backend failed, or its deadline passed.
    Backend(BackendError),
}

/// The VMM of a VM that runs, and what comes from it.
struct Live {
    vmm: Arc<dyn Vmm>,
    events: mpsc::Receiver<VmmEvent>,
    sampler: Sampler,
}

struct Actor {
    shared: Arc<Shared>,
    record: VmRecord,
    spec: VmSpec,
    backend: Arc<dyn Backend>,
    metrics: MetricsCell,
    live: Option<Live>,
    inbox: mpsc::Receiver<Message>,
    force: mpsc::Receiver<Message>,
    found: mpsc::Receiver<Found>,
    /// Forced operations that have pre-empted one and wait for it to wind up.
    preempting: VecDeque<Message>,
    /// Until when the forced operation under way, or about to begin, is to end; `None` where there is none. Nothing pre-empts
    /// one.
    force_until: Option<Instant>,
    /// Whether a process may exist that no handle holds, as after a launch that was cut short.
    stray: bool,
    /// How many commits that failed may have been written all the same, since the last one that did not fail.
    uncertain: u64,
    /// Why the VM cannot be taken up by this program, where it cannot.
    untaken: Option<String>,
    /// What the start under way has made of TAPs.
    made_taps: Vec<String>,
    /// When a restart by policy is due.
    restart_at: Option<Instant>,
    /// What a daemon before this one had begun, and is to be carried to its end.
    unfinished: Option<Operation>,
    /// When to look again for a VMM that may live and of which no handle is held.
    look_at: Option<Instant>,
    /// When the VMM last proved that it is there, by the answer to an operation. News that was asked for before is out of date.
    answered: Option<Instant>,
    /// Since when the VMM has run without a reset of its guest in place.
    quiet_since: Option<Instant>,
}

/// One thing that an actor does next.
enum Step {
    Forced(Message),
    Sign(Sign),
    /// Something that was cut short.
    Unfinished(Operation),
    /// A restart that is due, with its slot.
    Restart(OwnedSemaphorePermit),
    /// A VMM that was lost is looked for.
    Look,
    /// It was found at its place.
    Found(Box<Found>),
    Asked(Message),
    /// Nobody can reach this actor any more.
    Orphaned,
}

/// What came from a VMM.
enum Sign {
    Event(VmmEvent),
    News(News),
}

impl Actor {
    fn new(
        shared: Arc<Shared>,
        record: VmRecord,
        spec: VmSpec,
        backend: Arc<dyn Backend>,
        metrics: MetricsCell,
    ) -> (Self, ActorHandle) {
        let (inbox_sender, inbox) = mpsc::channel(INBOX);
        let (force_sender, force) = mpsc::channel(FORCE_INBOX);
        let (found_sender, found) = mpsc::channel(1);
        let uid = record.uid;
        let actor = Self {
            shared,
            record,
            spec,
            backend,
            metrics,
            live: None,
            inbox,
            force,
            found,
            preempting: VecDeque::new(),
            force_until: None,
            stray: false,
            uncertain: 0,
            untaken: None,
            made_taps: Vec::new(),
            restart_at: None,
            unfinished: None,
            look_at: None,
            answered: None,
            quiet_since: None,
        };
        (actor, ActorHandle { uid, inbox: inbox_sender, force: force_sender, found: found_sender })
    }

    fn span(&self) -> tracing::Span {
        tracing::info_span!("vm", vm_id = %self.record.vm_id, uid = %self.record.uid)
    }

    async fn run(mut self) {
        loop {
            let flow = match self.next().await {
                Step::Forced(message) => {
                    self.force_until = Some(message.asked + FORCE_LIMIT);
                    let flow = self.operate(message).await;
                    self.force_until = None;
                    flow
                }
                Step::Asked(message) => self.operate(message).await,
                Step::Sign(Sign::Event(event)) => {
                    self.on_event(event).await;
                    Flow::GoOn
                }
                Step::Sign(Sign::News(news)) => {
                    self.on_news(news).await;
                    Flow::GoOn
                }
                Step::Unfinished(operation) => {
                    // Under force as it was when it was cut short: its VMM may not answer.
                    let forced = unfinished::is_forced(&operation);
                    self.force_until = forced.then(|| Instant::now() + FORCE_LIMIT);
                    self.finish(operation).await;
                    self.force_until = None;
                    Flow::GoOn
                }
                Step::Restart(slot) => {
                    self.restart_by_policy().await;
                    drop(slot);
                    Flow::GoOn
                }
                Step::Look => {
                    self.look_for_it().await;
                    Flow::GoOn
                }
                Step::Found(found) => {
                    self.found(*found).await;
                    Flow::GoOn
                }
                Step::Orphaned => Flow::End,
            };
            match flow {
                Flow::GoOn => {}
                Flow::End => return,
            }
        }
    }

    async fn next(&mut self) -> Step {
        if let Some(message) = self.preempting.pop_front() {
            return Step::Forced(message);
        }
        if let Some(operation) = self.unfinished.take() {
            return Step::Unfinished(operation);
        }
        tokio::select! {
            biased;
            Some(message) = self.force.recv() => Step::Forced(message),
            sign = next_sign(&mut self.live) => Step::Sign(sign),
            slot = due_slot(self.restart_at, &self.shared.policy_starts) => Step::Restart(slot),
            () = due(self.look_at) => Step::Look,
            Some(found) = self.found.recv() => Step::Found(Box::new(found)),
            message = self.inbox.recv() => message.map_or(Step::Orphaned, Step::Asked),
        }
    }

    async fn operate(&mut self, message: Message) -> Flow {
        let Message { operation, reply, span, under_way, .. } = message;
        let outcome = self.carry_out(&operation).instrument(span.clone()).await;
        span.in_scope(|| match &outcome {
            Ok(outcome) => tracing::info!(
                operation = operation.request.name(),
                state = outcome.record.state.name(),
                ended_by = outcome.ended_by.map(|rung| rung.as_str()),
                "operation done"
            ),
            Err(error) => {
                tracing::info!(operation = operation.request.name(), %error, "operation refused or failed")
            }
        });
        let deleted = outcome.is_ok() && matches!(operation.request, Request::Delete | Request::ForceDelete);
        // The client may have left; the operation has been carried out all the same.
        let _ = reply.send(outcome);
        drop(under_way);
        if deleted { Flow::End } else { Flow::GoOn }
    }

    /// The folder of sockets, log and console.
    fn dir(&self) -> PathBuf {
        self.record.uid.run_dir(&self.shared.settings.runtime_dir)
    }

    /// Takes charge of a VMM. `run` is what the record is to know of it.
    fn hold(&mut self, launched: Launched, run: RunRecord) {
        let Launched { vmm, events } = launched;
        let interval = self.shared.settings.metrics_interval;
        let sampler = Sampler::start(Arc::clone(&vmm), self.spec.cpu.count, interval, self.metrics.clone());
        self.live = Some(Live { vmm, events, sampler });
        self.quiet_since = Some(begun(&run));
        self.record.run = Some(run);
        self.stray = false;
        self.look_at = None;
    }

    /// Lets go of a VMM that has gone, and of what it held.
    fn let_go(&mut self) {
        self.forget_run();
        self.shared.claims.release(self.record.uid);
    }

    /// Lets go of a VMM that has gone. What it held stays claimed, for the next one.
    fn forget_run(&mut self) {
        self.live = None;
        self.record.run = None;
        self.look_at = None;
        self.quiet_since = None;
    }

    /// The handle of the VMM, if one is held.
    fn vmm(&self) -> Option<Arc<dyn Vmm>> {
        self.live.as_ref().map(|live| Arc::clone(&live.vmm))
    }
}

/// When a run began, as far back as it matters. Its process may be older, where a spare VMM runs it.
fn begun(run: &RunRecord) -> Instant {
    let since = u64::try_from(now_ms().saturating_sub(run.started_ms)).unwrap_or_default();
    let age = vmm_host::process::age(&run.process).unwrap_or_default();
    let age = age.min(Duration::from_millis(since)).min(restart::QUIET);
    let now = Instant::now();
    now.checked_sub(age).unwrap_or(now)
}

async fn next_sign(live: &mut Option<Live>) -> Sign {
    match live {
        None => pending().await,
        Some(live) => tokio::select! {
            biased;
            // A backend promises that `Gone` is its last word; a channel that ends without it says nothing more.
            Some(event) = live.events.recv() => Sign::Event(event),
            news = live.sampler.news() => Sign::News(news),
        },
    }
}

/// Waits until a restart is due and one of `slots` is free. Until then the VM can be started, shut down and deleted by a client.
async fn due_slot(at: Option<Instant>, slots: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    due(at).await;
    match Arc::clone(slots).acquire_owned().await {
        Ok(slot) => slot,
        // Nobody closes the semaphore.
        Err(_) => pending().await,
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => pending().await,
    }
}
