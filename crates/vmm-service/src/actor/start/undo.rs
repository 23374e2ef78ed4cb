//! The undo of each phase of a start, and the record of its failure.

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, SweepPurpose};
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::state::{Observation, Phase, VmOperation, observe};
use vmm_core::store::IntentKind;

use super::{IntendedPhase, ReservedPhase, StartError, StartRequest, TapsProvidedPhase};
use crate::actor::Actor;
use crate::actor::budget::{Budget, EffectError};
use crate::actor::hold::{Hold, NextStep};
use crate::actor::launch::launched_nothing;
use crate::actor::record_update::{ChangeReason, RecordUpdate};
use crate::actor::recover::leftover_message;
use crate::error::ServiceError;

impl Actor {
    /// Cancels a launch whose intent could not be recorded. The VMM receives no data, and its
    /// process is ended. If the sweep cannot prove that, the process is a leftover: it runs no
    /// guest, so the VM stays within reach, and the next operation ends the process first.
    pub(super) async fn call_off(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        taps: TapsProvidedPhase,
        error: ServiceError,
    ) -> ServiceError {
        let Err(EffectError::Backend(left)) = self.sweep(budget, SweepPurpose::Clear, None).await else {
            self.undo_taps(budget, taps).await;
            return error;
        };
        tracing::error!(error = %left, "the process of a start that could not be recorded could not be ended");
        self.take_hold(Hold::Leftover);
        let status = self.status(Phase::Failed).because(Reason::VmmDoesNotEnd, leftover_message(&left));
        let why = ChangeReason::asked(start.request, start.caller);
        let _ = self.conclude(budget, RecordUpdate::new(EventKind::OperationFailed, why, status)).await;
        error
    }

    /// Undoes TapsProvided, and with it Reserved.
    pub(super) async fn undo_taps(&mut self, budget: Budget, taps: TapsProvidedPhase) {
        for left in self.remove_taps(budget, taps.made).await {
            tracing::warn!(error = %left, "a TAP of a failed start could not be removed; DeleteVm removes it");
        }
        self.shared.claims.release(self.record.uid);
    }

    /// Records the refusal of a start that launched nothing, and returns its error.
    ///
    /// A VM that waits for a start by policy goes on waiting, and says so beside the reason of this
    /// refusal. Two refusals are not recorded here. The restart policy records its own, because the
    /// policy decides what follows. A start that a forced operation pre-empted has touched nothing,
    /// and the forced operation, which has little time, records what becomes of the VM. A reboot is
    /// recorded in each case, because its intent is on record and its VM is down.
    pub(in crate::actor) async fn refused_start(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        error: ServiceError,
    ) -> ServiceError {
        let pre_empted = matches!(error, ServiceError::Aborted(_));
        if start.request == VmOperation::Boot && (start.after.is_some() || pre_empted) {
            return error;
        }
        if self.next.is_restart() {
            let status = self.status(Phase::Restarting).because(Reason::BootFailed, error.to_string());
            let why = ChangeReason::asked(start.request, start.caller);
            let _ = self.conclude(budget, RecordUpdate::new(EventKind::OperationFailed, why, status)).await;
        } else {
            self.record_failed_start(budget, start, &error, false).await;
        }
        error
    }

    /// Records the reason why there is no VMM. `ran` is true if the guest may have run, however
    /// briefly: then the VM is not in the state in which it was created.
    pub(super) async fn record_failed_start(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        error: &ServiceError,
        ran: bool,
    ) {
        let aborted = matches!(error, ServiceError::Aborted(_));
        let began = if ran { observe(self.record.state, Observation::Runs) } else { self.record.state };
        let at_rest = Phase::at_rest(observe(began, Observation::VmmGone));
        let (phase, reason) =
            if aborted { (at_rest, Reason::Aborted) } else { (Phase::Failed, Reason::BootFailed) };
        let status = self.status(phase).because(reason, error.to_string());
        let why = ChangeReason::asked(start.request, start.caller);
        let mut update = RecordUpdate::new(EventKind::OperationFailed, why, status);
        if ran {
            update = update.observing(Observation::Runs);
        }
        let _ = self.conclude(budget, update.observing(Observation::VmmGone)).await;
    }

    pub(super) async fn launch_failed(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        intended: IntendedPhase,
        broken: EffectError,
    ) -> StartError {
        let IntendedPhase { taps, launching } = intended;
        // Nothing more starts after this line. The sweep finds a process that exists already.
        drop(launching);
        let error = self.error_of(VmOperation::Boot, start.request, &broken);
        let wind_up = broken.wind_up(budget);
        let preempted = matches!(broken, EffectError::Preempted(_));
        let never_launched = broken.backend().is_some_and(|error| launched_nothing(&error));
        match self.undo_launch(wind_up, start, taps, error, preempted).await {
            StartError::TakenBack(error) if never_launched => StartError::NotBegun(error),
            other => other,
        }
    }

    /// Takes back a start from Launched or Intended, and records why there is no VMM.
    ///
    /// The order is the reverse of the start. The VMM is ended by its handle if there is one, and
    /// by a sweep of its run folder if that gives no proof. Only a successful kill or sweep proves
    /// that no process is left, and only then may the TAPs be removed and the claims released,
    /// because a living process uses both. If the sweep fails, everything stays claimed, and the VM
    /// is an orphan.
    pub(super) async fn undo_launch(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        taps: TapsProvidedPhase,
        error: ServiceError,
        ran: bool,
    ) -> StartError {
        let killed = match self.hold.vmm() {
            Some(vmm) => self.kill(budget, &*vmm).await,
            None => Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, "no handle is held")),
        };
        if killed.is_err() {
            let run = self.hold.run().cloned();
            if let Err(EffectError::Backend(left)) = self.sweep(budget, SweepPurpose::Clear, run).await {
                return self.leave_orphan(budget, start, taps.reserved, error, &left).await;
            }
        }
        self.drop_hold();
        self.undo_taps(budget, taps).await;
        self.record_failed_start(budget, start, &error, ran).await;
        StartError::TakenBack(error)
    }

    /// Records that the process of a start may live, and keeps the claims of the start.
    ///
    /// The intent stays on record as that of a boot, even if a reboot failed in its second half. It
    /// gives the claims of the process to the next daemon too, and a search that finds the process
    /// continues as after an interrupted boot.
    async fn leave_orphan(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        reserved: ReservedPhase,
        error: ServiceError,
        left: &BackendError,
    ) -> StartError {
        tracing::error!(error = %left, "the process of a failed start could not be ended; the daemon searches for it again");
        let handle = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Vmm(live) | Hold::Silent(live) => Some(live),
            _ => None,
        };
        self.take_hold(Hold::Orphan(handle));
        self.next = NextStep::search_later();
        let kind = IntentKind::Boot { claims: reserved.claims };
        let intent = self.new_intent(kind, start.caller.clone());
        let status = self.status(Phase::Unreachable).because(Reason::VmmDoesNotEnd, left.to_string());
        let why = ChangeReason::asked(start.request, start.caller);
        let update = RecordUpdate::new(EventKind::OperationFailed, why, status)
            .observing(Observation::VmmGone)
            .intending(Some(intent))
            .ending_call();
        let _ = self.conclude(budget, update).await;
        StartError::LeftSomething(error)
    }
}
