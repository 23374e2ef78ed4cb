//! What becomes of a configuration in libvirt's XML. Nothing is started.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use vmm_backends::libvirt::convert::{DomainInputs, PathUnfitForXml, QemuUser, domain};
use vmm_backends::libvirt::{LibvirtBackend, LibvirtOptions};
use vmm_backends::qemu::convert::{Accelerator, ImageKind};
use vmm_core::backend::Backend as _;
use vmm_core::capabilities::{EndpointMode, MachineFact};
use vmm_core::config::{
    BootConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, Options, RestartPolicyConfig,
    StorageDevice, VmConfig,
};
use vmm_core::discovery::Places;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::spec::VmSpec;

fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn small() -> VmConfig {
    VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: 512 << 20, ..MemoryConfig::default() }),
        boot: Some(BootConfig { kernel_path: "/boot/vmlinux".to_owned(), ..BootConfig::default() }),
        ..VmConfig::default()
    }
}

fn disk(id: &str, path: &str, pairs: &[(&str, &str)]) -> StorageDevice {
    StorageDevice {
        id: id.to_owned(),
        path: path.to_owned(),
        options: options(pairs),
        ..StorageDevice::default()
    }
}

/// Everything that a configuration can say, with texts that would be misread if they were not escaped.
fn full() -> VmConfig {
    let mut config = small();
    config.cpu = Some(CpuConfig {
        vcpu_count: 2,
        max_vcpu_count: 8,
        topology: Some(CpuTopology { sockets: 2, cores_per_socket: 2, threads_per_core: 2 }),
        features: options(&[("qemu.model", "Skylake-Server,-avx512f")]),
    });
    config.memory = Some(MemoryConfig {
        size_bytes: 1 << 30,
        hotplug_enabled: true,
        max_size_bytes: 4 << 30,
        backing: options(&[("hugepages", "true"), ("shared", "true")]),
    });
    config.boot = Some(BootConfig {
        kernel_path: "/boot/vm<linux>".to_owned(),
        initrd_path: "/boot/initrd & more".to_owned(),
        kernel_args: "console=ttyS0 note=\"a,b\" -- one's".to_owned(),
        ..BootConfig::default()
    });
    let mut root = disk("root", "/images/ro'ot.qcow2", &[("format", "qcow2"), ("direct_io", "true")]);
    root.is_root_device = true;
    let mut data = disk("data-with-a-name-that-is-too-long", "/dev/sdz", &[("cache", "unsafe")]);
    data.read_only = true;
    let limited = [("rate_limit.bytes_per_second", "1000"), ("rate_limit.operations_per_second", "10")];
    let chained = [("format", "qcow2"), ("backing_files", "true")];
    config.storage =
        vec![data, root, disk("limited", "/images/l", &limited), disk("chained", "/images/c", &chained)];
    config.network = (0..9)
        .map(|place| NetworkInterface {
            id: format!("n{place}"),
            mac_address: format!("02:00:00:00:00:0{place}"),
            ..NetworkInterface::default()
        })
        .collect();
    config.restart_policy = Some(RestartPolicyConfig { mode: 1, max_restarts: 0 });
    config
}

fn xml(config: &VmConfig, console: Option<&str>, label: Option<QemuUser>) -> Result<String, PathUnfitForXml> {
    xml_in(Path::new("/run/vm/0a"), config, console, label)
}

fn xml_in(
    dir: &Path,
    config: &VmConfig,
    console: Option<&str>,
    label: Option<QemuUser>,
) -> Result<String, PathUnfitForXml> {
    let spec = VmSpec::parse(config).unwrap();
    let is_block = |path: &PathBuf| path.starts_with("/dev");
    let images: Vec<ImageKind> = spec
        .disks
        .iter()
        .map(|disk| if is_block(&disk.path) { ImageKind::BlockDevice } else { ImageKind::File })
        .collect();
    let taps: Vec<String> = (0..spec.nics.len()).map(|index| format!("vmt{index}")).collect();
    domain(&DomainInputs {
        instance: "01890000-0000-7000-8000-0000000000ff".parse().unwrap(),
        uid: "01890000-0000-7000-8000-0000000000aa".parse().unwrap(),
        vm_id: &"web-1".parse().unwrap(),
        spec: &spec,
        accelerator: if label.is_some() { Accelerator::Tcg } else { Accelerator::Kvm },
        emulator: label.is_some().then_some(Path::new("/opt/qemu")),
        firmware: Path::new("/usr/share/qemu/qboot.rom"),
        label,
        dir,
        console: console.map(Path::new),
        taps: &taps,
        images: &images,
    })
}

#[test]
fn a_small_vm_is_converted() {
    insta::assert_snapshot!(xml(&small(), Some("/run/vm/0a/console.log"), None).unwrap());
}

#[test]
fn a_vm_with_every_device_is_converted() {
    let label = Some(QemuUser { uid: 0, gid: 0 });
    insta::assert_snapshot!(xml(&full(), Some("/tmp/my console.log"), label).unwrap());
}

#[test]
fn a_disabled_console_is_left_out() {
    let text = xml(&small(), None, Some(QemuUser { uid: 1000, gid: 100 })).unwrap();
    assert!(!text.contains("<serial") && !text.contains("console"), "{text}");
    // Another user's QEMU reaches only what libvirt gives it.
    assert!(text.contains("relabel='yes'") && text.contains("<label>+1000:+100</label>"), "{text}");
}

#[test]
fn a_path_that_xml_cannot_carry_is_refused() {
    for odd in [&b"/run/\xff"[..], b"/run/\x1b[2J"] {
        let dir = Path::new(OsStr::from_bytes(odd));
        let error = xml_in(dir, &small(), Some("/tmp/console.log"), None).unwrap_err();
        assert!(error.to_string().contains("rename it"), "{error}");
    }
}

#[test]
fn the_capabilities_and_kinds_of_the_libvirt_backend() {
    let backend = LibvirtBackend::new(LibvirtOptions::new("qemu:///system"));
    let capabilities = backend.capabilities();
    assert_eq!((capabilities.name.as_str(), capabilities.endpoint_mode), ("qemu", EndpointMode::Libvirt));
    assert_eq!(capabilities.facts.machines, Some(&[MachineFact::Q35][..]));
    assert_eq!(backend.places(), Places::Made);
    let uid: VmUid = "0193f0de-0000-7000-8000-000000000001".parse().unwrap();
    let kind = backend.kind_of_new(uid);
    assert_eq!(kind, VmKind::Libvirt { uri: "qemu:///system".to_owned(), domain: *uid.as_uuid() });
    assert!(backend.serves(&kind));
    let elsewhere = VmKind::Libvirt { uri: "qemu:///session".to_owned(), domain: *uid.as_uuid() };
    for other in [elsewhere, VmKind::Managed, VmKind::attached("/run/qmp.sock")] {
        assert!(!backend.serves(&other), "{other:?}");
    }
}
