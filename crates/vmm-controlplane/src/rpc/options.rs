//! The options of the server. Every default is meant for production.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::envelope;
use connectrpc_health::{HEALTH_SERVICE_NAME, StaticChecker};
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::{CallMeter, HostPolicy};

/// Returns true if the API can serve. The function is called often and from several threads, so it
/// must not wait.
pub type IsHealthy = Arc<dyn Fn() -> bool + Send + Sync>;

/// The options of [`serve`](super::serve).
#[derive(Clone)]
pub struct ServeOptions {
    /// The values of `Host` that are served. Default: loopback names and IP addresses.
    pub host_policy: HostPolicy,
    /// The answers of the gRPC health service. Keep a clone to change them. Default: everything
    /// serves.
    pub health: Arc<StaticChecker>,
    /// The function that the gRPC health service asks. Default: none, and `health` decides alone.
    pub is_healthy: Option<IsHealthy>,
    /// The receiver of the measurements of calls. Default: none.
    pub call_meter: Option<Arc<dyn CallMeter>>,
    /// The longest request message in bytes, after decompression, on every protocol. Default: 4
    /// MiB.
    pub max_message_bytes: usize,
    /// The time that a client may take to send a request's head. Default: 10 s.
    pub header_timeout: Duration,
    /// The time for which a connection may be idle between two requests, if no other connection
    /// needs its slot. Default: 120 s.
    ///
    /// The default is longer than the 60 to 75 s of usual proxies, so that proxies close first and
    /// never send into a closing connection.
    pub idle_timeout: Duration,
    /// The longest pause between two pieces of a request's body. Default: 30 s.
    pub body_idle_timeout: Duration,
    /// The time that a request's body may take as a whole. Default: 60 s.
    pub body_timeout: Duration,
    /// The memory for the bodies of all requests under way, in bytes. Default: 64 MiB.
    pub max_bytes_in_flight: usize,
    /// The longest deadline of a call, and the deadline of a call that names none. Default: 1 h.
    pub max_call_timeout: Duration,
    /// The time for which calls under way may go on after the shutdown signal. Default: 10 s.
    pub drain_timeout: Duration,
    /// The number of connections that have a slot of their own. Beyond that number a new
    /// connection takes the slot of an idle one. If none is idle, only health and force are
    /// served. Default: 1024.
    pub max_connections: usize,
    /// The number of slots for one peer that is another host. Default: 256.
    pub max_connections_per_peer: usize,
    /// The number of streams that one HTTP/2 connection may have open. Default: 1000.
    pub max_streams: u32,
    /// The number of requests served at once, including streams and waiting calls. Default: 4096.
    pub max_requests: usize,
    /// The interval between the pings to an HTTP/2 peer, and the time that the peer has to answer
    /// one. Default: 20 s.
    pub keepalive_interval: Duration,
}

impl ServeOptions {
    /// Returns the longest request body in bytes: one message and the envelope that framed
    /// protocols put before it.
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
            call_meter: None,
            max_message_bytes: 4 << 20,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            body_idle_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            max_bytes_in_flight: 64 << 20,
            max_call_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(10),
            max_connections: 1024,
            max_connections_per_peer: 256,
            max_streams: 1000,
            max_requests: 4096,
            keepalive_interval: Duration::from_secs(20),
        }
    }
}
