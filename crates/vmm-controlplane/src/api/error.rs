//! Which code a failed use case has on the wire.

use connectrpc::ConnectError;
use vmm_service::ServiceError;

use crate::rpc::error::invalid_argument;

/// The error that a client sees.
pub(super) fn to_connect(error: ServiceError) -> ConnectError {
    // The server cuts a text that is too long and cleans one that quotes control characters.
    let text = error.to_string();
    log_causes(&error);
    match error {
        ServiceError::Invalid(violations) => {
            invalid_argument(violations.into_iter().map(|violation| (violation.field, violation.message)))
        }
        ServiceError::NotFound(_) => ConnectError::not_found(text),
        ServiceError::AlreadyExists(_) => ConnectError::already_exists(text),
        ServiceError::IllegalState { .. } | ServiceError::Precondition(_) => {
            ConnectError::failed_precondition(text)
        }
        ServiceError::Unavailable(_) => ConnectError::unavailable(text),
        ServiceError::Unsupported(_) => ConnectError::unimplemented(text),
        ServiceError::Deadline(_) => ConnectError::deadline_exceeded(text),
        ServiceError::Aborted(_) => ConnectError::aborted(text),
        ServiceError::Exhausted(_) => ConnectError::resource_exhausted(text),
        ServiceError::OutOfRange(_) => ConnectError::out_of_range(text),
        ServiceError::Internal(_) => ConnectError::internal(text),
    }
}

/// Logs the errors below a failure, which neither its text for clients nor the log line of the call shows.
fn log_causes(error: &ServiceError) {
    let causes = error.causes();
    if !causes.is_empty() {
        tracing::info!(causes = causes.join(": "), "the errors below a failed call");
    }
}
