//! Connections: how many, how patient, and how they end.
//!
//! ```text
//!   accepted ──first bytes──► serving ──drain, eviction, idle──► closing ──► closed
//!      │                         │                                  │
//!      └── header_timeout        ├── header_timeout (HTTP/1.1)      └── LEAVING, or drain_timeout: cut
//!                                ├── idle_timeout
//!                                └── no answer to a ping (HTTP/2)
//! ```
//!
//! Which connections are served is decided in [`admission`](super::admission), how long an idle one lasts in
//! [`activity`](super::activity).

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use connectrpc::server::PeerAddr;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{self, Instant};
use tower::ServiceExt as _;
use vmm_host::descriptors;

use super::ServeOptions;
use super::activity::{Activity, Patience, Watched};
use super::admission::Admission;
use super::body::Bodies;
use super::vital::{self, Scarcity};

/// What an HTTP/2 client sends first.
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long to wait for the rest of a preface that arrived in pieces, which hardly ever happens.
const PREFACE_PAUSE: Duration = Duration::from_millis(10);

/// How long to wait after the kernel refused a connection, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The time that a connection has to take leave of its peer, when it is closed for idleness or makes room.
const LEAVING: Duration = Duration::from_secs(1);

/// The connections of last resort that are served at once, beyond those that have a place.
const LAST_RESORT: usize = 32;

/// The times of a connection of last resort: a forced call is answered within 5 s.
const LAST_RESORT_PATIENCE: Patience =
    Patience { header: Duration::from_secs(2), idle: Duration::from_secs(2), once: true };
const LAST_RESORT_TIME: Duration = Duration::from_secs(10);

/// When the kernel asks a silent peer whether it is still there, how often, and how many times before it gives up.
const PEER_SILENT: Duration = Duration::from_secs(60);
const PEER_ASKED: Duration = Duration::from_secs(20);
const PEER_TRIES: u32 = 3;

/// Serves connections until `shutdown` resolves, then lets those under way finish within the drain timeout.
pub(super) async fn run(
    listener: TcpListener,
    app: axum::Router,
    options: &ServeOptions,
    draining: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let server = Arc::new(Server::new(app, options, draining));
    let last_resort = Arc::new(Semaphore::new(LAST_RESORT));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => report(ended),
            (stream, peer, permit) = accept(&listener, &last_resort) => {
                connections.spawn(Arc::clone(&server).serve(stream, peer, permit));
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

/// Waits until one more connection can be dealt with, then for a connection. Safe to drop at any point: nothing accepted
/// is lost.
async fn accept(
    listener: &TcpListener,
    last_resort: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, Option<OwnedSemaphorePermit>) {
    // Closed never: the semaphore lives as long as the server. Without a permit the connection is served all the same.
    let permit = Arc::clone(last_resort).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, permit),
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
    admission: Arc<Admission>,
    patience: Patience,
    bodies: Bodies,
    requests: Arc<Semaphore>,
}

/// One connection, as its requests see it.
struct Connection {
    peer: SocketAddr,
    activity: Arc<Activity>,
    is_last_resort: bool,
}

impl Server {
    fn new(app: axum::Router, options: &ServeOptions, draining: watch::Receiver<bool>) -> Self {
        let mut http = auto::Builder::new(TokioExecutor::new());
        // The idle time and the time of a head are told apart in `Activity`.
        http.http1().timer(TokioTimer::new()).header_read_timeout(None);
        http.http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(options.max_streams)
            .keep_alive_interval(options.keepalive)
            .keep_alive_timeout(options.keepalive);
        Self {
            app,
            http,
            draining,
            admission: Admission::new(options.max_connections, options.max_connections_per_peer),
            patience: Patience { header: options.header_timeout, idle: options.idle_timeout, once: false },
            bodies: Bodies::new(options),
            requests: Arc::new(Semaphore::new(options.max_requests)),
        }
    }

    /// Serves one connection to its end, in a place of its own or as a last resort.
    async fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: Option<OwnedSemaphorePermit>,
    ) {
        let _descriptor = descriptors::Client::new();
        let activity = Activity::new();
        if let Some(_place) = self.admission.admit(peer, &activity) {
            drop(permit);
            let connection = Connection { peer, activity, is_last_resort: false };
            return self.talk(stream, &connection, self.patience).await;
        }
        tracing::debug!(%peer, "every connection is in use: this one gets one answer");
        let connection = Connection { peer, activity, is_last_resort: true };
        let talk = self.talk(stream, &connection, LAST_RESORT_PATIENCE);
        if time::timeout(LAST_RESORT_TIME, talk).await.is_err() {
            tracing::debug!(%peer, "connection cut: as a last resort it took too long");
        }
    }

    /// Speaks HTTP on a connection. Its errors are the peer's doing, so they are worth no more than a debug line.
    async fn talk(&self, stream: TcpStream, connection: &Connection, patience: Patience) {
        let peer = connection.peer;
        let mut draining = self.draining.clone();
        let begun = tokio::select! {
            begun = time::timeout(patience.header, first_bytes(&stream)) => begun,
            () = drain(&mut draining) => return,
            () = connection.activity.evicted() => return,
        };
        let http = match begun {
            Ok(Ok(Some(http))) => http,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => return tracing::debug!(%peer, %error, "connection failed"),
            Err(_elapsed) => return tracing::debug!(%peer, "connection closed: it sent no request in time"),
        };
        if let Err(error) = tune(&stream) {
            tracing::debug!(%peer, %error, "could not set the options of a socket");
        }
        let heads = (http == Http::One).then(|| Arc::clone(&connection.activity));
        let stream = TokioIo::new(Watched::new(stream, heads));
        let service = service_fn(|request| self.answer(request, connection));
        let mut talk = pin!(self.http.serve_connection(stream, service));
        let mut is_draining = false;
        loop {
            let deadline = connection.activity.deadline(patience);
            tokio::select! {
                result = talk.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(%peer, error = &*error, "connection ended early");
                    }
                    return;
                }
                () = drain(&mut draining), if !is_draining => {
                    is_draining = true;
                    talk.as_mut().graceful_shutdown();
                }
                () = connection.activity.changed() => {}
                () = reached(deadline) => {
                    if connection.activity.deadline(patience).is_some_and(|deadline| deadline <= Instant::now()) {
                        tracing::debug!(%peer, "connection closed: it was idle");
                        break;
                    }
                }
                () = connection.activity.evicted() => {
                    tracing::debug!(%peer, "connection closed: it was idle, and others wait");
                    break;
                }
            }
        }
        talk.as_mut().graceful_shutdown();
        // A peer that does not answer the goodbye is cut off.
        let _left = time::timeout(LEAVING, talk).await;
    }

    /// Answers one request.
    fn answer(
        &self,
        request: http::Request<Incoming>,
        connection: &Connection,
    ) -> impl Future<Output = Result<Response, Infallible>> + Send + use<> {
        let is_vital = vital::is_vital(request.uri().path());
        let permit = Arc::clone(&self.requests).try_acquire_owned().ok();
        let scarcity = match &permit {
            _ if connection.is_last_resort => Some(Scarcity::NoPlace),
            None => Some(Scarcity::TooManyRequests),
            Some(_) => None,
        };
        let underway = connection.activity.begin(permit);
        let mut request = self.bodies.guard(request, is_vital);
        request.extensions_mut().insert(PeerAddr(connection.peer));
        if let Some(scarcity) = scarcity {
            request.extensions_mut().insert(scarcity);
        }
        let app = self.app.clone();
        async move { Ok(app.oneshot(request).await?.map(|body| underway.until_sent(body))) }
    }
}

/// Waits for a moment, or for ever if there is none.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Waits for the drain to begin. The sender outlives the server; should it go first, that is a shutdown too.
async fn drain(draining: &mut watch::Receiver<bool>) {
    let _ended_either_way = draining.wait_for(|draining| *draining).await.is_ok();
}

/// Sets the options of an accepted socket.
fn tune(stream: &TcpStream) -> io::Result<()> {
    // Answers are small: without this the kernel would hold some back for 40 ms.
    stream.set_nodelay(true)?;
    // A peer that lost its power closes nothing. HTTP/2 has pings; a watch over HTTP/1.1 has only this.
    sockopt::set_tcp_keepidle(stream, PEER_SILENT)?;
    sockopt::set_tcp_keepintvl(stream, PEER_ASKED)?;
    sockopt::set_tcp_keepcnt(stream, PEER_TRIES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

/// The versions of HTTP that are told apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Http {
    One,
    Two,
}

/// Waits until the peer has sent enough to tell HTTP/1.1 from HTTP/2; `None` if it left instead.
///
/// The library has timeouts for what comes after, and none for this.
async fn first_bytes(stream: &TcpStream) -> io::Result<Option<Http>> {
    let mut seen = [0; H2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut seen).await?;
        if count == 0 {
            return Ok(None);
        }
        if !H2_PREFACE.starts_with(&seen[..count]) {
            return Ok(Some(Http::One));
        }
        if count == seen.len() {
            return Ok(Some(Http::Two));
        }
        // peek() returns at once while there is anything to see, so waiting for more is done here.
        time::sleep(PREFACE_PAUSE).await;
    }
}
