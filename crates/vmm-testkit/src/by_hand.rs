//! VMMs that a test starts by hand, like another program would: on a socket, without the daemon's
//! files.
//!
//! A [`ByHandVmm`] is killed when it is dropped.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The time that a VMM has to listen on its socket.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that a VMM has to answer a request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByHandProgram {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// QEMU, in software emulation.
    Qemu,
}

impl ByHandProgram {
    /// Every hypervisor.
    pub const ALL: [Self; 3] = [Self::CloudHypervisor, Self::Firecracker, Self::Qemu];

    /// Returns the name of the backend.
    #[must_use]
    pub const fn backend(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloudhypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }

    /// Returns the name of the variable that configures the hypervisor's sockets.
    #[must_use]
    pub const fn variable(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "UNKEY_VMCP_CH_ENDPOINT",
            Self::Firecracker => "UNKEY_VMCP_FC_ENDPOINT",
            Self::Qemu => "UNKEY_VMCP_QEMU_ENDPOINT",
        }
    }

    /// Returns the name of the hypervisor's program.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu-system-x86_64",
        }
    }

    /// Returns the reason why the hypervisor cannot run on this machine, if there is one.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|dir| dir.join(self.program()).is_file()) {
            return Some(format!("{} is not on PATH", self.program()));
        }
        (self != Self::Qemu && !Path::new("/dev/kvm").exists()).then(|| "there is no /dev/kvm".to_owned())
    }
}

/// The guest of a VMM.
#[derive(Clone, Debug)]
pub struct ByHandGuest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The file that receives the output of the serial port.
    pub serial: PathBuf,
    /// Further arguments. QEMU only.
    pub more: Vec<String>,
}

/// A VMM that was started by hand.
#[derive(Debug)]
pub struct ByHandVmm {
    /// The hypervisor.
    pub kind: ByHandProgram,
    /// The control socket.
    pub socket: PathBuf,
    child: Child,
}

impl ByHandVmm {
    /// Starts a VMM without a guest. QEMU cannot start without one.
    #[must_use]
    pub fn waits(kind: ByHandProgram, socket: &Path) -> Self {
        Self::start(kind, Path::new(kind.program()), socket, None, &[])
    }

    /// Starts a VMM without a guest from the given program file.
    #[must_use]
    pub fn waits_as(kind: ByHandProgram, program: &Path, socket: &Path) -> Self {
        Self::start(kind, program, socket, None, &[])
    }

    /// Starts a VMM and configures `guest` without running it.
    #[must_use]
    pub fn holds(kind: ByHandProgram, socket: &Path, guest: &ByHandGuest) -> Self {
        match kind {
            // QEMU cannot get a guest later. `-S` keeps the guest's CPUs stopped.
            ByHandProgram::Qemu => Self::start(kind, Path::new(kind.program()), socket, Some(guest), &["-S"]),
            ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker => {
                let vmm = Self::start(kind, Path::new(kind.program()), socket, Some(guest), &[]);
                vmm.configure(guest);
                vmm
            }
        }
    }

    /// Starts a VMM that runs `guest`.
    #[must_use]
    pub fn runs(kind: ByHandProgram, socket: &Path, guest: &ByHandGuest) -> Self {
        if kind == ByHandProgram::Qemu {
            return Self::start(kind, Path::new(kind.program()), socket, Some(guest), &[]);
        }
        let vmm = Self::holds(kind, socket, guest);
        vmm.boot();
        vmm
    }

    fn start(
        kind: ByHandProgram,
        program: &Path,
        socket: &Path,
        guest: Option<&ByHandGuest>,
        more: &[&str],
    ) -> Self {
        // Leftovers of an earlier VMM are removed, because a VMM cannot bind a path that exists.
        for left in [socket.to_path_buf(), PathBuf::from(format!("{}.lock", socket.display()))] {
            let _ = std::fs::remove_file(left);
        }
        let mut command = Command::new(program);
        let shown = socket.display();
        match kind {
            ByHandProgram::CloudHypervisor => {
                command.args(["--api-socket", &format!("path={shown}")]);
            }
            ByHandProgram::Firecracker => {
                command.arg("--api-sock").arg(socket).args(["--level", "Error"]);
            }
            ByHandProgram::Qemu => {
                let guest = guest.expect("QEMU gets its guest when it is started");
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
        // Firecracker writes the serial port to its standard output.
        let output = match guest {
            Some(guest) if kind == ByHandProgram::Firecracker => Stdio::from(
                File::options().append(true).create(true).open(&guest.serial).expect("a file can be made"),
            ),
            Some(_) | None => Stdio::null(),
        };
        let child = spawn(command.stdin(Stdio::null()).stdout(output).stderr(Stdio::null()));
        let child = child.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut vmm = Self { kind, socket: socket.to_path_buf(), child };
        vmm.wait_for_socket();
        vmm
    }

    #[expect(clippy::disallowed_methods, reason = "a test's own thread waits for another process")]
    fn wait_for_socket(&mut self) {
        let deadline = Instant::now() + LISTEN_TIMEOUT;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("{} ended: {status}", self.kind.program());
            }
            // QEMU serves one client at a time, so a test connection could take the place of the
            // daemon's.
            let listens = match self.kind {
                ByHandProgram::Qemu => self.socket.exists(),
                ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker => {
                    UnixStream::connect(&self.socket).is_ok()
                }
            };
            if listens {
                return;
            }
            assert!(Instant::now() < deadline, "{} does not listen", self.kind.program());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn configure(&self, guest: &ByHandGuest) {
        match self.kind {
            ByHandProgram::CloudHypervisor => self.put(
                "/api/v1/vm.create",
                &json!({
                    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
                    "memory": {"size": 64 << 20},
                    "payload": {"kernel": guest.kernel, "cmdline": "from=hand"},
                    "serial": {"mode": "File", "file": guest.serial},
                    "console": {"mode": "Off"},
                }),
            ),
            ByHandProgram::Firecracker => {
                self.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
                self.put(
                    "/boot-source",
                    &json!({"kernel_image_path": guest.kernel, "boot_args": "from=hand"}),
                );
            }
            ByHandProgram::Qemu => {}
        }
    }

    /// Starts the guest of a VMM that holds one.
    pub fn boot(&self) {
        match self.kind {
            ByHandProgram::CloudHypervisor => self.put("/api/v1/vm.boot", &Value::Null),
            ByHandProgram::Firecracker => self.put("/actions", &json!({"action_type": "InstanceStart"})),
            ByHandProgram::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Pauses the guest without the daemon's knowledge.
    pub fn pause(&self) {
        match self.kind {
            ByHandProgram::CloudHypervisor => self.put("/api/v1/vm.pause", &Value::Null),
            ByHandProgram::Firecracker => drop(self.request("PATCH", "/vm", &json!({"state": "Paused"}))),
            ByHandProgram::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Resumes the guest without the daemon's knowledge.
    pub fn resume(&self) {
        match self.kind {
            ByHandProgram::CloudHypervisor => self.put("/api/v1/vm.resume", &Value::Null),
            ByHandProgram::Firecracker => drop(self.request("PATCH", "/vm", &json!({"state": "Resumed"}))),
            ByHandProgram::Qemu => panic!("QEMU is told by QMP"),
        }
    }

    /// Sends `body` to `path` with PUT. Panics if the VMM refuses the request.
    pub fn put(&self, path: &str, body: &Value) {
        let (status, answer) = self.request("PUT", path, body);
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
    }

    /// Sends a request. A status of 0 means that there was no answer.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        request(&self.socket, method, path, body)
    }

    /// Returns `Some(true)` if the VMM runs a guest, paused or not. `None` if the VMM does not
    /// answer.
    #[must_use]
    pub fn runs_a_guest(&self) -> Option<bool> {
        if self.kind == ByHandProgram::Qemu {
            return Some(true);
        }
        self.guest_state().map(|state| state == "Running" || state == "Paused")
    }

    /// Returns the state of the guest in the VMM's own word, empty if the VMM holds no guest.
    /// `None` if the VMM does not answer, and always for QEMU, whose state is read by QMP.
    #[must_use]
    pub fn guest_state(&self) -> Option<String> {
        let page = match self.kind {
            ByHandProgram::CloudHypervisor => "/api/v1/vm.info",
            ByHandProgram::Firecracker => "/",
            ByHandProgram::Qemu => return None,
        };
        match self.request("GET", page, &Value::Null) {
            (0, _) => None,
            (200, answer) => {
                let reported = serde_json::from_str::<Value>(&answer).unwrap_or_default();
                Some(reported["state"].as_str().unwrap_or_default().to_owned())
            }
            _ => Some(String::new()),
        }
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns true if the process has not ended.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        // The process may have ended.
        let _ = kill_process(pid, signal);
    }

    /// Kills the process and waits until it has ended.
    pub fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for ByHandVmm {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends one request to a VMM's socket on a new connection. A status of 0 means that there was no
/// answer in time.
#[must_use]
pub fn request(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, String) {
    exchange(socket, method, path, body).unwrap_or_default()
}

fn exchange(socket: &Path, method: &str, path: &str, body: &Value) -> Option<(u16, String)> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).ok()?;
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
        // The VMMs keep the connection open, so the end of an answer is known by its length only.
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok()
        });
        if count == 0 || content.len() >= length.unwrap_or(0) {
            let status = head.split_whitespace().nth(1)?.parse().ok()?;
            return Some((status, content.to_owned()));
        }
    }
}

/// Starts a program whose file the test may just have written.
///
/// A process that another thread forked while the file was open for writing keeps the file open
/// until that process executes its own program. Until then the start fails with "text file busy".
#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for another process")]
fn spawn(command: &mut Command) -> io::Result<Child> {
    let deadline = Instant::now() + LISTEN_TIMEOUT;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}
