//! The surroundings of one case: the folders and the store, which outlive its daemons, and the
//! lives of these daemons.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm_core::backend::Backend;
use vmm_core::caller::Caller;
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, RestartPolicyConfig, VmConfig};
use vmm_core::state::{Phase, VmState};
use vmm_core::store::{VmRecord, VmRequest};
use vmm_service::{
    Backends, ConfigUpdate, CreateRequest, Created, ListQuery, OperationOutcome, ServiceError, Settings,
    ShutdownOptions, VmService, VmView,
};

use super::case::{Case, CaseStep};
use super::column::{Column, ExpectedFacts, LinuxGuest};
use super::imported;
use super::results::CaseVerdict;
use crate::guests::TinyGuest;
use crate::memory_store::MemoryStore;

/// The time that every wait of a case is limited to. Only a hang takes longer, even on a busy
/// machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// The caller of every operation.
const ME: &str = "suite";
/// The interval between two samples.
const METRICS_INTERVAL: Duration = Duration::from_millis(300);
/// The text of the verdict if a case needed another attached VMM.
const ANOTHER: &str =
    "the daemon does not start an attached VMM again: UNAVAILABLE until another VMM is on the socket";
/// The name of the VM in cases with one VM.
pub(super) const VM: &str = "vm";

/// The folders and the store of a case.
pub(super) struct Rig {
    pub(super) column: Arc<dyn Column>,
    pub(super) case: &'static str,
    store: Arc<MemoryStore>,
    dir: TempDir,
    /// True if another attached VMM had to be started.
    another: AtomicBool,
}

impl Rig {
    pub(super) fn new(column: Arc<dyn Column>, case: &'static str) -> Self {
        // The prefix is short, because the paths of sockets below the folder are limited to 107
        // bytes.
        let dir = tempfile::Builder::new().prefix("vs").tempdir().expect("a folder can be made");
        Self { column, case, store: Arc::new(MemoryStore::new()), dir, another: AtomicBool::new(false) }
    }

    /// Returns the folder of the case.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the daemon's runtime folder.
    pub(super) fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Returns the record of the VM in the store.
    pub(super) fn stored(&self) -> VmRecord {
        let name = self.column.imported(VM);
        self.store.vm(name.as_deref().unwrap_or(VM)).expect("the VM is on record")
    }

    /// Runs the steps of `case` and returns its verdict. Each step has a runtime of its own,
    /// because the end of the runtime ends all its tasks, as the end of a daemon does.
    pub(super) fn play(self: &Arc<Self>, case: &Case) -> CaseVerdict {
        let mut verdict = CaseVerdict::Served;
        // A column that only imports VMs cannot create the VM of most cases. It proves the refusal
        // instead.
        let refused = [imported::REFUSED];
        let steps =
            if self.column.imports() && !imported::CASES.contains(&case.id) { &refused } else { case.steps };
        for (index, step) in steps.iter().enumerate() {
            let is_last = index + 1 == steps.len();
            let runtime = runtime();
            runtime.block_on(async {
                match step {
                    // The order at the end of a life matters. `drain` waits for the operations
                    // under way, as a daemon does that stops. VMs are deleted in the last life
                    // only, because the next life must find them.
                    CaseStep::Life(life) => {
                        let vms = DaemonLife::start(Arc::clone(self)).await;
                        verdict = life(vms.clone()).await;
                        vms.service.drain(WAIT_TIMEOUT).await;
                        if is_last {
                            vms.delete_all().await;
                        }
                    }
                    CaseStep::Away(away) => away(Arc::clone(self)).await,
                }
            });
            // The runtime is not awaited, because a daemon that dies does not wait for its tasks
            // either.
            runtime.shutdown_background();
        }
        // The check comes after the last life, when no daemon runs that could still clean up.
        self.assert_nothing_left();
        if verdict == CaseVerdict::Served && self.another.load(Ordering::Relaxed) {
            return CaseVerdict::Emulated(ANOTHER.to_owned());
        }
        verdict
    }

    /// Fails if a process, a run folder or another file of the case is left.
    fn assert_nothing_left(&self) {
        let processes = runtime().block_on(async { self.column.processes(&self.runtime_dir()) });
        assert_eq!(processes, Vec::<String>::new(), "processes left");
        assert_eq!(entries(&self.runtime_dir().join("vms")), Vec::<PathBuf>::new(), "run folders left");
        let beside = entries(&self.runtime_dir()).into_iter().filter(|entry| !entry.ends_with("vms"));
        assert_eq!(beside.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "left beside the run folders");
    }

    /// Kills every process that a failed case has left.
    pub(super) fn clear_away(&self) {
        runtime().block_on(async { self.column.kill_all(&self.runtime_dir()) });
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be made")
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).map(|all| all.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Waits until `done` returns true, and fails with `what` after [`WAIT_TIMEOUT`].
pub(super) async fn eventually(what: impl Fn() -> String, done: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "never: {}", what());
        // The suite polls like a client, because the state is seen through the service only.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The life of one daemon, as a case sees it.
#[derive(Clone)]
pub(super) struct DaemonLife {
    pub(super) rig: Arc<Rig>,
    pub(super) service: VmService,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) facts: ExpectedFacts,
}

impl DaemonLife {
    async fn start(rig: Arc<Rig>) -> Self {
        let backend = rig.column.backend();
        let name = backend.capabilities().name.clone();
        let settings = Settings {
            runtime_dir: rig.runtime_dir(),
            default_boot: vmm_service::DefaultBoot::default(),
            metrics_interval: METRICS_INTERVAL,
            console_history: 1 << 20,
            event_retention: Duration::from_secs(3600),
            spare_vmms: 0,
        };
        let backends = Backends::new(name, [Arc::clone(&backend)]);
        let service = VmService::start(Arc::clone(&rig.store) as _, backends, settings);
        let service = service.await.expect("the service starts");
        let facts = ExpectedFacts::of(backend.capabilities());
        Self { rig, service, backend, facts }
    }

    pub(super) fn column(&self) -> &dyn Column {
        &*self.rig.column
    }

    /// Returns a small configuration with a tiny guest.
    pub(super) fn config(&self, guest: TinyGuest) -> VmConfig {
        let kernel = guest.write_to(self.rig.dir()).expect("the kernel can be written");
        let mut config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 64 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: kernel.display().to_string(), ..BootConfig::default() }),
            ..VmConfig::default()
        };
        self.column().shape(&mut config);
        config
    }

    /// Returns a small configuration with a restart policy, given by its number on the wire.
    pub(super) fn config_with_policy(&self, guest: TinyGuest, mode: i32, max_restarts: i32) -> VmConfig {
        let restart_policy = Some(RestartPolicyConfig { mode, max_restarts });
        VmConfig { restart_policy, ..self.config(guest) }
    }

    pub(super) async fn try_create(&self, vm_id: &str, config: VmConfig) -> Result<Created, ServiceError> {
        let requested = VmRequest { backend: String::new(), config };
        let request = CreateRequest { vm_id: vm_id.to_owned(), requested, caller: Caller::named(ME) };
        self.service.create(request).await
    }

    pub(super) async fn create(&self, vm_id: &str, config: VmConfig) {
        if self.column().make(vm_id, &config).is_some() {
            let what = || format!("{vm_id} is imported");
            eventually(what, || self.get(vm_id).is_ok()).await;
            // The VM was made paused, because a case must not miss a part of its run.
            return drop(self.resume(vm_id).await.expect("ResumeVm succeeds"));
        }
        self.try_create(vm_id, config).await.expect("CreateVm succeeds");
    }

    /// Returns the name of a VM in the service: its own name, or the name of its import.
    fn name(&self, vm_id: &str) -> String {
        self.column().imported(vm_id).unwrap_or_else(|| vm_id.to_owned())
    }

    /// Returns a VM as readers see it.
    pub(super) fn get(&self, vm_id: &str) -> Result<VmView, ServiceError> {
        self.service.get(&self.name(vm_id))
    }

    /// Creates and boots a VM.
    pub(super) async fn run(&self, vm_id: &str, config: VmConfig) -> Arc<VmRecord> {
        self.create(vm_id, config).await;
        self.boot(vm_id).await.expect("BootVm succeeds").record
    }

    /// Creates and boots a VM with a tiny guest, and waits for its banner.
    pub(super) async fn run_tiny(&self, guest: TinyGuest) -> Arc<VmRecord> {
        let record = self.run(VM, self.config(guest)).await;
        self.console_shows(VM, &guest.banner(), 1).await;
        record
    }

    pub(super) async fn boot(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.boot(&self.name(vm_id), Caller::named(ME)).await
    }

    /// Boots a VM whose VMM may have ended. If an attached VMM has ended, BootVm names the socket
    /// on which another VMM must be started. This function starts one there and boots again.
    pub(super) async fn boot_again(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        if !self.facts.attached {
            return self.boot(vm_id).await;
        }
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            // Three answers are possible until the deadline. (1) BootVm asks for another VMM: the
            // column starts one on the named socket. (2) The old VMM is just ending, or the new one
            // just starting: the next round asks again. (3) Any other answer is the result of the
            // boot.
            match self.boot(vm_id).await {
                Err(ServiceError::Unavailable(why)) if why.to_string().contains("start one there") => {
                    let place = self.record(vm_id).kind.socket().expect("it has a socket").to_owned();
                    assert!(why.to_string().contains(&place), "it names the socket: {why}");
                    self.rig.another.store(true, Ordering::Relaxed);
                    self.column().another(Path::new(&place));
                }
                Err(ServiceError::Unavailable(_) | ServiceError::Precondition(_))
                    if Instant::now() < deadline => {}
                answer => return answer,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn pause(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.pause(&self.name(vm_id), Caller::named(ME)).await
    }

    pub(super) async fn resume(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.resume(&self.name(vm_id), Caller::named(ME)).await
    }

    /// Shuts a VM down and gives the guest `seconds` to obey.
    pub(super) async fn shutdown(&self, vm_id: &str, seconds: i32) -> Result<OperationOutcome, ServiceError> {
        let options = ShutdownOptions { force: false, timeout_seconds: seconds };
        self.service.shutdown(&self.name(vm_id), options, Caller::named(ME)).await
    }

    /// Shuts a VM down whose guest obeys. The power button is pressed again if the VMM is attached
    /// and the first press had no effect, because a press early in a boot is lost and no step of
    /// the ladder follows it.
    pub(super) async fn shutdown_obeying(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        let mut answer = self.shutdown(vm_id, 30).await;
        for _ in 0..3 {
            match answer {
                Err(ServiceError::Deadline(_) | ServiceError::Unavailable(_)) if self.facts.attached => {
                    // The VMM of a busy guest may be slow to answer the daemon.
                    self.until(vm_id, "reachable", |record| record.status.phase == Phase::Running).await;
                    answer = self.shutdown(vm_id, 30).await;
                }
                _ => break,
            }
        }
        answer
    }

    pub(super) async fn force_shutdown(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        let options = ShutdownOptions { force: true, timeout_seconds: 0 };
        self.service.shutdown(&self.name(vm_id), options, Caller::named(ME)).await
    }

    pub(super) async fn reboot(&self, vm_id: &str, force: bool) -> Result<OperationOutcome, ServiceError> {
        let options = ShutdownOptions { force, timeout_seconds: 1 };
        self.service.reboot(&self.name(vm_id), options, Caller::named(ME)).await
    }

    /// Replaces the parts that `config` has.
    pub(super) async fn update(
        &self,
        vm_id: &str,
        config: VmConfig,
    ) -> Result<OperationOutcome, ServiceError> {
        let update = ConfigUpdate { config, ..ConfigUpdate::default() };
        self.service.update(&self.name(vm_id), update, Caller::named(ME)).await
    }

    pub(super) async fn delete(&self, vm_id: &str, force: bool) -> Result<OperationOutcome, ServiceError> {
        self.service.delete(&self.name(vm_id), force, Caller::named(ME)).await
    }

    /// Deletes every VM, and fails if DeleteVm leaves something behind.
    async fn delete_all(&self) {
        for record in self.service.list(&ListQuery::default()).expect("ListVms answers").vms {
            let gone = self.delete(record.vm_id.as_str(), true).await.expect("DeleteVm with force succeeds");
            assert_eq!(gone.left_behind, Vec::new(), "nothing is left behind");
        }
    }

    /// Returns the record as readers see it.
    pub(super) fn record(&self, vm_id: &str) -> Arc<VmRecord> {
        self.get(vm_id).expect("the VM exists").record
    }

    /// Waits until the record that readers see fulfils `wanted`, and returns it. `what` describes
    /// the wanted record for the message of a failure.
    pub(super) async fn until(
        &self,
        vm_id: &str,
        what: &str,
        wanted: impl Fn(&VmRecord) -> bool,
    ) -> Arc<VmRecord> {
        let what = || format!("{vm_id} is {what}; it is {:#?}", self.record(vm_id));
        eventually(what, || wanted(&self.record(vm_id))).await;
        self.record(vm_id)
    }

    /// Waits until the VM has ended and no operation is under way, and returns its record.
    pub(super) async fn until_down(&self, vm_id: &str) -> Arc<VmRecord> {
        let down = |record: &VmRecord| {
            record.state == VmState::Shutdown && matches!(record.status.phase, Phase::Stopped | Phase::Failed)
        };
        let record = self.until(vm_id, "down", down).await;
        assert!(record.run.is_none(), "no process is on record: {record:#?}");
        record
    }

    /// Returns the path of the VM's kept console.
    pub(super) fn console_file(&self, vm_id: &str) -> PathBuf {
        let in_run_folder = || self.record(vm_id).uid.run_dir(&self.rig.runtime_dir()).join("console.log");
        self.column().console(vm_id).unwrap_or_else(in_run_folder)
    }

    /// Waits until the kept console contains `text` at least `times` times, and returns all of it.
    pub(super) async fn console_shows(&self, vm_id: &str, text: &str, times: usize) -> String {
        file_shows(&self.console_file(vm_id), text, times).await
    }

    /// Waits until the busy guest uses no CPU time, or uses it again.
    pub(super) async fn until_still(&self, record: &VmRecord, still: bool) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while self.column().stands_still(record).await != still {
            assert!(Instant::now() < deadline, "never: the guest stands still is {still}");
        }
    }

    /// Returns a configuration with Linux and further kernel arguments.
    pub(super) fn linux_config(&self, linux: &LinuxGuest, args: &str) -> VmConfig {
        let mut config = self.config(TinyGuest::Idle);
        config.memory = Some(MemoryConfig { size_bytes: 256 << 20, ..MemoryConfig::default() });
        if let Some(boot) = &mut config.boot {
            boot.kernel_path = linux.kernel.display().to_string();
            boot.initrd_path = linux.initrd.display().to_string();
            boot.kernel_args = format!("{} {args}", linux.args).trim_end().to_owned();
        }
        config
    }

    /// Returns the VMM's description of its configuration.
    pub(super) async fn view(&self, vm_id: &str) -> String {
        self.column().view(&self.record(vm_id)).await
    }
}

/// Waits until a file contains `text` at least `times` times, and returns all of it.
pub(super) async fn file_shows(file: &Path, text: &str, times: usize) -> String {
    let read = || String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
    let what = || format!("{text:?} is {times} times in {}:\n{}", file.display(), read());
    eventually(what, || read().matches(text).count() >= times).await;
    read()
}

/// Returns the pid of the recorded VMM.
pub(super) fn pid_of(record: &VmRecord) -> u32 {
    record.run.as_ref().expect("a process is on record").process.pid
}

/// The future of a step.
pub(super) type StepFuture<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;
