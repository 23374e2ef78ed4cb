//! What Cloud Hypervisor rejects and ignores of a [`VmSpec`]. Pure.

use vmm_core::report::Report;
use vmm_core::spec::{VmSpec, option_is_true};

use crate::rest::options::check_keys;

/// The most vCPUs. Cloud Hypervisor's own limit is higher, but KVM without a changed interrupt controller stops here.
pub(super) const MAX_VCPUS: u32 = 254;
/// The most disks and network interfaces together: the slots of its one PCI bus, less those of its own devices.
pub(super) const MAX_DEVICES: usize = 28;
/// What memory hot-plug counts in, in bytes.
const HOTPLUG_UNIT: u64 = 128 << 20;

/// Finds what Cloud Hypervisor rejects and ignores of `spec`.
pub(super) fn check(spec: &VmSpec) -> Report {
    let mut report = Report::default();
    check_keys(&mut report, spec, "ch.");
    check_cpu(&mut report, spec);
    check_memory(&mut report, spec);
    let devices = spec.disks.len() + spec.nics.len();
    if devices > MAX_DEVICES {
        let list = if spec.disks.len() >= spec.nics.len() { "config.storage" } else { "config.network" };
        let message = format!(
            "cloudhypervisor has room for {MAX_DEVICES} disks and network interfaces together, not {devices}"
        );
        report.reject(list, message);
    }
    for disk in &spec.disks {
        if disk.options.get("cache").is_some_and(|cache| cache == "unsafe") {
            report.warn(
                format!("{}.options[\"cache\"]", disk.field()),
                "has no effect: Cloud Hypervisor always obeys the guest's flushes",
            );
        }
    }
    report
}

fn check_cpu(report: &mut Report, spec: &VmSpec) {
    if spec.cpu.max > MAX_VCPUS {
        let field =
            if spec.cpu.count > MAX_VCPUS { "config.cpu.vcpu_count" } else { "config.cpu.max_vcpu_count" };
        let most = spec.cpu.max;
        report
            .reject(field, format!("must be at most {MAX_VCPUS} on the cloudhypervisor backend, not {most}"));
    }
    if let Some(topology) = spec.cpu.topology
        && topology.threads > 2
    {
        report.reject(
            "config.cpu.topology.threads_per_core",
            format!("must be 1 or 2 on the cloudhypervisor backend, not {}", topology.threads),
        );
    }
}

fn check_memory(report: &mut Report, spec: &VmSpec) {
    if let Some(ceiling) = spec.memory.hotplug_max_bytes
        && !ceiling.saturating_sub(spec.memory.size_bytes).is_multiple_of(HOTPLUG_UNIT)
    {
        report.reject(
            "config.memory.max_size_bytes",
            "must be size_bytes and a whole number of 128 MiB (134217728 bytes) on the cloudhypervisor backend",
        );
    }
    let huge = option_is_true(&spec.memory.backing, "hugepages").unwrap_or(false);
    if huge && spec.memory.size_mib() % 2 == 1 {
        report.reject("config.memory.size_bytes", "must be a whole number of 2 MiB where hugepages is true");
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
        let fields =
            |list: Vec<vmm_core::report::FieldReport>| list.into_iter().map(|found| found.field).collect();
        (fields(report.violations), fields(report.warnings))
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
    fn what_cannot_be_served_is_refused() {
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
    fn what_is_served_is_no_finding() {
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
