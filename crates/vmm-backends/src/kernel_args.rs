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

/// Warns if all of the following hold: `spec` restarts the VM after a failure, a panic would stop
/// the guest for good, and `machine` has no device by which the guest reports a panic.
pub(crate) fn check_panic(report: &mut CheckReport, spec: &VmSpec, machine: &str) {
    let acts_on_failure = matches!(spec.restart.mode, Some(RestartMode::OnFailure | RestartMode::Always));
    if acts_on_failure && !spec.resets_on_panic() {
        report.advise(
            "config.boot.kernel_args",
            format!(
                "{machine} does not see that its guest panics, so restart_policy does not act on a panic: add panic=1 to have Linux reset itself"
            ),
        );
    }
}
