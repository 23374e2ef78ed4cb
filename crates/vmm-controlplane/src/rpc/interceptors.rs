//! Interceptors for every call of every protocol. They are interceptors so that each client
//! receives an error in its own framing.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::task::Poll;

use axum::body::Body;
use axum::response::Response;
use connectrpc::interceptor::{StreamRequest, StreamResponse, UnaryRequest, UnaryResponse};
use connectrpc::{ConnectError, Interceptor, Next, NextStream, PayloadStream, RequestContext, async_trait};
use futures::{FutureExt as _, StreamExt as _, stream};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use tokio::sync::watch;

use super::RequestId;

/// Turns a handler's panic into INTERNAL, so that the other calls go on.
pub(super) struct PanicInterceptor;

#[async_trait]
impl Interceptor for PanicInterceptor {
    async fn intercept_unary(
        &self,
        req: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        let id = request_id(&req.ctx);
        caught(&id, next.run(req)).await
    }

    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let id = request_id(&req.ctx);
        let response = caught(&id, next.run(req, inbound)).await?;
        Ok(response.map_body(|items| -> PayloadStream {
            let items = AssertUnwindSafe(items).catch_unwind();
            Box::pin(items.map(move |item| item.unwrap_or_else(|panic| Err(panicked(&*panic, &id)))))
        }))
    }
}

/// Runs a handler, and turns its panic into an error. The state that a panic may leave half changed
/// belongs to the handler and is dropped with it.
async fn caught<T>(
    request_id: &str,
    handler: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let ended = AssertUnwindSafe(handler).catch_unwind().await;
    ended.unwrap_or_else(|panic| Err(panicked(&*panic, request_id)))
}

fn request_id(ctx: &RequestContext) -> String {
    ctx.extensions().get::<RequestId>().map(|id| id.as_str().to_owned()).unwrap_or_default()
}

fn panicked(panic: &(dyn Any + Send), request_id: &str) -> ConnectError {
    tracing::error!(
        panic = panic_text(panic),
        request_id,
        "a handler panicked, which is a defect of this program"
    );
    ConnectError::internal(format!(
        "a defect in the daemon ended this call; its log says more under request id {request_id}"
    ))
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Returns the answer for a page (not a call) that panicked.
pub(super) fn page_panicked(panic: Box<dyn Any + Send>) -> Response {
    tracing::error!(panic = panic_text(&*panic), "a page panicked, which is a defect of this program");
    ConnectError::internal("a defect in the daemon ended this request; its log says more")
        .into_http_response(&HeaderMap::new())
        .map(Body::new)
}

/// Ends every stream with UNAVAILABLE when the server begins to drain, because a watch would
/// outlast any deadline.
pub(super) struct DrainInterceptor {
    draining: watch::Receiver<bool>,
}

impl DrainInterceptor {
    pub(super) fn new(draining: watch::Receiver<bool>) -> Self {
        Self { draining }
    }
}

#[async_trait]
impl Interceptor for DrainInterceptor {
    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let draining = self.draining.clone();
        let response = next.run(req, inbound).await?;
        Ok(response.map_body(|items| until_drain(items, draining)))
    }
}

fn until_drain(mut items: PayloadStream, mut draining: watch::Receiver<bool>) -> PayloadStream {
    // The sender lives as long as the server. If it is dropped first, that counts as a shutdown
    // too.
    let mut drain = Box::pin(async move { draining.wait_for(|draining| *draining).await.is_ok() });
    let mut over = false;
    Box::pin(stream::poll_fn(move |cx| {
        if over {
            return Poll::Ready(None);
        }
        // The drain is polled before the items, so that a stream which always has an item ready
        // ends too.
        if drain.as_mut().poll(cx).is_ready() {
            over = true;
            return Poll::Ready(Some(Err(ConnectError::unavailable(
                "the daemon is shutting down: reconnect, and resume where this stream ended",
            ))));
        }
        items.poll_next_unpin(cx)
    }))
}

/// Refuses a call by its headers, before the handler sees the call.
pub(super) struct RefusalInterceptor(fn(&RequestContext) -> Result<(), ConnectError>);

impl RefusalInterceptor {
    /// Refuses `Authorization`, because a caller whose credentials are ignored would believe that
    /// somebody had checked them.
    pub(super) const CREDENTIALS: Self = Self(credentials);
}

#[async_trait]
impl Interceptor for RefusalInterceptor {
    async fn intercept_unary(
        &self,
        req: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        (self.0)(&req.ctx)?;
        next.run(req).await
    }

    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        (self.0)(&req.ctx)?;
        next.run(req, inbound).await
    }
}

fn credentials(ctx: &RequestContext) -> Result<(), ConnectError> {
    if ctx.header(AUTHORIZATION).is_none() {
        return Ok(());
    }
    Err(ConnectError::unauthenticated(
        "this daemon does not authenticate callers, so the Authorization header cannot be checked: send the request without \
         it; until a version that authenticates, every program that reaches the daemon's address has access",
    ))
}
