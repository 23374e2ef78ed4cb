//! Converts a [`VmSpec`] into Firecracker's own configuration. A pure function: equal requests give
//! equal bytes.
//!
//! Firecracker's API is a sequence of PUT requests, one for each device or setting.
//! [`FirecrackerConfig`] holds their bodies. Devices are named by their position (`disk0`, `net0`),
//! because Firecracker accepts only letters, digits and underscores in names and a client may use
//! more.

use std::ffi::OsString;
use std::path::Path;

use serde::Serialize;
use vmm_core::id::VmUid;
use vmm_core::spec::{
    Boot, Cpu, Disk, DiskCache, Memory, Nic, PageSize, RestartPolicy, VmSpec, kernel_words,
};

use crate::rest::options::RateLimiter;

/// Makes Linux end a run by a reset of the keyboard controller, the only reset that Firecracker
/// sees.
const REBOOT: &str = "reboot=k";

/// The bodies of the requests that configure a VM.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct FirecrackerConfig {
    /// `PUT /machine-config`.
    pub machine: MachineConfig,
    /// `PUT /boot-source`.
    pub boot: BootSource,
    /// `PUT /drives/{drive_id}`, in the order the guest sees them.
    pub drives: Vec<Drive>,
    /// `PUT /network-interfaces/{iface_id}`, in the order the guest sees them.
    pub interfaces: Vec<Interface>,
}

/// CPUs and memory.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct MachineConfig {
    /// CPUs.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// True if two CPUs share a core.
    pub smt: bool,
    /// `2M` for huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<&'static str>,
}

/// Kernel and arguments.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// The kernel on the host.
    pub kernel_image_path: String,
    /// The initial RAM disk on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// The whole command line. Firecracker has a default only if this is missing.
    pub boot_args: String,
}

/// A disk.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// The drive's name in Firecracker.
    pub drive_id: String,
    /// The image on the host.
    pub path_on_host: String,
    /// Always false, because true would add a `root=` that overrides the client's own.
    pub is_root_device: bool,
    /// True if the guest may only read.
    pub is_read_only: bool,
    /// `Writeback` obeys the guest's flushes, `Unsafe` does not.
    pub cache_type: &'static str,
    /// The limits of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// A network interface.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// The interface's name in Firecracker.
    pub iface_id: String,
    /// The TAP on the host.
    pub host_dev_name: String,
    /// The guest's hardware address.
    pub guest_mac: String,
    /// The limits of received data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// The limits of sent data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl FirecrackerConfig {
    /// Returns the configuration of `spec`, whose network interfaces use `taps` in their order.
    /// `spec` has passed the check.
    pub fn of(spec: &VmSpec, taps: &[String]) -> Self {
        // The console is the VMM's stdout, and the service applies `restart`.
        let VmSpec { cpu, memory, boot, disks, nics, console: _, restart, options: _ } = spec;
        let RestartPolicy { mode: _, max_restarts: _ } = restart;
        let Cpu { count, max: _, topology: _ } = *cpu;
        let Memory { size_bytes: _, hotplug_max_bytes: _, pages, shared: _ } = *memory;
        let Boot { kernel, initrd, args: _ } = boot;
        Self {
            machine: MachineConfig {
                vcpu_count: count,
                mem_size_mib: memory.size_mib(),
                smt: wants_smt(cpu),
                huge_pages: (pages == PageSize::Huge).then_some("2M"),
            },
            boot: BootSource {
                kernel_image_path: text(kernel),
                initrd_path: initrd.as_deref().map(text),
                boot_args: kernel_args(spec),
            },
            drives: disks.iter().enumerate().map(|(index, disk)| drive(index, disk)).collect(),
            interfaces: nics
                .iter()
                .zip(taps)
                .enumerate()
                .map(|(index, (nic, tap))| interface(index, nic, tap))
                .collect(),
        }
    }
}

impl FirecrackerConfig {
    /// Returns the text of a `--config-file`.
    pub fn file(&self) -> String {
        let Self { machine, boot, drives, interfaces } = self;
        serde_json::json!({
            "machine-config": machine,
            "boot-source": boot,
            "drives": drives,
            "network-interfaces": interfaces,
        })
        .to_string()
    }
}

/// Returns Firecracker's arguments. `--log-path` keeps its log off its stdout, which is the serial
/// console.
pub fn arguments(uid: VmUid, socket: &Path, log: &Path, metrics: &Path) -> Vec<OsString> {
    vec![
        "--id".into(),
        uid.to_string().into(),
        "--api-sock".into(),
        socket.into(),
        "--log-path".into(),
        log.into(),
        // A lower level logs every call and every unknown port that a guest writes to, without end.
        "--level".into(),
        "Error".into(),
        "--metrics-path".into(),
        metrics.into(),
    ]
}

/// Returns true if the guest's CPUs share cores in pairs.
pub fn wants_smt(cpu: &Cpu) -> bool {
    cpu.topology.is_some_and(|topology| topology.threads == 2)
}

/// Returns true if `reboot=k` must be added so that a guest's reboot is seen.
pub fn needs_reboot_argument(spec: &VmSpec) -> bool {
    cfg!(target_arch = "x86_64") && !kernel_words(&spec.boot.args).any(|word| word.starts_with("reboot="))
}

/// Returns the whole command line, except for the words that Firecracker adds.
pub fn kernel_args(spec: &VmSpec) -> String {
    let args = spec.kernel_args();
    // The word is added in front, because the words after a lone "--" belong to the guest's first
    // program.
    if !needs_reboot_argument(spec) {
        args
    } else if args.is_empty() {
        REBOOT.to_owned()
    } else {
        format!("{REBOOT} {args}")
    }
}

/// Returns the bytes that Firecracker adds to the command line of a guest with `devices` disks and
/// interfaces: one word that disables PCI, and one word for each virtio-mmio device with its
/// address and interrupt.
pub(super) fn added_by_firecracker(devices: usize) -> usize {
    const FIRST_ADDRESS: usize = 0xc000_1000;
    const FIRST_INTERRUPT: usize = 5;
    let device = |index: usize| {
        let (address, interrupt) = (FIRST_ADDRESS + 0x1000 * index, FIRST_INTERRUPT + index);
        format!(" virtio_mmio.device=4K@{address:#x}:{interrupt}").len()
    };
    " pci=off".len() + (0..devices).map(device).sum::<usize>()
}

fn drive(index: usize, disk: &Disk) -> Drive {
    // The check refuses a qcow2 image and direct I/O.
    let Disk {
        index: _,
        id: _,
        path,
        read_only,
        is_root: _,
        format: _,
        backing_files: _,
        cache,
        direct_io: _,
        limits,
    } = disk;
    Drive {
        drive_id: format!("disk{index}"),
        path_on_host: text(path),
        is_root_device: false,
        is_read_only: *read_only,
        cache_type: match cache {
            DiskCache::Unsafe => "Unsafe",
            DiskCache::Writeback => "Writeback",
        },
        rate_limiter: RateLimiter::of(*limits),
    }
}

fn interface(index: usize, nic: &Nic, tap: &str) -> Interface {
    let Nic { id: _, mac, tap: _, limits } = nic;
    Interface {
        iface_id: format!("net{index}"),
        host_dev_name: tap.to_owned(),
        guest_mac: mac.to_string(),
        rx_rate_limiter: RateLimiter::of(*limits),
        tx_rate_limiter: RateLimiter::of(*limits),
    }
}

/// Returns `path` as text without loss, because paths come from a configuration that is text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use vmm_core::config::{
        BootConfig, ConsoleConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface,
        RestartPolicyConfig, StorageDevice, VmConfig,
    };

    use super::*;

    fn spec(config: &VmConfig) -> VmSpec {
        VmSpec::parse(config).unwrap()
    }

    fn small() -> VmConfig {
        VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 128 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/images/vmlinux".to_owned(), ..BootConfig::default() }),
            ..VmConfig::default()
        }
    }

    fn options(pairs: &[(&str, &str)]) -> vmm_core::config::Options {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn large() -> VmConfig {
        let disk = |id: &str, path: &str| StorageDevice {
            id: id.to_owned(),
            path: path.to_owned(),
            ..StorageDevice::default()
        };
        VmConfig {
            cpu: Some(CpuConfig {
                vcpu_count: 4,
                topology: Some(CpuTopology { sockets: 1, cores_per_socket: 2, threads_per_core: 2 }),
                ..CpuConfig::default()
            }),
            memory: Some(MemoryConfig {
                size_bytes: 512 << 20,
                backing: options(&[("hugepages", "true")]),
                ..MemoryConfig::default()
            }),
            boot: Some(BootConfig {
                kernel_path: "/images/vmlinux".to_owned(),
                initrd_path: "/images/initrd".to_owned(),
                kernel_args: "console=ttyS0 quiet".to_owned(),
                ..BootConfig::default()
            }),
            storage: vec![
                StorageDevice {
                    read_only: true,
                    options: options(&[("rate_limit.bytes_per_second", "1000000"), ("cache", "unsafe")]),
                    ..disk("data", "/images/da ta,x=\"y\".raw")
                },
                StorageDevice {
                    is_root_device: true,
                    ..disk("a-very-long-name-of-the-root-disk", "/images/root.raw")
                },
            ],
            network: vec![NetworkInterface {
                id: "data".to_owned(),
                mac_address: "02:00:00:00:00:01".to_owned(),
                options: options(&[("rate_limit.packets_per_second", "500")]),
                ..NetworkInterface::default()
            }],
            console: Some(ConsoleConfig { enabled: false, ..ConsoleConfig::default() }),
            restart_policy: Some(RestartPolicyConfig { mode: 1, max_restarts: 0 }),
            ..VmConfig::default()
        }
    }

    fn written(config: &VmConfig) -> String {
        serde_json::to_string_pretty(&FirecrackerConfig::of(&spec(config), &["vmt0".to_owned()])).unwrap()
    }

    #[test]
    fn a_small_vm_is_converted() {
        insta::assert_snapshot!(written(&small()));
    }

    #[test]
    fn a_large_vm_is_converted() {
        insta::assert_snapshot!(written(&large()));
    }

    #[test]
    fn the_file_has_the_bodies_of_all_calls() {
        let config = FirecrackerConfig::of(&spec(&large()), &["vmt0".to_owned()]);
        let file: serde_json::Value = serde_json::from_str(&config.file()).unwrap();
        let bodies = serde_json::to_value(&config).unwrap();
        for (in_file, in_calls) in [
            ("machine-config", "machine"),
            ("boot-source", "boot"),
            ("drives", "drives"),
            ("network-interfaces", "interfaces"),
        ] {
            assert_eq!(file[in_file], bodies[in_calls]);
        }
        assert_eq!(file.as_object().unwrap().len(), bodies.as_object().unwrap().len());
    }

    #[test]
    fn the_clients_reboot_argument_is_kept() {
        let mut config = small();
        config.boot.as_mut().unwrap().kernel_args = "reboot=t quiet -- reboot".to_owned();
        assert_eq!(kernel_args(&spec(&config)), "reboot=t quiet -- reboot");
        config.boot.as_mut().unwrap().kernel_args = "quiet -- reboot=t".to_owned();
        assert_eq!(kernel_args(&spec(&config)), "reboot=k quiet -- reboot=t", "init's is not the kernel's");
        config.boot.as_mut().unwrap().kernel_args = "quiet -- x".to_owned();
        assert_eq!(kernel_args(&spec(&config)), "reboot=k quiet -- x");
    }

    #[test]
    fn the_command_line_of_the_vmm() {
        let uid = "0190a000-0000-7000-8000-000000000001".parse().unwrap();
        let arguments =
            arguments(uid, Path::new("/r/api.sock"), Path::new("/r/vmm.log"), Path::new("/r/metrics"));
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        insta::assert_snapshot!(words.join(" "));
    }
}
