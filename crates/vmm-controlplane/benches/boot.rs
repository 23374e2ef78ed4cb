//! CreateVm + BootVm through the API, against driving the same VMM by hand with the fewest calls.
//!
//! All start the same tiny guest, in turn, in one run, because machines are noisy and a ratio inside one run is the only
//! number that means anything. `make bench` builds and runs it; `VMCP_BENCH_ROUNDS` (50) says how often, and
//! `VMCP_BENCH_ONLY=firecracker` for which backend alone.
//!
//! There are two rows for each VMM, both against the same times by hand:
//!
//! - `firecracker`: the daemon as it is by default. BootVm starts the VMM's process, as by hand.
//! - `firecracker, spare`: a second daemon, with `UNKEY_VMCP_SPARE_VMMS=1`. Its VMM was started before the clock and waits; the round
//!   waits for that. So this row leaves out what the times by hand have in them, the start of a process. It tells how long
//!   a client waits whose CreateVm finds a spare VMM, not that less work is done: that was done before, and the process for the
//!   next VM is started after the clock. Who boots VMs faster than spare ones are started gets the other row.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program without an executor that prints what it measured"
)]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use uuid::Uuid;
use vmm_backends::qemu::convert::{self, Accelerator, QMP_SOCKET, QemuInputs, QemuMachine};
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, VmConfig};
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;
use vmm_host::process::find_by_argument;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::on_path;

/// Memory of every guest.
const MIB: u64 = 64;
/// What the end of one side leaves to be cleared away is not to slow down the other.
const QUIET_INTERVAL: Duration = Duration::from_millis(20);
/// How long a spare VMM may take to be there again.
const SPARE_LIMIT: Duration = Duration::from_secs(10);

struct Vmm {
    backend: &'static str,
    program: &'static str,
    options: Value,
    by_hand: fn(&Path, &Path) -> Child,
}

fn main() {
    let rounds: usize =
        std::env::var("VMCP_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(50);
    let vmms = [
        Vmm { backend: "firecracker", program: "firecracker", options: json!({}), by_hand: firecracker },
        Vmm {
            backend: "cloudhypervisor",
            program: "cloud-hypervisor",
            options: json!({}),
            by_hand: cloud_hypervisor,
        },
        Vmm {
            backend: "qemu",
            program: "qemu-system-x86_64",
            options: json!({"qemu.machine": "microvm"}),
            by_hand: qemu_microvm,
        },
        Vmm {
            backend: "qemu",
            program: "qemu-system-x86_64",
            options: json!({"qemu.machine": "q35"}),
            by_hand: qemu_q35,
        },
    ];
    let only = std::env::var("VMCP_BENCH_ONLY").ok();
    println!("{rounds} rounds each, API, API with a spare VMM, and by hand in turn; milliseconds\n");
    println!("| VMM | API p50 | by hand p50 | ratio of p50 | API p95 | by hand p95 |");
    println!("|---|---|---|---|---|---|");
    for vmm in vmms.into_iter().filter(|vmm| only.as_deref().is_none_or(|only| only == vmm.backend)) {
        let machine = vmm.options["qemu.machine"].as_str().map(|name| format!(" {name}")).unwrap_or_default();
        if !on_path(vmm.program) {
            println!("| {}{machine} | SKIPPED: {} is not on PATH | | | | |", vmm.backend, vmm.program);
            continue;
        }
        let times = measure(&vmm, rounds);
        let name = format!("{}{machine}", vmm.backend);
        row(&name, &times.api, &times.hand);
        match times.spare {
            Some(Spared { times: spare, missed }) => {
                let note =
                    if missed == 0 { String::new() } else { format!(" ({missed} of {rounds} found none)") };
                row(&format!("{name}, spare{note}"), &spare, &times.hand);
            }
            None => println!("| {name}, spare | SKIPPED: no spare VMM came up | | | | |"),
        }
    }
}

fn row(name: &str, api: &[Duration], hand: &[Duration]) {
    let ratio = percentile(api, 50).as_secs_f64() / percentile(hand, 50).as_secs_f64();
    println!(
        "| {name} | {:.2} | {:.2} | {ratio:.2} | {:.2} | {:.2} |",
        ms(percentile(api, 50)),
        ms(percentile(hand, 50)),
        ms(percentile(api, 95)),
        ms(percentile(hand, 95)),
    );
}

/// The times of each way, sorted.
struct Times {
    api: Vec<Duration>,
    /// `None` where no spare VMM came up.
    spare: Option<Spared>,
    hand: Vec<Duration>,
}

#[derive(Default)]
struct Spared {
    times: Vec<Duration>,
    /// How many rounds were run by another process than the one that waited; their times count.
    missed: usize,
}

/// Measures the three ways in turn.
fn measure(vmm: &Vmm, rounds: usize) -> Times {
    let dir = tempfile::Builder::new().prefix("vmcpb").tempdir().unwrap();
    // As on a host: the state is on a disk, and what a running VMM needs in memory.
    let run = tempfile::Builder::new().prefix("vmcpb").tempdir_in(in_memory()).unwrap();
    let kernel = TinyGuest::Idle.write_to(dir.path()).unwrap();
    let mut plain = Daemon::start(&dir.path().join("plain"), &run.path().join("plain"), vmm.backend, 0);
    let mut ahead = Daemon::start(&dir.path().join("ahead"), &run.path().join("ahead"), vmm.backend, 1);
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": MIB << 20},
        "boot": {"kernel_path": kernel, "boot_options": vmm.options},
    });
    let mut times = Times { api: Vec::new(), spare: Some(Spared::default()), hand: Vec::new() };
    let mut waiting = None;
    // The first round warms caches, makes the first spare VMM come up, and is not counted.
    for round in 0..=rounds {
        let (by_api, _) = plain.round(round, &config);
        if let Some(spare) = &mut times.spare {
            let (by_api, pid) = ahead.round(round, &config);
            if round > 0 {
                spare.times.push(by_api);
                spare.missed += usize::from(waiting != Some(pid));
            }
            waiting = ahead.spare();
            if waiting.is_none() && round == 0 {
                times.spare = None;
            }
        }

        let folder = run.path().join(format!("hand{round}"));
        std::fs::create_dir(&folder).unwrap();
        std::thread::sleep(QUIET_INTERVAL);
        let start = Instant::now();
        let mut child = (vmm.by_hand)(&folder, &kernel);
        let by_hand = start.elapsed();
        child.kill().unwrap();
        child.wait().unwrap();
        if round > 0 {
            times.api.push(by_api);
            times.hand.push(by_hand);
        }
    }
    times.api.sort_unstable();
    times.hand.sort_unstable();
    if let Some(spare) = &mut times.spare {
        spare.times.sort_unstable();
    }
    times
}

/// A folder that is kept in memory, as /run mostly is.
fn in_memory() -> PathBuf {
    let shared_memory = PathBuf::from("/dev/shm");
    if shared_memory.is_dir() { shared_memory } else { std::env::temp_dir() }
}

/// A daemon, ended when dropped.
struct Daemon {
    child: Child,
    api: TcpStream,
    /// Where its run folders are.
    vms: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, run: &Path, backend: &str, spare_vmms: usize) -> Self {
        std::fs::create_dir(dir).unwrap();
        std::fs::create_dir(run).unwrap();
        let log = dir.join("daemon.log");
        let child = Command::new(env!("CARGO_BIN_EXE_vmm-controlplane"))
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
        Self { child, api, vms: run.join("run/vms") }
    }

    /// One VM from nothing to RUNNING, and away again: how long it took to get there, and the process that ran it.
    fn round(&mut self, round: usize, config: &Value) -> (Duration, u32) {
        let vm_id = format!("bench{round}");
        std::thread::sleep(QUIET_INTERVAL);
        let start = Instant::now();
        self.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
        self.call("BootVm", &json!({"vm_id": vm_id}));
        let by_api = start.elapsed();
        let info = self.call("GetVmInfo", &json!({"vm_id": vm_id}));
        let pid = info["backend_info"]["pid"].as_str().unwrap().parse().unwrap();
        self.call("DeleteVm", &json!({"vm_id": vm_id, "force": true}));
        (by_api, pid)
    }

    /// Waits until a spare VMM is there and has come to rest, and answers its process id; `None` if none came.
    fn spare(&self) -> Option<u32> {
        let deadline = Instant::now() + SPARE_LIMIT;
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

    /// The process in a run folder with the mark of a spare VMM.
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
        // Told to end, it ends its spare VMMs too.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + SPARE_LIMIT;
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            std::thread::sleep(QUIET_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Where a round broke off its VM goes on.
        for left in find_by_argument(&self.vms).unwrap_or_default() {
            if let Some(pid) = left.identity.pid.try_into().ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// The processor time of a process, in clock ticks.
fn cpu_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

/// The address that the daemon says it serves on.
fn address_in(log: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let said = std::fs::read_to_string(log).unwrap();
        let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(address) = lines.filter_map(|line| Some(line["address"].as_str()?.to_owned())).next() {
            return address;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the daemon does not serve; see {}", log.display());
}

fn firecracker(dir: &Path, kernel: &Path) -> Child {
    let socket = dir.join("fc.sock");
    let child = start(
        "firecracker",
        ["--api-sock", socket.to_str().unwrap(), "--log-path", log(dir).to_str().unwrap()],
        dir,
    );
    let mut api = connect(&socket);
    rest(&mut api, "PUT", "/boot-source", &json!({"kernel_image_path": kernel, "boot_args": "reboot=k"}));
    rest(&mut api, "PUT", "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": MIB}));
    rest(&mut api, "PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    child
}

fn cloud_hypervisor(dir: &Path, kernel: &Path) -> Child {
    let socket = dir.join("ch.sock");
    let child = start("cloud-hypervisor", ["--api-socket", socket.to_str().unwrap()], dir);
    let mut api = connect(&socket);
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": MIB << 20},
        "payload": {"kernel": kernel},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    });
    rest(&mut api, "PUT", "/api/v1/vm.create", &config);
    rest(&mut api, "PUT", "/api/v1/vm.boot", &Value::Null);
    child
}

fn qemu_microvm(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Microvm, dir, kernel)
}

fn qemu_q35(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Q35, dir, kernel)
}

/// The very machine that the API's VM gets, its CPUs running from the start. QEMU greets before its machine is built; its
/// first answer comes from the main loop, and then the guest runs.
fn qemu(machine: QemuMachine, dir: &Path, kernel: &Path) -> Child {
    let boot = BootConfig { kernel_path: kernel.display().to_string(), ..BootConfig::default() };
    let config = VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: (MIB << 20).cast_signed(), ..MemoryConfig::default() }),
        boot: Some(boot),
        ..VmConfig::default()
    };
    let inputs = QemuInputs {
        uid: VmUid::new(Uuid::now_v7()),
        vm_id: &"hand".parse().unwrap(),
        spec: &VmSpec::parse(&config).unwrap(),
        machine,
        accelerator: Accelerator::Tcg,
        dir,
        console: Some(&dir.join("console")),
        taps: &[],
        images: &[],
    };
    let mut arguments = convert::arguments(&inputs).unwrap();
    arguments.retain(|argument| argument != "-S");
    let child = start("qemu-system-x86_64", arguments, dir);
    let mut qmp = BufReader::new(connect(&dir.join(QMP_SOCKET)));
    let mut line = String::new();
    qmp.read_line(&mut line).unwrap();
    assert!(line.contains("QMP"), "{line}");
    qmp.get_mut().write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
    while !line.contains("return") {
        line.clear();
        assert!(qmp.read_line(&mut line).unwrap() > 0, "QEMU closed its connection");
    }
    child
}

fn log(dir: &Path) -> PathBuf {
    let path = dir.join("log");
    std::fs::File::create(&path).unwrap();
    path
}

fn start(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, dir: &Path) -> Child {
    let output = std::fs::File::create(dir.join("output")).unwrap();
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Connects as soon as the socket is there; a person's loop would be slower.
fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        std::thread::yield_now();
    }
}

/// One REST call on a connection that is kept; answers the body.
fn rest(stream: &mut (impl Read + Write), method: &str, path: &str, body: &Value) -> String {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !is_whole(&answer) {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "{path}: the VMM closed its connection");
        answer.extend_from_slice(&buffer[..read]);
    }
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 20"), "{path}: {answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if is_chunked(head) { unchunked(body) } else { body.to_owned() }
}

/// Says whether an answer has come to its end: its head, and as much as the head promises.
fn is_whole(answer: &[u8]) -> bool {
    let Some(at) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..at]).to_ascii_lowercase();
    if is_chunked(&head) {
        return answer.ends_with(b"\r\n0\r\n\r\n");
    }
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    answer.len() >= at + 4 + length.unwrap_or(0)
}

fn is_chunked(head: &str) -> bool {
    head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked")
}

/// A body without the lengths of its chunks, which stand on lines of their own before each.
fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&rest[..length]);
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
