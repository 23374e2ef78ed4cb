//! Whether, and when, a VM whose run has ended is started again.
//!
//! ```text
//!   run ends ──► does the policy want it? ──no──► stopped / failed
//!                     │ yes
//!                     ▼
//!               restarts left? ──no──► failed: restart-loop
//!                     │ yes
//!                     ▼
//!               restarting (SHUTDOWN) ── 0.2 s · 2ⁿ, at most 30 s ──► boot
//! ```

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::spec::RestartMode;
use vmm_core::state::{Phase, Request, Status};

use super::Actor;
use super::persist::Why;
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
    /// When to start again.
    pub(super) at: Option<Instant>,
}

impl Actor {
    /// The policy in force.
    pub(super) fn restart_mode(&self) -> RestartMode {
        self.spec.restart.mode.unwrap_or(self.backend.capabilities().default_restart_mode)
    }

    /// The number of this restart, counting those without a quiet minute between.
    pub(super) fn count_restart(&self) -> u32 {
        let begun = || self.record.run.as_ref().map(super::begun);
        let quiet = self.quiet_since.or_else(begun).is_some_and(|since| since.elapsed() >= QUIET);
        if quiet { 1 } else { self.record.status.restarts.saturating_add(1) }
    }

    /// Decides what follows `exit`.
    pub(super) fn decide_restart(&self, exit: &Exit) -> Decision {
        let reason = exit.cause.reason();
        let wanted = match exit.cause {
            ExitCause::GuestReset => RestartMode::GuestReboot,
            ExitCause::GuestCrash | ExitCause::VmmFailed | ExitCause::Unknown => RestartMode::OnFailure,
            ExitCause::GuestPowerOff | ExitCause::Requested => RestartMode::Always,
        };
        if self.restart_mode() < wanted {
            let phase = if exit.cause.is_failure() { Phase::Failed } else { Phase::Stopped };
            return Decision { status: self.plain(phase).because(reason, exit.message.as_str()), at: None };
        }
        self.schedule(self.count_restart(), reason, &exit.message)
    }

    fn schedule(&self, restarts: u32, reason: &str, message: &str) -> Decision {
        let allowed = self.spec.restart.max_restarts;
        if restarts > allowed {
            let status = self.plain(Phase::Failed).because(
                "restart-loop",
                format!("it was started again {allowed} times without a quiet minute between; the last end: {message}"),
            );
            return Decision { status, at: None };
        }
        let mut status = self.plain(Phase::Restarting).because(reason, message);
        status.restarts = restarts;
        Decision { status, at: Some(Instant::now() + delay(restarts)) }
    }

    /// Takes up a wait for a restart that a daemon before this one had begun.
    pub(super) fn resume_restart(&mut self) {
        self.restart_at = Some(Instant::now() + delay(self.record.status.restarts));
    }

    /// A restart is due.
    pub(super) async fn restart_by_policy(&mut self) {
        self.restart_at = None;
        let restarts = self.record.status.restarts;
        match self.start(Request::Boot, &Caller::system()).await {
            Ok(()) => tracing::info!(restarts, "started again by its restart policy"),
            Err(ServiceError::Aborted(_)) => {}
            Err(error) if self.restart_mode() >= RestartMode::OnFailure => {
                let decision = self.schedule(restarts.saturating_add(1), "boot-failed", &error.to_string());
                self.record.status = decision.status;
                self.restart_at = decision.at;
                let _ = self.conclude(EventKind::StateChanged, Why::by_itself("restart-policy")).await;
            }
            Err(error) => {
                tracing::warn!(%error, "the restart policy could not start the VM again");
                self.record.status = self.plain(Phase::Failed).because("boot-failed", error.to_string());
                let _ = self.conclude(EventKind::StateChanged, Why::by_itself("restart-policy")).await;
            }
        }
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
