//! The calls of the API, by method and code.

use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::histogram;
use crate::rpc::CallMeter;

/// The label of a method: `vmm.v1.VmService/BootVm`. A request that reaches no method has an empty
/// one, so that a client cannot make labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    method: String,
    code: &'static str,
}

/// The measurements of the calls.
pub(super) struct CallMetrics {
    requests: Family<CallLabels, Counter>,
    durations: Family<CallLabels, Histogram, fn() -> Histogram>,
    active: Family<MethodLabel, Gauge<i64, AtomicI64>>,
}

impl CallMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(histogram),
            active: Family::default(),
        };
        registry.register(
            "rpc_server_requests",
            "Calls that have ended, by method and Connect code",
            metrics.requests.clone(),
        );
        registry.register(
            "rpc_server_request_duration_seconds",
            "Time from the arrival of a call to its end; a stream ends with its last message",
            metrics.durations.clone(),
        );
        registry.register(
            "rpc_server_active_requests",
            "Calls in progress, open streams included",
            metrics.active.clone(),
        );
        metrics
    }
}

impl CallMeter for CallMetrics {
    fn begun(&self, method: &str) {
        self.active.get_or_create(&MethodLabel { method: method.to_owned() }).inc();
    }

    fn ended(&self, method: &str, code: &'static str, took: Duration) {
        self.active.get_or_create(&MethodLabel { method: method.to_owned() }).dec();
        let labels = CallLabels { method: method.to_owned(), code };
        self.requests.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(took.as_secs_f64());
    }

    fn refused(&self, code: &'static str) {
        self.requests.get_or_create(&CallLabels { method: String::new(), code }).inc();
    }
}
