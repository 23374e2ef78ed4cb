//! VMMs that a test starts by hand, as somebody else would: on a socket, with nothing of the daemon's.
//!
//! A [`ByHand`] ends with its value, whatever became of it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long a VMM may take to listen.
const LISTENING: Duration = Duration::from_secs(30);
/// How long it may take to answer.
const ANSWERING: Duration = Duration::from_secs(5);

/// A hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// QEMU, in software emulation.
    Qemu,
}

impl Kind {
    /// All three.
    pub const ALL: [Self; 3] = [Self::CloudHypervisor, Self::Firecracker, Self::Qemu];

    /// The backend's name.
    #[must_use]
    pub const fn backend(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloudhypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }

    /// The variable that names its sockets.
    #[must_use]
    pub const fn variable(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "UNKEY_VMCP_CH_ENDPOINT",
            Self::Firecracker => "UNKEY_VMCP_FC_ENDPOINT",
            Self::Qemu => "UNKEY_VMCP_QEMU_ENDPOINT",
        }
    }

    /// Its program.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu-system-x86_64",
        }
    }

    /// Why it cannot run here, if it cannot.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|dir| dir.join(self.program()).is_file()) {
            return Some(format!("{} is not on PATH", self.program()));
        }
        (self != Self::Qemu && !Path::new("/dev/kvm").exists()).then(|| "there is no /dev/kvm".to_owned())
    }
}

/// What a VMM is to run.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// Where its serial port goes.
    pub serial: PathBuf,
    /// Further arguments, of QEMU alone.
    pub more: Vec<String>,
}

/// A VMM that was started by hand.
#[derive(Debug)]
pub struct ByHand {
    /// The hypervisor.
    pub kind: Kind,
    /// Its socket.
    pub socket: PathBuf,
    child: Child,
}

impl ByHand {
    /// Starts one that waits to be told what to run. QEMU cannot.
    #[must_use]
    pub fn waits(kind: Kind, socket: &Path) -> Self {
        Self::start(kind, Path::new(kind.program()), socket, None, &[])
    }

    /// The same of another program file.
    #[must_use]
    pub fn waits_as(kind: Kind, program: &Path, socket: &Path) -> Self {
        Self::start(kind, program, socket, None, &[])
    }

    /// Starts one and tells it what to run, without running it.
    #[must_use]
    pub fn holds(kind: Kind, socket: &Path, guest: &Guest) -> Self {
        match kind {
            Kind::Qemu => Self::start(kind, Path::new(kind.program()), socket, Some(guest), &["-S"]),
            Kind::CloudHypervisor | Kind::Firecracker => {
                let vmm = Self::start(kind, Path::new(kind.program()), socket, Some(guest), &[]);
                vmm.configure(guest);
                vmm
            }
        }
    }

    /// Starts one that runs `guest`.
    #[must_use]
    pub fn runs(kind: Kind, socket: &Path, guest: &Guest) -> Self {
        if kind == Kind::Qemu {
            return Self::start(kind, Path::new(kind.program()), socket, Some(guest), &[]);
        }
        let vmm = Self::holds(kind, socket, guest);
        vmm.boot();
        vmm
    }

    fn start(kind: Kind, program: &Path, socket: &Path, guest: Option<&Guest>, more: &[&str]) -> Self {
        for left in [socket.to_path_buf(), PathBuf::from(format!("{}.lock", socket.display()))] {
            let _ = std::fs::remove_file(left);
        }
        let mut command = Command::new(program);
        let shown = socket.display();
        match kind {
            Kind::CloudHypervisor => drop(command.args(["--api-socket", &format!("path={shown}")])),
            Kind::Firecracker => drop(command.arg("--api-sock").arg(socket).args(["--level", "Error"])),
            Kind::Qemu => {
                let guest = guest.expect("QEMU is told what to run when it is started");
                command.args([
                    "-machine",
                    "q35",
                    "-m",
                    "64",
                    "-display",
                    "none",
                    "-nodefaults",
                    "-accel",
                    "tcg",
                ]);
                command
                    .arg("-chardev")
                    .arg(format!("file,id=serial,path={},append=on", guest.serial.display()));
                command.args(["-serial", "chardev:serial"]);
                command.arg("-kernel").arg(&guest.kernel).args(["-append", "from=hand"]);
                command.args(["-qmp", &format!("unix:{shown},server=on,wait=off")]);
                command.args(&guest.more).args(more);
            }
        }
        let output = match guest {
            Some(guest) if kind == Kind::Firecracker => Stdio::from(
                File::options().append(true).create(true).open(&guest.serial).expect("a file can be made"),
            ),
            Some(_) | None => Stdio::null(),
        };
        let child = command.stdin(Stdio::null()).stdout(output).stderr(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut vmm = Self { kind, socket: socket.to_path_buf(), child };
        vmm.wait_for_socket();
        vmm
    }

    #[expect(clippy::disallowed_methods, reason = "a test's own thread waits for another process")]
    fn wait_for_socket(&mut self) {
        let deadline = Instant::now() + LISTENING;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("{} ended: {status}", self.kind.program());
            }
            // QEMU serves one client: nobody is to take the place.
            let listens = match self.kind {
                Kind::Qemu => self.socket.exists(),
                Kind::CloudHypervisor | Kind::Firecracker => UnixStream::connect(&self.socket).is_ok(),
            };
            if listens {
                return;
            }
            assert!(Instant::now() < deadline, "{} does not listen", self.kind.program());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn configure(&self, guest: &Guest) {
        match self.kind {
            Kind::CloudHypervisor => self.put(
                "/api/v1/vm.create",
                &json!({
                    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
                    "memory": {"size": 64 << 20},
                    "payload": {"kernel": guest.kernel, "cmdline": "from=hand"},
                    "serial": {"mode": "File", "file": guest.serial},
                    "console": {"mode": "Off"},
                }),
            ),
            Kind::Firecracker => {
                self.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
                self.put(
                    "/boot-source",
                    &json!({"kernel_image_path": guest.kernel, "boot_args": "from=hand"}),
                );
            }
            Kind::Qemu => {}
        }
    }

    /// Starts the guest of one that holds it.
    pub fn boot(&self) {
        match self.kind {
            Kind::CloudHypervisor => self.put("/api/v1/vm.boot", &Value::Null),
            Kind::Firecracker => self.put("/actions", &json!({"action_type": "InstanceStart"})),
            Kind::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Pauses the guest, as somebody does behind the daemon's back.
    pub fn pause(&self) {
        match self.kind {
            Kind::CloudHypervisor => self.put("/api/v1/vm.pause", &Value::Null),
            Kind::Firecracker => drop(self.request("PATCH", "/vm", &json!({"state": "Paused"}))),
            Kind::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Lets it go on.
    pub fn resume(&self) {
        match self.kind {
            Kind::CloudHypervisor => self.put("/api/v1/vm.resume", &Value::Null),
            Kind::Firecracker => drop(self.request("PATCH", "/vm", &json!({"state": "Resumed"}))),
            Kind::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Puts `body` to `path`, which must be taken.
    pub fn put(&self, path: &str, body: &Value) {
        let (status, answer) = self.request("PUT", path, body);
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
    }

    /// Asks by hand. A status of 0 means that there was no answer.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        request(&self.socket, method, path, body)
    }

    /// Says whether it runs a guest, paused or not; `None` where it does not say.
    #[must_use]
    pub fn runs_a_guest(&self) -> Option<bool> {
        if self.kind == Kind::Qemu {
            return Some(true);
        }
        self.guest_state().map(|state| state == "Running" || state == "Paused")
    }

    /// What it says of its guest, in its own words, empty where it holds none; `None` where it does not say. QEMU is to be asked
    /// by QMP.
    #[must_use]
    pub fn guest_state(&self) -> Option<String> {
        let page = match self.kind {
            Kind::CloudHypervisor => "/api/v1/vm.info",
            Kind::Firecracker => "/",
            Kind::Qemu => return None,
        };
        match self.request("GET", page, &Value::Null) {
            (0, _) => None,
            (200, answer) => {
                let told = serde_json::from_str::<Value>(&answer).unwrap_or_default();
                Some(told["state"].as_str().unwrap_or_default().to_owned())
            }
            _ => Some(String::new()),
        }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says whether the process is there.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        // It may have ended.
        let _ = kill_process(pid, signal);
    }

    /// Kills it and waits until it has gone.
    pub fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        self.end();
    }
}

/// One request to a VMM's socket on a connection of its own. A status of 0 means that there was no answer in time.
#[must_use]
pub fn request(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, String) {
    exchange(socket, method, path, body).unwrap_or_default()
}

fn exchange(socket: &Path, method: &str, path: &str, body: &Value) -> Option<(u16, String)> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(ANSWERING)).ok()?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    loop {
        let mut bytes = [0; 8192];
        let count = stream.read(&mut bytes).ok()?;
        answer.extend_from_slice(&bytes[..count]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, content)) = text.split_once("\r\n\r\n") else {
            if count == 0 {
                return None;
            }
            continue;
        };
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok()
        });
        if count == 0 || content.len() >= length.unwrap_or(0) {
            let status = head.split_whitespace().nth(1)?.parse().ok()?;
            return Some((status, content.to_owned()));
        }
    }
}
