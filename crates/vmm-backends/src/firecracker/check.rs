//! What Firecracker rejects, ignores and changes of a [`VmSpec`]. Pure.

use vmm_core::report::Report;
use vmm_core::spec::{DiskFormat, VmSpec, option_is_true};

use super::convert::{needs_reboot_argument, wants_smt};
use crate::rest::options::check_keys;

/// The most vCPUs.
pub const MAX_VCPUS: u32 = 32;
/// The most disks and network interfaces together: the interrupt lines of its machine, less those of its own devices.
pub const MAX_DEVICES: usize = 16;

/// Finds what Firecracker rejects, ignores and changes of `spec`.
pub fn check(spec: &VmSpec) -> Report {
    let mut report = Report::default();
    check_keys(&mut report, spec, "fc.");
    check_cpu(&mut report, spec);
    check_memory(&mut report, spec);
    check_disks(&mut report, spec);
    let devices = spec.disks.len() + spec.nics.len();
    if devices > MAX_DEVICES {
        let list = if spec.disks.len() >= spec.nics.len() { "config.storage" } else { "config.network" };
        let message = format!(
            "firecracker has room for {MAX_DEVICES} disks and network interfaces together, not {devices}"
        );
        report.reject(list, message);
    }
    if needs_reboot_argument(spec) {
        report.warn(
            "config.boot.kernel_args",
            "reboot=k is added: without it Firecracker does not see that the guest reboots",
        );
    }
    if spec.restart.mode.is_none() {
        report.warn(
            "config.restart_policy.mode",
            "is RESTART_MODE_NEVER on firecracker, where a reset is how a guest ends: set RESTART_MODE_GUEST_REBOOT to have the guest start again",
        );
    }
    report
}

fn check_cpu(report: &mut Report, spec: &VmSpec) {
    let count = spec.cpu.count;
    if count > MAX_VCPUS {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be at most {MAX_VCPUS} on the firecracker backend, not {count}"),
        );
    }
    if spec.cpu.max > count {
        report.warn("config.cpu.max_vcpu_count", "has no effect: Firecracker has no CPU hot-plug");
    }
    let Some(topology) = spec.cpu.topology else { return };
    if topology.sockets != 1 {
        report.reject(
            "config.cpu.topology.sockets",
            format!("must be 1 on the firecracker backend, not {}", topology.sockets),
        );
    }
    if !matches!(topology.threads, 1 | 2) {
        report.reject(
            "config.cpu.topology.threads_per_core",
            format!("must be 1 or 2 on the firecracker backend, not {}", topology.threads),
        );
    }
    if wants_smt(spec) && count != 1 && count % 2 == 1 {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be 1 or even where two threads share a core, not {count}"),
        );
    }
}

fn check_memory(report: &mut Report, spec: &VmSpec) {
    if spec.memory.hotplug_max_bytes.is_some() {
        report.warn(
            "config.memory.hotplug_enabled",
            "has no effect: memory cannot grow on the firecracker backend",
        );
    }
    if option_is_true(&spec.memory.backing, "shared").unwrap_or(false) {
        report.reject(
            "config.memory.backing[\"shared\"]",
            "Firecracker has no shared memory: leave it out, or use another backend",
        );
    }
    let huge = option_is_true(&spec.memory.backing, "hugepages").unwrap_or(false);
    if huge && spec.memory.size_mib() % 2 == 1 {
        report.reject("config.memory.size_bytes", "must be a whole number of 2 MiB where hugepages is true");
    }
}

fn check_disks(report: &mut Report, spec: &VmSpec) {
    for disk in &spec.disks {
        let options = format!("{}.options", disk.field());
        if disk.format == DiskFormat::Qcow2 {
            report.reject(
                format!("{options}[\"format\"]"),
                "Firecracker reads raw images only: convert the image (qemu-img convert -O raw), or use another backend",
            );
        }
        if option_is_true(&disk.options, "direct_io").unwrap_or(false) {
            report.reject(
                format!("{options}[\"direct_io\"]"),
                "Firecracker cannot pass by the host's page cache: leave it out, or use another backend",
            );
        }
    }
}
