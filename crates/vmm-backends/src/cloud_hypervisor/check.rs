//! What Cloud Hypervisor rejects and ignores of a [`VmSpec`]. Pure.

use vmm_core::report::Report;
use vmm_core::spec::{VmSpec, option_is_true};

use crate::rest::options::check_keys;

/// The most vCPUs. Cloud Hypervisor's own limit is higher, but KVM without a changed interrupt controller stops here.
pub const MAX_VCPUS: u32 = 254;
/// The most disks and network interfaces together: the slots of its one PCI bus, less those of its own devices.
pub const MAX_DEVICES: usize = 28;
/// What memory hot-plug counts in, in bytes.
const HOTPLUG_UNIT: u64 = 128 << 20;

/// Finds what Cloud Hypervisor rejects and ignores of `spec`.
pub fn check(spec: &VmSpec) -> Report {
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
        report.reject(field, format!("must be at most {MAX_VCPUS} on the cloudhypervisor backend, not {most}"));
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
