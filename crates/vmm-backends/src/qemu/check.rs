//! Returns the violations and warnings about a [`VmSpec`] on QEMU. Reads nothing but the
//! specification.

use vmm_core::report::CheckReport;
use vmm_core::spec::{Boot, Console, Cpu, Disk, Memory, Nic, RestartPolicy, VmSpec, kernel_words};

use super::convert::{Accelerator, QemuMachine};
use super::options::{MACHINE_KEY, VmOptions};
use crate::kernel_args::{PanicReport, check_length, check_panic};

/// The most vCPUs. QEMU's machines accept 288, but more than 255 need an interrupt controller in
/// KVM with x2APIC.
pub(crate) const MAX_VCPUS: u32 = 255;
/// The most disks, and the most network interfaces, on q35.
pub(crate) const MAX_Q35_DEVICES: usize = 64;
/// The most disks and network interfaces together on microvm: its 24 virtio-mmio transports, one of
/// which does not work.
pub(super) const MAX_MICROVM_DEVICES: usize = 23;

/// Returns the findings about `spec` on `accelerator`.
pub(crate) fn check(spec: &VmSpec, accelerator: Accelerator) -> CheckReport {
    let mut report = CheckReport::default();
    match check_common(&mut report, spec, accelerator).machine {
        Some(QemuMachine::Q35) => check_q35(&mut report, spec),
        Some(QemuMachine::Microvm) => check_microvm(&mut report, spec, accelerator),
        // The report already contains the violation.
        None => {}
    }
    report
}

/// Adds the findings that do not depend on the machine, and returns QEMU's own settings.
pub(crate) fn check_common<'a>(
    report: &mut CheckReport,
    spec: &'a VmSpec,
    accelerator: Accelerator,
) -> VmOptions<'a> {
    let VmSpec { cpu, memory, boot, disks, nics, console, restart, options: _ } = spec;
    let options = VmOptions::read(spec, report);
    check_cpu(report, cpu, &options, accelerator);
    // QEMU serves all of these fields. microvm serves fewer, which `check_microvm` reports.
    let Memory { size_bytes: _, hotplug_max_bytes: _, pages: _, shared: _ } = memory;
    let Boot { kernel: _, initrd: _, args: _ } = boot;
    check_length(report, spec, spec.kernel_args().len());
    for disk in disks {
        let Disk {
            index: _,
            id: _,
            path: _,
            read_only: _,
            is_root: _,
            format: _,
            backing_files: _,
            cache: _,
            direct_io: _,
            limits: _,
        } = disk;
    }
    for (index, nic) in nics.iter().enumerate() {
        check_nic(report, index, nic);
    }
    match console {
        Console::Off | Console::Kept | Console::File(_) => {}
    }
    let RestartPolicy { mode: _, max_restarts: _ } = restart;
    options
}

fn check_cpu(report: &mut CheckReport, cpu: &Cpu, options: &VmOptions<'_>, accelerator: Accelerator) {
    let Cpu { count, max, topology: _ } = *cpu;
    let too_many = |cpus| format!("must be at most {MAX_VCPUS} on the qemu backend, not {cpus}");
    if count > MAX_VCPUS {
        report.reject("config.cpu.vcpu_count", too_many(count));
    } else if max > MAX_VCPUS {
        report.reject("config.cpu.max_vcpu_count", too_many(max));
    }
    if let Some(model) = options.model
        && model.name() == "host"
        && accelerator == Accelerator::Tcg
    {
        report.reject(
            model.field(),
            "\"host\" needs KVM, and this host emulates (UNKEY_VMCP_QEMU_KVM): name another model, or none",
        );
    }
}

fn check_nic(report: &mut CheckReport, index: usize, nic: &Nic) {
    let Nic { id: _, mac: _, tap: _, limits } = nic;
    let keys = [
        ("rate_limit.bytes_per_second", limits.bytes_per_second),
        ("rate_limit.packets_per_second", limits.operations_per_second),
    ];
    for (key, _) in keys.into_iter().filter(|(_, ceiling)| ceiling.is_some()) {
        report.ignore(
            format!("config.network[{index}].options[\"{key}\"]"),
            "is not applied: QEMU cannot limit a network interface; limit its TAP on the host (tc)",
        );
    }
}

pub(crate) fn check_q35(report: &mut CheckReport, spec: &VmSpec) {
    for (list, count) in [("config.storage", spec.disks.len()), ("config.network", spec.nics.len())] {
        if count > MAX_Q35_DEVICES {
            report.reject(list, format!("must have at most {MAX_Q35_DEVICES} entries on q35, not {count}"));
        }
    }
    check_panic(report, spec, PanicReport::Device);
}

fn check_microvm(report: &mut CheckReport, spec: &VmSpec, accelerator: Accelerator) {
    let devices = spec.disks.len() + spec.nics.len();
    if devices > MAX_MICROVM_DEVICES {
        report.reject(
            if spec.disks.len() >= spec.nics.len() { "config.storage" } else { "config.network" },
            format!(
                "microvm has room for {MAX_MICROVM_DEVICES} disks and network interfaces together, not {devices}; set boot_options[\"{MACHINE_KEY}\"] to \"q35\""
            ),
        );
    }
    if spec.cpu.max > spec.cpu.count {
        report.ignore("config.cpu.max_vcpu_count", "has no effect: microvm has no CPU hot-plug");
    }
    if spec.memory.hotplug_max_bytes.is_some() {
        report.ignore("config.memory.hotplug_enabled", "has no effect: microvm has no memory hot-plug");
    }
    check_panic(report, spec, PanicReport::None("QEMU's microvm"));
    let has_frequency = kernel_words(&spec.boot.args).any(|word| word.starts_with("tsc_early_khz="));
    if accelerator == Accelerator::Tcg && !has_frequency {
        report.advise(
            format!("config.boot.boot_options[\"{MACHINE_KEY}\"]"),
            "an emulated microvm has no clock to measure its CPU by, and Linux may hang while it boots: add tsc_early_khz=<the host's kHz> to kernel_args, or use q35",
        );
    }
}
