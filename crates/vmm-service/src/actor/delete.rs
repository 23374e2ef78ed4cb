//! DeleteVm: ends what runs, removes what the program made, and frees the name.

use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Ladder, Sweep, Vmm};
use vmm_core::event::EventKind;
use vmm_core::kind::VmKind;
use vmm_core::report::FieldReport;
use vmm_core::state::{EndedBy, Observation, Phase, Request, observe};
use vmm_core::store::{Change, Commit, IntentKind};
use vmm_host::fault::{FaultPoint, point};

use super::persist::Why;
use super::{Actor, Broken, Operation};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::service::Outcome;

/// How long a VM may take to end whose VMM somebody else started: that has its time to power it off before it is killed. With a
/// sweep after it, this leaves a forced deletion within its 5 s.
const FOREIGN_END: Duration = Duration::from_secs(3);

impl Actor {
    /// Removes the VM. With `force`, what cannot be freed is named in the answer and stops nothing.
    pub(super) async fn delete(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        let forced = operation.request == Request::ForceDelete;
        let kind = if forced { IntentKind::ForceDelete } else { IntentKind::Delete };
        if let Err(error) = self.intend(kind, Phase::Deleting, &operation.caller).await {
            return Err(self.end_unrecorded(operation, error).await);
        }
        self.restart_at = None;
        let mut left_behind = Vec::new();
        match self.end_what_runs(if forced { Sweep::ForceDelete } else { Sweep::Delete }).await {
            Ok(()) => {}
            Err(Broken::Backend(error)) if forced || error.kind == BackendErrorKind::NotServed => {
                left_behind.push(FieldReport::new("process", error.to_string()));
                self.let_go();
            }
            Err(broken) => return Err(self.give_up(operation.request, &operation.caller, broken).await),
        }
        point(FaultPoint::DeleteVmmEnded);
        self.record.state = observe(self.record.state, Observation::VmmGone);
        left_behind.extend(self.free_taps().await);
        point(FaultPoint::DeleteTapsFreed);
        if let Err(error) = self.remove_dir().await {
            left_behind.push(FieldReport::new(format!("folder {}", self.dir().display()), error));
        }
        point(FaultPoint::DeleteFolderRemoved);
        self.remove_record(operation).await?;
        let mut outcome = self.outcome(None);
        outcome.left_behind = left_behind;
        Ok(outcome)
    }

    /// Ends what runs by its handle, and by its run folder what no handle ends.
    async fn end_what_runs(&mut self, purpose: Sweep) -> Result<(), Broken> {
        self.shared.spares.forget(&self.backend.capabilities().name, self.record.uid);
        self.backend.dismiss_spare(self.record.uid).await;
        if let Some(vmm) = self.vmm() {
            match self.end_by_force(&*vmm).await {
                Ok(()) => self.let_go(),
                Err(error) => {
                    tracing::warn!(%error, "the VMM could not be killed by its handle");
                    self.stray = true;
                }
            }
        } else if self.record.run.is_some() {
            self.stray = true;
        }
        // Another program knows the VM, and must forget it.
        let leaves =
            matches!(purpose, Sweep::Delete | Sweep::ForceDelete) && self.record.kind != VmKind::Managed;
        if self.stray || leaves {
            point(FaultPoint::DeleteRunEnded);
            self.sweep(purpose).await?;
            self.let_go();
        }
        Ok(())
    }

    /// The store cannot record what is forced, not even in the room that it keeps for that. What runs is ended all the same:
    /// who uses force wants that above all, and a VM that is on record as running while nothing runs is found out at the next
    /// start. Nothing else is touched.
    pub(super) async fn end_unrecorded(
        &mut self,
        operation: &Operation,
        error: ServiceError,
    ) -> ServiceError {
        if !self.forcing() || !(self.stray || self.record.run.is_some()) {
            return error;
        }
        self.restart_at = None;
        match self.end_what_runs(Sweep::End).await {
            Ok(()) => {
                self.record.state = observe(self.record.state, Observation::VmmGone);
                self.record.status = self
                    .plain(Phase::at_rest(self.record.state))
                    .because("shutdown", "ended by force, which could not be recorded");
                let why = Why::asked(operation.request, &operation.caller).ended_by(Some(EndedBy::Sigkill));
                let _ = self.conclude(EventKind::StateChanged, why).await;
                error.but("Its VMM was ended all the same; call again when the store can be written to")
            }
            Err(Broken::Backend(left)) => error.but(&format!("Its VMM could not be ended either: {left}")),
            Err(Broken::Preempted) => error,
        }
    }

    /// Kills the VMM; of one that this program did not start, as much as force allows.
    async fn end_by_force(&self, vmm: &dyn Vmm) -> Result<(), BackendError> {
        if !(self.record.imported || matches!(self.record.kind, VmKind::Attached { .. })) {
            return self.kill(vmm).await;
        }
        self.in_time(FOREIGN_END, vmm.shutdown(Ladder { ask_guest_for: None })).await.map(drop)
    }

    async fn remove_dir(&self) -> Result<(), String> {
        let dir = self.dir();
        tokio::task::spawn_blocking(move || vmm_host::run_dir::remove(&dir))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    async fn remove_record(&mut self, operation: &Operation) -> Result<(), ServiceError> {
        self.record.status = self.plain(Phase::Deleting);
        let event =
            self.event(EventKind::Deleted, Why::asked(operation.request, &operation.caller), now_ms());
        let commit = Commit { change: Change::Remove(self.record.uid), event: Some(event) };
        let mut removed = self.send(commit.clone()).await;
        if removed.as_ref().is_err_and(|error| error.effect == Effect::Unknown) {
            // Removing twice is harmless, and the only way to know.
            removed = self.send(commit).await;
        }
        let committed = match removed {
            Ok(committed) => committed,
            Err(error) => {
                self.record.status =
                    self.plain(Phase::at_rest(self.record.state)).because("delete-failed", error.to_string());
                let why = Why::asked(operation.request, &operation.caller);
                let _ = self.conclude(EventKind::OperationFailed, why).await;
                return Err(error.into());
            }
        };
        point(FaultPoint::DeleteOutcomeCommitted);
        self.shared.index.remove(self.record.uid);
        drop(committed);
        self.shared.claims.release(self.record.uid);
        Ok(())
    }
}
