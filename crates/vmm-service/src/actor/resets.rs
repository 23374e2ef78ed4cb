//! Resets in place: counted in memory, and on record at most once a second.
//!
//! ```text
//!   reset ──► counted ──┬─ more than the policy allows ──► the run ends
//!                       ├─ none on record this second ───► on record at once
//!                       └─ otherwise ────────────────────► on record with the others, a second after the last record
//! ```
//!
//! A guest decides how often it resets itself, hundreds of times a second if it likes. Each record is an event that is kept for
//! days, in a log that all VMs share, so the number of records must not be the guest's choice.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::RestartMode;
use vmm_core::state::{Observation, Phase};

use super::Actor;
use super::budget::Budget;
use super::journal::{Turn, Why};

/// Resets are on record at most so often.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);
/// No VM that a client made resets itself more often than this without a quiet minute, whatever its policy says.
const MAX_RESTARTS: u32 = 1000;

/// Resets in place of one run.
#[derive(Default)]
pub(super) struct Resets {
    /// The resets that are not on record yet.
    unrecorded: u32,
    /// The restarts without a quiet minute between, these included. Meaningful while some are unrecorded.
    restarts: u32,
    /// When the last record was made.
    recorded: Option<Instant>,
}

impl Resets {
    /// Returns when those that are not on record are to be recorded.
    pub(super) fn due(&self) -> Option<Instant> {
        let begin = self.recorded.map(|recorded| recorded + RECORD_INTERVAL);
        (self.unrecorded > 0).then(|| begin.unwrap_or_else(Instant::now))
    }
}

impl Actor {
    /// Returns the restarts without a quiet minute between that are counted so far, those in place included that are not on
    /// record yet.
    pub(super) fn restarts_so_far(&mut self) -> u32 {
        match self.hold.live_mut() {
            Some(live) if live.resets.unrecorded > 0 => live.resets.restarts,
            Some(_) | None => self.record.status.restarts,
        }
    }

    /// Returns how many restarts the policy allows without a quiet minute between. How often the guest of an imported VM resets
    /// itself is the business of the VM's owner.
    pub(super) fn allowed_restarts(&self) -> u32 {
        let wanted = self.spec().restart.max_restarts;
        if self.record.imported { wanted } else { wanted.min(MAX_RESTARTS) }
    }

    /// The guest reset itself in place, which counts as a restart.
    pub(super) async fn guest_reset(&mut self) {
        if self.restart_mode() == RestartMode::Never {
            let exit = Exit { cause: ExitCause::GuestReset, message: "the guest reset itself".to_owned() };
            return self.end_failed_run(exit, "guest-reset").await;
        }
        let restarts = self.count_restart();
        let allowed = self.allowed_restarts();
        let Some(live) = self.hold.live_mut() else { return };
        live.quiet_since = Instant::now();
        live.resets.restarts = restarts;
        live.resets.unrecorded = live.resets.unrecorded.saturating_add(1);
        if restarts > allowed {
            let exit =
                Exit { cause: ExitCause::GuestReset, message: "the guest reset itself again".to_owned() };
            return self.end_failed_run(exit, "restart-loop").await;
        }
        if live.resets.due().is_some_and(|at| at <= Instant::now()) {
            self.record_resets().await;
        }
    }

    /// Records the resets in place that are not on record yet.
    pub(super) async fn record_resets(&mut self) {
        let Some(live) = self.hold.live_mut() else { return };
        let (times, restarts) = (live.resets.unrecorded, live.resets.restarts);
        live.resets = Resets { unrecorded: 0, restarts, recorded: Some(Instant::now()) };
        let message = match times {
            0 => return,
            1 => "the guest reset itself and runs again".to_owned(),
            times => format!("the guest reset itself {times} times and runs again"),
        };
        tracing::info!(times, restarts, "the guest reset itself in place and runs again");
        let state = vmm_core::state::observe(self.record.state, Observation::ResetInPlace);
        let mut status = self.status(Phase::at_rest(state)).because(Reason::GuestReset, message);
        status.restarts = restarts;
        let turn = Turn::new(EventKind::GuestReset, Why::by_itself("guest-reset"), status)
            .observing(Observation::ResetInPlace);
        let _ = self.conclude(Budget::of_own_step(), turn).await;
    }
}
