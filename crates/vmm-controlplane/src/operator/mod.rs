//! The operator's subcommands: what a person on the host asks beside the daemon, not through its API.
//!
//! ```text
//!   doctor ────► what the host can do, and the remedy for what it cannot            never writes
//!   reconcile ─► facts (host, then database, then host again) ─► decide ─► act      acts only where no daemon runs
//!   backup ────► a copy of the database, also beside a running daemon
//!   restore ───► the database from a copy, only where no daemon runs
//! ```
//!
//! None of them needs the daemon. What they may do beside one follows from the lock of the state directory: `doctor`,
//! `backup` and `reconcile --dry-run` read; `reconcile` and `restore` take the lock first, or refuse. Exit codes: 0 all is
//! well, 1 it could not be done (or `doctor`: the default backend cannot serve), 3 `reconcile` left or found something that
//! a person should look at.

mod act;
mod check;
mod copies;
mod decide;
mod doctor;
mod facts;
mod held;
mod host;
mod reconcile;
mod spares;

pub use reconcile::report_leftovers;

use std::path::Path;

use anyhow::bail;
use rustix::process::geteuid;

use crate::config::{Command, Loaded};

/// Something is left that a person should look at.
const ATTENTION: u8 = 3;

/// What a subcommand prints, and its exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// The exit code.
    pub code: u8,
}

impl Answer {
    fn fine(text: String) -> Self {
        Self { text, code: 0 }
    }
}

/// Carries out a subcommand of the operator's; any other prints nothing.
///
/// # Errors
///
/// It could not be done; the text says why and what to do.
pub fn run(command: &Command, loaded: &Loaded) -> anyhow::Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let config = &loaded.config;
    runtime.block_on(async {
        match command {
            Command::Doctor { json } => doctor::run(loaded, *json).await,
            Command::Reconcile(how) => reconcile::run(config, *how).await,
            Command::Backup { file } => copies::backup(config, file),
            Command::Restore { file } => copies::restore(config, file).await,
            Command::Serve | Command::CheckConfig | Command::MigrateEnv => Ok(Answer::fine(String::new())),
        }
    })
}

/// Refuses to write into a directory of another user: what is made there would be closed to the daemon.
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
