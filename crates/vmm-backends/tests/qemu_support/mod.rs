//! What the tests against a real QEMU share: a bench that starts guests and leaves nothing behind,
//! failed or not.

#![allow(dead_code, reason = "every test program uses its own part of this")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use uuid::Uuid;
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::{
    AdoptRequest, Backend, BackendError, Exit, LadderOptions, LaunchRequest, LaunchedVmm, SweepRequest, Vmm,
    VmmEvent,
};
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, RestartPolicyConfig, StorageDevice, VmConfig};
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::process::{Lookup, Signal, adopt, find_by_argument};
use vmm_testkit::guests::TinyGuest;
pub(crate) use vmm_testkit::skip::skipped;

/// Longer than anything honest takes on a busy host.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) const NEVER: i32 = 1;
pub(crate) const GUEST_REBOOT: i32 = 2;

/// QEMU, or `None` after saying that `test` is skipped.
pub(crate) async fn qemu(test: &str) -> Option<QemuBackend> {
    let backend = QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() });
    match backend.ping().await.version {
        Ok(_) => Some(backend),
        Err(why) => {
            skipped(test, &why);
            None
        }
    }
}

/// The project's Linux guest, or `None` after saying that `test` is skipped.
pub(crate) fn linux(test: &str) -> Option<(PathBuf, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest").canonicalize().ok();
    let files = folder.map(|folder| (folder.join("vmlinuz"), folder.join("initramfs.cpio.gz")));
    match files {
        Some((kernel, initrd)) if kernel.exists() && initrd.exists() => Some((kernel, initrd)),
        Some(_) | None => {
            skipped(test, "the Linux guest is not there; make it with `make setup`");
            None
        }
    }
}

pub(crate) fn ask_for(seconds: u64) -> LadderOptions {
    LadderOptions { guest_timeout: Some(Duration::from_secs(seconds)) }
}

/// Makes a disk image of `size` bytes.
pub(crate) fn make_image(path: &std::path::Path, format: &str, size: u64) {
    if format == "raw" {
        std::fs::File::create(path).unwrap().set_len(size).unwrap();
        return;
    }
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(path)
        .arg(size.to_string())
        .status()
        .unwrap();
    assert!(made.success());
}

/// One VM's run folder and configuration, and whatever runs there.
pub(crate) struct Bench {
    pub(crate) backend: QemuBackend,
    pub(crate) uid: VmUid,
    pub(crate) config: VmConfig,
    pub(crate) taps: Vec<String>,
    dir: TempDir,
}

/// A TAP that is removed with its test.
pub(crate) struct Tap(pub(crate) String);

impl Tap {
    /// A TAP, or `None` where none can be made.
    pub(crate) fn new(prefix: &str) -> Option<Self> {
        let name = format!("{prefix}{}", std::process::id() % 1_000_000);
        ip(&["tuntap", "add", "mode", "tap", "dev", &name]).then_some(Self(name))
    }

    pub(crate) fn set_up(&self) -> bool {
        ip(&["link", "set", &self.0, "up"])
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.0]);
    }
}

fn ip(args: &[&str]) -> bool {
    std::process::Command::new("ip").args(args).status().is_ok_and(|status| status.success())
}

impl Bench {
    /// A bench for a tiny guest.
    pub(crate) fn new(backend: QemuBackend, machine: &str, guest: TinyGuest, restart: i32) -> Self {
        // One of the folders has a name that QEMU would split if it could.
        let prefix = if machine == "q35" { "vmcp,qemu-" } else { "vmcp-qemu-" };
        let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        let kernel = guest.write_to(dir.path()).unwrap();
        let config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 64 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig {
                kernel_path: kernel.to_str().unwrap().to_owned(),
                boot_options: [("qemu.machine".to_owned(), machine.to_owned())].into(),
                ..BootConfig::default()
            }),
            restart_policy: Some(RestartPolicyConfig { mode: restart, max_restarts: 0 }),
            ..VmConfig::default()
        };
        Self { backend, uid: VmUid::new(Uuid::now_v7()), config, taps: Vec::new(), dir }
    }

    /// Runs Linux instead.
    pub(crate) fn with_linux(mut self, (kernel, initrd): &(PathBuf, PathBuf), args: &str) -> Self {
        self.config.memory = Some(MemoryConfig { size_bytes: 256 << 20, ..MemoryConfig::default() });
        let boot = self.config.boot.as_mut().unwrap();
        boot.kernel_path = kernel.to_str().unwrap().to_owned();
        boot.initrd_path = initrd.to_str().unwrap().to_owned();
        boot.kernel_args = format!("console=ttyS0 cryptomgr.notests no_timer_check {args}");
        self
    }

    pub(crate) fn add_disk(&mut self, device: StorageDevice) {
        self.config.storage.push(device);
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn spec(&self) -> VmSpec {
        VmSpec::parse(&self.config).unwrap()
    }

    pub(crate) fn request(&self) -> LaunchRequest {
        LaunchRequest {
            instance: InstanceId::new(Uuid::nil()),
            uid: self.uid,
            vm_id: "bench".parse().unwrap(),
            spec: self.spec(),
            dir: self.dir().to_path_buf(),
            console: Some(self.console_file()),
            permit: RunPermit::granted(),
            taps: self.taps.clone(),
            kind: VmKind::Managed,
            imported: false,
            incomplete: None,
        }
    }

    pub(crate) fn adoption(&self, run: Option<RunRecord>) -> AdoptRequest {
        AdoptRequest {
            instance: InstanceId::new(Uuid::nil()),
            uid: self.uid,
            vm_id: "bench".parse().unwrap(),
            spec: self.spec(),
            dir: self.dir().to_path_buf(),
            run,
            kind: VmKind::Managed,
            imported: false,
            changed_ms: 0,
        }
    }

    pub(crate) async fn try_launch(&self) -> Result<Run, BackendError> {
        self.backend.launch(self.request()).await.map(Run::from)
    }

    pub(crate) async fn launch(&self) -> Run {
        self.try_launch().await.unwrap()
    }

    pub(crate) async fn sweep(&self) {
        self.backend.sweep(SweepRequest::of_folder(self.uid, self.dir())).await.unwrap();
    }

    pub(crate) fn console_file(&self) -> PathBuf {
        self.dir().join("console,log")
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.console_file()).unwrap_or_default()).into_owned()
    }

    /// Waits until the console shows `text` for the `times`th time.
    pub(crate) async fn console_shows(&self, text: &str, times: usize) {
        let shown = async {
            while self.console().matches(text).count() < times {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(WAIT_TIMEOUT, shown).await.is_err() {
            panic!("the console does not show {text:?} {times} times: {}", self.console());
        }
    }

    /// The processes that use the run folder.
    pub(crate) fn processes(&self) -> usize {
        find_by_argument(self.dir()).unwrap().len()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for found in find_by_argument(self.dir.path()).unwrap_or_default() {
            if let Lookup::Alive(process) = adopt(&found.identity) {
                let _ = process.signal(Signal::KILL);
            }
        }
    }
}

/// A running VM.
pub(crate) struct Run {
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) events: mpsc::Receiver<VmmEvent>,
}

impl From<LaunchedVmm> for Run {
    fn from(launched: LaunchedVmm) -> Self {
        Self { vmm: launched.vmm, events: launched.events }
    }
}

impl Run {
    pub(crate) async fn event(&mut self) -> VmmEvent {
        tokio::time::timeout(WAIT_TIMEOUT, self.events.recv()).await.expect("an event").expect("not the end")
    }

    /// The end, which must be the next event and the last.
    pub(crate) async fn gone(&mut self) -> Exit {
        match self.event().await {
            VmmEvent::Gone(exit) => {
                assert_eq!(self.events.recv().await, None, "nothing follows the end");
                exit
            }
            other => panic!("{other:?} instead of the end"),
        }
    }

    /// Fails if there is news.
    pub(crate) fn no_event(&mut self) {
        assert_eq!(self.events.try_recv(), Err(mpsc::error::TryRecvError::Empty));
    }

    pub(crate) fn signal(&self, signal: Signal) {
        match adopt(&self.vmm.run().process) {
            Lookup::Alive(process) => process.signal(signal).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}
