//! The arguments of `create` and `validate`: a configuration by flags, or by a file.

use clap::{Args, ValueHint};
use vmm_proto::v1 as pb;

use super::values::{Disk, Nic, Pair, backend, memory, restart};

/// The arguments of `create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The name [default: a generated one]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) config: Config,
}

/// The arguments of `validate`.
#[derive(Debug, Args)]
pub(crate) struct Validate {
    #[command(flatten)]
    pub(crate) config: Config,
}

/// A configuration: a file, or flags.
#[derive(Debug, Args)]
pub(crate) struct Config {
    /// A CreateVmRequest as JSON or YAML; - reads standard input
    #[arg(short = 'f', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<String>,
    /// The hypervisor [default: the daemon's]
    #[arg(long, value_name = "NAME", value_parser = backend())]
    pub(crate) backend: Option<String>,
    #[command(flatten)]
    pub(crate) flags: Flags,
}

/// The flags of a configuration. None of them goes with a file, because a reader of the file could
/// not see what they change.
#[derive(Debug, Args)]
#[group(id = "flags", multiple = true, conflicts_with = "file")]
pub(crate) struct Flags {
    /// Virtual processors [default: 1]
    #[arg(long, value_name = "NUMBER", help_heading = "Configuration by flags")]
    pub(crate) cpus: Option<i32>,
    /// Memory, as 512MiB or 2GiB [default: 512MiB]
    #[arg(long, value_name = "SIZE", value_parser = memory, help_heading = "Configuration by flags")]
    pub(crate) memory: Option<i64>,
    /// Kernel on the host [default: the daemon's, if it has one]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Configuration by flags")]
    pub(crate) kernel: Option<String>,
    /// Initial RAM disk on the host
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Configuration by flags")]
    pub(crate) initrd: Option<String>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Configuration by flags")]
    pub(crate) kernel_args: Option<String>,
    /// A boot option, as qemu.machine=microvm; may be given again
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Configuration by flags")]
    pub(crate) boot_option: Vec<Pair>,
    /// A disk: PATH[,root][,ro][,id=ID][,KEY=VALUE]…, as /srv/a.qcow2,root,format=qcow2; may be
    /// given again
    #[arg(long, value_name = "DISK", help_heading = "Configuration by flags")]
    pub(crate) disk: Vec<Disk>,
    /// A network interface: auto, or any of tap=NAME, mac=ADDRESS, id=ID with commas between; may be
    /// given again
    #[arg(long, value_name = "INTERFACE", help_heading = "Configuration by flags")]
    pub(crate) net: Vec<Nic>,
    /// A pair of metadata; may be given again
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Configuration by flags")]
    pub(crate) metadata: Vec<Pair>,
    /// The reasons for which the daemon starts the guest again
    #[arg(long, value_name = "MODE", value_parser = restart(), help_heading = "Configuration by flags")]
    pub(crate) restart: Option<pb::RestartMode>,
    /// Refuse to delete the VM, also with --force, until update --no-delete-protection
    #[arg(long, help_heading = "Configuration by flags")]
    pub(crate) delete_protection: bool,
}
