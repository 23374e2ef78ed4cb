//! The fake hypervisor as a backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    Exit, ExitCause, KernelFormat, LaunchRequest, LaunchedVmm, SpareRequest, SpareVmms, SweepRequest,
    VmmEvent,
};
use vmm_core::capabilities::{
    BackendFacts, EndpointMode, PanicFact, PowerOffFact, RebootFact, ResetFact, ShutdownFact,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::store::RunRecord;

use super::script::ScriptedMethod;
use super::vmm::FakeVmm;
use super::world::FakeWorld;

/// The largest number of vCPUs that the fake hypervisor accepts.
const MAX_VCPUS: u32 = 32;

/// The fake hypervisor.
#[derive(Debug)]
pub struct FakeBackend {
    world: FakeWorld,
    capabilities: Capabilities,
    single_use: bool,
}

impl FakeBackend {
    /// Makes a hypervisor called `name` in a world of its own.
    pub fn new(name: &str) -> Self {
        Self::in_world(name, &FakeWorld::new())
    }

    /// Makes a hypervisor called `name` in `world`, with the machines and spare VMMs that exist
    /// there.
    pub fn in_world(name: &str, world: &FakeWorld) -> Self {
        let capabilities = Capabilities {
            name: BackendName::new(name),
            endpoint_mode: EndpointMode::Managed,
            default_restart_mode: RestartMode::GuestReboot,
            kernel_formats: &[KernelFormat::Elf, KernelFormat::PvhElf],
            extended_l2: true,
            facts: BackendFacts {
                guest_panic: Some(PanicFact::EndsRun),
                guest_power_off: Some(PowerOffFact::EndsRun),
                guest_reset: Some(ResetFact::InPlaceUnlessNever),
                reboot: Some(RebootFact::InPlace),
                shutdown: Some(ShutdownFact::PowerButton),
                ..BackendFacts::default()
            },
            limits: BTreeMap::from([("max-vcpus", i64::from(MAX_VCPUS))]),
        };
        Self { world: world.clone(), capabilities, single_use: false }
    }

    /// Changes the hypervisor so that a process can be used once: a reset needs another process.
    pub fn single_use(mut self) -> Self {
        self.single_use = true;
        self.capabilities.facts.reboot = Some(RebootFact::NewProcess);
        self
    }

    /// Changes the meaning of an unset restart policy.
    pub fn default_restart_mode(mut self, mode: RestartMode) -> Self {
        self.capabilities.default_restart_mode = mode;
        self
    }

    /// Returns the world, by which the test controls the hypervisor.
    pub fn world(&self) -> &FakeWorld {
        &self.world
    }

    fn handle(&self, run: RunRecord, events: mpsc::Receiver<VmmEvent>) -> LaunchedVmm {
        LaunchedVmm { vmm: Arc::new(FakeVmm::new(self.world.clone(), run, self.single_use)), events }
    }

    fn look_for(&self, request: &AdoptRequest) -> Adoption {
        let inner = self.world.lock();
        // A recorded run names its process. Without one the daemon died during a start, and the uid
        // shows whether that start left a machine.
        let found = match &request.run {
            Some(run) => {
                inner.machines.get(&run.process.pid).filter(|found| found.run.process == run.process)
            }
            None => inner.machines.values().rev().find(|found| found.uid == request.uid),
        };
        let Some(machine) = found else {
            let known = request.run.as_ref().and_then(|run| inner.ended.get(&run.process.pid)).cloned();
            let unknown =
                || Exit { cause: ExitCause::Unknown, message: "it is not there any more".to_owned() };
            return Adoption::Gone { exit: known.unwrap_or_else(unknown) };
        };
        let (run, guest) = (machine.run.clone(), machine.guest);
        let (silent, unprovable) = (machine.silent, machine.unprovable);
        // `listen` below locks the world too.
        drop(inner);
        // A machine that cannot be proven must not be touched, so the service gets no handle. A
        // machine that does not answer is proven, so the service gets a handle and can kill it.
        if unprovable {
            return Adoption::Unreachable {
                reason: Reason::IdentityUnproven,
                message: "the process cannot be proven ours".to_owned(),
                launched: None,
            };
        }
        let launched = self.handle(run.clone(), self.world.listen(run.process.pid));
        if silent {
            return Adoption::Unreachable {
                reason: Reason::VmmDoesNotAnswer,
                message: "the process lives and does not answer".to_owned(),
                launched: Some(launched),
            };
        }
        Adoption::Alive { launched, guest }
    }
}

#[async_trait]
impl Backend for FakeBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        let mut report = CheckReport::default();
        if spec.cpu.count > MAX_VCPUS {
            report.reject(
                "config.cpu.vcpu_count",
                format!("must be at most {MAX_VCPUS} here, not {}", spec.cpu.count),
            );
        }
        if spec.cpu.max > spec.cpu.count {
            report.ignore("config.cpu.max_vcpu_count", "is ignored: this hypervisor adds no vCPUs");
        }
        // The fake has no keys of its own, so each one concerns another backend.
        spec.options.own("", &mut report);
        report
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        request.permit.wait().await?;
        let act = self.world.lock().scripts.call(ScriptedMethod::Launch);
        act.before().await?;
        let (run, events) = self.world.start(&request);
        act.after().await?;
        Ok(self.handle(run, events))
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let act = self.world.lock().scripts.call(ScriptedMethod::Adopt);
        act.before().await?;
        let adoption = self.look_for(&request);
        act.after().await?;
        Ok(adoption)
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        let act = self.world.lock().scripts.call(ScriptedMethod::Sweep);
        act.before().await?;
        let unkillable = {
            let mut inner = self.world.lock();
            inner.spares.remove(&request.uid);
            // A sweep ends every machine of the VM, whichever start left it. It fails if one cannot
            // be killed.
            let users: Vec<(u32, bool)> = inner
                .machines
                .iter()
                .filter(|(_, machine)| machine.uid == request.uid)
                .map(|(pid, machine)| (*pid, machine.unkillable))
                .collect();
            for (pid, _) in users.iter().filter(|(_, unkillable)| !unkillable) {
                inner.end(*pid, Exit { cause: ExitCause::VmmFailed, message: "swept".to_owned() });
            }
            users.iter().find(|(_, unkillable)| *unkillable).map(|(pid, _)| *pid)
        };
        act.after().await?;
        match unkillable {
            None => Ok(()),
            Some(pid) => Err(BackendError::new(
                BackendErrorKind::Timeout,
                Effect::Unknown,
                format!("process {pid} outlives SIGKILL"),
            )),
        }
    }

    async fn ping(&self) -> BackendHealth {
        let act = self.world.lock().scripts.call(ScriptedMethod::Ping);
        let version = match act.before().await {
            Ok(()) => act.after().await.map(|()| "1.0".to_owned()),
            Err(error) => Err(error),
        };
        BackendHealth::from(version.map_err(|error| error.to_string()))
    }

    fn spares(&self) -> Option<&dyn SpareVmms> {
        Some(self)
    }
}

#[async_trait]
impl SpareVmms for FakeBackend {
    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError> {
        let act = self.world.lock().scripts.call(ScriptedMethod::StartSpare);
        act.before().await?;
        self.world.lock().spares.insert(request.uid);
        let outcome = act.after().await;
        // A failed start leaves no spare VMM.
        if outcome.is_err() {
            self.dismiss_spare(request.uid).await;
        }
        outcome
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        self.world.lock().spares.remove(&uid);
    }
}
