//! The journal: the one way in which a VM's record changes.
//!
//! ```text
//!   Turn (observation, status, intent, run) ──► record ─┬─► store, with one event ──► shown ──► watchers hear of it
//!                                                       │       │ refused
//!                                 an intent: taken back ┴─ an outcome: shown all the same, its event kept
//!                                                                                     │ after 1 s, doubled up to 30 s,
//!                                                                                     └ or before the next commit
//! ```
//!
//! State, status, intent and run change together, with the event that tells of it, in [`Turn::apply`] and nowhere else. What is
//! shown is true even where the store refuses it. What the store refused is written as soon as it can be, in its order, so that
//! the log lacks nothing that was shown.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::Effect;
use vmm_core::caller::Caller;
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::state::{EndedBy, Observation, Phase, Request, Status, observe};
use vmm_core::store::{Change, Commit, Intent, IntentKind, StoreError, StoreErrorKind, VmRecord};
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::Budget;
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::events::Committed;
use crate::mailbox::Outcome;

/// The wait before a refused outcome is written again.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest wait.
const MAX_RETRY: Duration = Duration::from_secs(30);
/// Refused outcomes that are kept. Of a VM that goes on changing for long while nothing can be written the oldest are dropped.
const MAX_UNWRITTEN: usize = 64;

/// Why a change comes about, for the audit trail.
#[derive(Clone, Copy)]
pub(super) struct Why<'a> {
    /// A method's name, or what was observed (kebab-case).
    pub(super) cause: &'a str,
    /// The caller; `None` where nobody asked.
    pub(super) caller: Option<&'a Caller>,
    /// The rung that ended the run, where the run ended.
    pub(super) ended_by: Option<EndedBy>,
}

impl<'a> Why<'a> {
    /// A change that nobody asked for.
    pub(super) const fn by_itself(cause: &'a str) -> Self {
        Self { cause, caller: None, ended_by: None }
    }

    /// A change that `caller` asked for.
    pub(super) const fn asked(request: Request, caller: &'a Caller) -> Self {
        Self { cause: request.name(), caller: Some(caller), ended_by: None }
    }

    /// The same, with what ended the run.
    pub(super) const fn ended_by(mut self, ended_by: Option<EndedBy>) -> Self {
        self.ended_by = ended_by;
        self
    }
}

/// One change of a VM: everything of its record that changes, and the event that tells of it.
pub(super) struct Turn<'a> {
    kind: EventKind,
    why: Why<'a>,
    status: Status,
    observations: [Option<Observation>; 2],
    intent: Option<Intent>,
    ended_by: Option<Option<EndedBy>>,
}

impl<'a> Turn<'a> {
    /// A change after which nothing is under way. The state stays.
    pub(super) const fn new(kind: EventKind, why: Why<'a>, status: Status) -> Self {
        Self { kind, why, status, observations: [None; 2], intent: None, ended_by: None }
    }

    /// Moves the state as `observation` does, after an earlier one.
    pub(super) const fn observing(mut self, observation: Observation) -> Self {
        self.observations = [self.observations[1], Some(observation)];
        self
    }

    /// Leaves `intent` on record.
    pub(super) fn intending(mut self, intent: Option<Intent>) -> Self {
        self.intent = intent;
        self
    }

    /// Replaces what ended the last run.
    pub(super) const fn ending(mut self, ended_by: Option<EndedBy>) -> Self {
        self.ended_by = Some(ended_by);
        self
    }

    /// Returns `record` after this change.
    fn apply(self, actor: &Actor, record: &VmRecord) -> (VmRecord, NewEvent) {
        let now = now_ms();
        let mut next = record.clone();
        next.state = self.observations.into_iter().flatten().fold(next.state, observe);
        next.status = self.status;
        // From the moment that the intent of a start says so, the console's file is this VM's own.
        next.owns_console_output |= self.intent.as_ref().is_some_and(Intent::is_start);
        next.intent = self.intent;
        next.run = actor.hold.run_on_record(next.run.take());
        if let Some(ended_by) = self.ended_by {
            next.ended_by = ended_by;
        }
        next.modified_ms = now;
        let event = NewEvent {
            time_ms: now,
            vm_id: next.vm_id.clone(),
            uid: next.uid,
            kind: self.kind,
            state: next.state,
            status: next.status.clone(),
            cause: self.why.cause.to_owned(),
            caller: self.why.caller.cloned().unwrap_or_else(Caller::system),
            ended_by: self.why.ended_by,
            metadata: next.config.metadata.clone(),
        };
        (next, event)
    }
}

/// The outcomes that the store has not recorded, or may not have.
#[derive(Default)]
pub(super) struct Journal {
    /// The number of failed commits since the last success that may have been written all the same.
    uncertain: u64,
    /// The outcomes that were shown and refused, the oldest first.
    unwritten: VecDeque<Unwritten>,
    retry: Option<Retry>,
}

struct Unwritten {
    event: NewEvent,
    /// The generation with which it may have been written all the same.
    uncertain_at: Option<u64>,
}

struct Retry {
    at: Instant,
    wait: Duration,
}

impl Journal {
    /// Returns the journal of an actor that cannot tell whether its predecessor's last commit was written.
    pub(super) fn after_a_panic() -> Self {
        Self { uncertain: 1, ..Self::default() }
    }

    /// Returns when refused outcomes are to be written again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry.as_ref().map(|retry| retry.at)
    }
}

impl Actor {
    /// Commits that `kind` is about to be carried out for `caller`. Nothing may be touched before this has answered.
    ///
    /// A refused intent is taken back, in memory too: nothing was done, and so nothing has changed.
    pub(super) async fn intend(
        &mut self,
        budget: Budget,
        kind: IntentKind,
        phase: Phase,
        caller: &Caller,
    ) -> Result<(), ServiceError> {
        let request = kind.request();
        let intent = Intent { kind, caller: caller.clone(), since_ms: now_ms() };
        let turn = Turn::new(EventKind::OperationStarted, Why::asked(request, caller), self.status(phase));
        self.try_to_conclude(budget, turn.intending(Some(intent))).await?;
        point(FaultPoint::intent_committed(request));
        Ok(())
    }

    /// Commits a change, or leaves everything as it was.
    pub(super) async fn try_to_conclude(&mut self, budget: Budget, turn: Turn<'_>) -> Result<(), StoreError> {
        self.write_what_was_refused(budget).await?;
        let (next, event) = turn.apply(self, &self.record);
        Ok(self.commit(budget, next, event).await?)
    }

    /// Commits what came of something. Readers see the truth even where the store fails: then the commit is late, not the fact.
    ///
    /// # Errors
    ///
    /// The store's, where the outcome is shown and not recorded yet.
    pub(super) async fn conclude(&mut self, budget: Budget, turn: Turn<'_>) -> Result<(), StoreError> {
        let refused = self.write_what_was_refused(budget).await;
        let (next, event) = turn.apply(self, &self.record);
        let result = match refused {
            // The log keeps the order in which things came about, so this outcome waits behind those before it.
            Err(error) => Err(Box::new(Refused { error, next, event, generation: None })),
            Ok(()) => self.commit(budget, next, event).await,
        };
        let Err(refused) = result else { return Ok(()) };
        let Refused { error, next, event, generation: uncertain_at } = *refused;
        tracing::error!(%error, kind = ?error.kind, "an outcome could not be recorded yet");
        self.record = Arc::new(next);
        self.publish();
        if self.journal.unwritten.len() == MAX_UNWRITTEN {
            self.journal.unwritten.pop_front();
            tracing::error!("an event is lost, because nothing could be recorded for too long");
        }
        self.journal.unwritten.push_back(Unwritten { event, uncertain_at });
        self.retry_later();
        Err(error)
    }

    /// Writes the outcomes that the store has refused, in their order. Each is written with the record as it is now, because
    /// only the events are a history.
    pub(super) async fn write_what_was_refused(&mut self, budget: Budget) -> Result<(), StoreError> {
        while let Some(Unwritten { event, uncertain_at }) = self.journal.unwritten.pop_front() {
            let next = VmRecord::clone(&self.record);
            let Err(refused) = self.commit_again(budget, next, event, uncertain_at).await else { continue };
            let Refused { error, event, generation, .. } = *refused;
            self.journal.unwritten.push_front(Unwritten { event, uncertain_at: uncertain_at.or(generation) });
            self.retry_later();
            return Err(error);
        }
        self.journal.retry = None;
        Ok(())
    }

    /// Writes an outcome once more. Where an earlier try of it may have been written with the generation `uncertain_at`, exactly
    /// that generation is tried: a conflict then proves that the earlier try was written, since nobody else writes this
    /// record. Any other generation could write the event twice.
    async fn commit_again(
        &mut self,
        budget: Budget,
        mut next: VmRecord,
        event: NewEvent,
        uncertain_at: Option<u64>,
    ) -> Result<(), Box<Refused>> {
        let Some(generation) = uncertain_at else {
            return self.commit(budget, next, event).await;
        };
        next.generation = generation;
        match self.write(budget, &next, &event).await {
            Err(error) if error.kind == StoreErrorKind::Conflict => {
                self.journal.uncertain = 0;
                self.record = Arc::new(next);
                // The event's place is not known, so the record says nothing of it: whoever watches reads the log.
                self.publish();
                Ok(())
            }
            Err(error) => Err(Box::new(Refused { error, next, event, generation: Some(generation) })),
            Ok(committed) => {
                self.written(next, &committed);
                Ok(())
            }
        }
    }

    fn retry_later(&mut self) {
        let wait = self.journal.retry.as_ref().map_or(FIRST_RETRY, |retry| (retry.wait * 2).min(MAX_RETRY));
        self.journal.retry = Some(Retry { at: Instant::now() + wait, wait });
    }

    /// Writes the record and an event in one transaction, then shows it to readers.
    ///
    /// The store takes a record only if its generation follows the stored one. After a commit that failed without saying whether
    /// it was written, nobody knows which generation is stored: it is one of `uncertain + 1`. So the next ones are tried
    /// in turn, and only as many as commits may have been written unseen: one conflict more would mean that somebody else writes
    /// this record, and then nothing may be overwritten.
    async fn commit(
        &mut self,
        budget: Budget,
        mut next: VmRecord,
        event: NewEvent,
    ) -> Result<(), Box<Refused>> {
        let mut unseen = 0;
        let result = loop {
            next.generation = self.record.generation + 1 + unseen;
            let result = self.write(budget, &next, &event).await;
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
                let unknown = error.effect == Effect::Unknown;
                if unknown {
                    self.journal.uncertain = self.journal.uncertain.max(unseen + 1);
                }
                let generation = unknown.then_some(next.generation);
                next.generation = self.record.generation;
                Err(Box::new(Refused { error, next, event, generation }))
            }
        }
    }

    fn written(&mut self, next: VmRecord, committed: &Committed) {
        self.journal.uncertain = 0;
        self.record = Arc::new(next);
        self.shared.index.publish_at(Arc::clone(&self.record), committed.seq);
    }

    async fn write(
        &self,
        budget: Budget,
        record: &VmRecord,
        event: &NewEvent,
    ) -> Result<Committed, StoreError> {
        let change = Change::Update(Box::new(record.clone()));
        self.send(budget, Commit { change, event: Some(event.clone()) }).await
    }

    /// Hands a commit to the store, which keeps room for what is forced.
    pub(super) async fn send(&self, budget: Budget, commit: Commit) -> Result<Committed, StoreError> {
        if budget.forced {
            self.shared.events.commit_forced(commit).await
        } else {
            self.shared.events.commit(commit).await
        }
    }

    /// Returns the event that tells of `turn`, which is not applied.
    pub(super) fn event_of(&self, turn: Turn<'_>) -> NewEvent {
        turn.apply(self, &self.record).1
    }

    /// Shows `turn` to readers and records nothing: fresh knowledge that is no change.
    pub(super) fn show(&mut self, turn: Turn<'_>) {
        let (next, _) = turn.apply(self, &self.record);
        self.record = Arc::new(VmRecord { modified_ms: self.record.modified_ms, ..next });
        self.publish();
    }

    /// Shows the record to readers.
    pub(super) fn publish(&self) {
        self.shared.index.publish(Arc::clone(&self.record));
    }

    /// The answer of an operation that succeeded.
    pub(super) fn outcome(&self, ended_by: Option<EndedBy>) -> Outcome {
        Outcome { record: Arc::clone(&self.record), ended_by, left_behind: Vec::new() }
    }

    /// A status without a cause, now.
    pub(super) fn status(&self, phase: Phase) -> Status {
        Status { restarts: self.record.status.restarts, ..Status::plain(phase, now_ms()) }
    }
}

/// A commit that the store has not taken.
struct Refused {
    error: StoreError,
    next: VmRecord,
    event: NewEvent,
    /// The generation with which it may have been written all the same.
    generation: Option<u64>,
}

impl From<Box<Refused>> for StoreError {
    fn from(refused: Box<Refused>) -> Self {
        refused.error
    }
}
