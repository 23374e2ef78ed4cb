//! The smallest HTTP client that shows everything: one connection per request, nothing hidden.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// A whole answer.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: HeaderMap,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {:?}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// A Connect error's code and message.
    pub(crate) fn error(&self) -> (String, String) {
        let json = self.json();
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        (text("code"), text("message"))
    }
}

async fn collect(response: http::Response<hyper::body::Incoming>) -> Reply {
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned().unwrap_or_default();
    Reply { status: parts.status, headers: parts.headers, body: collected.to_bytes(), trailers }
}

/// Sends a request over HTTP/1.1, with a loopback Host unless it has one.
pub(crate) async fn send(addr: SocketAddr, request: Request<Full<Bytes>>) -> Reply {
    send_on(TcpStream::connect(addr).await.unwrap(), &addr.to_string(), request).await
}

/// Sends a request over HTTP/1.1 on a connection of its own, with `host` unless the request has one.
pub(crate) async fn send_on(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    host: &str,
    mut request: Request<Full<Bytes>>,
) -> Reply {
    let host = http::HeaderValue::from_str(host).unwrap();
    request.headers_mut().entry(http::header::HOST).or_insert(host);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let reply = collect(sender.send_request(request).await.unwrap()).await;
    drop(sender);
    driver.abort();
    reply
}

/// Sends a request over HTTP/2 with prior knowledge; its URI must be absolute.
pub(crate) async fn send_h2(addr: SocketAddr, request: Request<Full<Bytes>>) -> Reply {
    let stream = TcpStream::connect(addr).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let reply = collect(sender.send_request(request).await.unwrap()).await;
    driver.abort();
    reply
}

/// A JSON call of a method of VmService.
pub(crate) fn json_call(method: &str, body: &str) -> Request<Full<Bytes>> {
    post(&format!("/vmm.v1.VmService/{method}"), "application/json", body.as_bytes())
}

pub(crate) fn post(uri: &str, content_type: &str, body: &[u8]) -> Request<Full<Bytes>> {
    Request::post(uri)
        .header("content-type", content_type)
        .body(Full::new(Bytes::copy_from_slice(body)))
        .unwrap()
}

pub(crate) fn get(uri: &str) -> Request<Full<Bytes>> {
    Request::get(uri).body(Full::default()).unwrap()
}

/// Puts gRPC's envelope around a message: a flag and the length.
pub(crate) fn envelope(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap());
    framed.put_slice(message);
    framed.freeze()
}
