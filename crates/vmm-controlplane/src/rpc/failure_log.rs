//! The outcome of a failed request: an error that fits every client's limits, and one log line.
//!
//! ```text
//!   request_id.rs ── puts a FailureLog among the request's extensions
//!        │
//!        ├── host.rs, vital.rs, paths.rs ── refuse ──────────► line, answer
//!        ├── ErrorInterceptor, around every handler ─────────► line, error
//!        └── the RPC library, before any handler ── unreached ─► line, answer as it is
//! ```
//!
//! A client that fails in a loop must not displace everything else from the log. Therefore the
//! first [`PER_WINDOW`] failures of one method with one code in a second are warnings, and the
//! others have level DEBUG. The next warning gives their number.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use connectrpc::interceptor::{StreamRequest, StreamResponse, UnaryRequest, UnaryResponse};
use connectrpc::{
    ConnectError, ErrorCode, Interceptor, Next, NextStream, PayloadStream, RequestContext, async_trait,
};
use futures::StreamExt as _;
use http::{Extensions, HeaderMap};
use http_body_util::{BodyExt as _, Full};
use tracing::Span;

use super::body;
use super::call_meter::CallMeter;
use super::error::{cut_to_trailer_limit, sendable_text};

/// The number of failures of one method with one code that are logged as warnings within
/// [`WINDOW_INTERVAL`].
const PER_WINDOW: u32 = 10;
const WINDOW_INTERVAL: Duration = Duration::from_secs(1);

/// The longest text of an error in the log, in bytes.
const MAX_TEXT: usize = 2000;

/// The log of one request's failure. It is among the request's extensions.
#[derive(Clone)]
pub(super) struct FailureLog {
    lines: FailureCounts,
    is_reached: Arc<AtomicBool>,
    /// The span of the request. The items of a stream are sent outside it.
    span: Span,
    began: Instant,
}

impl FailureLog {
    pub(super) fn new(lines: &FailureCounts, span: Span) -> Self {
        Self { lines: lines.clone(), is_reached: Arc::default(), span, began: Instant::now() }
    }

    /// Logs that the request has failed with `error`.
    fn failed(&self, procedure: &str, error: &ConnectError) {
        let duration_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.span.in_scope(|| self.lines.failed(procedure, error, duration_ms));
    }

    fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get::<Self>().cloned()
    }

    /// Returns true if the call has reached the interceptors, which log its errors.
    pub(super) fn is_reached(&self) -> bool {
        self.is_reached.load(Ordering::Relaxed)
    }
}

/// Answers a request with an error, and logs the error.
pub(super) async fn refuse(request: Request, error: ConnectError) -> Response {
    let outcome = FailureLog::of(request.extensions());
    let headers = body::discard_rest(request).await;
    answer(outcome.as_ref(), &headers, error)
}

/// Turns an error into the answer to a request whose body has been read, and logs the error.
pub(super) fn answer(outcome: Option<&FailureLog>, headers: &HeaderMap, error: ConnectError) -> Response {
    let error = cut_to_trailer_limit(error);
    if let Some(outcome) = outcome {
        outcome.failed("", &error);
    }
    error.into_http_response(headers).map(Body::new)
}

/// Logs an answer with which the RPC library refused a request before any method was called.
///
/// The library makes such an answer as a whole, so reading its body does not wait.
pub(super) async fn unreached(outcome: &FailureLog, response: Response) -> Response {
    let (parts, body) = response.into_parts();
    let Ok(body) = body.collect().await else { return Response::from_parts(parts, Body::empty()) };
    let trailers = body.trailers().cloned();
    let bytes = body.to_bytes();
    let in_trailers = trailers.as_ref().and_then(|trailers| trailers.get("grpc-message")?.to_str().ok());
    let in_body = String::from_utf8_lossy(&bytes);
    let text = in_trailers.unwrap_or(&in_body);
    let error = ConnectError::invalid_argument(format!("HTTP status {}: {text}", parts.status.as_u16()));
    outcome.failed("", &error);
    let trailers = async { trailers.map(Ok::<_, Infallible>) };
    Response::from_parts(parts, Body::new(Full::new(bytes).with_trailers(trailers)))
}

/// Logs every error of a handler or of an inner interceptor, and shortens the error to fit into
/// trailers.
pub(super) struct ErrorInterceptor;

/// Marks a call as having reached its method.
fn mark_reached(ctx: &RequestContext) -> Option<(FailureLog, String)> {
    let outcome = FailureLog::of(ctx.extensions())?;
    outcome.is_reached.store(true, Ordering::Relaxed);
    let procedure = ctx.path().unwrap_or_default().to_owned();
    // Only the name of a method that exists counts as an operation.
    outcome.span.record("operation", procedure.rsplit('/').next());
    Some((outcome, procedure))
}

fn reported(call: Option<&(FailureLog, String)>, error: ConnectError) -> ConnectError {
    let error = cut_to_trailer_limit(error);
    if let Some((outcome, procedure)) = call {
        outcome.failed(procedure, &error);
    }
    error
}

#[async_trait]
impl Interceptor for ErrorInterceptor {
    async fn intercept_unary(
        &self,
        req: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        let call = mark_reached(&req.ctx);
        next.run(req).await.map_err(|error| reported(call.as_ref(), error))
    }

    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let call = mark_reached(&req.ctx);
        let response = next.run(req, inbound).await.map_err(|error| reported(call.as_ref(), error))?;
        Ok(response.map_body(|items| -> PayloadStream {
            Box::pin(items.map(move |item| item.map_err(|error| reported(call.as_ref(), error))))
        }))
    }
}

/// The number of failures of each method and code that were logged recently. Clones share one
/// count.
#[derive(Clone, Default)]
pub(super) struct FailureCounts {
    windows: Arc<Mutex<HashMap<(String, ErrorCode), CountWindow>>>,
    /// Counts the requests that reach no method.
    meter: Option<Arc<dyn CallMeter>>,
}

/// The number of failures since the window began.
struct CountWindow {
    began: Instant,
    count: u32,
}

impl FailureCounts {
    pub(super) fn new(meter: Option<Arc<dyn CallMeter>>) -> Self {
        Self { windows: Arc::default(), meter }
    }

    /// Logs a failure. `procedure` is a method of this server or empty, so the number of windows
    /// stays small.
    fn failed(&self, procedure: &str, error: &ConnectError, duration_ms: u64) {
        let (reason, outcome) = (error.code.as_str(), "failed");
        if let Some(meter) = self.meter.as_ref().filter(|_| procedure.is_empty()) {
            meter.refused(reason);
        }
        let detail = sendable_text(error.message.clone().unwrap_or_default(), MAX_TEXT);
        // A wait that ended at its deadline is an answer that the client asked for, and no failure.
        let is_answer = procedure.ends_with("/WaitVm") && error.code == ErrorCode::DeadlineExceeded;
        match self.admit(procedure, error.code, Instant::now()) {
            None => tracing::debug!(outcome, reason, detail, duration_ms, "operation failed"),
            Some(_) if is_answer => {
                tracing::info!(outcome, reason, detail, duration_ms, "the wait ended without the state");
            }
            Some(_) if procedure.is_empty() => {
                tracing::warn!(outcome, reason, detail, duration_ms, "request refused");
            }
            Some(missed) => {
                let more = (missed > 0).then_some(missed);
                tracing::warn!(outcome, reason, detail, duration_ms, more, "operation failed");
            }
        }
    }

    /// Returns the number of lines suppressed in the window before, if one more line may be logged
    /// at `now`.
    fn admit(&self, procedure: &str, code: ErrorCode, now: Instant) -> Option<u32> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        // The count includes the failures that were not logged. When a window has passed, those
        // beyond PER_WINDOW are the number that the next line reports, and a new window begins with
        // this failure.
        let window =
            windows.entry((procedure.to_owned(), code)).or_insert(CountWindow { began: now, count: 0 });
        let mut missed = 0;
        if now.duration_since(window.began) >= WINDOW_INTERVAL {
            missed = window.count.saturating_sub(PER_WINDOW);
            *window = CountWindow { began: now, count: 0 };
        }
        window.count = window.count.saturating_add(1);
        (window.count <= PER_WINDOW).then_some(missed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_failures_have_few_log_lines_with_a_count() {
        let lines = FailureCounts::default();
        let begin = Instant::now();
        let admitted = |at, procedure: &str, code| lines.admit(procedure, code, begin + at);
        let flood: Vec<_> = (0..1000).map(|_| admitted(Duration::ZERO, "/a", ErrorCode::NotFound)).collect();
        assert_eq!(flood.iter().filter(|line| **line == Some(0)).count(), 10);
        // Other methods and other codes are counted separately.
        assert_eq!(admitted(Duration::ZERO, "/b", ErrorCode::NotFound), Some(0));
        assert_eq!(admitted(Duration::ZERO, "/a", ErrorCode::Internal), Some(0));
        assert_eq!(admitted(WINDOW_INTERVAL, "/a", ErrorCode::NotFound), Some(990));
        assert_eq!(admitted(WINDOW_INTERVAL, "/a", ErrorCode::NotFound), Some(0));
    }
}
