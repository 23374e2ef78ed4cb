//! What is asked of every backend's `check` alike: keys of the free maps.

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::report::Report;
use vmm_core::spec::{RateLimit, VmSpec};

/// Reports keys that bear `prefix` (a backend's, with the dot), of which none is known, and those of other backends.
pub fn check_keys(report: &mut Report, spec: &VmSpec, prefix: &str) {
    for option in spec.options.own(prefix, report) {
        report.reject(option.field(), "unknown key: this backend has no keys of its own");
    }
}

/// Makes sure that every network interface has its TAP, lest a guest start without one.
///
/// # Errors
/// [`BackendErrorKind::Host`], before anything was started.
pub fn check_taps(spec: &VmSpec, taps: &[String]) -> Result<(), BackendError> {
    if spec.nics.len() == taps.len() {
        return Ok(());
    }
    let message = format!("the VM has {} network interfaces and {} TAPs", spec.nics.len(), taps.len());
    Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message))
}

/// A limiter in the form that both VMMs share: what may pass in a second, refilled each second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TokenBucket {
    /// Tokens that it holds.
    pub size: u64,
    /// Milliseconds in which it fills.
    pub refill_time: u64,
}

impl RateLimiter {
    /// The limiter for `limit`, or none where nothing is limited.
    pub fn of(limit: RateLimit) -> Option<Self> {
        let bucket = |size: Option<u64>| size.map(|size| TokenBucket { size, refill_time: 1000 });
        let (bandwidth, ops) = (bucket(limit.bytes_per_second), bucket(limit.operations_per_second));
        (bandwidth.is_some() || ops.is_some()).then_some(Self { bandwidth, ops })
    }
}
