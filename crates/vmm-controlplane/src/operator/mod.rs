//! The operator's subcommands, which a person runs on the host beside the daemon and not through
//! its API.
//!
//! ```text
//!   doctor ────► the abilities of the host, with remedies                never writes
//!   reconcile ─► facts (host, database, host again) ─► decide ─► act     acts without a daemon only
//!   backup ────► a copy of the database                                  also beside a daemon
//!   restore ───► the database from a copy                                without a daemon only
//! ```
//!
//! No subcommand needs the daemon. `doctor`, `backup` and `reconcile --dry-run` only read the
//! state, so they may run beside it. `reconcile` and `restore` first take the lock of the state
//! directory, and refuse if a daemon holds it.
//!
//! The exit code is 0 on success. It is 1 if the work could not be done, and for `doctor` if the
//! default backend cannot serve. It is 3 if `reconcile` left or found something that a person
//! should look at.

mod access;
mod act;
mod backup;
mod check;
mod decide;
mod doctor;
mod facts;
mod held_qemus;
mod host;
mod reconcile;
mod spares;

pub use reconcile::report_leftovers;

use std::path::Path;

use anyhow::bail;
use rustix::process::geteuid;

use crate::config::{DaemonConfig, LoadedConfig, Subcommand};

/// The exit code if something is left that a person should look at.
const ATTENTION: u8 = 3;

/// The output and the exit code of a subcommand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOutput {
    /// The text for standard output.
    pub text: String,
    /// The exit code.
    pub code: u8,
}

impl CommandOutput {
    fn success(text: String) -> Self {
        Self { text, code: 0 }
    }
}

/// Runs a subcommand of the operator. Any other subcommand prints nothing.
///
/// # Errors
///
/// The work could not be done. The text gives the reason and the advice.
pub fn run(command: &Subcommand, loaded: &LoadedConfig) -> anyhow::Result<CommandOutput> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let config = &loaded.config;
    runtime.block_on(async {
        match command {
            Subcommand::Doctor { json } => doctor::run(loaded, *json).await,
            Subcommand::Reconcile(how) => reconcile::run(config, *how).await,
            Subcommand::Backup { file } => backup::backup(config, file),
            Subcommand::Restore { file } => backup::restore(config, file).await,
            Subcommand::Serve | Subcommand::CheckConfig | Subcommand::MigrateEnv | Subcommand::Man => {
                Ok(CommandOutput::success(String::new()))
            }
        }
    })
}

/// Returns the first line of a subcommand's output: the directories that it looks at. Without the
/// settings of the daemon a subcommand looks at other directories than the daemon uses.
fn looked_at(config: &DaemonConfig) -> String {
    format!(
        "state directory {}, runtime directory {}\n",
        config.state_dir.display(),
        config.runtime_dir.display()
    )
}

/// Refuses to write into a directory of another user, because the daemon could not access files
/// made there.
fn refuse_another_user(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(facts) = std::fs::metadata(dir) else { return Ok(()) };
    let (owner, this) = (facts.uid(), geteuid().as_raw());
    if owner != this {
        bail!(
            "{} belongs to user {owner}, and this is user {this}; run this as the daemon's user (`setpriv --reuid {owner} \
             --clear-groups …`)",
            dir.display()
        );
    }
    Ok(())
}
