//! What every test of the service starts from: a host folder, a world of fake machines, a store, and short names for the calls.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::Backend;
use vmm_core::caller::Caller;
use vmm_core::config::{
    BootConfig, CpuConfig, MemoryConfig, NetworkInterface, RestartPolicyConfig, StorageDevice, VmConfig,
};
use vmm_core::id::BackendName;
use vmm_core::state::{Phase, VmState};
use vmm_core::store::{VmRecord, VmRequest};
use vmm_service::{
    Backends, ConfigUpdate, CreateRequest, Created, DefaultBoot, OperationOutcome, ServiceError, Settings,
    ShutdownOptions, VmService,
};
use vmm_testkit::fake::{FakeBackend, FakeWorld, MachineControl};
use vmm_testkit::memory_store::MemoryStore;

use crate::fake_taps::FakeTaps;

/// Who asks in these tests.
pub(crate) const ME: &str = "tester";
/// Returns the caller that the service is told.
pub(crate) fn me() -> Caller {
    Caller::named(ME)
}

/// The metrics interval in these tests.
pub(crate) const METRICS_INTERVAL: Duration = Duration::from_secs(10);
/// How long events are kept in these tests.
pub(crate) const RETENTION_LIMIT: Duration = Duration::from_secs(7 * 86_400);

/// The wire's numbers of the restart modes.
pub(crate) const NEVER: i32 = 1;
pub(crate) const GUEST_REBOOT: i32 = 2;
pub(crate) const ON_FAILURE: i32 = 3;
pub(crate) const ALWAYS: i32 = 4;

/// A host with a store; services come and go on it.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) world: FakeWorld,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) taps: FakeTaps,
    pub(crate) default_boot: DefaultBoot,
    pub(crate) single_use: bool,
    /// How many spare VMMs are wanted.
    pub(crate) spare_vmms: usize,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut kernel = vec![0; 64];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[18] = 62;
        std::fs::write(dir.path().join("vmlinux"), kernel).unwrap();
        Self {
            dir,
            world: FakeWorld::new(),
            store: Arc::new(MemoryStore::new()),
            taps: FakeTaps::default(),
            default_boot: DefaultBoot::default(),
            single_use: false,
            spare_vmms: 0,
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A new raw image of 4 KiB.
    pub(crate) fn disk(&self, name: &str) -> StorageDevice {
        let path = self.path(name);
        if !std::fs::exists(&path).unwrap() {
            std::fs::write(&path, vec![0; 4096]).unwrap();
        }
        StorageDevice { path, ..StorageDevice::default() }
    }

    /// A new qcow2 image of 1 MiB, based on `base` (a name relative to its folder, and its format) where there is one.
    pub(crate) fn qcow2(&self, name: &str, base: Option<(&str, &str)>) -> StorageDevice {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).current_dir(self.dir.path());
        match base {
            Some((base, format)) => command.args(["-b", base, "-F", format, name]),
            None => command.args([name, "1M"]),
        };
        let made = command.output().expect("qemu-img is there; `make setup` installs it");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let options = [("format", "qcow2"), ("backing_files", if base.is_some() { "true" } else { "false" })];
        StorageDevice {
            path: self.path(name),
            options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            ..StorageDevice::default()
        }
    }

    /// The least that a VM needs.
    pub(crate) fn config(&self) -> VmConfig {
        VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 128 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: self.path("vmlinux"), ..BootConfig::default() }),
            ..VmConfig::default()
        }
    }

    pub(crate) fn with_disk(&self, name: &str) -> VmConfig {
        VmConfig { storage: vec![self.disk(name)], ..self.config() }
    }

    pub(crate) fn with_tap(&self, name: &str) -> VmConfig {
        let nic = NetworkInterface { tap_device: name.to_owned(), ..NetworkInterface::default() };
        VmConfig { network: vec![nic], ..self.config() }
    }

    pub(crate) fn with_policy(&self, mode: i32, max_restarts: i32) -> VmConfig {
        VmConfig { restart_policy: Some(RestartPolicyConfig { mode, max_restarts }), ..self.config() }
    }

    /// Starts a service on this host, as a daemon does.
    pub(crate) async fn start(&self) -> Vms {
        self.try_start().await.expect("the service starts")
    }

    pub(crate) async fn try_start(&self) -> Result<Vms, ServiceError> {
        let fake = FakeBackend::in_world("fake", &self.world);
        let fake = if self.single_use { fake.single_use() } else { fake };
        let other = FakeBackend::in_world("other", &self.world);
        self.try_start_with(&[Arc::new(fake), Arc::new(other)]).await
    }

    /// Starts a service whose only backend is `backend`, which is called `fake`.
    pub(crate) async fn start_with(&self, backend: impl Backend) -> Vms {
        self.try_start_with(&[Arc::new(backend)]).await.expect("the service starts")
    }

    async fn try_start_with(&self, all: &[Arc<dyn Backend>]) -> Result<Vms, ServiceError> {
        let settings = Settings {
            runtime_dir: self.runtime_dir(),
            default_boot: self.default_boot.clone(),
            metrics_interval: METRICS_INTERVAL,
            console_history: 1 << 20,
            event_retention: RETENTION_LIMIT,
            spare_vmms: self.spare_vmms,
        };
        let backends = Backends::new(BackendName::new("fake"), all.iter().cloned());
        let (store, taps) = (Arc::clone(&self.store), Arc::new(self.taps.clone()));
        let service = VmService::start_with_taps(store, backends, settings, taps).await?;
        Ok(Vms { service, world: self.world.clone() })
    }

    /// Runs one life of a daemon: a runtime of its own on a paused clock, whose tasks all die with it.
    pub(crate) fn life<T>(&self, life: impl AsyncFnOnce(Vms) -> T) -> T {
        on_a_paused_clock(async { life(self.start().await).await })
    }

    /// The name's record as it is in the store.
    pub(crate) fn stored(&self, vm_id: &str) -> VmRecord {
        self.store.vm(vm_id).expect("the VM is on record")
    }

    /// The folder of sockets, log and console of a VM.
    pub(crate) fn run_dir(&self, record: &VmRecord) -> PathBuf {
        record.uid.run_dir(&self.runtime_dir())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.world.faults(), Vec::<String>::new(), "what must never happen");
        }
    }
}

/// Runs `life` on a runtime of its own on a paused clock, whose tasks all die with it.
pub(crate) fn on_a_paused_clock<T>(life: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(life)
}

/// A service under test.
#[derive(Clone)]
pub(crate) struct Vms {
    pub(crate) service: VmService,
    pub(crate) world: FakeWorld,
}

impl Vms {
    pub(crate) async fn try_create(&self, vm_id: &str, config: VmConfig) -> Result<Created, ServiceError> {
        self.try_create_on("", vm_id, config).await
    }

    pub(crate) async fn try_create_on(
        &self,
        backend: &str,
        vm_id: &str,
        config: VmConfig,
    ) -> Result<Created, ServiceError> {
        let requested = VmRequest { backend: backend.to_owned(), config };
        let request = CreateRequest { vm_id: vm_id.to_owned(), requested, caller: me() };
        self.service.create(request).await
    }

    pub(crate) async fn create(&self, vm_id: &str, config: VmConfig) -> Arc<VmRecord> {
        self.try_create(vm_id, config).await.expect("CreateVm succeeds").record
    }

    /// Creates and boots.
    pub(crate) async fn run(&self, vm_id: &str, config: VmConfig) -> MachineControl {
        self.create(vm_id, config).await;
        self.boot(vm_id).await.expect("BootVm succeeds");
        self.machine(vm_id)
    }

    /// Brings a new VM into `state`.
    pub(crate) async fn bring_to(&self, vm_id: &str, config: VmConfig, state: VmState) {
        self.create(vm_id, config).await;
        if state == VmState::Created {
            return;
        }
        self.boot(vm_id).await.expect("BootVm succeeds");
        match state {
            VmState::Created | VmState::Running => {}
            VmState::Paused => drop(self.pause(vm_id).await.expect("PauseVm succeeds")),
            VmState::Shutdown => drop(self.shutdown(vm_id).await.expect("ShutdownVm succeeds")),
        }
    }

    pub(crate) async fn boot(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.boot(vm_id, me()).await
    }

    pub(crate) async fn pause(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.pause(vm_id, me()).await
    }

    pub(crate) async fn resume(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.resume(vm_id, me()).await
    }

    pub(crate) async fn shutdown(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.shutdown(vm_id, ShutdownOptions::default(), me()).await
    }

    pub(crate) async fn force_shutdown(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        let options = ShutdownOptions { force: true, timeout_seconds: 0 };
        self.service.shutdown(vm_id, options, me()).await
    }

    pub(crate) async fn reboot(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.reboot(vm_id, ShutdownOptions::default(), me()).await
    }

    pub(crate) async fn force_reboot(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        let options = ShutdownOptions { force: true, timeout_seconds: 0 };
        self.service.reboot(vm_id, options, me()).await
    }

    pub(crate) async fn update(
        &self,
        vm_id: &str,
        update: ConfigUpdate,
    ) -> Result<OperationOutcome, ServiceError> {
        self.service.update(vm_id, update, me()).await
    }

    /// Adds a label.
    pub(crate) async fn label(&self, vm_id: &str, value: &str) -> Result<OperationOutcome, ServiceError> {
        self.update(vm_id, labelled(value)).await
    }

    pub(crate) async fn delete(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.delete(vm_id, false, me()).await
    }

    pub(crate) async fn force_delete(&self, vm_id: &str) -> Result<OperationOutcome, ServiceError> {
        self.service.delete(vm_id, true, me()).await
    }

    /// The record as readers see it.
    pub(crate) fn record(&self, vm_id: &str) -> Arc<VmRecord> {
        self.service.get(vm_id).expect("the VM exists").record
    }

    pub(crate) fn state(&self, vm_id: &str) -> VmState {
        self.record(vm_id).state
    }

    pub(crate) fn phase(&self, vm_id: &str) -> Phase {
        self.record(vm_id).status.phase
    }

    pub(crate) fn reason(&self, vm_id: &str) -> String {
        self.record(vm_id).status.reason.to_string()
    }

    pub(crate) fn machine(&self, vm_id: &str) -> MachineControl {
        self.world.machine(vm_id).expect("a machine lives")
    }

    /// Starts an operation and lets it come as far as it can by itself.
    pub(crate) async fn begin<T: Send + 'static>(
        &self,
        operation: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        let task = tokio::spawn(operation);
        tokio::task::yield_now().await;
        task
    }

    /// Waits until the record that readers see is as wanted. A minute of silence on a paused clock ends it.
    pub(crate) async fn until(&self, vm_id: &str, wanted: impl Fn(&VmRecord) -> bool) -> Arc<VmRecord> {
        for _ in 0..6000 {
            let record = self.record(vm_id);
            if wanted(&record) {
                return record;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("VM {vm_id} never came to be as wanted; it is {:?}", self.record(vm_id));
    }

    pub(crate) async fn until_phase(&self, vm_id: &str, phase: Phase) -> Arc<VmRecord> {
        self.until(vm_id, |record| record.status.phase == phase).await
    }
}

/// The change that gives a VM the label `team`.
pub(crate) fn labelled(value: &str) -> ConfigUpdate {
    let metadata = [("team".to_owned(), value.to_owned())].into();
    ConfigUpdate { config: VmConfig { metadata, ..VmConfig::default() }, ..ConfigUpdate::default() }
}

/// Waits until `done`.
pub(crate) async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what} never came about");
}

/// The variant of an error, for comparison.
pub(crate) fn kind(error: &ServiceError) -> &'static str {
    match error {
        ServiceError::Invalid(_) => "invalid",
        ServiceError::NotFound(_) => "not-found",
        ServiceError::KeyReused(_) => "key-reused",
        ServiceError::Replayed(first) => first.code.as_str(),
        ServiceError::AlreadyExists(_) => "already-exists",
        ServiceError::IllegalState { .. } => "illegal-state",
        ServiceError::Precondition(_) => "precondition",
        ServiceError::Unavailable(_) => "unavailable",
        ServiceError::Unsupported(_) => "unsupported",
        ServiceError::Deadline(_) => "deadline",
        ServiceError::Aborted(_) => "aborted",
        ServiceError::Exhausted(_) => "exhausted",
        ServiceError::OutOfRange(_) => "out-of-range",
        ServiceError::Internal(_) => "internal",
    }
}

/// Expects a failure of the given kind and answers its text.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, ServiceError>, expected: &str) -> String {
    let error = result.expect_err("it is refused");
    assert_eq!(kind(&error), expected, "{error}");
    error.to_string()
}

/// The violations of a refusal, by field.
#[track_caller]
pub(crate) fn violations<T: std::fmt::Debug>(result: Result<T, ServiceError>) -> Vec<(String, String)> {
    match result {
        Err(ServiceError::Invalid(found)) => found.into_iter().map(|v| (v.field, v.message)).collect(),
        other => panic!("expected violations, got {other:?}"),
    }
}
