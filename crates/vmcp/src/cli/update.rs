//! The arguments of `update` and `edit`.

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Args, ValueHint};
use vmm_proto::v1 as pb;

use super::values::{Disk, Nic, Pair, memory, name_argument, restart};

/// The parts of a configuration that have a default, so that they can be cleared.
const CLEARABLE: [&str; 7] =
    ["boot", "storage", "network", "console", "metadata", "restart_policy", "delete_protection"];

/// The arguments of `update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// The VM, by name or prefix
    #[arg(add = name_argument())]
    pub(crate) name: String,
    /// A file as that of create, or an UpdateVmRequest, as JSON or YAML; the parts that it has replace
    /// those of the VM; - reads standard input
    #[arg(short = 'f', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<String>,
    /// Change the VM only if it has this generation, as get shows it
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) if_generation: Option<i64>,
    #[command(flatten)]
    pub(crate) changes: Changes,
}

/// The arguments of `edit`.
#[derive(Debug, Args)]
pub(crate) struct Edit {
    /// The VM, by name or prefix
    #[arg(add = name_argument())]
    pub(crate) name: String,
}

/// The flags of a change. A flag that is not given leaves its value as it is.
#[derive(Debug, Args)]
#[group(id = "changes", multiple = true, conflicts_with = "file")]
pub(crate) struct Changes {
    /// Virtual processors
    #[arg(long, value_name = "NUMBER", help_heading = "Changes by flags")]
    pub(crate) cpus: Option<i32>,
    /// Memory, as 512MiB or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = memory, help_heading = "Changes by flags")]
    pub(crate) memory: Option<i64>,
    /// Kernel on the host
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Changes by flags")]
    pub(crate) kernel: Option<String>,
    /// Initial RAM disk on the host; an empty text: none
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Changes by flags")]
    pub(crate) initrd: Option<String>,
    /// Kernel command line, as a whole
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Changes by flags")]
    pub(crate) kernel_args: Option<String>,
    /// A boot option, as qemu.machine=microvm; the others stay; may be given again
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Changes by flags")]
    pub(crate) boot_option: Vec<Pair>,
    /// A disk, as for create; all given disks replace those of the VM; may be given again
    #[arg(long, value_name = "DISK", help_heading = "Changes by flags")]
    pub(crate) disk: Vec<Disk>,
    /// A network interface, as for create; all given ones replace those of the VM; may be given again
    #[arg(long, value_name = "INTERFACE", help_heading = "Changes by flags")]
    pub(crate) net: Vec<Nic>,
    /// A pair of metadata; the others stay; may be given again
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Changes by flags")]
    pub(crate) metadata: Vec<Pair>,
    /// A key of metadata to remove; may be given again
    #[arg(long, value_name = "KEY", help_heading = "Changes by flags")]
    pub(crate) remove_metadata: Vec<String>,
    /// The reasons for which the daemon starts the guest again
    #[arg(long, value_name = "MODE", value_parser = restart(), help_heading = "Changes by flags")]
    pub(crate) restart: Option<pb::RestartMode>,
    /// Refuse to delete the VM, also with --force
    #[arg(long, help_heading = "Changes by flags")]
    pub(crate) delete_protection: bool,
    /// Allow to delete the VM
    #[arg(long, conflicts_with = "delete_protection", help_heading = "Changes by flags")]
    pub(crate) no_delete_protection: bool,
    /// A part to reset to its default, as storage: no disks; may be given again
    #[arg(long, value_name = "PART", value_parser = PossibleValuesParser::new(CLEARABLE).map(Part),
        help_heading = "Changes by flags")]
    pub(crate) clear: Vec<Part>,
}

/// The name of a part of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part(pub(crate) String);
