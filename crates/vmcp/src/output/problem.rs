//! Failures on the standard error: the fault, the field, the remedy.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use buffa::Message as _;
use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::rpc::BadRequest;

use super::{Format, escape};
use crate::connect::reason;
use crate::failure::Failure;

/// The detail that names the wrong fields.
const BAD_REQUEST: &str = "google.rpc.BadRequest";

/// Returns the text of a failure; `None` if the failure has been printed already.
///
/// Programs that asked for messages get the API's error as JSON, on one line. `server` names the
/// server in the advice.
pub(crate) fn text(failure: &Failure, format: Format, server: &str) -> Option<String> {
    if failure.exit_number() == 0 || matches!(failure, Failure::Reported(_)) {
        return None;
    }
    match failure {
        Failure::Api(error) if format.is_message() => {
            Some(escape::json(&String::from_utf8_lossy(&error.to_json())).into_owned())
        }
        Failure::Api(error) => Some(api(error, server)),
        Failure::Input { message, remedy } => Some(plain(message, remedy.as_deref())),
        other => Some(plain(&other.to_string(), None)),
    }
}

/// Returns the text of a refusal with one field a line: `error: …`, then the fields.
pub(crate) fn fields<'a>(heading: &str, violations: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = escape::block(heading).into_owned();
    for (field, fault) in violations {
        let _infallible = write!(text, "\n  {}: {}", escape::line(field), escape::line(fault));
    }
    text
}

fn plain(message: &str, remedy: Option<&str>) -> String {
    let mut text = format!("error: {}", escape::block(message.trim_end()));
    if let Some(remedy) = remedy {
        let _infallible = write!(text, "\nhint: {}", escape::block(remedy));
    }
    text
}

fn api(error: &ConnectError, server: &str) -> String {
    let violations = violations(error);
    let code = error.code.as_str();
    if !violations.is_empty() {
        let pairs = violations.iter().map(|(field, fault)| (field.as_str(), fault.as_str()));
        let number = violations.len();
        let noun = if number == 1 { "field is" } else { "fields are" };
        return fields(&format!("error: {number} {noun} wrong ({code})"), pairs);
    }
    plain(&format!("{} ({code})", reason(error)), advice(error, server).as_deref())
}

/// Returns what a caller can do about an error whose message cannot know this program.
fn advice(error: &ConnectError, server: &str) -> Option<String> {
    // A local error has a source, and an answer of the server has none.
    let is_unreached = std::error::Error::source(error).is_some();
    match error.code {
        ErrorCode::Unavailable if is_unreached => Some(format!(
            "the server is {server}; `vmcp --help` shows how to start a daemon; if it runs elsewhere, name it with \
             --server, VMCP_SERVER or a context"
        )),
        ErrorCode::NotFound => Some("`vmcp list` shows the VMs".to_owned()),
        ErrorCode::Unavailable | ErrorCode::Aborted => Some("try again".to_owned()),
        ErrorCode::PermissionDenied => {
            Some("name the server by an IP address, or by a name in its UNKEY_VMCP_ALLOWED_HOSTS".to_owned())
        }
        _ => None,
    }
}

/// Returns the wrong fields that an error names, with their faults.
fn violations(error: &ConnectError) -> Vec<(String, String)> {
    let details = error.details.iter().filter(|detail| detail.type_url.ends_with(BAD_REQUEST));
    let values = details.filter_map(|detail| detail.value.as_deref());
    let bytes =
        values.filter_map(|text| STANDARD_NO_PAD.decode(text).or_else(|_| STANDARD.decode(text)).ok());
    bytes
        .filter_map(|bytes| BadRequest::decode_from_slice(&bytes).ok())
        .flat_map(|detail| detail.field_violations)
        .map(|violation| (violation.field, violation.description))
        .collect()
}

#[cfg(test)]
mod tests {
    use connectrpc::ErrorDetail;
    use vmm_proto::rpc::bad_request::FieldViolation;

    use super::*;

    const SERVER: &str = "http://127.0.0.1:8080";

    fn shown(failure: &Failure) -> String {
        text(failure, Format::Table, SERVER).unwrap()
    }

    #[test]
    fn every_violation_has_its_own_line() {
        let violation = |field: &str, fault: &str| FieldViolation {
            field: field.into(),
            description: fault.into(),
            ..Default::default()
        };
        let detail = BadRequest {
            field_violations: vec![
                violation("config.cpu.vcpu_count", "must be 1 or more"),
                violation("config.boot.kernel_path", "\u{1b}[2J does not exist"),
            ],
            ..Default::default()
        };
        let error = ConnectError::invalid_argument("all in one line")
            .with_detail(ErrorDetail::from_message(BAD_REQUEST, &detail));
        assert_eq!(
            shown(&error.clone().into()),
            "error: 2 fields are wrong (invalid_argument)\n  \
             config.cpu.vcpu_count: must be 1 or more\n  \
             config.boot.kernel_path: \\u{1b}[2J does not exist"
        );
        let json = text(&error.into(), Format::Json, SERVER).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["code"], "invalid_argument");
        assert_eq!(json["details"][0]["type"], BAD_REQUEST);
    }

    #[test]
    fn an_unreachable_server_is_named_with_advice() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let text = shown(&ConnectError::unavailable_from_transport("HTTP request failed", refused).into());
        assert!(
            text.starts_with("error: the server cannot be reached: connection refused (unavailable)"),
            "{text}"
        );
        assert!(text.contains("the server is http://127.0.0.1:8080"), "{text}");
        assert!(text.contains("--server"), "{text}");
        let text = shown(&ConnectError::unavailable("the VMM does not answer").into());
        assert_eq!(text, "error: the VMM does not answer (unavailable)\nhint: try again");
    }

    #[test]
    fn control_bytes_in_a_servers_message_are_escaped() {
        let text = shown(&ConnectError::internal("a\u{1b}]0;title\u{7}b").into());
        assert_eq!(text, "error: a\\u{1b}]0;title\\u{7}b (internal)");
    }

    #[test]
    fn a_reported_problem_is_not_printed_again() {
        assert_eq!(text(&Failure::Reported(13), Format::Table, SERVER), None);
        let gone = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(text(&Failure::Output(gone), Format::Table, SERVER), None);
    }
}
