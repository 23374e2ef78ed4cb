//! The quarantine of a VM on record that this program cannot run, because it does not know the VM's
//! configuration or backend. This happens after a step back to an older release.
//!
//! ```text
//!   listed, inspected, its name and its disks taken ── force ShutdownVm ──► its VMM is ended
//!        │                                          └─ force DeleteVm ────► and all of it removed
//!        └─ any other operation ──► UNAVAILABLE, with the reason
//! ```
//!
//! The record stays as it is until a forced operation comes, because a newer program can still use
//! it.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    LaunchRequest, LaunchedVmm, SweepRequest,
};
use vmm_core::capabilities::{BackendFacts, EndpointMode};
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::{
    BackendOptions, Boot, Console, Cpu, MIB, Memory, PageSize, RestartMode, RestartPolicy, VmSpec,
};
use vmm_core::state::Phase;
use vmm_core::store::VmRecord;
use vmm_host::process::{Lookup, search_by_argument};

use super::budget::KILL_LIMIT;
use super::hold::Hold;
use super::record_update::{ChangeReason, RecordUpdate};
use super::{Actor, Flow};
use crate::error::ServiceError;
use crate::failure::Failure;

impl Actor {
    /// Shows the last proven state of the VM and the reason why the VM cannot be used. Writes
    /// nothing.
    pub(super) async fn quarantine(&mut self, why: String) -> Flow {
        self.claim_what_is_on_record();
        let intent = self.record.intent.clone();
        let leaving = intent.as_ref().filter(|intent| intent.is_deletion()).cloned();
        // An interrupted deletion may have left a process, whatever is on record.
        let process = self.record.run.is_some() || intent.is_some();
        self.hold = Hold::Quarantined { why: why.clone(), process };
        if let Some(leaving) = leaving {
            return self.go_on_deleting(leaving).await;
        }
        let status = self.status(Phase::Unreachable).because(Reason::NotTakenUp, why);
        self.show(
            RecordUpdate::new(EventKind::Unreachable, ChangeReason::by_itself(Cause::NotTakenUp), status)
                .intending(intent),
        );
        Flow::GoOn
    }

    /// Returns the refusal of an operation without force, for a VM that cannot be taken up.
    pub(super) fn quarantined(&self, why: &str) -> ServiceError {
        Failure::Quarantined { vm_id: self.record.vm_id.clone(), why: why.to_owned() }.into()
    }
}

/// The backend of a VM that cannot be taken up. It starts nothing and finds nothing. It ends a
/// process that is proven to be the VM's.
pub(super) struct QuarantineBackend {
    capabilities: Capabilities,
    known: Option<Arc<dyn Backend>>,
    why: String,
}

impl QuarantineBackend {
    pub(super) fn new(record: &VmRecord, known: Option<Arc<dyn Backend>>, why: String) -> Self {
        let capabilities = Capabilities {
            name: record.backend.clone(),
            endpoint_mode: EndpointMode::Managed,
            default_restart_mode: RestartMode::Never,
            kernel_formats: &[],
            extended_l2: false,
            facts: BackendFacts::default(),
            limits: BTreeMap::new(),
        };
        Self { capabilities, known, why }
    }
}

#[async_trait]
impl Backend for QuarantineBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, _: &VmSpec) -> CheckReport {
        CheckReport::default()
    }

    async fn launch(&self, _: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        Err(BackendError::new(BackendErrorKind::NotInstalled, Effect::NotApplied, self.why.clone()))
    }

    async fn adopt(&self, _: AdoptRequest) -> Result<Adoption, BackendError> {
        Ok(Adoption::Unreachable { reason: Reason::NotTakenUp, message: self.why.clone(), launched: None })
    }

    /// Ends the process on record. Other processes that use the run folder may only read it, so the
    /// error names them.
    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        if let Some(known) = &self.known {
            return known.sweep(request).await;
        }
        let failed = |text: String| BackendError::new(BackendErrorKind::Host, Effect::Unknown, text);
        if let Some(run) = &request.run {
            match vmm_host::process::adopt(&run.process) {
                Lookup::Alive(process) => {
                    process.kill_and_wait(KILL_LIMIT).await.map_err(|error| failed(error.to_string()))?;
                }
                Lookup::Gone => {}
                Lookup::Unprovable(why) => return Err(failed(why)),
            }
        }
        match search_by_argument(request.dir.clone()).await {
            Ok(users) if users.is_empty() => Ok(()),
            Ok(users) => {
                let pids: Vec<_> = users.iter().map(|user| user.identity.pid.to_string()).collect();
                Err(failed(format!(
                    "process {}, which uses {}, is not proven to be the VM's VMM: end it by hand",
                    pids.join(", "),
                    request.dir.display()
                )))
            }
            Err(error) => Err(failed(format!("the users of its run folder cannot be listed: {error}"))),
        }
    }

    async fn ping(&self) -> BackendHealth {
        BackendHealth::from(Err(self.why.clone()))
    }
}

/// Returns the spec of a VM whose configuration is not understood. No VMM is ever started from it.
pub(super) fn no_spec() -> VmSpec {
    VmSpec {
        cpu: Cpu { count: 1, max: 1, topology: None },
        memory: Memory { size_bytes: MIB, hotplug_max_bytes: None, pages: PageSize::Usual, shared: false },
        boot: Boot { kernel: "/".into(), initrd: None, args: String::new() },
        disks: Vec::new(),
        nics: Vec::new(),
        console: Console::Off,
        restart: RestartPolicy { mode: Some(RestartMode::Never), max_restarts: 0 },
        options: BackendOptions::default(),
    }
}
