//! A daemon to be measured, and the calls that measure it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_host::process::find_by_argument;

/// Longer than a daemon takes to start or to end here.
const START_LIMIT: Duration = Duration::from_secs(300);

/// Folders in which daemons run one after the other.
pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("vmcps").tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    fn vms(&self) -> PathBuf {
        self.path().join("run/vms")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The VMMs of VMs that ran, each of which names its folder.
        for folder in std::fs::read_dir(self.vms()).into_iter().flatten().flatten() {
            for left in find_by_argument(&folder.path()).unwrap_or_default() {
                if let Some(pid) = left.identity.pid.try_into().ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
    }
}

/// A daemon that serves.
pub(crate) struct Daemon {
    child: Child,
    address: String,
    agent: ureq::Agent,
}

impl Daemon {
    pub(crate) fn start(host: &Host, env: &[(&str, String)]) -> Self {
        let log = host.path().join("log");
        let program = std::env::var_os("VMCP_BENCH_DAEMON")
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm-controlplane").into());
        let child = Command::new(program)
            .env("UNKEY_VMCP_PORT", "0")
            .env("UNKEY_VMCP_BACKEND", "qemu")
            .env("UNKEY_VMCP_QEMU_KVM", "false")
            .env("UNKEY_VMCP_METRICS_INTERVAL", "5")
            .env("UNKEY_VMCP_STATE_DIR", host.state())
            .env("UNKEY_VMCP_RUNTIME_DIR", host.path().join("run"))
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let agent = ureq::Agent::config_builder().timeout_global(Some(START_LIMIT)).build().into();
        let mut daemon = Self { child, address: String::new(), agent };
        daemon.address = daemon.serves_on(&log);
        daemon
    }

    /// The address that the daemon says it serves on.
    fn serves_on(&mut self, log: &Path) -> String {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline && self.child.try_wait().unwrap().is_none() {
            let said = std::fs::read_to_string(log).unwrap();
            let mut lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let serving = lines.rfind(|line| line["message"] == "serving");
            if let Some(address) = serving.and_then(|line| Some(line["address"].as_str()?.to_owned())) {
                return address;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the daemon does not serve; see {}", log.display());
    }

    /// Calls a method on a connection that is kept.
    pub(crate) fn call(&self, method: &str, body: &Value) -> Value {
        let url = format!("http://{}/vmm.v1.VmService/{method}", self.address);
        let answer = self.agent.post(&url).header("content-type", "application/json").send(body.to_string());
        let mut answer = answer.unwrap_or_else(|error| panic!("{method}: {error}"));
        serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap_or_default()
    }

    /// Returns the address at which the daemon serves.
    #[allow(dead_code, reason = "another program uses this")]
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The daemon's process id.
    #[allow(dead_code, reason = "another program uses this")]
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The token of the page that begins after so many VMs.
    pub(crate) fn token_at(&self, place: usize) -> String {
        let mut token = String::new();
        let mut passed = 0;
        while passed < place {
            let size = (place - passed).min(1000);
            let page = self.call("ListVms", &json!({"page_size": size, "page_token": token}));
            page["next_page_token"].as_str().unwrap_or_default().clone_into(&mut token);
            passed += size;
        }
        token
    }

    /// Opens a watch on a connection of its own, and reads nothing.
    pub(crate) fn open_watch(&self, request: &Value) -> TcpStream {
        let body = request.to_string();
        let mut framed = vec![0];
        framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        framed.extend(body.as_bytes());
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(
            stream,
            "POST /vmm.v1.VmService/WatchVms HTTP/1.1\r\nHost: localhost\r\n\
             Content-Type: application/connect+json\r\nContent-Length: {}\r\n\r\n",
            framed.len()
        )
        .unwrap();
        stream.write_all(&framed).unwrap();
        stream
    }

    /// Opens a watch, and answers how long it took until a VM, or the marker where there is one
    /// alone, was told.
    pub(crate) fn watch(&self, request: &Value) -> Duration {
        let wanted: &[u8] = if request["vm_id"].is_string() { b"synced" } else { b"present" };
        let began = Instant::now();
        let mut stream = self.open_watch(request);
        let mut reported = Vec::new();
        let mut buffer = [0; 4096];
        while !reported.windows(wanted.len()).any(|text| text == wanted) {
            let read = stream.read(&mut buffer).unwrap();
            assert!(read > 0, "the daemon ended the watch: {}", String::from_utf8_lossy(&reported));
            reported.extend_from_slice(&buffer[..read]);
        }
        let took = began.elapsed();
        // The daemon notices that this watch is closed before the next one is opened.
        drop(stream);
        std::thread::sleep(Duration::from_millis(50));
        took
    }

    /// A line of the daemon's status in /proc, in kB.
    pub(crate) fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let value = status.lines().find_map(|it| it.strip_prefix(line)?.strip_prefix(':')).unwrap();
        value.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The name under which this program is a VMM that runs no guest.
const FAKE_VMM: &str = "fake-qemu";

/// Says whether this process is to be a VMM.
pub(crate) fn is_fake_vmm() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).file_name() == Some(FAKE_VMM.as_ref()))
}

/// Makes the program of that name.
pub(crate) fn fake_vmm(host: &Host) -> PathBuf {
    let fake = host.path().join(FAKE_VMM);
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &fake).unwrap();
    fake
}
