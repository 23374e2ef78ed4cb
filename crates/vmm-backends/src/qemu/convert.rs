//! From a [`VmSpec`] to QEMU's command line. Pure: the same request gives the same words.
//!
//! What a client names (paths, kernel arguments) goes where QEMU parses nothing, or into JSON; only `-chardev` has no JSON
//! form, and there commas are doubled. Images are opened by `-blockdev`, whose format is stated and so never probed:
//!
//! ```text
//!   virtio-blk ──► [throttle diskN] ──► raw|qcow2 diskN-format ──► file|host_device diskN-file ──► the image
//! ```
//!
//! Devices have fixed places, so that a disk added to a configuration renames no network interface in its guest: on q35,
//! disks are the functions of PCI slots 2 to 9 and interfaces those of slots 16 to 23; on microvm, which has 23 virtio-mmio
//! transports that work, disks come first and interfaces follow.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_core::id::{VmId, VmUid};
use vmm_core::spec::{Disk, DiskFormat, Nic, RateLimit, RestartMode, VmSpec, option_is_true, rate_limit};

use super::client::RebootAction;

/// The QMP socket's name in the run folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The console socket's name in the run folder: what is written there the guest reads from its serial port.
///
/// QEMU also sends the guest's output there, while somebody is connected, and the guest waits once some 270 bytes lie unread.
/// Whoever connects reads all the time, or is quick.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The process id file's name in the run folder.
const PID_FILE: &str = "qemu.pid";
/// The key of `boot_options` that picks the machine.
pub const MACHINE_KEY: &str = "qemu.machine";
/// The key of `cpu.features` that picks the CPU model.
pub const MODEL_KEY: &str = "qemu.model";

/// Functions of one PCI slot.
const FUNCTIONS: usize = 8;
/// The first PCI slot of the disks.
const DISK_SLOT: usize = 0x02;
/// The first PCI slot of the network interfaces.
const NIC_SLOT: usize = 0x10;
/// Bytes of a virtio disk's serial number; a longer id is cut.
const SERIAL_LEN: usize = 20;
/// The virtio-mmio transport of microvm's first device. QEMU lists them to the guest from the last to the first, so devices go
/// downwards, and stop before 0: its interrupts get lost, because they arrive at pin 0 of the second interrupt controller, and
/// QEMU (7.2) takes any pin 0 for the timer's and raises pin 2.
const FIRST_TRANSPORT: usize = 23;
/// Modules of memory that may be plugged.
const MEMORY_SLOTS: u32 = 16;

/// What runs the guest's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, by way of KVM.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// QEMU's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A machine model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// A PC with PCI Express.
    Q35,
    /// A small machine with virtio-mmio devices, which starts faster.
    Microvm,
}

impl Machine {
    /// QEMU's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// The machine that `spec` asks for; `None` where there is no such machine.
    pub fn of(spec: &VmSpec) -> Option<Self> {
        match spec.boot.options.get(MACHINE_KEY).map(String::as_str) {
            None | Some("q35") => Some(Self::Q35),
            Some("microvm") => Some(Self::Microvm),
            Some(_) => None,
        }
    }

    /// The ending of a virtio device's name on this machine.
    const fn virtio(self) -> &'static str {
        match self {
            Self::Q35 => "pci",
            Self::Microvm => "device",
        }
    }

    /// The firmware, where it is not the machine's own.
    const fn firmware(self) -> Option<&'static str> {
        match self {
            // The usual one, SeaBIOS, answers each reset of a q35 with one or two of its own, because q35 leaves the firmware's
            // writable copy mapped. They cannot be told from the guest's, and end QEMU where a guest may not reset itself.
            // qboot, which QEMU brings along for microvm, boots kernels only, sooner, and does no such thing.
            Self::Q35 => Some("qboot.rom"),
            Self::Microvm => None,
        }
    }

    const fn properties(self) -> &'static str {
        match self {
            // Nothing of a PC that no other backend's guest has: no SATA, USB, SMBus, VMware port or SMM.
            Self::Q35 => "q35,usb=off,sata=off,smbus=off,vmport=off,smm=off,dump-guest-core=off",
            // ACPI brings the power button, the reset register and the list of virtio-mmio devices.
            Self::Microvm => {
                "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,usb=off,auto-kernel-cmdline=off,dump-guest-core=off"
            }
        }
    }
}

/// What lies at a disk's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// Everything the command line depends on.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The VM's creation: the mark in the process list.
    pub uid: VmUid,
    /// The VM's name.
    pub vm_id: &'a VmId,
    /// What to run.
    pub spec: &'a VmSpec,
    /// The machine to run it on.
    pub machine: Machine,
    /// What runs its CPUs.
    pub accelerator: Accelerator,
    /// The run folder.
    pub dir: &'a Path,
    /// Where console output goes.
    pub console: Option<&'a Path>,
    /// The TAP of each network interface.
    pub taps: &'a [String],
    /// What lies at each disk's path.
    pub images: &'a [ImageKind],
}

/// A path that JSON cannot carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("QEMU cannot be given the path {0:?}: it is not UTF-8; rename it")]
pub struct PathNotUtf8(pub PathBuf);

/// What a guest's own reset does under `spec`: by default it starts again.
pub fn reboot_action(spec: &VmSpec) -> RebootAction {
    match spec.restart.mode.unwrap_or(DEFAULT_RESTART) {
        RestartMode::Never => RebootAction::Shutdown,
        RestartMode::GuestReboot | RestartMode::OnFailure | RestartMode::Always => RebootAction::Reset,
    }
}

/// What `restart_policy` means where it is not set.
pub const DEFAULT_RESTART: RestartMode = RestartMode::GuestReboot;

/// Writes the command line, without the program's name.
///
/// The guest waits for `cont` (`-S`): a guest that ends within milliseconds would otherwise end unseen.
///
/// # Errors
///
/// [`PathNotUtf8`] for a disk.
pub fn arguments(inputs: &Inputs<'_>) -> Result<Vec<OsString>, PathNotUtf8> {
    let mut line = Line::default();
    identity(&mut line, inputs);
    machine(&mut line, inputs);
    boot(&mut line, inputs.spec);
    for (place, (disk, image)) in inputs.spec.disks.iter().zip(inputs.images).enumerate() {
        add_disk(&mut line, inputs.machine, place, disk, *image)?;
    }
    let disks = inputs.spec.disks.len();
    for (place, (nic, tap)) in inputs.spec.nics.iter().zip(inputs.taps).enumerate() {
        add_nic(&mut line, inputs.machine, disks, place, nic, tap);
    }
    console(&mut line, inputs);
    control(&mut line, inputs);
    Ok(line.0)
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn option(&mut self, flag: &str, value: impl Into<OsString>) {
        self.flag(flag);
        self.0.push(value.into());
    }

    fn json(&mut self, flag: &str, value: &Value) {
        self.option(flag, value.to_string());
    }
}

fn identity(line: &mut Line, inputs: &Inputs<'_>) {
    line.option("-name", format!("guest={}", inputs.vm_id));
    line.option("-uuid", inputs.uid.to_string());
    line.flag("-S");
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.option("-display", "none");
    // QEMU starts no helpers here: the TAPs exist, and no script runs.
    line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
}

fn machine(line: &mut Line, inputs: &Inputs<'_>) {
    let spec = inputs.spec;
    let memory = &spec.memory;
    // Values other than true and false were refused when the spec was parsed.
    let backed = |key| option_is_true(&memory.backing, key).unwrap_or(false);
    let (huge, shared) = (backed("hugepages"), backed("shared"));
    let mut machine = inputs.machine.properties().to_owned();
    if huge || shared {
        machine.push_str(",memory-backend=ram");
    }
    line.option("-machine", machine);
    if let Some(firmware) = inputs.machine.firmware() {
        line.option("-bios", firmware);
    }
    line.option("-accel", inputs.accelerator.as_str());
    let model = spec.cpu.features.get(MODEL_KEY).map(String::as_str);
    line.option("-cpu", model.unwrap_or(default_model(inputs.accelerator)));
    let (sockets, cores, threads) = match spec.cpu.topology {
        Some(topology) => (topology.sockets, topology.cores, topology.threads),
        None => (1, spec.cpu.max, 1),
    };
    let (count, max) = (spec.cpu.count, spec.cpu.max);
    line.option(
        "-smp",
        format!("cpus={count},maxcpus={max},sockets={sockets},cores={cores},threads={threads}"),
    );
    let mut size = format!("size={}M", memory.size_mib());
    if let (Machine::Q35, Some(ceiling)) = (inputs.machine, memory.hotplug_max_bytes)
        && ceiling > memory.size_bytes
    {
        size.push_str(&format!(",slots={MEMORY_SLOTS},maxmem={}M", ceiling / vmm_core::spec::MIB));
    }
    line.option("-m", size);
    if huge || shared {
        line.json(
            "-object",
            &json!({
                "qom-type": "memory-backend-memfd", "id": "ram", "size": memory.size_bytes,
                "hugetlb": huge, "share": shared,
            }),
        );
    }
}

/// The CPU model where the client picks none: all that the accelerator has.
const fn default_model(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

fn boot(line: &mut Line, spec: &VmSpec) {
    line.option("-kernel", spec.boot.kernel.as_os_str());
    if let Some(initrd) = &spec.boot.initrd {
        line.option("-initrd", initrd.as_os_str());
    }
    let args = spec.kernel_args();
    if !args.is_empty() {
        line.option("-append", args);
    }
}

fn add_disk(
    line: &mut Line,
    machine: Machine,
    place: usize,
    disk: &Disk,
    image: ImageKind,
) -> Result<(), PathNotUtf8> {
    let filename = disk.path.to_str().ok_or_else(|| PathNotUtf8(disk.path.clone()))?;
    let (file, format, throttle) =
        (format!("disk{place}-file"), format!("disk{place}-format"), format!("disk{place}"));
    let direct = option_is_true(&disk.options, "direct_io").unwrap_or(false);
    let no_flush = disk.options.get("cache").is_some_and(|cache| cache == "unsafe");
    let common = json!({
        "read-only": disk.read_only,
        "discard": if disk.read_only { "ignore" } else { "unmap" },
        "cache": { "direct": direct, "no-flush": no_flush },
    });
    let driver = match image {
        ImageKind::File => "file",
        ImageKind::BlockDevice => "host_device",
    };
    let file_node = json!({ "driver": driver, "node-name": file, "filename": filename, "locking": "auto" });
    line.json("-blockdev", &merged(file_node, &common));
    let mut format_node = json!({ "driver": disk.format.as_str(), "node-name": format, "file": file });
    if disk.format == DiskFormat::Qcow2 && !disk.backing_files {
        // Whatever the image's header says, no other file is opened.
        format_node["backing"] = Value::Null;
    }
    line.json("-blockdev", &merged(format_node, &common));
    let limits = rate_limit(&disk.options, "rate_limit.operations_per_second").unwrap_or_default();
    let drive = match throttle_group(&throttle, limits) {
        Some(group) => {
            line.json("-object", &group);
            let node = json!({
                "driver": "throttle", "node-name": throttle, "throttle-group": group["id"], "file": format,
            });
            line.json("-blockdev", &merged(node, &json!({ "read-only": disk.read_only })));
            throttle
        }
        None => format,
    };
    // Ids are ASCII; a fault of the disk is the guest's to handle, as on the other backends.
    let serial: String = disk.id.chars().take(SERIAL_LEN).collect();
    let device = json!({
        "driver": format!("virtio-blk-{}", machine.virtio()), "id": format!("disk{place}"),
        "drive": drive, "serial": serial, "werror": "report", "rerror": "report",
    });
    line.json("-device", &merged(device, &address(machine, DISK_SLOT, place, place)));
    Ok(())
}

fn throttle_group(disk: &str, limits: RateLimit) -> Option<Value> {
    let mut ceilings = serde_json::Map::new();
    if let Some(bytes) = limits.bytes_per_second {
        ceilings.insert("bps-total".to_owned(), bytes.into());
    }
    if let Some(operations) = limits.operations_per_second {
        ceilings.insert("iops-total".to_owned(), operations.into());
    }
    (!ceilings.is_empty())
        .then(|| json!({ "qom-type": "throttle-group", "id": format!("{disk}-limit"), "limits": ceilings }))
}

fn add_nic(line: &mut Line, machine: Machine, disks: usize, place: usize, nic: &Nic, tap: &str) {
    // A TAP's name has neither comma nor equals sign; QEMU before 7.2 takes no JSON here.
    line.option("-netdev", format!("tap,id=tap{place},ifname={tap},script=no,downscript=no"));
    let mut device = json!({
        "driver": format!("virtio-net-{}", machine.virtio()), "id": format!("net{place}"),
        "netdev": format!("tap{place}"), "mac": nic.mac.to_string(),
    });
    if machine == Machine::Q35 {
        // No boot from the network, so no ROM for it.
        device["romfile"] = "".into();
    }
    line.json("-device", &merged(device, &address(machine, NIC_SLOT, place, disks + place)));
}

/// Where a device sits: a PCI function on q35, a virtio-mmio transport on microvm.
fn address(machine: Machine, first_slot: usize, place: usize, transport: usize) -> Value {
    match machine {
        Machine::Q35 => {
            let (slot, function) = (first_slot + place / FUNCTIONS, place % FUNCTIONS);
            let mut address = json!({ "bus": "pcie.0", "addr": format!("{slot:x}.{function}") });
            if function == 0 {
                address["multifunction"] = true.into();
            }
            address
        }
        Machine::Microvm => {
            json!({ "bus": format!("virtio-mmio-bus.{}", FIRST_TRANSPORT.saturating_sub(transport)) })
        }
    }
}

fn console(line: &mut Line, inputs: &Inputs<'_>) {
    match inputs.console {
        Some(output) => {
            // The log is written whether or not anybody is connected, so the console needs no daemon.
            let mut chardev = chardev_socket("console", &inputs.dir.join(CONSOLE_SOCKET));
            chardev.push(",logfile=");
            chardev.push(escaped(output.as_os_str()));
            chardev.push(",logappend=on");
            line.option("-chardev", chardev);
            line.option("-serial", "chardev:console");
        }
        None => line.option("-serial", "none"),
    }
}

fn control(line: &mut Line, inputs: &Inputs<'_>) {
    line.option("-chardev", chardev_socket("qmp", &inputs.dir.join(QMP_SOCKET)));
    line.option("-mon", "chardev=qmp,mode=control");
    if inputs.dir.as_os_str().as_bytes().contains(&b',') {
        // Names the run folder as it is, with single commas: by that the process is found when its record was lost. Elsewhere
        // the sockets' paths do, and save QEMU the file.
        line.option("-pidfile", inputs.dir.join(PID_FILE));
    }
    let reboot = reboot_action(inputs.spec).as_str();
    line.option("-action", format!("reboot={reboot},shutdown=poweroff,panic=shutdown"));
}

fn chardev_socket(id: &str, path: &Path) -> OsString {
    let mut chardev = OsString::from(format!("socket,id={id},server=on,wait=off,path="));
    chardev.push(escaped(path.as_os_str()));
    chardev
}

/// Doubles the commas, as QEMU's option syntax wants.
fn escaped(text: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    for byte in text.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

fn merged(mut object: Value, more: &Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    object
}
