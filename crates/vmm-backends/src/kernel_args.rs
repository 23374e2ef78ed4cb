//! Findings about a guest's kernel command line that several backends share.

use vmm_core::report::CheckReport;
use vmm_core::spec::{MAX_KERNEL_ARGS, RestartMode, VmSpec};

/// Rejects `spec` if the whole command line, `in_force` bytes long, is longer than Linux keeps.
///
/// The whole line is [`VmSpec::kernel_args`] with the additions of the backend or its hypervisor.
/// Firecracker refuses a line that is too long when the VM starts. The other hypervisors pass on
/// any length and Linux cuts off the end, which is the place of `root=`.
pub(crate) fn check_length(report: &mut CheckReport, spec: &VmSpec, in_force: usize) {
    let given = spec.boot.args.len();
    // The parser has already refused a line that is too long without the additions.
    if in_force > MAX_KERNEL_ARGS && given <= MAX_KERNEL_ARGS {
        let added = in_force - given;
        report.reject(
            "config.boot.kernel_args",
            format!(
                "must be at most {} bytes, not {given}: {added} bytes are added here, and Linux keeps {MAX_KERNEL_ARGS} in all",
                MAX_KERNEL_ARGS.saturating_sub(added)
            ),
        );
    }
}

/// The way by which a machine hears of a panic of its guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanicReport {
    /// The machine has a panic device, which a guest drives by its module `pvpanic`.
    Device,
    /// The machine has no panic device. The text is the name of the machine.
    None(&'static str),
}

/// Warns if `spec` restarts the VM after a failure, and a panic may stop the guest for good without
/// a report of it.
pub(crate) fn check_panic(report: &mut CheckReport, spec: &VmSpec, machine: PanicReport) {
    let acts_on_failure = matches!(spec.restart.mode, Some(RestartMode::OnFailure | RestartMode::Always));
    if !acts_on_failure || spec.resets_on_panic() {
        return;
    }
    let message = match machine {
        PanicReport::None(machine) => format!(
            "{machine} does not see that its guest panics, so restart_policy does not act on a panic: add panic=1 to have Linux reset itself"
        ),
        // The kernel's file does not tell if and when the guest loads the driver.
        PanicReport::Device => "a panic is seen only once the guest has loaded its pvpanic driver, so restart_policy does not act on an \
             earlier one, such as that of a guest without its root file system: add panic=1 to have Linux reset itself"
            .to_owned(),
    };
    report.advise("config.boot.kernel_args", message);
}

#[cfg(test)]
mod tests {
    use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, RestartPolicyConfig, VmConfig};

    use super::*;

    #[test]
    fn a_policy_that_acts_on_failures_needs_a_guest_that_resets_itself() {
        let warnings = |mode, args: &str, machine| {
            let config = VmConfig {
                cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
                memory: Some(MemoryConfig { size_bytes: 1 << 30, ..MemoryConfig::default() }),
                boot: Some(BootConfig {
                    kernel_path: "/k".to_owned(),
                    kernel_args: args.to_owned(),
                    ..BootConfig::default()
                }),
                restart_policy: Some(RestartPolicyConfig { mode, max_restarts: 0 }),
                ..VmConfig::default()
            };
            let mut report = CheckReport::default();
            check_panic(&mut report, &VmSpec::parse(&config).unwrap(), machine);
            assert!(report.is_ok());
            report.warnings.into_iter().map(|warning| warning.message).collect::<Vec<_>>()
        };
        let (never, guest_reboot, on_failure, always) = (1, 2, 3, 4);
        let machines = [PanicReport::Device, PanicReport::None("That machine")];
        for machine in machines {
            for mode in [on_failure, always] {
                let reported = warnings(mode, "console=ttyS0 panic=0", machine);
                assert!(
                    matches!(&reported[..], [one] if one.contains("add panic=1")),
                    "{machine:?}: {reported:?}"
                );
                assert_eq!(warnings(mode, "panic=1", machine), [""; 0], "{machine:?}");
            }
            for mode in [0, never, guest_reboot] {
                assert_eq!(warnings(mode, "", machine), [""; 0], "{machine:?}");
            }
        }
        let [seen, unseen] = machines.map(|machine| warnings(always, "", machine).concat());
        assert!(seen.contains("pvpanic") && unseen.contains("That machine does not see"), "{seen} {unseen}");
    }
}
