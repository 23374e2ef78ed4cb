//! What QEMU rejects and ignores of a [`VmSpec`]. Pure.

use vmm_core::config::Options;
use vmm_core::report::Report;
use vmm_core::spec::{OptionScope, VmSpec, kernel_words, scope_of};

use super::convert::{Accelerator, MACHINE_KEY, MODEL_KEY, Machine};

/// The most vCPUs. QEMU's machines say 288, but more than 255 need an interrupt controller in KVM with x2APIC.
pub(crate) const MAX_VCPUS: u32 = 255;
/// The most disks, and the most network interfaces, on q35.
pub(crate) const MAX_Q35_DEVICES: usize = 64;
/// The most disks and network interfaces together on microvm: its 24 virtio-mmio transports, one of
/// which does not work.
pub(super) const MAX_MICROVM_DEVICES: usize = 23;

/// Finds what QEMU rejects and ignores of `spec` on `accelerator`.
pub(crate) fn check(spec: &VmSpec, accelerator: Accelerator) -> Report {
    let mut report = Report::default();
    check_keys(&mut report, spec);
    check_cpu(&mut report, spec, accelerator);
    match Machine::of(spec) {
        Some(Machine::Q35) => check_q35(&mut report, spec),
        Some(Machine::Microvm) => check_microvm(&mut report, spec, accelerator),
        None => report.reject(
            format!("config.boot.boot_options[\"{MACHINE_KEY}\"]"),
            "must be \"q35\" (the default) or \"microvm\"",
        ),
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        for key in nic.options.keys().filter(|key| key.starts_with("rate_limit.")) {
            report.warn(
                format!("config.network[{index}].options[\"{key}\"]"),
                "is not applied: QEMU cannot limit a network interface; limit its TAP on the host (tc)",
            );
        }
    }
    report
}

fn check_keys(report: &mut Report, spec: &VmSpec) {
    check_map(report, "config.cpu.features", &spec.cpu.features, &[MODEL_KEY]);
    check_map(report, "config.memory.backing", &spec.memory.backing, &[]);
    check_map(report, "config.boot.boot_options", &spec.boot.options, &[MACHINE_KEY]);
    for disk in &spec.disks {
        check_map(report, &format!("{}.options", disk.field()), &disk.options, &[]);
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        check_map(report, &format!("config.network[{index}].options"), &nic.options, &[]);
    }
}

fn check_map(report: &mut Report, field: &str, options: &Options, known: &[&str]) {
    for key in options.keys() {
        match scope_of(key) {
            OptionScope::Plain => {}
            OptionScope::Backend("qemu.", _) if known.contains(&key.as_str()) => {}
            OptionScope::Backend("qemu.", _) => {
                let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
                report.reject(
                    format!("{field}[\"{key}\"]"),
                    format!("unknown key of the qemu backend; known keys here: {known}"),
                );
            }
            OptionScope::Backend(..) => {
                report.warn(format!("{field}[\"{key}\"]"), "is not used: it concerns another backend");
            }
        }
    }
}

fn check_cpu(report: &mut Report, spec: &VmSpec, accelerator: Accelerator) {
    if spec.cpu.count > MAX_VCPUS {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be at most {MAX_VCPUS} on the qemu backend, not {}", spec.cpu.count),
        );
    } else if spec.cpu.max > MAX_VCPUS {
        report.reject(
            "config.cpu.max_vcpu_count",
            format!("must be at most {MAX_VCPUS} on the qemu backend, not {}", spec.cpu.max),
        );
    }
    let Some(model) = spec.cpu.features.get(MODEL_KEY) else { return };
    let field = format!("config.cpu.features[\"{MODEL_KEY}\"]");
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+,=".contains(&byte);
    let name = model.split(',').next().unwrap_or_default();
    if name.is_empty() || name == "help" || model.starts_with('-') || !model.bytes().all(legal) {
        report.reject(
            field,
            "must be a CPU model of QEMU, with features after commas where needed, such as \"Skylake-Server\" or \"max,-avx512f\"",
        );
    } else if name == "host" && accelerator == Accelerator::Tcg {
        report.reject(
            field,
            "\"host\" needs KVM, and this host emulates (UNKEY_VMCP_QEMU_KVM): name another model, or none",
        );
    }
}

fn check_q35(report: &mut Report, spec: &VmSpec) {
    for (list, count) in [("config.storage", spec.disks.len()), ("config.network", spec.nics.len())] {
        if count > MAX_Q35_DEVICES {
            report.reject(list, format!("must have at most {MAX_Q35_DEVICES} entries on q35, not {count}"));
        }
    }
}

fn check_microvm(report: &mut Report, spec: &VmSpec, accelerator: Accelerator) {
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
        report.warn("config.cpu.max_vcpu_count", "has no effect: microvm has no CPU hot-plug");
    }
    if spec.memory.hotplug_max_bytes.is_some() {
        report.warn("config.memory.hotplug_enabled", "has no effect: microvm has no memory hot-plug");
    }
    let has_frequency = kernel_words(&spec.boot.args).any(|word| word.starts_with("tsc_early_khz="));
    if accelerator == Accelerator::Tcg && !has_frequency {
        report.warn(
            format!("config.boot.boot_options[\"{MACHINE_KEY}\"]"),
            "an emulated microvm has no clock to measure its CPU by, and Linux may hang while it boots: add tsc_early_khz=<the host's kHz> to kernel_args, or use q35",
        );
    }
}
