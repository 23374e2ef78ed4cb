//! Converts libvirt's XML of a domain into a [`VmConfig`]. A pure function.
//!
//! Settings that a [`VmConfig`] cannot express are listed by name, so that the result is not taken
//! for the whole.

use roxmltree::{Document, Node};
use vmm_core::config::{
    BootConfig, ConsoleConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, StorageDevice,
    VmConfig,
};

/// The most devices of a kind that are read.
const DEVICES: usize = 256;
/// Devices that every VM here has, or that have no effect.
const PLAIN_DEVICES: [&str; 10] = [
    "emulator",
    "controller",
    "disk",
    "interface",
    "serial",
    "console",
    "memballoon",
    "input",
    "audio",
    "rng",
];

/// The content of a domain's XML.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DomainDescription {
    pub(super) config: VmConfig,
    /// The settings that the configuration does not express.
    pub(super) unrepresented: Vec<String>,
    /// The TAPs of a running domain.
    pub(super) taps: Vec<String>,
    /// True if a guest that resets itself starts again.
    pub(super) restarts: bool,
    pub(super) accelerator: String,
    pub(super) machine: String,
}

/// Reads a domain.
///
/// # Errors
/// Returns the fault of the XML.
pub(super) fn describe(xml: &str) -> Result<DomainDescription, String> {
    let document = Document::parse(xml).map_err(|error| error.to_string())?;
    let domain = document.root_element();
    if domain.tag_name().name() != "domain" {
        return Err("it is no domain".to_owned());
    }
    let mut unrepresented = Vec::new();
    let devices = child(domain, "devices");
    // A device without a counterpart in a `VmConfig` is listed instead of skipped, so that the
    // shown configuration is not taken for the whole one.
    let (storage, network, taps) = match devices {
        Some(devices) => {
            note_devices(devices, &mut unrepresented);
            let (network, taps) = network(devices, &mut unrepresented);
            (storage(devices, &mut unrepresented), network, taps)
        }
        None => Default::default(),
    };
    let os = child(domain, "os");
    let machine =
        os.and_then(|os| child(os, "type")).and_then(|kind| kind.attribute("machine")).unwrap_or_default();
    let config = VmConfig {
        cpu: Some(cpu(domain)),
        memory: Some(memory(domain)),
        boot: Some(boot(os, &mut unrepresented)),
        storage,
        network,
        console: Some(ConsoleConfig {
            enabled: devices.is_some_and(|devices| child(devices, "serial").is_some()),
            ..ConsoleConfig::default()
        }),
        ..VmConfig::default()
    };
    let kind = domain.attribute("type").unwrap_or_default();
    Ok(DomainDescription {
        config,
        unrepresented,
        taps,
        restarts: text(domain, "on_reboot") != "destroy",
        accelerator: if kind == "qemu" { "tcg".to_owned() } else { kind.to_owned() },
        machine: machine.to_owned(),
    })
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.tag_name().name() == name)
}

fn children<'a, 'input>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.tag_name().name() == name).take(DEVICES)
}

/// Returns the text of a child element, or an empty text if there is none.
fn text<'a>(node: Node<'a, '_>, name: &str) -> &'a str {
    child(node, name).and_then(|child| child.text()).unwrap_or_default().trim()
}

fn attribute<'a>(node: Node<'a, '_>, element: &str, name: &str) -> &'a str {
    child(node, element).and_then(|child| child.attribute(name)).unwrap_or_default()
}

fn cpu(domain: Node<'_, '_>) -> CpuConfig {
    let max = text(domain, "vcpu").parse().unwrap_or(1);
    let topology = child(domain, "cpu").and_then(|cpu| child(cpu, "topology"));
    CpuConfig {
        vcpu_count: attribute(domain, "vcpu", "current").parse().unwrap_or(max),
        max_vcpu_count: max,
        topology: topology.map(|topology| {
            let count = |name| topology.attribute(name).and_then(|text| text.parse().ok()).unwrap_or(1);
            CpuTopology {
                sockets: count("sockets"),
                cores_per_socket: count("cores"),
                threads_per_core: count("threads"),
            }
        }),
        ..CpuConfig::default()
    }
}

fn memory(domain: Node<'_, '_>) -> MemoryConfig {
    let ceiling = bytes(domain, "maxMemory");
    let size = bytes(domain, "memory").unwrap_or(0);
    let ceiling = ceiling.filter(|ceiling| *ceiling > size);
    MemoryConfig {
        size_bytes: size,
        hotplug_enabled: ceiling.is_some(),
        max_size_bytes: ceiling.unwrap_or(0),
        ..MemoryConfig::default()
    }
}

/// Returns a size in bytes. libvirt itself always writes KiB.
fn bytes(domain: Node<'_, '_>, name: &str) -> Option<i64> {
    let element = child(domain, name)?;
    let number: i64 = element.text()?.trim().parse().ok()?;
    let factor = match element.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(factor)
}

fn boot(os: Option<Node<'_, '_>>, unrepresented: &mut Vec<String>) -> BootConfig {
    let Some(os) = os else { return BootConfig::default() };
    let kernel = text(os, "kernel");
    if kernel.is_empty() {
        unrepresented.push("it boots by its firmware, from a disk or the network".to_owned());
    }
    BootConfig {
        kernel_path: kernel.to_owned(),
        initrd_path: text(os, "initrd").to_owned(),
        // Blanks at the ends belong to the kernel's command line.
        kernel_args: child(os, "cmdline").and_then(|line| line.text()).unwrap_or_default().to_owned(),
        ..BootConfig::default()
    }
}

fn storage(devices: Node<'_, '_>, unrepresented: &mut Vec<String>) -> Vec<StorageDevice> {
    let mut storage = Vec::new();
    for disk in children(devices, "disk") {
        let name = attribute(disk, "target", "dev");
        let source = child(disk, "source");
        let path = source.and_then(|source| source.attribute("file").or_else(|| source.attribute("dev")));
        let kind = disk.attribute("device").unwrap_or("disk");
        let (Some(path), "disk") = (path, kind) else {
            unrepresented.push(format!("{kind} {name}"));
            continue;
        };
        if attribute(disk, "target", "bus") != "virtio" {
            unrepresented.push(format!("the bus of disk {name}"));
        }
        let format = match attribute(disk, "driver", "type") {
            "" => "raw",
            known @ ("raw" | "qcow2") => known,
            other => {
                unrepresented.push(format!("the format {other} of disk {name}"));
                continue;
            }
        };
        let mut device = StorageDevice {
            id: name.to_owned(),
            path: path.to_owned(),
            read_only: child(disk, "readonly").is_some(),
            ..StorageDevice::default()
        };
        device.options.insert("format".to_owned(), format.to_owned());
        storage.push(device);
    }
    storage
}

/// Returns the network interfaces, and the TAPs that they have now.
fn network(devices: Node<'_, '_>, unrepresented: &mut Vec<String>) -> (Vec<NetworkInterface>, Vec<String>) {
    let (mut network, mut taps) = (Vec::new(), Vec::new());
    for (index, interface) in children(devices, "interface").enumerate() {
        let kind = interface.attribute("type").unwrap_or_default();
        // The other kinds have no TAP. They use a process, a card, or another program's socket.
        let has_tap = matches!(kind, "ethernet" | "bridge" | "network");
        let tap = if has_tap { attribute(interface, "target", "dev") } else { "" };
        if kind != "ethernet" {
            unrepresented.push(format!("network interface {index} is of libvirt's kind {kind}"));
        }
        if !tap.is_empty() {
            taps.push(tap.to_owned());
        }
        network.push(NetworkInterface {
            id: format!("net{index}"),
            mac_address: attribute(interface, "mac", "address").to_owned(),
            tap_device: tap.to_owned(),
            ..NetworkInterface::default()
        });
    }
    (network, taps)
}

/// Lists the devices that a configuration cannot express.
fn note_devices(devices: Node<'_, '_>, unrepresented: &mut Vec<String>) {
    let mut seen = Vec::new();
    for device in devices.children().filter(Node::is_element) {
        let name = device.tag_name().name();
        if !PLAIN_DEVICES.contains(&name) && !seen.contains(&name) && seen.len() < DEVICES {
            seen.push(name);
            unrepresented.push(format!("the device {name}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGER: &str = r#"<domain type='kvm' id='3'>
      <name>web</name>
      <uuid>0193f0de-0000-7000-8000-000000000001</uuid>
      <memory unit='KiB'>2097152</memory>
      <currentMemory unit='KiB'>1048576</currentMemory>
      <vcpu placement='static' current='2'>4</vcpu>
      <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>
      <cpu mode='host-model'><topology sockets='1' dies='1' cores='4' threads='1'/></cpu>
      <on_reboot>restart</on_reboot>
      <devices>
        <emulator>/usr/bin/qemu-system-x86_64</emulator>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>
          <target dev='vda' bus='virtio'/></disk>
        <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/sdx'/>
          <target dev='sda' bus='scsi'/><readonly/></disk>
        <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
        <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>
          <target dev='vnet0'/><model type='virtio'/></interface>
        <interface type='ethernet'><mac address='52:54:00:00:00:02'/><target dev='tap7' managed='no'/></interface>
        <serial type='pty'><target port='0'/></serial>
        <graphics type='vnc'/><graphics type='spice'/><video/>
      </devices></domain>"#;

    #[test]
    fn a_foreign_domain_is_described_as_far_as_possible() {
        let reported = describe(STRANGER).unwrap();
        let config = &reported.config;
        let cpu = config.cpu.as_ref().unwrap();
        assert_eq!((cpu.vcpu_count, cpu.max_vcpu_count), (2, 4));
        assert_eq!(config.memory.as_ref().unwrap().size_bytes, 2 << 30);
        assert_eq!(config.boot.as_ref().unwrap().kernel_path, "");
        let disks: Vec<_> = config
            .storage
            .iter()
            .map(|disk| (&*disk.id, &*disk.path, disk.read_only, &*disk.options["format"]))
            .collect();
        assert_eq!(disks, [("vda", "/images/web.qcow2", false, "qcow2"), ("sda", "/dev/sdx", true, "raw")]);
        assert_eq!(reported.taps, ["vnet0", "tap7"]);
        assert_eq!(
            (reported.restarts, &*reported.accelerator, &*reported.machine),
            (true, "kvm", "pc-q35-7.2")
        );
        let unrepresented = reported.unrepresented.join("; ");
        for what in
            ["firmware", "bus of disk sda", "cdrom sdb", "kind network", "device graphics", "device video"]
        {
            assert!(unrepresented.contains(what), "{what} is not in {unrepresented}");
        }
        assert_eq!(unrepresented.matches("graphics").count(), 1);
    }

    #[test]
    fn xml_that_is_no_domain_is_refused() {
        for text in ["", "<network/>", "<domain>", "<!DOCTYPE d [<!ENTITY a '&a;&a;'>]><domain>&a;</domain>"]
        {
            assert!(describe(text).is_err(), "{text}");
        }
        assert_eq!(describe("<domain/>").unwrap().config.storage, []);
    }
}
