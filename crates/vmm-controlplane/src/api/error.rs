//! The codes of failed use cases on the wire.

use connectrpc::ConnectError;
use vmm_service::ServiceError;

use crate::rpc::error::invalid_argument;

/// Returns the error for the client.
pub(super) fn to_connect(error: ServiceError) -> ConnectError {
    // The text is passed on unchanged, because the server cuts long texts and replaces control
    // characters.
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

/// Logs the errors below a failure. Neither the client's text nor the log line of the call shows
/// them.
fn log_causes(error: &ServiceError) {
    let causes = error.causes();
    if !causes.is_empty() {
        tracing::info!(causes = causes.join(": "), "the errors below a failed call");
    }
}
