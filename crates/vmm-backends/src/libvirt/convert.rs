//! Converts a [`VmSpec`] into a libvirt domain. A pure function: equal requests give equal XML.
//!
//! The machine equals that of a QEMU that this program starts ([`crate::qemu::convert`]): the
//! firmware, the slots of the devices, and images with an explicit format. The frame is libvirt's:
//!
//! ```text
//!   <domain>  name = vm_id, uuid = uid, <metadata> = our mark
//!     <os>       q35 with qboot, kernel, initrd, cmdline
//!     <devices>  disks in slots 2 to 9, NICs in slots 16 to 23, one serial port with a log file
//!     <seclabel> QEMU runs as the daemon's own user, as a QEMU that the daemon starts does
//! ```
//!
//! libvirt knows no microvm: its machines have PCI.

use std::path::{Path, PathBuf};

use vmm_core::id::{InstanceId, VmId, VmUid};
use vmm_core::spec::{
    Boot, Cpu, Disk, DiskCache, DiskFormat, MIB, Memory, Nic, PageSize, RateLimit, RestartMode,
    RestartPolicy, VmSpec,
};
use vmm_libvirt_wire::MARK_NAMESPACE;

use super::cpu::CpuModel;
use super::xml::{Xml, can_carry};
use crate::qemu::convert::{Accelerator, DEFAULT_RESTART, ImageKind};
use crate::qemu::layout::{DISK_SLOT, FUNCTIONS, MEMORY_SLOTS, NIC_SLOT, SERIAL_LEN};
use crate::qemu::options::VmOptions;

/// The console socket's name in the run folder. The guest reads from its serial port what is
/// written to this socket.
///
/// libvirt (9.0) gives the files of a pipe, which a QEMU of this program uses, to the user of QEMU,
/// and would give `/dev/null` to that user too.
pub const CONSOLE_SOCKET: &str = "console.sock";

/// The user that QEMU runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuUser {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
}

/// The inputs of the domain.
#[derive(Clone, Copy, Debug)]
pub struct DomainInputs<'a> {
    /// The instance of the daemon.
    pub instance: InstanceId,
    /// The VM's uid, which is the domain's UUID.
    pub uid: VmUid,
    /// The VM's name, which is the domain's name.
    pub vm_id: &'a VmId,
    /// The specification of the VM.
    pub spec: &'a VmSpec,
    /// The accelerator of the guest's CPUs.
    pub accelerator: Accelerator,
    /// The QEMU to use, or `None` for libvirt's own choice.
    pub emulator: Option<&'a Path>,
    /// The path of qboot.
    pub firmware: &'a Path,
    /// The user that QEMU runs as, if libvirt offers a choice.
    pub label: Option<QemuUser>,
    /// The run folder.
    pub dir: &'a Path,
    /// The file of the console's output.
    pub console: Option<&'a Path>,
    /// The TAP of each network interface.
    pub taps: &'a [String],
    /// The kind of file at each disk's path.
    pub images: &'a [ImageKind],
}

/// A path that XML cannot express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libvirt cannot be given the path {0:?}: it is not UTF-8, or has control characters; rename it")]
pub struct PathUnfitForXml(pub PathBuf);

/// Returns the XML of the domain.
///
/// # Errors
/// [`PathUnfitForXml`] for any of the paths.
pub fn domain(inputs: &DomainInputs<'_>) -> Result<String, PathUnfitForXml> {
    let paths = DomainPaths::of(inputs)?;
    // The request names the console's file.
    let VmSpec { cpu, memory, boot, disks, nics, console: _, restart, options: _ } = inputs.spec;
    let kind = match inputs.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let mut xml = Xml::default();
    xml.element("domain", &[("type", kind)], |xml| {
        xml.text("name", &[], inputs.vm_id.as_str());
        xml.text("uuid", &[], &inputs.uid.to_string());
        xml.element("metadata", &[], |xml| mark(xml, inputs.instance));
        add_memory(xml, memory);
        add_boot(xml, boot, &inputs.spec.kernel_args(), &paths);
        xml.element("features", &[], |xml| {
            xml.empty("acpi", &[]);
            xml.empty("vmport", &[("state", "off")]);
            xml.empty("smm", &[("state", "off")]);
        });
        add_cpu(xml, inputs, cpu, memory);
        xml.text("on_poweroff", &[], "destroy");
        xml.text("on_reboot", &[], if restarts(restart) { "restart" } else { "destroy" });
        xml.text("on_crash", &[], "destroy");
        xml.element("devices", &[], |xml| {
            add_devices(xml, inputs, &paths, disks, nics);
            if !inputs.spec.resets_on_panic() {
                xml.empty("panic", &[("model", "isa")]);
            }
        });
        // The system's libvirtd would run QEMU as a user of its own, who may not open the files of
        // the run folder.
        if let Some(label) = inputs.label {
            // Root reaches every file without a label. For any other user libvirt must change the
            // owner of the files that QEMU uses.
            let relabel = if label.uid == 0 { "no" } else { "yes" };
            xml.element("seclabel", &[("type", "static"), ("model", "dac"), ("relabel", relabel)], |xml| {
                xml.text("label", &[], &format!("+{}:+{}", label.uid, label.gid));
            });
        }
    });
    Ok(xml.finish())
}

/// Returns true if a guest that resets itself starts again.
pub(super) fn restarts(policy: &RestartPolicy) -> bool {
    let RestartPolicy { mode, max_restarts: _ } = policy;
    match mode.unwrap_or(DEFAULT_RESTART) {
        RestartMode::Never => false,
        RestartMode::GuestReboot | RestartMode::OnFailure | RestartMode::Always => true,
    }
}

/// Writes the mark of the instance that owns the domain.
fn mark(xml: &mut Xml, instance: InstanceId) {
    xml.empty("vmcp:vm", &[("xmlns:vmcp", MARK_NAMESPACE), ("instance", &instance.to_string())]);
}

/// The paths as text.
struct DomainPaths<'a> {
    kernel: &'a str,
    initrd: Option<&'a str>,
    firmware: &'a str,
    emulator: Option<&'a str>,
    disks: Vec<&'a str>,
    socket: Option<String>,
    log: Option<&'a str>,
}

impl<'a> DomainPaths<'a> {
    fn of(inputs: &DomainInputs<'a>) -> Result<Self, PathUnfitForXml> {
        let spec = inputs.spec;
        let socket = inputs.dir.join(CONSOLE_SOCKET);
        Ok(Self {
            kernel: fit(&spec.boot.kernel)?,
            initrd: spec.boot.initrd.as_deref().map(fit).transpose()?,
            firmware: fit(inputs.firmware)?,
            emulator: inputs.emulator.map(fit).transpose()?,
            disks: spec.disks.iter().map(|disk| fit(&disk.path)).collect::<Result<_, _>>()?,
            socket: inputs.console.map(|_| fit(&socket).map(str::to_owned)).transpose()?,
            log: inputs.console.map(fit).transpose()?,
        })
    }
}

fn fit(path: &Path) -> Result<&str, PathUnfitForXml> {
    path.to_str().filter(|text| can_carry(text)).ok_or_else(|| PathUnfitForXml(path.to_path_buf()))
}

fn add_memory(xml: &mut Xml, memory: &Memory) {
    let Memory { size_bytes: _, hotplug_max_bytes: _, pages, shared } = *memory;
    if let Some(ceiling) = ceiling_mib(memory) {
        let slots = MEMORY_SLOTS.to_string();
        xml.text("maxMemory", &[("slots", &slots), ("unit", "MiB")], &ceiling.to_string());
    }
    xml.text("memory", &[("unit", "MiB")], &memory.size_mib().to_string());
    let huge = pages == PageSize::Huge;
    if huge || shared {
        xml.element("memoryBacking", &[], |xml| {
            if huge {
                xml.empty("hugepages", &[]);
            }
            xml.empty("source", &[("type", "memfd")]);
            xml.empty("access", &[("mode", if shared { "shared" } else { "private" })]);
        });
    }
}

/// Returns the ceiling of the memory in MiB, if it exceeds the size.
fn ceiling_mib(memory: &Memory) -> Option<u64> {
    memory.hotplug_max_bytes.filter(|ceiling| *ceiling > memory.size_bytes).map(|ceiling| ceiling / MIB)
}

fn add_boot(xml: &mut Xml, boot: &Boot, args: &str, paths: &DomainPaths<'_>) {
    // `args` is the whole command line, and `paths` has the files.
    let Boot { kernel: _, initrd: _, args: _ } = boot;
    xml.element("os", &[], |xml| {
        xml.text("type", &[("arch", "x86_64"), ("machine", "q35")], "hvm");
        // Not SeaBIOS, for the reason that `qemu::convert` gives.
        xml.text("loader", &[("type", "rom")], paths.firmware);
        xml.text("kernel", &[], paths.kernel);
        if let Some(initrd) = paths.initrd {
            xml.text("initrd", &[], initrd);
        }
        if !args.is_empty() {
            xml.text("cmdline", &[], args);
        }
    });
}

fn add_cpu(xml: &mut Xml, inputs: &DomainInputs<'_>, cpu: &Cpu, memory: &Memory) {
    let Cpu { count, max, topology } = *cpu;
    xml.text("vcpu", &[("current", &count.to_string())], &max.to_string());
    let model = VmOptions::of(inputs.spec).model.and_then(|model| CpuModel::parse(model.text).ok());
    let model = model.unwrap_or_else(|| CpuModel::of(inputs.accelerator));
    model.write(xml, |xml| {
        let (sockets, cores, threads) = match topology {
            Some(topology) => (topology.sockets, topology.cores, topology.threads),
            None => (1, max, 1),
        };
        let [sockets, cores, threads] = [sockets, cores, threads].map(|count| count.to_string());
        let topology = [("sockets", &*sockets), ("dies", "1"), ("cores", &*cores), ("threads", &*threads)];
        xml.empty("topology", &topology);
        if ceiling_mib(memory).is_some() {
            // libvirt plugs memory only into NUMA nodes, so one node holds everything.
            let (cpus, size) = (format!("0-{}", max - 1), memory.size_mib().to_string());
            xml.element("numa", &[], |xml| {
                xml.empty("cell", &[("id", "0"), ("cpus", &cpus), ("memory", &size), ("unit", "MiB")]);
            });
        }
    });
}

fn add_devices(
    xml: &mut Xml,
    inputs: &DomainInputs<'_>,
    paths: &DomainPaths<'_>,
    disks: &[Disk],
    nics: &[Nic],
) {
    if let Some(emulator) = paths.emulator {
        xml.text("emulator", &[], emulator);
    }
    xml.empty("controller", &[("type", "usb"), ("model", "none")]);
    let disks = disks.iter().zip(&paths.disks).zip(inputs.images);
    for (index, ((disk, path), image)) in disks.enumerate() {
        add_disk(xml, index, disk, path, *image);
    }
    for (index, (nic, tap)) in nics.iter().zip(inputs.taps).enumerate() {
        add_nic(xml, index, nic, tap);
    }
    if let (Some(socket), Some(log)) = (&paths.socket, paths.log) {
        xml.element("serial", &[("type", "unix")], |xml| {
            xml.empty("source", &[("mode", "bind"), ("path", socket)]);
            xml.empty("log", &[("file", log), ("append", "on")]);
            xml.empty("target", &[("type", "isa-serial"), ("port", "0")]);
        });
    }
    xml.empty("memballoon", &[("model", "none")]);
}

fn add_disk(xml: &mut Xml, index: usize, disk: &Disk, path: &str, image: ImageKind) {
    let (kind, source) = match image {
        ImageKind::File => ("file", "file"),
        ImageKind::BlockDevice => ("block", "dev"),
    };
    let Disk {
        index: _,
        id,
        path: _,
        read_only,
        is_root: _,
        format,
        backing_files,
        cache,
        direct_io,
        limits,
    } = disk;
    let cache = match (cache, direct_io) {
        (DiskCache::Unsafe, _) => "unsafe",
        (DiskCache::Writeback, true) => "none",
        (DiskCache::Writeback, false) => "writeback",
    };
    let discard = if *read_only { "ignore" } else { "unmap" };
    xml.element("disk", &[("type", kind), ("device", "disk")], |xml| {
        // A fault of the disk is reported to the guest, as on the other backends.
        let driver = [("name", "qemu"), ("type", format.as_str()), ("cache", cache), ("discard", discard)];
        let faults = [("error_policy", "report"), ("rerror_policy", "report")];
        xml.empty("driver", &[&driver[..], &faults[..]].concat());
        xml.empty("source", &[(source, path)]);
        if *format == DiskFormat::Qcow2 && !backing_files {
            // Without this line QEMU would open the backing file that the image's header names.
            xml.empty("backingStore", &[]);
        }
        xml.empty("target", &[("dev", &disk_name(index)), ("bus", "virtio")]);
        throttle(xml, *limits);
        if *read_only {
            xml.empty("readonly", &[]);
        }
        let serial: String = id.chars().take(SERIAL_LEN).collect();
        xml.text("serial", &[], &serial);
        address(xml, DISK_SLOT, index);
    });
}

fn throttle(xml: &mut Xml, limits: RateLimit) {
    if limits.is_none() {
        return;
    }
    xml.element("iotune", &[], |xml| {
        if let Some(bytes) = limits.bytes_per_second {
            xml.text("total_bytes_sec", &[], &bytes.to_string());
        }
        if let Some(operations) = limits.operations_per_second {
            xml.text("total_iops_sec", &[], &operations.to_string());
        }
    });
}

/// Returns libvirt's name of a disk: vda to vdz, then vdaa and so on, as in Linux.
fn disk_name(index: usize) -> String {
    const LETTERS: usize = 26;
    let letter = |at: usize| char::from(b'a' + u8::try_from(at % LETTERS).unwrap_or(0));
    match index.checked_sub(LETTERS) {
        None => format!("vd{}", letter(index)),
        Some(rest) => format!("vd{}{}", letter(rest / LETTERS), letter(rest)),
    }
}

fn add_nic(xml: &mut Xml, index: usize, nic: &Nic, tap: &str) {
    // The check warns that QEMU cannot limit an interface.
    let Nic { id: _, mac, tap: _, limits: _ } = nic;
    xml.element("interface", &[("type", "ethernet")], |xml| {
        xml.empty("mac", &[("address", &mac.to_string())]);
        // The TAP exists, so libvirt must neither create nor remove it.
        xml.empty("target", &[("dev", tap), ("managed", "no")]);
        xml.empty("model", &[("type", "virtio")]);
        // Guests do not boot from the network, so the ROM is left out.
        xml.empty("rom", &[("enabled", "no")]);
        address(xml, NIC_SLOT, index);
    });
}

/// Writes the slot of a device. Slots are fixed, so that a disk that is added to a configuration
/// does not rename a network interface in the guest.
fn address(xml: &mut Xml, first_slot: usize, index: usize) {
    let (slot, function) = (first_slot + index / FUNCTIONS, index % FUNCTIONS);
    let (slot, function) = (format!("0x{slot:02x}"), format!("0x{function:x}"));
    let mut attributes = vec![
        ("type", "pci"),
        ("domain", "0x0000"),
        ("bus", "0x00"),
        ("slot", &*slot),
        ("function", &*function),
    ];
    if function == "0x0" {
        attributes.push(("multifunction", "on"));
    }
    xml.empty("address", &attributes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_targets_are_named_like_linux_disks() {
        let names: Vec<_> = [0, 25, 26, 51, 52, 63].map(disk_name).into();
        assert_eq!(names, ["vda", "vdz", "vdaa", "vdaz", "vdba", "vdbl"]);
    }
}
