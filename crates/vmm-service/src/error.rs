//! Why a use case failed, in terms that clients can act on.

use vmm_core::backend::{BackendError, BackendErrorKind};
use vmm_core::id::VmId;
use vmm_core::report::FieldReport;
use vmm_core::state::{Request, VmState, legal_requests};
use vmm_core::store::{StoreError, StoreErrorKind};

/// A failed use case. Its text is meant for clients: it says what happened and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request cannot be served as it is; every violation is listed.
    #[error("{}", list(.0))]
    Invalid(Vec<FieldReport>),
    /// There is no such VM.
    #[error("there is no VM \"{0}\"; ListVms shows those that exist")]
    NotFound(String),
    /// The name is taken by a VM with another configuration.
    #[error(
        "a VM \"{0}\" exists with another configuration or backend; delete it first, or choose another vm_id"
    )]
    AlreadyExists(VmId),
    /// The VM's state does not admit the operation.
    #[error("{} is not legal for VM \"{vm_id}\" in state {}; legal now: {}", request.name(), state.name(), legal(*state))]
    IllegalState {
        /// The VM.
        vm_id: VmId,
        /// Where it is.
        state: VmState,
        /// What was asked.
        request: Request,
    },
    /// Something on the host, or the VM's own state, stands in the way.
    #[error("{0}")]
    Precondition(String),
    /// The VM, or what holds it, cannot be reached now; trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// The backend truly cannot.
    #[error("{0}")]
    Unsupported(String),
    /// It took too long.
    #[error("{0}")]
    Deadline(String),
    /// A forced operation pre-empted this one.
    #[error("{0}")]
    Aborted(String),
    /// No room is left.
    #[error("{0}")]
    Exhausted(String),
    /// What was asked for is no longer kept.
    #[error("{0}")]
    OutOfRange(String),
    /// A fault of this program.
    #[error("{0}")]
    Internal(String),
}

impl ServiceError {
    /// One violation of one field.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![FieldReport::new(field, message)])
    }

    /// There is no VM with this name, or no name was given.
    pub(crate) fn not_found(vm_id: &str) -> Self {
        if vm_id.is_empty() {
            return Self::invalid("vm_id", "is required: name a VM, one of those that ListVms shows");
        }
        Self::NotFound(vm_id.to_owned())
    }

    /// The same failure, where more came of it than the store knows.
    pub(crate) fn but(self, more: &str) -> Self {
        match self {
            Self::Exhausted(text) => Self::Exhausted(format!("{text}. {more}")),
            Self::Unavailable(text) => Self::Unavailable(format!("{text}. {more}")),
            Self::Internal(text) => Self::Internal(format!("{text}. {more}")),
            other => other,
        }
    }

    /// What a client is told of a backend's failure to `what` the VM.
    pub(crate) fn from_backend(what: &str, vm_id: &VmId, error: &BackendError) -> Self {
        let text = format!("could not {what} VM \"{vm_id}\": {error}");
        match error.kind {
            BackendErrorKind::Unsupported(_) => Self::Unsupported(text),
            BackendErrorKind::NotInstalled
            | BackendErrorKind::Rejected
            | BackendErrorKind::Host
            | BackendErrorKind::NotServed
            | BackendErrorKind::Gone => Self::Precondition(text),
            BackendErrorKind::Timeout | BackendErrorKind::Unreachable | BackendErrorKind::Protocol => {
                Self::Unavailable(text)
            }
            BackendErrorKind::StillRuns => Self::Deadline(text),
        }
    }
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        let text = format!("the change could not be recorded: {error}");
        match error.kind {
            StoreErrorKind::Full => Self::Exhausted(text),
            StoreErrorKind::Io | StoreErrorKind::Closed => Self::Unavailable(text),
            StoreErrorKind::NameTaken
            | StoreErrorKind::Conflict
            | StoreErrorKind::Corrupt
            | StoreErrorKind::Newer => Self::Internal(text),
        }
    }
}

fn list(violations: &[FieldReport]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn legal(state: VmState) -> String {
    legal_requests(state).map(Request::name).collect::<Vec<_>>().join(", ")
}
