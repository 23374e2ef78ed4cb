//! The restart policy: it decides if and when a VM whose run has ended is started again.
//!
//! ```text
//!   run ends ──► does the policy want a restart? ──no──► stopped / failed
//!                     │ yes
//!                     ▼
//!               restarts left? ──no──► failed: restart-loop
//!                     │ yes
//!                     ▼
//!               restarting (SHUTDOWN) ── 0.2 s · 2ⁿ, up to 30 s ─► start ─┬─ taken back ─► counts
//!                   ▲                                                     ├─ left ─► unreachable
//!                   └────────────────────── 30 s, not counted ────────────┴─ not begun
//! ```

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::config::VmConfig;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::state::{Phase, Status, VmOperation};

use super::Actor;
use super::budget::Budget;
use super::hold::{NextStep, run_start};
use super::record_update::{ChangeReason, RecordUpdate};
use super::resets::MAX_RESTARTS;
use super::start::{StartError, StartRequest};
use crate::error::ServiceError;
use crate::operation_log::Ending;

/// The time without a restart after which the count begins at 1 again.
pub(super) const COUNT_RESET_INTERVAL: Duration = Duration::from_secs(60);
/// The wait before the first restart.
const FIRST_RESTART_DELAY: Duration = Duration::from_millis(200);
/// The longest wait before a restart.
const MAX_RESTART_DELAY: Duration = Duration::from_secs(30);

/// The account of the end of a VM's last run. The VM shows this account while the restart policy
/// starts the VM again and while the new run lasts, beside the count of restarts.
#[derive(Clone)]
pub(super) struct LastEnd {
    reason: Reason,
    message: String,
}

impl LastEnd {
    /// Returns the end that a status on record shows. The failure of a start is not the end of a
    /// run, so it gives an empty account.
    pub(super) fn on_record(status: &Status) -> Self {
        match status.reason {
            Reason::StartNotBegun | Reason::BootFailed => {
                Self { reason: Reason::Nothing, message: String::new() }
            }
            _ => Self { reason: status.reason.clone(), message: status.message.clone() },
        }
    }

    /// Returns the least mode whose policy starts a VM again after this end. Where the end is not
    /// known any more, that is the least mode that starts any VM again.
    fn wanted_mode(&self) -> RestartMode {
        match self.reason {
            Reason::GuestReset | Reason::Nothing => RestartMode::GuestReboot,
            Reason::GuestPowerOff | Reason::VmmToldToEnd => RestartMode::Always,
            _ => RestartMode::OnFailure,
        }
    }

    /// Returns `status` with this account.
    pub(super) fn shown_in(&self, status: Status) -> Status {
        status.because(self.reason.clone(), self.message.as_str())
    }
}

/// The decision about a VM whose run has ended.
pub(super) struct RestartDecision {
    /// The status for the record.
    pub(super) status: Status,
    /// The next step of the actor.
    pub(super) next: NextStep,
}

impl Actor {
    /// Returns the policy in force.
    pub(super) fn restart_mode(&self) -> RestartMode {
        self.spec().restart.mode.unwrap_or(self.backend.capabilities().default_restart_mode)
    }

    /// Returns the number of this restart, counted since the last quiet minute.
    pub(super) fn count_restart(&mut self) -> u32 {
        let begun = || self.record.run.as_ref().map(run_start);
        // A run that is held knows its last reset. Without a hold only the start of the run on
        // record is known, which is an upper bound of the quiet time.
        let quiet = self
            .hold
            .quiet_since()
            .or_else(begun)
            .is_some_and(|since| since.elapsed() >= COUNT_RESET_INTERVAL);
        if quiet { 1 } else { self.restarts_so_far().saturating_add(1) }
    }

    /// Decides what follows `exit`.
    pub(super) fn decide_restart(&mut self, exit: &Exit) -> RestartDecision {
        let end = LastEnd { reason: exit.cause.reason(), message: exit.account().to_owned() };
        let wanted = match exit.cause {
            ExitCause::GuestReset => RestartMode::GuestReboot,
            ExitCause::GuestCrash | ExitCause::VmmFailed | ExitCause::Unknown => RestartMode::OnFailure,
            ExitCause::GuestPowerOff | ExitCause::Requested => RestartMode::Always,
        };
        // The modes are ordered by the ends that they cover: a guest reboot, then failures, then
        // every end.
        if self.restart_mode() < wanted {
            let phase = if exit.cause.is_failure() { Phase::Failed } else { Phase::Stopped };
            let mut status = end.shown_in(self.status(phase));
            status.restarts = self.restarts_so_far();
            return RestartDecision { status, next: NextStep::Idle };
        }
        let restarts = self.count_restart();
        self.schedule(restarts, Box::new(end), None)
    }

    /// Schedules the next start, unless the policy allows no more. `after` is the end of the last
    /// run. `failed` is the failure of the last start since then, if there was one.
    fn schedule(&self, restarts: u32, after: Box<LastEnd>, failed: Option<LastEnd>) -> RestartDecision {
        let LastEnd { reason, message } = failed.unwrap_or_else(|| LastEnd::clone(&after));
        let allowed = self.allowed_restarts();
        if restarts > allowed {
            let mut status = self.status(Phase::Failed).because(
                Reason::RestartLoop,
                format!("the VM was started again {allowed} times without a quiet minute between; the last end: {message}"),
            );
            status.restarts = restarts.saturating_sub(1);
            return RestartDecision { status, next: NextStep::Idle };
        }
        let mut status = self.status(Phase::Restarting).because(reason, message);
        status.restarts = restarts;
        RestartDecision { status, next: NextStep::RestartAt(Instant::now() + delay(restarts), after) }
    }

    /// Decides anew about a restart that is due, because `config` may have another policy. Returns
    /// the status of the VM if the new policy calls the restart off.
    ///
    /// A policy decides at the end of a run. A change of the policy therefore starts no VM whose run
    /// has ended before.
    pub(super) fn reconsider_restart(&self, config: &VmConfig) -> Option<Status> {
        let NextStep::RestartAt(_, after) = &self.next else { return None };
        if after.reason == Reason::RebootInterrupted {
            // A client asked for this start, and the policy has no part in it.
            return None;
        }
        let policy = VmSpec::parse(config).ok()?.restart;
        let mode = policy.mode.unwrap_or(self.backend.capabilities().default_restart_mode);
        let status = &self.record.status;
        // A start that failed is repeated by the modes that cover failures alone.
        let wanted = if status.reason == Reason::BootFailed {
            RestartMode::OnFailure.max(after.wanted_mode())
        } else {
            after.wanted_mode()
        };
        if mode < wanted {
            let phase = if wanted == RestartMode::OnFailure { Phase::Failed } else { Phase::Stopped };
            let end =
                if after.reason.is_nothing() { LastEnd::on_record(status) } else { LastEnd::clone(after) };
            return Some(end.shown_in(self.status(phase)));
        }
        let allowed = policy.max_restarts.min(MAX_RESTARTS);
        (status.restarts > allowed).then(|| {
            let mut looped = self.status(Phase::Failed).because(
                Reason::RestartLoop,
                format!(
                    "the restart policy now allows {allowed} restarts without a quiet minute between; the last end: {}",
                    status.message
                ),
            );
            looped.restarts = status.restarts.saturating_sub(1);
            looped
        })
    }

    /// Begins the wait for a restart again that an earlier daemon had begun.
    pub(super) fn resume_restart(&mut self) {
        let status = &self.record.status;
        let at = Instant::now() + delay(status.restarts);
        self.next = NextStep::RestartAt(at, Box::new(LastEnd::on_record(status)));
    }

    /// Carries out a restart that is due. The next step depends on what the start has left
    /// ([`StartError`]), because the text of an error is no reliable criterion.
    pub(super) async fn restart_by_policy(&mut self) {
        let NextStep::RestartAt(_, after) = std::mem::replace(&mut self.next, NextStep::Idle) else { return };
        let budget = Budget::of_own_step();
        let restarts = self.record.status.restarts;
        let caller = Caller::system();
        let start = StartRequest { after: Some(&after), ..StartRequest::new(VmOperation::Boot, &caller) };
        let asked = Instant::now();
        let result = self.start(budget, start).await;
        let record = self.record.share();
        let ending = Ending {
            operation: VmOperation::Boot.method(),
            force: false,
            actor: &caller,
            record: &record,
            asked,
        };
        let failure = match result {
            Ok(()) => return ending.done(&self.outcome(None)),
            // A forced operation has come, and decides what becomes of the VM.
            Err(StartError::TakenBack(ServiceError::Aborted(_))) => return,
            Err(failure) => failure,
        };
        ending.failed(failure.error());
        match failure {
            StartError::NotBegun(error) => self.restart_later(budget, restarts, &error, after).await,
            // A process may live. The VM is shown as unreachable, and no start takes place beside
            // that process.
            StartError::LeftSomething(_) => {}
            StartError::TakenBack(error) => self.restart_failed(budget, restarts, &error, after).await,
        }
    }

    /// Schedules another start after a start that launched nothing. Such a start does not count as
    /// a restart, because the missing resource may be available later, however often it was not.
    async fn restart_later(
        &mut self,
        budget: Budget,
        restarts: u32,
        error: &ServiceError,
        after: Box<LastEnd>,
    ) {
        let message = error.to_string();
        let mut status = self.status(Phase::Restarting).because(Reason::StartNotBegun, message);
        status.restarts = restarts;
        self.next = NextStep::RestartAt(Instant::now() + MAX_RESTART_DELAY, after);
        let update =
            RecordUpdate::new(EventKind::StateChanged, ChangeReason::by_itself(Cause::RestartPolicy), status);
        self.conclude_once(budget, update).await;
    }

    async fn restart_failed(
        &mut self,
        budget: Budget,
        restarts: u32,
        error: &ServiceError,
        after: Box<LastEnd>,
    ) {
        let message = error.to_string();
        let decision = if self.restart_mode() >= RestartMode::OnFailure {
            let failed = LastEnd { reason: Reason::BootFailed, message };
            self.schedule(restarts.saturating_add(1), after, Some(failed))
        } else {
            let status = self.status(Phase::Failed).because(Reason::BootFailed, message);
            RestartDecision { status, next: NextStep::Idle }
        };
        self.next = decision.next;
        let update = RecordUpdate::new(
            EventKind::StateChanged,
            ChangeReason::by_itself(Cause::RestartPolicy),
            decision.status,
        );
        let _ = self.conclude(budget, update).await;
    }
}

fn delay(restarts: u32) -> Duration {
    let doublings = restarts.saturating_sub(1).min(16);
    (FIRST_RESTART_DELAY * 2_u32.pow(doublings)).min(MAX_RESTART_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_delays_double_up_to_the_limit() {
        assert_eq!(delay(1), Duration::from_millis(200));
        assert_eq!(delay(2), Duration::from_millis(400));
        assert_eq!(delay(8), Duration::from_millis(25_600));
        assert_eq!(delay(9), MAX_RESTART_DELAY);
        assert_eq!(delay(u32::MAX), MAX_RESTART_DELAY);
    }
}
