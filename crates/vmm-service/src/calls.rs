//! The calls that change something, with or without an idempotency key.
//!
//! ```text
//!   without a key ─────────────────────────────────────► carried out ─► answer
//!   with a key ─► waits for a duplicate ─► answer kept? ─► carried out, in a task ─► answer kept
//!                                             └─ yes: shown again
//! ```
//!
//! The answer to a success is committed with the outcome of the operation. The answer to a failure,
//! and to a call that found its result in place, has a commit of its own: nothing was changed that
//! a repetition could change twice.

use std::borrow::Cow;

use tokio::sync::oneshot;
use tracing::Instrument as _;
use vmm_core::caller::Caller;
use vmm_core::idempotency::{
    CallAnswer, FailedCall, FailureCode, KeptAnswer, KeyChange, KeyedCall, VmAnswer,
};
use vmm_core::store::VmRequest;

use crate::clock::now_ms;
use crate::console;
use crate::create::{CreateRequest, Created};
use crate::error::ServiceError;
use crate::failure::Failure;
use crate::keys::{Claimed, IdempotencyKey, KeyClaim, digest};
use crate::mailbox::{AnswerState, OperationOutcome};
use crate::operations::Operation;
use crate::service::VmService;

/// A call that changes something.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// The name of the VM as sent.
    pub vm_id: Cow<'a, str>,
    /// The method, with its other parameters.
    pub kind: CallKind<'a>,
}

/// The methods that change something, with their parameters beside the name of the VM.
#[derive(Clone, Debug)]
pub enum CallKind<'a> {
    /// CreateVm.
    Create(Box<VmRequest>),
    /// An operation on a VM that exists.
    Operate(Operation),
    /// WriteConsole, with the bytes.
    WriteConsole(Cow<'a, [u8]>),
}

impl From<Operation> for CallKind<'_> {
    fn from(operation: Operation) -> Self {
        Self::Operate(operation)
    }
}

/// The answer to a call.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The parts of the VM that the response shows.
    pub answer: VmAnswer,
    /// True if the answer was given before, to the first call with the same key.
    pub replayed: bool,
}

impl<'a> Call<'a> {
    /// Returns the call of `kind` on the VM `vm_id`.
    pub fn new(vm_id: impl Into<Cow<'a, str>>, kind: impl Into<CallKind<'a>>) -> Self {
        Self { vm_id: vm_id.into(), kind: kind.into() }
    }

    const fn method(&self) -> &'static str {
        match &self.kind {
            CallKind::Create(_) => "CreateVm",
            CallKind::Operate(operation) => operation.request().method(),
            CallKind::WriteConsole(_) => "WriteConsole",
        }
    }

    /// Returns the digest of the request. It is made from the decoded request, so that the encoding
    /// does not matter, nor the order of the keys of a map.
    fn digest(&self) -> String {
        // JSON has a form for each value of a request, so the serialisation cannot fail.
        let json = |value: serde_json::Result<Vec<u8>>| value.unwrap_or_default();
        let name = self.vm_id.as_bytes();
        match &self.kind {
            CallKind::Create(requested) => digest(&[name, &json(serde_json::to_vec(requested))]),
            CallKind::Operate(operation) => digest(&[name, &json(serde_json::to_vec(operation))]),
            CallKind::WriteConsole(data) => digest(&[name, data]),
        }
    }

    fn is_forced(&self) -> bool {
        matches!(&self.kind, CallKind::Operate(operation) if operation.is_forced())
    }

    fn into_owned(self) -> Call<'static> {
        let kind = match self.kind {
            CallKind::Create(requested) => CallKind::Create(requested),
            CallKind::Operate(operation) => CallKind::Operate(operation),
            CallKind::WriteConsole(data) => CallKind::WriteConsole(Cow::Owned(data.into_owned())),
        };
        Call { vm_id: Cow::Owned(self.vm_id.into_owned()), kind }
    }
}

impl VmService {
    /// Carries out a call. With a `key` the call is carried out once: a repetition by the same
    /// caller gets the first answer again, and waits for it if the first call is in progress. A call
    /// with a key goes on to its end even if the caller goes away.
    ///
    /// # Errors
    ///
    /// Returns the error of the method. With a key also [`ServiceError::Replayed`], the failure of
    /// the first call; [`ServiceError::KeyReused`] if the key was sent with another request; and
    /// [`ServiceError::Exhausted`] if no room is left for keys.
    pub async fn call(
        &self,
        call: Call<'_>,
        caller: Caller,
        key: Option<IdempotencyKey>,
    ) -> Result<Answered, ServiceError> {
        let Some(key) = key else {
            let (answer, _) = self.carry_out(call, caller, None).await?;
            return Ok(Answered { answer, replayed: false });
        };
        let method = call.method();
        let keyed = KeyedCall { id: key.id(method, &caller), request: call.digest() };
        let claim = loop {
            match self.shared.keys.claim(&keyed) {
                Claimed::First(claim) => break claim,
                // The duplicate looks again when the first call has ended: that one may have failed
                // in a way that is not kept.
                Claimed::Duplicate(mut ended) => drop(ended.changed().await),
                Claimed::OtherRequest => return Err(Failure::KeyReused { method }.into()),
            }
        };
        let found = self.shared.events.kept_answer(&keyed.id).await?;
        if let Some(kept) = found.kept {
            return replay(kept, &keyed, method);
        }
        if !found.has_room {
            return Err(Failure::TooManyKeys.into());
        }
        if self.shared.keys.other_is_interrupted(&keyed, &self.shared.index) {
            return Err(Failure::KeyReused { method }.into());
        }
        self.in_a_task(call.into_owned(), caller, keyed, claim).await
    }

    /// Carries out the first call with a key, in a task that ends with the answer on record.
    async fn in_a_task(
        &self,
        call: Call<'static>,
        caller: Caller,
        keyed: KeyedCall,
        claim: KeyClaim,
    ) -> Result<Answered, ServiceError> {
        let vm_id = call.vm_id.clone().into_owned();
        let (service, counted) = (self.clone(), self.shared.under_way.begin());
        let (reply, answer) = oneshot::channel();
        let calling = async move {
            let _counted = counted;
            let answered = service.call_once(call, caller, &keyed).await;
            // The duplicates find the answer on record, or begin the call again.
            drop(claim);
            let _ = reply.send(answered);
        };
        tokio::spawn(calling.in_current_span());
        // The sender is dropped without an answer only by a panic.
        answer.await.map_err(|_| Failure::EndedAbnormally { vm_id })?
    }

    async fn call_once(
        &self,
        call: Call<'static>,
        caller: Caller,
        keyed: &KeyedCall,
    ) -> Result<Answered, ServiceError> {
        let (method, forced) = (call.method(), call.is_forced());
        let types_input = matches!(call.kind, CallKind::WriteConsole(_));
        if types_input {
            // Input cannot be recorded together with its effect. The answer of an interrupted call
            // is therefore on record before the input is typed, so that it is never typed twice.
            self.keep(keyed, CallAnswer::Failed(interrupted_input()), forced).await?;
        }
        let answer = match self.carry_out(call, caller, Some(keyed)).await {
            Ok((answer, AnswerState::Kept)) => return Ok(Answered { answer, replayed: false }),
            Ok((answer, AnswerState::Replayed(_))) => return Ok(Answered { answer, replayed: true }),
            Ok((answer, AnswerState::Open)) => {
                let kept = CallAnswer::Done(Box::new(answer.clone()));
                self.keep(keyed, kept, forced).await?;
                return Ok(Answered { answer, replayed: false });
            }
            Err(error) => error,
        };
        let Some(failed) = answer.kept() else {
            if types_input {
                let forgotten = KeyChange::Forget(keyed.id.clone());
                self.shared.events.change_answers(forgotten, forced).await?;
            }
            return Err(answer);
        };
        // The operation may have been finished after a panic of its actor, and its answer kept.
        let found = self.shared.events.kept_answer(&keyed.id).await?.kept;
        if let Some(kept) = found.filter(|_| !types_input) {
            return replay(kept, keyed, method);
        }
        self.keep(keyed, CallAnswer::Failed(failed), forced).await?;
        Err(answer)
    }

    async fn keep(&self, call: &KeyedCall, answer: CallAnswer, forced: bool) -> Result<(), ServiceError> {
        let kept = KeptAnswer { call: call.clone(), time_ms: now_ms(), answer };
        Ok(self.shared.events.change_answers(KeyChange::Keep(Box::new(kept)), forced).await?)
    }

    async fn carry_out(
        &self,
        call: Call<'_>,
        caller: Caller,
        key: Option<&KeyedCall>,
    ) -> Result<(VmAnswer, AnswerState), ServiceError> {
        let Call { vm_id, kind } = call;
        match kind {
            CallKind::Create(requested) => {
                let request = CreateRequest { vm_id: vm_id.into_owned(), requested: *requested, caller };
                Ok(of_created(self.create_once(request, key.cloned()).await?))
            }
            CallKind::WriteConsole(data) => {
                let record = console::write(&self.shared, &vm_id, &data).await?;
                Ok((VmAnswer::of(&record), AnswerState::Open))
            }
            CallKind::Operate(operation) => {
                Ok(of_outcome(self.operate(&vm_id, operation, caller, key).await?))
            }
        }
    }
}

/// Returns the answer that is kept, to a repetition of its call.
fn replay(kept: KeptAnswer, call: &KeyedCall, method: &'static str) -> Result<Answered, ServiceError> {
    if kept.call.request != call.request {
        return Err(Failure::KeyReused { method }.into());
    }
    match kept.answer {
        CallAnswer::Done(answer) => Ok(Answered { answer: *answer, replayed: true }),
        CallAnswer::Failed(failed) => Err(ServiceError::Replayed(Box::new(failed))),
    }
}

fn of_created(created: Created) -> (VmAnswer, AnswerState) {
    let Created { record, warnings, answer } = created;
    let warnings = warnings.into_iter().map(Into::into).collect();
    (VmAnswer { warnings, ..VmAnswer::of(&record) }, answer)
}

fn of_outcome(outcome: OperationOutcome) -> (VmAnswer, AnswerState) {
    let OperationOutcome { record, ended_by, left_behind, warnings, answer } = outcome;
    if let AnswerState::Replayed(first) = answer {
        return (VmAnswer::clone(&first), AnswerState::Replayed(first));
    }
    let warnings = warnings.into_iter().map(Into::into).collect();
    (VmAnswer { ended_by, left_behind, warnings, ..VmAnswer::of(&record) }, answer)
}

/// Returns the answer to a WriteConsole that the death of the daemon interrupted.
fn interrupted_input() -> FailedCall {
    FailedCall {
        code: FailureCode::Aborted,
        message: "the daemon ended while it wrote this input, and a part of it may have reached the guest: look at the \
                  console with StreamConsole, and send the rest with another Idempotency-Key"
            .to_owned(),
        violations: Vec::new(),
    }
}
