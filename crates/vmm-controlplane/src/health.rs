//! The health pages: `/_/health` in full, `/health` in short.
//!
//! Healthy means that the default backend can serve. The answer comes from memory, and no VMM is
//! asked.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use vmm_service::VmService;

struct HealthState {
    service: VmService,
    started: Instant,
    warnings: Vec<String>,
}

/// The body of `/_/health`. The first four keys are the contract; the others may grow.
#[derive(Serialize)]
struct HealthPage {
    status: &'static str,
    backend: String,
    uptime_seconds: u64,
    version: &'static str,
    /// The commit of the build.
    #[serde(skip_serializing_if = "str::is_empty")]
    commit: &'static str,
    /// The reason for which the default backend cannot serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    backends: Vec<BackendLine>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct BackendLine {
    name: String,
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Returns the pages. The full page shows `warnings` for as long as the daemon runs.
pub fn pages(service: VmService, warnings: Vec<String>) -> Router {
    let health = Arc::new(HealthState { service, started: Instant::now(), warnings });
    Router::new().route("/_/health", get(full)).route("/health", get(short)).with_state(health)
}

async fn full(State(health): State<Arc<HealthState>>) -> Response {
    let reason = problem(&health.service);
    let backends = health.service.backends().statuses().into_iter().map(|status| {
        let (version, reason) = match status.health.version {
            Ok(version) => (Some(version), None),
            Err(reason) => (None, Some(reason)),
        };
        BackendLine {
            name: status.capabilities.name.to_string(),
            available: version.is_some(),
            version,
            reason,
        }
    });
    let page = HealthPage {
        status: status_word(reason.as_ref()),
        backend: health.service.backends().default_name().to_string(),
        uptime_seconds: health.started.elapsed().as_secs(),
        version: crate::VERSION,
        commit: crate::COMMIT,
        backends: backends.collect(),
        warnings: health.warnings.clone(),
        reason,
    };
    (code(page.reason.as_ref()), Json(page)).into_response()
}

async fn short(State(health): State<Arc<HealthState>>) -> Response {
    let reason = problem(&health.service);
    (code(reason.as_ref()), Json(serde_json::json!({ "status": status_word(reason.as_ref()) })))
        .into_response()
}

/// Returns the reason for which the default backend cannot serve, if it cannot. The answer comes
/// from memory, and no VMM is asked.
pub fn problem(service: &VmService) -> Option<String> {
    match service.default_backend() {
        Some(status) => status.health.version.err(),
        None => Some(format!(
            "this version does not serve {}; set UNKEY_VMCP_BACKEND to one of those listed",
            service.backends().default_name()
        )),
    }
}

fn status_word(problem: Option<&String>) -> &'static str {
    if problem.is_some() { "unhealthy" } else { "healthy" }
}

fn code(problem: Option<&String>) -> StatusCode {
    if problem.is_some() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}
