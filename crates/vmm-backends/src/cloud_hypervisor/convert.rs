//! From a [`VmSpec`] to Cloud Hypervisor's own configuration. Pure: the same request gives the same bytes.
//!
//! Devices are named by their place (`disk0`, `net0`), because Cloud Hypervisor wants names that no two devices of any kind
//! share; what the client calls a disk is its serial number, which the guest can see.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;
use vmm_core::spec::{
    Boot, Console, Cpu, Disk, DiskFormat, Memory, Nic, PageSize, RestartPolicy, Topology, VmSpec,
};

use crate::rest::options::RateLimiter;

/// Bytes of a virtio disk's serial number; a longer id is cut.
const SERIAL_LEN: usize = 20;

/// The body of `vm.create`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    cpus: Cpus,
    memory: MemoryConfig,
    payload: Payload,
    disks: Vec<DiskConfig>,
    net: Vec<NetConfig>,
    serial: Port,
    console: Port,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pvpanic: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Cpus {
    boot_vcpus: u32,
    max_vcpus: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    topology: Option<CpuTopology>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct CpuTopology {
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
struct Payload {
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
    /// Always stated, so that the image is never probed: its first bytes are the guest's to write.
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
struct Port {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
}

impl Config {
    /// The configuration of `spec`, whose network interfaces use `taps` in their order. `spec` has passed the check.
    pub fn of(spec: &VmSpec, taps: &[String]) -> Self {
        let VmSpec { cpu, memory, boot, disks, nics, console, restart, options: _ } = spec;
        // A guest's reset happens in place; `restart` is carried out by the handle.
        let RestartPolicy { mode: _, max_restarts: _ } = restart;
        let Boot { kernel, initrd, args: _ } = boot;
        // "Tty" is the VMM's stdout, which is the console's file; see the module's drawing.
        let serial = match console {
            Console::Off => "Off",
            Console::Kept | Console::File(_) => "Tty",
        };
        Self {
            cpus: cpus(cpu),
            memory: backed(memory),
            payload: Payload {
                kernel: text(kernel),
                initramfs: initrd.as_deref().map(text),
                cmdline: spec.kernel_args(),
            },
            disks: disks.iter().enumerate().map(|(place, disk)| drive(place, disk)).collect(),
            net: nics
                .iter()
                .zip(taps)
                .enumerate()
                .map(|(place, (nic, tap))| interface(place, nic, tap))
                .collect(),
            serial: Port { mode: serial, file: None },
            console: Port { mode: "Off", file: None },
            pvpanic: false,
        }
    }

    /// Adds the device by which a guest tells that its kernel has panicked, unless `spec` has the guest reset itself then. For a
    /// VMM whose events are read.
    pub fn with_panic_device(mut self, spec: &VmSpec) -> Self {
        self.pvpanic = !spec.resets_on_panic();
        self
    }

    /// The same with the serial port's output in `file`, which begins anew at each boot: the stdout of a VMM that somebody else
    /// started is his.
    pub fn with_console_in(mut self, file: &Path) -> Self {
        self.serial = Port { mode: "File", file: Some(text(file)) };
        self
    }
}

/// Cloud Hypervisor's arguments. Its log is its stderr; its stdout is the serial console.
pub fn arguments(socket: &Path, events: &Path) -> Vec<OsString> {
    vec!["--api-socket".into(), path_option(socket), "--event-monitor".into(), path_option(events)]
}

/// Writes `path=` and the path, in quotes where it has a character that Cloud Hypervisor's options are divided by.
pub(crate) fn path_option(path: &Path) -> OsString {
    let divides = |byte: &u8| matches!(byte, b',' | b'[' | b']' | b'=');
    let quote = if path.as_os_str().as_bytes().iter().any(divides) { "\"" } else { "" };
    let mut option = OsString::from("path=");
    option.push(quote);
    option.push(path);
    option.push(quote);
    option
}

fn cpus(cpu: &Cpu) -> Cpus {
    let Cpu { count, max, topology } = *cpu;
    let topology = topology.map(|Topology { sockets, cores, threads }| CpuTopology {
        threads_per_core: threads,
        cores_per_die: cores,
        dies_per_package: 1,
        packages: sockets,
    });
    Cpus { boot_vcpus: count, max_vcpus: max, topology }
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

fn drive(place: usize, disk: &Disk) -> DiskConfig {
    // The check warns that an unsafe cache has no effect.
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
        id: format!("disk{place}"),
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

fn interface(place: usize, nic: &Nic, tap: &str) -> NetConfig {
    let Nic { id: _, mac, tap: _, limits } = nic;
    NetConfig {
        id: format!("net{place}"),
        tap: tap.to_owned(),
        mac: mac.to_string(),
        rate_limiter_config: RateLimiter::of(*limits),
    }
}

/// Paths come from a configuration that is text, so nothing is lost.
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
        serde_json::to_string_pretty(&Config::of(&spec(config), &["vmt0".to_owned()])).unwrap()
    }

    #[test]
    fn a_guest_that_does_not_reset_itself_on_a_panic_gets_the_device_to_tell_of_it() {
        for (args, has_device) in [("console=ttyS0", true), ("console=ttyS0 panic=1", false)] {
            let mut config = small();
            config.boot.get_or_insert_default().kernel_args = args.to_owned();
            let spec = spec(&config);
            let native = serde_json::to_value(Config::of(&spec, &[]).with_panic_device(&spec)).unwrap();
            assert_eq!(native["pvpanic"] == true, has_device, "{args}");
        }
    }

    #[test]
    fn a_small_vm() {
        insta::assert_snapshot!(written(&small()));
    }

    #[test]
    fn a_large_vm() {
        insta::assert_snapshot!(written(&large()));
    }

    #[test]
    fn the_arguments() {
        let arguments = arguments(Path::new("/r/api.sock"), Path::new("/r/events"));
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        insta::assert_snapshot!(words.join(" "));
    }
}
