//! Checks that the host can run guests on its own CPUs.

use std::path::Path;

use crate::device::{self, DeviceFault, DeviceKind};

/// Opens `/dev/kvm` for reading and writing, and closes it again.
///
/// # Errors
///
/// Returns the fault and its remedy.
pub fn kvm_usable() -> Result<(), DeviceFault> {
    usable(Path::new("/dev/kvm"))
}

fn usable(device: &Path) -> Result<(), DeviceFault> {
    let kind = DeviceKind {
        driver: "load kvm_intel or kvm_amd, or enable virtualisation in the firmware",
        group: Some("kvm"),
        otherwise: "see the kernel log for messages of KVM",
    };
    device::usable(device, kind)
}

/// Returns true if the CPUs have hardware virtualisation (`vmx` or `svm`).
///
/// A `/dev/kvm` without it is a KVM in software, which runs an unmodified kernel far too slowly.
pub fn hardware_virtualisation() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|cpuinfo| shows_virtualisation(&cpuinfo))
}

fn shows_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_ascii_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualisation_is_read_from_whole_cpu_flags() {
        assert!(shows_virtualisation("processor\t: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(shows_virtualisation("flags\t\t: svm\n"));
        assert!(!shows_virtualisation("flags\t\t: fpu svm_lock\nvmx flags\t: vnmi vmx\n"));
        assert!(!shows_virtualisation(""));
    }

    #[test]
    fn a_missing_kvm_device_is_explained() {
        let missing = usable(Path::new("/nowhere/kvm")).unwrap_err();
        assert_eq!(missing.finding, "/nowhere/kvm does not exist");
        assert!(missing.to_string().contains("exist; load kvm_intel"), "{missing}");
        assert_eq!(usable(Path::new("/dev/null")), Ok(()));
    }
}
