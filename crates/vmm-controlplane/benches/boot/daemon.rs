//! A daemon whose VMs are measured.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_host::process::find_by_argument;

use super::QUIET_INTERVAL;
use super::http::rest;

/// The time that a spare VMM may take to come up again.
const SPARE_TIMEOUT: Duration = Duration::from_secs(10);

/// The measurement of one round.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    pub(super) time: Duration,
    /// True if a spare VMM was to run the VM and another process did.
    pub(super) missed: bool,
}

/// A daemon, ended when dropped.
pub(super) struct Daemon {
    child: Child,
    api: TcpStream,
    /// The folder of its run folders.
    vms: PathBuf,
    spares: bool,
    /// The spare VMM that waits for the next VM.
    waiting: Option<u32>,
}

impl Daemon {
    pub(super) fn start(program: &Path, dir: &Path, run: &Path, backend: &str, spare_vmms: usize) -> Self {
        std::fs::create_dir(dir).unwrap();
        std::fs::create_dir(run).unwrap();
        let log = dir.join("daemon.log");
        let child = Command::new(program)
            .env("UNKEY_VMCP_PORT", "0")
            .env("UNKEY_VMCP_BACKEND", backend)
            .env("UNKEY_VMCP_QEMU_KVM", "false")
            .env("UNKEY_VMCP_SPARE_VMMS", spare_vmms.to_string())
            .env("UNKEY_VMCP_STATE_DIR", dir.join("state"))
            .env("UNKEY_VMCP_RUNTIME_DIR", run.join("run"))
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let address = address_in(&log);
        let api = TcpStream::connect(address).unwrap();
        api.set_nodelay(true).unwrap();
        Self { child, api, vms: run.join("run/vms"), spares: spare_vmms > 0, waiting: None }
    }

    /// Measures CreateVm and BootVm together.
    pub(super) fn create_and_boot(&mut self, round: usize, config: &Value) -> Measured {
        let vm_id = format!("bench{round}");
        std::thread::sleep(QUIET_INTERVAL);
        let start = Instant::now();
        self.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
        self.call("BootVm", &json!({"vm_id": vm_id}));
        let time = start.elapsed();
        let pid = self.finish(&vm_id);
        let missed = self.spares && self.waiting != Some(pid);
        if self.spares {
            self.waiting = self.spare();
        }
        Measured { time, missed }
    }

    /// Measures BootVm alone.
    pub(super) fn boot(&mut self, round: usize, config: &Value) -> Measured {
        let vm_id = format!("bench{round}");
        self.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
        std::thread::sleep(QUIET_INTERVAL);
        let start = Instant::now();
        self.call("BootVm", &json!({"vm_id": vm_id}));
        let time = start.elapsed();
        self.finish(&vm_id);
        Measured { time, missed: false }
    }

    /// Deletes the VM, and returns the process id of its VMM.
    fn finish(&mut self, vm_id: &str) -> u32 {
        let info = self.call("GetVmInfo", &json!({"vm_id": vm_id}));
        assert_eq!(info["state"], "VM_STATE_RUNNING", "{info}");
        let pid = info["backend_info"]["pid"].as_str().unwrap().parse().unwrap();
        self.call("DeleteVm", &json!({"vm_id": vm_id, "force": true}));
        pid
    }

    /// Waits until a spare VMM is there and uses no processor time, and returns its process id.
    /// Returns `None` if none comes.
    fn spare(&self) -> Option<u32> {
        let deadline = Instant::now() + SPARE_TIMEOUT;
        let mut before = None;
        while Instant::now() < deadline {
            let now = self.waiting().map(|pid| (pid, cpu_time(pid)));
            if let (Some((pid, _)), true) = (now, now == before) {
                return Some(pid);
            }
            before = now;
            std::thread::sleep(QUIET_INTERVAL);
        }
        None
    }

    /// Returns the process in a run folder with the mark of a spare VMM.
    fn waiting(&self) -> Option<u32> {
        let marked =
            std::fs::read_dir(&self.vms).ok()?.flatten().map(|entry| entry.path()).find(|folder| {
                let mut entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
                entries.any(|entry| entry.file_name().to_string_lossy().starts_with("spare-"))
            })?;
        find_by_argument(&marked).ok()?.first().map(|found| found.identity.pid)
    }

    fn call(&mut self, method: &str, body: &Value) -> Value {
        let answer = rest(&mut self.api, "POST", &format!("/vmm.v1.VmService/{method}"), body);
        serde_json::from_str(&answer).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // On SIGTERM the daemon ends its spare VMMs too.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + SPARE_TIMEOUT;
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            std::thread::sleep(QUIET_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A VM of a round that failed still runs.
        for left in find_by_argument(&self.vms).unwrap_or_default() {
            if let Some(pid) = left.identity.pid.try_into().ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Returns the processor time of a process, in clock ticks.
fn cpu_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

/// Returns the address that the daemon logs when it serves.
fn address_in(log: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let logged = std::fs::read_to_string(log).unwrap();
        let lines = logged.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(address) = lines.filter_map(|line| Some(line["address"].as_str()?.to_owned())).next() {
            return address;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the daemon does not serve; see {}", log.display());
}
