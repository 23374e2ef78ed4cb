//! The abilities of a backend in words, for ListBackends.

use std::collections::BTreeMap;

use vmm_core::capabilities::{
    AcceleratorFact, BackendFacts, ConsoleFact, CpuTimeFact, CreateFact, EndpointMode, MachineFact,
    PanicFact, PowerOffFact, RebootFact, ResetFact, ShutdownFact, StateFact, TripleFaultFact, VmmFailureFact,
};
use vmm_core::spec::DiskFormat;

/// Returns the word of `mode` on the wire.
pub(super) const fn endpoint_mode(mode: EndpointMode) -> &'static str {
    match mode {
        EndpointMode::Managed => "managed",
        EndpointMode::Attached => "attached",
        EndpointMode::Libvirt => "libvirt",
    }
}

/// Returns `facts` as the map that clients read. Facts that are not published are left out.
pub(super) fn words(facts: &BackendFacts) -> BTreeMap<String, String> {
    let BackendFacts {
        accelerator,
        console,
        cpu_time,
        create,
        disk_formats,
        disk_rate_limits,
        guest_panic,
        guest_power_off,
        guest_reset,
        guest_triple_fault,
        machines,
        network_rate_limits,
        reboot,
        shutdown,
        state,
        vmm_failure,
    } = facts;
    let formats = disk_formats.map(|formats| list(formats, disk_format));
    let machines = machines.map(|machines| list(machines, machine));
    let all = [
        ("accelerator", accelerator.map(self::accelerator)),
        ("console", console.map(self::console)),
        ("cpu-time", cpu_time.map(self::cpu_time)),
        ("create", create.map(self::create)),
        ("disk-formats", formats.as_deref()),
        ("disk-rate-limits", disk_rate_limits.map(yes_or_no)),
        ("guest-panic", guest_panic.map(panic)),
        ("guest-power-off", guest_power_off.map(power_off)),
        ("guest-reset", guest_reset.map(reset)),
        ("guest-triple-fault", guest_triple_fault.map(triple_fault)),
        ("machines", machines.as_deref()),
        ("network-rate-limits", network_rate_limits.map(yes_or_no)),
        ("reboot", reboot.map(self::reboot)),
        ("shutdown", shutdown.map(self::shutdown)),
        ("state", state.map(self::state)),
        ("vmm-failure", vmm_failure.map(self::vmm_failure)),
    ];
    let known = all.into_iter().filter_map(|(name, word)| Some((name.to_owned(), word?.to_owned())));
    known.collect()
}

fn list<T: Copy>(values: &[T], word: fn(T) -> &'static str) -> String {
    values.iter().copied().map(word).collect::<Vec<_>>().join(", ")
}

const fn yes_or_no(fact: bool) -> &'static str {
    if fact { "yes" } else { "no" }
}

const fn disk_format(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

const fn accelerator(fact: AcceleratorFact) -> &'static str {
    match fact {
        AcceleratorFact::Kvm => "kvm",
        AcceleratorFact::Tcg => "tcg",
        AcceleratorFact::AsStarted => "as it was started",
    }
}

const fn console(fact: ConsoleFact) -> &'static str {
    match fact {
        ConsoleFact::InputAndOutput => "serial, with input",
        ConsoleFact::OutputUnlessImported => "serial, without input; of an imported VM none",
        ConsoleFact::Elsewhere => "none: it is where QEMU was told to put it",
    }
}

const fn cpu_time(fact: CpuTimeFact) -> &'static str {
    match fact {
        CpuTimeFact::OfProcess => "of the VMM's process",
    }
}

const fn create(fact: CreateFact) -> &'static str {
    match fact {
        CreateFact::ImportOnly => "no: a running QEMU is imported",
    }
}

const fn panic(fact: PanicFact) -> &'static str {
    match fact {
        PanicFact::EndsRun => "ends the run, as a failure",
        PanicFact::EndsRunButOnMicrovm => "ends the run, as a failure; on microvm not seen",
        PanicFact::Unseen => "not seen: have the guest reset itself (panic=1)",
        PanicFact::AsConfigured => "as QEMU was told",
    }
}

const fn power_off(fact: PowerOffFact) -> &'static str {
    match fact {
        PowerOffFact::EndsRun => "ends the run",
        PowerOffFact::EndsVmmWithoutCause => "ends the run and the VMM; the reason is not known",
        PowerOffFact::UnseenOnX86 => "not seen on x86: the VM stays RUNNING; let guests end by a reset",
    }
}

const fn reset(fact: ResetFact) -> &'static str {
    match fact {
        ResetFact::InPlaceUnlessNever => "in place, or ends the run where restart_policy is NEVER",
        ResetFact::InPlaceUnlessConfiguredOtherwise => "in place, or as QEMU was told",
        ResetFact::InPlaceUnseen => "in place, and not seen",
        ResetFact::EndsRun => "ends the run",
        ResetFact::EndsVmm => "ends the run, and the VMM",
    }
}

const fn triple_fault(fact: TripleFaultFact) -> &'static str {
    match fact {
        TripleFaultFact::AsReset => "as a reset",
        TripleFaultFact::EndsRun => "ends the run, as a failure",
        TripleFaultFact::EndsVmm => "ends the run, and the VMM, as a failure",
    }
}

const fn machine(fact: MachineFact) -> &'static str {
    match fact {
        MachineFact::Q35 => "q35",
        MachineFact::Microvm => "microvm",
    }
}

const fn reboot(fact: RebootFact) -> &'static str {
    match fact {
        RebootFact::InPlace => "in place",
        RebootFact::InPlaceAtOnce => "in place, at once",
        RebootFact::NewProcess => "a new process",
        RebootFact::NeedsAnotherVmm => "no: it needs another VMM on the same socket",
    }
}

const fn shutdown(fact: ShutdownFact) -> &'static str {
    match fact {
        ShutdownFact::PowerButton => "ACPI power button",
        ShutdownFact::CtrlAltDel => "Ctrl+Alt+Del, on x86 only",
    }
}

const fn state(fact: StateFact) -> &'static str {
    match fact {
        StateFact::Polled => "asked for at the metrics interval",
    }
}

const fn vmm_failure(fact: VmmFailureFact) -> &'static str {
    match fact {
        VmmFailureFact::NeedsAnotherVmm => {
            "ends the run; another VMM on the same socket can boot the VM again"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts that clients read, in one list for each fact.
    #[test]
    fn the_wire_words_are_stable() {
        use EndpointMode as E;
        assert_eq!(
            [E::Managed, E::Attached, E::Libvirt].map(endpoint_mode),
            ["managed", "attached", "libvirt"]
        );
        use AcceleratorFact as A;
        assert_eq!([A::Kvm, A::Tcg, A::AsStarted].map(accelerator), ["kvm", "tcg", "as it was started"]);
        use ConsoleFact as C;
        assert_eq!(
            [C::InputAndOutput, C::OutputUnlessImported, C::Elsewhere].map(console),
            [
                "serial, with input",
                "serial, without input; of an imported VM none",
                "none: it is where QEMU was told to put it",
            ]
        );
        use PanicFact as N;
        assert_eq!(
            [N::EndsRun, N::EndsRunButOnMicrovm, N::Unseen, N::AsConfigured].map(panic),
            [
                "ends the run, as a failure",
                "ends the run, as a failure; on microvm not seen",
                "not seen: have the guest reset itself (panic=1)",
                "as QEMU was told",
            ]
        );
        use PowerOffFact as P;
        assert_eq!(
            [P::EndsRun, P::EndsVmmWithoutCause, P::UnseenOnX86].map(power_off),
            [
                "ends the run",
                "ends the run and the VMM; the reason is not known",
                "not seen on x86: the VM stays RUNNING; let guests end by a reset",
            ]
        );
        use ResetFact as R;
        let resets = [
            R::InPlaceUnlessNever,
            R::InPlaceUnlessConfiguredOtherwise,
            R::InPlaceUnseen,
            R::EndsRun,
            R::EndsVmm,
        ];
        assert_eq!(
            resets.map(reset),
            [
                "in place, or ends the run where restart_policy is NEVER",
                "in place, or as QEMU was told",
                "in place, and not seen",
                "ends the run",
                "ends the run, and the VMM",
            ]
        );
        use TripleFaultFact as T;
        assert_eq!(
            [T::AsReset, T::EndsRun, T::EndsVmm].map(triple_fault),
            ["as a reset", "ends the run, as a failure", "ends the run, and the VMM, as a failure",]
        );
        use RebootFact as B;
        assert_eq!(
            [B::InPlace, B::InPlaceAtOnce, B::NewProcess, B::NeedsAnotherVmm].map(reboot),
            ["in place", "in place, at once", "a new process", "no: it needs another VMM on the same socket",]
        );
        use ShutdownFact as S;
        assert_eq!(
            [S::PowerButton, S::CtrlAltDel].map(shutdown),
            ["ACPI power button", "Ctrl+Alt+Del, on x86 only"]
        );
    }

    #[test]
    fn capability_names_are_stable_and_an_unknown_capability_is_left_out() {
        assert!(words(&BackendFacts::default()).is_empty());
        let all = BackendFacts {
            accelerator: Some(AcceleratorFact::Kvm),
            console: Some(ConsoleFact::InputAndOutput),
            cpu_time: Some(CpuTimeFact::OfProcess),
            create: Some(CreateFact::ImportOnly),
            disk_formats: Some(&[DiskFormat::Raw, DiskFormat::Qcow2]),
            disk_rate_limits: Some(true),
            guest_panic: Some(PanicFact::Unseen),
            guest_power_off: Some(PowerOffFact::EndsRun),
            guest_reset: Some(ResetFact::EndsRun),
            guest_triple_fault: Some(TripleFaultFact::AsReset),
            machines: Some(&[MachineFact::Q35, MachineFact::Microvm]),
            network_rate_limits: Some(false),
            reboot: Some(RebootFact::InPlace),
            shutdown: Some(ShutdownFact::PowerButton),
            state: Some(StateFact::Polled),
            vmm_failure: Some(VmmFailureFact::NeedsAnotherVmm),
        };
        let expected = [
            ("accelerator", "kvm"),
            ("console", "serial, with input"),
            ("cpu-time", "of the VMM's process"),
            ("create", "no: a running QEMU is imported"),
            ("disk-formats", "raw, qcow2"),
            ("disk-rate-limits", "yes"),
            ("guest-panic", "not seen: have the guest reset itself (panic=1)"),
            ("guest-power-off", "ends the run"),
            ("guest-reset", "ends the run"),
            ("guest-triple-fault", "as a reset"),
            ("machines", "q35, microvm"),
            ("network-rate-limits", "no"),
            ("reboot", "in place"),
            ("shutdown", "ACPI power button"),
            ("state", "asked for at the metrics interval"),
            ("vmm-failure", "ends the run; another VMM on the same socket can boot the VM again"),
        ];
        let expected = expected.map(|(name, word)| (name.to_owned(), word.to_owned()));
        assert_eq!(words(&all), BTreeMap::from(expected));
    }
}
