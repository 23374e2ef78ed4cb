//! Returns the violations and warnings about a [`VmSpec`] on QEMU through libvirt: those of QEMU,
//! and the settings that libvirt cannot express. Reads nothing but the specification.

use vmm_core::report::CheckReport;
use vmm_core::spec::{DiskCache, VmSpec};

use super::cpu::CpuModel;
use super::xml::can_carry;
use crate::qemu::check as qemu;
use crate::qemu::convert::{Accelerator, QemuMachine};
use crate::qemu::options::MACHINE_KEY;

/// Returns the findings about `spec` on `accelerator`.
pub(super) fn check(spec: &VmSpec, accelerator: Accelerator) -> CheckReport {
    let mut report = CheckReport::default();
    let options = qemu::check_common(&mut report, spec, accelerator);
    match options.machine {
        Some(QemuMachine::Q35) => qemu::check_q35(&mut report, spec),
        Some(QemuMachine::Microvm) => report.reject(
            format!("config.boot.boot_options[\"{MACHINE_KEY}\"]"),
            "libvirt has no microvm: use \"q35\", or unset UNKEY_VMCP_QEMU_ENDPOINT to have QEMU started without libvirt",
        ),
        // The report already contains the violation.
        None => {}
    }
    if let Some(model) = options.model
        && let Err(part) = CpuModel::parse(model.text)
    {
        report.reject(
            model.field(),
            format!("libvirt has no word for \"{part}\": name a model, and features as +name, -name, name=on or name=off"),
        );
    }
    // `check_common` covers the other fields, which QEMU serves here, too.
    let VmSpec { cpu: _, memory: _, boot, disks, nics: _, console: _, restart: _, options: _ } = spec;
    if !can_carry(&boot.args) {
        report.reject("config.boot.kernel_args", "has a control character, which libvirt's XML cannot carry");
    }
    for disk in disks.iter().filter(|disk| disk.direct_io && disk.cache == DiskCache::Unsafe) {
        report.ignore(
            format!("{}.options[\"direct_io\"]", disk.field()),
            "has no effect: libvirt's unsafe cache uses the host's page cache",
        );
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, StorageDevice, VmConfig};

    fn checked(change: impl FnOnce(&mut VmConfig)) -> CheckReport {
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
    fn supported_qemu_values_pass_the_libvirt_check() {
        let report = checked(|_| {});
        assert_eq!((report.violations, report.warnings), (Vec::new(), Vec::new()));
    }

    #[test]
    fn the_length_limit_includes_the_added_kernel_arguments() {
        let refused = |length: usize| {
            let report = checked(|config| {
                config.boot.get_or_insert_default().kernel_args = "x".repeat(length);
                config.storage = vec![StorageDevice {
                    path: "/disk".to_owned(),
                    is_root_device: true,
                    ..StorageDevice::default()
                }];
            });
            report.violations.into_iter().map(|violation| violation.field).collect::<Vec<_>>()
        };
        let longest = 2047 - " root=/dev/vda rw".len();
        assert_eq!(refused(longest), [""; 0]);
        assert_eq!(refused(longest + 1), ["config.boot.kernel_args"]);
    }

    #[test]
    fn a_microvm_on_libvirt_has_one_violation_and_no_warnings() {
        let report = checked(|config| {
            config.cpu.get_or_insert_default().max_vcpu_count = 4;
            let boot = config.boot.get_or_insert_default();
            boot.boot_options.insert("qemu.machine".to_owned(), "microvm".to_owned());
        });
        assert_eq!((report.violations.len(), report.warnings), (1, Vec::new()));
    }

    #[test]
    fn values_that_libvirt_lacks_are_violations() {
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
