//! Converts a [`VmSpec`] into Cloud Hypervisor's own configuration. A pure function: equal requests
//! give equal bytes.
//!
//! Devices are named by their position (`disk0`, `net0`), because Cloud Hypervisor requires names
//! that are unique over all kinds of devices. The client's name of a disk becomes its serial
//! number, which the guest can see.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;
use vmm_core::spec::{
    Boot, Console, Cpu, Disk, DiskFormat, Memory, Nic, PageSize, RestartPolicy, Topology, VmSpec,
};

use crate::rest::options::RateLimiter;

/// The bytes of a virtio disk's serial number. A longer id is cut.
const SERIAL_LEN: usize = 20;

/// The body of `vm.create`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct CloudHypervisorConfig {
    cpus: CpusConfig,
    memory: MemoryConfig,
    payload: PayloadConfig,
    disks: Vec<DiskConfig>,
    net: Vec<NetConfig>,
    serial: PortConfig,
    console: PortConfig,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pvpanic: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct CpusConfig {
    boot_vcpus: u32,
    max_vcpus: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    topology: Option<CpuTopologyConfig>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct CpuTopologyConfig {
    threads_per_core: u32,
    cores_per_die: u32,
    dies_per_package: u32,
    packages: u32,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct MemoryConfig {
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplug_size: Option<u64>,
    shared: bool,
    hugepages: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct PayloadConfig {
    kernel: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    initramfs: Option<String>,
    cmdline: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct DiskConfig {
    id: String,
    serial: String,
    path: String,
    readonly: bool,
    direct: bool,
    /// Always set, so that the format is never detected from the image, whose first bytes the guest
    /// can write.
    image_type: &'static str,
    backing_files: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter_config: Option<RateLimiter>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct NetConfig {
    id: String,
    tap: String,
    mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter_config: Option<RateLimiter>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct PortConfig {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
}

impl CloudHypervisorConfig {
    /// Returns the configuration of `spec`, whose network interfaces use `taps` in their order.
    /// `spec` has passed the check.
    pub fn of(spec: &VmSpec, taps: &[String]) -> Self {
        let VmSpec { cpu, memory, boot, disks, nics, console, restart, options: _ } = spec;
        // The handle applies `restart`, because a guest's reset happens in place.
        let RestartPolicy { mode: _, max_restarts: _ } = restart;
        let Boot { kernel, initrd, args: _ } = boot;
        // "Tty" is the VMM's stdout, which is the console's file; see the picture in the parent
        // module.
        let serial = match console {
            Console::Off => "Off",
            Console::Kept | Console::File(_) => "Tty",
        };
        Self {
            cpus: cpus(cpu),
            memory: backed(memory),
            payload: PayloadConfig {
                kernel: text(kernel),
                initramfs: initrd.as_deref().map(text),
                cmdline: spec.kernel_args(),
            },
            disks: disks.iter().enumerate().map(|(index, disk)| drive(index, disk)).collect(),
            net: nics
                .iter()
                .zip(taps)
                .enumerate()
                .map(|(index, (nic, tap))| interface(index, nic, tap))
                .collect(),
            serial: PortConfig { mode: serial, file: None },
            console: PortConfig { mode: "Off", file: None },
            pvpanic: false,
        }
    }

    /// Adds the device by which a guest reports a panic of its kernel, unless `spec` makes the
    /// guest reset itself. Only for a VMM whose events are read.
    pub fn with_panic_device(mut self, spec: &VmSpec) -> Self {
        self.pvpanic = !spec.resets_on_panic();
        self
    }

    /// Sends the serial port's output to `file`, which the VMM empties at each boot. Used for an
    /// attached VMM, because its stdout belongs to the program that started it.
    pub fn with_console_in(mut self, file: &Path) -> Self {
        self.serial = PortConfig { mode: "File", file: Some(text(file)) };
        self
    }
}

/// Returns Cloud Hypervisor's arguments. Its log is its stderr, and its stdout is the serial
/// console.
pub fn arguments(socket: &Path, events: &Path) -> Vec<OsString> {
    vec!["--api-socket".into(), path_option(socket), "--event-monitor".into(), path_option(events)]
}

/// Returns `path=` and the path. The path is quoted if it contains a character that separates Cloud
/// Hypervisor's options.
pub(crate) fn path_option(path: &Path) -> OsString {
    let divides = |byte: &u8| matches!(byte, b',' | b'[' | b']' | b'=');
    let quote = if path.as_os_str().as_bytes().iter().any(divides) { "\"" } else { "" };
    let mut option = OsString::from("path=");
    option.push(quote);
    option.push(path);
    option.push(quote);
    option
}

fn cpus(cpu: &Cpu) -> CpusConfig {
    let Cpu { count, max, topology } = *cpu;
    let topology = topology.map(|Topology { sockets, cores, threads }| CpuTopologyConfig {
        threads_per_core: threads,
        cores_per_die: cores,
        dies_per_package: 1,
        packages: sockets,
    });
    CpusConfig { boot_vcpus: count, max_vcpus: max, topology }
}

fn backed(memory: &Memory) -> MemoryConfig {
    let Memory { size_bytes, hotplug_max_bytes, pages, shared } = *memory;
    let room = hotplug_max_bytes.map(|ceiling| ceiling.saturating_sub(size_bytes));
    MemoryConfig {
        size: size_bytes,
        hotplug_size: room.filter(|room| *room > 0),
        shared,
        hugepages: pages == PageSize::Huge,
    }
}

fn drive(index: usize, disk: &Disk) -> DiskConfig {
    // An unsafe cache has no effect here; the check warns about it.
    let Disk {
        index: _,
        id,
        path,
        read_only,
        is_root: _,
        format,
        backing_files,
        cache: _,
        direct_io,
        limits,
    } = disk;
    DiskConfig {
        id: format!("disk{index}"),
        serial: id.chars().take(SERIAL_LEN).collect(),
        path: text(path),
        readonly: *read_only,
        direct: *direct_io,
        image_type: match format {
            DiskFormat::Raw => "Raw",
            DiskFormat::Qcow2 => "Qcow2",
        },
        backing_files: *backing_files,
        rate_limiter_config: RateLimiter::of(*limits),
    }
}

fn interface(index: usize, nic: &Nic, tap: &str) -> NetConfig {
    let Nic { id: _, mac, tap: _, limits } = nic;
    NetConfig {
        id: format!("net{index}"),
        tap: tap.to_owned(),
        mac: mac.to_string(),
        rate_limiter_config: RateLimiter::of(*limits),
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
                backing: options(&[("hugepages", "true"), ("shared", "true")]),
                hotplug_enabled: true,
                max_size_bytes: 1 << 30,
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
                    options: options(&[
                        ("rate_limit.bytes_per_second", "1000000"),
                        ("format", "qcow2"),
                        ("backing_files", "true"),
                        ("direct_io", "true"),
                    ]),
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
        serde_json::to_string_pretty(&CloudHypervisorConfig::of(&spec(config), &["vmt0".to_owned()])).unwrap()
    }

    #[test]
    fn a_guest_without_a_panic_reset_has_a_pvpanic_device() {
        for (args, has_device) in [("console=ttyS0", true), ("console=ttyS0 panic=1", false)] {
            let mut config = small();
            config.boot.get_or_insert_default().kernel_args = args.to_owned();
            let spec = spec(&config);
            let native =
                serde_json::to_value(CloudHypervisorConfig::of(&spec, &[]).with_panic_device(&spec)).unwrap();
            assert_eq!(native["pvpanic"] == true, has_device, "{args}");
        }
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
    fn the_command_line_of_the_vmm() {
        let arguments = arguments(Path::new("/r/api.sock"), Path::new("/r/events"));
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        insta::assert_snapshot!(words.join(" "));
    }
}
