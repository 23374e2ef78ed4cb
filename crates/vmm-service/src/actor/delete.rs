//! DeleteVm: ends what runs, removes what the program made, and frees the name.

use std::sync::Arc;

use vmm_core::backend::Effect;
use vmm_core::event::EventKind;
use vmm_core::report::FieldReport;
use vmm_core::state::{Observation, Phase, Request, observe};
use vmm_core::store::{Change, Commit};

use super::persist::Why;
use super::{Actor, Broken, Operation};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::service::Outcome;

impl Actor {
    /// Removes the VM. With `force`, what cannot be freed is named in the answer and stops nothing.
    pub(super) async fn delete(&mut self, operation: &Operation) -> Result<Outcome, ServiceError> {
        self.intend(operation.request, Phase::Deleting, &operation.actor).await?;
        self.restart_at = None;
        let mut left_behind = Vec::new();
        if let Some(vmm) = self.vmm() {
            match Self::kill(&*vmm).await {
                Ok(()) => self.let_go(),
                Err(error) => {
                    tracing::warn!(%error, "the VMM could not be killed by its handle");
                    self.stray = true;
                }
            }
        } else if self.record.run.is_some() {
            self.stray = true;
        }
        if self.stray {
            match self.sweep().await {
                Ok(()) => self.let_go(),
                Err(Broken::Backend(error)) if operation.request == Request::ForceDelete => {
                    left_behind.push(FieldReport::new("process", error.to_string()));
                    self.let_go();
                }
                Err(broken) => return Err(self.give_up(operation.request, &operation.actor, broken).await),
            }
        }
        self.record.state = observe(self.record.state, Observation::VmmGone);
        left_behind.extend(self.free_taps().await);
        if let Err(error) = self.remove_dir().await {
            left_behind.push(FieldReport::new(format!("folder {}", self.dir().display()), error));
        }
        self.remove_record(operation).await?;
        let mut outcome = self.outcome(None);
        outcome.left_behind = left_behind;
        Ok(outcome)
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
        let event = self.event(EventKind::Deleted, Why::asked(operation.request, &operation.actor), now_ms());
        let commit = Commit { change: Change::Remove(self.record.uid), event: Some(event) };
        let events = Arc::clone(&self.shared.events);
        let mut removed = events.commit(commit.clone()).await;
        if removed.as_ref().is_err_and(|error| error.effect == Effect::Unknown) {
            // Removing twice is harmless, and the only way to know.
            removed = events.commit(commit).await;
        }
        let committed = match removed {
            Ok(committed) => committed,
            Err(error) => {
                self.record.status =
                    self.plain(Phase::at_rest(self.record.state)).because("delete-failed", error.to_string());
                let why = Why::asked(operation.request, &operation.actor);
                let _ = self.conclude(EventKind::OperationFailed, why).await;
                return Err(error.into());
            }
        };
        self.shared.index.remove(self.record.uid);
        drop(committed);
        self.shared.claims.release(self.record.uid);
        Ok(())
    }
}
