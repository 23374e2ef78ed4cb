//! Budgets: how long an operation has in all, whatever its steps take, and what ends it sooner.
//!
//! ```text
//!   asked ────────────────────────────────────────────────────────► until
//!     │ effect, at most its own limit, less what the winding up needs │ winding up
//!     └─ force comes: the operation winds up in the budget of what has come
//! ```
//!
//! An operation gets one budget when it is taken up, and every step is handed it. A step has a limit of its own beside it, so
//! that one step that hangs leaves time for those that clear up after it.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Vmm};

use super::Actor;

/// No operation takes longer, the time that a guest is given excepted.
const OPERATION_LIMIT: Duration = Duration::from_secs(30);
/// A forced operation answers so long after it was asked for, commits excepted.
pub(super) const FORCE_LIMIT: Duration = Duration::from_millis(4800);
/// The part of a budget that is kept for the steps that undo an effect: a kill, a sweep, the TAPs.
const WIND_UP_LIMIT: Duration = Duration::from_secs(5);
/// The least that each step gets, however little is left.
const LEAST: Duration = Duration::from_millis(50);
/// The time that a killed VMM has to go. With a sweep after it, this leaves a forced operation within its 5 s.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(2);

/// The time that an operation has in all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    until: Instant,
    /// True if a client forces the operation: then nothing pre-empts it, and the store has room for it.
    pub(super) forced: bool,
}

/// Why an effect was not carried through.
pub(super) enum Broken {
    /// A forced operation came. What was under way winds up in its budget.
    Preempted(Budget),
    /// The backend failed, or its time passed.
    Backend(BackendError),
}

impl Budget {
    /// Returns the budget of an operation that begins now, whose guest has `patience` on top.
    pub(super) fn of_operation(patience: Option<Duration>) -> Self {
        Self { until: Instant::now() + OPERATION_LIMIT + patience.unwrap_or_default(), forced: false }
    }

    /// Returns the budget of what the program does by itself, beginning now.
    pub(super) fn of_own_step() -> Self {
        Self::of_operation(None)
    }

    /// Returns the budget of a forced operation that was asked for at `asked`. It may have waited behind another one.
    pub(super) fn of_force(asked: Instant) -> Self {
        Self { until: asked + FORCE_LIMIT, forced: true }
    }

    /// Returns `limit`, or what is left where that is less.
    pub(super) fn at_most(self, limit: Duration) -> Duration {
        limit.min(self.until.saturating_duration_since(Instant::now())).max(LEAST)
    }

    /// Returns `limit`, or what is left without the time for winding up where that is less.
    pub(super) fn at_most_before_wind_up(self, limit: Duration) -> Duration {
        let until = self.until.checked_sub(WIND_UP_LIMIT).unwrap_or(self.until);
        limit.min(until.saturating_duration_since(Instant::now())).max(LEAST)
    }
}

impl Broken {
    /// Returns the failure, of what nothing can pre-empt.
    pub(super) fn backend(self) -> Option<BackendError> {
        match self {
            Self::Backend(error) => Some(error),
            Self::Preempted(_) => None,
        }
    }

    /// Returns the budget in which to wind up: that of the forced operation that has come, or what is left of `own`.
    pub(super) fn wind_up(&self, own: Budget) -> Budget {
        match self {
            Self::Preempted(forced) => *forced,
            Self::Backend(_) => own,
        }
    }
}

impl Actor {
    /// Carries an effect through, unless a forced operation comes or `limit` passes.
    ///
    /// The forced operation stays in the mailbox: it is the actor's next step once this one has wound up. A budget that is
    /// forced itself is not pre-empted, because forced operations are carried out in the order in which they came.
    pub(super) async fn interruptible<T>(
        &mut self,
        budget: Budget,
        limit: Duration,
        effect: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, Broken> {
        let limit = budget.at_most(limit);
        let effect = tokio::time::timeout(limit, effect);
        let result = if budget.forced {
            effect.await
        } else {
            tokio::select! {
                biased;
                asked = self.mailbox.forced() => return Err(Broken::Preempted(Budget::of_force(asked))),
                result = effect => result,
            }
        };
        match result {
            Ok(Ok(done)) => {
                self.answered = Some(Instant::now());
                Ok(done)
            }
            Ok(Err(error)) => Err(Broken::Backend(error)),
            Err(_) => Err(Broken::Backend(BackendError::new(
                BackendErrorKind::Timeout,
                Effect::Unknown,
                format!("it took longer than {:.1} s", limit.as_secs_f64()),
            ))),
        }
    }

    /// Kills a VMM. A backend promises to answer in time; nobody waits for one that breaks its promise.
    pub(super) async fn kill(&self, budget: Budget, vmm: &dyn Vmm) -> Result<(), BackendError> {
        self.in_time(budget, KILL_LIMIT, vmm.kill()).await
    }

    /// Waits at most for `limit` for a VMM that is to end. Nothing interrupts this.
    pub(super) async fn in_time<T>(
        &self,
        budget: Budget,
        limit: Duration,
        ending: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        let limit = budget.at_most(limit);
        tokio::time::timeout(limit, ending).await.unwrap_or_else(|_| {
            let text = format!("its VMM did not end within {:.1} s of being killed", limit.as_secs_f64());
            Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, text))
        })
    }
}
