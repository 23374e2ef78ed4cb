//! ShutdownVm: ends the run by the ladder, and records the rung that ended it.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, LadderOptions, SweepPurpose};
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::state::{EndedBy, Observation, Phase, VmOperation, VmState};
use vmm_core::store::IntentKind;
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::operations::EFFECT_LIMIT;
use super::record_update::{ChangeReason, RecordUpdate};
use crate::error::ServiceError;
use crate::mailbox::{OperationOutcome, OperationRequest};

/// The time that a forced ladder may take. The commits and one more question to the guest follow
/// within 5 s.
const FORCED_LADDER_LIMIT: Duration = Duration::from_millis(4300);

impl Actor {
    pub(super) async fn shutdown(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let kind = IntentKind::Shutdown { guest_timeout: operation.guest_timeout, answered: false };
        if let Err(error) = self.intend(budget, kind, self.status(Phase::Stopping), &operation.caller).await {
            return Err(self.end_unrecorded(budget, operation, error).await);
        }
        let ended_by = match self.end_run(budget, operation.guest_timeout).await {
            Ok(ended_by) => ended_by,
            Err(broken) => {
                return Err(self
                    .conclude_failure(budget, VmOperation::Shutdown, &operation.caller, broken)
                    .await);
            }
        };
        point(FaultPoint::ShutdownApplied);
        self.drop_hold_and_claims();
        let mut status = self.status(Phase::Stopped).because(Reason::Shutdown, "shut down as asked");
        status.restarts = 0;
        let why = ChangeReason::asked(VmOperation::Shutdown, &operation.caller).ended_by(Some(ended_by));
        let update = RecordUpdate::new(EventKind::StateChanged, why, status)
            .observing(Observation::VmmGone)
            .ending(Some(ended_by))
            .answering();
        self.conclude(budget, update).await?;
        point(FaultPoint::ShutdownOutcomeCommitted);
        Ok(self.outcome(Some(ended_by)))
    }

    /// Ends the run by the ladder, or by the run folder if no handle is held. Returns after the VMM
    /// has really gone.
    ///
    /// The ladder has the guest's time and [`EFFECT_LIMIT`] in addition. The client gives the
    /// guest's time, which is no limit on the VMM, so a VMM that answers slowly does not shorten
    /// it. The backend climbs the rungs and kills only where it may. If the limit passes here,
    /// nothing is killed, because without force a VMM that has answered nothing is not killed. The
    /// caller then determines the state of the VM and reports it.
    ///
    /// A VMM that has gone before its ladder was climbed counts as ended by the guest, because that
    /// is the result that the client requested.
    pub(super) async fn end_run(
        &mut self,
        budget: Budget,
        guest_timeout: Option<Duration>,
    ) -> Result<EndedBy, EffectError> {
        let Some(vmm) = self.hold.vmm() else {
            let purpose = if budget.forced { SweepPurpose::End } else { SweepPurpose::Clear };
            let run = self.known_run();
            // A sweep that succeeds proves that no process of the VM is left.
            return self.sweep(budget, purpose, run).await.map(|()| EndedBy::Sigkill);
        };
        let resume_first = self.record.state == VmState::Paused && guest_timeout.is_some();
        let limit = guest_timeout.map_or(FORCED_LADDER_LIMIT, |ask| ask + EFFECT_LIMIT);
        let ladder = LadderOptions { guest_timeout };
        let climbing = async move {
            if resume_first && let Err(error) = vmm.resume().await {
                // A guest that stands still cannot obey, so the ladder goes on without it.
                tracing::warn!(%error, "the VM could not be resumed before its shutdown");
            }
            if resume_first {
                point(FaultPoint::LadderResumed);
            }
            vmm.shutdown(ladder).await
        };
        match self.interruptible(budget, limit, climbing).await {
            Err(EffectError::Backend(error)) if error.kind == BackendErrorKind::Gone => Ok(EndedBy::Guest),
            ended => ended,
        }
    }
}
