//! Converts a [`VmSpec`] into QEMU's command line, or into the command line and the later file of a
//! spare QEMU. A pure function: equal requests give equal words.
//!
//! ```text
//!   VmSpec ──► options ─┬─► arguments          all of them on the command line
//!                       └─► ahead … told       options of every VM, and the rest in a later file
//! ```
//!
//! Values of a client (paths, kernel arguments) are passed where QEMU parses nothing, or in JSON.
//! Only `-chardev` has no JSON form, so its commas are doubled. Images are opened by `-blockdev`
//! with an explicit format, so no format is detected:
//!
//! ```text
//!   virtio-blk ──► [throttle diskN] ──► raw|qcow2 diskN-format ──► file|host_device diskN-file
//! ```
//!
//! Devices have fixed slots, so a disk that is added to a configuration does not rename a network
//! interface in the guest. On q35, disks are the functions of PCI slots 2 to 9 and interfaces those
//! of slots 16 to 23. On microvm, which has 23 usable virtio-mmio transports, disks come first and
//! interfaces follow.

mod disk;
mod file;
mod option;
mod trial;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_core::id::{VmId, VmUid};
use vmm_core::spec::{Boot, Cpu, MIB, Memory, Nic, PageSize, RestartMode, RestartPolicy, VmSpec};

use super::client::RebootAction;
use super::layout::{FUNCTIONS, MEMORY_SLOTS, NIC_SLOT};
use super::options::VmOptions;
pub use file::InexpressibleVm;
use option::QemuOption;
pub(super) use trial::{MADE, trial};

/// The QMP socket's name in the run folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The console's name in the run folder. QEMU reads the input from the FIFO of this name with `.in`,
/// and writes the output to the file of this name with `.out`, which leads to `/dev/null`, because
/// the log has the output.
const CONSOLE: &str = "console";
/// The name in the run folder of the file that takes QEMU's own copy of the output.
pub(super) const CONSOLE_OUTPUT: &str = "console.out";
/// The name of the file with the process id in the run folder.
const PID_FILE: &str = "qemu.pid";

/// The virtio-mmio transport of microvm's first device. QEMU lists the transports to the guest from
/// the last to the first, so devices are placed downwards. Transport 0 is not used, because its
/// interrupts are lost: they arrive at pin 0 of the second interrupt controller, and QEMU (7.2)
/// takes any pin 0 for the timer's and raises pin 2.
const FIRST_TRANSPORT: usize = 23;

/// The accelerator of the guest's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's CPUs, by KVM.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// Returns QEMU's name of the accelerator.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A machine model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QemuMachine {
    /// A PC with PCI Express.
    Q35,
    /// A small machine with virtio-mmio devices, which starts faster.
    Microvm,
}

impl QemuMachine {
    /// Returns QEMU's name of the machine.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// Returns the machine of `spec`, or `None` if there is no such machine.
    pub fn of(spec: &VmSpec) -> Option<Self> {
        VmOptions::of(spec).machine
    }

    /// Returns the machine that QEMU calls `name`.
    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Q35, Self::Microvm].into_iter().find(|machine| machine.as_str() == name)
    }

    /// Returns the ending of a virtio device's name on this machine.
    const fn virtio(self) -> &'static str {
        match self {
            Self::Q35 => "pci",
            Self::Microvm => "device",
        }
    }

    /// Returns the firmware, or `None` for the machine's default.
    const fn firmware(self) -> Option<&'static str> {
        match self {
            // SeaBIOS, the default, answers each reset of a q35 with one or two of its own, because
            // q35 leaves the firmware's writable copy mapped. These resets look like the guest's,
            // and end QEMU if a guest may not reset itself. qboot, which QEMU ships for microvm,
            // boots only kernels, boots sooner, and does not reset.
            Self::Q35 => Some("qboot.rom"),
            Self::Microvm => None,
        }
    }

    const fn properties(self) -> &'static [(&'static str, &'static str)] {
        match self {
            // No PC device that guests of the other backends lack: no SATA, USB, SMBus, VMware port
            // or SMM.
            Self::Q35 => &[
                ("usb", "off"),
                ("sata", "off"),
                ("smbus", "off"),
                ("vmport", "off"),
                ("smm", "off"),
                ("dump-guest-core", "off"),
            ],
            // ACPI provides the power button, the reset register and the list of virtio-mmio
            // devices.
            Self::Microvm => &[
                ("acpi", "on"),
                ("pit", "on"),
                ("pic", "on"),
                ("rtc", "on"),
                ("isa-serial", "on"),
                ("usb", "off"),
                ("auto-kernel-cmdline", "off"),
                ("dump-guest-core", "off"),
            ],
        }
    }
}

/// The kind of file at a disk's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// The inputs of the command line.
#[derive(Clone, Copy, Debug)]
pub struct QemuInputs<'a> {
    /// The uid, which marks the process in the process list.
    pub uid: VmUid,
    /// The VM's name.
    pub vm_id: &'a VmId,
    /// The specification of the VM.
    pub spec: &'a VmSpec,
    /// The machine model.
    pub machine: QemuMachine,
    /// The accelerator of the guest's CPUs.
    pub accelerator: Accelerator,
    /// The run folder.
    pub dir: &'a Path,
    /// The file of the console's output.
    pub console: Option<&'a Path>,
    /// The TAP of each network interface.
    pub taps: &'a [String],
    /// The kind of file at each disk's path.
    pub images: &'a [ImageKind],
}

/// A path that JSON cannot express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("QEMU cannot be given the path {0:?}: it is not UTF-8; rename it")]
pub struct PathNotUtf8(pub PathBuf);

/// Returns the action of a reset by the guest under `spec`. By default the guest starts again.
pub fn reboot_action(spec: &VmSpec) -> RebootAction {
    match spec.restart.mode.unwrap_or(DEFAULT_RESTART) {
        RestartMode::Never => RebootAction::Shutdown,
        RestartMode::GuestReboot | RestartMode::OnFailure | RestartMode::Always => RebootAction::Reset,
    }
}

/// The restart mode if `restart_policy` is not set.
pub const DEFAULT_RESTART: RestartMode = RestartMode::GuestReboot;

/// The file that a spare QEMU reads its VM from: its own standard input.
const INPUT: &str = "/proc/self/fd/0";

/// Returns the command line, without the program's name.
///
/// The guest waits for `cont` (`-S`), because a guest that ends within milliseconds would otherwise
/// end unseen.
///
/// # Errors
///
/// [`PathNotUtf8`] for the path of a disk.
pub fn arguments(inputs: &QemuInputs<'_>) -> Result<Vec<OsString>, PathNotUtf8> {
    Ok(command_line(options(inputs)?.iter()))
}

/// The inputs of the command line of a spare QEMU.
#[derive(Clone, Copy, Debug)]
pub struct SpareQemuInputs<'a> {
    /// The uid of the VM to come.
    pub uid: VmUid,
    /// The accelerator of the guest's CPUs.
    pub accelerator: Accelerator,
    /// The run folder of the VM to come.
    pub dir: &'a Path,
}

/// Returns the command line of a QEMU that reads its VM from its input, as
/// [`SpareQemuConfig::file`]. If the input ends early, QEMU exits with an error, because its serial
/// port has no backend.
pub fn spare_arguments(inputs: &SpareQemuInputs<'_>) -> Vec<OsString> {
    let mut options = Vec::new();
    identity(&mut options, inputs.uid);
    processor(&mut options, inputs.accelerator, None);
    serial(&mut options, true);
    control(&mut options, inputs.dir);
    spare_options(&options)
}

/// The VM in the form for a spare QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpareQemuConfig {
    /// The command line that the spare must have been started with, as [`spare_arguments`] returns
    /// it. Another CPU model than the default, or a disabled console, needs another command line,
    /// because a file cannot express these.
    pub ahead: Vec<OsString>,
    /// The file that the spare reads, for the same machine as [`arguments`].
    pub file: String,
}

/// Returns the VM in the form for a spare QEMU.
///
/// # Errors
///
/// [`InexpressibleVm`] if only the command line can express a value.
pub fn spare_config(inputs: &QemuInputs<'_>) -> Result<SpareQemuConfig, InexpressibleVm> {
    let options = options(inputs)?;
    Ok(SpareQemuConfig { ahead: spare_options(&options), file: file::write(&options)? })
}

fn command_line<'a>(options: impl Iterator<Item = &'a QemuOption>) -> Vec<OsString> {
    let mut words = Vec::new();
    for option in options {
        option.write_words(&mut words);
    }
    words
}

fn spare_options(options: &[QemuOption]) -> Vec<OsString> {
    let mut words = command_line(options.iter().filter(|option| matches!(option, QemuOption::Ahead { .. })));
    words.extend(["-readconfig".into(), INPUT.into()]);
    words
}

fn options(inputs: &QemuInputs<'_>) -> Result<Vec<QemuOption>, PathNotUtf8> {
    // The request names the console's file.
    let VmSpec { cpu, memory, boot, disks, nics, console: _, restart, options: _ } = inputs.spec;
    let RestartPolicy { mode: _, max_restarts: _ } = restart;
    let mut options = Vec::new();
    options.push(QemuOption::Pairs {
        flag: "-name",
        group: "name",
        kind: None,
        pairs: vec![("guest", inputs.vm_id.to_string().into())],
    });
    identity(&mut options, inputs.uid);
    machine(&mut options, inputs, cpu, memory);
    add_boot(&mut options, boot, inputs.spec.kernel_args());
    for (index, (disk, image)) in disks.iter().zip(inputs.images).enumerate() {
        options.push(QemuOption::Disk(disk::option(inputs.machine, index, disk, *image)?));
    }
    for (index, (nic, tap)) in nics.iter().zip(inputs.taps).enumerate() {
        add_nic(&mut options, inputs.machine, disks.len(), index, nic, tap);
    }
    if inputs.machine == QemuMachine::Q35 && !inputs.spec.resets_on_panic() {
        options.push(panic_device());
    }
    console(&mut options, inputs);
    control(&mut options, inputs.dir);
    let reboot = reboot_action(inputs.spec).as_str();
    options.push(QemuOption::Pairs {
        flag: "-action",
        group: "action",
        kind: None,
        pairs: vec![("reboot", reboot.into()), ("shutdown", "poweroff".into()), ("panic", "shutdown".into())],
    });
    Ok(options)
}

/// Returns the device by which a guest reports a panic. The ISA form needs no PCI slot, and libvirt
/// 9.0 supports no other.
fn panic_device() -> QemuOption {
    QemuOption::device(json!({ "driver": "pvpanic", "id": "pvpanic" }))
}

fn identity(options: &mut Vec<QemuOption>, uid: VmUid) {
    options.extend([
        QemuOption::ahead("-uuid", uid.to_string()),
        QemuOption::Ahead { flag: "-S", value: None },
        QemuOption::Ahead { flag: "-nodefaults", value: None },
        QemuOption::Ahead { flag: "-no-user-config", value: None },
        QemuOption::ahead("-display", "none"),
        // QEMU starts no helper here, because the TAPs exist and no script runs.
        QemuOption::ahead(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ),
    ]);
}

fn machine(options: &mut Vec<QemuOption>, inputs: &QemuInputs<'_>, cpu: &Cpu, memory: &Memory) {
    let Cpu { count, max, topology } = *cpu;
    let Memory { size_bytes, hotplug_max_bytes, pages, shared } = *memory;
    let huge = pages == PageSize::Huge;
    model(options, inputs.machine, (huge || shared).then_some(("memory-backend", "ram")));
    let model = VmOptions::of(inputs.spec).model.map(|model| model.text);
    processor(options, inputs.accelerator, model);
    let (sockets, cores, threads) = match topology {
        Some(topology) => (topology.sockets, topology.cores, topology.threads),
        None => (1, max, 1),
    };
    let counts =
        [("cpus", count), ("maxcpus", max), ("sockets", sockets), ("cores", cores), ("threads", threads)];
    let pairs = counts.map(|(key, count)| (key, count.to_string().into())).to_vec();
    options.push(QemuOption::Pairs { flag: "-smp", group: "smp-opts", kind: None, pairs });
    let mut size = vec![("size", format!("{}M", memory.size_mib()).into())];
    if let (QemuMachine::Q35, Some(ceiling)) = (inputs.machine, hotplug_max_bytes)
        && ceiling > size_bytes
    {
        size.push(("slots", MEMORY_SLOTS.to_string().into()));
        size.push(("maxmem", format!("{}M", ceiling / MIB).into()));
    }
    options.push(QemuOption::Pairs { flag: "-m", group: "memory", kind: None, pairs: size });
    if huge || shared {
        options.push(QemuOption::object(json!({
            "qom-type": "memory-backend-memfd", "id": "ram", "size": size_bytes,
            "hugetlb": huge, "share": shared,
        })));
    }
}

/// Adds the machine model and its firmware. `more` is a property that only some VMs have.
fn model(options: &mut Vec<QemuOption>, machine: QemuMachine, more: Option<(&'static str, &'static str)>) {
    let properties = machine.properties().iter().copied().chain(more);
    let pairs = properties.map(|(key, value)| (key, value.into())).collect();
    let kind = Some(("type", machine.as_str().into()));
    options.push(QemuOption::Pairs { flag: "-machine", group: "machine", kind, pairs });
    if let Some(firmware) = machine.firmware() {
        options.push(QemuOption::Property { flag: "-bios", key: "firmware", value: firmware.into() });
    }
}

fn processor(options: &mut Vec<QemuOption>, accelerator: Accelerator, model: Option<&str>) {
    options.push(QemuOption::ahead("-accel", accelerator.as_str()));
    options.push(QemuOption::ahead("-cpu", model.unwrap_or(default_model(accelerator))));
}

/// Returns the CPU model if the client names none, which has all features of the accelerator.
const fn default_model(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

fn add_boot(options: &mut Vec<QemuOption>, boot: &Boot, args: String) {
    // `args` is the whole command line.
    let Boot { kernel, initrd, args: _ } = boot;
    options.push(QemuOption::Property { flag: "-kernel", key: "kernel", value: kernel.into() });
    if let Some(initrd) = initrd {
        options.push(QemuOption::Property { flag: "-initrd", key: "initrd", value: initrd.into() });
    }
    if !args.is_empty() {
        options.push(QemuOption::Property { flag: "-append", key: "append", value: args.into() });
    }
}

fn add_nic(
    options: &mut Vec<QemuOption>,
    machine: QemuMachine,
    disks: usize,
    index: usize,
    nic: &Nic,
    tap: &str,
) {
    // The check warns that QEMU cannot limit an interface.
    let Nic { id: _, mac, tap: _, limits: _ } = nic;
    // QEMU before 7.2 accepts no JSON here.
    options.push(QemuOption::Pairs {
        flag: "-netdev",
        group: "netdev",
        kind: Some(("type", "tap".into())),
        pairs: vec![
            ("id", format!("tap{index}").into()),
            ("ifname", tap.into()),
            ("script", "no".into()),
            ("downscript", "no".into()),
        ],
    });
    let mut device = json!({
        "driver": format!("virtio-net-{}", machine.virtio()), "id": format!("net{index}"),
        "netdev": format!("tap{index}"), "mac": mac.to_string(),
    });
    if machine == QemuMachine::Q35 {
        // Guests do not boot from the network, so the ROM is left out.
        device["romfile"] = "".into();
    }
    options.push(QemuOption::device(merged(device, &address(machine, NIC_SLOT, index, disks + index))));
}

/// Returns the slot of a device: a PCI function on q35, a virtio-mmio transport on microvm.
fn address(machine: QemuMachine, first_slot: usize, index: usize, transport: usize) -> Value {
    match machine {
        QemuMachine::Q35 => {
            let (slot, function) = (first_slot + index / FUNCTIONS, index % FUNCTIONS);
            let mut address = json!({ "bus": "pcie.0", "addr": format!("{slot:x}.{function}") });
            if function == 0 {
                address["multifunction"] = true.into();
            }
            address
        }
        QemuMachine::Microvm => {
            json!({ "bus": format!("virtio-mmio-bus.{}", FIRST_TRANSPORT.saturating_sub(transport)) })
        }
    }
}

fn console(options: &mut Vec<QemuOption>, inputs: &QemuInputs<'_>) {
    if let Some(output) = inputs.console {
        // QEMU writes the log by itself, so the console needs no daemon. A pipe has no client that
        // could stop the guest by not reading, and no end that the daemon could close by its own.
        let pairs = vec![
            ("id", "console".into()),
            ("path", inputs.dir.join(CONSOLE).into()),
            ("logfile", output.into()),
            ("logappend", "on".into()),
        ];
        let kind = Some(("backend", "pipe".into()));
        options.push(QemuOption::Pairs { flag: "-chardev", group: "chardev", kind, pairs });
    }
    serial(options, inputs.console.is_some());
}

fn serial(options: &mut Vec<QemuOption>, console: bool) {
    options.push(QemuOption::ahead("-serial", if console { "chardev:console" } else { "none" }));
}

fn control(options: &mut Vec<QemuOption>, dir: &Path) {
    let kind = ("backend", "socket".into());
    let socket = listening("qmp", &dir.join(QMP_SOCKET));
    options.push(QemuOption::ahead("-chardev", option::joined(Some(&kind), &socket)));
    options.push(QemuOption::ahead("-mon", "chardev=qmp,mode=control"));
    if dir.as_os_str().as_bytes().contains(&b',') {
        // The file's path names the run folder with single commas, which the search for a process
        // without a record needs. Other run folders are found by the paths of the sockets, so QEMU
        // need not write the file.
        options.push(QemuOption::ahead("-pidfile", dir.join(PID_FILE)));
    }
}

/// Returns the options of a socket that QEMU listens on without waiting for a client.
fn listening(id: &str, path: &Path) -> Vec<(&'static str, OsString)> {
    vec![("id", id.into()), ("server", "on".into()), ("wait", "off".into()), ("path", path.into())]
}

fn merged(mut object: Value, more: &Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    object
}
