//! The arguments of the commands that change a VM's state.

use clap::Args;

use super::values::{name_argument, seconds};

/// One or more VMs.
#[derive(Debug, Args)]
pub(crate) struct Names {
    /// VMs, by names or prefixes
    #[arg(required = true, value_name = "NAME", add = name_argument())]
    pub(crate) names: Vec<String>,
}

/// The arguments of `shutdown`.
#[derive(Debug, Args)]
pub(crate) struct Shutdown {
    #[command(flatten)]
    pub(crate) names: Names,
    /// Power off at once, without asking the guest
    #[arg(long, conflicts_with = "timeout")]
    pub(crate) force: bool,
    /// The time that the guest has, as 90s or 5m; at most an hour [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub(crate) timeout: Option<i32>,
}

/// The arguments of `reboot`.
#[derive(Debug, Args)]
pub(crate) struct Reboot {
    #[command(flatten)]
    pub(crate) names: Names,
    /// Reset at once, without asking the guest
    #[arg(long, conflicts_with = "timeout")]
    pub(crate) force: bool,
    /// The time that the guest has, as 90s or 5m; at most an hour [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub(crate) timeout: Option<i32>,
}

/// The arguments of `delete`.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    #[command(flatten)]
    pub(crate) names: Names,
    /// Power off first where the VM runs, pre-empt what is under way
    #[arg(long)]
    pub(crate) force: bool,
}
