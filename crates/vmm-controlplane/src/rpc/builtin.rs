//! The services that every gRPC server is expected to have: health and reflection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use connectrpc::{ConnectError, Router};
use connectrpc_health::{Checker, HealthExt as _, HealthService, StaticChecker, Status, StatusStream};
use connectrpc_reflection::{ReflectionError, Reflector};
use tokio::time;
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::ServeOptions;
use super::options::IsHealthy;

/// The interval at which the health is checked for the clients that watch it.
const HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Adds `grpc.health.v1.Health` and both versions of `grpc.reflection` to the caller's services.
pub(super) fn install(router: Router, health: LiveHealthChecker) -> Result<Router, ReflectionError> {
    let health = Arc::new(HealthService::new(health));
    let router =
        connectrpc_health::apply_request_limits(health.register(router), connectrpc_health::request_limits());
    let reflector = Reflector::from_descriptor_set_bytes(vmm_proto::FILE_DESCRIPTOR_SET)?;
    Ok(connectrpc_reflection::install(router, reflector))
}

/// Answers the gRPC health service with the state that the health page shows, until the server
/// ends.
#[derive(Clone)]
pub(super) struct LiveHealthChecker {
    known: Arc<StaticChecker>,
    is_healthy: Option<IsHealthy>,
    /// True once the server ends. The lock is held while the health is set, so that a late check
    /// cannot overwrite NOT_SERVING.
    ended: Arc<Mutex<bool>>,
}

impl LiveHealthChecker {
    pub(super) fn new(options: &ServeOptions) -> Self {
        Self {
            known: Arc::clone(&options.health),
            is_healthy: options.is_healthy.clone(),
            ended: Arc::default(),
        }
    }

    /// Reports NOT_SERVING from now on, because the server ends.
    pub(super) fn end(&self) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended = true;
        self.known.shutdown();
    }

    /// Checks the health at every [`HEALTH_CHECK_INTERVAL`], so that clients that watch it receive
    /// a change.
    pub(super) async fn poll_forever(self) {
        loop {
            self.poll_once();
            time::sleep(HEALTH_CHECK_INTERVAL).await;
        }
    }

    fn poll_once(&self) {
        let Some(is_healthy) = &self.is_healthy else { return };
        let status = if is_healthy() { Status::Serving } else { Status::NotServing };
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if *ended {
            return;
        }
        for service in ["", VM_SERVICE_SERVICE_NAME] {
            if let Err(error) = self.known.set_status(service, status) {
                tracing::error!(%error, "the gRPC health service does not know a service of this program");
            }
        }
    }
}

impl Checker for LiveHealthChecker {
    async fn check(&self, service: &str) -> Result<Status, ConnectError> {
        self.poll_once();
        self.known.check(service).await
    }

    async fn watch(&self, service: &str) -> Result<StatusStream, ConnectError> {
        self.poll_once();
        self.known.watch(service).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_shuts_down_is_not_serving() {
        let options = ServeOptions { is_healthy: Some(Arc::new(|| true)), ..ServeOptions::default() };
        let live = LiveHealthChecker::new(&options);
        assert_eq!(live.check("").await.unwrap(), Status::Serving);
        live.end();
        for service in ["", VM_SERVICE_SERVICE_NAME] {
            assert_eq!(live.check(service).await.unwrap(), Status::NotServing);
        }
    }
}
