//! What a VM does by itself: resets, ends, failures, silence.

use std::time::Duration;

use tokio::sync::mpsc;
use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_core::event::EventKind;
use vmm_core::spec::RestartMode;
use vmm_core::state::{EndedBy, Observation, Phase, observe};

use super::persist::Why;
use super::restart::Decision;
use super::{Actor, Broken};
use crate::clock::now_ms;
use crate::metrics::{Contact, News};

/// How long a VMM that answers again may take to say how its guest is.
const PROBE_DEADLINE: Duration = Duration::from_secs(3);

impl Actor {
    pub(super) async fn on_event(&mut self, event: VmmEvent) {
        if self.interrupted().is_some() && !matches!(event, VmmEvent::Gone(_)) {
            // A VMM that was silent speaks, so that what was cut short can go on.
            return self.reached_again().await;
        }
        match event {
            VmmEvent::GuestReset => self.guest_reset().await,
            VmmEvent::ResetFromOutside => self.reset_from_outside().await,
            VmmEvent::Paused => self.moved(Observation::StandsStill, "paused-from-outside").await,
            VmmEvent::Resumed => self.moved(Observation::Runs, "resumed-from-outside").await,
            VmmEvent::GuestFailed(message) => {
                let exit = Exit { cause: ExitCause::GuestCrash, message };
                self.end_failed_run(exit, "guest-failed").await;
            }
            VmmEvent::Gone(exit) => self.ended_by_itself(exit, "vmm-exited").await,
        }
    }

    /// The state changed without an operation of ours.
    async fn moved(&mut self, observation: Observation, cause: &str) {
        let state = observe(self.record.state, observation);
        if state == self.record.state && self.record.status.phase == Phase::at_rest(state) {
            return;
        }
        self.record.state = state;
        self.record.status = self.plain(Phase::at_rest(state)).because(cause, "");
        let _ = self.conclude(EventKind::StateChanged, Why::by_itself(cause)).await;
    }

    /// The guest reset itself in place, which counts as a restart.
    async fn guest_reset(&mut self) {
        if self.restart_mode() == RestartMode::Never {
            let exit = Exit { cause: ExitCause::GuestReset, message: "the guest reset itself".to_owned() };
            return self.end_failed_run(exit, "guest-reset").await;
        }
        let restarts = self.count_restart();
        self.quiet_since = Some(tokio::time::Instant::now());
        self.record.status.restarts = restarts;
        if restarts > self.spec.restart.max_restarts {
            let exit =
                Exit { cause: ExitCause::GuestReset, message: "the guest reset itself again".to_owned() };
            return self.end_failed_run(exit, "restart-loop").await;
        }
        self.record.state = observe(self.record.state, Observation::ResetInPlace);
        self.record.status = self
            .plain(Phase::at_rest(self.record.state))
            .because("guest-reset", "the guest reset itself and runs again");
        let _ = self.conclude(EventKind::GuestReset, Why::by_itself("guest-reset")).await;
    }

    /// Somebody else reset the guest. That is an operator's act, as RebootVm is: the restart policy is about what a guest does
    /// by itself, and neither forbids nor counts it.
    async fn reset_from_outside(&mut self) {
        self.record.state = observe(self.record.state, Observation::ResetInPlace);
        self.record.status = self
            .plain(Phase::at_rest(self.record.state))
            .because("reset-from-outside", "somebody else reset the guest, at its VMM");
        let _ = self.conclude(EventKind::StateChanged, Why::by_itself("reset-from-outside")).await;
    }

    /// Kills a VMM whose guest is to run no longer, and records the end.
    async fn end_failed_run(&mut self, exit: Exit, cause: &str) {
        if let Some(vmm) = self.vmm()
            && let Err(error) = self.kill(&*vmm).await
        {
            tracing::error!(%error, "a VMM that is to end could not be killed");
            self.record.status =
                self.plain(Phase::Unreachable).because("vmm-does-not-end", error.to_string());
            let _ = self.conclude(EventKind::Unreachable, Why::by_itself(cause)).await;
            return;
        }
        self.ended_by_itself(exit, cause).await;
    }

    /// The VMM has gone between two operations, or while one that was cut short waited for it.
    async fn ended_by_itself(&mut self, exit: Exit, cause: &str) {
        match self.interrupted() {
            Some(intent) => self.ended_unwatched(exit, Some(&intent), None).await,
            None => self.run_ended(exit, Why::by_itself(cause)).await,
        }
    }

    /// The VMM has provably gone: the VM is down, until policy starts it again.
    pub(super) async fn run_ended(&mut self, exit: Exit, why: Why<'_>) {
        let decision = self.decide_restart(&exit);
        self.end_of_run(&exit, decision, why).await;
    }

    /// Records the end of a run and what is to follow it.
    pub(super) async fn end_of_run(&mut self, exit: &Exit, decision: Decision, why: Why<'_>) {
        self.let_go();
        let by_guest = matches!(exit.cause, ExitCause::GuestPowerOff | ExitCause::GuestReset);
        let ended_by = by_guest.then_some(EndedBy::Guest);
        self.record.state = observe(self.record.state, Observation::VmmGone);
        self.record.ended_by = ended_by;
        self.record.status = decision.status;
        self.restart_at = decision.at;
        tracing::info!(
            cause = exit.cause.reason(),
            message = exit.message,
            phase = self.record.status.phase.as_str(),
            "the VM's run ended"
        );
        let _ = self.conclude(EventKind::VmmExited, why.ended_by(ended_by)).await;
    }

    /// Takes news of the contact with the VMM. News that was asked for before the VMM answered an operation is out of date:
    /// the silence of a VMM that was busy with that operation is over.
    pub(super) async fn on_news(&mut self, News { asked, contact }: News) {
        if self.answered.is_some_and(|answered| asked < answered) {
            return;
        }
        let unreachable = self.record.status.phase == Phase::Unreachable;
        match contact {
            Contact::Lost(message) if !unreachable => {
                self.record.status = self.plain(Phase::Unreachable).because("vmm-does-not-answer", message);
                let _ = self.conclude(EventKind::Unreachable, Why::by_itself("vmm-does-not-answer")).await;
            }
            Contact::Lost(_) => {}
            Contact::Made if unreachable => self.reached_again().await,
            Contact::Made => {
                // Fresh knowledge, not a change: shown, not recorded.
                self.record.status.observed_at_ms = now_ms();
                self.publish();
            }
        }
    }

    async fn reached_again(&mut self) {
        let Some(vmm) = self.vmm() else { return };
        let observation = match self.interruptible(PROBE_DEADLINE, async move { vmm.probe().await }).await {
            Ok(GuestState::Running) => Observation::Runs,
            Ok(GuestState::Paused) => Observation::StandsStill,
            Ok(GuestState::Ended) => {
                let exit = Exit { cause: ExitCause::Unknown, message: "its guest had ended".to_owned() };
                return self.end_failed_run(exit, "guest-ended").await;
            }
            Err(Broken::Preempted | Broken::Backend(_)) => return,
        };
        self.record.state = observe(self.record.state, observation);
        if let Some(intent) = self.interrupted() {
            return self.take_up_unfinished(&intent).await;
        }
        self.record.status = self.plain(Phase::at_rest(self.record.state)).because("reachable-again", "");
        let _ = self.conclude(EventKind::Reachable, Why::by_itself("reachable-again")).await;
    }
}

/// Waits for the event that tells how a VMM ended.
pub(super) async fn last_word(events: &mut mpsc::Receiver<VmmEvent>, deadline: Duration) -> Exit {
    let heard = tokio::time::timeout(deadline, async {
        while let Some(event) = events.recv().await {
            if let VmmEvent::Gone(exit) = event {
                return exit;
            }
        }
        no_word()
    });
    heard.await.unwrap_or_else(|_| no_word())
}

/// The end of a VMM of which nothing more is known.
pub(super) fn no_word() -> Exit {
    Exit { cause: ExitCause::Unknown, message: "its VMM has gone without a word".to_owned() }
}
