//! Operations with an idempotency key: each is carried out once, and its answer is kept.
//!
//! ```text
//!   answer kept already ──► shown again
//!   otherwise: intent, with the key in the record ─► outcome, with the answer to a success
//!                          │ the daemon dies
//!                          └─► the recovery ends the operation: finished, with the answer; or undone
//! ```
//!
//! The answer is committed with the outcome, because a reboot whose answer was committed later
//! could take place twice.

use vmm_core::caller::Caller;
use vmm_core::idempotency::{CallAnswer, KeptAnswer, KeyedCall, VmAnswer};
use vmm_core::report::FieldReport;
use vmm_core::store::VmRecord;

use super::Actor;
use super::budget::Budget;
use super::record_update::ChangeReason;
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::failure::Failure;
use crate::mailbox::{AnswerState, OperationOutcome, OperationRequest};

/// The effect of a change of the record on the keyed call that is in progress.
#[derive(Clone, Debug, Default)]
pub(super) enum KeyStep {
    /// The call stays in progress.
    #[default]
    Stay,
    /// The call begins. A start by the restart policy goes on with the call that led to it.
    Begin,
    /// The call has succeeded, with these warnings.
    Answer(Vec<FieldReport>),
    /// The call has ended in another way.
    End,
}

/// The keyed call that the actor carries out.
pub(super) struct CallInHand {
    call: KeyedCall,
    /// True if the answer is on record, or waits to be written with its outcome.
    answered: bool,
}

impl Actor {
    /// Carries out an operation. An operation whose key has an answer is not carried out again.
    pub(super) async fn carry_out_once(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        if let Some(call) = &operation.key
            && let Some(first) = self.first_answer(budget, call, operation).await?
        {
            return Ok(OperationOutcome { answer: AnswerState::Replayed(first), ..self.outcome(None) });
        }
        self.take_call(operation);
        let outcome = self.carry_out(budget, operation).await;
        self.release_call(outcome)
    }

    /// Notes the keyed call of an operation that begins.
    pub(super) fn take_call(&mut self, operation: &OperationRequest) {
        let begin = |call: &KeyedCall| Box::new(CallInHand { call: call.clone(), answered: false });
        self.call = operation.key.as_deref().map(begin);
    }

    /// Ends the work on the keyed call, and notes in `outcome` whether its answer is kept.
    pub(super) fn release_call(
        &mut self,
        outcome: Result<OperationOutcome, ServiceError>,
    ) -> Result<OperationOutcome, ServiceError> {
        let answered = self.call.take().is_some_and(|call| call.answered);
        let outcome = outcome?;
        let answer = if answered { AnswerState::Kept } else { AnswerState::Open };
        Ok(OperationOutcome { answer, ..outcome })
    }

    /// Returns the answer to an earlier call with the same key. The service has looked before, but an
    /// operation that a crash or a panic interrupted may have ended since.
    ///
    /// # Errors
    ///
    /// Returns the failure that is kept, [`ServiceError::KeyReused`], or
    /// [`ServiceError::Unavailable`] if the earlier call has not ended.
    async fn first_answer(
        &mut self,
        budget: Budget,
        call: &KeyedCall,
        operation: &OperationRequest,
    ) -> Result<Option<Box<VmAnswer>>, ServiceError> {
        if self.journal.answers(call) {
            // The operation has ended, and its answer waits to be written with its outcome.
            self.write_what_was_refused(budget).await?;
        }
        if let Some(first) = self.shared.events.kept_answer(&call.id).await?.kept {
            if first.call.request != call.request {
                return Err(Failure::KeyReused { method: operation.request.method() }.into());
            }
            return match first.answer {
                CallAnswer::Done(answer) => Ok(Some(answer)),
                CallAnswer::Failed(failed) => Err(ServiceError::Replayed(Box::new(failed))),
            };
        }
        // A forced operation is carried out anyway: its repetition has the same effect as once.
        let in_progress = self.record.keyed.as_ref().is_some_and(|first| first.id == call.id);
        if in_progress && !budget.forced {
            return Err(Failure::KeyInProgress { vm_id: self.record.vm_id.clone() }.into());
        }
        Ok(None)
    }

    /// Takes `step` on the keyed call of `next`, and returns the answer that is to be kept with it.
    pub(super) fn step_key(
        &self,
        step: KeyStep,
        why: &ChangeReason<'_>,
        next: &mut VmRecord,
    ) -> Option<Box<KeptAnswer>> {
        let in_hand = self.call.as_ref().map(|in_hand| &in_hand.call);
        // The program itself acts for the call on record: it recovers the VM, or starts it again.
        let acts_itself = why.caller.is_none_or(Caller::is_system);
        let mut kept = None;
        match step {
            KeyStep::Stay => {}
            KeyStep::Begin if acts_itself && in_hand.is_none() => {}
            KeyStep::Begin => next.keyed = in_hand.cloned().map(Box::new),
            KeyStep::Answer(warnings) => {
                let on_record = next.keyed.as_deref().filter(|_| acts_itself);
                if let Some(call) = in_hand.or(on_record).cloned() {
                    next.keyed = next.keyed.take().filter(|first| first.id != call.id);
                    let vm = VmAnswer { ended_by: why.ended_by, warnings, ..VmAnswer::of(next) };
                    kept = Some(keep(call, vm));
                }
            }
            KeyStep::End => next.keyed = None,
        }
        // Nothing goes on with a call without an intent and without a start that is due.
        let goes_on = next.intent.is_some() || next.pending_work().restart;
        next.keyed = next.keyed.take().filter(|_| goes_on);
        kept
    }

    /// Returns the answer to the keyed call in hand, if there is one: the VM is gone.
    pub(super) fn answer_of_deletion(&self, left_behind: &[FieldReport]) -> Option<Box<KeptAnswer>> {
        let call = self.call.as_ref()?.call.clone();
        Some(keep(call, VmAnswer { left_behind: left_behind.to_vec(), ..VmAnswer::of(&self.record) }))
    }

    /// Notes that the answer to the call in hand is on record, or waits to be written.
    pub(super) fn note_answer(&mut self, is_answer: bool) {
        if let Some(call) = self.call.as_mut().filter(|_| is_answer) {
            call.answered = true;
        }
    }
}

fn keep(call: KeyedCall, vm: VmAnswer) -> Box<KeptAnswer> {
    Box::new(KeptAnswer { call, time_ms: now_ms(), answer: CallAnswer::Done(Box::new(vm)) })
}
