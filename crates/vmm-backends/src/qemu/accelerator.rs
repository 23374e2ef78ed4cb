//! Chooses the accelerator of a VM, anew at each start.

use std::sync::OnceLock;

use vmm_core::capabilities::AcceleratorFact;
use vmm_core::report::CheckReport;
use vmm_host::kvm::{hardware_virtualisation, kvm_usable};

use super::convert::Accelerator;

/// The choice between KVM and emulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvmMode {
    /// KVM if `/dev/kvm` can be opened and the CPU shows `vmx` or `svm`, because KVM in software is
    /// slower than emulation.
    #[default]
    Auto,
    /// KVM always. The backend cannot serve without it.
    On,
    /// Emulation always.
    Off,
}

/// The accelerator of a VM that starts now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The accelerator.
    pub(crate) accelerator: Accelerator,
    /// The reason why the CPUs are emulated although the configuration does not order that.
    pub(crate) unasked: Option<String>,
}

impl KvmMode {
    /// Chooses the accelerator by the state of the host. Opens `/dev/kvm`, which takes
    /// microseconds.
    pub(crate) fn choose(self) -> Choice {
        match self {
            Self::On => Accelerator::Kvm.into(),
            Self::Off => Accelerator::Tcg.into(),
            Self::Auto => {
                let device = || kvm_usable().map_err(|problem| problem.to_string());
                automatic(has_virtualisation(), device)
            }
        }
    }

    /// # Errors
    /// Returns the reason why KVM, which the configuration orders, cannot be used.
    pub(crate) fn as_ordered(self) -> Result<(), String> {
        match self {
            Self::On => kvm_usable().map_err(|problem| format!("UNKEY_VMCP_QEMU_KVM is true, but {problem}")),
            Self::Auto | Self::Off => Ok(()),
        }
    }
}

/// Chooses KVM if the CPUs virtualise and `device` succeeds, and emulation with the reason
/// otherwise.
fn automatic(virtualises: bool, device: impl FnOnce() -> Result<(), String>) -> Choice {
    let missing = if virtualises {
        device().err()
    } else {
        // /dev/kvm may open although KVM is emulated in software, and then QEMU's own emulation is
        // faster.
        Some(
            "the CPUs show neither vmx nor svm; enable virtualisation in the firmware, or nested virtualisation where \
             this is a VM"
                .to_owned(),
        )
    };
    match missing {
        None => Accelerator::Kvm.into(),
        Some(why) => Choice { accelerator: Accelerator::Tcg, unasked: Some(why) },
    }
}

/// Returns true if the CPUs have hardware virtualisation. The flags of a CPU do not change while
/// the host runs, and on a large host they take milliseconds to read, so they are read once.
fn has_virtualisation() -> bool {
    static FLAGS: OnceLock<bool> = OnceLock::new();
    *FLAGS.get_or_init(hardware_virtualisation)
}

impl Choice {
    /// Adds a warning if the CPUs are emulated although the configuration does not order that.
    pub(crate) fn advise(&self, report: &mut CheckReport) {
        if let Some(why) = &self.unasked {
            report.emulate(
                "backend",
                format!(
                    "the VM's CPUs are emulated in software, many times slower than with KVM, because {why}. Each boot \
                     decides anew. UNKEY_VMCP_QEMU_KVM=false accepts emulation without this warning"
                ),
            );
        }
    }

    /// Writes a line into the log if the CPUs are emulated although the configuration does not
    /// order that.
    pub(crate) fn log(&self) {
        if let Some(why) = &self.unasked {
            tracing::warn!(detail = why, "the CPUs of a VM that starts are emulated in software");
        }
    }
}

impl From<Accelerator> for Choice {
    fn from(accelerator: Accelerator) -> Self {
        Self { accelerator, unasked: None }
    }
}

impl From<Accelerator> for AcceleratorFact {
    fn from(accelerator: Accelerator) -> Self {
        match accelerator {
            Accelerator::Kvm => Self::Kvm,
            Accelerator::Tcg => Self::Tcg,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unrequested_emulation_is_a_warning_with_the_reason() {
        let warned = |choice: Choice| {
            let mut report = CheckReport::default();
            choice.advise(&mut report);
            assert!(report.is_ok());
            report.warnings.into_iter().map(|warning| warning.message).collect::<Vec<_>>()
        };
        let absent = || Err("/dev/kvm does not exist; load kvm_intel".to_owned());
        let emulated = automatic(true, absent);
        assert_eq!(emulated.accelerator, Accelerator::Tcg);
        let [message] = &warned(emulated)[..] else { panic!("one warning") };
        assert!(message.contains("because /dev/kvm does not exist; load kvm_intel"), "{message}");
        let software = automatic(false, || Ok(()));
        assert_eq!(software.accelerator, Accelerator::Tcg, "a KVM in software is slower than emulation");
        let [message] = &warned(software)[..] else { panic!("one warning") };
        assert!(message.contains("neither vmx nor svm"), "{message}");
        assert_eq!(automatic(true, || Ok(())), Accelerator::Kvm.into());
        for ordered in [KvmMode::On, KvmMode::Off] {
            assert_eq!(warned(ordered.choose()), [""; 0], "{ordered:?}");
        }
    }
}
