//! The failures of use cases, as types. The text for clients is made from a failure when the failure
//! is shown, and is never read back.

mod console;
mod update;

use std::time::Duration;

use vmm_core::backend::BackendError;
use vmm_core::id::{BackendName, VmId};
use vmm_core::kind::VmKind;
use vmm_core::limit::HostLimit;
use vmm_core::reason::Reason;
use vmm_core::report::FieldReport;
use vmm_core::state::{Phase, VmOperation, VmState};
use vmm_core::store::StoreError;
use vmm_host::descriptors::TooFewDescriptors;

use crate::check::FilesTimedOut;
use crate::claims::ClaimConflict;
use crate::error::{ServiceError, legal, list};

pub(crate) use console::ConsoleFailure;
pub(crate) use update::UpdateFailure;

/// A failure, with the facts that its text needs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("VM \"{vm_id}\" cannot boot{}: {why}", why.condition())]
    CannotBoot { vm_id: VmId, why: BootObstacle },
    #[error("{method} is not legal for VM \"{vm_id}\" in state {}; legal now: {}", state.name(), legal(*state))]
    NotLegal { method: &'static str, vm_id: VmId, state: VmState },
    #[error(transparent)]
    Console(ConsoleFailure),
    #[error(transparent)]
    Update(UpdateFailure),
    #[error("VM \"{vm_id}\" cannot be rebooted: {why}")]
    CannotReboot { vm_id: VmId, why: ClaimConflict },
    #[error("VM \"{vm_id}\" was shut down but could not be booted again, and is {} now: {why}", state.name())]
    NotBootedAgain { vm_id: VmId, state: VmState, why: Box<ServiceError> },
    #[error("could not {} VM \"{vm_id}\": it ended meanwhile and is {} now ({reason})", verb(*step), state.name())]
    EndedMeanwhile { step: VmOperation, vm_id: VmId, state: VmState, reason: Reason },
    #[error("could not {} VM \"{vm_id}\": {error}", verb(*step))]
    Backend {
        step: VmOperation,
        vm_id: VmId,
        #[source]
        error: BackendError,
    },
    #[error("{} of VM \"{vm_id}\" was pre-empted by a forced operation", operation.name())]
    Preempted { operation: VmOperation, vm_id: VmId },
    #[error(
        "VM \"{vm_id}\" is unreachable ({message}): its VMM may still run it. Try again, or use force to end it"
    )]
    OutOfReach { vm_id: VmId, message: String },
    #[error(
        "VM \"{vm_id}\" cannot be used by this program: {why}. Run the release that made the VM, or end and delete the VM with \
         force"
    )]
    Quarantined { vm_id: VmId, why: String },
    #[error(
        "{limit} operations already wait for this VM; try again when some have ended{}",
        if *force { "" } else { ", or use force" }
    )]
    QueueFull { limit: usize, force: bool },
    #[error("VM \"{vm_id}\" is being deleted; try again when it is gone")]
    BeingDeleted { vm_id: VmId },
    #[error(
        "VM \"{vm_id}\" is in state {} ({}), and did not come to {} within {:.1} s; wait again, or see the reason with GetVmInfo",
        state.name(), phase.as_str(), names(wanted), waited.as_secs_f32()
    )]
    WaitTimedOut { vm_id: VmId, state: VmState, phase: Phase, wanted: Vec<VmState>, waited: Duration },
    #[error("the operation on VM \"{vm_id}\" ended abnormally; restart the daemon, which loses nothing")]
    EndedAbnormally { vm_id: String },
    #[error("the creation of the VM ended abnormally; the log has the panic")]
    CreationEndedAbnormally,
    #[error(
        "the Idempotency-Key was sent before, with another {method} request: repeat that request, or send a new key with each new \
         request"
    )]
    KeyReused { method: &'static str },
    #[error(
        "no room is left for Idempotency-Keys: keys are kept for 24 h, so try again later, or send the request without a key"
    )]
    TooManyKeys,
    #[error(
        "the first request with this Idempotency-Key on VM \"{vm_id}\" has not ended yet; try again later"
    )]
    KeyInProgress { vm_id: VmId },
    #[error("{why}")]
    ImportsOnly { why: String },
    #[error("{0}")]
    NoFirmware(FieldReport),
    #[error(
        "every socket that {backend} is attached to has its VM ({}): delete one of them, or name one more socket in {setting}",
        places.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    NoPlaceLeft { backend: BackendName, places: Vec<VmKind>, setting: &'static str },
    #[error("every name for the VM is taken: {names:?}")]
    EveryNameTaken { names: Vec<VmId> },
    #[error(transparent)]
    FilesTimedOut(FilesTimedOut),
    #[error("the host's files could not be examined: {}", limit.advice())]
    FilesNotExamined { limit: HostLimit },
    #[error("the change could not be recorded: {error}{}", consequence.as_ref().map(|then| format!(". {then}")).unwrap_or_default())]
    NotRecorded {
        #[source]
        error: StoreError,
        consequence: Option<Unrecorded>,
    },
    #[error("the events could not be read: {0}")]
    EventsNotRead(#[source] StoreError),
    #[error("the Idempotency-Key could not be looked up: {0}")]
    KeyNotRead(#[source] StoreError),
    #[error("the daemon is stopping: {}", if *synced { "resume with the last token" } else { "watch again when it is back" })]
    Stopping { synced: bool },
    #[error(
        "events since that token are no longer kept (they are for {} s): begin again without a resume_token, which first sends \
         the present state of every VM; UNKEY_VMCP_EVENT_RETENTION sets how long events are kept",
        retention.as_secs()
    )]
    EventsExpired { retention: Duration },
    #[error(
        "this watch fell more than {limit} events behind and was cut off: read faster or filter more, and resume with the token \
         of the last event received, which loses nothing"
    )]
    WatchTooSlow { limit: u16 },
    #[error(
        "resume_token: {why}, so the events since then cannot be found: begin again without a resume_token, which first sends \
         the present state of every VM"
    )]
    UnknownLog { why: LogMismatch },
}

/// The obstacle to a boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootObstacle {
    #[error("{}", list(.0))]
    Config(Vec<FieldReport>),
    #[error("{}", list(.0))]
    Files(Vec<FieldReport>),
    #[error(transparent)]
    FilesTimedOut(FilesTimedOut),
    #[error("{}", .0.advice())]
    HostLimit(HostLimit),
    #[error("{0}")]
    Descriptors(TooFewDescriptors),
    #[error("{0}")]
    Claimed(ClaimConflict),
}

impl BootObstacle {
    const fn condition(&self) -> &'static str {
        match self {
            Self::Files(_) => " as the host is now",
            Self::Config(_)
            | Self::FilesTimedOut(_)
            | Self::HostLimit(_)
            | Self::Descriptors(_)
            | Self::Claimed(_) => "",
        }
    }
}

/// The result of a forced end that the store could not record.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unrecorded {
    #[error("Its VMM was ended all the same; call again when the store can be written to")]
    Ended,
    #[error("Its VMM could not be ended either: {0}")]
    NotEnded(BackendError),
}

/// The reason why a token leads to no place of the log.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum LogMismatch {
    #[error("is of another daemon, or of another state directory")]
    OtherInstance,
    #[error("is of a log that is no longer in place, as after a restored backup")]
    OtherEvent,
    #[error("is ahead of the log, as after a restored backup")]
    Ahead,
}

/// Returns the verb for a step of an operation.
pub(crate) const fn verb(step: VmOperation) -> &'static str {
    match step {
        VmOperation::Boot => "boot",
        VmOperation::Shutdown => "shut down",
        VmOperation::Pause => "pause",
        VmOperation::Resume => "resume",
        VmOperation::Reboot => "reboot",
        VmOperation::Update => "update",
        VmOperation::Delete | VmOperation::ForceDelete => "delete",
    }
}

fn names(states: &[VmState]) -> String {
    states.iter().map(|state| state.name()).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use vmm_core::store::StoreErrorKind;

    use super::*;

    fn vm_id() -> VmId {
        "a".parse().unwrap()
    }

    #[test]
    fn each_obstacle_to_a_boot_has_its_code_and_its_text() {
        let problem = || vec![FieldReport::new("config.boot.kernel_path", "is gone")];
        let cases = [
            (BootObstacle::Config(problem()), "failed_precondition", "cannot boot: config.boot.kernel_path"),
            (BootObstacle::Files(problem()), "failed_precondition", "cannot boot as the host is now: config"),
            (
                BootObstacle::FilesTimedOut(FilesTimedOut),
                "unavailable",
                "cannot boot: the host's files do not",
            ),
        ];
        for (why, code, text) in cases {
            let error = ServiceError::from(Failure::CannotBoot { vm_id: vm_id(), why });
            assert_eq!(error.code(), code);
            assert!(error.to_string().starts_with(&format!("VM \"a\" {text}")), "{error}");
        }
    }

    #[test]
    fn a_forced_end_that_is_not_recorded_tells_its_result_and_the_store_the_code() {
        for (kind, code) in
            [(StoreErrorKind::Full, "resource_exhausted"), (StoreErrorKind::Io, "unavailable")]
        {
            let (message, effect) = ("no room".to_owned(), vmm_core::backend::Effect::NotApplied);
            let error = StoreError { kind, message, effect, source: None };
            let failure = Failure::NotRecorded { error, consequence: Some(Unrecorded::Ended) };
            let text = "the change could not be recorded: no room. Its VMM was ended all the same; call again when the store can \
                        be written to";
            assert_eq!(failure.to_string(), text);
            assert_eq!(ServiceError::from(failure).code(), code);
        }
    }
}
