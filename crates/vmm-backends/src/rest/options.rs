//! What is asked of every backend's `check` alike: keys of the free maps.

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::config::Options;
use vmm_core::report::Report;
use vmm_core::spec::{OptionScope, RateLimit, VmSpec, scope_of};

/// Reports keys that bear `prefix` (a backend's, with the dot), of which none is known, and those of other backends.
pub fn check_keys(report: &mut Report, spec: &VmSpec, prefix: &str) {
    check_map(report, "config.cpu.features", &spec.cpu.features, prefix);
    check_map(report, "config.memory.backing", &spec.memory.backing, prefix);
    check_map(report, "config.boot.boot_options", &spec.boot.options, prefix);
    for disk in &spec.disks {
        check_map(report, &format!("{}.options", disk.field()), &disk.options, prefix);
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        check_map(report, &format!("config.network[{index}].options"), &nic.options, prefix);
    }
}

fn check_map(report: &mut Report, field: &str, options: &Options, own: &str) {
    for key in options.keys() {
        match scope_of(key) {
            OptionScope::Plain => {}
            OptionScope::Backend(prefix, _) if prefix == own => {
                report.reject(
                    format!("{field}[\"{key}\"]"),
                    "unknown key: this backend has no keys of its own",
                );
            }
            OptionScope::Backend(..) => {
                report.warn(format!("{field}[\"{key}\"]"), "is not used: it concerns another backend");
            }
        }
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
