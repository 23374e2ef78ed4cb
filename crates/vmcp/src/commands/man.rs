//! `vmcp man`: the manual pages, made from the command line's own help.

use std::io::Write as _;

use clap::CommandFactory as _;

use crate::cli::{Cli, Man};
use crate::failure::Failure;

/// Prints the page of `vmcp`, or writes the pages of all commands into a folder.
pub(crate) fn run(arguments: &Man) -> Result<(), Failure> {
    let command = Cli::command();
    if let Some(dir) = &arguments.dir {
        let failed = |error| Failure::Local(format!("{}: {error}", dir.display()));
        std::fs::create_dir_all(dir).map_err(failed)?;
        return clap_mangen::generate_to(command, dir).map_err(failed);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page).map_err(Failure::Output)?;
    std::io::stdout().lock().write_all(&page).map_err(Failure::Output)
}
