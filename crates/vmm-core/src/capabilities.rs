//! The abilities of a hypervisor as values. Only the API words them, so no code reads its words.

use std::collections::BTreeMap;

use crate::id::BackendName;
use crate::spec::{DiskFormat, RestartMode};

/// The abilities of a backend. Constant for the life of the daemon.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// The backend's name.
    pub name: BackendName,
    /// The source of the VMMs of new VMs.
    pub endpoint_mode: EndpointMode,
    /// The meaning of a `restart_policy` that is not set.
    pub default_restart_mode: RestartMode,
    /// Kernel images that can be booted; CreateVm refuses others before anything is started.
    pub kernel_formats: &'static [KernelFormat],
    /// True if qcow2 images with extended entries in their second table can be used.
    pub extended_l2: bool,
    /// The facts that clients see.
    pub facts: BackendFacts,
    /// Numeric limits by name, in kebab-case.
    pub limits: BTreeMap<&'static str, i64>,
}

/// The source of the VMMs of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointMode {
    /// The daemon starts a process for each VM.
    Managed,
    /// Another program starts the processes.
    Attached,
    /// libvirt starts the processes.
    Libvirt,
}

/// The facts of a backend. A fact that is `None` is not shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackendFacts {
    /// The accelerator of new VMs. `None` where each start chooses, which the health reports.
    pub accelerator: Option<AcceleratorFact>,
    /// The serial console.
    pub console: Option<ConsoleFact>,
    /// The process whose CPU time stands for that of the vCPUs.
    pub cpu_time: Option<CpuTimeFact>,
    /// The reason why CreateVm is not served.
    pub create: Option<CreateFact>,
    /// The formats of disks.
    pub disk_formats: Option<&'static [DiskFormat]>,
    /// True where rate limits of disks are served.
    pub disk_rate_limits: Option<bool>,
    /// The effect of a guest's panic.
    pub guest_panic: Option<PanicFact>,
    /// The effect of a guest's power-off.
    pub guest_power_off: Option<PowerOffFact>,
    /// The effect of a guest's reset.
    pub guest_reset: Option<ResetFact>,
    /// The effect of a guest's triple fault.
    pub guest_triple_fault: Option<TripleFaultFact>,
    /// The machine types.
    pub machines: Option<&'static [MachineFact]>,
    /// True where rate limits of network interfaces are served.
    pub network_rate_limits: Option<bool>,
    /// The way of a reboot.
    pub reboot: Option<RebootFact>,
    /// The way in which a guest is asked to shut down.
    pub shutdown: Option<ShutdownFact>,
    /// The source of a VM's state, where the VMM sends no events.
    pub state: Option<StateFact>,
    /// The effect of a VMM's failure, where another program starts the VMMs.
    pub vmm_failure: Option<VmmFailureFact>,
}

/// The accelerator of new VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceleratorFact {
    /// KVM.
    Kvm,
    /// Software emulation.
    Tcg,
    /// The accelerator that another program has chosen.
    AsStarted,
}

/// The serial console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleFact {
    /// Output and input.
    InputAndOutput,
    /// Output alone, and nothing of a VM that was found.
    OutputUnlessImported,
    /// The console is where another program has put it.
    Elsewhere,
}

/// The process whose CPU time stands for that of the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuTimeFact {
    /// The process of the VMM.
    OfProcess,
}

/// The reason why CreateVm is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateFact {
    /// VMs that run are imported.
    ImportOnly,
}

/// The effect of a guest's panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicFact {
    /// The run ends with a failure.
    EndsRun,
    /// The run ends with a failure, but nothing is seen of a panic on microvm.
    EndsRunButOnMicrovm,
    /// Nothing is seen of a panic.
    Unseen,
    /// The effect is the one that QEMU was started with.
    AsConfigured,
}

impl PanicFact {
    /// Returns true where a panic ends the run.
    pub const fn is_seen(self) -> bool {
        matches!(self, Self::EndsRun | Self::EndsRunButOnMicrovm)
    }
}

/// The effect of a guest's power-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerOffFact {
    /// The run ends.
    EndsRun,
    /// The run ends, and with it the VMM of another program, without showing the cause.
    EndsVmmWithoutCause,
    /// Nothing is seen of it on x86.
    UnseenOnX86,
}

impl PowerOffFact {
    /// Returns true where a power-off ends the run.
    pub const fn is_seen(self) -> bool {
        !matches!(self, Self::UnseenOnX86)
    }

    /// Returns true where the end can be distinguished from other ends.
    pub const fn is_reported(self) -> bool {
        matches!(self, Self::EndsRun)
    }
}

/// The effect of a guest's reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetFact {
    /// The guest goes on in the same process, unless the restart policy is NEVER.
    InPlaceUnlessNever,
    /// The guest runs on in the same process, unless QEMU was started otherwise.
    InPlaceUnlessConfiguredOtherwise,
    /// The guest goes on in the same process, and nothing is seen of it.
    InPlaceUnseen,
    /// The run ends.
    EndsRun,
    /// The run ends, and with it the VMM of another program.
    EndsVmm,
}

impl ResetFact {
    /// Returns true where the guest can go on in the same process.
    pub const fn is_in_place(self) -> bool {
        match self {
            Self::InPlaceUnlessNever | Self::InPlaceUnlessConfiguredOtherwise | Self::InPlaceUnseen => true,
            Self::EndsRun | Self::EndsVmm => false,
        }
    }

    /// Returns true where a reset is noticed.
    pub const fn is_seen(self) -> bool {
        !matches!(self, Self::InPlaceUnseen)
    }
}

/// The effect of a guest's triple fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TripleFaultFact {
    /// The effect of a reset.
    AsReset,
    /// The run ends with a failure.
    EndsRun,
    /// The run ends with a failure, and with it the VMM of another program.
    EndsVmm,
}

impl TripleFaultFact {
    /// Returns true where a triple fault is a failure.
    pub const fn is_failure(self) -> bool {
        !matches!(self, Self::AsReset)
    }
}

/// A machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineFact {
    /// A PC.
    Q35,
    /// QEMU's small machine.
    Microvm,
}

/// The way of a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootFact {
    /// The guest is reset in the same process.
    InPlace,
    /// The guest is reset in the same process without being asked.
    InPlaceAtOnce,
    /// Another process is started.
    NewProcess,
    /// Another VMM would be needed on the same socket.
    NeedsAnotherVmm,
}

impl RebootFact {
    /// Returns true where RebootVm is served.
    pub const fn is_served(self) -> bool {
        !matches!(self, Self::NeedsAnotherVmm)
    }

    /// Returns true if the VMM's process stays the same.
    pub const fn is_in_place(self) -> bool {
        matches!(self, Self::InPlace | Self::InPlaceAtOnce)
    }
}

/// The way in which a guest is asked to shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownFact {
    /// By the ACPI power button.
    PowerButton,
    /// By Ctrl+Alt+Del, on x86.
    CtrlAltDel,
}

/// The source of a VM's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFact {
    /// The VMM is asked at the metrics interval.
    Polled,
}

/// The effect of a VMM's failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmFailureFact {
    /// The run ends, and another VMM on the same socket can boot the VM again.
    NeedsAnotherVmm,
}

/// The format of a kernel image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// x86 Linux's self-extracting image, as distributions ship it.
    BzImage,
    /// An x86-64 ELF executable, such as an uncompressed `vmlinux`.
    Elf,
    /// An x86-64 ELF executable with a PVH entry point, as Linux has with `CONFIG_PVH`.
    PvhElf,
}

impl KernelFormat {
    /// Returns the name for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BzImage => "a bzImage",
            Self::Elf => "an x86-64 ELF file (vmlinux)",
            Self::PvhElf => "an x86-64 ELF file with a PVH entry point",
        }
    }
}
