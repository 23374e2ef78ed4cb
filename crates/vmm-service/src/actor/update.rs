//! UpdateVm: one commit that replaces parts of the configuration, without an effect on a VMM.
//!
//! ```text
//!   generation ─► parts admitted in this state ─► checked ─► one commit ─► TAPs freed ─► answer
//! ```
//!
//! The operation has no intent, because the commit is the whole operation: if the daemon dies
//! before the commit, nothing has changed. The TAPs of removed interfaces are freed after it. If the
//! daemon dies between, the next one removes them, because they bear this VM's label and the
//! configuration does not name them.

use std::sync::Arc;

use vmm_core::config::VmConfig;
use vmm_core::config_part::{self, ConfigPart};
use vmm_core::event::{ConfigChange, EventKind};
use vmm_core::report::{CheckReport, FieldReport};
use vmm_core::state::VmOperation;
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::Budget;
use super::hold::{Hold, NextStep};
use super::record_update::{ChangeReason, ConfigEdit, RecordUpdate};
use crate::check::FILE_CHECK_TIMEOUT;
use crate::error::ServiceError;
use crate::failure::UpdateFailure;
use crate::mailbox::{OperationOutcome, OperationRequest};
use crate::update::{ConfigUpdate, changed_parts, check_protection};
use crate::validate::{ConfigRevision, check_revision};

impl Actor {
    /// Carries out UpdateVm.
    pub(super) async fn update(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
    ) -> Result<OperationOutcome, ServiceError> {
        let Some(update) = operation.update.as_deref() else {
            return Err(UpdateFailure::NoChange.into());
        };
        self.check_generation(update)?;
        let merged = update.merge(&self.record.config);
        let defaults = &self.shared.settings.default_boot;
        let config = update.fill_in(&self.record.config, &merged, self.record.uid, defaults);
        let changed = changed_parts(&self.record.config, &config);
        self.admit_parts(&changed)?;
        let report = self.check_update(budget, &merged, &config, &changed).await?;
        if !report.is_ok() {
            return Err(ServiceError::Invalid(report.into_violations()));
        }
        if !changed.is_empty() {
            point(FaultPoint::UpdateChecked);
            let warnings = report.warnings.iter().cloned().map(Into::into).collect();
            self.put_in_force(budget, operation, config, &changed, warnings).await?;
        }
        Ok(OperationOutcome { warnings: report.warnings, ..self.outcome(None) })
    }

    fn check_generation(&self, update: &ConfigUpdate) -> Result<(), ServiceError> {
        if update.is_for(&self.record) {
            return Ok(());
        }
        Err(UpdateFailure::OtherGeneration {
            vm_id: self.record.vm_id.clone(),
            present: self.record.generation,
            wanted: update.if_generation,
        }
        .into())
    }

    /// Decides whether `changed` may change now.
    fn admit_parts(&self, changed: &[ConfigPart]) -> Result<(), ServiceError> {
        let vm_id = &self.record.vm_id;
        if self.record.imported {
            let foreign = |part: &ConfigPart| part.is_machine() || *part == ConfigPart::RestartPolicy;
            let foreign: Vec<_> = changed.iter().copied().filter(foreign).collect();
            if !foreign.is_empty() {
                let (vm_id, kind) = (vm_id.clone(), self.record.kind.clone());
                return Err(UpdateFailure::Foreign { vm_id, kind, parts: config_part::names(foreign) }.into());
            }
        }
        let machine: Vec<_> = changed.iter().copied().filter(|part| part.is_machine()).collect();
        if self.record.state.is_live() && !machine.is_empty() {
            let (vm_id, state) = (vm_id.clone(), self.record.state);
            return Err(UpdateFailure::Runs { vm_id, state, parts: config_part::names(machine) }.into());
        }
        Ok(())
    }

    /// Runs the checks of CreateVm on the new configuration. A forced operation pre-empts them.
    async fn check_update(
        &mut self,
        budget: Budget,
        sent: &VmConfig,
        config: &VmConfig,
        changed: &[ConfigPart],
    ) -> Result<CheckReport, ServiceError> {
        let (shared, backend, record) =
            (Arc::clone(&self.shared), Arc::clone(&self.backend), self.record.share());
        let checking = async {
            let revision = ConfigRevision { record: &record, sent, config, changed };
            Ok(check_revision(&shared, &*backend, revision).await)
        };
        let answered = self.answered;
        let checked = self.interruptible(budget, 2 * FILE_CHECK_TIMEOUT, checking).await;
        // The files have answered, and not the VMM, so its last answer is restored.
        self.answered = answered;
        checked.map_err(|broken| self.error_of(VmOperation::Update, VmOperation::Update, &broken))?
    }

    /// Commits the new configuration, and frees the TAPs of removed interfaces.
    async fn put_in_force(
        &mut self,
        budget: Budget,
        operation: &OperationRequest,
        config: VmConfig,
        changed: &[ConfigPart],
        warnings: Vec<FieldReport>,
    ) -> Result<(), ServiceError> {
        let before = self.taps();
        let called_off = self.reconsider_restart(&config);
        let status = called_off.clone().unwrap_or_else(|| self.record.status.clone());
        let edit = ConfigEdit {
            keeps_console_output: console_output(&config) == console_output(&self.record.config),
            change: self.account_of(changed),
            config,
        };
        let why = ChangeReason::asked(VmOperation::Update, &operation.caller);
        // An intent on record is that of a shutdown which was answered and has not ended its VM yet.
        // The change of the configuration does not end it.
        let update = RecordUpdate::new(EventKind::Updated, why, status)
            .intending(self.record.intent.clone())
            .configuring(edit)
            .answering_with(warnings);
        // The record names the restart that is due, so the restart is called off before the commit
        // and due again if the store refuses it.
        let due = called_off.is_some().then(|| std::mem::replace(&mut self.next, NextStep::Idle));
        if let Err(error) = self.try_to_conclude(budget, update).await {
            if let Some(due) = due {
                self.next = due;
            }
            return Err(error.into());
        }
        point(FaultPoint::UpdateOutcomeCommitted);
        let kept = self.taps();
        let removed = before.into_iter().filter(|tap| !kept.contains(tap)).map(|(name, _)| name);
        for left in self.free_named_taps(budget, removed.collect()).await {
            tracing::warn!(error = %left, "a TAP of a removed interface could not be removed; the next start of the daemon removes it");
        }
        if matches!(self.hold, Hold::Nothing) {
            // A VM without a process holds nothing but the TAPs that were just freed.
            self.shared.claims.release(self.record.uid);
        }
        point(FaultPoint::UpdateTapsFreed);
        Ok(())
    }

    /// Returns the account of the change for the event.
    fn account_of(&self, changed: &[ConfigPart]) -> ConfigChange {
        let relabelled = changed.contains(&ConfigPart::Metadata);
        ConfigChange {
            parts: changed.iter().map(|part| part.name().to_owned()).collect(),
            metadata_before: relabelled.then(|| self.record.config.metadata.clone()),
        }
    }

    /// Refuses the deletion of a protected VM.
    pub(super) fn check_protection(&self, caller: &vmm_core::caller::Caller) -> Result<(), ServiceError> {
        check_protection(&self.record, caller)
    }
}

fn console_output(config: &VmConfig) -> &str {
    config.console.as_ref().map_or("", |console| console.output.as_str())
}
