//! The errors of the use cases, in terms that clients can act on.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmm_core::backend::{BackendError, BackendErrorKind};
use vmm_core::id::VmId;
use vmm_core::report::FieldReport;
use vmm_core::state::{VmOperation, VmState, legal_requests};
use vmm_core::store::{StoreError, StoreErrorKind, VmRecord};

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

/// The account of a failure: a sentence for clients, and the error below it, which the log shows.
#[derive(Clone, Debug)]
pub struct FailureAccount {
    text: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl FailureAccount {
    /// Adds the error below.
    pub(crate) fn caused_by(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// Returns the sentence for clients.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn and(mut self, more: &str) -> Self {
        self.text = format!("{}. {more}", self.text);
        self
    }
}

impl<T: Into<String>> From<T> for FailureAccount {
    fn from(text: T) -> Self {
        Self { text: text.into(), source: None }
    }
}

impl fmt::Display for FailureAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for FailureAccount {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn Error + 'static))
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $variant:ident,)*) => {
        $($(#[$doc])* pub(crate) fn $name(failure: impl Into<FailureAccount>) -> Self {
            Self::$variant(failure.into())
        })*
    };
}

impl ServiceError {
    constructors! {
        /// Makes a [`ServiceError::Precondition`].
        precondition => Precondition,
        /// Makes a [`ServiceError::Unavailable`].
        unavailable => Unavailable,
        /// Makes a [`ServiceError::Unsupported`].
        unsupported => Unsupported,
        /// Makes a [`ServiceError::Deadline`].
        deadline => Deadline,
        /// Makes a [`ServiceError::Aborted`].
        aborted => Aborted,
        /// Makes a [`ServiceError::Exhausted`].
        exhausted => Exhausted,
        /// Makes a [`ServiceError::OutOfRange`].
        out_of_range => OutOfRange,
        /// Makes a [`ServiceError::Internal`].
        internal => Internal,
    }

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

    /// Returns the error of a method that is no operation and that the state of `record` does not
    /// admit.
    pub(crate) fn not_legal(method: &str, record: &VmRecord) -> Self {
        let (vm_id, state) = (&record.vm_id, record.state);
        Self::precondition(format!(
            "{method} is not legal for VM \"{vm_id}\" in state {}; legal now: {}",
            state.name(),
            legal(state)
        ))
    }

    /// Adds `more` to the text of a store's failure, because more happened than the store knows.
    pub(crate) fn but(self, more: &str) -> Self {
        match self {
            Self::Exhausted(failure) => Self::Exhausted(failure.and(more)),
            Self::Unavailable(failure) => Self::Unavailable(failure.and(more)),
            Self::Internal(failure) => Self::Internal(failure.and(more)),
            other => other,
        }
    }

    /// Returns the client's error for a failure of the backend. `what` is the verb of the message.
    pub(crate) fn from_backend(what: &str, vm_id: &VmId, error: &BackendError) -> Self {
        let text = format!("could not {what} VM \"{vm_id}\": {error}");
        let failure = FailureAccount::from(text).caused_by(error.clone());
        if error.vmm_limit.is_some() {
            return Self::Exhausted(failure);
        }
        match error.kind {
            BackendErrorKind::Unsupported(_) => Self::Unsupported(failure),
            BackendErrorKind::NotInstalled
            | BackendErrorKind::Rejected
            | BackendErrorKind::Host
            | BackendErrorKind::NotServed
            | BackendErrorKind::Gone => Self::Precondition(failure),
            BackendErrorKind::Exhausted => Self::Exhausted(failure),
            BackendErrorKind::Timeout | BackendErrorKind::Unreachable | BackendErrorKind::Protocol => {
                Self::Unavailable(failure)
            }
            BackendErrorKind::StillRuns => Self::Deadline(failure),
        }
    }

    /// Returns the word for this error in the log, which is the code of the answer on the wire.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid_argument",
            Self::NotFound(_) => "not_found",
            Self::AlreadyExists(_) => "already_exists",
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

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        let kind = error.kind;
        let failure =
            FailureAccount::from(format!("the change could not be recorded: {error}")).caused_by(error);
        match kind {
            StoreErrorKind::Full => Self::Exhausted(failure),
            StoreErrorKind::Io | StoreErrorKind::Closed => Self::Unavailable(failure),
            StoreErrorKind::NameTaken
            | StoreErrorKind::Conflict
            | StoreErrorKind::Corrupt
            | StoreErrorKind::Newer => Self::Internal(failure),
        }
    }
}

fn list(violations: &[FieldReport]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn legal(state: VmState) -> String {
    legal_requests(state).map(VmOperation::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use vmm_core::backend::Effect;

    use super::*;

    #[test]
    fn the_whole_source_chain_of_a_failure_is_kept() {
        let kernel = std::io::Error::from_raw_os_error(13);
        let error =
            BackendError::new(BackendErrorKind::Host, Effect::NotApplied, "no socket").caused_by(kernel);
        let error = ServiceError::from_backend("boot", &"a".parse().unwrap(), &error);
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
                let error = ServiceError::from_backend("boot", &"a".parse().unwrap(), &error);
                assert!(matches!(error, ServiceError::Exhausted(_)), "{error:?}");
                assert!(error.to_string().contains(advice), "{error}");
            }
        }
        // A VMM reports the same limit in its own words.
        let error = BackendError::refused(Effect::NotApplied, "its last words: Too many open files");
        let error = ServiceError::from_backend("boot", &"a".parse().unwrap(), &error);
        assert!(matches!(error, ServiceError::Exhausted(_)), "{error:?}");
        assert!(error.to_string().contains("LimitNOFILE="), "{error}");
    }
}
