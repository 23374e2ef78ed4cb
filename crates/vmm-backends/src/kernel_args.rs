//! Findings about a guest's kernel command line that several backends share.

use vmm_core::report::Report;
use vmm_core::spec::{MAX_KERNEL_ARGS, RestartMode, VmSpec};

/// Rejects `spec` where its command line in force, `in_force` bytes long, is longer than Linux keeps.
///
/// The bytes in force are those of [`VmSpec::kernel_args`] and those that the backend or its hypervisor adds. Firecracker
/// refuses a line that is too long at its start. The other hypervisors hand on any length, and Linux cuts the end off, which is
/// where `root=` was added.
pub(crate) fn check_length(report: &mut Report, spec: &VmSpec, in_force: usize) {
    let given = spec.boot.args.len();
    // A line that is too long as it was given is refused by the parser.
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

/// Warns where `spec` has its VM started again after a failure, its guest would stop for good in a panic, and `machine` has no
/// device by which a guest tells of its panic.
pub(crate) fn check_panic(report: &mut Report, spec: &VmSpec, machine: &str) {
    let acts_on_failure = matches!(spec.restart.mode, Some(RestartMode::OnFailure | RestartMode::Always));
    if acts_on_failure && !spec.resets_on_panic() {
        report.advise(
            "config.boot.kernel_args",
            format!(
                "{machine} is not told that its guest panics, so restart_policy does not act on a panic: add panic=1 to have Linux reset itself"
            ),
        );
    }
}
