//! The arguments of the commands that read, watch and wait.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};
use vmm_proto::v1 as pb;

use super::values::{Pair, backend, duration, name_argument, state};

/// The arguments of `list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only VMs in this state; may be given again
    #[arg(long, value_name = "STATE", value_parser = state())]
    pub(crate) state: Vec<pb::VmState>,
    /// Only VMs of this backend
    #[arg(long, value_name = "NAME", value_parser = backend())]
    pub(crate) backend: Option<String>,
    /// Only VMs with this pair in their metadata; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) metadata: Vec<Pair>,
    /// Keep the table up to date, until Ctrl-C
    #[arg(short = 'w', long)]
    pub(crate) watch: bool,
}

/// The arguments of `get`.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// The VM, by name or prefix
    #[arg(add = name_argument())]
    pub(crate) name: String,
}

/// The arguments of `wait`.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// The VM, by name or prefix
    #[arg(add = name_argument())]
    pub(crate) name: String,
    /// The states, any of which ends the wait
    #[arg(required = true, value_name = "STATE", value_parser = state())]
    pub(crate) states: Vec<pb::VmState>,
    /// The longest time to wait, as 90s or 5m [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

/// The arguments of `watch`.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Only this VM, by name or prefix; a name that no VM has yet is waited for
    #[arg(add = name_argument())]
    pub(crate) name: Option<String>,
    /// Only VMs with this pair in their metadata; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) metadata: Vec<Pair>,
    /// Go on behind the event with this token, as `-o json` shows it
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    pub(crate) resume_token: String,
}

/// The arguments of `events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Only this VM, by name or prefix; a deleted VM by its whole name
    #[arg(add = name_argument())]
    pub(crate) name: Option<String>,
    /// Only the last events
    #[arg(long, value_name = "NUMBER")]
    pub(crate) last: Option<usize>,
}

/// The arguments of `backends`.
#[derive(Debug, Args)]
pub(crate) struct Backends {
    /// The backend whose capabilities and limits are shown
    #[arg(value_parser = backend())]
    pub(crate) name: Option<String>,
}

/// The arguments of `api`.
#[derive(Debug, Args)]
pub(crate) struct Api {
    /// The method, as ListVms
    pub(crate) method: String,
    /// The request as JSON; @FILE reads a file, - reads standard input
    #[arg(value_name = "JSON", default_value = "{}", hide_default_value = true)]
    pub(crate) request: String,
}

/// The arguments of `man`.
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Write one page for each command into this folder
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
}
