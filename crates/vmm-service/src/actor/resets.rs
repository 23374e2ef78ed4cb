//! Resets in place: counted in memory, and recorded at most once a second.
//!
//! ```text
//!   reset ──► counted ──┬─ more than the policy allows ──► the run ends
//!                       ├─ none on record this second ───► on record at once
//!                       └─ otherwise ────────────────────► on record 1 s after the last record
//! ```
//!
//! A guest decides how often it resets itself, which can be hundreds of times a second. Each record
//! is an event that is kept for days, in a log that all VMs share, so the guest must not decide the
//! number of records.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::RestartMode;
use vmm_core::state::{Observation, Phase};

use super::Actor;
use super::budget::Budget;
use super::journal::{ChangeReason, RecordUpdate};

/// The least time between two records of resets.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);
/// The number of restarts without a quiet minute that no VM of a client may exceed, whatever its
/// policy allows.
const MAX_RESTARTS: u32 = 1000;

/// The resets in place of one run.
#[derive(Default)]
pub(super) struct ResetCounter {
    /// The number of resets that are not on record yet.
    unrecorded: u32,
    /// The number of restarts without a quiet minute between, with these resets included.
    /// Meaningful only while some are unrecorded.
    restarts: u32,
    /// The instant of the last record.
    recorded: Option<Instant>,
}

impl ResetCounter {
    /// Returns the instant at which the unrecorded resets are to be recorded.
    pub(super) fn due(&self) -> Option<Instant> {
        let begin = self.recorded.map(|recorded| recorded + RECORD_INTERVAL);
        (self.unrecorded > 0).then(|| begin.unwrap_or_else(Instant::now))
    }
}

impl Actor {
    /// Returns the number of restarts without a quiet minute between, with the resets in place that
    /// are not on record yet.
    pub(super) fn restarts_so_far(&mut self) -> u32 {
        match self.hold.live_mut() {
            Some(live) if live.resets.unrecorded > 0 => live.resets.restarts,
            Some(_) | None => self.record.status.restarts,
        }
    }

    /// Returns the number of restarts that the policy allows without a quiet minute between. An
    /// imported VM has no further limit, because its owner decides how often its guest resets
    /// itself.
    pub(super) fn allowed_restarts(&self) -> u32 {
        let wanted = self.spec().restart.max_restarts;
        if self.record.imported { wanted } else { wanted.min(MAX_RESTARTS) }
    }

    /// Counts a reset in place as a restart, and ends the run if the policy does not allow it.
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
        // The count is kept in `live` before this check, so that the end of the run counts from it.
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
        live.resets = ResetCounter { unrecorded: 0, restarts, recorded: Some(Instant::now()) };
        let message = match times {
            0 => return,
            1 => "the guest reset itself and runs again".to_owned(),
            times => format!("the guest reset itself {times} times and runs again"),
        };
        let state = vmm_core::state::observe(self.record.state, Observation::ResetInPlace);
        let mut status = self.status(Phase::at_rest(state)).because(Reason::GuestReset, message);
        status.restarts = restarts;
        let update = RecordUpdate::new(EventKind::GuestReset, ChangeReason::by_itself("guest-reset"), status)
            .observing(Observation::ResetInPlace);
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }
}
