//! Connections: how many, how patient, and how they end.
//!
//! ```text
//!   waiting for a slot ──► accepted ──first bytes──► serving ──drain──► finishing ──► closed
//!                             │                         │                  │
//!                             └── header_timeout        └── header_timeout └── drain_timeout: cut
//!                                                           (head of a request, idle HTTP/1.1)
//!                                                           no answer to a ping (HTTP/2)
//! ```

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::server::PeerAddr;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time;
use tower::ServiceExt as _;

use super::{ServeOptions, body};

/// What an HTTP/2 client sends first.
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long to wait for the rest of a preface that arrived in pieces, which hardly ever happens.
const PREFACE_PAUSE: Duration = Duration::from_millis(10);

/// How long to wait after the kernel refused a connection, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until `shutdown` resolves, then lets those under way finish within the drain timeout.
pub(super) async fn run(
    listener: TcpListener,
    app: axum::Router,
    options: &ServeOptions,
    draining: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let server = Arc::new(Server::new(app, options, draining));
    let slots = Arc::new(Semaphore::new(options.max_connections));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => report(ended),
            (stream, peer, slot) = accept(&listener, &slots) => {
                let server = Arc::clone(&server);
                connections.spawn(async move {
                    server.serve(stream, peer).await;
                    drop(slot);
                });
            }
        }
    }
    drop(listener);
    finish(connections, options.drain_timeout).await;
}

/// Waits for the connections to end by themselves, and cuts those that do not in time.
async fn finish(mut connections: JoinSet<()>, timeout: Duration) {
    let all_ended = async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    };
    if time::timeout(timeout, all_ended).await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            seconds = timeout.as_secs_f64(),
            "cutting connections whose calls did not finish in time"
        );
        connections.shutdown().await;
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection ended in a defect of this program");
    }
}

/// Waits for a free slot, then for a connection. Safe to drop at any point: nothing accepted is lost.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, Option<OwnedSemaphorePermit>) {
    if slots.available_permits() == 0 {
        tracing::warn!("all connection slots are taken: new connections wait");
    }
    // Closed never: the semaphore lives as long as the server. Without a permit the connection is served all the same.
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, slot),
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection; trying again");
                time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// What all connections share.
struct Server {
    app: axum::Router,
    http: auto::Builder<TokioExecutor>,
    draining: watch::Receiver<bool>,
    header_timeout: Duration,
    body_idle_timeout: Duration,
    max_body: usize,
}

impl Server {
    fn new(app: axum::Router, options: &ServeOptions, draining: watch::Receiver<bool>) -> Self {
        let mut http = auto::Builder::new(TokioExecutor::new());
        http.http1().timer(TokioTimer::new()).header_read_timeout(options.header_timeout);
        http.http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(options.keepalive)
            .keep_alive_timeout(options.keepalive);
        Self {
            app,
            http,
            draining,
            header_timeout: options.header_timeout,
            body_idle_timeout: options.body_idle_timeout,
            max_body: options.max_body_bytes(),
        }
    }

    /// Serves one connection to its end. Its errors are the peer's doing, so they are worth no more than a debug line.
    async fn serve(&self, stream: TcpStream, peer: SocketAddr) {
        let mut draining = self.draining.clone();
        let begun = tokio::select! {
            begun = time::timeout(self.header_timeout, first_bytes(&stream)) => begun,
            () = drain(&mut draining) => return,
        };
        match begun {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return,
            Ok(Err(error)) => return tracing::debug!(%peer, %error, "connection failed"),
            Err(_elapsed) => return tracing::debug!(%peer, "connection closed: it sent no request in time"),
        }
        // Answers are small: without this the kernel would hold some back for 40 ms.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "could not set TCP_NODELAY");
        }
        let service = service_fn(|request| self.answer(request, peer));
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = drain(&mut draining) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%peer, error = &*error, "connection ended early");
        }
    }

    fn answer(
        &self,
        request: http::Request<Incoming>,
        peer: SocketAddr,
    ) -> impl Future<Output = Result<axum::response::Response, std::convert::Infallible>> + Send + use<> {
        let mut request = body::guard(request, self.max_body, self.body_idle_timeout);
        request.extensions_mut().insert(PeerAddr(peer));
        self.app.clone().oneshot(request)
    }
}

/// Waits for the drain to begin. The sender outlives the server; should it go first, that is a shutdown too.
async fn drain(draining: &mut watch::Receiver<bool>) {
    let _ended_either_way = draining.wait_for(|draining| *draining).await.is_ok();
}

/// Waits until the peer has sent enough to tell HTTP/1.1 from HTTP/2; false if it left instead.
///
/// The library has timeouts for what comes after, and none for this.
async fn first_bytes(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; H2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut seen).await?;
        if count == 0 {
            return Ok(false);
        }
        if count == seen.len() || !H2_PREFACE.starts_with(&seen[..count]) {
            return Ok(true);
        }
        // peek() returns at once while there is anything to see, so waiting for more is done here.
        time::sleep(PREFACE_PAUSE).await;
    }
}
