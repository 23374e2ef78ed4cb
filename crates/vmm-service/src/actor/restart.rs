//! Whether, and when, a VM whose run has ended is started again.
//!
//! ```text
//!   run ends ──► does the policy want it? ──no──► stopped / failed
//!                     │ yes
//!                     ▼
//!               restarts left? ──no──► failed: restart-loop
//!                     │ yes
//!                     ▼
//!               restarting (SHUTDOWN) ── 0.2 s · 2ⁿ, at most 30 s ──► start ──┬─ taken back ────► counts, as the end of a run
//!                     ▲                                                      ├─ left something ► unreachable, looked for
//!                     └────────────────────── 30 s, not counted ─────────────┴─ not begun
//! ```

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::RestartMode;
use vmm_core::state::{Phase, Request, Status};

use super::Actor;
use super::budget::Budget;
use super::hold::{Next, begun};
use super::journal::{Turn, Why};
use super::start::{NotStarted, Start};
use crate::error::ServiceError;

/// After so long without a restart, the count begins anew.
pub(super) const QUIET: Duration = Duration::from_secs(60);
/// The wait before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// The longest wait.
const MAX_DELAY: Duration = Duration::from_secs(30);

/// What follows the end of a run.
pub(super) struct Decision {
    /// What the record says.
    pub(super) status: Status,
    /// The next step.
    pub(super) next: Next,
}

impl Actor {
    /// The policy in force.
    pub(super) fn restart_mode(&self) -> RestartMode {
        self.spec().restart.mode.unwrap_or(self.backend.capabilities().default_restart_mode)
    }

    /// Returns the number of this restart, counting those without a quiet minute between.
    pub(super) fn count_restart(&mut self) -> u32 {
        let begun = || self.record.run.as_ref().map(begun);
        let quiet = self.hold.quiet_since().or_else(begun).is_some_and(|since| since.elapsed() >= QUIET);
        if quiet { 1 } else { self.restarts_so_far().saturating_add(1) }
    }

    /// Lets the count of restarts go on from `restarts`.
    pub(super) fn count_from(&mut self, restarts: u32) {
        if self.record.status.restarts != restarts {
            std::sync::Arc::make_mut(&mut self.record).status.restarts = restarts;
        }
    }

    /// Decides what follows `exit`.
    pub(super) fn decide_restart(&mut self, exit: &Exit) -> Decision {
        let reason = exit.cause.reason();
        let wanted = match exit.cause {
            ExitCause::GuestReset => RestartMode::GuestReboot,
            ExitCause::GuestCrash | ExitCause::VmmFailed | ExitCause::Unknown => RestartMode::OnFailure,
            ExitCause::GuestPowerOff | ExitCause::Requested => RestartMode::Always,
        };
        if self.restart_mode() < wanted {
            let phase = if exit.cause.is_failure() { Phase::Failed } else { Phase::Stopped };
            let mut status = self.status(phase).because(reason, exit.message.as_str());
            status.restarts = self.restarts_so_far();
            return Decision { status, next: Next::Idle };
        }
        let restarts = self.count_restart();
        self.schedule(restarts, reason, &exit.message)
    }

    fn schedule(&self, restarts: u32, reason: Reason, message: &str) -> Decision {
        let allowed = self.allowed_restarts();
        if restarts > allowed {
            let mut status = self.status(Phase::Failed).because(
                Reason::RestartLoop,
                format!("it was started again {allowed} times without a quiet minute between; the last end: {message}"),
            );
            status.restarts = restarts.saturating_sub(1);
            return Decision { status, next: Next::Idle };
        }
        let mut status = self.status(Phase::Restarting).because(reason, message);
        status.restarts = restarts;
        Decision { status, next: Next::RestartAt(Instant::now() + delay(restarts)) }
    }

    /// Takes up a wait for a restart that a daemon before this one had begun.
    pub(super) fn resume_restart(&mut self) {
        self.next = Next::RestartAt(Instant::now() + delay(self.record.status.restarts));
    }

    /// A restart is due. What the start has left decides what follows, because a text could not.
    pub(super) async fn restart_by_policy(&mut self) {
        self.next = Next::Idle;
        let budget = Budget::of_own_step();
        let restarts = self.record.status.restarts;
        let caller = Caller::system();
        let start = Start::new(Request::Boot, &caller);
        match self.start(budget, start).await {
            Ok(()) => tracing::info!(restarts, "started again by its restart policy"),
            // Force has come, and decides what becomes of the VM.
            Err(NotStarted::TakenBack(ServiceError::Aborted(_))) => {}
            Err(NotStarted::NotBegun(error)) if self.waits_to_begin() => {
                self.restart_later(budget, restarts, &error).await;
            }
            // A process may live: the VM is shown as unreachable, and nothing is started beside that process.
            Err(NotStarted::LeftSomething(error)) => {
                tracing::warn!(%error, "a start by the restart policy has left a process");
            }
            Err(NotStarted::TakenBack(error) | NotStarted::NotBegun(error)) => {
                self.restart_failed(budget, restarts, &error).await;
            }
        }
    }

    /// Says whether a start that was not begun is waited for: a reset of the guest is answered by one start, which its guest
    /// has asked for, while the other modes keep the VM running.
    fn waits_to_begin(&self) -> bool {
        self.restart_mode() >= RestartMode::OnFailure || self.record.status.phase == Phase::Restarting
    }

    /// A start that launched nothing is no restart: what it lacked may be there in a while, however often it was not.
    async fn restart_later(&mut self, budget: Budget, restarts: u32, error: &ServiceError) {
        let message = error.to_string();
        let mut status = self.status(Phase::Restarting).because(Reason::StartNotBegun, message);
        status.restarts = restarts;
        self.next = Next::RestartAt(Instant::now() + MAX_DELAY);
        let turn = Turn::new(EventKind::StateChanged, Why::by_itself("restart-policy"), status);
        let shown = &self.record.status;
        if shown.phase == Phase::Restarting && shown.reason == Reason::StartNotBegun {
            // Tried again and found as before: shown, not recorded.
            self.show(turn);
        } else {
            let _ = self.conclude(budget, turn).await;
        }
    }

    async fn restart_failed(&mut self, budget: Budget, restarts: u32, error: &ServiceError) {
        tracing::warn!(%error, "the restart policy could not start the VM again");
        let message = error.to_string();
        let decision = if self.restart_mode() >= RestartMode::OnFailure {
            self.schedule(restarts.saturating_add(1), Reason::BootFailed, &message)
        } else {
            let status = self.status(Phase::Failed).because(Reason::BootFailed, message);
            Decision { status, next: Next::Idle }
        };
        self.next = decision.next;
        let turn = Turn::new(EventKind::StateChanged, Why::by_itself("restart-policy"), decision.status);
        let _ = self.conclude(budget, turn).await;
    }
}

fn delay(restarts: u32) -> Duration {
    let doublings = restarts.saturating_sub(1).min(16);
    (FIRST_DELAY * 2_u32.pow(doublings)).min(MAX_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap() {
        assert_eq!(delay(1), Duration::from_millis(200));
        assert_eq!(delay(2), Duration::from_millis(400));
        assert_eq!(delay(8), Duration::from_millis(25_600));
        assert_eq!(delay(9), MAX_DELAY);
        assert_eq!(delay(u32::MAX), MAX_DELAY);
    }
}
