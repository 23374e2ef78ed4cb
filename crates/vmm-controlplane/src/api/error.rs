//! The codes of failed use cases on the wire.

use connectrpc::ConnectError;
use http::HeaderValue;
use vmm_core::idempotency::{FailedCall, FailureCode};
use vmm_service::ServiceError;

use super::call::REPLAYED;
use crate::rpc::error::invalid_argument;

/// Returns the error for the client.
pub(super) fn to_connect(error: ServiceError) -> ConnectError {
    // The text is passed on unchanged, because the server cuts long texts and replaces control
    // characters.
    let text = error.to_string();
    record_causes(&error);
    match error {
        ServiceError::Invalid(violations) => {
            invalid_argument(violations.into_iter().map(|violation| (violation.field, violation.message)))
        }
        ServiceError::NotFound(_) => ConnectError::not_found(text),
        ServiceError::AlreadyExists(_) | ServiceError::KeyReused(_) => ConnectError::already_exists(text),
        ServiceError::Replayed(first) => replayed(*first),
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

/// Returns the failure of the first call with the same idempotency key.
fn replayed(first: FailedCall) -> ConnectError {
    let FailedCall { code, message, violations } = first;
    let mut error = match code {
        FailureCode::InvalidArgument => {
            invalid_argument(violations.into_iter().map(|violation| (violation.field, violation.message)))
        }
        FailureCode::NotFound => ConnectError::not_found(message),
        FailureCode::AlreadyExists => ConnectError::already_exists(message),
        FailureCode::FailedPrecondition => ConnectError::failed_precondition(message),
        FailureCode::Unimplemented => ConnectError::unimplemented(message),
        FailureCode::OutOfRange => ConnectError::out_of_range(message),
        FailureCode::Aborted => ConnectError::aborted(message),
    };
    error.response_headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    error
}

/// Adds the errors below a failure to the log line of the call, because the client's text does not
/// contain them. A handler runs in the span of its request.
fn record_causes(error: &ServiceError) {
    let causes = error.causes();
    if !causes.is_empty() {
        tracing::Span::current().record("causes", causes.join(": "));
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::backend::Effect;
    use vmm_core::store::{StoreError, StoreErrorKind};

    use super::*;

    #[test]
    fn the_log_has_the_code_of_the_answer() {
        let damaged = StoreError {
            kind: StoreErrorKind::Corrupt,
            message: "x".to_owned(),
            effect: Effect::NotApplied,
            source: None,
        };
        let ServiceError::Internal(account) = ServiceError::from(damaged) else { unreachable!() };
        let text = || account.clone();
        for error in [
            ServiceError::Invalid(Vec::new()),
            ServiceError::NotFound("x".to_owned()),
            ServiceError::AlreadyExists("x".parse().unwrap()),
            ServiceError::IllegalState {
                vm_id: "x".parse().unwrap(),
                state: vmm_core::state::VmState::Created,
                request: vmm_core::state::VmOperation::Pause,
            },
            ServiceError::Precondition(text()),
            ServiceError::Unavailable(text()),
            ServiceError::Unsupported(text()),
            ServiceError::Deadline(text()),
            ServiceError::Aborted(text()),
            ServiceError::Exhausted(text()),
            ServiceError::OutOfRange(text()),
            ServiceError::Internal(text()),
            ServiceError::KeyReused(text()),
        ] {
            let code = error.code();
            assert_eq!(to_connect(error).code.as_str(), code);
        }
    }

    #[test]
    fn a_replayed_failure_has_the_code_of_the_first_one() {
        for code in [
            FailureCode::InvalidArgument,
            FailureCode::NotFound,
            FailureCode::AlreadyExists,
            FailureCode::FailedPrecondition,
            FailureCode::Unimplemented,
            FailureCode::OutOfRange,
            FailureCode::Aborted,
        ] {
            let failed = FailedCall { code, message: "x".to_owned(), violations: Vec::new() };
            let error = to_connect(ServiceError::Replayed(Box::new(failed)));
            assert_eq!(error.code.as_str(), code.as_str());
            assert_eq!(error.response_headers()[REPLAYED], "true");
        }
    }
}
