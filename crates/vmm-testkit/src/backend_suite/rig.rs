//! What one case runs on: folders and a store that outlive its daemons, and the lives of these daemons.

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
use vmm_core::store::{Requested, VmRecord};
use vmm_service::{
    Backends, CreateRequest, Created, ListQuery, Outcome, ServiceError, Settings, ShutdownOptions, VmService,
    VmView,
};

use super::cases::{Case, Step};
use super::column::{Column, Facts, Linux};
use super::imported;
use super::results::Verdict;
use crate::guests::Guest;
use crate::memory_store::MemoryStore;

/// Longer than anything honest takes on a busy machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// The caller.
const ME: &str = "suite";
/// Time between two samples.
const INTERVAL: Duration = Duration::from_millis(300);
/// What is said of a case that took another VMM.
const ANOTHER: &str = "a VMM that has ended is somebody else's to start again: UNAVAILABLE until there is another on the socket";
/// The name of the VM in cases that need one.
pub(super) const VM: &str = "vm";

/// Folders and a store that outlive the daemons of a case.
pub(super) struct Rig {
    pub(super) column: Arc<dyn Column>,
    pub(super) case: &'static str,
    store: Arc<MemoryStore>,
    dir: TempDir,
    /// Whether somebody else had to start another VMM.
    another: AtomicBool,
}

impl Rig {
    pub(super) fn new(column: Arc<dyn Column>, case: &'static str) -> Self {
        // Short, because sockets lie below it.
        let dir = tempfile::Builder::new().prefix("vs").tempdir().expect("a folder can be made");
        Self { column, case, store: Arc::new(MemoryStore::new()), dir, another: AtomicBool::new(false) }
    }

    /// The case's folder.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon's runtime folder.
    pub(super) fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The VM as it is on record.
    pub(super) fn stored(&self) -> VmRecord {
        let name = self.column.imported(VM);
        self.store.vm(name.as_deref().unwrap_or(VM)).expect("the VM is on record")
    }

    /// Plays every step of `case`, each in a runtime of its own that dies with all its tasks, as a daemon does.
    pub(super) fn play(self: &Arc<Self>, case: &Case) -> Verdict {
        let mut verdict = Verdict::Served;
        let refused = [imported::REFUSED];
        let steps =
            if self.column.imports() && !imported::CASES.contains(&case.id) { &refused } else { case.steps };
        for (index, step) in steps.iter().enumerate() {
            let is_last = index + 1 == steps.len();
            let runtime = runtime();
            runtime.block_on(async {
                match step {
                    Step::Life(life) => {
                        let vms = Vms::start(Arc::clone(self)).await;
                        verdict = life(vms.clone()).await;
                        vms.service.drain(PATIENCE).await;
                        if is_last {
                            vms.delete_all().await;
                        }
                    }
                    Step::Away(away) => away(Arc::clone(self)).await,
                }
            });
            runtime.shutdown_background();
        }
        self.assert_nothing_left();
        if verdict == Verdict::Served && self.another.load(Ordering::Relaxed) {
            return Verdict::Emulated(ANOTHER.to_owned());
        }
        verdict
    }

    fn assert_nothing_left(&self) {
        let processes = runtime().block_on(async { self.column.processes(&self.runtime_dir()) });
        assert_eq!(processes, Vec::<String>::new(), "processes left");
        assert_eq!(entries(&self.runtime_dir().join("vms")), Vec::<PathBuf>::new(), "run folders left");
        let beside = entries(&self.runtime_dir()).into_iter().filter(|entry| !entry.ends_with("vms"));
        assert_eq!(beside.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "left beside the run folders");
    }

    /// Ends whatever a failed case has left.
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

/// Waits until `done`, and fails with `what` where it never is.
pub(super) async fn eventually(what: impl Fn() -> String, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "never: {}", what());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One life of a daemon, as a case sees it.
#[derive(Clone)]
pub(super) struct Vms {
    pub(super) rig: Arc<Rig>,
    pub(super) service: VmService,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) facts: Facts,
}

impl Vms {
    async fn start(rig: Arc<Rig>) -> Self {
        let backend = rig.column.backend();
        let name = backend.capabilities().name.clone();
        let settings = Settings {
            runtime_dir: rig.runtime_dir(),
            default_boot: vmm_service::DefaultBoot::default(),
            metrics_interval: INTERVAL,
            event_retention: Duration::from_secs(3600),
            spare_vmms: 0,
        };
        let backends = Backends::new(name, [Arc::clone(&backend)]);
        let service = VmService::start(Arc::clone(&rig.store) as _, backends, settings);
        let service = service.await.expect("the service starts");
        let facts = Facts::of(backend.capabilities());
        Self { rig, service, backend, facts }
    }

    pub(super) fn column(&self) -> &dyn Column {
        &*self.rig.column
    }

    /// A small configuration with a tiny guest.
    pub(super) fn config(&self, guest: Guest) -> VmConfig {
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

    /// The same with a restart policy, by its number on the wire.
    pub(super) fn config_with_policy(&self, guest: Guest, mode: i32, max_restarts: i32) -> VmConfig {
        let restart_policy = Some(RestartPolicyConfig { mode, max_restarts });
        VmConfig { restart_policy, ..self.config(guest) }
    }

    pub(super) async fn try_create(&self, vm_id: &str, config: VmConfig) -> Result<Created, ServiceError> {
        let requested = Requested { backend: String::new(), config };
        let request = CreateRequest { vm_id: vm_id.to_owned(), requested, caller: Caller::named(ME) };
        self.service.create(request).await
    }

    pub(super) async fn create(&self, vm_id: &str, config: VmConfig) {
        if self.column().make(vm_id, &config).is_some() {
            let what = || format!("{vm_id} is imported");
            eventually(what, || self.get(vm_id).is_ok()).await;
            // It was made to wait, so that nothing of its run is missed.
            return drop(self.resume(vm_id).await.expect("ResumeVm succeeds"));
        }
        self.try_create(vm_id, config).await.expect("CreateVm succeeds");
    }

    /// The name that a VM bears: its own, or the one that it was imported under.
    fn name(&self, vm_id: &str) -> String {
        self.column().imported(vm_id).unwrap_or_else(|| vm_id.to_owned())
    }

    /// A VM as readers see it.
    pub(super) fn get(&self, vm_id: &str) -> Result<VmView, ServiceError> {
        self.service.get(&self.name(vm_id))
    }

    /// Creates and boots.
    pub(super) async fn run(&self, vm_id: &str, config: VmConfig) -> Arc<VmRecord> {
        self.create(vm_id, config).await;
        self.boot(vm_id).await.expect("BootVm succeeds").record
    }

    /// The same with a tiny guest, up to its first word.
    pub(super) async fn run_tiny(&self, guest: Guest) -> Arc<VmRecord> {
        let record = self.run(VM, self.config(guest)).await;
        self.console_shows(VM, &guest.banner(), 1).await;
        record
    }

    pub(super) async fn boot(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        self.service.boot(&self.name(vm_id), Caller::named(ME)).await
    }

    /// Boots a VM whose VMM may have ended. Where that was somebody else's, BootVm says what to start and where, and once it
    /// was started succeeds.
    pub(super) async fn boot_again(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        if !self.facts.attached {
            return self.boot(vm_id).await;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.boot(vm_id).await {
                Err(ServiceError::Unavailable(why)) if why.contains("start one there") => {
                    let place = self.record(vm_id).kind.socket().expect("it has a socket").to_owned();
                    assert!(why.contains(&place), "it names the socket: {why}");
                    self.rig.another.store(true, Ordering::Relaxed);
                    self.column().another(Path::new(&place));
                }
                // One that is just ending, or just starting.
                Err(ServiceError::Unavailable(_) | ServiceError::Precondition(_))
                    if Instant::now() < deadline => {}
                answer => return answer,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn pause(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        self.service.pause(&self.name(vm_id), Caller::named(ME)).await
    }

    pub(super) async fn resume(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        self.service.resume(&self.name(vm_id), Caller::named(ME)).await
    }

    /// Shuts down, with so many seconds for the guest to obey.
    pub(super) async fn shutdown(&self, vm_id: &str, seconds: i32) -> Result<Outcome, ServiceError> {
        let options = ShutdownOptions { force: false, timeout_seconds: seconds };
        self.service.shutdown(&self.name(vm_id), options, Caller::named(ME)).await
    }

    /// Shuts a VM down whose guest obeys. A press of the button that comes too early in a boot is lost, and where the VMM is
    /// somebody else's there is nothing after it: then it is pressed again.
    pub(super) async fn shutdown_obeying(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        let mut answer = self.shutdown(vm_id, 30).await;
        for _ in 0..3 {
            match answer {
                Err(ServiceError::Deadline(_) | ServiceError::Unavailable(_)) if self.facts.attached => {
                    // A VMM whose guest is busy may be slow to say that it is there.
                    self.until(vm_id, "reachable", |record| record.status.phase == Phase::Running).await;
                    answer = self.shutdown(vm_id, 30).await;
                }
                _ => break,
            }
        }
        answer
    }

    pub(super) async fn force_shutdown(&self, vm_id: &str) -> Result<Outcome, ServiceError> {
        let options = ShutdownOptions { force: true, timeout_seconds: 0 };
        self.service.shutdown(&self.name(vm_id), options, Caller::named(ME)).await
    }

    pub(super) async fn reboot(&self, vm_id: &str, force: bool) -> Result<Outcome, ServiceError> {
        let options = ShutdownOptions { force, timeout_seconds: 1 };
        self.service.reboot(&self.name(vm_id), options, Caller::named(ME)).await
    }

    pub(super) async fn delete(&self, vm_id: &str, force: bool) -> Result<Outcome, ServiceError> {
        self.service.delete(&self.name(vm_id), force, Caller::named(ME)).await
    }

    /// Deletes every VM, and fails where something could not be freed.
    async fn delete_all(&self) {
        for record in self.service.list(&ListQuery::default()).expect("ListVms answers").vms {
            let gone = self.delete(record.vm_id.as_str(), true).await.expect("DeleteVm with force succeeds");
            assert_eq!(gone.left_behind, Vec::new(), "nothing is left behind");
        }
    }

    /// The record as readers see it.
    pub(super) fn record(&self, vm_id: &str) -> Arc<VmRecord> {
        self.get(vm_id).expect("the VM exists").record
    }

    /// Waits until the record that readers see is as wanted.
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

    /// Waits until the VM is down and stays so.
    pub(super) async fn until_down(&self, vm_id: &str) -> Arc<VmRecord> {
        let down = |record: &VmRecord| {
            record.state == VmState::Shutdown && matches!(record.status.phase, Phase::Stopped | Phase::Failed)
        };
        let record = self.until(vm_id, "down", down).await;
        assert!(record.run.is_none(), "no process is on record: {record:#?}");
        record
    }

    /// The file of the VM's kept console.
    pub(super) fn console_file(&self, vm_id: &str) -> PathBuf {
        let in_run_folder = || self.record(vm_id).uid.run_dir(&self.rig.runtime_dir()).join("console.log");
        self.column().console(vm_id).unwrap_or_else(in_run_folder)
    }

    /// Waits until the kept console shows `text` for the `times`th time.
    pub(super) async fn console_shows(&self, vm_id: &str, text: &str, times: usize) -> String {
        file_shows(&self.console_file(vm_id), text, times).await
    }

    /// Waits until the guest, which is busy, stands still, or does not.
    pub(super) async fn until_still(&self, record: &VmRecord, still: bool) {
        let deadline = Instant::now() + PATIENCE;
        while self.column().stands_still(record).await != still {
            assert!(Instant::now() < deadline, "never: the guest stands still is {still}");
        }
    }

    /// A configuration with Linux and what it is to do.
    pub(super) fn linux_config(&self, linux: &Linux, args: &str) -> VmConfig {
        let mut config = self.config(Guest::Idle);
        config.memory = Some(MemoryConfig { size_bytes: 256 << 20, ..MemoryConfig::default() });
        if let Some(boot) = &mut config.boot {
            boot.kernel_path = linux.kernel.display().to_string();
            boot.initrd_path = linux.initrd.display().to_string();
            boot.kernel_args = format!("{} {args}", linux.args).trim_end().to_owned();
        }
        config
    }

    /// What the VMM says of its configuration.
    pub(super) async fn view(&self, vm_id: &str) -> String {
        self.column().view(&self.record(vm_id)).await
    }
}

/// Waits until a file shows `text` for the `times`th time, and answers all of it.
pub(super) async fn file_shows(file: &Path, text: &str, times: usize) -> String {
    let read = || String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
    let what = || format!("{text:?} is {times} times in {}:\n{}", file.display(), read());
    eventually(what, || read().matches(text).count() >= times).await;
    read()
}

/// The pid of the VMM on record.
pub(super) fn pid_of(record: &VmRecord) -> u32 {
    record.run.as_ref().expect("a process is on record").process.pid
}

/// A step of a case.
pub(super) type Doing<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;
