//! Budgets: the total time of an operation, and the events that end it sooner.
//!
//! ```text
//!   asked ────────────────────────────────────────────────────────► until
//!     │ effect, at most its own limit, less the time for the cleanup  │ cleanup
//!     └─ force comes: the operation cleans up in the budget of the forced one
//! ```
//!
//! An operation gets one budget when it begins, and passes it to every step. A step has a limit of
//! its own besides, so that a step that hangs leaves time for the steps that clean up.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Vmm};

use super::Actor;

/// The time that an operation may take, without the time that a guest is given.
const OPERATION_LIMIT: Duration = Duration::from_secs(30);
/// The time from the request of a forced operation to its answer, without commits.
pub(super) const FORCE_LIMIT: Duration = Duration::from_millis(4800);
/// The part of a budget that is reserved for the cleanup: a kill, a sweep, the TAPs.
const WIND_UP_LIMIT: Duration = Duration::from_secs(5);
/// The least time that each step gets, even if the budget is used up.
const MIN_STEP_LIMIT: Duration = Duration::from_millis(50);
/// The time that a killed VMM has to end. With a sweep after it, a forced operation stays within
/// its 5 s.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(2);

/// The total time of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    until: Instant,
    /// True if a client forces the operation. A forced operation is not pre-empted, and the store
    /// keeps room for it.
    pub(super) forced: bool,
}

/// The reason why an effect was not completed.
pub(super) enum EffectError {
    /// A forced operation came. The interrupted operation cleans up within its budget.
    Preempted(Budget),
    /// The backend failed, or the limit passed.
    Backend(BackendError),
}

impl Budget {
    /// Returns the budget of an operation that begins now. The guest has `guest_timeout` in
    /// addition.
    pub(super) fn of_operation(guest_timeout: Option<Duration>) -> Self {
        Self { until: Instant::now() + OPERATION_LIMIT + guest_timeout.unwrap_or_default(), forced: false }
    }

    /// Returns the budget of a step that the program takes without a request, beginning now.
    pub(super) fn of_own_step() -> Self {
        Self::of_operation(None)
    }

    /// Returns the budget of a forced operation that was requested at `asked`. The operation may
    /// have waited behind another one.
    pub(super) fn of_force(asked: Instant) -> Self {
        Self { until: asked + FORCE_LIMIT, forced: true }
    }

    /// Returns `limit`, or the time that is left if that is less.
    pub(super) fn at_most(self, limit: Duration) -> Duration {
        limit.min(self.until.saturating_duration_since(Instant::now())).max(MIN_STEP_LIMIT)
    }

    /// Returns `limit`, or the time that is left without the time for the cleanup if that is less.
    pub(super) fn at_most_before_wind_up(self, limit: Duration) -> Duration {
        let until = self.until.checked_sub(WIND_UP_LIMIT).unwrap_or(self.until);
        limit.min(until.saturating_duration_since(Instant::now())).max(MIN_STEP_LIMIT)
    }
}

impl EffectError {
    /// Returns the backend's failure, or `None` after a pre-emption.
    pub(super) fn backend(self) -> Option<BackendError> {
        match self {
            Self::Backend(error) => Some(error),
            Self::Preempted(_) => None,
        }
    }

    /// Returns the budget for the cleanup: that of the forced operation that has come, or the rest
    /// of `own`.
    pub(super) fn wind_up(&self, own: Budget) -> Budget {
        match self {
            Self::Preempted(forced) => *forced,
            Self::Backend(_) => own,
        }
    }
}

impl Actor {
    /// Runs an effect, unless a forced operation comes or `limit` passes.
    ///
    /// The forced operation stays in the mailbox: it is the actor's next step after this operation
    /// has cleaned up. A forced operation is not pre-empted itself, because forced operations are
    /// carried out in the order in which they came.
    pub(super) async fn interruptible<T>(
        &mut self,
        budget: Budget,
        limit: Duration,
        effect: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, EffectError> {
        let limit = budget.at_most(limit);
        let effect = tokio::time::timeout(limit, effect);
        let result = if budget.forced {
            effect.await
        } else {
            tokio::select! {
                biased;
                asked = self.mailbox.forced() => return Err(EffectError::Preempted(Budget::of_force(asked))),
                result = effect => result,
            }
        };
        match result {
            Ok(Ok(done)) => {
                self.answered = Some(Instant::now());
                Ok(done)
            }
            Ok(Err(error)) => Err(EffectError::Backend(error)),
            Err(_) => Err(EffectError::Backend(BackendError::new(
                BackendErrorKind::Timeout,
                Effect::Unknown,
                format!("the call took longer than {:.1} s", limit.as_secs_f64()),
            ))),
        }
    }

    /// Kills a VMM. A backend promises to answer in time, and a limit applies if it breaks that
    /// promise.
    pub(super) async fn kill(&self, budget: Budget, vmm: &dyn Vmm) -> Result<(), BackendError> {
        self.in_time(budget, KILL_LIMIT, vmm.kill()).await
    }

    /// Waits at most `limit` for a VMM that is to end. No operation interrupts this wait.
    pub(super) async fn in_time<T>(
        &self,
        budget: Budget,
        limit: Duration,
        ending: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        let limit = budget.at_most(limit);
        tokio::time::timeout(limit, ending).await.unwrap_or_else(|_| {
            let text = format!("the VMM did not end within {:.1} s after it was killed", limit.as_secs_f64());
            Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, text))
        })
    }
}
