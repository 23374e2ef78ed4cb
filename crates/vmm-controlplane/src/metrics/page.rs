//! The page `/metrics`, on a port of its own.
//!
//! The page is not on the API's port, because a scraper should not be able to control VMs.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::{LoadedConfig, Setting};

/// The number of connections. Further ones wait in the backlog of the socket, so that scrapers
/// cannot take the descriptors of VMs.
const CONNECTIONS: usize = 16;
/// The number of pages that are made at the same time. Further scrapes wait.
const SCRAPES: usize = 2;
/// The time that a client may take to send its request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// The time after which a connection is cut. Prometheus gives a scrape 10 s by default.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause after a failed accept, which fails while the process has no descriptor left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Binds the port of the page, if the page is enabled.
///
/// The second value is a warning about a page that is not served: the default port is taken, as by a
/// second daemon on one host. That daemon serves its API nevertheless.
///
/// # Errors
/// A port that a setting names cannot be bound.
pub(crate) async fn bind(loaded: &LoadedConfig) -> anyhow::Result<(Option<TcpListener>, Option<String>)> {
    let otel = &loaded.config.otel;
    if !otel.prometheus_enabled {
        return Ok((None, None));
    }
    // Without a TCP port of the API the page is for this host alone.
    let host = loaded.config.listen.as_ref().map_or("127.0.0.1", |listen| listen.host.as_str());
    let port = Setting::OtelPrometheusPort;
    let error = match TcpListener::bind((host, otel.prometheus_port)).await {
        Ok(listener) => {
            let address = listener.local_addr()?;
            tracing::info!(%address, "the Prometheus page is served at /metrics");
            return Ok((Some(listener), None));
        }
        Err(error) => error,
    };
    let text = format!(
        "the Prometheus page cannot listen on {host}:{}: {error}; set {} to a free port, or {} to false",
        otel.prometheus_port,
        port.variable(),
        Setting::OtelPrometheusEnabled.variable(),
    );
    if loaded.is_given(port) {
        anyhow::bail!(text);
    }
    tracing::warn!(detail = text, "the Prometheus page is not served");
    Ok((None, Some(text)))
}

/// The page of all measurements.
pub(crate) struct MetricsPage {
    registry: Registry,
    slots: Semaphore,
}

impl MetricsPage {
    pub(super) fn new(registry: Registry) -> Self {
        Self { registry, slots: Semaphore::new(SCRAPES) }
    }

    /// Serves the page until the future is dropped.
    pub(crate) async fn serve(self, listener: TcpListener) {
        let router = Router::new().route("/metrics", get(page)).with_state(Arc::new(self));
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        // The semaphore is never closed.
        while let Ok(slot) = Arc::clone(&connections).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(answer(stream, router.clone(), slot))),
                Err(error) => {
                    tracing::debug!(%error, "the Prometheus page cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
}

/// Answers one request, and closes the connection.
async fn answer(stream: TcpStream, router: Router, slot: OwnedSemaphorePermit) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // An error is the client's: it went away, or it sent something that is not HTTP.
    let _ended = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
    drop(slot);
}

async fn page(State(page): State<Arc<MetricsPage>>) -> Response {
    // Ten scrapers at once make two pages at a time, because a page with many VMs takes a core for
    // some milliseconds.
    let Ok(_slot) = page.slots.acquire().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let mut text = String::new();
    match prometheus_text::encode(&mut text, &page.registry) {
        Ok(()) => ([(CONTENT_TYPE, prometheus_text::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
