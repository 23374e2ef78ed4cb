//! Parses a configuration as sent into a [`VmSpec`], and collects every violation on the way.

use std::collections::HashMap;
use std::path::PathBuf;

use super::kernel_line::kernels_part;
use super::options::{
    BACKING_KEYS, BOOT_KEYS, BackendOptions, CPU_KEYS, DISK_KEYS, NIC_KEYS, check_plain_keys, flag, limits,
};
use super::{
    Boot, Console, Cpu, DEFAULT_MAX_RESTARTS, Disk, DiskCache, DiskFormat, FIRMWARE_FIELD, MAX_KERNEL_ARGS,
    MIB, MacAddr, Memory, NamedFiles, Nic, PageSize, RestartMode, RestartPolicy, Topology, VmSpec,
    names_root,
};
use crate::config::{
    BootConfig, ConsoleConfig, CpuConfig, MemoryConfig, NetworkInterface, Options, RestartPolicyConfig,
    StorageDevice, VmConfig,
};
use crate::id::is_name;
use crate::report::CheckReport;

/// The most virtual CPUs: more than any backend serves.
const MAX_VCPUS: i32 = 1024;
/// The most memory: 64 TiB, more than any host of today has.
const MAX_MEMORY: i64 = 64 << 40;
/// The most devices of one kind: more than a machine model has slots for.
pub(super) const MAX_DEVICES: usize = 64;
/// The most bytes of all labels together.
pub(super) const MAX_METADATA: usize = 64 << 10;
/// The longest path of Linux, in bytes.
const MAX_PATH: usize = 4095;
/// The field of the kernel.
const KERNEL: &str = "config.boot.kernel_path";
/// The violation of a configuration without a kernel.
const NO_KERNEL: &str =
    "is required: name a kernel image on the host, or let the host set UNKEY_VMCP_DEFAULT_KERNEL";
/// The longest name of a network interface, in bytes.
const MAX_TAP: usize = 15;

impl VmSpec {
    /// Checks `config` and converts it into typed fields.
    ///
    /// # Errors
    ///
    /// Returns every violation at once, each with its path from `config`.
    pub fn parse(config: &VmConfig) -> Result<Self, CheckReport> {
        Self::parse_with_files(config).0
    }

    /// Checks `config` like [`VmSpec::parse`], and also returns the named files, because those can
    /// be examined even if another part is refused. A refused path is not among them.
    pub fn parse_with_files(config: &VmConfig) -> (Result<Self, CheckReport>, NamedFiles) {
        let mut report = CheckReport::default();
        let cpu = parse_cpu(&mut report, config.cpu.as_ref());
        let memory = parse_memory(&mut report, config.memory.as_ref());
        let boot = parse_boot(&mut report, config.boot.as_ref());
        let disks = parse_disks(&mut report, &config.storage);
        let nics = parse_nics(&mut report, &config.network);
        let console = parse_console(&mut report, config.console.as_ref());
        let restart = parse_restart(&mut report, config.restart_policy.as_ref());
        check_metadata(&mut report, config);
        let files = NamedFiles {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            disks: disks.clone(),
            console: console.clone(),
            names_root: names_root(&boot.args),
        };
        let parsed = match (cpu, memory, boot.kernel, restart) {
            (Some(cpu), Some(memory), Some(kernel), Some(restart)) if report.is_ok() => {
                let boot = Boot { kernel, initrd: boot.initrd, args: boot.args };
                let options = BackendOptions::of(config);
                Ok(Self { cpu, memory, boot, disks, nics, console, restart, options })
            }
            _ => Err(report),
        };
        (parsed, files)
    }
}

fn parse_cpu(report: &mut CheckReport, cpu: Option<&CpuConfig>) -> Option<Cpu> {
    let Some(cpu) = cpu else {
        report.reject("config.cpu", "is required: set cpu.vcpu_count to 1 or more");
        return None;
    };
    check_plain_keys(report, "config.cpu.features", &cpu.features, CPU_KEYS);
    if !(1..=MAX_VCPUS).contains(&cpu.vcpu_count) {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be from 1 to {MAX_VCPUS}, not {}", cpu.vcpu_count),
        );
        return None;
    }
    let max = if cpu.max_vcpu_count == 0 { cpu.vcpu_count } else { cpu.max_vcpu_count };
    if max < cpu.vcpu_count || max > MAX_VCPUS {
        report.reject(
            "config.cpu.max_vcpu_count",
            format!(
                "must be 0 or from vcpu_count ({}) to {MAX_VCPUS}, not {}",
                cpu.vcpu_count, cpu.max_vcpu_count
            ),
        );
        return None;
    }
    let topology = cpu.topology.as_ref().map(|sent| {
        let parts = [sent.sockets, sent.cores_per_socket, sent.threads_per_core];
        let product = parts.iter().try_fold(1_i32, |product, part| product.checked_mul(*part));
        if parts.iter().any(|part| *part < 1) || product != Some(max) {
            report.reject(
                "config.cpu.topology",
                format!(
                    "sockets x cores_per_socket x threads_per_core must equal the maximum number of vCPUs ({max}), not {} x {} x {}",
                    parts[0], parts[1], parts[2]
                ),
            );
        }
        // A topology with a violation never leaves `parse`, so the sign does not matter here.
        let [sockets, cores, threads] = parts.map(i32::unsigned_abs);
        Topology { sockets, cores, threads }
    });
    Some(Cpu { count: cpu.vcpu_count.unsigned_abs(), max: max.unsigned_abs(), topology })
}

fn parse_memory(report: &mut CheckReport, memory: Option<&MemoryConfig>) -> Option<Memory> {
    let Some(memory) = memory else {
        report.reject("config.memory", "is required: set memory.size_bytes to a whole number of MiB");
        return None;
    };
    check_plain_keys(report, "config.memory.backing", &memory.backing, BACKING_KEYS);
    let (pages, shared) = parse_backing(report, &memory.backing);
    let whole_mib = |bytes: i64| bytes % (MIB as i64) == 0 && (1..=MAX_MEMORY).contains(&bytes);
    if !whole_mib(memory.size_bytes) {
        report.reject(
            "config.memory.size_bytes",
            format!(
                "must be a whole number of MiB (1048576 bytes), more than 0 and at most 64 TiB, not {}",
                memory.size_bytes
            ),
        );
        return None;
    }
    let ceiling = memory.max_size_bytes;
    if ceiling != 0 && (!whole_mib(ceiling) || ceiling < memory.size_bytes) {
        report.reject(
            "config.memory.max_size_bytes",
            format!(
                "must be 0 or a whole number of MiB from size_bytes ({}) up, not {ceiling}",
                memory.size_bytes
            ),
        );
    }
    if memory.hotplug_enabled && ceiling == 0 {
        report.reject(
            "config.memory.max_size_bytes",
            "must be set where hotplug_enabled is true, because it limits the memory of the guest",
        );
    }
    let hotplug_max_bytes = memory.hotplug_enabled.then_some(ceiling.unsigned_abs());
    if !memory.hotplug_enabled && ceiling > memory.size_bytes {
        report.ignore("config.memory.max_size_bytes", "is not used while hotplug_enabled is false");
    }
    Some(Memory { size_bytes: memory.size_bytes.unsigned_abs(), hotplug_max_bytes, pages, shared })
}

/// Reads the kind of pages that back the memory, and true if the memory is shared.
pub(super) fn parse_backing(report: &mut CheckReport, backing: &Options) -> (PageSize, bool) {
    const FIELD: &str = "config.memory.backing";
    let huge = flag(report, FIELD, backing, "hugepages");
    let pages = if huge { PageSize::Huge } else { PageSize::Usual };
    (pages, flag(report, FIELD, backing, "shared"))
}

/// The parts of `config.boot` that are legal by themselves.
#[derive(Default)]
struct BootParts {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    args: String,
}

fn parse_boot(report: &mut CheckReport, boot: Option<&BootConfig>) -> BootParts {
    let Some(boot) = boot else {
        report.reject(KERNEL, NO_KERNEL);
        return BootParts::default();
    };
    check_plain_keys(report, "config.boot.boot_options", &boot.boot_options, BOOT_KEYS);
    if boot.boot_options.contains_key("firmware") {
        report.reject(
            FIRMWARE_FIELD,
            "booting from firmware is not served yet: name a kernel in kernel_path instead",
        );
    }
    check_kernel_args(report, &boot.kernel_args);
    let kernel = match boot.kernel_path.as_str() {
        "" => {
            report.reject(KERNEL, NO_KERNEL);
            None
        }
        path => parse_path(report, KERNEL, path),
    };
    let initrd = match boot.initrd_path.as_str() {
        "" => None,
        path => parse_path(report, "config.boot.initrd_path", path),
    };
    BootParts { kernel, initrd, args: boot.kernel_args.clone() }
}

fn check_kernel_args(report: &mut CheckReport, args: &str) {
    const FIELD: &str = "config.boot.kernel_args";
    if args.len() > MAX_KERNEL_ARGS {
        report.reject(FIELD, format!("must be at most {MAX_KERNEL_ARGS} bytes, not {}", args.len()));
    }
    if args.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
        report.reject(FIELD, "must not contain control characters such as a line break");
    }
    // An open quote would swallow the arguments that the program adds behind it.
    if kernels_part(args).matches('"').count() % 2 == 1 {
        report.reject(FIELD, "has a quote (\") that is never closed");
    }
}

fn parse_disks(report: &mut CheckReport, storage: &[StorageDevice]) -> Vec<Disk> {
    check_count(report, "config.storage", storage.len());
    check_unique(report, "config.storage", "id", storage.iter().map(|device| device.id.as_str()));
    let roots: Vec<usize> = storage
        .iter()
        .enumerate()
        .filter(|(_, device)| device.is_root_device)
        .map(|(index, _)| index)
        .collect();
    for extra in roots.iter().skip(1) {
        report.reject(
            format!("config.storage[{extra}].is_root_device"),
            format!("only one disk can be the root device, and config.storage[{}] is", roots[0]),
        );
    }
    let mut disks: Vec<Disk> =
        storage.iter().enumerate().filter_map(|(index, device)| parse_disk(report, index, device)).collect();
    // The root device comes first, because `root=/dev/vda` names the first disk. The sort is
    // stable, so the other disks keep their order.
    disks.sort_by_key(|disk| !disk.is_root);
    disks
}

pub(super) fn parse_disk(report: &mut CheckReport, index: usize, device: &StorageDevice) -> Option<Disk> {
    let field = format!("config.storage[{index}]");
    check_device_id(report, &field, &device.id);
    if !matches!(device.interface_type.as_str(), "" | "virtio" | "virtio-blk") {
        report.reject(
            format!("{field}.interface_type"),
            format!("must be empty, \"virtio\" or \"virtio-blk\", not \"{}\"", device.interface_type),
        );
    }
    let options = format!("{field}.options");
    check_plain_keys(report, &options, &device.options, DISK_KEYS);
    let format = match device.options.get("format").map(String::as_str) {
        None | Some("raw") => DiskFormat::Raw,
        Some("qcow2") => DiskFormat::Qcow2,
        // The fallback serves imported VMs alone, whose violations are ignored. Any other
        // configuration with this violation is refused.
        Some(other) => {
            report.reject(
                format!("{options}[\"format\"]"),
                format!("must be \"raw\" or \"qcow2\", not \"{other}\""),
            );
            DiskFormat::Raw
        }
    };
    let backing_files = flag(report, &options, &device.options, "backing_files");
    let direct_io = flag(report, &options, &device.options, "direct_io");
    if backing_files && format == DiskFormat::Raw {
        report.reject(
            format!("{options}[\"backing_files\"]"),
            "applies to qcow2 images only: set format to \"qcow2\"",
        );
    }
    let cache = match device.options.get("cache").map(String::as_str) {
        None | Some("writeback") => DiskCache::Writeback,
        Some("unsafe") => DiskCache::Unsafe,
        Some(other) => {
            report.reject(
                format!("{options}[\"cache\"]"),
                format!("must be \"writeback\" (the guest's flushes reach the disk) or \"unsafe\" (they do not), not \"{other}\""),
            );
            DiskCache::Writeback
        }
    };
    Some(Disk {
        index,
        id: device.id.clone(),
        limits: limits(report, &options, &device.options, "rate_limit.operations_per_second"),
        path: parse_path(report, &format!("{field}.path"), &device.path)?,
        read_only: device.read_only,
        is_root: device.is_root_device,
        format,
        backing_files,
        cache,
        direct_io,
    })
}

fn parse_nics(report: &mut CheckReport, network: &[NetworkInterface]) -> Vec<Nic> {
    check_count(report, "config.network", network.len());
    check_unique(report, "config.network", "id", network.iter().map(|nic| nic.id.as_str()));
    check_unique(report, "config.network", "tap_device", network.iter().map(|nic| nic.tap_device.as_str()));
    let nics: Vec<(usize, Nic)> = network
        .iter()
        .enumerate()
        .filter_map(|(index, nic)| parse_nic(report, index, nic).map(|nic| (index, nic)))
        .collect();
    // Addresses are compared after parsing, because one address has several spellings.
    let mut seen = HashMap::new();
    for (index, nic) in &nics {
        if let Some(first) = seen.insert(nic.mac, index) {
            report.reject(
                format!("config.network[{index}].mac_address"),
                format!("{} is used by config.network[{first}] too", nic.mac),
            );
        }
    }
    nics.into_iter().map(|(_, nic)| nic).collect()
}

pub(super) fn parse_nic(report: &mut CheckReport, index: usize, nic: &NetworkInterface) -> Option<Nic> {
    let field = format!("config.network[{index}]");
    check_device_id(report, &field, &nic.id);
    if !matches!(nic.interface_type.as_str(), "" | "tap" | "virtio" | "virtio-net") {
        report.reject(
            format!("{field}.interface_type"),
            format!("must be empty, \"virtio\", \"virtio-net\" or \"tap\", not \"{}\"", nic.interface_type),
        );
    }
    let options = format!("{field}.options");
    check_plain_keys(report, &options, &nic.options, NIC_KEYS);
    let limits = limits(report, &options, &nic.options, "rate_limit.packets_per_second");
    if let Err(message) = check_tap_name(&nic.tap_device) {
        report.reject(format!("{field}.tap_device"), message);
    }
    match nic.mac_address.parse::<MacAddr>() {
        Ok(mac) => Some(Nic {
            id: nic.id.clone(),
            mac,
            tap: (!nic.tap_device.is_empty()).then(|| nic.tap_device.clone()),
            limits,
        }),
        Err(message) => {
            report.reject(format!("{field}.mac_address"), message);
            None
        }
    }
}

fn check_tap_name(name: &str) -> Result<(), String> {
    // The kernel takes no '/' and ':' in a name, and reads '%' as a pattern. ',' and '=' separate
    // options on the command lines of VMMs.
    let legal = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%' | b',' | b'=');
    if name.len() > MAX_TAP {
        Err(format!("must be at most {MAX_TAP} bytes, not {}", name.len()))
    } else if !name.bytes().all(legal) || name == "." || name == ".." {
        Err("must be letters, digits and punctuation without '/', ':', '%', ',' or '='".to_owned())
    } else {
        Ok(())
    }
}

fn parse_console(report: &mut CheckReport, console: Option<&ConsoleConfig>) -> Console {
    let Some(console) = console else { return Console::Kept };
    if !matches!(console.console_type.as_str(), "" | "serial") {
        report.reject(
            "config.console.console_type",
            format!("must be empty or \"serial\", not \"{}\"", console.console_type),
        );
    }
    if !console.input.is_empty() {
        report.reject("config.console.input", "must be empty: the console takes input from the API only");
    }
    match (console.enabled, console.output.as_str()) {
        (true, "") => Console::Kept,
        (true, path) => match parse_path(report, "config.console.output", path) {
            Some(path) => Console::File(path),
            None => Console::Kept,
        },
        (false, "") => Console::Off,
        (false, _) => {
            report.reject(
                "config.console.output",
                "has no use while console.enabled is false: set enabled, or leave it out",
            );
            Console::Off
        }
    }
}

fn parse_restart(report: &mut CheckReport, restart: Option<&RestartPolicyConfig>) -> Option<RestartPolicy> {
    let Some(restart) = restart else {
        return Some(RestartPolicy { mode: None, max_restarts: DEFAULT_MAX_RESTARTS });
    };
    // The numbers are those of the wire's RestartMode. This crate has no protobuf types.
    let mode = match restart.mode {
        0 => None,
        1 => Some(RestartMode::Never),
        2 => Some(RestartMode::GuestReboot),
        3 => Some(RestartMode::OnFailure),
        4 => Some(RestartMode::Always),
        other => {
            report.reject("config.restart_policy.mode", format!(
                    "must be one of RESTART_MODE_NEVER (1), RESTART_MODE_GUEST_REBOOT (2), RESTART_MODE_ON_FAILURE (3) and \
                     RESTART_MODE_ALWAYS (4), not {other}"
                ));
            return None;
        }
    };
    match u32::try_from(restart.max_restarts) {
        Ok(0) => Some(RestartPolicy { mode, max_restarts: DEFAULT_MAX_RESTARTS }),
        Ok(max_restarts) => Some(RestartPolicy { mode, max_restarts }),
        Err(_) => {
            report.reject(
                "config.restart_policy.max_restarts",
                format!(
                    "must be 0 (the default, {DEFAULT_MAX_RESTARTS}) or more, not {}",
                    restart.max_restarts
                ),
            );
            None
        }
    }
}

fn check_metadata(report: &mut CheckReport, config: &VmConfig) {
    let size: usize = config.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_METADATA {
        report.reject("config.metadata", format!("must be at most {MAX_METADATA} bytes in all, not {size}"));
    }
    if config.metadata.contains_key("") {
        report.reject("config.metadata", "must not have an empty key");
    }
}

fn parse_path(report: &mut CheckReport, field: &str, text: &str) -> Option<PathBuf> {
    let problem = if text.is_empty() {
        "is required".to_owned()
    } else if text.len() > MAX_PATH {
        format!("must be at most {MAX_PATH} bytes, not {}", text.len())
    } else if text.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
        "must not contain control characters".to_owned()
    } else if !text.starts_with('/') {
        format!("must be an absolute path on the host, not \"{text}\"")
    } else {
        return Some(PathBuf::from(text));
    };
    report.reject(field, problem);
    None
}

fn check_device_id(report: &mut CheckReport, field: &str, id: &str) {
    if !id.is_empty() && !is_name(id) {
        report.reject(
            format!("{field}.id"),
            "must be 1 to 63 characters, begin with a letter or digit, and go on with letters, digits, '.', '_' or '-'",
        );
    }
}

fn check_count(report: &mut CheckReport, field: &str, count: usize) {
    if count > MAX_DEVICES {
        report.reject(field, format!("must have at most {MAX_DEVICES} entries, not {count}"));
    }
}

fn check_unique<'a>(report: &mut CheckReport, list: &str, name: &str, values: impl Iterator<Item = &'a str>) {
    let mut seen = HashMap::new();
    for (index, value) in values.enumerate() {
        if value.is_empty() {
            continue;
        }
        if let Some(first) = seen.insert(value, index) {
            report.reject(
                format!("{list}[{index}].{name}"),
                format!("\"{value}\" is used by {list}[{first}] too"),
            );
        }
    }
}
