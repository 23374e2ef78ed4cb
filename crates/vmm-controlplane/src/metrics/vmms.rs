//! The calls to VMMs, by backend and call.
//!
//! The start of a spare VMM is not measured, and neither are the calls to a VMM that a
//! [`Discoverer`] found, until the daemon is started anew and adopts that VMM.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, ConsoleInput, GuestState,
    LadderOptions, LaunchRequest, LaunchedVmm, ResetOutcome, Sample, SpareVmms, SweepRequest, Vmm,
};
use vmm_core::discovery::{Discoverer, Places};
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;

use super::histogram;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmmCallLabels {
    backend: String,
    call: &'static str,
    outcome: &'static str,
}

/// The measurements of the calls to VMMs.
pub(super) struct VmmMetrics {
    durations: Family<VmmCallLabels, Histogram, fn() -> Histogram>,
}

impl VmmMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self { durations: Family::new_with_constructor(histogram) };
        registry.register(
            "vmcp_vmm_call_duration_seconds",
            "Time of a call to a hypervisor, by backend, call and outcome",
            metrics.durations.clone(),
        );
        metrics
    }
}

/// The measurements of one backend.
#[derive(Clone)]
struct BackendMeter {
    name: String,
    metrics: Arc<VmmMetrics>,
}

impl BackendMeter {
    /// Awaits `call` and measures its time. A call that is dropped before its end is not measured.
    async fn measure<T, E>(
        &self,
        call: &'static str,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let begun = Instant::now();
        let result = future.await;
        let outcome = if result.is_ok() { "done" } else { "failed" };
        let labels = VmmCallLabels { backend: self.name.clone(), call, outcome };
        self.metrics.durations.get_or_create(&labels).observe(begun.elapsed().as_secs_f64());
        result
    }

    fn measured(&self, launched: LaunchedVmm) -> LaunchedVmm {
        let LaunchedVmm { vmm, events } = launched;
        LaunchedVmm { vmm: Arc::new(MeasuredVmm { inner: vmm, meter: self.clone() }), events }
    }
}

/// A backend whose calls are measured.
pub(super) struct MeasuredBackend {
    inner: Arc<dyn Backend>,
    meter: BackendMeter,
}

impl MeasuredBackend {
    pub(super) fn new(inner: Arc<dyn Backend>, metrics: Arc<VmmMetrics>) -> Self {
        let name = inner.capabilities().name.to_string();
        Self { inner, meter: BackendMeter { name, metrics } }
    }
}

#[async_trait]
impl Backend for MeasuredBackend {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        self.inner.check(spec)
    }

    fn advise_on_host(&self, spec: &VmSpec, report: &mut CheckReport) {
        self.inner.advise_on_host(spec, report);
    }

    fn kernel_args(&self, spec: &VmSpec) -> String {
        self.inner.kernel_args(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        let launched = self.meter.measure("launch", self.inner.launch(request)).await?;
        Ok(self.meter.measured(launched))
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        Ok(match self.meter.measure("adopt", self.inner.adopt(request)).await? {
            Adoption::Alive { launched, guest } => {
                Adoption::Alive { launched: self.meter.measured(launched), guest }
            }
            Adoption::Unreachable { reason, message, launched } => Adoption::Unreachable {
                reason,
                message,
                launched: launched.map(|launched| self.meter.measured(launched)),
            },
            gone @ Adoption::Gone { .. } => gone,
        })
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.meter.measure("sweep", self.inner.sweep(request)).await
    }

    async fn ping(&self) -> BackendHealth {
        self.inner.ping().await
    }

    fn places(&self) -> Places {
        self.inner.places()
    }

    fn kind_of_new(&self, uid: VmUid) -> VmKind {
        self.inner.kind_of_new(uid)
    }

    fn serves(&self, kind: &VmKind) -> bool {
        self.inner.serves(kind)
    }

    fn spares(&self) -> Option<&dyn SpareVmms> {
        self.inner.spares()
    }

    fn discovery(&self) -> Option<&dyn Discoverer> {
        self.inner.discovery()
    }
}

/// The handle of a run whose calls are measured.
struct MeasuredVmm {
    inner: Arc<dyn Vmm>,
    meter: BackendMeter,
}

#[async_trait]
impl Vmm for MeasuredVmm {
    fn run(&self) -> &RunRecord {
        self.inner.run()
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.meter.measure("pause", self.inner.pause()).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.meter.measure("resume", self.inner.resume()).await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.meter.measure("shutdown", self.inner.shutdown(ladder)).await
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        self.meter.measure("reset", self.inner.reset()).await
    }

    async fn reboot(&self, ladder: LadderOptions) -> Result<ResetOutcome, BackendError> {
        self.meter.measure("reboot", self.inner.reboot(ladder)).await
    }

    async fn sample(&self) -> Sample {
        self.inner.sample().await
    }

    async fn trim_logs(&self) {
        self.inner.trim_logs().await;
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        self.meter.measure("probe", self.inner.probe()).await
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.meter.measure("kill", self.inner.kill()).await
    }

    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        self.inner.console_input()
    }
}
