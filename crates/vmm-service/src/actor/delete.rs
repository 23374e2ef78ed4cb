//! DeleteVm: ends the VM's process, removes everything that the program made for the VM, and frees
//! the name.
//!
//! ```text
//!   intent ─► run ended ─► TAPs freed ─► folder removed ─► record removed, claims given back
//!                 │ by force, and it does not end
//!                 └─► … ─► record buried: a tombstone keeps the claims until the process is gone
//! ```

use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LadderOptions, SweepPurpose, Vmm};
use vmm_core::event::EventKind;
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::report::FieldReport;
use vmm_core::state::{EndedBy, Observation, Phase, VmOperation, observe};
use vmm_core::store::{Commit, IntentKind, RecordChange, StoreError, Tombstone, VmRecord};
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::hold::Hold;
use super::record_update::{ChangeReason, RecordUpdate};
use crate::error::ServiceError;
use crate::failure::{Failure, Unrecorded};
use crate::mailbox::{OperationOutcome, OperationRequest};
use crate::{spares, tombstones};

/// The time that a VMM of another program may take to end. It needs time to power the VM off before
/// it is killed. With a sweep after it, a forced deletion stays within its 5 s.
const FOREIGN_END_LIMIT: Duration = Duration::from_secs(3);
/// The time that the removal of a run folder may take. The answer names a folder that still exists
/// after that time.
const REMOVE_FOLDER_LIMIT: Duration = Duration::from_secs(1);

impl Actor {
    /// Removes the VM. With force, a resource that cannot be freed is named in the answer and does
    /// not stop the deletion.
    ///
    /// A deletion that a restart of the daemon has interrupted has its intent on record already.
    pub(super) async fn delete(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let forced = operation.request == VmOperation::ForceDelete;
        let kind = if forced { IntentKind::ForceDelete } else { IntentKind::Delete };
        if let Err(error) = self.intend(budget, kind, self.status(Phase::Deleting), &operation.caller).await {
            return Err(self.end_unrecorded(budget, operation, error).await);
        }
        self.next.call_off_restart();
        // The claims and the run that the process keeps if it outlives the deletion.
        let (claims, run) = (self.shared.claims.held_by(self.record.uid), self.known_run());
        let mut left_behind = Vec::new();
        let purpose = if forced { SweepPurpose::ForceDelete } else { SweepPurpose::Delete };
        let process = self.hold.may_be_a_process();
        // The process ends first, because a living process uses the TAPs, the folder and the disks
        // that are freed after it. Without force a process that does not end stops the deletion,
        // and the VM stays on record. With force the deletion goes on, and a tombstone keeps the
        // claims. A VM to which the configuration names no way is deleted in the same manner,
        // because no attempt could end its process.
        let tombstone = match self.end_what_runs(budget, purpose).await {
            Ok(()) => None,
            Err(EffectError::Backend(error)) if forced || error.kind == BackendErrorKind::NotServed => {
                left_behind.push(FieldReport::new("process", error.to_string()));
                let vm = VmRecord { run, ..VmRecord::clone(&self.record) };
                process.then_some(Tombstone { vm, claims })
            }
            Err(broken) => {
                return Err(self
                    .conclude_failure(budget, operation.request, &operation.caller, broken)
                    .await);
            }
        };
        point(FaultPoint::DeleteVmmEnded);
        left_behind.extend(self.free_taps(budget).await);
        point(FaultPoint::DeleteTapsFreed);
        if let Err(error) = self.remove_dir(budget).await {
            left_behind.push(FieldReport::new(format!("folder {}", self.dir().display()), error));
        }
        point(FaultPoint::DeleteFolderRemoved);
        // The record goes last, because until then the next daemon finds the intent on record and
        // repeats the steps before. Each of them can be repeated.
        self.remove_record(budget, operation, tombstone, &left_behind).await?;
        let mut outcome = self.outcome(None);
        outcome.left_behind = left_behind;
        Ok(outcome)
    }

    /// Ends the VM's process by its handle, or by its run folder if no handle ends it.
    async fn end_what_runs(&mut self, budget: Budget, purpose: SweepPurpose) -> Result<(), EffectError> {
        self.shared.spares.forget(&self.backend.capabilities().name, self.record.uid);
        spares::dismiss(&*self.backend, self.record.uid).await;
        let run = self.known_run();
        let mut process = self.hold.may_be_a_process();
        if let Some(vmm) = self.hold.vmm() {
            match self.end_by_force(budget, &*vmm).await {
                Ok(()) => {
                    self.drop_hold();
                    process = false;
                }
                Err(error) => tracing::warn!(%error, "the VMM could not be killed by its handle"),
            }
        }
        // Another program knows the VM, and must remove it too.
        let leaves = matches!(purpose, SweepPurpose::Delete | SweepPurpose::ForceDelete)
            && self.record.kind != VmKind::Managed;
        if process || leaves {
            point(FaultPoint::DeleteRunEnded);
            self.sweep(budget, purpose, run).await?;
            self.drop_hold();
        }
        Ok(())
    }

    /// Ends the VM's process although the store cannot record the forced operation, not even in the
    /// room that it keeps for such operations. The client wants the process ended above all, and
    /// the next start of the daemon corrects a record that shows a VM as running while nothing
    /// runs. Nothing else is touched.
    pub(super) async fn end_unrecorded(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
        error: StoreError,
    ) -> ServiceError {
        if !budget.forced || !self.hold.may_be_a_process() {
            return error.into();
        }
        self.next.call_off_restart();
        match self.end_what_runs(budget, SweepPurpose::End).await {
            Ok(()) => {
                self.shared.claims.release(self.record.uid);
                let state = observe(self.record.state, Observation::VmmGone);
                let status = self
                    .status(Phase::at_rest(state))
                    .because(Reason::Shutdown, "the VM was ended by force, which could not be recorded");
                let why = ChangeReason::asked(operation.request, &operation.caller)
                    .ended_by(Some(EndedBy::Sigkill));
                let update =
                    RecordUpdate::new(EventKind::StateChanged, why, status).observing(Observation::VmmGone);
                let _ = self.conclude(budget, update).await;
                Failure::NotRecorded { error, consequence: Some(Unrecorded::Ended) }.into()
            }
            Err(EffectError::Backend(left)) => {
                // The VMM may still end because of this request, and its end is no failure then.
                let broken = EffectError::Backend(left.clone());
                let _ = self.conclude_failure(budget, operation.request, &operation.caller, broken).await;
                Failure::NotRecorded { error, consequence: Some(Unrecorded::NotEnded(left)) }.into()
            }
            Err(EffectError::Preempted(_)) => error.into(),
        }
    }

    /// Kills the VMM. A VMM that another program started is ended only as far as force permits.
    async fn end_by_force(&self, budget: Budget, vmm: &dyn Vmm) -> Result<(), BackendError> {
        if !(self.record.imported || matches!(self.record.kind, VmKind::Attached { .. })) {
            return self.kill(budget, vmm).await;
        }
        self.in_time(budget, FOREIGN_END_LIMIT, vmm.shutdown(LadderOptions { guest_timeout: None }))
            .await
            .map(drop)
    }

    /// Removes the run folder. A removal that takes too long continues on its own, because the
    /// deletion must not wait for a disk that hangs.
    async fn remove_dir(&self, budget: Budget) -> Result<(), String> {
        let dir = self.dir();
        let removal = tokio::task::spawn_blocking(move || vmm_host::run_dir::remove(&dir));
        match tokio::time::timeout(budget.at_most(REMOVE_FOLDER_LIMIT), removal).await {
            Ok(Ok(removed)) => removed.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it was not removed in time, because its file system does not answer".to_owned()),
        }
    }

    /// Removes the VM from the record. A tombstone, if there is one, then holds the claims that its
    /// process may still use.
    async fn remove_record(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
        tombstone: Option<Tombstone>,
        left_behind: &[FieldReport],
    ) -> Result<(), ServiceError> {
        let why = ChangeReason::asked(operation.request, &operation.caller);
        let update = RecordUpdate::new(EventKind::Deleted, why, self.status(Phase::Deleting))
            .observing(Observation::VmmGone);
        let event = Some(self.event_of(update));
        let change = match &tombstone {
            None => RecordChange::Remove(self.record.uid),
            Some(tombstone) => RecordChange::Bury(Box::new(tombstone.clone())),
        };
        let commit = Commit { change, event };
        let answer = self.answer_of_deletion(left_behind);
        let is_answer = answer.is_some();
        let mut removed = self.send(budget, commit.clone(), answer.clone()).await;
        if removed.as_ref().is_err_and(|error| error.effect == Effect::Unknown) {
            // A second removal is harmless, and it is the only way to find out whether the first
            // one was written.
            removed = self.send(budget, commit, answer).await;
        }
        let committed = match removed {
            Ok(committed) => committed,
            Err(error) => {
                self.record_failed_removal(budget, operation, tombstone.is_some(), &error.to_string()).await;
                return Err(error.into());
            }
        };
        self.note_answer(is_answer);
        point(FaultPoint::DeleteOutcomeCommitted);
        match tombstone {
            Some(tombstone) => tombstones::hold_claims(&self.shared, tombstone),
            None => self.shared.claims.release(self.record.uid),
        }
        self.shared.index.remove(self.record.uid);
        drop(committed);
        Ok(())
    }

    async fn record_failed_removal(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
        process_left: bool,
        error: &str,
    ) {
        let mut turn_to = Phase::at_rest(observe(self.record.state, Observation::VmmGone));
        let mut observed = Some(Observation::VmmGone);
        // The VM is still on record. If its process outlived the deletion, the VM is out of reach.
        // Otherwise nothing runs, and its claims are released.
        if process_left && self.hold.may_be_a_process() {
            self.mark_silent();
            turn_to = if self.hold.is_out_of_reach() { Phase::Unreachable } else { Phase::Failed };
            observed = None;
        } else {
            self.drop_hold_and_claims();
        }
        let status = self.status(turn_to).because(Reason::DeleteFailed, error);
        let why = ChangeReason::asked(operation.request, &operation.caller);
        let mut update = RecordUpdate::new(EventKind::OperationFailed, why, status);
        if let Some(observed) = observed {
            update = update.observing(observed);
        }
        if matches!(self.hold, Hold::Orphan(_)) {
            update = update.intending(self.orphan_intent(&operation.caller));
        }
        let _ = self.conclude(budget, update).await;
    }
}
