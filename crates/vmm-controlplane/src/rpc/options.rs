//! What the caller may decide about the server; every default is meant for production.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::envelope;
use connectrpc_health::{HEALTH_SERVICE_NAME, StaticChecker};
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::HostPolicy;

/// How [`serve`](super::serve) behaves.
#[derive(Clone)]
pub struct ServeOptions {
    /// Which `Host` is served. Default: loopback names and IP addresses.
    pub host_policy: HostPolicy,
    /// What the gRPC health service answers. Keep a clone to change it. Default: everything serves.
    pub health: Arc<StaticChecker>,
    /// The longest request message in bytes, after decompression, on every protocol. Default: 4 MiB.
    pub max_message_bytes: usize,
    /// How long a client may take to send a request's head. Default: 10 s.
    pub header_timeout: Duration,
    /// How long a request's body may stall between two pieces. Default: 30 s.
    pub body_idle_timeout: Duration,
    /// The longest deadline of a call; also that of a call which names none. Default: 1 h.
    pub max_deadline: Duration,
    /// How long calls under way may go on after the shutdown signal. Default: 10 s.
    pub drain_timeout: Duration,
    /// Connections served at once; more wait in the kernel's queue. Default: 1024.
    pub max_connections: usize,
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
            max_message_bytes: 4 << 20,
            header_timeout: Duration::from_secs(10),
            body_idle_timeout: Duration::from_secs(30),
            max_deadline: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(10),
            max_connections: 1024,
            keepalive: Duration::from_secs(20),
        }
    }
}
