//! Gives each request an id and a tracing span. The span bears the caller's trace if the request
//! names one.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use connectrpc::RequestContext;
use http::{Extensions, HeaderName, HeaderValue};
use tracing::{Instrument as _, Span, field};
use uuid::Uuid;
use vmm_core::caller::Caller;

use super::failure_log::{FailureCounts, FailureLog};
use super::peer::Peer;
use super::trace_context::TraceParent;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that is accepted from a client.
const MAX_LEN: usize = 128;

/// The id of a request: the client's own `X-Request-Id`, or a new time-ordered one.
///
/// Handlers find the id in the extensions of their [`RequestContext`]. The id is also in the answer
/// and in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// Returns the client's id if it is valid, else a new one.
    fn of(request: &Request) -> Self {
        let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
        match given.filter(|id| is_sane(id)) {
            Some(id) => Self(id.into()),
            None => Self(Uuid::now_v7().to_string().into()),
        }
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Returns true if `id` may stand in logs, headers and shell commands without being escaped.
fn is_sane(id: &str) -> bool {
    (1..=MAX_LEN).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&b))
}

/// The span of a request. It is kept in the extensions, because a handler may run inside other
/// spans.
#[derive(Clone)]
struct RequestSpan(Span);

/// Returns the caller for the audit trail: the user on the unix socket, and elsewhere the address,
/// because no caller proves a name there yet.
pub fn caller(extensions: &Extensions) -> Caller {
    extensions.get::<Peer>().map_or_else(|| Caller::anonymous(None), |peer| peer.caller())
}

/// Puts the VM's id into the log span of the request that `ctx` belongs to.
pub fn record_vm_id(ctx: &RequestContext, vm_id: &str) {
    if let Some(RequestSpan(span)) = ctx.extensions().get() {
        span.record("vm_id", vm_id);
    }
}

/// Adds the id and the span to a request, and the id to the answer.
pub(super) async fn attach(State(lines): State<FailureCounts>, mut request: Request, next: Next) -> Response {
    let id = RequestId::of(&request);
    let trace = TraceParent::of(request.headers());
    // The actor is the caller of the audit trail. The keys without a value are recorded when they
    // are known: the operation by `outcome.rs`, the VM by its handler and its actor. The span has
    // the level ERROR, so that a filter that shows any line shows its keys, too.
    let span = tracing::error_span!(
        "request",
        request_id = id.as_str(),
        path = request.uri().path(),
        actor = %caller(request.extensions()),
        trace_id = trace.map(|trace| trace.trace_id),
        parent_id = trace.map(|trace| trace.parent_id),
        operation = field::Empty,
        vm_id = field::Empty,
        uid = field::Empty,
        backend = field::Empty,
        causes = field::Empty,
    );
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(RequestSpan(span.clone()));
    request.extensions_mut().insert(FailureLog::new(&lines, span.clone()));
    let mut response = next.run(request).instrument(span).await;
    // The value is always valid, because a client's id arrived as a header and a UUID is plain
    // ASCII.
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_for(given: Option<&str>) -> RequestId {
        let mut request = Request::new(axum::body::Body::empty());
        if let Some(given) = given {
            request.headers_mut().insert(HEADER, HeaderValue::from_str(given).unwrap());
        }
        RequestId::of(&request)
    }

    #[test]
    fn a_valid_request_id_is_kept() {
        assert_eq!(id_for(Some("build-17/step:3")).as_str(), "build-17/step:3");
    }

    #[test]
    fn an_invalid_request_id_is_replaced() {
        for bad in ["", "a b", "a\"b", &"x".repeat(129)] {
            let id = id_for(Some(bad));
            assert_ne!(id.as_str(), bad);
            assert!(Uuid::parse_str(id.as_str()).is_ok());
        }
    }

    #[test]
    fn generated_request_ids_differ() {
        assert_ne!(id_for(None), id_for(None));
    }
}
