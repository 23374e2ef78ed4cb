//! Intent and outcome: the two commits around every effect.

use std::sync::Arc;

use vmm_core::backend::Effect;
use vmm_core::caller::Caller;
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::state::{EndedBy, Phase, Request, Status};
use vmm_core::store::{Change, Commit, Intent, IntentKind, StoreError, StoreErrorKind, VmRecord};
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::events::Committed;
use crate::service::Outcome;

/// Why a change comes about, for the audit trail.
#[derive(Clone, Copy)]
pub(super) struct Why<'a> {
    /// A method's name, or what was observed (kebab-case).
    pub(super) cause: &'a str,
    /// Who asked; `None` where nobody did.
    pub(super) caller: Option<&'a Caller>,
    /// What ended the run, where it ended.
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

impl Actor {
    /// Commits that `kind` is about to be carried out for `caller`. Nothing may be touched before this has answered.
    pub(super) async fn intend(
        &mut self,
        kind: IntentKind,
        phase: Phase,
        caller: &Caller,
    ) -> Result<(), ServiceError> {
        let before = self.record.clone();
        let now = now_ms();
        let request = kind.request();
        self.record.intent = Some(Intent { kind, caller: caller.clone(), since_ms: now });
        self.record.status = Status { restarts: before.status.restarts, ..Status::plain(phase, now) };
        if matches!(request, Request::Boot | Request::Reboot) {
            self.record.owns_console_output = true;
        }
        let result = self.commit(EventKind::OperationStarted, Why::asked(request, caller)).await;
        if let Err(error) = result {
            self.record = VmRecord { generation: self.record.generation, ..before };
            self.publish();
            return Err(error.into());
        }
        point(FaultPoint::intent_committed(request));
        Ok(())
    }

    /// Commits what came of it, as the record says, and clears the intent. Readers see the truth even where the store fails:
    /// then the commit is lost, not the fact, and the next start finds it out again.
    pub(super) async fn conclude(&mut self, kind: EventKind, why: Why<'_>) -> Result<(), StoreError> {
        self.record.intent = None;
        let result = self.commit(kind, why).await;
        if let Err(error) = &result {
            tracing::error!(%error, kind = ?error.kind, "an outcome could not be recorded");
            self.publish();
        }
        result
    }

    /// Writes the record and an event in one transaction, then shows it to readers.
    pub(super) async fn commit(&mut self, kind: EventKind, why: Why<'_>) -> Result<(), StoreError> {
        let now = now_ms();
        let event = self.event(kind, why, now);
        let mut next = self.record.clone();
        next.modified_ms = now;
        let mut unseen = 0;
        let result = loop {
            next.generation = self.record.generation + 1 + unseen;
            let result = self.write(&next, &event).await;
            let conflicts = result.as_ref().is_err_and(|error| error.kind == StoreErrorKind::Conflict);
            if !conflicts || unseen == self.uncertain {
                break result;
            }
            // A commit before this one failed, yet was written.
            unseen += 1;
        };
        match result {
            Ok(committed) => {
                self.uncertain = 0;
                self.record = next;
                self.shared.index.publish_at(Arc::new(self.record.clone()), committed.seq);
                Ok(())
            }
            Err(error) => {
                if error.effect == Effect::Unknown {
                    self.uncertain = self.uncertain.max(unseen + 1);
                }
                Err(error)
            }
        }
    }

    async fn write(&self, record: &VmRecord, event: &NewEvent) -> Result<Committed, StoreError> {
        let change = Change::Update(Box::new(record.clone()));
        self.send(Commit { change, event: Some(event.clone()) }).await
    }

    /// Hands a commit to the store, which keeps room for what is forced.
    pub(super) async fn send(&self, commit: Commit) -> Result<Committed, StoreError> {
        if self.forcing() {
            self.shared.events.commit_forced(commit).await
        } else {
            self.shared.events.commit(commit).await
        }
    }

    /// An event about the record as it is.
    pub(super) fn event(&self, kind: EventKind, why: Why<'_>, now: i64) -> NewEvent {
        NewEvent {
            time_ms: now,
            vm_id: self.record.vm_id.clone(),
            uid: self.record.uid,
            kind,
            state: self.record.state,
            status: self.record.status.clone(),
            cause: why.cause.to_owned(),
            caller: why.caller.cloned().unwrap_or_else(Caller::system),
            ended_by: why.ended_by,
            metadata: self.record.config.metadata.clone(),
        }
    }

    /// Shows the record to readers.
    pub(super) fn publish(&self) {
        self.shared.index.publish(Arc::new(self.record.clone()));
    }

    /// The answer of an operation that succeeded.
    pub(super) fn outcome(&self, ended_by: Option<EndedBy>) -> Outcome {
        Outcome { record: Arc::new(self.record.clone()), ended_by, left_behind: Vec::new() }
    }

    /// A status without a cause, now.
    pub(super) fn plain(&self, phase: Phase) -> Status {
        Status { restarts: self.record.status.restarts, ..Status::plain(phase, now_ms()) }
    }
}
