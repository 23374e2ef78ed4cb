//! What libvirt rejects and ignores of a [`VmSpec`], beyond what QEMU does. Pure.

use vmm_core::report::Report;
use vmm_core::spec::{VmSpec, option_is_true};

use super::cpu::CpuModel;
use super::xml::can_carry;
use crate::qemu::check as qemu;
use crate::qemu::convert::{Accelerator, MACHINE_KEY, MODEL_KEY, Machine};

/// Finds what cannot be served of `spec` on `accelerator`.
pub(super) fn check(spec: &VmSpec, accelerator: Accelerator) -> Report {
    let mut report = qemu::check(spec, accelerator);
    if Machine::of(spec) == Some(Machine::Microvm) {
        // What is said of a microvm's own limits is beside the point.
        report.warnings.retain(|warning| !warning.message.contains("microvm"));
        report.reject(
            format!("config.boot.boot_options[\"{MACHINE_KEY}\"]"),
            "libvirt has no microvm: use \"q35\", or unset UNKEY_VMCP_QEMU_ENDPOINT to have QEMU started without libvirt",
        );
    }
    if let Some(model) = spec.cpu.features.get(MODEL_KEY)
        && let Err(part) = CpuModel::parse(model)
    {
        report.reject(
            format!("config.cpu.features[\"{MODEL_KEY}\"]"),
            format!("libvirt has no word for \"{part}\": name a model, and features as +name, -name, name=on or name=off"),
        );
    }
    let unfit = "has a control character, which libvirt's XML cannot carry";
    if !can_carry(&spec.boot.args) {
        report.reject("config.boot.kernel_args", unfit);
    }
    for disk in &spec.disks {
        let direct = option_is_true(&disk.options, "direct_io").unwrap_or(false);
        if direct && disk.options.get("cache").is_some_and(|cache| cache == "unsafe") {
            report.warn(
                format!("{}.options[\"direct_io\"]", disk.field()),
                "has no effect: libvirt's unsafe cache uses the host's page cache",
            );
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, StorageDevice, VmConfig};

    fn checked(change: impl FnOnce(&mut VmConfig)) -> Report {
        let mut config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 64 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/kernel".to_owned(), ..BootConfig::default() }),
            ..VmConfig::default()
        };
        change(&mut config);
        check(&VmSpec::parse(&config).unwrap(), Accelerator::Tcg)
    }

    #[test]
    fn what_qemu_takes_libvirt_takes() {
        let report = checked(|_| {});
        assert_eq!((report.violations, report.warnings), (Vec::new(), Vec::new()));
    }

    #[test]
    fn what_libvirt_lacks_is_said() {
        let refused = |change: &dyn Fn(&mut VmConfig)| {
            let report = checked(|config| change(config));
            report.violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let microvm = refused(&|config| {
            let boot = config.boot.get_or_insert_default();
            boot.boot_options.insert("qemu.machine".to_owned(), "microvm".to_owned());
        });
        assert!(microvm.contains("libvirt has no microvm"), "{microvm}");
        let model = refused(&|config| {
            let cpu = config.cpu.get_or_insert_default();
            cpu.features.insert("qemu.model".to_owned(), "max,level=5".to_owned());
        });
        assert!(model.contains("\"level=5\""), "{model}");
        let report = checked(|config| {
            let options = [("direct_io", "true"), ("cache", "unsafe")];
            config.storage = vec![StorageDevice {
                path: "/disk".to_owned(),
                options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
                ..StorageDevice::default()
            }];
        });
        assert!(report.warnings.iter().any(|warning| warning.field.contains("direct_io")), "{report:?}");
    }
}
