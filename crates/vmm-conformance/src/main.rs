//! The server under test of the Connect conformance suite.
//!
//! The suite's runner starts this program once for each combination of protocol, HTTP version and
//! TLS. The program reads one `ServerCompatRequest` from standard input, serves the suite's
//! service by the daemon's own HTTP server, and writes one `ServerCompatResponse` to standard
//! output. The program ends at SIGTERM.
//!
//! ```text
//!   runner ── ServerCompatRequest ──► stdin      compat.rs    the messages and their framing
//!          ◄── ServerCompatResponse ─ stdout     main.rs      the daemon's rpc::serve
//!          ◄══ calls ═══════════════► socket     service.rs   the suite's service
//! ```

mod compat;
mod echo;
mod service;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use vmm_controlplane::rpc::{self, ServeOptions};

use generated::connectrpc::conformance::v1 as pb;
use pb::ConformanceServiceExt as _;
use service::Conformance;

// Lint groups are silenced for generated code only, because the generator chooses its shape.
#[allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    clippy::panic,
    clippy::unwrap_used,
    reason = "generated code"
)]
mod generated {
    ::connectrpc::include_generated!();
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    echo::register_types();
    let request = compat::read_request(std::io::stdin().lock()).context("reading the runner's request")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be watched")?;
    let listener = TcpListener::bind("127.0.0.1:0").await.context("no port of 127.0.0.1 is free")?;
    let address = listener.local_addr()?;
    let response = pb::ServerCompatResponse {
        host: address.ip().to_string(),
        port: u32::from(address.port()),
        ..Default::default()
    };
    compat::write_response(std::io::stdout().lock(), &response).context("answering the runner")?;
    let router = Arc::new(Conformance).register(connectrpc::Router::new());
    let stop = async move {
        terminate.recv().await;
    };
    rpc::serve(listener, router, axum::Router::new(), options(&request), stop).await?;
    Ok(())
}

/// Returns the daemon's own options with the limit that the runner asks for.
fn options(request: &pb::ServerCompatRequest) -> ServeOptions {
    let mut options = ServeOptions { drain_timeout: Duration::from_millis(100), ..Default::default() };
    if request.message_receive_limit > 0 {
        options.max_message_bytes = usize::try_from(request.message_receive_limit).unwrap_or(usize::MAX);
    }
    options
}
