//! Routes requests by path, and answers those whose path, verb or content type is wrong.

use std::convert::Infallible;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use connectrpc::{ConnectError, ConnectRpcService, Dispatcher as _, MethodKind, Protocol};
use futures::future::BoxFuture;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use tower::Service;
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::body::{self, BodyReading};
use super::failure_log::{self, FailureLog};

/// The service of the predecessor, which knew only Cloud Hypervisor. The methods there have the
/// same names as here.
const PREDECESSOR: &str = "cloudhypervisor.v1.VmService";

/// The Content-Type of an answer to a request that belongs to no protocol.
const JSON_OF_NO_PROTOCOL: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

const ACCEPT_POST: HeaderName = HeaderName::from_static("accept-post");

/// Passes calls to the RPC services, and answers everything else with an error and advice.
#[derive(Clone)]
pub(super) struct Router {
    rpc: ConnectRpcService,
}

impl Router {
    pub(super) fn new(rpc: ConnectRpcService) -> Self {
        Self { rpc }
    }

    /// Returns the error about a request's path, verb or content type, before any of its body is
    /// read.
    fn objection(&self, request: &Request) -> Option<PreparedRefusal> {
        let path = request.uri().path().trim_start_matches('/');
        // The path is checked first, then the verb, then the content type, because each check needs
        // the result of the one before: the verbs and content types that fit depend on the method.
        let Some(method) = self.rpc.dispatcher().lookup(path) else {
            return Some(self.unknown_path(path));
        };
        let unary = method.kind == MethodKind::Unary;
        let readable = unary && method.idempotent;
        match *request.method() {
            Method::GET if readable => no_message(request, path),
            Method::POST => wrong_content_type(request, path, unary),
            ref verb => Some(wrong_verb(verb, path, readable)),
        }
    }

    /// Returns true if a method takes a stream of messages, of which each has the limit of one.
    fn takes_stream(&self, request: &Request) -> bool {
        let path = request.uri().path().trim_start_matches('/');
        let method = self.rpc.dispatcher().lookup(path);
        method.is_some_and(|method| {
            matches!(method.kind, MethodKind::ClientStreaming | MethodKind::BidiStreaming)
        })
    }

    /// Returns the error about a path that leads nowhere. The error names the cause: the
    /// predecessor's name, an unknown method, or the whole path.
    fn unknown_path(&self, path: &str) -> PreparedRefusal {
        let (service, method) = path.split_once('/').unwrap_or((path, ""));
        let mut methods: Vec<&str> = self
            .rpc
            .dispatcher()
            .methods()
            .filter_map(|known| known.strip_prefix(service)?.strip_prefix('/'))
            .collect();
        methods.sort_unstable();
        let message = if service == PREDECESSOR {
            format!("/{path} has moved: use /{VM_SERVICE_SERVICE_NAME}/{method}")
        } else if !methods.is_empty() {
            format!("{service} has no method {method:?}; it has {}", methods.join(", "))
        } else {
            format!(
                "there is nothing at /{path}; the API is at /{VM_SERVICE_SERVICE_NAME}/<Method>, the health page at \
                 /_/health"
            )
        };
        ConnectError::unimplemented(message).with_http_status(StatusCode::NOT_FOUND).into()
    }
}

fn wrong_verb(verb: &Method, path: &str, readable: bool) -> PreparedRefusal {
    let allowed = if readable { "GET, POST" } else { "POST" };
    let error =
        ConnectError::method_not_allowed(format!("/{path} is called with {allowed}, not with {verb}"));
    PreparedRefusal { error, header: Some((ALLOW, HeaderValue::from_static(allowed))) }
}

/// Refuses a GET without a message, as a browser sends when somebody types the path.
fn no_message(request: &Request, path: &str) -> Option<PreparedRefusal> {
    let query = request.uri().query().unwrap_or_default();
    let has = |name: &str| query.split('&').any(|part| part.split('=').next() == Some(name));
    if has("message") && has("encoding") {
        return None;
    }
    let error = ConnectError::invalid_argument(format!(
        "a GET has its message in the query and no body: /{path}?connect=v1&encoding=json&message=%7B%7D sends the message \
         {{}}; or send the message with POST"
    ));
    Some(error.into())
}

/// Refuses a Content-Type that belongs to no protocol, or that does not fit the kind of method.
fn wrong_content_type(request: &Request, path: &str, unary: bool) -> Option<PreparedRefusal> {
    let given = request.headers().get(CONTENT_TYPE).map(HeaderValue::to_str);
    let given = match given {
        None => "",
        // The library answers gRPC clients, because it frames the error as gRPC.
        Some(Ok(grpc)) if grpc.starts_with("application/grpc") => return None,
        Some(text) => text.unwrap_or("?"),
    };
    let fits = Protocol::detect(request.headers()).is_some_and(|detected| detected.is_streaming != unary);
    if fits {
        return None;
    }
    let expected = if unary {
        "application/json, application/proto"
    } else {
        "application/connect+json, application/connect+proto"
    };
    let what = if unary { "takes one message" } else { "answers with a stream" };
    let error = ConnectError::unsupported_media_type(format!(
        "/{path} {what}: its Content-Type is one of {expected} (or gRPC's), not {given:?}"
    ));
    Some(PreparedRefusal { error, header: Some((ACCEPT_POST, HeaderValue::from_static(expected))) })
}

/// An answer that is ready before the call is made.
struct PreparedRefusal {
    error: ConnectError,
    header: Option<(HeaderName, HeaderValue)>,
}

impl From<ConnectError> for PreparedRefusal {
    fn from(error: ConnectError) -> Self {
        Self { error, header: None }
    }
}

impl PreparedRefusal {
    async fn answer(self, request: Request) -> Response {
        let outcome = request.extensions().get::<FailureLog>().cloned();
        let mut headers = body::discard_rest(request).await;
        let is_wrong_type = self.error.http_status() == StatusCode::UNSUPPORTED_MEDIA_TYPE;
        let is_of_no_protocol = is_wrong_type && Protocol::detect(&headers).is_none();
        if is_wrong_type {
            // The Content-Type is wrong, so it must not decide the framing of the answer.
            headers.remove(CONTENT_TYPE);
        }
        let mut response = failure_log::answer(outcome.as_ref(), &headers, self.error);
        if is_of_no_protocol {
            // Clients take the plain `application/json` for an error of the Connect protocol. The
            // request belongs to no protocol, so its answer must not claim to belong to one.
            response.headers_mut().insert(CONTENT_TYPE, JSON_OF_NO_PROTOCOL);
        }
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl Service<Request> for Router {
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        if let Some(refusal) = self.objection(&request) {
            return Box::pin(async move { Ok(refusal.answer(request).await) });
        }
        let reading = request.extensions().get::<BodyReading>().cloned().unwrap_or_default();
        if self.takes_stream(&request) {
            reading.allow_stream();
        }
        let outcome = request.extensions().get::<FailureLog>().cloned();
        let headers = request.headers().clone();
        let call = self.rpc.call(request);
        Box::pin(async move {
            // Three kinds of answers arrive here. If the body was given up, the reason is in
            // `BodyReading`. If no interceptor saw the call, the library refused it by itself and
            // nobody has logged that yet. Any other answer comes from a handler, and the
            // interceptors have logged its error.
            let response = call.await?.map(Body::new);
            Ok(match (reading.fault(), outcome) {
                // The library reports every broken body as an internal error, so its answer is
                // replaced.
                (Some(fault), outcome) => failure_log::answer(outcome.as_ref(), &headers, fault),
                (None, Some(outcome)) if !outcome.is_reached() => {
                    failure_log::unreached(&outcome, response).await
                }
                (None, _) => response,
            })
        })
    }
}
