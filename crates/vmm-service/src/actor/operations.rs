//! The operations: the code for each request of a client.

use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, GuestState, LadderOptions, ResetOutcome, SweepPurpose,
    SweepRequest,
};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::state::{Admission, EndedBy, Observation, Phase, VmOperation, admit};
use vmm_core::store::{Intent, IntentKind, RunRecord};
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::hold::{Hold, NextStep};
use super::record_update::{ChangeReason, RecordUpdate};
use super::start::{ReservedPhase, StartRequest};
use crate::error::ServiceError;
use crate::failure::{Failure, verb};
use crate::mailbox::{OperationOutcome, OperationRequest};

/// The time that a VMM may take for one operation. A shutdown has the guest's time in addition.
pub(super) const EFFECT_LIMIT: Duration = Duration::from_secs(20);
/// The time that a VMM may take to report its guest's state after a forced operation failed.
const FORCED_PROBE_LIMIT: Duration = Duration::from_millis(400);
/// The time that a sweep may take. A start that was pre-empted and the deletion that pre-empted it
/// take one sweep each.
const SWEEP_LIMIT: Duration = Duration::from_secs(2);
/// The time that the sweep of a deletion without force may take. Such a deletion has no 5 s limit.
const DELETION_LIMIT: Duration = Duration::from_secs(10);
/// The time that a VMM may take to report its guest's state, after an operation failed or after a
/// silence.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(3);
/// The time to wait for the last event of a VMM that has gone.
const LAST_EVENT_TIMEOUT: Duration = Duration::from_secs(2);

impl Actor {
    /// Carries out an operation if the VM admits it. The hold on the VM's process is checked first,
    /// and the VM's state second.
    pub(super) async fn carry_out(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let request = operation.request;
        // A forced operation passes the first check, because it is the way to end a VM that cannot
        // be reached.
        if !budget.forced {
            match &self.hold {
                Hold::Quarantined { why, .. } => return Err(self.quarantined(why)),
                hold if hold.is_out_of_reach() => return Err(self.unreachable()),
                _ => {}
            }
        }
        if matches!(request, VmOperation::Delete | VmOperation::ForceDelete) {
            self.check_protection(&operation.caller)?;
        }
        // A VM that counts as not running can still have a process: a start has left it. The state
        // alone would answer that the VM is shut down already, which is false while the process
        // lives.
        if request == VmOperation::Shutdown && !self.record.state.is_live() && self.hold.may_be_a_process() {
            self.end_orphan(budget, operation).await?;
        }
        match admit(self.record.state, request) {
            Admission::AlreadyDone => self.already_done(budget, operation).await,
            Admission::Denied => Err(ServiceError::IllegalState {
                vm_id: self.record.vm_id.clone(),
                state: self.record.state,
                request,
            }),
            Admission::Do => match request {
                VmOperation::Boot => self.boot(budget, &operation.caller).await,
                VmOperation::Pause => {
                    self.move_guest(budget, IntentKind::Pause, Phase::Pausing, &operation.caller).await
                }
                VmOperation::Resume => {
                    self.move_guest(budget, IntentKind::Resume, Phase::Resuming, &operation.caller).await
                }
                VmOperation::Shutdown => self.shutdown(budget, operation).await,
                VmOperation::Reboot => self.reboot(budget, operation).await,
                VmOperation::Update => self.update(budget, operation).await,
                VmOperation::Delete | VmOperation::ForceDelete => self.delete(budget, operation).await,
            },
        }
    }

    /// Ends a process that a start has left, of a VM that counts as not running. The VM is not shut
    /// down while that process lives, whether or not the actor holds a handle of it.
    async fn end_orphan(&mut self, budget: Budget, operation: &OperationRequest) -> Result<(), ServiceError> {
        let killed = match self.hold.vmm() {
            Some(vmm) => self.kill(budget, &*vmm).await.is_ok(),
            None => false,
        };
        let run = self.known_run();
        if !killed && let Err(broken) = self.sweep(budget, SweepPurpose::End, run).await {
            return Err(self.error_of(VmOperation::Shutdown, operation.request, &broken));
        }
        self.drop_hold_and_claims();
        let status = self
            .status(Phase::at_rest(self.record.state))
            .because(Reason::Shutdown, "the process of an earlier start was ended by force");
        let why = ChangeReason::asked(operation.request, &operation.caller);
        Ok(self.conclude(budget, RecordUpdate::new(EventKind::StateChanged, why, status)).await?)
    }

    /// Returns the client's error for a step of an operation that failed.
    pub(super) fn error_of(
        &self,
        step: VmOperation,
        operation: VmOperation,
        broken: &EffectError,
    ) -> ServiceError {
        let vm_id = self.record.vm_id.clone();
        match broken {
            EffectError::Backend(error) => Failure::Backend { step, vm_id, error: error.clone() }.into(),
            EffectError::Preempted(_) => Failure::Preempted { operation, vm_id }.into(),
        }
    }

    fn unreachable(&self) -> ServiceError {
        let (vm_id, message) = (self.record.vm_id.clone(), self.record.status.message.clone());
        Failure::OutOfReach { vm_id, message }.into()
    }

    /// Answers an operation whose result holds already. A ShutdownVm also cancels a restart that is
    /// due, because otherwise the VM would start again after the answer.
    async fn already_done(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let stopped = operation.request == VmOperation::Shutdown;
        let restarts = self.record.pending_work().restart;
        if stopped && (self.next.call_off_restart() || restarts) {
            let status = self.status(Phase::Stopped).because(Reason::Shutdown, "shut down as asked");
            let why = ChangeReason::asked(operation.request, &operation.caller);
            self.conclude(budget, RecordUpdate::new(EventKind::StateChanged, why, status)).await?;
        }
        Ok(self.outcome(stopped.then_some(EndedBy::AlreadyStopped)))
    }

    /// Carries out PauseVm and ResumeVm.
    async fn move_guest(
        &mut self,
        budget: Budget,
        kind: IntentKind,
        phase: Phase,
        caller: &Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        let vmm = self.hold.vmm().ok_or_else(|| self.unreachable())?;
        let request = kind.request();
        self.intend(budget, kind, self.status(phase), caller).await?;
        let effect =
            async move { if request == VmOperation::Pause { vmm.pause().await } else { vmm.resume().await } };
        let achieved =
            if request == VmOperation::Pause { Observation::StandsStill } else { Observation::Runs };
        let result = self.interruptible(budget, EFFECT_LIMIT, effect).await;
        self.settle(budget, StartRequest::new(request, caller), achieved, result).await
    }

    /// Records the outcome of an effect that leaves the VMM in place.
    async fn settle(
        &mut self,
        budget: Budget,
        StartRequest { request, caller, ended_by, after: _ }: StartRequest<'_>,
        achieved: Observation,
        result: Result<(), EffectError>,
    ) -> Result<OperationOutcome, ServiceError> {
        if let Err(broken) = result {
            return Err(self.conclude_failure(budget, request, caller, broken).await);
        }
        point(FaultPoint::applied(request));
        let state = vmm_core::state::observe(self.record.state, achieved);
        let status = self.status(Phase::at_rest(state));
        let why = ChangeReason::asked(request, caller).ended_by(ended_by);
        let update = RecordUpdate::new(EventKind::StateChanged, why, status);
        self.conclude(budget, update.observing(achieved).answering()).await?;
        point(FaultPoint::outcome_committed(request));
        Ok(self.outcome(ended_by))
    }

    /// Carries out RebootVm.
    ///
    /// The files of the second half are looked at and claimed before the first half ends anything,
    /// so that a missing kernel costs no run. Until the run has ended, the VM holds the claims of
    /// the run and the claims of the next one.
    ///
    /// A VMM can reset its guest in place, and then the reboot has no second half. Otherwise the
    /// run ends as by a shutdown, and `start_reserved` starts the next one under the intent of the
    /// reboot.
    async fn reboot(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let OperationRequest { request, guest_timeout, caller, update: _, key: _ } = operation;
        let (guest_timeout, start) = (*guest_timeout, StartRequest::new(*request, caller));
        let vmm = self.hold.vmm().ok_or_else(|| self.unreachable())?;
        let reserved = match self.reserve_next_run(budget).await {
            Ok(reserved) => reserved,
            Err(error) => return Err(self.refused_reboot(budget, start, error).await),
        };
        let kind = IntentKind::Reboot { guest_timeout, claims: reserved.claims.clone() };
        // Nothing has been touched if the intent is refused, so that the run keeps its claims and
        // loses the additional ones.
        if let Err(error) = self.intend(budget, kind, self.status(Phase::Rebooting), caller).await {
            self.claim_for_run_only();
            return Err(error.into());
        }
        let ladder = LadderOptions { guest_timeout };
        let limit = EFFECT_LIMIT + guest_timeout.unwrap_or_default();
        match self.interruptible(budget, limit, async move { vmm.reboot(ladder).await }).await {
            Ok(ResetOutcome::InPlace) => {
                self.claim_for_run_only();
                // The VMM reset the guest by itself. A guest that obeys ends its run instead, and
                // then needs a new start.
                let start = StartRequest { ended_by: Some(EndedBy::Vmm), ..start };
                return self.settle(budget, start, Observation::Runs, Ok(())).await;
            }
            Ok(ResetOutcome::NeedsRelaunch) => {}
            Err(broken) => return Err(self.give_up_reboot(budget, start, broken).await),
        }
        let ended_by = match self.end_run(budget, guest_timeout).await {
            Ok(ended_by) => ended_by,
            Err(broken) => return Err(self.give_up_reboot(budget, start, broken).await),
        };
        let start = StartRequest { ended_by: Some(ended_by), ..start };
        point(FaultPoint::RebootApplied);
        // The claims stay, because no other VM may take the disks and TAPs between the halves.
        self.drop_hold();
        // `take_reserved` drops the claims of the old run alone. Both results keep the intent of
        // the reboot on record until `start_reserved` or `refused_start` ends it.
        let restarted = match self.take_reserved(&reserved) {
            Ok(()) => {
                self.start_reserved(budget, start, reserved).await.map_err(|failed| failed.into_error())
            }
            Err(error) => {
                self.shared.claims.release(self.record.uid);
                Err(self.refused_start(budget, start, error).await)
            }
        };
        restarted.map_err(|error| match error {
            ServiceError::Aborted(_) => error,
            other => {
                let (vm_id, state) = (self.record.vm_id.clone(), self.record.state);
                Failure::NotBootedAgain { vm_id, state, why: Box::new(other) }.into()
            }
        })?;
        Ok(self.outcome(Some(ended_by)))
    }

    /// Claims what the run after a reboot needs, in addition to the claims of the run that lasts.
    async fn reserve_next_run(&mut self, budget: Budget) -> Result<ReservedPhase, ServiceError> {
        let reserved = self.reserve(budget).await?;
        let (uid, vm_id) = (self.record.uid, &self.record.vm_id);
        self.shared
            .claims
            .acquire(uid, vm_id, &reserved.claims)
            .map_err(|why| Failure::CannotReboot { vm_id: vm_id.clone(), why })?;
        Ok(reserved)
    }

    /// Records that a reboot was refused before it touched anything, and returns its error. A
    /// forced operation that pre-empted the reboot records what becomes of the VM by itself.
    async fn refused_reboot(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        error: ServiceError,
    ) -> ServiceError {
        if !matches!(error, ServiceError::Aborted(_)) {
            let phase = Phase::at_rest(self.record.state);
            let status = self.status(phase).because(Reason::OperationFailed, error.to_string());
            let why = ChangeReason::asked(start.request, start.caller);
            let _ = self.conclude(budget, RecordUpdate::new(EventKind::OperationFailed, why, status)).await;
        }
        error
    }

    /// Records that a reboot failed before its run ended, and releases the claims of the second
    /// half.
    async fn give_up_reboot(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        broken: EffectError,
    ) -> ServiceError {
        let error = self.conclude_failure(budget, start.request, start.caller, broken).await;
        self.claim_for_run_only();
        error
    }

    /// Releases the claims of a start that does not take place. The claims of the run that
    /// continues stay.
    fn claim_for_run_only(&self) {
        if let Some(run) = &self.record.run {
            // The VM holds the claims of its run already, so no other VM is in the way.
            let _ = self.shared.claims.exchange(self.record.uid, &self.record.vm_id, &run.claims);
        }
    }

    /// Ends every process that belongs to the run folder, or as much as `purpose` permits for the
    /// VM at its place. `run` is the process as far as it is known.
    pub(super) async fn sweep(
        &mut self,
        budget: Budget,
        purpose: SweepPurpose,
        run: Option<RunRecord>,
    ) -> Result<(), EffectError> {
        // A process in another namespace would outlive a sweep that finds nothing.
        if let Err(why) = self.can_search(run.as_ref()) {
            let error = BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why);
            return Err(EffectError::Backend(error));
        }
        let backend = Arc::clone(&self.backend);
        let request = SweepRequest {
            uid: self.record.uid,
            dir: self.dir(),
            run,
            kind: self.record.kind.clone(),
            spec: Some(self.spec()),
            imported: self.record.imported,
            purpose,
        };
        let sweeping = async move { backend.sweep(request).await };
        match purpose {
            // A deletion without force may take long, so a forced operation can pre-empt it.
            SweepPurpose::Delete => self.interruptible(budget, DELETION_LIMIT, sweeping).await,
            SweepPurpose::Clear | SweepPurpose::End | SweepPurpose::ForceDelete => {
                // These sweeps are part of the cleanup, so a forced operation waits for them. Their
                // limit is short enough for its 5 s.
                let swept = tokio::time::timeout(budget.at_most(SWEEP_LIMIT), sweeping).await;
                let too_late = || {
                    let message = "the VMM did not end in time";
                    Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
                };
                swept.unwrap_or_else(|_| too_late()).map_err(EffectError::Backend)
            }
        }
    }

    /// Determines the state of the VM after an effect failed, records it, and returns the client's
    /// error.
    pub(super) async fn conclude_failure(
        &mut self,
        budget: Budget,
        request: VmOperation,
        caller: &Caller,
        broken: EffectError,
    ) -> ServiceError {
        let what = verb(request);
        let why = ChangeReason::asked(request, caller);
        let error = match broken {
            EffectError::Preempted(forced) => {
                let error = self.error_of(request, request, &broken);
                let message = format!("{} was pre-empted by a forced operation", request.name());
                let status = self.status(Phase::at_rest(self.record.state)).because(Reason::Aborted, message);
                let update = RecordUpdate::new(EventKind::OperationFailed, why, status);
                let _ = self.conclude(forced, update).await;
                return error;
            }
            EffectError::Backend(error) => error,
        };
        // A VMM that has gone leaves one certain state: its run has ended. The event with the
        // reason may still be in the channel.
        if error.kind == BackendErrorKind::Gone {
            self.wait_for_last_event(budget, request, caller).await;
            let (vm_id, state) = (self.record.vm_id.clone(), self.record.state);
            let reason = self.record.status.reason.clone();
            return Failure::EndedMeanwhile { step: request, vm_id, state, reason }.into();
        }
        // In every other case the VMM may live, and only the VMM itself knows whether the effect
        // was applied.
        let seen = self.probe_after_failure(budget, error.effect).await;
        let state = seen
            .observation
            .map_or(self.record.state, |seen| vmm_core::state::observe(self.record.state, seen));
        let status = match seen.unreachable {
            Some(message) => self.status(Phase::Unreachable).because(Reason::VmmDoesNotAnswer, message),
            None if self.hold.is_out_of_reach() => self
                .status(Phase::Unreachable)
                .because(Reason::VmmDoesNotAnswer, format!("could not {what}: {error}")),
            None => self
                .status(Phase::at_rest(state))
                .because(Reason::OperationFailed, format!("could not {what}: {error}")),
        };
        let mut update = RecordUpdate::new(EventKind::OperationFailed, why, status);
        if let Some(observation) = seen.observation {
            update = update.observing(observation);
        }
        let _ = self
            .conclude(
                budget,
                update.intending(self.still_ending(request, caller, error.effect)).ending_call(),
            )
            .await;
        let vm_id = self.record.vm_id.clone();
        Failure::Backend { step: request, vm_id, error }.into()
    }

    /// Returns the intent that stays on record after a request to end the VM which was answered
    /// with a failure. The request has no intent on record if the store refused it, and its VMM was
    /// to be ended by force nevertheless.
    ///
    /// The VMM may still end because of that shutdown, for example while it writes an image back or
    /// frees gigabytes of memory. Its end is then the outcome of the shutdown, and a restart policy
    /// must not undo that, neither under this daemon nor under the next. The next operation ends
    /// the intent, and so does the next sample that the VMM answers.
    fn still_ending(&self, request: VmOperation, caller: &Caller, effect: Effect) -> Option<Intent> {
        if matches!(self.hold, Hold::Orphan(_)) {
            // The intent of the start tells what the orphan may use.
            return self.record.intent.clone();
        }
        let ends = matches!(request, VmOperation::Shutdown | VmOperation::ForceDelete);
        if !ends || effect == Effect::NotApplied || !self.hold.may_be_a_process() {
            return None;
        }
        let answered = |guest_timeout| IntentKind::Shutdown { guest_timeout, answered: true };
        Some(match &self.record.intent {
            Some(Intent { kind: IntentKind::Shutdown { guest_timeout, .. }, caller, since_ms, scope }) => {
                Intent {
                    kind: answered(*guest_timeout),
                    caller: caller.clone(),
                    since_ms: *since_ms,
                    scope: scope.clone(),
                }
            }
            Some(_) | None => self.new_intent(answered(None), caller.clone()),
        })
    }

    /// Asks the VMM for its guest's state after a failure whose effect is not known. The state is
    /// never guessed. A VM that a forced operation tried to end may have been out of reach before,
    /// and still is.
    async fn probe_after_failure(&mut self, budget: Budget, effect: Effect) -> ProbeFinding {
        // The effect was not applied, so that the state on record is still true. A forced operation
        // asks nevertheless, because its VM may have been out of reach before.
        if effect == Effect::NotApplied && !budget.forced {
            return ProbeFinding::default();
        }
        let Some(vmm) = self.hold.vmm() else {
            if self.record.state.is_live() && matches!(self.hold, Hold::Nothing | Hold::Lost) {
                self.take_hold(Hold::Lost);
                self.next = NextStep::search_later();
                return ProbeFinding::unreachable("nothing proves if the VMM has ended".to_owned());
            }
            return ProbeFinding::default();
        };
        let limit = if budget.forced { FORCED_PROBE_LIMIT } else { PROBE_LIMIT };
        let observation = match self.interruptible(budget, limit, async move { vmm.probe().await }).await {
            Ok(GuestState::Running) => Observation::Runs,
            Ok(GuestState::Paused) => Observation::StandsStill,
            // The end of the VMM arrives as an event.
            Ok(GuestState::Ended) | Err(EffectError::Preempted(_)) => return ProbeFinding::default(),
            Err(EffectError::Backend(error)) => {
                self.mark_silent();
                return ProbeFinding::unreachable(error.to_string());
            }
        };
        self.mark_answering();
        ProbeFinding { observation: Some(observation), unreachable: None }
    }

    /// Waits for the event that reports how a VMM ended, and records the end.
    async fn wait_for_last_event(&mut self, budget: Budget, request: VmOperation, caller: &Caller) {
        let gone = match self.hold.live_mut() {
            Some(live) => {
                super::observe::last_event(&mut live.events, budget.at_most(LAST_EVENT_TIMEOUT)).await
            }
            None => super::observe::unknown_exit(),
        };
        self.run_ended(budget, gone, ChangeReason::asked(request, caller)).await;
    }
}

/// The result of a question to the VMM after a failure.
#[derive(Default)]
struct ProbeFinding {
    observation: Option<Observation>,
    /// The reason why the VMM is out of reach, if it is.
    unreachable: Option<String>,
}

impl ProbeFinding {
    fn unreachable(why: String) -> Self {
        Self { observation: None, unreachable: Some(why) }
    }
}
