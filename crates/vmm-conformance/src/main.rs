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
use bytes::Bytes;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use vmm_controlplane::rpc::{self, Listener, ServeOptions, TlsFiles, TlsServer};

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
    let folder = tempfile::tempdir().context("a folder for the certificates cannot be made")?;
    let (listener, pem_cert) = match tls_files(&request, &folder).context("writing the certificates")? {
        Some(files) => {
            let pem_cert = request.server_creds.cert.clone();
            (Listener::Tls(listener, TlsServer::load(files)?), pem_cert)
        }
        None => (listener.into(), Bytes::new()),
    };
    let response = pb::ServerCompatResponse {
        host: address.ip().to_string(),
        port: u32::from(address.port()),
        pem_cert,
        ..Default::default()
    };
    compat::write_response(std::io::stdout().lock(), &response).context("answering the runner")?;
    let router = Arc::new(Conformance).register(connectrpc::Router::new());
    let stop = async move {
        terminate.recv().await;
    };
    rpc::serve(vec![listener], router, axum::Router::new(), options(&request), stop).await?;
    Ok(())
}

/// Writes the certificates of the runner into `folder`, because the daemon reads files. Returns
/// `None` where the runner wants no TLS.
fn tls_files(request: &pb::ServerCompatRequest, folder: &TempDir) -> std::io::Result<Option<TlsFiles>> {
    if !request.use_tls {
        return Ok(None);
    }
    let write = |name: &str, pem: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, pem).map(|()| path)
    };
    let client_ca = &request.client_tls_cert;
    Ok(Some(TlsFiles {
        certificate: write("cert.pem", &request.server_creds.cert)?,
        key: write("key.pem", &request.server_creds.key)?,
        client_ca: if client_ca.is_empty() { None } else { Some(write("ca.pem", client_ca)?) },
    }))
}

/// Returns the daemon's own options with the limit that the runner asks for.
fn options(request: &pb::ServerCompatRequest) -> ServeOptions {
    let mut options = ServeOptions { drain_timeout: Duration::from_millis(100), ..Default::default() };
    if request.message_receive_limit > 0 {
        options.max_message_bytes = usize::try_from(request.message_receive_limit).unwrap_or(usize::MAX);
    }
    options
}
