//! Returns the violations and warnings about a [`VmSpec`] on Cloud Hypervisor. Reads nothing but
//! the specification.

use vmm_core::report::CheckReport;
use vmm_core::spec::{
    Boot, Console, Cpu, Disk, DiskCache, Memory, Nic, PageSize, RestartPolicy, Topology, VmSpec,
};

use crate::kernel_args::{PanicReport, check_length, check_panic};
use crate::rest::options::check_keys;

/// The most vCPUs. Cloud Hypervisor's own limit is higher, but KVM without a changed interrupt
/// controller stops here.
pub(super) const MAX_VCPUS: u32 = 254;
/// The most disks and network interfaces together: the slots of its one PCI bus, less those of its
/// own devices.
pub(super) const MAX_DEVICES: usize = 28;
/// The unit of memory hot-plug, in bytes.
const HOTPLUG_UNIT: u64 = 128 << 20;

/// Returns the findings about `spec`.
pub(super) fn check(spec: &VmSpec) -> CheckReport {
    let mut report = CheckReport::default();
    check_keys(&mut report, spec, "ch.");
    // Each struct is taken apart without `..`, so that a new field compiles only after this check
    // covers or ignores it.
    let VmSpec { cpu, memory, boot, disks, nics, console, restart, options: _ } = spec;
    check_cpu(&mut report, cpu);
    check_memory(&mut report, memory);
    let Boot { kernel: _, initrd: _, args: _ } = boot;
    check_length(&mut report, spec, spec.kernel_args().len());
    check_panic(&mut report, spec, PanicReport::Device);
    let devices = disks.len() + nics.len();
    if devices > MAX_DEVICES {
        let list = if disks.len() >= nics.len() { "config.storage" } else { "config.network" };
        let message = format!(
            "cloudhypervisor has room for {MAX_DEVICES} disks and network interfaces together, not {devices}"
        );
        report.reject(list, message);
    }
    disks.iter().for_each(|disk| check_disk(&mut report, disk));
    for nic in nics {
        let Nic { id: _, mac: _, tap: _, limits: _ } = nic;
    }
    match console {
        Console::Off | Console::Kept | Console::File(_) => {}
    }
    let RestartPolicy { mode: _, max_restarts: _ } = restart;
    report
}

fn check_cpu(report: &mut CheckReport, cpu: &Cpu) {
    let Cpu { count, max, topology } = *cpu;
    if max > MAX_VCPUS {
        let field = if count > MAX_VCPUS { "config.cpu.vcpu_count" } else { "config.cpu.max_vcpu_count" };
        report
            .reject(field, format!("must be at most {MAX_VCPUS} on the cloudhypervisor backend, not {max}"));
    }
    if let Some(Topology { sockets: _, cores: _, threads }) = topology
        && threads > 2
    {
        report.reject(
            "config.cpu.topology.threads_per_core",
            format!("must be 1 or 2 on the cloudhypervisor backend, not {threads}"),
        );
    }
}

fn check_memory(report: &mut CheckReport, memory: &Memory) {
    let Memory { size_bytes, hotplug_max_bytes, pages, shared: _ } = *memory;
    if let Some(ceiling) = hotplug_max_bytes
        && !ceiling.saturating_sub(size_bytes).is_multiple_of(HOTPLUG_UNIT)
    {
        report.reject(
            "config.memory.max_size_bytes",
            "must be size_bytes and a whole number of 128 MiB (134217728 bytes) on the cloudhypervisor backend",
        );
    }
    if pages == PageSize::Huge && memory.size_mib() % 2 == 1 {
        report.reject("config.memory.size_bytes", "must be a whole number of 2 MiB where hugepages is true");
    }
}

fn check_disk(report: &mut CheckReport, disk: &Disk) {
    let Disk {
        index: _,
        id: _,
        path: _,
        read_only: _,
        is_root: _,
        format: _,
        backing_files: _,
        cache,
        direct_io: _,
        limits: _,
    } = disk;
    if *cache == DiskCache::Unsafe {
        report.ignore(
            format!("{}.options[\"cache\"]", disk.field()),
            "has no effect: Cloud Hypervisor always obeys the guest's flushes",
        );
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::config::{BootConfig, CpuConfig, CpuTopology, MemoryConfig, StorageDevice, VmConfig};

    use super::*;

    fn findings(change: impl FnOnce(&mut VmConfig)) -> (Vec<String>, Vec<String>) {
        let mut config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 128 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/k".to_owned(), ..BootConfig::default() }),
            ..VmConfig::default()
        };
        change(&mut config);
        let report = check(&VmSpec::parse(&config).unwrap());
        let violations = report.violations.into_iter().map(|found| found.field).collect();
        (violations, report.warnings.into_iter().map(|warning| warning.field).collect())
    }

    fn option(key: &str, value: &str) -> vmm_core::config::Options {
        [(key.to_owned(), value.to_owned())].into()
    }

    fn disk(key: &str, value: &str) -> StorageDevice {
        StorageDevice {
            id: "a".to_owned(),
            path: "/d".to_owned(),
            options: option(key, value),
            ..StorageDevice::default()
        }
    }

    #[test]
    fn unsupported_values_are_refused() {
        let (violations, warnings) = findings(|config| {
            config.cpu = Some(CpuConfig {
                vcpu_count: 4,
                topology: Some(CpuTopology { sockets: 1, cores_per_socket: 1, threads_per_core: 4 }),
                features: option("ch.x", "y"),
                ..CpuConfig::default()
            });
            let memory = config.memory.as_mut().unwrap();
            memory.hotplug_enabled = true;
            memory.max_size_bytes = 129 << 20;
        });
        assert_eq!(
            violations,
            [
                "config.cpu.features[\"ch.x\"]",
                "config.cpu.topology.threads_per_core",
                "config.memory.max_size_bytes"
            ]
        );
        assert_eq!(warnings, [""; 0]);
        let (violations, _) = findings(|config| config.cpu.as_mut().unwrap().vcpu_count = 255);
        assert_eq!(violations, ["config.cpu.vcpu_count"]);
    }

    #[test]
    fn the_length_limit_includes_the_added_kernel_arguments() {
        let refused = |length: usize| {
            let (violations, _) = findings(|config| {
                config.boot.as_mut().unwrap().kernel_args = "x".repeat(length);
                config.storage.push(StorageDevice { is_root_device: true, ..disk("format", "raw") });
            });
            violations
        };
        let longest = 2047 - " root=/dev/vda rw".len();
        assert_eq!(refused(longest), [""; 0]);
        assert_eq!(refused(longest + 1), ["config.boot.kernel_args"]);
    }

    #[test]
    fn supported_values_have_no_findings() {
        let (violations, warnings) = findings(|config| {
            config.storage.push(disk("format", "qcow2"));
            config.storage.push(StorageDevice { id: "b".to_owned(), ..disk("direct_io", "true") });
            let memory = config.memory.as_mut().unwrap();
            memory.hotplug_enabled = true;
            memory.max_size_bytes = 256 << 20;
        });
        assert_eq!((violations, warnings), (vec![], vec![]));
        let (_, warnings) = findings(|config| config.storage.push(disk("cache", "unsafe")));
        assert_eq!(warnings, ["config.storage[0].options[\"cache\"]"]);
    }
}
