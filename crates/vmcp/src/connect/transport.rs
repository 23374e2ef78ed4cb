//! The transport of requests: HTTP/1.1 over TCP, over TLS and over a unix socket.
//!
//! ```text
//!   http://HOST:PORT  ──► TCP ───────────────┐
//!   https://HOST:PORT ──► TCP ──► TLS ───────┼──► pool of connections ──► requests
//!   unix:///PATH      ──► unix socket ───────┘
//! ```
//!
//! The client of the RPC library can speak TLS, but only with a cryptography library that needs a C
//! compiler and CMake. The daemon uses another one, and so does this transport.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use connectrpc::client::{BoxFuture, ClientBody, ClientTransport};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::tls;
use crate::config::{Endpoint, Server};
use crate::failure::Failure;

/// The longest time for a connection to be made, because a person waits for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Carries requests to one server.
#[derive(Clone)]
pub(crate) struct Transport(Client<Dialer, ClientBody>);

impl Transport {
    /// Returns the transport to a server. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// A file of TLS cannot be used.
    pub(crate) fn to(server: &Server) -> Result<Self, Failure> {
        let tls = match &server.endpoint {
            Endpoint::Https(_) => Some(TlsConnector::from(tls::client_config(&server.tls)?)),
            Endpoint::Http(_) | Endpoint::Unix(_) => None,
        };
        let dialer = Dialer { endpoint: server.endpoint.clone(), tls };
        Ok(Self(Client::builder(TokioExecutor::new()).build(dialer)))
    }
}

impl ClientTransport for Transport {
    type ResponseBody = Incoming;
    type Error = legacy::Error;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Incoming>, legacy::Error>> {
        Box::pin(self.0.request(request))
    }
}

/// Makes connections to one server, whatever the URL of the request.
#[derive(Clone)]
struct Dialer {
    endpoint: Endpoint,
    tls: Option<TlsConnector>,
}

impl Dialer {
    async fn dial(self) -> io::Result<Wire> {
        match (&self.endpoint, self.tls) {
            (Endpoint::Unix(path), _) => Ok(Wire(Box::new(UnixStream::connect(path).await?))),
            (Endpoint::Http(uri), _) => Ok(Wire(Box::new(tcp(uri, 80).await?))),
            (Endpoint::Https(uri), tls) => {
                let stream = tcp(uri, 443).await?;
                // `Transport::to` gives a dialer of https the settings of TLS.
                let tls = tls.ok_or(io::ErrorKind::Unsupported)?;
                let name = ServerName::try_from(host(uri).to_owned()).map_err(io::Error::other)?;
                Ok(Wire(Box::new(tls.connect(name, stream).await.map_err(with_advice)?)))
            }
        }
    }
}

/// Adds the advice to a failed handshake.
fn with_advice(error: io::Error) -> io::Error {
    let is_certificate = error.to_string().contains("peer certificate");
    let advice = if is_certificate { "; --ca names the authority of the server's certificate" } else { "" };
    io::Error::new(error.kind(), format!("TLS: {error}{advice}"))
}

/// Returns the host of a URL. An IPv6 address loses its brackets.
fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
}

async fn tcp(uri: &Uri, default_port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host(uri), uri.port_u16().unwrap_or(default_port))).await?;
    // A key that is typed at a console is sent at once.
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl tower::Service<Uri> for Dialer {
    type Response = TokioIo<Wire>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Wire>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialing = self.clone().dial();
        Box::pin(async move {
            let wire = tokio::time::timeout(CONNECT_TIMEOUT, dialing).await.unwrap_or_else(|_| {
                let text = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            });
            wire.map(TokioIo::new)
        })
    }
}

/// A connection of any kind.
struct Wire(Box<dyn Stream>);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
