//! The HTTP server in front of the API. It concerns the wire and knows nothing of virtual machines.
//!
//! Each listener answers Connect (JSON and binary, GET for reads), gRPC and gRPC-Web, over HTTP/1.1
//! and HTTP/2, with prior knowledge in clear text and by ALPN under TLS. It also answers the standard gRPC health and reflection services, and the
//! plain pages of the caller. The caller registers its services on a [`connectrpc::Router`] and
//! passes it to [`serve`].
//!
//! ```text
//!   socket ── listener.rs     TCP, TLS (tls.rs), unix socket (unix_socket.rs), and the peer (peer.rs)
//!      │
//!      ├───── connection.rs   header timeouts, idle time, keep-alive pings, drain at shutdown
//!      │      ├ connection_slots.rs   shares of peers, and the last resort for health and force
//!      │      └ activity.rs    the time since when a connection is idle
//!      │
//!      ├───── body.rs         timeouts and memory; reads a body that is too long to its end
//!      ├───── request_id.rs   X-Request-Id in and out, traceparent, one tracing span per request
//!      ├───── host.rs         the Host check against DNS rebinding
//!      ├───── vital.rs        without room only health and force are served
//!      ├───── failure_log.rs  one log line for each failure, and errors that fit into trailers
//!      ▼
//!   paths.rs ── /_/health …  ─────────────► the caller's pages
//!      │    └── /cloudhypervisor.v1.… , unknown path, wrong verb or Content-Type ──► an error
//!      ▼
//!   connectrpc ── call_meter.rs    the number, code and time of the calls
//!      │          ── interceptors.rs  panics → INTERNAL, streams end at shutdown,
//!      │                      Authorization is refused
//!      │
//!      │    entries.rs       refuses requests with too many entries
//!      │    strict_json.rs   refuses unknown and repeated JSON fields and wrong values
//!      ├── builtin.rs         grpc.health.v1.Health, grpc.reflection.v1 and v1alpha
//!      └── vmm.v1.VmService   the caller's handlers
//! ```
//!
//! No answer carries CORS headers, so a browser keeps pages of other origins away from the API.

mod activity;
mod body;
mod builtin;
mod call_meter;
mod connection;
mod connection_slots;
pub(crate) mod entries;
pub mod error;
mod failure_log;
mod host;
mod interceptors;
mod listener;
mod options;
mod paths;
mod peer;
mod request_id;
pub(crate) mod strict_json;
mod syntax;
mod tls;
mod trace_context;
mod unix_socket;
mod values;
mod vital;

use std::future::Future;
use std::sync::Arc;

use connectrpc::{ConnectRpcService, DeadlinePolicy, Limits};
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;

pub use call_meter::CallMeter;
pub use connectrpc_health::{StaticChecker, Status};
pub use host::HostPolicy;
pub use listener::Listener;
pub use options::{IsHealthy, ServeOptions};
pub use request_id::{RequestId, caller, record_vm_id};
pub use tls::{TlsError, TlsFiles, TlsServer};
pub use unix_socket::{UnixSocket, UnixSocketError, UnixSocketOptions};
pub use vital::require_force;

/// The reason for which the server could not begin to serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The reflection service cannot use the compiled-in description of the API, which is a defect
    /// of the build.
    #[error("the API's built-in description can't be served; this build is broken, install another")]
    Reflection(#[from] connectrpc_reflection::ReflectionError),
    /// The compiled-in description of the API cannot be read, which is a defect of the build.
    #[error("the API's built-in description can't be read; this build is broken, install another")]
    Description(#[from] buffa_descriptor::PoolError),
}

/// Serves `router` and the pages of `http` on `listeners` until `shutdown` resolves, then drains.
///
/// At shutdown the health service turns to NOT_SERVING, no new connection is accepted, and streams
/// end with UNAVAILABLE. Calls under way have `options.drain_timeout` to finish before their
/// connections are cut. An operation that a handler started in a task of its own is not affected.
///
/// A fallback set on `http` is replaced, because this server answers unknown paths.
///
/// # Errors
///
/// Errors occur only before the first connection is accepted. Errors of single connections are
/// logged.
pub async fn serve(
    listeners: Vec<Listener>,
    router: connectrpc::Router,
    http: axum::Router,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (drain, draining) = watch::channel(false);
    let live = builtin::LiveHealthChecker::new(&options);
    let router = builtin::install(router, live.clone())?;
    let rpc = rpc_service(router, &options, draining.clone())?;
    // A layer that is added later is further outside. So each request first gets its id and log
    // span, then the guard against panics, then the Host check, and then the check for vital
    // requests. Every refusal therefore carries the id and is logged with it.
    let app = http
        .fallback_service(paths::Router::new(rpc))
        .layer(axum::middleware::from_fn(vital::check))
        .layer(axum::middleware::from_fn_with_state(Arc::new(options.host_policy.clone()), host::check))
        .layer(CatchPanicLayer::custom(interceptors::page_panicked))
        .layer(axum::middleware::from_fn_with_state(
            failure_log::FailureCounts::new(options.call_meter.clone()),
            request_id::attach,
        ));

    let ending = live.clone();
    let shutdown = async move {
        shutdown.await;
        // The health changes before the drain begins, because the drain ends the streams on which
        // clients watch the health.
        ending.end();
        drain.send_replace(true);
    };
    let tls: Vec<_> = listeners.iter().filter_map(Listener::tls).collect();
    let reloading = futures::future::join_all(tls.into_iter().map(TlsServer::reload_forever));
    let forever = async { tokio::join!(live.poll_forever(), reloading) };
    tokio::select! {
        () = connection::run(listeners, app, &options, draining, shutdown) => {}
        _ = forever => {}
    }
    Ok(())
}

/// Wraps the services in the limits and guards that hold for every call.
fn rpc_service(
    router: connectrpc::Router,
    options: &ServeOptions,
    draining: watch::Receiver<bool>,
) -> Result<ConnectRpcService, ServeError> {
    let strict_json = strict_json::JsonShapeInterceptor::new(vmm_proto::FILE_DESCRIPTOR_SET)?;
    let limits = Limits::default()
        .with_max_message_size(options.max_message_bytes)
        .with_max_request_body_size(options.max_body_bytes());
    // A call without a deadline gets the longest one, so that nothing holds a connection for ever.
    // A stream is bounded only until its first message, because a watch is meant to last.
    let deadlines = DeadlinePolicy::new()
        .with_max(options.max_call_timeout)
        .with_default_timeout(options.max_call_timeout);
    let service = ConnectRpcService::new(router).with_limits(limits).with_deadline_policy(deadlines);
    // The first interceptor is the outermost, so the meter sees the code that the client gets.
    let service = match options.call_meter.clone() {
        Some(meter) => service.with_interceptor(call_meter::MeterInterceptor::new(meter)),
        None => service,
    };
    Ok(service
        .with_interceptor(interceptors::PanicInterceptor)
        .with_interceptor(interceptors::DrainInterceptor::new(draining))
        .with_interceptor(failure_log::ErrorInterceptor)
        .with_interceptor(interceptors::RefusalInterceptor::CREDENTIALS)
        .with_interceptor(strict_json))
}
