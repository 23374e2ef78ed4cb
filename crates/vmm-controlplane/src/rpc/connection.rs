//! The life of one connection: its start, its timeouts and its end.
//!
//! ```text
//!   accepted ──TLS, first bytes──► serving ──drain, eviction, idle──► closing ──► closed
//!      │                              │                                  │
//!      └── header_timeout             ├── header_timeout (HTTP/1.1)      └── cut after CLOSE_TIMEOUT
//!                                     ├── idle_timeout                       or drain_timeout
//!                                     └── no answer to a ping (HTTP/2)
//! ```
//!
//! Every [`listener`](super::listener) is treated alike: behind TLS the first bytes are those that
//! TLS has decrypted.
//!
//! The module [`connection_slots`](super::connection_slots) decides which connections get a slot.
//! The module [`activity`](super::activity) computes how long a connection may be idle.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use connectrpc::server::PeerAddr;
use futures::stream::{self, BoxStream, StreamExt as _};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{self, Instant};
use tower::ServiceExt as _;
use vmm_host::descriptors;

use super::ServeOptions;
use super::activity::{ConnectionActivity, IdleTimeouts, WatchedStream};
use super::body::BodyLimits;
use super::connection_slots::ConnectionSlots;
use super::listener::{Accepted, Listener, Transport};
use super::peer::Peer;
use super::vital::{self, ScarceResource};

/// The first bytes that every HTTP/2 client sends.
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The pause after the kernel refused a connection, usually for want of file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// The longest time from the start of a graceful close to the cut, when a connection is closed for
/// idleness or makes room.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The number of connections without a slot that one listener serves at once.
const LAST_RESORT: usize = 32;

/// The timeouts of a connection of last resort. They are short because a forced call is answered
/// within 5 s.
const LAST_RESORT_PATIENCE: IdleTimeouts =
    IdleTimeouts { header: Duration::from_secs(2), idle: Duration::from_secs(2), once: true };
const LAST_RESORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves connections until `shutdown` resolves. The connections that are open then may finish
/// within the drain timeout.
pub(super) async fn run(
    listeners: Vec<Listener>,
    app: axum::Router,
    options: &ServeOptions,
    draining: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let server = Arc::new(ServerState::new(app, options, draining));
    // Each listener has a last resort of its own, so that the clients of one cannot keep the clients
    // of another from health and force.
    let mut accepted = stream::select_all(listeners.into_iter().map(incoming));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            // The order matters. Shutdown comes first, so that a flood of new connections cannot
            // delay it. Ended connections come second, so that their results do not pile up.
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => report(ended),
            Some((connection, permit)) = accepted.next() => {
                connections.spawn(Arc::clone(&server).serve(connection, permit));
            }
        }
    }
    // The listeners close before the wait, so that a new client is refused at once instead of
    // waiting in the backlog of a server that will not accept it.
    drop(accepted);
    wait_or_cut(connections, options.drain_timeout).await;
}

/// Waits for the connections to end by themselves, and cuts those that are still open after
/// `timeout`.
async fn wait_or_cut(mut connections: JoinSet<()>, timeout: Duration) {
    let all_ended = async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    };
    if time::timeout(timeout, all_ended).await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            seconds = timeout.as_secs_f64(),
            "connections were cut, because their calls did not end in time"
        );
        connections.shutdown().await;
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "the task of a connection panicked, which is a defect of this program");
    }
}

/// An accepted connection, and the permit of last resort that was taken for it.
type Admission = (Accepted, Option<OwnedSemaphorePermit>);

/// Accepts the connections of one listener for ever. Dropping the stream closes the listener.
fn incoming(listener: Listener) -> BoxStream<'static, Admission> {
    let last_resort = Arc::new(Semaphore::new(LAST_RESORT));
    let accepting = stream::unfold((listener, last_resort), |(listener, last_resort)| async {
        let admission = accept(&listener, &last_resort).await;
        Some((admission, (listener, last_resort)))
    });
    accepting.boxed()
}

/// Takes a permit of last resort, then accepts a connection.
async fn accept(listener: &Listener, last_resort: &Arc<Semaphore>) -> Admission {
    // The permit is taken before the connection is accepted, because only after the accept is it
    // known whether the connection gets a slot. So there is always room to serve it as a last
    // resort, and at most LAST_RESORT connections without a slot exist at once. Further clients
    // wait in the kernel's backlog. `ok()` hides only the error of a closed semaphore. Nobody
    // closes it, and without a permit the connection would be served all the same.
    let permit = Arc::clone(last_resort).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok(accepted) => return (accepted, permit),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted; the daemon tries again");
                time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

/// The state that all connections share.
struct ServerState {
    app: axum::Router,
    http: auto::Builder<TokioExecutor>,
    draining: watch::Receiver<bool>,
    slots: Arc<ConnectionSlots>,
    timeouts: IdleTimeouts,
    bodies: BodyLimits,
    requests: Arc<Semaphore>,
}

/// The facts about one connection that its requests need.
struct ConnectionFacts {
    peer: Peer,
    activity: Arc<ConnectionActivity>,
    is_last_resort: bool,
}

impl ServerState {
    fn new(app: axum::Router, options: &ServeOptions, draining: watch::Receiver<bool>) -> Self {
        let mut http = auto::Builder::new(TokioExecutor::new());
        // The HTTP/1.1 timer of the library is off, because it has one duration for an idle
        // connection and for a slow head. `ConnectionActivity` distinguishes the two.
        http.http1().timer(TokioTimer::new()).header_read_timeout(None);
        http.http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(options.max_streams)
            .keep_alive_interval(options.keepalive_interval)
            .keep_alive_timeout(options.keepalive_interval);
        Self {
            app,
            http,
            draining,
            slots: ConnectionSlots::new(options.max_connections, options.max_connections_per_peer),
            timeouts: IdleTimeouts {
                header: options.header_timeout,
                idle: options.idle_timeout,
                once: false,
            },
            bodies: BodyLimits::new(options),
            requests: Arc::new(Semaphore::new(options.max_requests)),
        }
    }

    /// Serves one connection to its end, with a slot of its own or as a last resort.
    async fn serve(self: Arc<Self>, accepted: Accepted, permit: Option<OwnedSemaphorePermit>) {
        let peer = accepted.peer;
        let _descriptor = descriptors::CountedClient::new();
        let activity = ConnectionActivity::new();
        // A connection with a slot returns its permit at once, because the permits are for
        // connections without one. A connection without a slot keeps its permit to its end. Its
        // own timeouts are short, and LAST_RESORT_TIME bounds it as a whole, because a peer that
        // sends a body slowly could otherwise hold one of the few permits for long.
        if let Some(_slot) = self.slots.admit(peer, &activity) {
            drop(permit);
            let connection = ConnectionFacts { peer, activity, is_last_resort: false };
            return self.serve_http(accepted, &connection, self.timeouts).await;
        }
        tracing::debug!(%peer, "no connection is free; this one gets one answer");
        let connection = ConnectionFacts { peer, activity, is_last_resort: true };
        let talk = self.serve_http(accepted, &connection, LAST_RESORT_PATIENCE);
        if time::timeout(LAST_RESORT_TIMEOUT, talk).await.is_err() {
            tracing::debug!(%peer, "the connection was cut, because its one answer took too long");
        }
    }

    /// Speaks HTTP on a connection until it ends. Errors are logged at level DEBUG only, because
    /// the peer causes them.
    async fn serve_http(&self, accepted: Accepted, connection: &ConnectionFacts, timeouts: IdleTimeouts) {
        let peer = connection.peer;
        let mut draining = self.draining.clone();
        // Until the first bytes have come there is no HTTP connection that could be closed
        // gracefully. So a drain or an eviction simply drops the socket here. No request has been
        // read by then.
        // One timeout bounds the TLS handshake and the wait for the first bytes, so that a peer that
        // is slow at either cannot hold its slot for longer.
        let begun = tokio::select! {
            begun = time::timeout(timeouts.header, begin(accepted)) => begun,
            () = drain(&mut draining) => return,
            () = connection.activity.evicted() => return,
        };
        let (stream, first) = match begun {
            Ok(Ok(Some(begun))) => begun,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => return tracing::debug!(%peer, %error, "the connection failed"),
            Err(_elapsed) => {
                return tracing::debug!(%peer, "the connection was closed, because it sent no request in time");
            }
        };
        // Only the bytes of HTTP/1.1 show when a head begins, because the bytes of HTTP/2 may
        // belong to any stream or to a ping. So `ConnectionActivity` sees none of HTTP/2.
        let heads = (first[..] != H2_PREFACE[..]).then(|| Arc::clone(&connection.activity));
        let stream = TokioIo::new(WatchedStream::new(first, stream, heads));
        let service = service_fn(|request| self.answer(request, connection));
        let mut talk = pin!(self.http.serve_connection(stream, service));
        // Five events can come, in any order. (1) The connection ends by itself: nothing is left to
        // do. (2) The server drains: the library is asked once to take no further request, and the
        // loop goes on, because requests under way may finish; `wait_or_cut` cuts the connection at
        // the drain timeout. (3) The activity changed: the loop computes the deadline anew. (4) The
        // deadline is reached. A request that begins sends no notice, so the deadline that this
        // turn sleeps for may be outdated, and it is computed once more before the connection is
        // closed. (5) Another connection takes the slot of this connection. `Notify` keeps a notice
        // that comes while nobody waits, so neither (3) nor (5) is lost between two turns.
        let mut is_draining = false;
        loop {
            let deadline = connection.activity.deadline(timeouts);
            tokio::select! {
                result = talk.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(%peer, error = &*error, "the connection ended early");
                    }
                    return;
                }
                () = drain(&mut draining), if !is_draining => {
                    is_draining = true;
                    talk.as_mut().graceful_shutdown();
                }
                () = connection.activity.changed() => {}
                () = wait_until(deadline) => {
                    if connection.activity.deadline(timeouts).is_some_and(|deadline| deadline <= Instant::now()) {
                        tracing::debug!(%peer, "the connection was closed, because it was idle");
                        break;
                    }
                }
                () = connection.activity.evicted() => {
                    tracing::debug!(%peer, "the connection was closed, because it was idle and others wait");
                    break;
                }
            }
        }
        talk.as_mut().graceful_shutdown();
        // A request may have begun between the decision to close and this line. It has LEAVING to
        // end. A peer that does not close its side within that time is cut off by dropping the
        // connection.
        let _left = time::timeout(CLOSE_TIMEOUT, talk).await;
    }

    /// Starts the answer to one request.
    fn answer(
        &self,
        request: http::Request<Incoming>,
        connection: &ConnectionFacts,
    ) -> impl Future<Output = Result<Response, Infallible>> + Send + use<> {
        let is_vital = vital::is_vital(request.uri().path());
        // The request is counted here and not in the future below, because the future may wait
        // before its first poll and the limit must hold from the head on. A request without a
        // permit is not refused here: it carries its `ScarceResource`, and `vital::check` refuses
        // it unless it is vital. `underway` moves into the body of the answer, so that a stream
        // counts as a request until its last byte has been sent.
        let permit = Arc::clone(&self.requests).try_acquire_owned().ok();
        let scarcity = match &permit {
            _ if connection.is_last_resort => Some(ScarceResource::NoSlot),
            None => Some(ScarceResource::TooManyRequests),
            Some(_) => None,
        };
        let underway = connection.activity.begin(permit);
        let mut request = self.bodies.guard(request, is_vital);
        request.extensions_mut().insert(connection.peer);
        if let Peer::Network { address, .. } = connection.peer {
            request.extensions_mut().insert(PeerAddr(address));
        }
        if let Some(scarcity) = scarcity {
            request.extensions_mut().insert(scarcity);
        }
        let app = self.app.clone();
        async move { Ok(app.oneshot(request).await?.map(|body| underway.until_sent(body))) }
    }
}

/// Waits for `deadline`, or for ever if there is none.
async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Waits for the drain to begin. The sender outlives the server. If it is dropped first, that
/// counts as a shutdown too.
async fn drain(draining: &mut watch::Receiver<bool>) {
    let _ended_either_way = draining.wait_for(|draining| *draining).await.is_ok();
}

/// Opens an accepted connection, and reads until the first bytes show whether the peer speaks
/// HTTP/1.1 or HTTP/2. Returns `None` if the peer closed the connection instead.
///
/// The bytes are the whole preface of HTTP/2, or a beginning of anything else. The caller bounds
/// this wait, because the library has timeouts only for what follows.
async fn begin(accepted: Accepted) -> io::Result<Option<(Transport, Bytes)>> {
    let mut stream = accepted.open().await?;
    let mut seen = [0; H2_PREFACE.len()];
    let mut count = 0;
    // A beginning of the preface could still become either version, so more bytes are needed.
    while count < seen.len() && H2_PREFACE.starts_with(&seen[..count]) {
        match stream.read(&mut seen[count..]).await? {
            0 => return Ok(None),
            more => count += more,
        }
    }
    Ok(Some((stream, Bytes::copy_from_slice(&seen[..count]))))
}
