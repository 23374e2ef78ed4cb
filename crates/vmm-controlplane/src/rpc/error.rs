//! Errors that name every wrong field, for people and for programs.

use connectrpc::{ConnectError, ErrorDetail};
use vmm_proto::rpc::BadRequest;
use vmm_proto::rpc::bad_request::FieldViolation;

/// The full name of the detail, as clients look it up.
const BAD_REQUEST: &str = "google.rpc.BadRequest";

/// The longest text of an error, as [`wire_length`] counts it.
///
/// gRPC carries an error in trailers. Many clients refuse trailers of more than 8 KiB and then
/// report another code. An error's message is sent three times: percent-encoded in `grpc-message`
/// of the headers and of the trailers, which some clients add up, and in base64 in
/// `grpc-status-details-bin`. A text of this length therefore takes 3⅓ times its length, 7.3 KB,
/// and the rest is left for the other headers.
const MAX_TEXT: usize = 2200;

/// The longest text of all violations together, as [`wire_length`] counts it.
///
/// The violations are in the message and in the details, so a text of this length takes 4⅔ times
/// its length.
const MAX_VIOLATIONS: usize = 1600;

/// The bytes that a violation takes in trailers besides its text, for separators, tags and lengths.
const PER_VIOLATION: usize = 6;

/// The longest name of a field in a violation.
const MAX_FIELD: usize = MAX_VIOLATIONS / 3;

/// Builds an INVALID_ARGUMENT from pairs of a field path and a text with the fault and the advice.
///
/// The message names every violation, because users of curl see nothing else. The same violations
/// are sent as `google.rpc.BadRequest` details, encoded as each protocol requires. Of very many
/// violations the first are sent, with the number of the others. A very long violation is cut.
pub fn invalid_argument<F, D>(violations: impl IntoIterator<Item = (F, D)>) -> ConnectError
where
    F: Into<String>,
    D: Into<String>,
{
    let mut detail = BadRequest::default();
    let mut lines = Vec::new();
    let mut left = MAX_VIOLATIONS;
    let mut unnamed = 0_usize;
    for (field, description) in violations {
        let field = sendable_text(field.into(), MAX_FIELD);
        let description = sendable_text(description.into(), MAX_VIOLATIONS - MAX_FIELD);
        let line = format!("{field}: {description}");
        let length = wire_length(&line) + PER_VIOLATION;
        if unnamed > 0 || (length > left && !lines.is_empty()) {
            unnamed += 1;
            continue;
        }
        left = left.saturating_sub(length);
        lines.push(line);
        detail.field_violations.push(FieldViolation { field, description, ..Default::default() });
    }
    let error = ConnectError::invalid_argument(summary(&lines, unnamed));
    if detail.field_violations.is_empty() {
        return error;
    }
    error.with_detail(ErrorDetail::from_message(BAD_REQUEST, &detail))
}

/// Cuts the message of an error that would exceed a client's limit on trailers.
///
/// An error with details is not cut, because only [`invalid_argument`] makes such errors and it
/// bounds their length.
pub(super) fn cut_to_trailer_limit(mut error: ConnectError) -> ConnectError {
    if error.details.is_empty() {
        error.message = error.message.map(|text| sendable_text(text, MAX_TEXT));
    }
    error
}

/// Makes a text that may quote the request or a VMM safe to send. The text is cut where its
/// [`wire_length`] exceeds `most` bytes, and control characters are replaced.
pub(crate) fn sendable_text(text: String, most: usize) -> String {
    if wire_length(&text) <= most && !text.contains(char::is_control) {
        return text;
    }
    let mut shown = String::with_capacity(text.len().min(most));
    let mut left = most;
    for letter in text.chars() {
        let letter = if letter.is_control() { '\u{fffd}' } else { letter };
        let Some(rest) = left.checked_sub(letter_length(letter)) else {
            shown.push('…');
            break;
        };
        left = rest;
        shown.push(letter);
    }
    shown
}

/// Returns the number of bytes that a text takes in `grpc-message`, where `%` and every character
/// outside ASCII are percent-encoded.
fn wire_length(text: &str) -> usize {
    text.chars().map(letter_length).sum()
}

fn letter_length(letter: char) -> usize {
    match letter {
        ' '..='$' | '&'..='~' => 1,
        other => 3 * other.len_utf8(),
    }
}

fn summary(lines: &[String], unnamed: usize) -> String {
    let text = match lines {
        [] => return "the request is invalid".to_owned(),
        [only] => only.clone(),
        several => several.join("; "),
    };
    match unnamed {
        0 => text,
        more => format!("{text}; and {more} more, shown when these are corrected"),
    }
}

#[cfg(test)]
mod tests {
    use buffa::Message as _;
    use connectrpc::ErrorCode;

    use super::*;

    #[test]
    fn every_violation_is_in_the_message_and_the_detail() {
        let error = invalid_argument([("config.cpu", "is required"), ("config.memory", "is required")]);
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert_eq!(error.message.as_deref(), Some("config.cpu: is required; config.memory: is required"));
        assert_eq!(error.details.len(), 1);
        assert_eq!(error.details[0].type_url, "google.rpc.BadRequest");
    }

    /// Returns the bytes of an error in gRPC's headers and trailers: `grpc-message` in both, and
    /// `grpc-status-details-bin` in base64.
    fn in_trailers(error: &ConnectError) -> usize {
        let message = error.message.as_deref().unwrap_or_default();
        let details: usize =
            error.details.iter().map(|detail| detail.value.as_ref().map_or(0, String::len)).sum();
        2 * wire_length(message) + message.len().div_ceil(3) * 4 + details + 100
    }

    #[test]
    fn an_error_fits_into_the_trailer_limit_of_clients() {
        let many =
            invalid_argument((0..10_000).map(|n| (format!("config.storage[{n}].path"), "does not exist")));
        let message = many.message.as_deref().unwrap();
        assert!(message.starts_with("config.storage[0].path: does not exist; "));
        let named = message.matches("does not exist").count();
        assert!(message.ends_with(&format!("and {} more, shown when these are corrected", 10_000 - named)));
        assert!(named > 30, "{named} fit");

        let mut errors = vec![many, invalid_argument((0..10_000).map(|_| ("a", "b")))];
        for letter in ["a", "ä", "%", "\n", "\u{1f600}"] {
            let long = || letter.repeat(20_000);
            errors.push(invalid_argument([(long(), long()), ("b".to_owned(), "c".to_owned())]));
            errors.push(cut_to_trailer_limit(ConnectError::failed_precondition(long())));
        }
        for error in errors {
            let message = error.message.as_deref().unwrap();
            assert!(in_trailers(&error) < 7900, "{} bytes: {message}", in_trailers(&error));
            assert!(wire_length(message) > 1000, "more of it would fit: {message}");
        }
    }

    #[test]
    fn quoted_text_has_no_control_characters() {
        let error = invalid_argument([("config.\n", "not \u{1b}[2J")]);
        assert_eq!(error.message.as_deref(), Some("config.\u{fffd}: not \u{fffd}[2J"));
    }

    #[test]
    fn the_error_detail_is_the_standard_bad_request() {
        let detail = BadRequest {
            field_violations: vec![FieldViolation {
                field: "a".into(),
                description: "b".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        // The expected bytes are field 1, length-delimited, with fields 1 and 2 in it, which every
        // google.rpc library reads.
        assert_eq!(detail.encode_to_vec(), [0x0a, 6, 0x0a, 1, b'a', 0x12, 1, b'b']);
    }
}
