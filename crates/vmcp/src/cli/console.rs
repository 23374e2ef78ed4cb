//! The arguments of `console` and `run`.

use clap::Args;

use super::create::Config;
use super::values::{escape_key, name_argument};

/// The arguments of `console`.
#[derive(Debug, Args)]
pub(crate) struct Console {
    /// The VM, by name or prefix
    #[arg(add = name_argument())]
    pub(crate) name: String,
    /// Only the last bytes of the history [default: all that is kept]
    #[arg(long, value_name = "BYTES")]
    pub(crate) tail: Option<u32>,
    /// Print the history and end
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// Take no input from the terminal
    #[arg(long)]
    pub(crate) no_input: bool,
    #[command(flatten)]
    pub(crate) escape: Escape,
}

/// The arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The name [default: a generated one]
    pub(crate) name: Option<String>,
    /// Delete the VM at the end, also where it still runs
    #[arg(long)]
    pub(crate) rm: bool,
    #[command(flatten)]
    pub(crate) escape: Escape,
    #[command(flatten)]
    pub(crate) config: Config,
}

/// The key that begins the commands of the console itself.
#[derive(Debug, Args)]
pub(crate) struct Escape {
    /// The key that, at the beginning of a line and with . behind it, leaves the console; none: no key
    #[arg(long = "escape", value_name = "KEY", default_value = "~", value_parser = escape_key)]
    pub(crate) key: EscapeKey,
}

/// An escape key, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EscapeKey(pub(crate) Option<u8>);
