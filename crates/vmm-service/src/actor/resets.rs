//! Resets in place: counted in memory, and recorded at most once a second, or once a minute where
//! they do not end.
//!
//! ```text
//!   reset ──► counted ──┬─ more than the policy allows ──► the run ends
//!                       ├─ none on record this second ───► on record at once
//!                       ├─ fewer than 100 in a row ──────► on record 1 s after the last record
//!                       └─ otherwise ────────────────────► on record when a minute has passed
//! ```
//!
//! A guest decides how often it resets itself, which can be hundreds of times a second. Each record
//! is an event that is kept for days, in a log that all VMs share, so the guest must not decide the
//! number of records. The guest of an imported VM may reset itself for ever, because this program
//! must not end a VM of another program, so the records are rationed and not the resets.

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause};
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::RestartMode;
use vmm_core::state::{Observation, Phase};

use super::Actor;
use super::budget::Budget;
use super::record_update::{ChangeReason, RecordUpdate};

/// The least time between two records of resets.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);
/// The number of records in a row that are one [`RECORD_INTERVAL`] apart.
const RECORDS_IN_A_ROW: u32 = 100;
/// The time after which one more such record is free.
const RECORD_REFILL_INTERVAL: Duration = Duration::from_secs(60);
/// The number of restarts without a quiet minute that no VM of a client may exceed, whatever its
/// policy allows.
pub(super) const MAX_RESTARTS: u32 = 1000;

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
    /// The instant at which all records in a row are free again.
    refilled: Option<Instant>,
}

impl ResetCounter {
    /// Returns the instant at which the unrecorded resets are to be recorded.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.unrecorded == 0 {
            return None;
        }
        let (Some(recorded), Some(refilled)) = (self.recorded, self.refilled) else {
            return Some(Instant::now());
        };
        let next = recorded + RECORD_INTERVAL;
        let free = refilled.checked_sub(RECORD_REFILL_INTERVAL * (RECORDS_IN_A_ROW - 1));
        Some(free.map_or(next, |free| free.max(next)))
    }

    /// Notes that the resets are on record.
    fn record(&mut self) {
        let now = Instant::now();
        self.unrecorded = 0;
        self.recorded = Some(now);
        self.refilled = Some(self.refilled.map_or(now, |full| full.max(now)) + RECORD_REFILL_INTERVAL);
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
            return self.end_failed_run(exit, Cause::GuestReset).await;
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
            return self.end_failed_run(exit, Cause::RestartLoop).await;
        }
        if live.resets.due().is_some_and(|at| at <= Instant::now()) {
            self.record_resets().await;
        }
    }

    /// Records the resets in place that are not on record yet.
    pub(super) async fn record_resets(&mut self) {
        let Some(live) = self.hold.live_mut() else { return };
        let (times, restarts) = (live.resets.unrecorded, live.resets.restarts);
        let message = match times {
            0 => return,
            1 => "the guest reset itself and runs again".to_owned(),
            times => format!("the guest reset itself {times} times and runs again"),
        };
        live.resets.record();
        let state = vmm_core::state::observe(self.record.state, Observation::ResetInPlace);
        let mut status = self.status(Phase::at_rest(state)).because(Reason::GuestReset, message);
        status.restarts = restarts;
        let update =
            RecordUpdate::new(EventKind::GuestReset, ChangeReason::by_itself(Cause::GuestReset), status)
                .observing(Observation::ResetInPlace);
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }
}
