//! The answers that the suite asks for in its requests: headers, payloads and errors, and what the
//! server has seen of a request.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use buffa::Message;
use buffa_types::google::protobuf::Any;
use connectrpc::{ConnectError, ErrorCode, ErrorDetail, Protocol, RequestContext};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::pb;
use pb::conformance_payload::{ConnectGetInfo, RequestInfo};

const PACKAGE: &str = "connectrpc.conformance.v1";
const TYPE_URL: &str = "type.googleapis.com";

/// Registers the messages that an `Any` may hold, because the JSON of an `Any` has the fields of
/// its message.
pub(crate) fn register_types() {
    let mut registry = buffa::type_registry::TypeRegistry::new();
    pb::__buffa::register_types(&mut registry);
    buffa_types::register_wkt_types(&mut registry);
    buffa::type_registry::set_type_registry(registry);
}

/// Packs a request of the type `name`.
pub(crate) fn any(name: &str, message: &impl Message) -> Any {
    Any::pack(message, format!("{TYPE_URL}/{PACKAGE}.{name}"))
}

/// Returns what the server has seen of a call: headers, deadline, requests, and that it was a GET.
pub(crate) fn request_info(ctx: &RequestContext, requests: Vec<Any>) -> RequestInfo {
    let names = ctx.headers().keys().map(|name| pb::Header {
        name: name.to_string(),
        value: ctx.headers().get_all(name).iter().map(text_of).collect(),
        ..Default::default()
    });
    RequestInfo {
        request_headers: names.collect(),
        timeout_ms: timeout_ms(ctx),
        requests,
        connect_get_info: is_get(ctx).then(ConnectGetInfo::default).into(),
        ..Default::default()
    }
}

/// Returns the milliseconds left, if the client has set a deadline. A call without a deadline has
/// the server's own, which the suite does not ask for.
fn timeout_ms(ctx: &RequestContext) -> Option<i64> {
    ctx.header("connect-timeout-ms").or_else(|| ctx.header("grpc-timeout"))?;
    i64::try_from(ctx.time_remaining()?.as_millis()).ok()
}

/// Returns true for a GET of the Connect protocol, the one request that has no Content-Type.
fn is_get(ctx: &RequestContext) -> bool {
    ctx.protocol() == Some(Protocol::Connect) && ctx.header(CONTENT_TYPE).is_none()
}

fn text_of(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

/// Turns headers of the suite into headers of HTTP.
///
/// # Errors
///
/// INVALID_ARGUMENT for a name or a value that HTTP does not have.
pub(crate) fn headers(wanted: &[pb::Header]) -> Result<HeaderMap, ConnectError> {
    let mut headers = HeaderMap::new();
    for header in wanted {
        let invalid = |error: &dyn std::fmt::Display| {
            ConnectError::invalid_argument(format!("the header {:?}: {error}", header.name))
        };
        let name = HeaderName::try_from(&header.name).map_err(|error| invalid(&error))?;
        for value in &header.value {
            let value = HeaderValue::from_str(value).map_err(|error| invalid(&error))?;
            headers.append(name.clone(), value);
        }
    }
    Ok(headers)
}

/// Turns an error of the suite into an error of the server. `seen` is added to its details.
pub(crate) fn error(wanted: &pb::Error, seen: Option<&RequestInfo>) -> ConnectError {
    let number = u32::try_from(wanted.code.to_i32()).unwrap_or_default();
    let code = ErrorCode::from_grpc_code(number).unwrap_or(ErrorCode::Unknown);
    let mut error = ConnectError::new(code, "");
    error.message.clone_from(&wanted.message);
    let seen = seen.map(|seen| any("ConformancePayload.RequestInfo", seen));
    error.details = wanted.details.iter().chain(&seen).map(detail).collect();
    error
}

fn detail(any: &Any) -> ErrorDetail {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    ErrorDetail { type_url: name.to_owned(), value: Some(STANDARD_NO_PAD.encode(&any.value)), debug: None }
}
