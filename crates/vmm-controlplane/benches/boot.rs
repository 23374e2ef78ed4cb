//! CreateVm + BootVm through the API, against driving the same VMM by hand with the fewest calls.
//!
//! Both start the same tiny guest, in turn, in one run, because machines are noisy and a ratio inside one run is the only
//! number that means anything. `make bench` builds and runs it; `VMCP_BENCH_ROUNDS` (50) says how often, and
//! `VMCP_BENCH_ONLY=firecracker` for which backend alone.

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

use serde_json::{Value, json};
use uuid::Uuid;
use vmm_backends::qemu::convert::{self, Accelerator, Inputs, Machine, QMP_SOCKET};
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, VmConfig};
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;
use vmm_testkit::guests::Guest;

/// Memory of every guest.
const MIB: u64 = 64;
/// What the end of one side leaves to be cleared away is not to slow down the other.
const QUIET: Duration = Duration::from_millis(20);

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
    println!("{rounds} rounds each, API and by hand in turn; milliseconds\n");
    println!("| VMM | API p50 | by hand p50 | ratio of p50 | API p95 | by hand p95 |");
    println!("|---|---|---|---|---|---|");
    for vmm in vmms.into_iter().filter(|vmm| only.as_deref().is_none_or(|only| only == vmm.backend)) {
        let machine = vmm.options["qemu.machine"].as_str().map(|name| format!(" {name}")).unwrap_or_default();
        if !on_path(vmm.program) {
            println!("| {}{machine} | SKIPPED: {} is not on PATH | | | | |", vmm.backend, vmm.program);
            continue;
        }
        let (api, hand) = measure(&vmm, rounds);
        let ratio = percentile(&api, 50).as_secs_f64() / percentile(&hand, 50).as_secs_f64();
        println!(
            "| {}{machine} | {:.2} | {:.2} | {ratio:.2} | {:.2} | {:.2} |",
            vmm.backend,
            ms(percentile(&api, 50)),
            ms(percentile(&hand, 50)),
            ms(percentile(&api, 95)),
            ms(percentile(&hand, 95)),
        );
    }
}

/// Measures both ways in turn, and answers the times of each, sorted.
fn measure(vmm: &Vmm, rounds: usize) -> (Vec<Duration>, Vec<Duration>) {
    let dir = tempfile::Builder::new().prefix("vmcpb").tempdir().unwrap();
    // As on a host: the state is on a disk, and what a running VMM needs in memory.
    let run = tempfile::Builder::new().prefix("vmcpb").tempdir_in(in_memory()).unwrap();
    let kernel = Guest::Idle.write_to(dir.path()).unwrap();
    let mut daemon = Daemon::start(dir.path(), run.path(), vmm.backend);
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": MIB << 20},
        "boot": {"kernel_path": kernel, "boot_options": vmm.options},
    });
    let (mut api, mut hand) = (Vec::new(), Vec::new());
    // The first round warms caches and is not counted.
    for round in 0..=rounds {
        let vm_id = format!("bench{round}");
        std::thread::sleep(QUIET);
        let start = Instant::now();
        daemon.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
        daemon.call("BootVm", &json!({"vm_id": vm_id}));
        let by_api = start.elapsed();
        daemon.call("DeleteVm", &json!({"vm_id": vm_id, "force": true}));

        let folder = run.path().join(format!("hand{round}"));
        std::fs::create_dir(&folder).unwrap();
        std::thread::sleep(QUIET);
        let start = Instant::now();
        let mut child = (vmm.by_hand)(&folder, &kernel);
        let by_hand = start.elapsed();
        child.kill().unwrap();
        child.wait().unwrap();
        if round > 0 {
            api.push(by_api);
            hand.push(by_hand);
        }
    }
    api.sort_unstable();
    hand.sort_unstable();
    (api, hand)
}

/// A folder that is kept in memory, as /run mostly is.
fn in_memory() -> PathBuf {
    let shared_memory = PathBuf::from("/dev/shm");
    if shared_memory.is_dir() { shared_memory } else { std::env::temp_dir() }
}

/// The daemon, ended when dropped.
struct Daemon {
    child: Child,
    api: TcpStream,
}

impl Daemon {
    fn start(dir: &Path, run: &Path, backend: &str) -> Self {
        let log = dir.join("daemon.log");
        let child = Command::new(env!("CARGO_BIN_EXE_vmm-controlplane"))
            .env("UNKEY_VMCP_PORT", "0")
            .env("UNKEY_VMCP_BACKEND", backend)
            .env("UNKEY_VMCP_QEMU_KVM", "false")
            .env("UNKEY_VMCP_STATE_DIR", dir.join("state"))
            .env("UNKEY_VMCP_RUNTIME_DIR", run.join("run"))
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let address = address_in(&log);
        let api = TcpStream::connect(address).unwrap();
        api.set_nodelay(true).unwrap();
        Self { child, api }
    }

    fn call(&mut self, method: &str, body: &Value) {
        rest(&mut self.api, "POST", &format!("/vmm.v1.VmService/{method}"), body);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address that the daemon says it serves on.
fn address_in(log: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let said = std::fs::read_to_string(log).unwrap();
        let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(address) =
            lines.filter_map(|line| Some(line["fields"]["address"].as_str()?.to_owned())).next()
        {
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
    qemu(Machine::Microvm, dir, kernel)
}

fn qemu_q35(dir: &Path, kernel: &Path) -> Child {
    qemu(Machine::Q35, dir, kernel)
}

/// The very machine that the API's VM gets, its CPUs running from the start. QEMU greets before its machine is built; its
/// first answer comes from the main loop, and then the guest runs.
fn qemu(machine: Machine, dir: &Path, kernel: &Path) -> Child {
    let boot = BootConfig { kernel_path: kernel.display().to_string(), ..BootConfig::default() };
    let config = VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: (MIB << 20).cast_signed(), ..MemoryConfig::default() }),
        boot: Some(boot),
        ..VmConfig::default()
    };
    let inputs = Inputs {
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

/// One REST call on a connection that is kept.
fn rest(stream: &mut (impl Read + Write), method: &str, path: &str, body: &Value) {
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
}

/// Says whether an answer has come to its end: its head, and as much as the head promises.
fn is_whole(answer: &[u8]) -> bool {
    let Some(head) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
    let length =
        text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    answer.len() >= head + 4 + length.unwrap_or(0)
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
