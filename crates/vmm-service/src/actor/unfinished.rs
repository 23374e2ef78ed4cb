//! Operations that the death of a daemon cut short and that the next one carries to their end.
//!
//! ```text
//!   ShutdownVm, RebootVm ── its VMM lives ──► carried out once more, with the time that the guest was given
//!                        ── its VMM is silent ──► by force: carried out once more; else: when the VMM answers again
//!   RebootVm ── the old VMM has gone ──┬─ a new one runs ──► it stands
//!                                      └─ none does ───────► SHUTDOWN, restarting: booted as soon as VMs are served
//!   a start by policy that did not come about ─────────────► restarting, as before
//! ```
//!
//! What was admitted is carried out, whoever goes away meanwhile: a guest that was asked to power off does so in the end, and
//! what follows must be what the client wanted, not what the restart policy makes of it. The other operations need nothing:
//! a BootVm that did not come about leaves the VM where it was, and a PauseVm has stopped the guest or has not.

use tokio::time::Instant;
use vmm_core::event::EventKind;
use vmm_core::intent::Recovery;
use vmm_core::reason::Reason;
use vmm_core::state::{Observation, Phase, Request};
use vmm_core::store::Intent;

use super::Actor;
use super::budget::Budget;
use super::hold::Next;
use super::journal::{Turn, Why};
use crate::mailbox::Operation;

impl Actor {
    /// The operation that was cut short and waits for its VMM to be found, if one does. Its intent stays on record until then.
    pub(super) fn interrupted(&self) -> Option<Intent> {
        self.record.intent.clone().filter(|intent| intent.recovery().waits_for_vmm())
    }

    /// Has a shutdown by force that was cut short carried out once more, for which no VMM need answer.
    pub(super) fn take_up_force(&mut self) {
        let operation = self.record.intent.as_ref().and_then(operation);
        if let Some(operation) = operation.filter(is_forced) {
            self.next = Next::Finish(Box::new(operation));
        }
    }

    /// Records that the VM is held again, where its guest is, and what is still to be done. The intent stays on record until
    /// then.
    pub(super) async fn take_up_unfinished(&mut self, intent: &Intent, observation: Observation) {
        let phase = if intent.request() == Request::Reboot { Phase::Rebooting } else { Phase::Stopping };
        let method = intent.request().name();
        let status = self.status(phase).because(
            Reason::OperationInterrupted,
            format!("the daemon ended during {method}, which is carried on now"),
        );
        if let Some(operation) = operation(intent) {
            self.next = Next::Finish(Box::new(operation));
        }
        tracing::info!(operation = method, "found the VM's VMM, and carry on with what was under way");
        let turn = Turn::new(EventKind::Adopted, Why::by_itself("daemon-started"), status)
            .observing(observation)
            .intending(Some(intent.clone()));
        let _ = self.conclude(Budget::of_own_step(), turn).await;
    }

    /// Carries an operation to its end for a client who has gone, by force as it was forced when it was cut short.
    pub(super) async fn finish(&mut self, operation: Operation) {
        let method = operation.request.name();
        let budget = if is_forced(&operation) {
            Budget::of_force(Instant::now())
        } else {
            Budget::of_operation(operation.ask_guest_for)
        };
        let error = match self.carry_out(budget, &operation).await {
            Ok(_) => return tracing::info!(operation = method, "an operation that was cut short is done"),
            Err(error) => error,
        };
        tracing::warn!(operation = method, %error, "an operation that was cut short failed");
        if self.interrupted().is_some() {
            // Refused before it began, as of a VM that stands still by now: it is not tried for ever.
            let status = self
                .status(Phase::at_rest(self.record.state))
                .because(Reason::OperationFailed, format!("{method} could not be carried on: {error}"));
            let why = Why::asked(operation.request, &operation.caller);
            let _ = self.conclude(budget, Turn::new(EventKind::OperationFailed, why, status)).await;
        }
    }

    /// Says whether a reboot was under way whose old VMM, on record as running, has gone. From then on a new one is looked for.
    pub(super) fn first_half_is_done(&mut self, intent: Option<&Intent>) -> bool {
        let rebooting = intent.is_some_and(|intent| intent.request() == Request::Reboot);
        if !rebooting || self.record.run.is_none() {
            return false;
        }
        self.let_go_keeping_claims();
        self.forget_run_and_state();
        true
    }

    /// Has a start that was cut short made once more, where more than a waiting client relies on it. Says whether it has.
    pub(super) async fn starts_after_all(&mut self, intent: Option<&Intent>) -> bool {
        let Some(intent) = intent else { return false };
        let reason = match intent.recovery() {
            Recovery::Reboot { .. } => Reason::RebootInterrupted,
            Recovery::Start { again: true } => Reason::BootInterrupted,
            Recovery::Start { again: false }
            | Recovery::AsFound
            | Recovery::Shutdown { .. }
            | Recovery::ShutdownAnswered
            | Recovery::Delete { .. } => return false,
        };
        self.let_go_and_release();
        let status = self
            .status(Phase::Restarting)
            .because(reason, "the daemon ended while the VM was being started again, which is done now");
        self.next = Next::RestartAt(Instant::now());
        let turn = Turn::new(EventKind::StateChanged, Why::by_itself("daemon-started"), status)
            .observing(Observation::VmmGone);
        // What cannot be recorded is logged, and done all the same.
        let _ = self.conclude(Budget::of_own_step(), turn).await;
        true
    }
}

/// Says whether an operation needs no answer of a VMM.
fn is_forced(operation: &Operation) -> bool {
    operation.request == Request::Shutdown && operation.ask_guest_for.is_none()
}

/// Returns the operation that is carried on, where one is.
fn operation(intent: &Intent) -> Option<Operation> {
    let caller = intent.caller.clone();
    match intent.recovery() {
        Recovery::Shutdown { ask_guest_for } => {
            Some(Operation { request: Request::Shutdown, ask_guest_for, caller })
        }
        Recovery::Reboot { ask_guest_for } => {
            Some(Operation { request: Request::Reboot, ask_guest_for, caller })
        }
        Recovery::AsFound | Recovery::Start { .. } | Recovery::ShutdownAnswered | Recovery::Delete { .. } => {
            None
        }
    }
}
