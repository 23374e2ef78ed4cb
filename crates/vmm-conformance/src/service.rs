//! The suite's service: each request says which answer it wants.

use std::time::Duration;

use buffa::Message;
use buffa_types::google::protobuf::Any;
use bytes::Bytes;
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt as _, stream};

use crate::echo;
use crate::pb;
use pb::conformance_payload::RequestInfo;
use pb::unary_response_definition::Response as UnaryOutcome;

/// The handlers. They keep nothing between two calls.
pub(crate) struct Conformance;

#[allow(refining_impl_trait, reason = "the types of the answers are plain messages")]
impl pb::ConformanceService for Conformance {
    async fn unary(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::UnaryRequest>,
    ) -> ServiceResult<pb::UnaryResponse> {
        let request = request.to_owned_message();
        let seen = vec![echo::any("UnaryRequest", &request)];
        let payload = single(&ctx, request.response_definition.as_option(), seen).await?;
        Ok(payload.map_body(|payload| pb::UnaryResponse { payload: payload.into(), ..Default::default() }))
    }

    async fn idempotent_unary(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::IdempotentUnaryRequest>,
    ) -> ServiceResult<pb::IdempotentUnaryResponse> {
        let request = request.to_owned_message();
        let seen = vec![echo::any("IdempotentUnaryRequest", &request)];
        let payload = single(&ctx, request.response_definition.as_option(), seen).await?;
        Ok(payload.map_body(|payload| pb::IdempotentUnaryResponse {
            payload: payload.into(),
            ..Default::default()
        }))
    }

    async fn unimplemented(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::UnimplementedRequest>,
    ) -> ServiceResult<pb::UnimplementedResponse> {
        Err(ConnectError::unimplemented("the suite wants this method to be missing"))
    }

    async fn client_stream(
        &self,
        ctx: RequestContext,
        mut requests: InboundStream<pb::ClientStreamRequest>,
    ) -> ServiceResult<pb::ClientStreamResponse> {
        let mut seen = Vec::new();
        let mut definition = None;
        while let Some(request) = requests.next().await {
            let mut request = request?.to_owned_message();
            let is_first = seen.is_empty();
            seen.push(echo::any("ClientStreamRequest", &request));
            if is_first {
                definition = request.response_definition.take();
            }
        }
        let payload = single(&ctx, definition.as_ref(), seen).await?;
        Ok(payload
            .map_body(|payload| pb::ClientStreamResponse { payload: payload.into(), ..Default::default() }))
    }

    async fn server_stream(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::ServerStreamRequest>,
    ) -> ServiceResult<ServiceStream<pb::ServerStreamResponse>> {
        let mut request = request.to_owned_message();
        let seen = vec![echo::any("ServerStreamRequest", &request)];
        let answers = Answers::new(ctx, request.response_definition.take().unwrap_or_default());
        answers.into_response(seen, |payload| pb::ServerStreamResponse {
            payload: payload.into(),
            ..Default::default()
        })
    }

    async fn bidi_stream(
        &self,
        ctx: RequestContext,
        mut requests: InboundStream<pb::BidiStreamRequest>,
    ) -> ServiceResult<ServiceStream<pb::BidiStreamResponse>> {
        let Some(first) = requests.next().await else {
            return Response::stream_ok(stream::empty());
        };
        let mut first = first?.to_owned_message();
        let mut seen = vec![echo::any("BidiStreamRequest", &first)];
        let answers = Answers::new(ctx, first.response_definition.take().unwrap_or_default());
        let respond = |payload: pb::ConformancePayload| pb::BidiStreamResponse {
            payload: payload.into(),
            ..Default::default()
        };
        if first.full_duplex {
            return answers.into_duplex_response(seen, requests, respond);
        }
        while let Some(request) = requests.next().await {
            seen.push(echo::any("BidiStreamRequest", &request?.to_owned_message()));
        }
        answers.into_response(seen, respond)
    }
}

/// Returns the one answer of a unary call or of a stream of requests.
async fn single(
    ctx: &RequestContext,
    definition: Option<&pb::UnaryResponseDefinition>,
    seen: Vec<Any>,
) -> ServiceResult<pb::ConformancePayload> {
    let info = echo::request_info(ctx, seen);
    let Some(definition) = definition else {
        return Response::ok(payload(Bytes::new(), Some(info)));
    };
    let headers = echo::headers(&definition.response_headers)?;
    let trailers = echo::headers(&definition.response_trailers)?;
    tokio::time::sleep(milliseconds(definition.response_delay_ms)).await;
    let data = match &definition.response {
        Some(UnaryOutcome::Error(error)) => {
            let error = echo::error(error, Some(&info));
            return Err(error.with_headers(headers).with_trailers(trailers));
        }
        Some(UnaryOutcome::ResponseData(data)) => data.clone(),
        None => Bytes::new(),
    };
    let mut response = Response::new(payload(data, Some(info)));
    response.headers = headers;
    response.trailers = trailers;
    Ok(response)
}

fn payload(data: Bytes, info: Option<RequestInfo>) -> pb::ConformancePayload {
    pb::ConformancePayload { data, request_info: info.into(), ..Default::default() }
}

fn milliseconds(count: u32) -> Duration {
    Duration::from_millis(count.into())
}

/// The answers of one stream that were not sent yet.
struct Answers {
    ctx: RequestContext,
    definition: pb::StreamResponseDefinition,
    data: std::vec::IntoIter<Bytes>,
    /// True until the first answer, which alone tells the headers and the deadline.
    is_first: bool,
}

impl Answers {
    fn new(ctx: RequestContext, mut definition: pb::StreamResponseDefinition) -> Self {
        let data = std::mem::take(&mut definition.response_data).into_iter();
        Self { ctx, definition, data, is_first: true }
    }

    /// Returns the next answer, or nothing if all were sent. `seen` are the requests since the
    /// answer before.
    async fn next(&mut self, seen: Vec<Any>) -> Option<pb::ConformancePayload> {
        let data = self.data.next()?;
        tokio::time::sleep(milliseconds(self.definition.response_delay_ms)).await;
        let info = if std::mem::take(&mut self.is_first) {
            Some(echo::request_info(&self.ctx, seen))
        } else {
            (!seen.is_empty()).then(|| RequestInfo { requests: seen, ..Default::default() })
        };
        Some(payload(data, info))
    }

    /// Returns the error that ends the stream, if one is wanted.
    fn error(&mut self, seen: Vec<Any>) -> Option<ConnectError> {
        let wanted = self.definition.error.take()?;
        let info = self.is_first.then(|| echo::request_info(&self.ctx, seen));
        Some(echo::error(&wanted, info.as_ref()))
    }

    /// Sends all answers one after the other.
    fn into_response<M: Message + Send + 'static>(
        self,
        seen: Vec<Any>,
        respond: impl Fn(pb::ConformancePayload) -> M + Send + 'static,
    ) -> ServiceResult<ServiceStream<M>> {
        self.into_duplex_response(seen, Box::pin(stream::empty()), respond)
    }

    /// Sends one answer for each request, and the rest after the last request.
    fn into_duplex_response<M: Message + Send + 'static>(
        self,
        seen: Vec<Any>,
        requests: InboundStream<pb::BidiStreamRequest>,
        respond: impl Fn(pb::ConformancePayload) -> M + Send + 'static,
    ) -> ServiceResult<ServiceStream<M>> {
        let headers = echo::headers(&self.definition.response_headers)?;
        let trailers = echo::headers(&self.definition.response_trailers)?;
        let exchange = Exchange { answers: self, seen, requests: requests.fuse(), has_ended: false };
        let items = stream::unfold(exchange, |mut exchange| async {
            let item = exchange.step().await?;
            Some((item, exchange))
        });
        let mut response = Response::stream(items.map(move |item| item.map(&respond)));
        response.headers = headers;
        response.trailers = trailers;
        Ok(response)
    }
}

/// A stream of requests and a stream of answers that alternate.
struct Exchange {
    answers: Answers,
    /// The requests since the last answer.
    seen: Vec<Any>,
    requests: stream::Fuse<InboundStream<pb::BidiStreamRequest>>,
    has_ended: bool,
}

impl Exchange {
    /// Returns the next item for the client.
    async fn step(&mut self) -> Option<Result<pb::ConformancePayload, ConnectError>> {
        if self.has_ended {
            return None;
        }
        // Before each answer but the first a request is read. The answers that are left when the
        // client has sent its last request are sent without one.
        if !self.answers.is_first
            && let Some(request) = self.requests.next().await
        {
            match request {
                Ok(request) => self.seen.push(echo::any("BidiStreamRequest", &request.to_owned_message())),
                Err(error) => {
                    self.has_ended = true;
                    return Some(Err(error));
                }
            }
        }
        let seen = std::mem::take(&mut self.seen);
        if let Some(answer) = self.answers.next(seen.clone()).await {
            return Some(Ok(answer));
        }
        self.has_ended = true;
        self.answers.error(seen).map(Err)
    }
}
