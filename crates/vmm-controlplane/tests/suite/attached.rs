//! The columns of VMMs that somebody else started: here the column itself, by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tempfile::TempDir;
use vmm_backends::attached;
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_backends::qemu::{QemuBackend, QemuOptions};
use vmm_core::backend::Backend;
use vmm_core::config::VmConfig;
use vmm_core::store::VmRecord;
use vmm_testkit::backend_suite::{Column, LinuxGuest, ObeyingGuest};
use vmm_testkit::by_hand::{ByHandGuest as HandGuest, ByHandProgram, ByHandVmm};

use crate::columns;

/// How often a VMM is looked at.
const SCAN_INTERVAL: Duration = Duration::from_millis(300);
/// The most VMs that a case has at once.
const PLACES: usize = 4;

pub(crate) fn cloud_hypervisor() -> Arc<dyn Column> {
    Arc::new(AttachedColumn::new(ByHandProgram::CloudHypervisor, columns::cloud_hypervisor()))
}

pub(crate) fn firecracker() -> Arc<dyn Column> {
    Arc::new(AttachedColumn::new(ByHandProgram::Firecracker, columns::firecracker()))
}

pub(crate) fn qemu() -> Arc<dyn Column> {
    Arc::new(AttachedColumn::new(ByHandProgram::Qemu, columns::qemu_q35()))
}

struct AttachedColumn {
    kind: ByHandProgram,
    /// The same hypervisor where its VMMs are started.
    managed: Arc<dyn Column>,
    dir: TempDir,
    vmms: Mutex<BTreeMap<PathBuf, ByHandVmm>>,
}

impl AttachedColumn {
    fn new(kind: ByHandProgram, managed: Arc<dyn Column>) -> Self {
        let dir = tempfile::Builder::new().prefix("va").tempdir().expect("a folder can be made");
        Self { kind, managed, dir, vmms: Mutex::default() }
    }

    fn sockets(&self) -> Vec<PathBuf> {
        match self.kind {
            // Called as the VMs of the cases are, for there they are known by their sockets.
            ByHandProgram::Qemu => {
                ["vm", "other", "running", "paused", "shutdown"].map(|name| self.dir.path().join(name)).into()
            }
            ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker => {
                (0..PLACES).map(|place| self.dir.path().join(format!("{place}.sock"))).collect()
            }
        }
    }

    fn vmms(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, ByHandVmm>> {
        self.vmms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serial(&self, vm_id: &str) -> PathBuf {
        self.dir.path().join(format!("{vm_id}.serial"))
    }

    /// What the QEMU of a VM was told to run.
    fn guest_file(&self, socket: &Path) -> PathBuf {
        socket.with_extension("kernel")
    }

    /// Starts the QEMU of a VM, whose guest waits or runs.
    fn start_qemu(&self, socket: &Path, start: fn(ByHandProgram, &Path, &HandGuest) -> ByHandVmm) {
        let kernel = std::fs::read_to_string(self.guest_file(socket)).expect("it was made before");
        let name = socket.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let guest = HandGuest { kernel: kernel.into(), serial: self.serial(&name), more: Vec::new() };
        let mut vmms = self.vmms();
        vmms.remove(socket);
        vmms.insert(socket.to_path_buf(), start(ByHandProgram::Qemu, socket, &guest));
    }
}

#[async_trait]
impl Column for AttachedColumn {
    fn name(&self) -> &'static str {
        match self.kind {
            ByHandProgram::CloudHypervisor => "attached-cloudhypervisor",
            ByHandProgram::Firecracker => "attached-firecracker",
            ByHandProgram::Qemu => "attached-qemu",
        }
    }

    fn backend(&self) -> Arc<dyn Backend> {
        let sockets = self.sockets();
        if self.kind != ByHandProgram::Qemu && self.kind.missing().is_none() {
            let mut vmms = self.vmms();
            for socket in &sockets {
                vmms.entry(socket.clone()).or_insert_with(|| ByHandVmm::waits(self.kind, socket));
            }
        }
        match self.kind {
            ByHandProgram::CloudHypervisor => {
                let managed = CloudHypervisorBackend::new("cloud-hypervisor");
                Arc::new(attached::cloud_hypervisor(sockets, managed, SCAN_INTERVAL))
            }
            ByHandProgram::Firecracker => Arc::new(attached::firecracker(
                sockets,
                FirecrackerBackend::new("firecracker"),
                SCAN_INTERVAL,
            )),
            ByHandProgram::Qemu => {
                Arc::new(attached::qemu(sockets, QemuBackend::new(QemuOptions::default()), SCAN_INTERVAL))
            }
        }
    }

    fn known_version(&self) -> Option<Result<String, String>> {
        (self.kind == ByHandProgram::Qemu).then(|| match self.kind.missing() {
            Some(why) => Err(why),
            None => qemu_version(),
        })
    }

    fn obeying(&self) -> ObeyingGuest {
        self.managed.obeying()
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        self.managed.linux()
    }

    async fn view(&self, record: &VmRecord) -> String {
        self.managed.view(record).await
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        match (self.kind, case) {
            (ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker, _) => self.managed.evidence(case),
            (ByHandProgram::Qemu, _) => &[],
        }
    }

    /// The VMMs wait on; what must not be left is a guest that runs.
    fn processes(&self, _runtime_dir: &Path) -> Vec<String> {
        let mut vmms = self.vmms();
        let running = vmms.values_mut().filter_map(|vmm| {
            // One that does not answer may run one.
            let busy = vmm.is_alive() && vmm.runs_a_guest() != Some(false);
            busy.then(|| format!("{} {}", vmm.pid(), vmm.socket.display()))
        });
        running.collect()
    }

    fn kill_all(&self, _runtime_dir: &Path) {
        self.vmms().clear();
    }

    fn another(&self, socket: &Path) {
        if self.kind == ByHandProgram::Qemu {
            return self.start_qemu(socket, ByHandVmm::runs);
        }
        let mut vmms = self.vmms();
        // Before its successor takes the socket.
        vmms.remove(socket);
        vmms.insert(socket.to_path_buf(), ByHandVmm::waits(self.kind, socket));
    }

    fn make(&self, vm_id: &str, config: &VmConfig) -> Option<String> {
        let name = self.imported(vm_id)?;
        let socket = self.dir.path().join(vm_id);
        let kernel = config.boot.as_ref().map(|boot| boot.kernel_path.clone()).unwrap_or_default();
        std::fs::write(self.guest_file(&socket), kernel).expect("a file can be written");
        let _ = std::fs::remove_file(self.serial(vm_id));
        self.start_qemu(&socket, ByHandVmm::holds);
        Some(name)
    }

    fn imported(&self, vm_id: &str) -> Option<String> {
        let socket = self.dir.path().join(vm_id);
        let known = self.kind == ByHandProgram::Qemu && self.sockets().contains(&socket);
        known.then(|| socket.display().to_string().trim_start_matches('/').replace('/', "-"))
    }

    fn console(&self, vm_id: &str) -> Option<PathBuf> {
        (self.kind == ByHandProgram::Qemu).then(|| self.serial(vm_id))
    }

    fn imports(&self) -> bool {
        self.kind == ByHandProgram::Qemu
    }
}

/// The version of the QEMU that is started by hand.
fn qemu_version() -> Result<String, String> {
    let said = std::process::Command::new(ByHandProgram::Qemu.program()).arg("--version").output();
    let said = said.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    version.map(str::to_owned).ok_or_else(|| format!("it names no version: {text}"))
}
