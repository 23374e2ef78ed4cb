//! The requests that are answered even when all others are refused: health, and calls with `force`.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use connectrpc::{ConnectError, RequestContext};
use vmm_proto::v1::VM_SERVICE_SERVICE_NAME;

use super::failure_log;

/// Returns true if a path is served where connections or requests are scarce.
///
/// ShutdownVm and DeleteVm are vital only with `force`, which is in the body. [`require_force`]
/// checks that.
pub(super) fn is_vital(path: &str) -> bool {
    is_health(path)
        || path
            .strip_prefix('/')
            .and_then(|path| path.strip_prefix(VM_SERVICE_SERVICE_NAME))
            .is_some_and(|method| matches!(method, "/ShutdownVm" | "/DeleteVm"))
}

/// Returns true if a path answers only the question of the daemon's health.
pub(super) fn is_health(path: &str) -> bool {
    matches!(path, "/_/health" | "/health" | "/grpc.health.v1.Health/Check")
}

/// The resource that is scarce. It is among the extensions of a request that is served only if it
/// is vital.
#[derive(Clone, Copy, Debug)]
pub(super) enum ScarceResource {
    /// The request came on a connection of last resort.
    NoSlot,
    /// The limit on requests is reached.
    TooManyRequests,
}

impl ScarceResource {
    fn error(self) -> ConnectError {
        ConnectError::resource_exhausted(match self {
            Self::NoSlot => {
                "every connection that the daemon serves, or that this client may have, is in use: close some, or try \
                 again later; until then only the health pages, and ShutdownVm and DeleteVm with force, are served"
            }
            Self::TooManyRequests => {
                "the daemon serves as many requests as it can at once: wait for some of them, or try again later; until \
                 then only the health pages, and ShutdownVm and DeleteVm with force, are served"
            }
        })
    }
}

/// Answers RESOURCE_EXHAUSTED to a request for which there is no room, unless it is vital.
pub(super) async fn check(request: Request, next: Next) -> Response {
    match request.extensions().get::<ScarceResource>().copied() {
        Some(scarcity) if !is_vital(request.uri().path()) => {
            failure_log::refuse(request, scarcity.error()).await
        }
        Some(_) | None => next.run(request).await,
    }
}

/// Refuses a call without `force` where connections or requests are scarce, because the call may
/// take long.
///
/// # Errors
///
/// RESOURCE_EXHAUSTED, which names the scarce resource.
pub fn require_force(ctx: &RequestContext, force: bool) -> Result<(), ConnectError> {
    match ctx.extensions().get::<ScarceResource>() {
        Some(scarcity) if !force => Err(scarcity.error()),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_and_forced_operations_are_vital_requests() {
        for vital in ["/_/health", "/health", "/vmm.v1.VmService/ShutdownVm", "/vmm.v1.VmService/DeleteVm"] {
            assert!(is_vital(vital), "{vital}");
        }
        for other in ["/", "/vmm.v1.VmService/ListVms", "/vmm.v1.VmService/ShutdownVms", "ShutdownVm"] {
            assert!(!is_vital(other), "{other}");
        }
    }
}
