//! The measurement of calls: the number in progress, the code and the time of each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use connectrpc::interceptor::{StreamRequest, StreamResponse, UnaryRequest, UnaryResponse};
use connectrpc::{ConnectError, Interceptor, Next, NextStream, PayloadStream, RequestContext, async_trait};
use futures::StreamExt as _;

/// The code of a call that succeeded.
const OK: &str = "ok";
/// The code of a call that its client gave up.
const GIVEN_UP: &str = "canceled";

/// Receives the measurements of calls. No method waits.
pub trait CallMeter: Send + Sync {
    /// Counts a call that begins. `method` is `SERVICE/METHOD` of a method that exists.
    fn begun(&self, method: &str);
    /// Counts a call that has ended, with its Connect code, or `ok`.
    fn ended(&self, method: &str, code: &'static str, took: Duration);
    /// Counts a request that was refused before it reached a method.
    fn refused(&self, code: &'static str);
}

/// Measures every call that reaches a method.
pub(super) struct MeterInterceptor(Arc<dyn CallMeter>);

impl MeterInterceptor {
    pub(super) fn new(meter: Arc<dyn CallMeter>) -> Self {
        Self(meter)
    }

    fn begin(&self, ctx: &RequestContext) -> MeasuredCall {
        let method = ctx.path().unwrap_or_default().trim_start_matches('/').to_owned();
        self.0.begun(&method);
        MeasuredCall { meter: Arc::clone(&self.0), method, began: Instant::now(), code: GIVEN_UP }
    }
}

/// A call in progress. Its end is counted when the value is dropped. A call that is dropped without
/// a result was given up by its client.
struct MeasuredCall {
    meter: Arc<dyn CallMeter>,
    method: String,
    began: Instant,
    code: &'static str,
}

impl Drop for MeasuredCall {
    fn drop(&mut self) {
        self.meter.ended(&self.method, self.code, self.began.elapsed());
    }
}

#[async_trait]
impl Interceptor for MeterInterceptor {
    async fn intercept_unary(
        &self,
        req: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        let mut call = self.begin(&req.ctx);
        let result = next.run(req).await;
        call.code = result.as_ref().map_or_else(|error| error.code.as_str(), |_| OK);
        result
    }

    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let mut call = self.begin(&req.ctx);
        let response = match next.run(req, inbound).await {
            Ok(response) => response,
            Err(error) => {
                call.code = error.code.as_str();
                return Err(error);
            }
        };
        Ok(response.map_body(|items| until_end(items, call)))
    }
}

/// Returns the stream of `items`, which holds `call` until its end.
fn until_end(items: PayloadStream, call: MeasuredCall) -> PayloadStream {
    Box::pin(futures::stream::unfold((items, call), |(mut items, mut call)| async move {
        let item = items.next().await;
        // An error is the last item. A stream that ends without one has succeeded.
        match &item {
            Some(Ok(_)) => {}
            Some(Err(error)) => call.code = error.code.as_str(),
            None if call.code == GIVEN_UP => call.code = OK,
            None => {}
        }
        item.map(|item| (item, (items, call)))
    }))
}
