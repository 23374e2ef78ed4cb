//! The files of a VM that was found running while its files did not answer.
//!
//! ```text
//!   found running ── files silent ──► claims by path ── look each 30 s ──► claims by device, inode
//! ```

use std::time::Duration;

use tokio::time::Instant;
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::state::Phase;
use vmm_core::store::{HostClaim, RunRecord};

use super::Actor;
use super::budget::Budget;
use super::hold::Hold;
use super::record_update::{ChangeReason, RecordUpdate};

/// The time between two looks. A look may keep the actor from its operations for three seconds.
const FILE_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Returns the instant of the next look at the files of `run`, or `None` if all of its disks are
/// known by device and inode.
pub(super) fn next_look(run: &RunRecord) -> Option<Instant> {
    run.claims.iter().any(|claim| path_of(claim).is_some()).then(|| Instant::now() + FILE_CHECK_INTERVAL)
}

/// Returns the path of a disk that is known by its path alone.
fn path_of(claim: &HostClaim) -> Option<&std::path::Path> {
    match claim {
        HostClaim::Path { path, .. } => Some(path),
        HostClaim::Disk { .. } | HostClaim::Tap { .. } => None,
    }
}

impl Actor {
    /// Looks at the files again. Disks whose files answer are claimed by device and inode.
    pub(super) async fn claim_files(&mut self) {
        if let Some(live) = self.hold.live_mut() {
            live.files_due = Some(Instant::now() + FILE_CHECK_INTERVAL);
        }
        let budget = Budget::of_own_step();
        let Ok(Ok(facts)) = self.check_files(budget, true).await else { return };
        let Some(run) = self.hold.run() else { return };
        let answered = |path| facts.claims.iter().any(|claim| is_disk_at(claim, path));
        let kept = run.claims.iter().filter(|claim| !path_of(claim).is_some_and(answered));
        let claims: Vec<_> = kept.chain(&facts.claims).cloned().collect();
        if let Err(taken) = self.shared.claims.exchange(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(detail = %taken, "a running VM uses a disk or TAP that another VM has claimed");
            return;
        }
        let Some(live) = self.hold.live_mut() else { return };
        live.run.claims = claims;
        live.files_due = None;
        tracing::debug!("the files of a VM answer again; its disks are claimed by device and inode");
        if !matches!(self.hold, Hold::Vmm(_)) {
            // The next change records the claims.
            return;
        }
        let status = self.status(Phase::at_rest(self.record.state)).because(Reason::FilesAnswer, "");
        let update =
            RecordUpdate::new(EventKind::StateChanged, ChangeReason::by_itself(Cause::FilesAnswer), status)
                .intending(self.record.intent.clone());
        let _ = self.conclude(budget, update).await;
    }
}

fn is_disk_at(claim: &HostClaim, wanted: &std::path::Path) -> bool {
    matches!(claim, HostClaim::Disk { path, .. } if path == wanted)
}
