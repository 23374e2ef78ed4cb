//! The observation of a VM: ends, failures, silence, and changes by other programs.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::intent::RecoveryAction;
use vmm_core::reason::Reason;
use vmm_core::state::{EndedBy, Observation, Phase, observe};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::hold::{Hold, VmmMessage};
use super::operations::PROBE_LIMIT;
use super::record_update::{ChangeReason, RecordUpdate};
use super::restart::RestartDecision;
use crate::metrics::{Contact, ContactReport};

/// The time after a failed shutdown in which an answer of the VMM proves nothing, because its end
/// may still be in progress.
const ENDING_GRACE_LIMIT: Duration = Duration::from_secs(5);

impl Actor {
    pub(super) async fn on_message(&mut self, sign: VmmMessage) {
        match sign {
            VmmMessage::Event(event) => self.on_event(event).await,
            VmmMessage::Contact(news) => self.on_contact(news).await,
        }
    }

    async fn on_event(&mut self, event: VmmEvent) {
        if self.interrupted().is_some() && !matches!(event, VmmEvent::Gone(_)) {
            // A VMM that was silent sends an event, so that the interrupted operation can continue.
            return self.reached_again().await;
        }
        match event {
            VmmEvent::GuestReset => self.guest_reset().await,
            VmmEvent::ResetFromOutside => self.reset_from_outside().await,
            VmmEvent::Paused => {
                let told = (Reason::PausedFromOutside, Cause::PausedFromOutside);
                self.record_external_change(Observation::StandsStill, told).await;
            }
            VmmEvent::Resumed => {
                let told = (Reason::ResumedFromOutside, Cause::ResumedFromOutside);
                self.record_external_change(Observation::Runs, told).await;
            }
            VmmEvent::GuestFailed(message) => {
                let exit = Exit { cause: ExitCause::GuestCrash, message };
                self.end_failed_run(exit, Cause::GuestFailed).await;
            }
            VmmEvent::Gone(exit) => self.ended_by_itself(exit, Cause::VmmExited).await,
        }
    }

    /// Records a change of the state that no operation of this daemon caused.
    async fn record_external_change(&mut self, observation: Observation, (reason, cause): (Reason, Cause)) {
        let state = observe(self.record.state, observation);
        if state == self.record.state {
            // The guest is where the record says. Of a VM that was unreachable the event only shows
            // that its VMM answers.
            if !matches!(self.hold, Hold::Vmm(_)) {
                self.reached_again().await;
            }
            return;
        }
        // A VMM that sends an event about its guest answers.
        self.mark_answering();
        let status = self.status(Phase::at_rest(state)).because(reason, "");
        let why = ChangeReason::by_itself(cause);
        let update = RecordUpdate::new(EventKind::StateChanged, why, status).observing(observation);
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }

    /// Records that another program reset the guest. That is the act of an operator, as RebootVm
    /// is. The restart policy is about resets by the guest itself, so it neither forbids nor counts
    /// this one.
    async fn reset_from_outside(&mut self) {
        self.mark_answering();
        let state = observe(self.record.state, Observation::ResetInPlace);
        let status = self
            .status(Phase::at_rest(state))
            .because(Reason::ResetFromOutside, "another program reset the guest, at its VMM");
        let update = RecordUpdate::new(
            EventKind::StateChanged,
            ChangeReason::by_itself(Cause::ResetFromOutside),
            status,
        )
        .observing(Observation::ResetInPlace);
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }

    /// Kills a VMM whose guest must not run any longer, and records the end.
    pub(super) async fn end_failed_run(&mut self, exit: Exit, cause: Cause) {
        let budget = Budget::of_own_step();
        if let Some(vmm) = self.hold.vmm()
            && let Err(error) = self.kill(budget, &*vmm).await
        {
            self.mark_silent();
            let status = self.status(Phase::Unreachable).because(Reason::VmmDoesNotEnd, error.to_string());
            let _ = self
                .conclude(
                    budget,
                    RecordUpdate::new(EventKind::Unreachable, ChangeReason::by_itself(cause), status),
                )
                .await;
            return;
        }
        self.ended_by_itself(exit, cause).await;
    }

    /// Records that the VMM has gone between two operations, or while an interrupted operation
    /// waited for it.
    async fn ended_by_itself(&mut self, exit: Exit, cause: Cause) {
        let intent = self.record.intent.clone();
        // An intent on record, or an orphan, means that the end belongs to an interrupted operation
        // or start. The end is then handled as one that a new daemon finds.
        if intent.is_some() || matches!(self.hold, Hold::Orphan(_)) {
            return self.ended_unwatched(exit, intent.as_ref(), cause).await;
        }
        self.run_ended(Budget::of_own_step(), exit, ChangeReason::by_itself(cause)).await;
    }

    /// Records that the VMM has provably gone. The VM is down until the policy starts it again.
    pub(super) async fn run_ended(&mut self, budget: Budget, exit: Exit, why: ChangeReason<'_>) {
        let decision = self.decide_restart(&exit);
        self.end_of_run(budget, &exit, decision, why).await;
    }

    /// Records the end of a run and the next step.
    pub(super) async fn end_of_run(
        &mut self,
        budget: Budget,
        exit: &Exit,
        decision: RestartDecision,
        why: ChangeReason<'_>,
    ) {
        self.drop_hold_and_claims();
        self.next = decision.next;
        let by_guest = matches!(exit.cause, ExitCause::GuestPowerOff | ExitCause::GuestReset);
        let ended_by = by_guest.then_some(EndedBy::Guest);
        let update = RecordUpdate::new(EventKind::VmmExited, why.ended_by(ended_by), decision.status)
            .observing(Observation::VmmGone)
            .ending(ended_by)
            .ending_call();
        let _ = self.conclude(budget, update).await;
    }

    /// Processes news of the contact with the VMM. News that was requested before the VMM last
    /// answered an operation is out of date, because the VMM was busy with that operation and is
    /// not silent any more.
    async fn on_contact(&mut self, ContactReport { asked, contact, sockets_gone }: ContactReport) {
        if self.answered.is_some_and(|answered| asked < answered) {
            return;
        }
        // A silent VMM changes only the hold and the status. It is never killed for its silence,
        // because its guest may still run. A first answer after silence leads to a new probe,
        // because the guest may have changed its state meanwhile.
        match (contact, &self.hold) {
            (Contact::Lost(message), Hold::Vmm(_)) => {
                self.mark_silent();
                let (reason, cause, message) = match sockets_gone {
                    Some(gone) => (Reason::SocketsGone, Cause::SocketsGone, gone),
                    None => (Reason::VmmDoesNotAnswer, Cause::VmmDoesNotAnswer, message),
                };
                let status = self.status(Phase::Unreachable).because(reason, message);
                let why = ChangeReason::by_itself(cause);
                let update = RecordUpdate::new(EventKind::Unreachable, why, status)
                    .intending(self.record.intent.clone());
                let _ = self.conclude(Budget::of_own_step(), update).await;
            }
            (Contact::Made, Hold::Vmm(_)) => self.seen_alive(asked, sockets_gone).await,
            (Contact::Made, _) => self.reached_again().await,
            (Contact::Lost(_), _) => {}
        }
    }

    /// Records or shows that a VMM answers. A VMM that answers some time after a failed ShutdownVm
    /// has outlived it, so that its later end is no outcome of that shutdown any more, and the
    /// intent is removed. In all other cases the answer is newer knowledge and no change, so it is
    /// shown and not recorded.
    async fn seen_alive(&mut self, asked: Instant, sockets_gone: Option<String>) {
        // The status must tell of sockets that are gone exactly while they are, so that the status
        // is compared with the fact.
        let is_reported = self.record.status.reason == Reason::SocketsGone;
        if sockets_gone.is_some() != is_reported && self.record.intent.is_none() {
            return self.sockets_changed(sockets_gone).await;
        }
        let settled = self.answered.is_none_or(|answered| asked >= answered + ENDING_GRACE_LIMIT);
        let answered = |intent: &vmm_core::store::Intent| {
            settled && intent.recovery() == RecoveryAction::ShutdownAnswered
        };
        let status =
            vmm_core::state::Status { observed_at_ms: crate::clock::now_ms(), ..self.record.status.clone() };
        let update =
            RecordUpdate::new(EventKind::Reachable, ChangeReason::by_itself(Cause::ReachableAgain), status);
        if self.record.intent.as_ref().is_some_and(answered) {
            let _ = self.conclude(Budget::of_own_step(), update).await;
        } else {
            self.show(update.intending(self.record.intent.clone()));
        }
    }

    /// Records that the control socket of a VMM that answers is gone, or is there again.
    async fn sockets_changed(&mut self, gone: Option<String>) {
        let status = self.status(Phase::at_rest(self.record.state));
        let (status, cause) = match gone {
            Some(message) => (status.because(Reason::SocketsGone, message), Cause::SocketsGone),
            None => (status, Cause::SocketsBack),
        };
        let update = RecordUpdate::new(EventKind::StateChanged, ChangeReason::by_itself(cause), status);
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }

    async fn reached_again(&mut self) {
        let Some(vmm) = self.hold.vmm() else { return };
        let budget = Budget::of_own_step();
        let probing = self.interruptible(budget, PROBE_LIMIT, async move { vmm.probe().await }).await;
        let observation = match probing {
            Ok(GuestState::Running) => Observation::Runs,
            Ok(GuestState::Paused) => Observation::StandsStill,
            Ok(GuestState::Ended) => {
                let exit = Exit { cause: ExitCause::Unknown, message: "the guest had ended".to_owned() };
                return self.end_failed_run(exit, Cause::GuestEnded).await;
            }
            Err(EffectError::Preempted(_) | EffectError::Backend(_)) => return,
        };
        self.mark_answering();
        if let Some(intent) = self.interrupted() {
            return self.take_up_unfinished(&intent, observation).await;
        }
        let state = observe(self.record.state, observation);
        let status = self.status(Phase::at_rest(state)).because(Reason::ReachableAgain, "");
        let why = ChangeReason::by_itself(Cause::ReachableAgain);
        let update = RecordUpdate::new(EventKind::Reachable, why, status).observing(observation);
        let _ = self.conclude(budget, update).await;
    }
}

/// Waits for the event that reports how a VMM ended.
pub(super) async fn last_event(events: &mut mpsc::Receiver<VmmEvent>, deadline: Duration) -> Exit {
    let heard = tokio::time::timeout(deadline, async {
        while let Some(event) = events.recv().await {
            if let VmmEvent::Gone(exit) = event {
                return exit;
            }
        }
        unknown_exit()
    });
    heard.await.unwrap_or_else(|_| unknown_exit())
}

/// Returns the end of a VMM about which nothing more is known.
pub(super) fn unknown_exit() -> Exit {
    Exit { cause: ExitCause::Unknown, message: "the VMM has gone and reported no cause".to_owned() }
}
