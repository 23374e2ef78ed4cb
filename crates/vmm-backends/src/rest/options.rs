//! Checks and conversions that both hypervisors with a REST API share.

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::report::CheckReport;
use vmm_core::spec::{RateLimit, VmSpec};

/// Reports keys that begin with `prefix` (a backend's, with the dot), because none is known, and
/// keys of other backends.
pub fn check_keys(report: &mut CheckReport, spec: &VmSpec, prefix: &str) {
    for option in spec.options.own(prefix, report) {
        report.reject(option.field(), "unknown key: this backend has no keys of its own");
    }
}

/// Returns an error unless every network interface has its TAP, because a guest must not start
/// without one.
///
/// # Errors
/// [`BackendErrorKind::Host`]. No process was started then.
pub fn check_taps(spec: &VmSpec, taps: &[String]) -> Result<(), BackendError> {
    if spec.nics.len() == taps.len() {
        return Ok(());
    }
    let message = format!("the VM has {} network interfaces and {} TAPs", spec.nics.len(), taps.len());
    Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message))
}

/// A rate limiter in the form that both VMMs read. Each bucket is refilled once a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RateLimiter {
    /// The limit of bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// The limit of requests or packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TokenBucket {
    /// The number of tokens in a full bucket.
    pub size: u64,
    /// The time in milliseconds in which an empty bucket fills.
    pub refill_time: u64,
}

impl RateLimiter {
    /// Returns the limiter for `limit`, or `None` if nothing is limited.
    pub fn of(limit: RateLimit) -> Option<Self> {
        let bucket = |size: Option<u64>| size.map(|size| TokenBucket { size, refill_time: 1000 });
        let (bandwidth, ops) = (bucket(limit.bytes_per_second), bucket(limit.operations_per_second));
        (bandwidth.is_some() || ops.is_some()).then_some(Self { bandwidth, ops })
    }
}
