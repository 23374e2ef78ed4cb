//! The journal: the only way in which a VM's record changes.
//!
//! ```text
//!   RecordUpdate (observation, status, intent, run) ─► record
//!                                                         ├─► store and event ─► shown ─► watches
//!                                                         │ refused
//!                               an intent: undone ────────┴─ an outcome: shown, its event kept
//!                                                                │ after 1 s, doubled up to 30 s,
//!                                                                └ or before the next commit
//! ```
//!
//! State, status, intent, run and configuration change together, with the event that reports the
//! change, in [`RecordUpdate::apply`] and nowhere else: [`ActorRecord`] can be changed in this
//! module alone. Readers see the true state even if the store refuses
//! it. A refused outcome is written as soon as possible and in its order, so that the log contains
//! every event that readers saw.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::Effect;
use vmm_core::caller::Caller;
use vmm_core::event::{EventKind, NewEvent, VmSummary};
use vmm_core::idempotency::{CallAnswer, KeptAnswer, KeyChange, KeyedCall};
use vmm_core::state::{EndedBy, Phase, Status, observe};
use vmm_core::store::{Commit, Intent, IntentKind, RecordChange, StoreError, StoreErrorKind, VmRecord};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process;

use super::Actor;
use super::budget::Budget;
use super::record_update::{ChangeReason, RecordUpdate};
use crate::clock::now_ms;
use crate::events::CommitReceipt;
use crate::mailbox::{AnswerState, OperationOutcome};
use crate::operation_log;

/// The wait before a refused outcome is written again for the first time.
const FIRST_RETRY_DELAY: Duration = Duration::from_secs(1);
/// The longest wait before a refused outcome is written again.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);
/// The number of refused outcomes that are kept. The oldest are dropped if a VM continues to change
/// for a long time while nothing can be written.
const MAX_UNWRITTEN: usize = 64;

/// The record of an actor as readers see it. The index holds the same `Arc`. Other modules can read
/// the record and cannot change it.
pub(super) struct ActorRecord(Arc<VmRecord>);

impl ActorRecord {
    /// Returns the record with which an actor begins.
    pub(super) const fn new(record: Arc<VmRecord>) -> Self {
        Self(record)
    }

    /// Returns the record for a reader.
    pub(super) fn share(&self) -> Arc<VmRecord> {
        Arc::clone(&self.0)
    }
}

impl Deref for ActorRecord {
    type Target = VmRecord;

    fn deref(&self) -> &VmRecord {
        &self.0
    }
}

impl RecordUpdate<'_> {
    /// Returns true if `record` shows this change already, except for its message and its times.
    fn is_shown_by(&self, actor: &Actor, record: &VmRecord) -> bool {
        let (mut next, _) = self.clone().apply(actor, record);
        next.modified_ms = record.modified_ms;
        next.status.observed_at_ms = record.status.observed_at_ms;
        next.status.message.clone_from(&record.status.message);
        next == *record
    }

    /// Returns `record` after this change, and the entry that reports the change.
    fn apply(self, actor: &Actor, record: &VmRecord) -> (VmRecord, JournalEntry) {
        let now = now_ms();
        let mut next = record.clone();
        next.state = self.observations.into_iter().flatten().fold(next.state, observe);
        next.status = self.status;
        let mut change = None;
        if let Some(edit) = self.config {
            next.config = edit.config;
            next.owns_console_output &= edit.keeps_console_output;
            change = Some(Box::new(edit.change));
        }
        // The console's file belongs to this VM as soon as the intent of a start is on record.
        next.owns_console_output |= self.intent.as_ref().is_some_and(Intent::is_start);
        next.intent = self.intent;
        next.run = actor.hold.run_on_record(next.run.take());
        next.pending = Some(actor.pending_work(next.intent.as_ref()));
        if let Some(found) = self.found {
            next.imported = true;
            next.config = found.config;
            next.unrepresented = found.unrepresented;
        }
        if let Some(ended_by) = self.ended_by {
            next.ended_by = ended_by;
        }
        next.modified_ms = now;
        let answer = actor.step_key(self.key, &self.why, &mut next);
        let event = NewEvent {
            time_ms: now,
            vm_id: next.vm_id.clone(),
            uid: next.uid,
            kind: self.kind,
            state: next.state,
            status: next.status.clone(),
            cause: self.why.cause,
            caller: self.why.caller.cloned().unwrap_or_else(Caller::system),
            ended_by: self.why.ended_by,
            metadata: next.config.metadata.clone(),
            update: change,
            // ListVms shows nothing of a VM that is deleted.
            summary: (self.kind != EventKind::Deleted).then(|| VmSummary::of(&next)),
        };
        (next, JournalEntry { event, answer })
    }
}

/// A change as the store gets it beside the record.
#[derive(Clone)]
struct JournalEntry {
    event: NewEvent,
    /// The answer that is kept for a call with an idempotency key.
    answer: Option<Box<KeptAnswer>>,
}

/// The outcomes that the store has not recorded, or may not have recorded.
#[derive(Default)]
pub(super) struct Journal {
    /// The number of failed commits since the last success that the store may have written
    /// nevertheless.
    uncertain: u64,
    /// The entries of outcomes that were shown and refused, the oldest first.
    unwritten: VecDeque<UnwrittenEntry>,
    retry: Option<CommitRetry>,
}

struct UnwrittenEntry {
    entry: JournalEntry,
    /// The generation with which the store may have written the entry nevertheless.
    uncertain_at: Option<u64>,
}

struct CommitRetry {
    at: Instant,
    wait: Duration,
}

impl Journal {
    /// Returns the journal of an actor that does not know whether its predecessor's last commit was
    /// written.
    pub(super) fn after_a_panic() -> Self {
        Self { uncertain: 1, ..Self::default() }
    }

    /// Returns true if the answer to `call` waits to be written.
    pub(super) fn answers(&self, call: &KeyedCall) -> bool {
        let answers = self.unwritten.iter().filter_map(|unwritten| unwritten.entry.answer.as_ref());
        answers.into_iter().any(|answer| answer.call.id == call.id)
    }

    /// Returns the instant at which refused outcomes are to be written again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry.as_ref().map(|retry| retry.at)
    }
}

impl Actor {
    /// Commits that the operation `kind` of `caller` begins. The operation must touch nothing
    /// before this call has returned.
    ///
    /// A refused intent is undone in memory too, because nothing was done and so nothing has
    /// changed.
    pub(super) async fn intend(
        &mut self,
        budget: Budget,
        kind: IntentKind,
        status: Status,
        caller: &Caller,
    ) -> Result<(), StoreError> {
        let request = kind.request();
        let intent = self.new_intent(kind, caller.clone());
        let why = ChangeReason::asked(request, caller);
        let update = RecordUpdate::new(EventKind::OperationStarted, why, status);
        self.try_to_conclude(budget, update.intending(Some(intent)).beginning_call()).await?;
        point(FaultPoint::intent_committed(request));
        Ok(())
    }

    /// Returns an intent that begins now. Its scope is that of a process which an earlier operation
    /// may have left, or else that of the processes which this daemon starts.
    pub(super) fn new_intent(&self, kind: IntentKind, caller: Caller) -> Intent {
        let before = self.record.intent.as_ref().and_then(|intent| intent.scope.clone());
        let left = before.filter(|_| self.hold.may_be_a_process());
        Intent { kind, caller, since_ms: now_ms(), scope: left.or_else(|| process::scope().ok()) }
    }

    /// Commits a change, or leaves everything as it was.
    pub(super) async fn try_to_conclude(
        &mut self,
        budget: Budget,
        update: RecordUpdate<'_>,
    ) -> Result<(), StoreError> {
        self.write_what_was_refused(budget).await?;
        let (next, entry) = update.apply(self, &self.record);
        let is_answer = entry.answer.is_some();
        self.commit(budget, next, entry).await?;
        self.note_answer(is_answer);
        Ok(())
    }

    /// Commits an outcome. Readers see the outcome even if the store fails, because the outcome is
    /// a fact and only its commit is late.
    ///
    /// # Errors
    ///
    /// Returns the store's error if the outcome is shown and not recorded yet.
    pub(super) async fn conclude(
        &mut self,
        budget: Budget,
        update: RecordUpdate<'_>,
    ) -> Result<(), StoreError> {
        let refused = self.write_what_was_refused(budget).await;
        // A request of a client has a log line of its own. The end of a run has one even if a
        // request met it, because the answer to the request does not tell how the run ended.
        let is_unrequested = update.why.caller.is_none() || update.kind == EventKind::VmmExited;
        let (next, entry) = update.apply(self, &self.record);
        self.note_answer(entry.answer.is_some());
        if is_unrequested {
            let is_logged = self.shared.beginnings.count(entry.event.kind);
            operation_log::unrequested(&entry.event, &self.record.backend, is_logged);
        }
        let result = match refused {
            // The log keeps the order of the outcomes, so this outcome waits behind those before
            // it.
            Err(error) => Err(Box::new(RefusedCommit { error, next, entry, generation: None })),
            Ok(()) => self.commit(budget, next, entry).await,
        };
        let Err(refused) = result else { return Ok(()) };
        let RefusedCommit { error, next, entry, generation: uncertain_at } = *refused;
        tracing::error!(%error, kind = ?error.kind, "the outcome could not be recorded yet; it is shown, and writing is tried again");
        self.record = ActorRecord::new(Arc::new(next));
        self.publish();
        if self.journal.unwritten.len() == MAX_UNWRITTEN {
            self.journal.unwritten.pop_front();
            tracing::error!("the oldest unwritten event was dropped, because the store has refused too many");
        }
        self.journal.unwritten.push_back(UnwrittenEntry { entry, uncertain_at });
        self.retry_later();
        Err(error)
    }

    /// Commits the outcome of a step that is repeated. If an earlier repetition has recorded the
    /// same outcome, the outcome is shown and not recorded again, whatever its message says.
    pub(super) async fn conclude_once(&mut self, budget: Budget, update: RecordUpdate<'_>) {
        if update.is_shown_by(self, &self.record) {
            self.show(update);
        } else {
            let _ = self.conclude(budget, update).await;
        }
    }

    /// Writes the outcomes that the store has refused, in their order. Each is written with the
    /// present record, because only the events are a history.
    pub(super) async fn write_what_was_refused(&mut self, budget: Budget) -> Result<(), StoreError> {
        while let Some(UnwrittenEntry { entry, uncertain_at }) = self.journal.unwritten.pop_front() {
            let next = VmRecord::clone(&self.record);
            let Err(refused) = self.commit_again(budget, next, entry, uncertain_at).await else { continue };
            let RefusedCommit { error, entry, generation, .. } = *refused;
            // The event goes back to the front of the queue. An attempt that was uncertain once
            // stays uncertain, because a later refusal does not prove that the first attempt was
            // not written.
            self.journal
                .unwritten
                .push_front(UnwrittenEntry { entry, uncertain_at: uncertain_at.or(generation) });
            self.retry_later();
            return Err(error);
        }
        self.journal.retry = None;
        Ok(())
    }

    /// Writes an outcome again.
    ///
    /// If an earlier attempt may have been written with the generation `uncertain_at`, this attempt
    /// uses exactly that generation. A conflict then proves that the earlier attempt was written,
    /// because no other process writes this record. Any other generation could write the event
    /// twice.
    async fn commit_again(
        &mut self,
        budget: Budget,
        mut next: VmRecord,
        entry: JournalEntry,
        uncertain_at: Option<u64>,
    ) -> Result<(), Box<RefusedCommit>> {
        let Some(generation) = uncertain_at else {
            return self.commit(budget, next, entry).await;
        };
        next.generation = generation;
        match self.write(budget, &next, &entry).await {
            Err(error) if error.kind == StoreErrorKind::Conflict => {
                self.journal.uncertain = 0;
                self.record = ActorRecord::new(Arc::new(next));
                // The position of the event in the log is not known, so the record is published
                // without one, and watches read the log.
                self.publish();
                Ok(())
            }
            Err(error) => Err(Box::new(RefusedCommit { error, next, entry, generation: Some(generation) })),
            Ok(committed) => {
                self.written(next, &committed);
                Ok(())
            }
        }
    }

    fn retry_later(&mut self) {
        let wait = self
            .journal
            .retry
            .as_ref()
            .map_or(FIRST_RETRY_DELAY, |retry| (retry.wait * 2).min(MAX_RETRY_DELAY));
        self.journal.retry = Some(CommitRetry { at: Instant::now() + wait, wait });
    }

    /// Writes the record and an event in one transaction, then shows the record to readers.
    ///
    /// The store takes a record only if its generation is the stored one plus 1. A commit that
    /// failed without a definite answer may have been written, so that the stored generation is one
    /// of `uncertain + 1` values. The loop tries the next generations in update, and at most as
    /// many as there are uncertain commits. One conflict more would mean that another process
    /// writes this record, and then nothing may be overwritten.
    async fn commit(
        &mut self,
        budget: Budget,
        mut next: VmRecord,
        entry: JournalEntry,
    ) -> Result<(), Box<RefusedCommit>> {
        // `unseen` is the number of earlier commits that this attempt assumes to be written. It
        // starts at 0, the usual case: the stored generation is that of `self.record`, and the
        // first attempt succeeds.
        let mut unseen = 0;
        let result = loop {
            next.generation = self.record.generation + 1 + unseen;
            let result = self.write(budget, &next, &entry).await;
            // A conflict means that the stored generation is not the assumed one. It can be higher
            // only by the commits that may have been written, so that the next attempt assumes one
            // more of them. Every other result ends the loop: a success is certain, and another
            // error would be the same for each generation.
            let conflicts = result.as_ref().is_err_and(|error| error.kind == StoreErrorKind::Conflict);
            if !conflicts || unseen == self.journal.uncertain {
                break result;
            }
            unseen += 1;
        };
        match result {
            Ok(committed) => {
                self.written(next, &committed);
                Ok(())
            }
            Err(error) => {
                // An error with an unknown effect makes this attempt uncertain as well. The attempt
                // assumed `unseen` written commits before it, so that `unseen + 1` may be written
                // now. A bound that is already higher stays, because this failure disproves none of
                // the earlier ones.
                let unknown = error.effect == Effect::Unknown;
                if unknown {
                    self.journal.uncertain = self.journal.uncertain.max(unseen + 1);
                }
                // The caller gets the generation of an uncertain attempt, because a later attempt
                // must use exactly this one (see `commit_again`). The record that goes back keeps
                // the generation of `self.record`, because memory counts proven commits only.
                let generation = unknown.then_some(next.generation);
                next.generation = self.record.generation;
                Err(Box::new(RefusedCommit { error, next, entry, generation }))
            }
        }
    }

    fn written(&mut self, next: VmRecord, committed: &CommitReceipt) {
        self.journal.uncertain = 0;
        self.record = ActorRecord::new(Arc::new(next));
        self.shared.index.publish_at(self.record.share(), committed.seq);
    }

    async fn write(
        &self,
        budget: Budget,
        record: &VmRecord,
        entry: &JournalEntry,
    ) -> Result<CommitReceipt, StoreError> {
        let change = RecordChange::Update(Box::new(record.clone()));
        let JournalEntry { mut event, mut answer } = entry.clone();
        // Only now is the generation of this attempt known.
        if let Some(summary) = &mut event.summary {
            summary.generation = record.generation;
        }
        if let Some(CallAnswer::Done(vm)) = answer.as_mut().map(|kept| &mut kept.answer) {
            vm.generation = record.generation;
        }
        self.send(budget, Commit { change, event: Some(event) }, answer).await
    }

    /// Hands a commit to the store, with the answer that is kept. The store keeps room for commits
    /// of forced operations.
    pub(super) async fn send(
        &self,
        budget: Budget,
        commit: Commit,
        answer: Option<Box<KeptAnswer>>,
    ) -> Result<CommitReceipt, StoreError> {
        if let Some(answer) = answer {
            return self.shared.events.commit_keyed(commit, KeyChange::Keep(answer), budget.forced).await;
        }
        if budget.forced {
            self.shared.events.commit_forced(commit).await
        } else {
            self.shared.events.commit(commit).await
        }
    }

    /// Returns the event that reports `update`, and does not apply the update.
    pub(super) fn event_of(&self, update: RecordUpdate<'_>) -> NewEvent {
        update.apply(self, &self.record).1.event
    }

    /// Shows `update` to readers and records nothing, because the update is newer knowledge and no
    /// change.
    pub(super) fn show(&mut self, update: RecordUpdate<'_>) {
        let (next, _) = update.apply(self, &self.record);
        self.record = ActorRecord::new(Arc::new(VmRecord { modified_ms: self.record.modified_ms, ..next }));
        self.publish();
    }

    /// Shows the record to readers.
    pub(super) fn publish(&self) {
        self.shared.index.publish(self.record.share());
    }

    /// Returns the answer of an operation that succeeded.
    pub(super) fn outcome(&self, ended_by: Option<EndedBy>) -> OperationOutcome {
        OperationOutcome {
            record: self.record.share(),
            ended_by,
            left_behind: Vec::new(),
            warnings: Vec::new(),
            answer: AnswerState::Open,
        }
    }

    /// Returns a status without a cause, observed now.
    pub(super) fn status(&self, phase: Phase) -> Status {
        Status { restarts: self.record.status.restarts, ..Status::plain(phase, now_ms()) }
    }
}

/// A commit that the store has not taken.
struct RefusedCommit {
    error: StoreError,
    next: VmRecord,
    entry: JournalEntry,
    /// The generation with which the store may have written the commit nevertheless.
    generation: Option<u64>,
}

impl From<Box<RefusedCommit>> for StoreError {
    fn from(refused: Box<RefusedCommit>) -> Self {
        refused.error
    }
}
