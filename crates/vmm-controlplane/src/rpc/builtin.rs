//! The services that every gRPC server is expected to have: health and reflection.

use std::sync::Arc;

use connectrpc::Router;
use connectrpc_health::{HealthExt as _, HealthService, StaticChecker};
use connectrpc_reflection::{ReflectionError, Reflector};

/// Adds `grpc.health.v1.Health` and both versions of `grpc.reflection` to the caller's services.
pub(super) fn install(router: Router, health: Arc<StaticChecker>) -> Result<Router, ReflectionError> {
    let health = Arc::new(HealthService::from_arc(health));
    let router =
        connectrpc_health::apply_request_limits(health.register(router), connectrpc_health::request_limits());
    let reflector = Reflector::from_descriptor_set_bytes(vmm_proto::FILE_DESCRIPTOR_SET)?;
    Ok(connectrpc_reflection::install(router, reflector))
}
