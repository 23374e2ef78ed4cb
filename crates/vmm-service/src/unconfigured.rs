//! The backend of VMs to which the configuration does not name a way any more.
//!
//! ```text
//!   adopt ──► unreachable, endpoint-not-configured      launch ──► FAILED_PRECONDITION, by check
//!   sweep ──► a run that has ended: nothing to do       deletion ──► left_behind names the rest
//! ```

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    LaunchRequest, LaunchedVmm, SweepPurpose, SweepRequest,
};
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;

/// The reason in the status of a VM that may run.
const REASON: Reason = Reason::EndpointNotConfigured;

/// A backend that touches nothing and reports the missing setting.
pub(crate) struct UnconfiguredBackend {
    capabilities: Capabilities,
    kind: VmKind,
    why: String,
}

impl UnconfiguredBackend {
    /// Makes the backend of VMs of `kind`. `why` names the setting.
    pub(crate) fn new(capabilities: Capabilities, kind: VmKind, why: String) -> Self {
        let why = format!("{why}: name it there again, and restart the daemon");
        Self { capabilities, kind, why }
    }

    fn refusal(&self) -> BackendError {
        BackendError::new(BackendErrorKind::NotServed, Effect::NotApplied, self.why.clone())
    }
}

#[async_trait]
impl Backend for UnconfiguredBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, _: &VmSpec) -> CheckReport {
        let mut report = CheckReport::default();
        report.reject("backend", self.why.clone());
        report
    }

    async fn launch(&self, _: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        Err(self.refusal())
    }

    async fn adopt(&self, _: AdoptRequest) -> Result<Adoption, BackendError> {
        Ok(Adoption::Unreachable { reason: REASON, message: self.why.clone(), launched: None })
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        match request.purpose {
            SweepPurpose::Clear => Ok(()),
            SweepPurpose::End | SweepPurpose::Delete | SweepPurpose::ForceDelete => Err(self.refusal()),
        }
    }

    async fn ping(&self) -> BackendHealth {
        BackendHealth::from(Err(self.why.clone()))
    }

    fn serves(&self, kind: &VmKind) -> bool {
        *kind == self.kind
    }
}
