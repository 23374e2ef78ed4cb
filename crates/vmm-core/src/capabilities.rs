//! The abilities and limits of a hypervisor, as clients are told them.

use std::collections::BTreeMap;

use crate::id::BackendName;
use crate::spec::RestartMode;

/// What a hypervisor can do, told to clients word for word.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// The backend's name.
    pub name: BackendName,
    /// `managed`: processes are started. `attached`: somebody else starts them.
    pub endpoint_mode: &'static str,
    /// What `restart_policy` means where it is not set.
    pub default_restart_mode: RestartMode,
    /// Kernel images that can be booted; CreateVm refuses others before anything is started.
    pub kernel_formats: &'static [KernelFormat],
    /// Facts by name, in kebab-case.
    pub facts: BTreeMap<&'static str, String>,
    /// Numeric limits by name, in kebab-case.
    pub limits: BTreeMap<&'static str, i64>,
}

/// How a kernel image is laid out.
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
    /// The name that people know it by.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BzImage => "a bzImage",
            Self::Elf => "an x86-64 ELF file (vmlinux)",
            Self::PvhElf => "an x86-64 ELF file with a PVH entry point",
        }
    }
}
