//! Starting the program of a VMM, up to where it can be told what to run.
//!
//! ```text
//!   one visit to the threads for blocking work:  program ─► no stale socket ─► files ─► process ──► it listens: Fresh
//!                                                   │            │
//!   between two visits, where there must be:    ask its version  sweep
//! ```
//!
//! Each visit costs two wake-ups, which take longer than what is done there; so there is one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_host::process::{Command, Guarded};
use vmm_host::run_dir;

use super::adopt::{LOG, SOCKET, failed, set_aside};
use super::client::RestApi;
use super::spare::Fresh;
use crate::launch;
use crate::program::{Installed, Program};

/// A start asks for a version once, and sweeps once.
const VISITS: usize = 3;
/// How long a VMM may take to listen on its socket.
const LISTENING: Duration = Duration::from_secs(5);

/// What a visit came to.
enum Visit {
    Started(Guarded, Installed),
    /// Which version the program is has not been asked yet.
    UnknownVersion,
    /// The socket of an earlier run is there, and perhaps its VMM.
    StaleSocket,
}

/// Starts `program` in the run folder `dir` by the command that `prepare` makes of both, and connects to it. `prepare` may block,
/// and makes the files that the VMM needs.
///
/// # Errors
/// [`BackendErrorKind::NotInstalled`], [`BackendErrorKind::Host`], what the end of an earlier run's VMM fails with, and what the
/// VMM itself fails with. Nothing runs then.
pub(crate) async fn start<C, P>(
    program: &Arc<Program>,
    dir: &Path,
    console: Option<PathBuf>,
    prepare: P,
) -> Result<Fresh<C>, BackendError>
where
    C: RestApi,
    P: Fn(&Path, &Path) -> io::Result<Command> + Clone + Send + 'static,
{
    let socket = dir.join(SOCKET);
    run_dir::socket_path_fits(&socket)
        .map_err(|why| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why))?;
    let (guard, program) = start_process(program, dir, console.clone(), prepare).await?;
    let connected = async {
        let stream = launch::wait_for_socket(&guard, &socket, LISTENING).await?;
        C::over(&socket, stream, guard.pid()).await
    };
    match connected.await {
        Ok(client) => Ok(Fresh { guard, client, program, console }),
        Err(error) => Err(failed(guard, error, &dir.join(LOG)).await),
    }
}

async fn start_process<P>(
    program: &Arc<Program>,
    dir: &Path,
    console: Option<PathBuf>,
    prepare: P,
) -> Result<(Guarded, Installed), BackendError>
where
    P: Fn(&Path, &Path) -> io::Result<Command> + Clone + Send + 'static,
{
    let console = console.unwrap_or_else(|| PathBuf::from("/dev/null"));
    for _ in 0..VISITS {
        let (program_of, dir_of, console, prepare) =
            (Arc::clone(program), dir.to_path_buf(), console.clone(), prepare.clone());
        let visit = tokio::task::spawn_blocking(move || {
            visit(&program_of, &dir_of, |program| {
                set_aside(&dir_of, LOG)?;
                Ok(Command { stdout: Some(console), ..prepare(program, &dir_of)? })
            })
        });
        match visit.await.map_err(|error| host_error(&io::Error::other(error)))?? {
            Visit::Started(guard, known) => return Ok((guard, known)),
            Visit::UnknownVersion => drop(program.find().await?),
            Visit::StaleSocket => launch::sweep(dir, &program.running_names().await).await?,
        }
    }
    let why = io::Error::other("the program, or the VM's socket, is replaced all the time");
    Err(host_error(&why))
}

fn visit(
    program: &Program,
    dir: &Path,
    prepare: impl FnOnce(&Path) -> io::Result<Command>,
) -> Result<Visit, BackendError> {
    let Some(known) = program.known()? else { return Ok(Visit::UnknownVersion) };
    if dir.join(SOCKET).try_exists().unwrap_or(true) {
        return Ok(Visit::StaleSocket);
    }
    let command = prepare(known.path()).map_err(|error| host_error(&error))?;
    launch::start_blocking(command).map(|guard| Visit::Started(guard, known))
}

fn host_error(error: &io::Error) -> BackendError {
    let message = format!("the run folder cannot be prepared: {error}; look at its room and rights");
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
}
