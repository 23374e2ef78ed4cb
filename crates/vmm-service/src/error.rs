//! The errors of the use cases, in terms that clients can act on.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmm_core::backend::{BackendError, BackendErrorKind};
use vmm_core::id::VmId;
use vmm_core::idempotency::{FailedCall, FailureCode};
use vmm_core::report::FieldReport;
use vmm_core::state::{VmOperation, VmState, legal_requests};
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::failure::{BootObstacle, ConsoleFailure, Failure, UpdateFailure};

/// A failed use case. Its text is for clients, and describes the failure and the next action.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request cannot be served as it is. The text lists every violation.
    #[error("{}", list(.0))]
    Invalid(Vec<FieldReport>),
    /// The name belongs to no VM.
    #[error("there is no VM \"{0}\"; ListVms shows those that exist")]
    NotFound(String),
    /// A VM with another configuration has the name.
    #[error(
        "a VM \"{0}\" exists with another configuration or backend; delete it first, or choose another vm_id"
    )]
    AlreadyExists(VmId),
    /// The idempotency key was sent with another request.
    #[error(transparent)]
    KeyReused(FailureAccount),
    /// The failure of the first call with the same idempotency key.
    #[error("{}", .0.message)]
    Replayed(Box<FailedCall>),
    /// The VM's state does not admit the operation.
    #[error("{} is not legal for VM \"{vm_id}\" in state {}; legal now: {}", request.name(), state.name(), legal(*state))]
    IllegalState {
        /// The VM.
        vm_id: VmId,
        /// The VM's state.
        state: VmState,
        /// The operation that the client requested.
        request: VmOperation,
    },
    /// Something on the host, or the VM's own state, prevents the operation.
    #[error(transparent)]
    Precondition(FailureAccount),
    /// The VM, or its VMM or files, cannot be reached now. Another attempt may succeed.
    #[error(transparent)]
    Unavailable(FailureAccount),
    /// The backend does not support the operation or the configuration.
    #[error(transparent)]
    Unsupported(FailureAccount),
    /// The operation took too long.
    #[error(transparent)]
    Deadline(FailureAccount),
    /// A forced operation pre-empted this one.
    #[error(transparent)]
    Aborted(FailureAccount),
    /// A limit is reached or the store is full.
    #[error(transparent)]
    Exhausted(FailureAccount),
    /// The requested events are no longer kept.
    #[error(transparent)]
    OutOfRange(FailureAccount),
    /// A fault of this program.
    #[error(transparent)]
    Internal(FailureAccount),
}

/// The account of a failure: the failure itself, whose text is for clients, and the error below it,
/// which the log shows.
#[derive(Clone, Debug)]
pub struct FailureAccount(Arc<Failure>);

impl fmt::Display for FailureAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Error for FailureAccount {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

impl From<Failure> for ServiceError {
    fn from(failure: Failure) -> Self {
        let variant = match &failure {
            Failure::CannotBoot { why, .. } => match why {
                BootObstacle::Config(_) | BootObstacle::Files(_) | BootObstacle::Claimed(_) => {
                    Self::Precondition
                }
                BootObstacle::FilesTimedOut(_) => Self::Unavailable,
                BootObstacle::HostLimit(_) | BootObstacle::Descriptors(_) => Self::Exhausted,
            },
            Failure::Backend { error, .. } => variant_of(error),
            Failure::Console(failure) => match failure {
                ConsoleFailure::NotKept { .. }
                | ConsoleFailure::NotKnown { .. }
                | ConsoleFailure::Disabled { .. } => Self::Precondition,
                ConsoleFailure::Unreadable { .. } | ConsoleFailure::VmmGone { .. } => Self::Unavailable,
                ConsoleFailure::PastTheEnd { .. } => Self::OutOfRange,
                ConsoleFailure::NoInput { .. } => Self::Unsupported,
                ConsoleFailure::Unread { .. } => Self::Deadline,
                ConsoleFailure::NotWritten { error, .. } => variant_of(error),
            },
            Failure::Update(failure) => match failure {
                UpdateFailure::OtherGeneration { .. } => Self::Aborted,
                UpdateFailure::Foreign { .. }
                | UpdateFailure::Runs { .. }
                | UpdateFailure::Protected { .. } => Self::Precondition,
                UpdateFailure::NoChange => Self::Internal,
            },
            Failure::NotRecorded { error, .. } => match error.kind {
                StoreErrorKind::Full => Self::Exhausted,
                StoreErrorKind::Io | StoreErrorKind::Closed => Self::Unavailable,
                StoreErrorKind::NameTaken
                | StoreErrorKind::Conflict
                | StoreErrorKind::Corrupt
                | StoreErrorKind::Newer => Self::Internal,
            },
            Failure::EventsNotRead(error) | Failure::KeyNotRead(error) => match error.kind {
                StoreErrorKind::Full | StoreErrorKind::Io | StoreErrorKind::Closed => Self::Unavailable,
                StoreErrorKind::NameTaken
                | StoreErrorKind::Conflict
                | StoreErrorKind::Corrupt
                | StoreErrorKind::Newer => Self::Internal,
            },
            Failure::NotLegal { .. }
            | Failure::CannotReboot { .. }
            | Failure::NotBootedAgain { .. }
            | Failure::EndedMeanwhile { .. }
            | Failure::EveryNameTaken { .. } => Self::Precondition,
            Failure::OutOfReach { .. }
            | Failure::Quarantined { .. }
            | Failure::QueueFull { .. }
            | Failure::KeyInProgress { .. }
            | Failure::BeingDeleted { .. }
            | Failure::FilesTimedOut(_)
            | Failure::Stopping { .. } => Self::Unavailable,
            Failure::KeyReused { .. } => Self::KeyReused,
            Failure::ImportsOnly { .. } | Failure::NoFirmware(_) => Self::Unsupported,
            Failure::WaitTimedOut { .. } => Self::Deadline,
            Failure::Preempted { .. } => Self::Aborted,
            Failure::NoPlaceLeft { .. }
            | Failure::FilesNotExamined { .. }
            | Failure::WatchTooSlow { .. }
            | Failure::TooManyKeys => Self::Exhausted,
            Failure::EventsExpired { .. } | Failure::UnknownLog { .. } => Self::OutOfRange,
            Failure::EndedAbnormally { .. } | Failure::CreationEndedAbnormally => Self::Internal,
        };
        variant(FailureAccount(Arc::new(failure)))
    }
}

/// Returns the variant for a failure of the backend.
fn variant_of(error: &BackendError) -> fn(FailureAccount) -> ServiceError {
    if error.vmm_limit.is_some() {
        return ServiceError::Exhausted;
    }
    match error.kind {
        BackendErrorKind::Unsupported(_) => ServiceError::Unsupported,
        BackendErrorKind::NotInstalled
        | BackendErrorKind::Rejected
        | BackendErrorKind::Host
        | BackendErrorKind::NotServed
        | BackendErrorKind::Gone => ServiceError::Precondition,
        BackendErrorKind::Exhausted => ServiceError::Exhausted,
        BackendErrorKind::Timeout | BackendErrorKind::Unreachable | BackendErrorKind::Protocol => {
            ServiceError::Unavailable
        }
        BackendErrorKind::StillRuns => ServiceError::Deadline,
    }
}

impl ServiceError {
    /// Returns the error for one violation of one field.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![FieldReport::new(field, message)])
    }

    /// Returns the error for a name that no VM has, or for an empty name.
    pub(crate) fn not_found(vm_id: &str) -> Self {
        if vm_id.is_empty() {
            return Self::invalid("vm_id", "is required: name a VM, one of those that ListVms shows");
        }
        Self::NotFound(vm_id.to_owned())
    }

    /// Returns the word for this error in the log, which is the code of the answer on the wire.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid_argument",
            Self::NotFound(_) => "not_found",
            Self::AlreadyExists(_) | Self::KeyReused(_) => "already_exists",
            Self::Replayed(first) => first.code.as_str(),
            Self::IllegalState { .. } | Self::Precondition(_) => "failed_precondition",
            Self::Unavailable(_) => "unavailable",
            Self::Unsupported(_) => "unimplemented",
            Self::Deadline(_) => "deadline_exceeded",
            Self::Aborted(_) => "aborted",
            Self::Exhausted(_) => "resource_exhausted",
            Self::OutOfRange(_) => "out_of_range",
            Self::Internal(_) => "internal",
        }
    }

    /// Returns the failure that is kept for an idempotency key. `None` for a failure that another
    /// attempt may not meet, and for one that belongs to the key itself.
    pub(crate) fn kept(&self) -> Option<FailedCall> {
        let code = match self {
            Self::Invalid(_) => FailureCode::InvalidArgument,
            Self::NotFound(_) => FailureCode::NotFound,
            Self::AlreadyExists(_) => FailureCode::AlreadyExists,
            Self::IllegalState { .. } | Self::Precondition(_) => FailureCode::FailedPrecondition,
            Self::Unsupported(_) => FailureCode::Unimplemented,
            Self::OutOfRange(_) => FailureCode::OutOfRange,
            Self::Unavailable(_)
            | Self::Deadline(_)
            | Self::Aborted(_)
            | Self::Exhausted(_)
            | Self::Internal(_)
            | Self::KeyReused(_)
            | Self::Replayed(_) => return None,
        };
        let violations = match self {
            Self::Invalid(violations) => violations.clone(),
            _ => Vec::new(),
        };
        Some(FailedCall { code, message: self.to_string(), violations })
    }

    /// Returns the errors below this one whose text adds information, the nearest first.
    pub fn causes(&self) -> Vec<String> {
        let mut said = self.to_string();
        let mut causes = Vec::new();
        let mut next = self.source();
        while let Some(error) = next {
            let text = error.to_string();
            if !said.contains(&text) {
                said.push_str(&text);
                causes.push(text);
            }
            next = error.source();
        }
        causes
    }
}

impl From<ConsoleFailure> for ServiceError {
    fn from(failure: ConsoleFailure) -> Self {
        Failure::Console(failure).into()
    }
}

impl From<UpdateFailure> for ServiceError {
    fn from(failure: UpdateFailure) -> Self {
        Failure::Update(failure).into()
    }
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        Failure::NotRecorded { error, consequence: None }.into()
    }
}

pub(crate) fn list(violations: &[FieldReport]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

pub(crate) fn legal(state: VmState) -> String {
    legal_requests(state).map(VmOperation::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use vmm_core::backend::Effect;

    use super::*;

    fn failed_boot(error: BackendError) -> ServiceError {
        Failure::Backend { step: VmOperation::Boot, vm_id: "a".parse().unwrap(), error }.into()
    }

    #[test]
    fn the_whole_source_chain_of_a_failure_is_kept() {
        let kernel = std::io::Error::from_raw_os_error(13);
        let error =
            BackendError::new(BackendErrorKind::Host, Effect::NotApplied, "no socket").caused_by(kernel);
        let error = failed_boot(error);
        assert_eq!(error.to_string(), "could not boot VM \"a\": no socket");
        assert_eq!(error.causes(), ["Permission denied (os error 13)"], "what the text says is not repeated");
        assert!(matches!(error, ServiceError::Precondition(_)));
    }

    #[test]
    fn a_limit_of_the_host_is_resource_exhausted_and_names_the_limit_to_raise() {
        for (number, advice) in [(24, "LimitNOFILE="), (23, "fs.file-max"), (12, "MemoryMax=")] {
            let kernel = std::io::Error::from_raw_os_error(number);
            for kind in
                [BackendErrorKind::Host, BackendErrorKind::Unreachable, BackendErrorKind::NotInstalled]
            {
                let error = BackendError::new(kind, Effect::NotApplied, "x")
                    .caused_by(std::io::Error::from_raw_os_error(kernel.raw_os_error().unwrap()));
                let error = failed_boot(error);
                assert!(matches!(error, ServiceError::Exhausted(_)), "{error:?}");
                assert!(error.to_string().contains(advice), "{error}");
            }
        }
        // A VMM reports the same limit in its own words.
        let error = BackendError::refused(Effect::NotApplied, "its last words: Too many open files");
        let error = failed_boot(error);
        assert!(matches!(error, ServiceError::Exhausted(_)), "{error:?}");
        assert!(error.to_string().contains("LimitNOFILE="), "{error}");
    }
}
