//! What the caller may decide about the server; every default is meant for production.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::envelope;
use connectrpc_health::{HEALTH_SERVICE_NAME, StaticChecker};
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::HostPolicy;

/// Tells whether the API can serve. Called often, and from several threads, so it must not wait.
pub type IsHealthy = Arc<dyn Fn() -> bool + Send + Sync>;

/// How [`serve`](super::serve) behaves.
#[derive(Clone)]
pub struct ServeOptions {
    /// Which `Host` is served. Default: loopback names and IP addresses.
    pub host_policy: HostPolicy,
    /// What the gRPC health service answers. Keep a clone to change it. Default: everything serves.
    pub health: Arc<StaticChecker>,
    /// Tells whether the API can serve, where the gRPC health service is to ask. Default: it is what `health` says.
    pub is_healthy: Option<IsHealthy>,
    /// The longest request message in bytes, after decompression, on every protocol. Default: 4 MiB.
    pub max_message_bytes: usize,
    /// How long a client may take to send a request's head. Default: 10 s.
    pub header_timeout: Duration,
    /// The time for which a connection may be idle between two requests, if no other one needs its place. Default: 120 s.
    ///
    /// Longer than the 60 to 75 s of usual proxies, so that those close first and never send into a closing connection.
    pub idle_timeout: Duration,
    /// How long a request's body may stall between two pieces. Default: 30 s.
    pub body_idle_timeout: Duration,
    /// The time that a request's body may take as a whole. Default: 60 s.
    pub body_timeout: Duration,
    /// The memory for the bodies of all requests under way, in bytes. Default: 64 MiB.
    pub max_bytes_in_flight: usize,
    /// The longest deadline of a call; also that of a call which names none. Default: 1 h.
    pub max_deadline: Duration,
    /// How long calls under way may go on after the shutdown signal. Default: 10 s.
    pub drain_timeout: Duration,
    /// Connections that have a place of their own. Beyond them idle ones make room, and where there is none, health and
    /// force are served. Default: 1024.
    pub max_connections: usize,
    /// The places that one peer may have, if it is another host. Default: 256.
    pub max_connections_per_peer: usize,
    /// Streams that one HTTP/2 connection may have open. Default: 1000.
    pub max_streams: u32,
    /// Requests served at once, streams and waiting calls included. Default: 4096.
    pub max_requests: usize,
    /// How often an HTTP/2 peer is asked whether it is still there, and how long it has to answer. Default: 20 s.
    pub keepalive: Duration,
}

impl ServeOptions {
    /// The longest request body: one message and the envelope that framed protocols put before it.
    pub(super) fn max_body_bytes(&self) -> usize {
        self.max_message_bytes.saturating_add(envelope::HEADER_SIZE)
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            host_policy: HostPolicy::default(),
            health: Arc::new(StaticChecker::with_services([VM_SERVICE_SERVICE_NAME, HEALTH_SERVICE_NAME])),
            is_healthy: None,
            max_message_bytes: 4 << 20,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            body_idle_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            max_bytes_in_flight: 64 << 20,
            max_deadline: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(10),
            max_connections: 1024,
            max_connections_per_peer: 256,
            max_streams: 1000,
            max_requests: 4096,
            keepalive: Duration::from_secs(20),
        }
    }
}
