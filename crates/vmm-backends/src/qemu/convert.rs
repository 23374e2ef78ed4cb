//! From a [`VmSpec`] to QEMU's command line, or for a QEMU that waits, to the rest of it. Pure: the same request gives the same
//! words.
//!
//! ```text
//!   VmSpec ──► options ─┬─► arguments          all of them on the command line
//!                       └─► ahead … told       what suits every VM on the command line, the rest in a file read later
//! ```
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

mod disk;
mod file;
mod option;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_core::id::{VmId, VmUid};
use vmm_core::spec::{Boot, Cpu, MIB, Memory, Nic, PageSize, RestartMode, RestartPolicy, VmSpec};

use super::client::RebootAction;
use super::layout::{FUNCTIONS, MEMORY_SLOTS, NIC_SLOT};
use super::options::VmOptions;
pub use file::Untellable;
use option::Opt;

/// The QMP socket's name in the run folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The console socket's name in the run folder: what is written there the guest reads from its serial port.
///
/// QEMU also sends the guest's output there, while somebody is connected, and the guest waits once some 270 bytes lie unread.
/// Whoever connects reads all the time, or is quick.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The process id file's name in the run folder.
const PID_FILE: &str = "qemu.pid";

/// The virtio-mmio transport of microvm's first device. QEMU lists them to the guest from the last to the first, so devices go
/// downwards, and stop before 0: its interrupts get lost, because they arrive at pin 0 of the second interrupt controller, and
/// QEMU (7.2) takes any pin 0 for the timer's and raises pin 2.
const FIRST_TRANSPORT: usize = 23;

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

    /// Returns the machine that `spec` asks for; `None` where there is no such machine.
    pub fn of(spec: &VmSpec) -> Option<Self> {
        VmOptions::of(spec).machine
    }

    /// Returns the machine that QEMU calls `name`.
    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Q35, Self::Microvm].into_iter().find(|machine| machine.as_str() == name)
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

    const fn properties(self) -> &'static [(&'static str, &'static str)] {
        match self {
            // Nothing of a PC that no other backend's guest has: no SATA, USB, SMBus, VMware port or SMM.
            Self::Q35 => &[
                ("usb", "off"),
                ("sata", "off"),
                ("smbus", "off"),
                ("vmport", "off"),
                ("smm", "off"),
                ("dump-guest-core", "off"),
            ],
            // ACPI brings the power button, the reset register and the list of virtio-mmio devices.
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

/// Where a QEMU that waits reads what it is to run: its own input.
const INPUT: &str = "/proc/self/fd/0";

/// Writes the command line, without the program's name.
///
/// The guest waits for `cont` (`-S`): a guest that ends within milliseconds would otherwise end unseen.
///
/// # Errors
///
/// [`PathNotUtf8`] for a disk.
pub fn arguments(inputs: &Inputs<'_>) -> Result<Vec<OsString>, PathNotUtf8> {
    Ok(words(options(inputs)?.iter()))
}

/// Everything that the command line of a QEMU which waits depends on.
#[derive(Clone, Copy, Debug)]
pub struct AheadInputs<'a> {
    /// The uid of the VM to come.
    pub uid: VmUid,
    /// What runs its CPUs.
    pub accelerator: Accelerator,
    /// Its run folder.
    pub dir: &'a Path,
}

/// Writes the command line of a QEMU that reads from its input what it is to run: a [`Told::file`]. Where that ends before its
/// last line, QEMU ends with an error, because its serial port has nothing behind it.
pub fn ahead(inputs: &AheadInputs<'_>) -> Vec<OsString> {
    let mut options = Vec::new();
    identity(&mut options, inputs.uid);
    processor(&mut options, inputs.accelerator, None);
    serial(&mut options, true);
    control(&mut options, inputs.dir);
    ahead_of(&options)
}

/// What a QEMU that waits is told, and whether it is one that may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The command line with which it must have been started, as [`ahead`] writes it. Another CPU model than the usual one, or no
    /// console, makes it another one, for a file has no words for them.
    pub ahead: Vec<OsString>,
    /// What it is to read, for the same machine as [`arguments`].
    pub file: String,
}

/// Writes what a QEMU that waits is told.
///
/// # Errors
///
/// [`Untellable`] where only the command line can carry a value.
pub fn told(inputs: &Inputs<'_>) -> Result<Told, Untellable> {
    let options = options(inputs)?;
    Ok(Told { ahead: ahead_of(&options), file: file::write(&options)? })
}

fn words<'a>(options: impl Iterator<Item = &'a Opt>) -> Vec<OsString> {
    let mut words = Vec::new();
    for option in options {
        option.write_words(&mut words);
    }
    words
}

fn ahead_of(options: &[Opt]) -> Vec<OsString> {
    let mut words = words(options.iter().filter(|option| matches!(option, Opt::Ahead { .. })));
    words.extend(["-readconfig".into(), INPUT.into()]);
    words
}

fn options(inputs: &Inputs<'_>) -> Result<Vec<Opt>, PathNotUtf8> {
    // The console comes with the request, which knows its file.
    let VmSpec { cpu, memory, boot, disks, nics, console: _, restart, options: _ } = inputs.spec;
    let RestartPolicy { mode: _, max_restarts: _ } = restart;
    let mut options = Vec::new();
    options.push(Opt::Pairs {
        flag: "-name",
        group: "name",
        kind: None,
        pairs: vec![("guest", inputs.vm_id.to_string().into())],
    });
    identity(&mut options, inputs.uid);
    machine(&mut options, inputs, cpu, memory);
    add_boot(&mut options, boot, inputs.spec.kernel_args());
    for (place, (disk, image)) in disks.iter().zip(inputs.images).enumerate() {
        options.push(Opt::Disk(disk::option(inputs.machine, place, disk, *image)?));
    }
    for (place, (nic, tap)) in nics.iter().zip(inputs.taps).enumerate() {
        add_nic(&mut options, inputs.machine, disks.len(), place, nic, tap);
    }
    if inputs.machine == Machine::Q35 && !inputs.spec.resets_on_panic() {
        // The device by which a guest tells of its panic. The ISA form takes no PCI slot, and libvirt 9.0 has no other.
        options.push(Opt::device(json!({ "driver": "pvpanic", "id": "pvpanic" })));
    }
    console(&mut options, inputs);
    control(&mut options, inputs.dir);
    let reboot = reboot_action(inputs.spec).as_str();
    options.push(Opt::Pairs {
        flag: "-action",
        group: "action",
        kind: None,
        pairs: vec![("reboot", reboot.into()), ("shutdown", "poweroff".into()), ("panic", "shutdown".into())],
    });
    Ok(options)
}

fn identity(options: &mut Vec<Opt>, uid: VmUid) {
    options.extend([
        Opt::ahead("-uuid", uid.to_string()),
        Opt::Ahead { flag: "-S", value: None },
        Opt::Ahead { flag: "-nodefaults", value: None },
        Opt::Ahead { flag: "-no-user-config", value: None },
        Opt::ahead("-display", "none"),
        // QEMU starts no helpers here: the TAPs exist, and no script runs.
        Opt::ahead("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]);
}

fn machine(options: &mut Vec<Opt>, inputs: &Inputs<'_>, cpu: &Cpu, memory: &Memory) {
    let Cpu { count, max, topology } = *cpu;
    let Memory { size_bytes, hotplug_max_bytes, pages, shared } = *memory;
    let huge = pages == PageSize::Huge;
    let mut properties: Vec<(&str, OsString)> =
        inputs.machine.properties().iter().map(|(key, value)| (*key, value.into())).collect();
    if huge || shared {
        properties.push(("memory-backend", "ram".into()));
    }
    let kind = Some(("type", inputs.machine.as_str().into()));
    options.push(Opt::Pairs { flag: "-machine", group: "machine", kind, pairs: properties });
    if let Some(firmware) = inputs.machine.firmware() {
        options.push(Opt::Property { flag: "-bios", key: "firmware", value: firmware.into() });
    }
    let model = VmOptions::of(inputs.spec).model.map(|model| model.text);
    processor(options, inputs.accelerator, model);
    let (sockets, cores, threads) = match topology {
        Some(topology) => (topology.sockets, topology.cores, topology.threads),
        None => (1, max, 1),
    };
    let counts =
        [("cpus", count), ("maxcpus", max), ("sockets", sockets), ("cores", cores), ("threads", threads)];
    let pairs = counts.map(|(key, count)| (key, count.to_string().into())).to_vec();
    options.push(Opt::Pairs { flag: "-smp", group: "smp-opts", kind: None, pairs });
    let mut size = vec![("size", format!("{}M", memory.size_mib()).into())];
    if let (Machine::Q35, Some(ceiling)) = (inputs.machine, hotplug_max_bytes)
        && ceiling > size_bytes
    {
        size.push(("slots", MEMORY_SLOTS.to_string().into()));
        size.push(("maxmem", format!("{}M", ceiling / MIB).into()));
    }
    options.push(Opt::Pairs { flag: "-m", group: "memory", kind: None, pairs: size });
    if huge || shared {
        options.push(Opt::object(json!({
            "qom-type": "memory-backend-memfd", "id": "ram", "size": size_bytes,
            "hugetlb": huge, "share": shared,
        })));
    }
}

fn processor(options: &mut Vec<Opt>, accelerator: Accelerator, model: Option<&str>) {
    options.push(Opt::ahead("-accel", accelerator.as_str()));
    options.push(Opt::ahead("-cpu", model.unwrap_or(default_model(accelerator))));
}

/// The CPU model where the client picks none: all that the accelerator has.
const fn default_model(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

fn add_boot(options: &mut Vec<Opt>, boot: &Boot, args: String) {
    // `args` is the command line in force.
    let Boot { kernel, initrd, args: _ } = boot;
    options.push(Opt::Property { flag: "-kernel", key: "kernel", value: kernel.into() });
    if let Some(initrd) = initrd {
        options.push(Opt::Property { flag: "-initrd", key: "initrd", value: initrd.into() });
    }
    if !args.is_empty() {
        options.push(Opt::Property { flag: "-append", key: "append", value: args.into() });
    }
}

fn add_nic(options: &mut Vec<Opt>, machine: Machine, disks: usize, place: usize, nic: &Nic, tap: &str) {
    // The check warns that QEMU cannot limit an interface.
    let Nic { id: _, mac, tap: _, limits: _ } = nic;
    // QEMU before 7.2 takes no JSON here.
    options.push(Opt::Pairs {
        flag: "-netdev",
        group: "netdev",
        kind: Some(("type", "tap".into())),
        pairs: vec![
            ("id", format!("tap{place}").into()),
            ("ifname", tap.into()),
            ("script", "no".into()),
            ("downscript", "no".into()),
        ],
    });
    let mut device = json!({
        "driver": format!("virtio-net-{}", machine.virtio()), "id": format!("net{place}"),
        "netdev": format!("tap{place}"), "mac": mac.to_string(),
    });
    if machine == Machine::Q35 {
        // No boot from the network, so no ROM for it.
        device["romfile"] = "".into();
    }
    options.push(Opt::device(merged(device, &address(machine, NIC_SLOT, place, disks + place))));
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

fn console(options: &mut Vec<Opt>, inputs: &Inputs<'_>) {
    if let Some(output) = inputs.console {
        // The log is written whether or not anybody is connected, so the console needs no daemon.
        let mut pairs = listening("console", &inputs.dir.join(CONSOLE_SOCKET));
        pairs.extend([("logfile", output.into()), ("logappend", "on".into())]);
        let kind = Some(("backend", "socket".into()));
        options.push(Opt::Pairs { flag: "-chardev", group: "chardev", kind, pairs });
    }
    serial(options, inputs.console.is_some());
}

fn serial(options: &mut Vec<Opt>, console: bool) {
    options.push(Opt::ahead("-serial", if console { "chardev:console" } else { "none" }));
}

fn control(options: &mut Vec<Opt>, dir: &Path) {
    let kind = ("backend", "socket".into());
    let socket = listening("qmp", &dir.join(QMP_SOCKET));
    options.push(Opt::ahead("-chardev", option::joined(Some(&kind), &socket)));
    options.push(Opt::ahead("-mon", "chardev=qmp,mode=control"));
    if dir.as_os_str().as_bytes().contains(&b',') {
        // Names the run folder as it is, with single commas: by that the process is found when its record was lost. Elsewhere
        // the sockets' paths do, and save QEMU the file.
        options.push(Opt::ahead("-pidfile", dir.join(PID_FILE)));
    }
}

/// A socket that QEMU listens on, without waiting for anybody.
fn listening(id: &str, path: &Path) -> Vec<(&'static str, OsString)> {
    vec![("id", id.into()), ("server", "on".into()), ("wait", "off".into()), ("path", path.into())]
}

fn merged(mut object: Value, more: &Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    object
}
