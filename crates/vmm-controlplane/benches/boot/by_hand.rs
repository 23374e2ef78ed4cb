//! The ways to start a VMM by hand. Each returns when the VMM says that its guest runs.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;
use vmm_backends::qemu::convert::{self, Accelerator, QMP_SOCKET, QemuInputs, QemuMachine};
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, VmConfig};
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;

use super::MIB;
use super::http::{exchange, rest};

/// Starts a VMM in a folder of its own with a kernel.
pub(super) type ByHandWay = fn(&Path, &Path) -> Child;

/// Starts Firecracker with a configuration file. Firecracker answers calls once the guest runs.
pub(super) fn firecracker_by_file(dir: &Path, kernel: &Path) -> Child {
    let (socket, file) = (dir.join("fc.sock"), dir.join("config.json"));
    let config = json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": "reboot=k"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MIB},
        "drives": [],
    });
    std::fs::write(&file, config.to_string()).unwrap();
    let files = ["--config-file", file.to_str().unwrap(), "--log-path", log(dir).to_str().unwrap()]
        .map(str::to_owned);
    let child = start("firecracker", [&["--api-sock".into(), text(&socket)], &files[..]].concat(), dir);
    let state = rest(&mut connect(&socket), "GET", "/", &Value::Null);
    assert!(state.contains("Running"), "{state}");
    child
}

/// Starts Firecracker, and configures it by calls.
pub(super) fn firecracker_by_calls(dir: &Path, kernel: &Path) -> Child {
    let socket = dir.join("fc.sock");
    let child =
        start("firecracker", ["--api-sock".into(), text(&socket), "--log-path".into(), text(&log(dir))], dir);
    let mut api = connect(&socket);
    rest(&mut api, "PUT", "/boot-source", &json!({"kernel_image_path": kernel, "boot_args": "reboot=k"}));
    rest(&mut api, "PUT", "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": MIB}));
    rest(&mut api, "PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    child
}

/// Starts Cloud Hypervisor with the whole VM on its command line.
pub(super) fn cloud_hypervisor_by_arguments(dir: &Path, kernel: &Path) -> Child {
    let socket = dir.join("ch.sock");
    let memory = format!("size={MIB}M");
    let arguments = [
        ["--api-socket", socket.to_str().unwrap()],
        ["--kernel", kernel.to_str().unwrap()],
        ["--cpus", "boot=1,max=1"],
        ["--memory", &memory],
        ["--serial", "tty"],
        ["--console", "off"],
    ];
    let child = start("cloud-hypervisor", arguments.concat(), dir);
    let mut api = connect(&socket);
    // The socket is there before the VM, and a call about the VM fails until then.
    while !exchange(&mut api, "GET", "/api/v1/vm.info", &Value::Null).1.contains("\"Running\"") {}
    child
}

/// Starts Cloud Hypervisor, and configures it by calls.
pub(super) fn cloud_hypervisor_by_calls(dir: &Path, kernel: &Path) -> Child {
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

/// Starts a microvm whose CPUs run from the start.
pub(super) fn microvm(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Microvm, false, dir, kernel)
}

/// Starts a stopped microvm, and lets its CPUs run by a command.
pub(super) fn microvm_stopped(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Microvm, true, dir, kernel)
}

/// Starts a q35 machine whose CPUs run from the start.
pub(super) fn q35(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Q35, false, dir, kernel)
}

/// Starts a stopped q35 machine, and lets its CPUs run by a command.
pub(super) fn q35_stopped(dir: &Path, kernel: &Path) -> Child {
    qemu(QemuMachine::Q35, true, dir, kernel)
}

/// Starts the machine that a VM of the API gets. QEMU greets before its machine is built. Its first
/// answer comes from the main loop, and then the guest runs, unless it is `stopped`.
fn qemu(machine: QemuMachine, stopped: bool, dir: &Path, kernel: &Path) -> Child {
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
    arguments.retain(|argument| stopped || argument != "-S");
    prepare_console(dir);
    let child = start("qemu-system-x86_64", arguments, dir);
    let mut qmp = BufReader::new(connect(&dir.join(QMP_SOCKET)));
    let mut line = String::new();
    qmp.read_line(&mut line).unwrap();
    assert!(line.contains("QMP"), "{line}");
    for command in ["qmp_capabilities", "cont"].into_iter().take(1 + usize::from(stopped)) {
        qmp.get_mut().write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes()).unwrap();
        line.clear();
        while !line.contains("return") {
            line.clear();
            assert!(qmp.read_line(&mut line).unwrap() > 0, "QEMU closed its connection");
        }
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

/// Makes the files of QEMU's console, as the daemon does.
fn prepare_console(dir: &Path) {
    vmm_host::console_input::make_fifo(&dir.join("console.in")).unwrap();
    std::os::unix::fs::symlink("/dev/null", dir.join("console.out")).unwrap();
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Connects as soon as the socket is there.
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
