//! A change of a VM's record, with the event that reports the change. The [`super::journal`]
//! carries the change out.

use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::config::VmConfig;
use vmm_core::event::{ConfigChange, EventKind};
use vmm_core::report::FieldReport;
use vmm_core::state::{EndedBy, Observation, Status, VmOperation};
use vmm_core::store::Intent;

use super::keyed::KeyStep;

/// The reason for a change, for the audit trail.
#[derive(Clone)]
pub(super) struct ChangeReason<'a> {
    pub(super) cause: Cause,
    /// The caller, or `None` if no client requested the change.
    pub(super) caller: Option<&'a Caller>,
    /// The rung that ended the run, if the run ended.
    pub(super) ended_by: Option<EndedBy>,
}

impl<'a> ChangeReason<'a> {
    /// Returns the reason of a change that no client requested.
    pub(super) const fn by_itself(cause: Cause) -> Self {
        Self { cause, caller: None, ended_by: None }
    }

    /// Returns the reason of a change that `caller` requested.
    pub(super) const fn asked(request: VmOperation, caller: &'a Caller) -> Self {
        Self { cause: Cause::of(request), caller: Some(caller), ended_by: None }
    }

    /// Returns this reason with the rung that ended the run.
    pub(super) const fn ended_by(mut self, ended_by: Option<EndedBy>) -> Self {
        self.ended_by = ended_by;
        self
    }
}

/// One change of a VM: every part of its record that changes, and the event that reports the
/// change.
#[derive(Clone)]
pub(super) struct RecordUpdate<'a> {
    pub(super) kind: EventKind,
    pub(super) why: ChangeReason<'a>,
    pub(super) status: Status,
    pub(super) observations: [Option<Observation>; 2],
    pub(super) intent: Option<Intent>,
    pub(super) ended_by: Option<Option<EndedBy>>,
    pub(super) config: Option<Box<ConfigEdit>>,
    pub(super) found: Option<Box<FoundConfig>>,
    pub(super) key: KeyStep,
}

/// A new configuration of a VM.
#[derive(Clone)]
pub(super) struct ConfigEdit {
    /// The configuration in force from the commit on.
    pub(super) config: VmConfig,
    /// True if the file of `console.output` stays the one that this VM has made.
    pub(super) keeps_console_output: bool,
    /// The account of the change for the event.
    pub(super) change: ConfigChange,
}

/// The configuration of a VM that another program has started, as its VMM reports it.
#[derive(Clone)]
pub(super) struct FoundConfig {
    pub(super) config: VmConfig,
    /// The properties that the configuration cannot express.
    pub(super) unrepresented: Vec<String>,
}

impl<'a> RecordUpdate<'a> {
    /// Creates a change after which no operation is in progress. The state stays.
    pub(super) const fn new(kind: EventKind, why: ChangeReason<'a>, status: Status) -> Self {
        let (observations, intent) = ([None; 2], None);
        Self {
            kind,
            why,
            status,
            observations,
            intent,
            ended_by: None,
            config: None,
            found: None,
            key: KeyStep::Stay,
        }
    }

    /// Moves the state by `observation`, after an earlier one.
    pub(super) const fn observing(mut self, observation: Observation) -> Self {
        self.observations = [self.observations[1], Some(observation)];
        self
    }

    /// Leaves `intent` on record.
    pub(super) fn intending(mut self, intent: Option<Intent>) -> Self {
        self.intent = intent;
        self
    }

    /// Replaces the rung that ended the last run.
    pub(super) const fn ending(mut self, ended_by: Option<EndedBy>) -> Self {
        self.ended_by = Some(ended_by);
        self
    }

    /// Replaces the configuration.
    pub(super) fn configuring(mut self, edit: ConfigEdit) -> Self {
        self.config = Some(Box::new(edit));
        self
    }

    /// Replaces the configuration by the one that was found, if one was. The VM counts as imported
    /// then.
    pub(super) fn configured(mut self, found: Option<FoundConfig>) -> Self {
        self.found = found.map(Box::new);
        self
    }

    /// Begins the keyed call in hand.
    pub(super) fn beginning_call(mut self) -> Self {
        self.key = KeyStep::Begin;
        self
    }

    /// Answers the keyed call, which has succeeded.
    pub(super) fn answering(self) -> Self {
        self.answering_with(Vec::new())
    }

    /// Answers the keyed call, which has succeeded with `warnings`.
    pub(super) fn answering_with(mut self, warnings: Vec<FieldReport>) -> Self {
        self.key = KeyStep::Answer(warnings);
        self
    }

    /// Ends the keyed call without an answer.
    pub(super) fn ending_call(mut self) -> Self {
        self.key = KeyStep::End;
        self
    }
}
