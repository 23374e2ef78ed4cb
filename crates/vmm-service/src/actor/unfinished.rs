//! The operations that the death of a daemon interrupted and that the next daemon finishes.
//!
//! ```text
//!   ShutdownVm, RebootVm ─ its VMM lives ───► carried out again, with the time of its guest
//!                        ─ its VMM is silent ► by force: at once; else: when the VMM answers
//!   RebootVm ── the old VMM has gone ──┬─ a new one runs ──► it stands
//!                                      └─ none does ───────► SHUTDOWN, restarting: booted soon
//!   a start by policy that did not come about ─────────────► restarting, as before
//! ```
//!
//! An admitted operation is carried out even if the daemon or the client goes away. A guest that
//! was asked to power off does so in the end, and the result must be that of the client's request
//! and not that of the restart policy. The other operations need nothing: a BootVm that was
//! interrupted leaves the VM as it was, and a PauseVm has stopped the guest or has not.

use tokio::time::Instant;
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::intent::RecoveryAction;
use vmm_core::reason::Reason;
use vmm_core::state::{Observation, Phase, VmOperation};
use vmm_core::store::{Intent, IntentKind, VmRecord};

use super::Actor;
use super::budget::Budget;
use super::hold::{Hold, NextStep};
use super::record_update::{ChangeReason, RecordUpdate};
use super::restart::LastEnd;
use crate::mailbox::OperationRequest;
use crate::operation_log::Ending;

impl Actor {
    /// Returns the interrupted operation that waits for its VMM to be found, if there is one. Its
    /// intent stays on record until then.
    pub(super) fn interrupted(&self) -> Option<Intent> {
        self.record.intent.clone().filter(|intent| intent.recovery().waits_for_vmm())
    }

    /// Returns the intent of a start whose process may live, for a record in which another intent
    /// has replaced it.
    pub(super) fn orphan_intent(&self, caller: &Caller) -> Option<Intent> {
        let claims = self.shared.claims.held_by(self.record.uid);
        Some(self.new_intent(IntentKind::Boot { claims }, caller.clone()))
    }

    /// Schedules an interrupted shutdown by force again. No VMM has to answer for it.
    pub(super) fn take_up_force(&mut self) {
        let operation = self.record.intent.as_ref().and_then(|intent| operation(intent, &self.record));
        if let Some(operation) = operation.filter(is_forced) {
            self.next = NextStep::Finish(Box::new(operation));
        }
    }

    /// Records that the VM is held again, the state of its guest, and the operation that is still
    /// to be done. The intent stays on record until that operation is done.
    pub(super) async fn take_up_unfinished(&mut self, intent: &Intent, observation: Observation) {
        let phase = if intent.request() == VmOperation::Reboot { Phase::Rebooting } else { Phase::Stopping };
        let method = intent.request().name();
        let status = self
            .status(phase)
            .because(Reason::OperationInterrupted, format!("{method} was interrupted and continues now"));
        if let Some(operation) = operation(intent, &self.record) {
            self.next = NextStep::Finish(Box::new(operation));
        }
        let why = self.found_by_search(Cause::ReachableAgain);
        let update = RecordUpdate::new(EventKind::Adopted, why, status)
            .observing(observation)
            .intending(Some(intent.clone()));
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }

    /// Finishes an operation whose client has gone. The operation is forced if it was forced when
    /// it was interrupted.
    pub(super) async fn finish(&mut self, operation: OperationRequest) {
        let method = operation.request.name();
        let budget = if is_forced(&operation) {
            Budget::of_force(Instant::now())
        } else {
            Budget::of_operation(operation.guest_timeout)
        };
        let asked = Instant::now();
        self.take_call(&operation);
        let result = self.carry_out(budget, &operation).await;
        let result = self.release_call(result);
        let record = self.record.share();
        let ending = Ending {
            operation: operation.request.method(),
            force: operation.has_force(),
            actor: &operation.caller,
            record: &record,
            asked,
        };
        let error = match result {
            Ok(outcome) => return ending.done(&outcome),
            Err(error) => error,
        };
        ending.failed(&error);
        if self.interrupted().is_some() {
            // The operation was refused before it began, for example because the guest is paused
            // now. The intent ends here, because otherwise the operation would be tried for ever.
            let status = self
                .status(Phase::at_rest(self.record.state))
                .because(Reason::OperationFailed, format!("{method} could not be continued: {error}"));
            let why = ChangeReason::asked(operation.request, &operation.caller);
            let _ = self.conclude(budget, RecordUpdate::new(EventKind::OperationFailed, why, status)).await;
        }
    }

    /// Returns true if a reboot was in progress and its old VMM, on record as running, has gone.
    /// The second half may have left a process then, and the next search is for that process.
    pub(super) fn first_half_is_done(&mut self, intent: Option<&Intent>) -> bool {
        let rebooting = intent.is_some_and(|intent| intent.request() == VmOperation::Reboot);
        if !rebooting || self.run_on_record().is_none() {
            return false;
        }
        self.take_hold(Hold::Orphan(None));
        true
    }

    /// Schedules an interrupted start again if more than a waiting client depends on it. Returns
    /// true if the start is scheduled.
    pub(super) async fn starts_after_all(&mut self, intent: Option<&Intent>, why: ChangeReason<'_>) -> bool {
        let Some(intent) = intent else { return false };
        let reason = match intent.recovery() {
            RecoveryAction::Reboot { .. } => Reason::RebootInterrupted,
            RecoveryAction::Start { again: true } => Reason::BootInterrupted,
            RecoveryAction::Start { again: false }
            | RecoveryAction::AsFound
            | RecoveryAction::Shutdown { .. }
            | RecoveryAction::ShutdownAnswered
            | RecoveryAction::Delete { .. } => return false,
        };
        self.drop_hold_and_claims();
        let status = self
            .status(Phase::Restarting)
            .because(reason, "a start of the VM was interrupted and is repeated now");
        self.next = NextStep::RestartAt(Instant::now(), Box::new(LastEnd::on_record(&status)));
        let update = RecordUpdate::new(EventKind::StateChanged, why, status).observing(Observation::VmmGone);
        // A refused commit is logged, and the start takes place nevertheless.
        let _ = self.conclude(Budget::of_own_step(), update).await;
        true
    }
}

/// Returns true if an operation needs no answer of a VMM.
fn is_forced(operation: &OperationRequest) -> bool {
    operation.request == VmOperation::Shutdown && operation.guest_timeout.is_none()
}

/// Returns the operation that is carried on, if there is one, with the keyed call of `record`.
fn operation(intent: &Intent, record: &VmRecord) -> Option<OperationRequest> {
    let (caller, key) = (intent.caller.clone(), record.keyed.clone());
    match intent.recovery() {
        RecoveryAction::Shutdown { guest_timeout } => Some(OperationRequest {
            request: VmOperation::Shutdown,
            guest_timeout,
            caller,
            update: None,
            key,
        }),
        RecoveryAction::Reboot { guest_timeout } => {
            Some(OperationRequest { request: VmOperation::Reboot, guest_timeout, caller, update: None, key })
        }
        RecoveryAction::AsFound
        | RecoveryAction::Start { .. }
        | RecoveryAction::ShutdownAnswered
        | RecoveryAction::Delete { .. } => None,
    }
}

/// Returns true if the guest of a VMM that was found shows that the interrupted operation of
/// `intent` has succeeded.
pub(super) fn is_achieved(intent: Option<&Intent>, seen: Observation) -> bool {
    match intent.map(Intent::recovery) {
        Some(RecoveryAction::Start { .. } | RecoveryAction::Reboot { .. }) => seen == Observation::Runs,
        Some(RecoveryAction::AsFound) => {
            let wanted = intent.is_some_and(|intent| intent.request() == VmOperation::Pause);
            seen == if wanted { Observation::StandsStill } else { Observation::Runs }
        }
        Some(
            RecoveryAction::Shutdown { .. }
            | RecoveryAction::ShutdownAnswered
            | RecoveryAction::Delete { .. },
        )
        | None => false,
    }
}
