//! Starting the program of a VMM.
//!
//! ```text
//!   one visit to the threads for blocking work:  program ─► no stale socket ─► files ─► process
//!                                                   │            │
//!   between two visits, where there must be:    ask its version  sweep
//! ```
//!
//! Each visit costs two wake-ups, which take longer than what is done there; so there is one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_host::process::{Command, Guarded};
use vmm_host::run_dir;

use super::found::SOCKET;
use super::program::{Program, Version};
use crate::launch;

/// A start asks for a version once, and sweeps once.
const VISITS: usize = 3;

/// What a visit came to.
enum Visit {
    Started(Guarded, Version),
    /// Which version the program is has not been asked yet.
    UnknownVersion,
    /// The socket of an earlier run is there, and perhaps its VMM.
    StaleSocket,
}

/// Starts `program` in the run folder `dir`, by the command that `prepare` makes of the program's path. `prepare` may block, and
/// makes the files that the VMM needs.
///
/// # Errors
/// [`BackendErrorKind::NotInstalled`], [`BackendErrorKind::Host`], and what the end of an earlier run's VMM fails with. Nothing
/// runs then.
pub async fn start<P>(
    program: &Arc<Program>,
    dir: &Path,
    prepare: P,
) -> Result<(Guarded, Version), BackendError>
where
    P: Fn(PathBuf) -> io::Result<Command> + Clone + Send + 'static,
{
    let socket = dir.join(SOCKET);
    run_dir::socket_path_fits(&socket)
        .map_err(|why| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why))?;
    for _ in 0..VISITS {
        let (program_of, socket, prepare) = (Arc::clone(program), socket.clone(), prepare.clone());
        let visit = tokio::task::spawn_blocking(move || visit(&program_of, &socket, prepare));
        match visit.await.map_err(|error| host_error(&io::Error::other(error)))?? {
            Visit::Started(guard, version) => return Ok((launch::started(guard), version)),
            Visit::UnknownVersion => drop(program.find().await?),
            Visit::StaleSocket => launch::sweep(dir, &program.running_names().await).await?,
        }
    }
    let why = io::Error::other("the program, or the VM's socket, is replaced all the time");
    Err(host_error(&why))
}

fn visit(
    program: &Program,
    socket: &Path,
    prepare: impl FnOnce(PathBuf) -> io::Result<Command>,
) -> Result<Visit, BackendError> {
    let Some((path, version)) = program.known()? else { return Ok(Visit::UnknownVersion) };
    if socket.try_exists().unwrap_or(true) {
        return Ok(Visit::StaleSocket);
    }
    let command = prepare(path).map_err(|error| host_error(&error))?;
    launch::start_blocking(command).map(|guard| Visit::Started(guard, version))
}

fn host_error(error: &io::Error) -> BackendError {
    let message = format!("the run folder cannot be prepared: {error}; look at its room and rights");
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
}
