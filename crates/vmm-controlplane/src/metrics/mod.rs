//! The measurements of the daemon, and the page on which Prometheus reads them.
//!
//! ```text
//!   rpc/call_meter.rs ── each call ─────────────► calls.rs ───┐
//!   Backend, Vmm ─────── each call, decorated ──► vmms.rs ────┤
//!   Store ────────────── each commit, decorated ► commits.rs ─┼─► Registry ─► page.rs, /metrics
//!   VmService ────────── read at each scrape ───► vms.rs ─────┤
//!   log queue, /proc ─── read at each scrape ───► process.rs ─┘
//! ```
//!
//! A measurement never waits and never fails. A scrape asks no VMM. `docs/observability.md` lists
//! the names, and a test compares the list with the page.

mod calls;
mod commits;
mod page;
mod process;
mod vmms;
mod vms;

use std::sync::Arc;

use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use vmm_core::store::Store;
use vmm_service::VmService;

use crate::backends::DecorateBackend;
use crate::rpc::CallMeter;
use page::MetricsPage;
pub(crate) use page::bind;

/// The upper bounds of all histograms, in seconds: from a commit to a shutdown.
const BOUNDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// The measurements of one daemon.
pub(crate) struct Metrics {
    registry: Registry,
    calls: Arc<calls::CallMetrics>,
    vmms: Arc<vmms::VmmMetrics>,
    commits: Arc<commits::CommitMetrics>,
}

impl Metrics {
    /// Makes all measurements, without the VMs.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let calls = Arc::new(calls::CallMetrics::register(&mut registry));
        let vmms = Arc::new(vmms::VmmMetrics::register(&mut registry));
        let commits = Arc::new(commits::CommitMetrics::register(&mut registry));
        registry.register_collector(Box::new(process::ProcessCollector::of_this_process()));
        Self { registry, calls, vmms, commits }
    }

    /// Returns the meter of the calls, for the server.
    pub(crate) fn call_meter(&self) -> Arc<dyn CallMeter> {
        Arc::clone(&self.calls) as _
    }

    /// Returns the function that adds a measurement to each call of a backend.
    pub(crate) fn decorate_backends(&self) -> DecorateBackend {
        let metrics = Arc::clone(&self.vmms);
        Arc::new(move |backend| Arc::new(vmms::MeasuredBackend::new(backend, Arc::clone(&metrics))))
    }

    /// Returns `store` with a measurement of each commit.
    pub(crate) fn measured_store(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        Arc::new(commits::MeasuredStore::new(store, Arc::clone(&self.commits)))
    }

    /// Adds the VMs of `service`, and returns the page.
    pub(crate) fn page(mut self, service: VmService, with_each_vm: bool) -> MetricsPage {
        self.registry.register_collector(Box::new(vms::VmCollector::new(service, with_each_vm)));
        MetricsPage::new(self.registry)
    }
}

fn histogram() -> Histogram {
    Histogram::new(BOUNDS)
}
