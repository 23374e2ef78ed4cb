//! Errors that name every wrong field, for people and for programs.

use connectrpc::{ConnectError, ErrorDetail};
use vmm_proto::rpc::BadRequest;
use vmm_proto::rpc::bad_request::FieldViolation;

/// The full name of the detail, as clients look it up.
const BAD_REQUEST: &str = "google.rpc.BadRequest";

/// How many bytes of text the violations may have together.
///
/// gRPC carries the message and the details in trailers, and its clients refuse trailers of more than 16 KiB:
/// encoded twice, this much text stays below that.
pub(crate) const TEXT_BUDGET: usize = 4096;

/// Builds an INVALID_ARGUMENT from `(field path, what is wrong and what to do)` pairs.
///
/// The message names every violation, since curl users see nothing else; the same violations go along as
/// `google.rpc.BadRequest` details, encoded as each protocol wants them. Of very many violations the first are
/// given, and the number of the others; a very long one is cut.
pub fn invalid_argument<F, D>(violations: impl IntoIterator<Item = (F, D)>) -> ConnectError
where
    F: Into<String>,
    D: Into<String>,
{
    let mut detail = BadRequest::default();
    let mut lines = Vec::new();
    let mut left = TEXT_BUDGET;
    let mut unnamed = 0_usize;
    for (field, description) in violations {
        let (field, description) =
            (shown(field.into(), TEXT_BUDGET / 2), shown(description.into(), TEXT_BUDGET));
        let line = format!("{field}: {description}");
        if unnamed > 0 || (line.len() > left && !lines.is_empty()) {
            unnamed += 1;
            continue;
        }
        left = left.saturating_sub(line.len());
        lines.push(line);
        detail.field_violations.push(FieldViolation { field, description, ..Default::default() });
    }
    let error = ConnectError::invalid_argument(summary(&lines, unnamed));
    if detail.field_violations.is_empty() {
        return error;
    }
    error.with_detail(ErrorDetail::from_message(BAD_REQUEST, &detail))
}

/// A text that may quote the request, fit to be sent back: cut after `most` bytes, and without control characters.
pub(crate) fn shown(text: String, most: usize) -> String {
    if text.len() <= most && !text.contains(char::is_control) {
        return text;
    }
    let mut shown = String::with_capacity(text.len().min(most));
    for letter in text.chars() {
        let letter = if letter.is_control() { '\u{fffd}' } else { letter };
        if shown.len() + letter.len_utf8() > most {
            shown.push('…');
            break;
        }
        shown.push(letter);
    }
    shown
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
    fn names_every_violation_in_the_message_and_in_the_detail() {
        let error = invalid_argument([("config.cpu", "is required"), ("config.memory", "is required")]);
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert_eq!(error.message.as_deref(), Some("config.cpu: is required; config.memory: is required"));
        assert_eq!(error.details.len(), 1);
        assert_eq!(error.details[0].type_url, "google.rpc.BadRequest");
    }

    #[test]
    fn stays_small_enough_for_trailers() {
        let error =
            invalid_argument((0..10_000).map(|n| (format!("config.storage[{n}].path"), "does not exist")));
        let message = error.message.unwrap();
        assert!(message.len() < TEXT_BUDGET + 400, "{} bytes", message.len());
        assert!(message.starts_with("config.storage[0].path: does not exist; "));
        let named = message.matches("does not exist").count();
        assert!(message.ends_with(&format!("and {} more, shown when these are corrected", 10_000 - named)));
        assert!(error.details[0].value.as_ref().unwrap().len() < 2 * TEXT_BUDGET);
    }

    #[test]
    fn one_long_violation_is_cut() {
        let long = || "ä".repeat(TEXT_BUDGET);
        let error = invalid_argument([(long(), long())]);
        let message = error.message.unwrap();
        assert!((TEXT_BUDGET..2 * TEXT_BUDGET).contains(&message.len()), "{} bytes", message.len());
        assert!(error.details[0].value.as_ref().unwrap().len() < 3 * TEXT_BUDGET);
    }

    #[test]
    fn what_is_quoted_carries_no_control_characters() {
        let error = invalid_argument([("config.\n", "not \u{1b}[2J")]);
        assert_eq!(error.message.as_deref(), Some("config.\u{fffd}: not \u{fffd}[2J"));
    }

    #[test]
    fn the_detail_is_the_standard_message() {
        let detail = BadRequest {
            field_violations: vec![FieldViolation {
                field: "a".into(),
                description: "b".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        // Field 1, length-delimited, holding fields 1 and 2: what every google.rpc library reads.
        assert_eq!(detail.encode_to_vec(), [0x0a, 6, 0x0a, 1, b'a', 0x12, 1, b'b']);
    }
}
