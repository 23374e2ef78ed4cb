//! What each request does.

use std::time::Duration;

use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, GuestState, Ladder, Reset, Sweep, SweepRequest,
};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::state::{Admission, EndedBy, Observation, Phase, Request, admit, observe};
use vmm_core::store::IntentKind;
use vmm_host::fault::{FaultPoint, point};

use super::persist::Why;
use super::{Actor, Broken, Operation};
use crate::error::ServiceError;
use crate::service::Outcome;

/// No VMM may take longer over one operation; a shutdown has its guest's time on top.
const OPERATION_DEADLINE: Duration = Duration::from_secs(20);
/// A forced operation answers within 5 s, commits and one more look included.
const FORCE_DEADLINE: Duration = Duration::from_millis(4300);
/// How long a VMM that outlived force may take to say how its guest is.
const FORCED_PROBE_DEADLINE: Duration = Duration::from_millis(400);
/// How long a sweep may take. A start that was pre-empted and the deletion that did it take one each.
const SWEEP_DEADLINE: Duration = Duration::from_secs(2);
/// The same of a deletion without force, for which nobody is in a hurry.
const DELETION_DEADLINE: Duration = Duration::from_secs(10);
/// How long a VMM may take to say how its guest is, after something went wrong.
const PROBE_DEADLINE: Duration = Duration::from_secs(3);
/// How long the last word of a VMM that has gone may take.
const LAST_WORD: Duration = Duration::from_secs(2);

impl Actor {
    pub(super) async fn carry_out(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        let request = operation.request;
        self.refuse_untaken()?;
        if self.record.status.phase == Phase::Unreachable && !self.forcing() {
            return Err(self.unreachable());
        }
        if self.stray && request == Request::Shutdown && !self.record.state.is_live() {
            self.end_stray(operation).await?;
        }
        match admit(self.record.state, request) {
            Admission::AlreadyDone => self.already_done(operation).await,
            Admission::Denied => Err(ServiceError::IllegalState {
                vm_id: self.record.vm_id.clone(),
                state: self.record.state,
                request,
            }),
            Admission::Do => match request {
                Request::Boot => self.boot_as_asked(&operation.caller).await,
                Request::Pause => self.pause(&operation.caller).await,
                Request::Resume => self.resume(&operation.caller).await,
                Request::Shutdown => self.shutdown(operation).await,
                Request::Reboot => self.reboot(operation).await,
                Request::Delete | Request::ForceDelete => self.delete(operation).await,
            },
        }
    }

    /// Ends a process that a start has left, of a VM that counts as not running. Only force comes here.
    async fn end_stray(&mut self, operation: &Operation) -> Result<(), ServiceError> {
        if let Err(Broken::Backend(error)) = self.sweep(Sweep::End).await {
            return Err(ServiceError::from_backend("shut down", &self.record.vm_id, &error));
        }
        self.let_go();
        self.record.status = self
            .plain(Phase::at_rest(self.record.state))
            .because("shutdown", "what an earlier start had left was ended by force");
        let why = Why::asked(operation.request, &operation.caller);
        Ok(self.conclude(EventKind::StateChanged, why).await?)
    }

    fn unreachable(&self) -> ServiceError {
        ServiceError::Unavailable(format!(
            "VM \"{}\" is unreachable ({}): its VMM may still run it. Try again, or use force to end it",
            self.record.vm_id, self.record.status.message
        ))
    }

    async fn already_done(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        let stopped = operation.request == Request::Shutdown;
        let waits = self.restart_at.take().is_some() || matches!(self.record.status.phase, Phase::Restarting);
        if stopped && waits {
            self.record.status = self.plain(Phase::Stopped).because("shutdown", "shut down as asked");
            self.conclude(EventKind::StateChanged, Why::asked(operation.request, &operation.caller)).await?;
        }
        Ok(self.outcome(stopped.then_some(EndedBy::AlreadyStopped)))
    }

    async fn pause(&mut self, caller: &Caller) -> Result<Outcome, ServiceError> {
        let vmm = self.vmm().ok_or_else(|| self.unreachable())?;
        self.intend(IntentKind::Pause, Phase::Pausing, caller).await?;
        let result = self.interruptible(OPERATION_DEADLINE, async move { vmm.pause().await }).await;
        self.settle(Request::Pause, caller, Observation::StandsStill, result).await
    }

    async fn resume(&mut self, caller: &Caller) -> Result<Outcome, ServiceError> {
        let vmm = self.vmm().ok_or_else(|| self.unreachable())?;
        self.intend(IntentKind::Resume, Phase::Resuming, caller).await?;
        let result = self.interruptible(OPERATION_DEADLINE, async move { vmm.resume().await }).await;
        self.settle(Request::Resume, caller, Observation::Runs, result).await
    }

    /// Records what came of an effect that leaves the VMM in place.
    async fn settle(
        &mut self,
        request: Request,
        caller: &Caller,
        achieved: Observation,
        result: Result<(), Broken>,
    ) -> Result<Outcome, ServiceError> {
        match result {
            Ok(()) => {
                point(FaultPoint::applied(request));
                self.record.state = observe(self.record.state, achieved);
                self.record.status = self.plain(Phase::at_rest(self.record.state));
                self.conclude(EventKind::StateChanged, Why::asked(request, caller)).await?;
                point(FaultPoint::outcome_committed(request));
                Ok(self.outcome(None))
            }
            Err(broken) => Err(self.give_up(request, caller, broken).await),
        }
    }

    async fn shutdown(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        let kind = IntentKind::Shutdown { ask_guest_for: operation.ask_guest_for, answered: false };
        if let Err(error) = self.intend(kind, Phase::Stopping, &operation.caller).await {
            return Err(self.end_unrecorded(operation, error).await);
        }
        match self.end_run(operation.ask_guest_for).await {
            Ok(ended_by) => {
                point(FaultPoint::ShutdownApplied);
                self.let_go();
                self.record.state = observe(self.record.state, Observation::VmmGone);
                self.record.status = self.plain(Phase::Stopped).because("shutdown", "shut down as asked");
                self.record.status.restarts = 0;
                self.record.ended_by = Some(ended_by);
                let why = Why::asked(Request::Shutdown, &operation.caller).ended_by(Some(ended_by));
                self.conclude(EventKind::StateChanged, why).await?;
                point(FaultPoint::ShutdownOutcomeCommitted);
                Ok(self.outcome(Some(ended_by)))
            }
            Err(broken) => Err(self.give_up(Request::Shutdown, &operation.caller, broken).await),
        }
    }

    async fn reboot(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        let vmm = self.vmm().ok_or_else(|| self.unreachable())?;
        let kind = IntentKind::Reboot { ask_guest_for: operation.ask_guest_for, claims: Vec::new() };
        self.intend(kind, Phase::Rebooting, &operation.caller).await?;
        let ladder = Ladder { ask_guest_for: operation.ask_guest_for };
        let deadline = OPERATION_DEADLINE + operation.ask_guest_for.unwrap_or_default();
        match self.interruptible(deadline, async move { vmm.reboot(ladder).await }).await {
            Ok(Reset::InPlace) => {
                return self.settle(Request::Reboot, &operation.caller, Observation::Runs, Ok(())).await;
            }
            Ok(Reset::NeedsRelaunch) => {}
            Err(broken) => return Err(self.give_up(Request::Reboot, &operation.caller, broken).await),
        }
        let ended_by = match self.end_run(operation.ask_guest_for).await {
            Ok(ended_by) => ended_by,
            Err(broken) => return Err(self.give_up(Request::Reboot, &operation.caller, broken).await),
        };
        point(FaultPoint::RebootApplied);
        // Nobody may take its disks and TAPs between the halves.
        self.forget_run();
        self.record.state = observe(self.record.state, Observation::VmmGone);
        self.record.ended_by = Some(ended_by);
        self.start(Request::Reboot, &operation.caller).await.map_err(|error| match error {
            ServiceError::Aborted(_) => error,
            other => ServiceError::Precondition(format!(
                "VM \"{}\" was shut down but could not be booted again, and is SHUTDOWN now: {other}",
                self.record.vm_id
            )),
        })?;
        Ok(self.outcome(Some(ended_by)))
    }

    /// Ends the run by the ladder, or by the run folder where no handle is held. Answers once the VMM has really gone.
    async fn end_run(&mut self, ask_guest_for: Option<Duration>) -> Result<EndedBy, Broken> {
        let Some(vmm) = self.vmm() else {
            let purpose = if self.forcing() { Sweep::End } else { Sweep::Clear };
            return self.sweep(purpose).await.map(|()| EndedBy::Sigkill);
        };
        let resume_first = self.record.state == vmm_core::state::VmState::Paused && ask_guest_for.is_some();
        let deadline = ask_guest_for.map_or(FORCE_DEADLINE, |ask| ask + OPERATION_DEADLINE);
        let ladder = Ladder { ask_guest_for };
        let ended = self.interruptible(deadline, async move {
            if resume_first && let Err(error) = vmm.resume().await {
                // A guest that stands still cannot obey; the ladder goes on without it.
                tracing::warn!(%error, "could not resume the VM before asking it to shut down");
            }
            if resume_first {
                point(FaultPoint::LadderResumed);
            }
            vmm.shutdown(ladder).await
        });
        match ended.await {
            // It was faster than its ladder, which is what was asked for.
            Err(Broken::Backend(error)) if error.kind == BackendErrorKind::Gone => Ok(EndedBy::Guest),
            ended => ended,
        }
    }

    /// Ends whatever process belongs to the run folder, or what `purpose` allows of the VM at its place.
    pub(super) async fn sweep(&mut self, purpose: Sweep) -> Result<(), Broken> {
        let backend = std::sync::Arc::clone(&self.backend);
        let request = SweepRequest {
            uid: self.record.uid,
            dir: self.dir(),
            run: self.record.run.clone(),
            kind: self.record.kind.clone(),
            spec: Some(self.spec.clone()),
            imported: self.record.imported,
            purpose,
        };
        let sweeping = async move { backend.sweep(request).await };
        let swept = match purpose {
            // This may take long, so force need not wait for it.
            Sweep::Delete => self.interruptible(DELETION_DEADLINE, sweeping).await,
            Sweep::Clear | Sweep::End | Sweep::ForceDelete => {
                let swept = tokio::time::timeout(self.within(SWEEP_DEADLINE), sweeping).await;
                let too_late = || {
                    let message = "its VMM did not end in time";
                    Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
                };
                swept.unwrap_or_else(|_| too_late()).map_err(Broken::Backend)
            }
        };
        self.stray = swept.is_err();
        swept
    }

    /// Finds out where the VM is after an effect did not come off, records it, and answers what the client is told.
    pub(super) async fn give_up(
        &mut self,
        request: Request,
        caller: &Caller,
        broken: Broken,
    ) -> ServiceError {
        let what = match request {
            Request::Boot => "boot",
            Request::Shutdown => "shut down",
            Request::Pause => "pause",
            Request::Resume => "resume",
            Request::Reboot => "reboot",
            Request::Delete | Request::ForceDelete => "delete",
        };
        let error = match broken {
            Broken::Preempted => {
                self.record.status = self
                    .plain(Phase::at_rest(self.record.state))
                    .because("aborted", format!("{} was pre-empted by a forced operation", request.name()));
                let _ = self.conclude(EventKind::OperationFailed, Why::asked(request, caller)).await;
                return ServiceError::Aborted(format!(
                    "{} of VM \"{}\" was pre-empted by a forced operation",
                    request.name(),
                    self.record.vm_id
                ));
            }
            Broken::Backend(error) => error,
        };
        if error.kind == BackendErrorKind::Gone {
            self.hear_last_word(request, caller).await;
            return ServiceError::Precondition(format!(
                "could not {what} VM \"{}\": it ended meanwhile and is {} now ({})",
                self.record.vm_id,
                self.record.state.name(),
                self.record.status.reason
            ));
        }
        self.look_again(error.effect).await;
        if self.record.status.phase != Phase::Unreachable {
            self.record.status = self
                .plain(Phase::at_rest(self.record.state))
                .because("operation-failed", format!("could not {what}: {error}"));
        }
        let _ = self.conclude(EventKind::OperationFailed, Why::asked(request, caller)).await;
        ServiceError::from_backend(what, &self.record.vm_id, &error)
    }

    /// After a failure whose effect is not known, asks the VMM where its guest is. Never guesses. What was to be forced may have
    /// been out of reach before, and still is.
    async fn look_again(&mut self, effect: Effect) {
        if effect == Effect::NotApplied && !self.forcing() {
            return;
        }
        let Some(vmm) = self.vmm() else {
            if self.record.state.is_live() {
                self.record.status = self
                    .plain(Phase::Unreachable)
                    .because("vmm-does-not-answer", "nothing proves what became of its VMM");
                self.look_for_it_later();
            }
            return;
        };
        let deadline = if self.forcing() { FORCED_PROBE_DEADLINE } else { PROBE_DEADLINE };
        let observation = match self.interruptible(deadline, async move { vmm.probe().await }).await {
            Ok(GuestState::Running) => Observation::Runs,
            Ok(GuestState::Paused) => Observation::StandsStill,
            // Its end arrives as an event.
            Ok(GuestState::Ended) | Err(Broken::Preempted) => return,
            Err(Broken::Backend(error)) => {
                self.record.status =
                    self.plain(Phase::Unreachable).because("vmm-does-not-answer", error.to_string());
                return;
            }
        };
        self.record.state = observe(self.record.state, observation);
    }

    /// Waits for the event that tells how a VMM ended, and records the end.
    async fn hear_last_word(&mut self, request: Request, caller: &Caller) {
        let gone = match &mut self.live {
            Some(live) => super::observe::last_word(&mut live.events, LAST_WORD).await,
            None => super::observe::no_word(),
        };
        self.record.intent = None;
        self.run_ended(gone, Why::asked(request, caller)).await;
    }
}
