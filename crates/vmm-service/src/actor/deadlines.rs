//! How long anything that an actor waits for may take, and what ends it sooner.
//!
//! A forced operation has its time from the moment it was asked: what it pre-empts winds up in that time, and one that waits
//! behind another has what is left.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Vmm};

use super::{Actor, Broken};

/// A forced operation answers so long after it was asked, commits excepted.
pub(super) const FORCE_LIMIT: Duration = Duration::from_millis(4800);
/// The least that each step of one gets, however long it has waited behind another.
const LEAST: Duration = Duration::from_millis(50);
/// How long a killed VMM may take to go. With a sweep after it, this leaves a forced operation within its 5 s.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(2);

impl Actor {
    /// Carries an effect through, unless a forced operation comes or `deadline` passes.
    pub(super) async fn interruptible<T>(
        &mut self,
        deadline: Duration,
        effect: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, Broken> {
        let deadline = self.within(deadline);
        let effect = tokio::time::timeout(deadline, effect);
        let result = if self.forcing() {
            effect.await
        } else {
            tokio::select! {
                biased;
                Some(message) = self.force.recv() => {
                    // What was under way winds up in the time of what comes.
                    self.force_until = Some(message.asked + FORCE_LIMIT);
                    self.preempting.push_back(message);
                    return Err(Broken::Preempted);
                }
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
                format!("it took longer than {:.1} s", deadline.as_secs_f64()),
            ))),
        }
    }

    /// Whether a forced operation is under way, or waits for another to wind up.
    pub(super) fn forcing(&self) -> bool {
        self.force_until.is_some()
    }

    /// As much of `deadline` as a forced operation has left, if one is under way.
    pub(super) fn within(&self, deadline: Duration) -> Duration {
        match self.force_until {
            Some(until) => deadline.min(until.saturating_duration_since(Instant::now())).max(LEAST),
            None => deadline,
        }
    }

    /// Kills a VMM. A backend promises to answer in time; nobody waits for one that breaks its promise.
    pub(super) async fn kill(&self, vmm: &dyn Vmm) -> Result<(), BackendError> {
        self.in_time(KILL_DEADLINE, vmm.kill()).await
    }

    /// Waits at most for `deadline` for a VMM that is to end, and no longer than a forced operation has.
    pub(super) async fn in_time<T>(
        &self,
        deadline: Duration,
        ending: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        let deadline = self.within(deadline);
        tokio::time::timeout(deadline, ending).await.unwrap_or_else(|_| {
            let text = format!("its VMM did not end within {:.1} s of being killed", deadline.as_secs_f64());
            Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, text))
        })
    }
}
