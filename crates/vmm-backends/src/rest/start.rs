//! Starts the program of a VMM, up to the point where the VMM waits for its configuration.
//!
//! ```text
//!   one task of blocking work:  program ─► no stale socket ─► files ─► process ─► UnconfiguredVmm
//!                                  │            │
//!   between two tasks, if needed: ask version  sweep
//! ```
//!
//! All blocking work is done in one task, because each task costs two wake-ups, which take longer
//! than the work.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_host::process::{Command, ProcessGuard};
use vmm_host::run_dir;

use super::adopt::{LOG, SOCKET, failed, rotate_log};
use super::client::RestApi;
use super::spare::UnconfiguredVmm;
use crate::launch;
use crate::program::{InstalledProgram, Program};

/// The most tasks of one start: the version is asked for once, and the run folder is swept once.
const VISITS: usize = 3;
/// The longest time in which a VMM must listen on its socket.
const REST_LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// The result of one task of blocking work.
enum StartAttempt {
    Started(ProcessGuard, InstalledProgram),
    /// The version of this executable is not known yet.
    UnknownVersion,
    /// The socket of an earlier run exists, and perhaps its VMM.
    StaleSocket,
}

/// Starts `program` in the run folder `dir` by the command that `prepare` makes of both, and
/// connects to it. `prepare` creates the files that the VMM needs, and may block.
///
/// # Errors
/// [`BackendErrorKind::NotInstalled`]; [`BackendErrorKind::Host`]; the error of the sweep of an
/// earlier run's VMM; the error of the VMM itself. No process runs after an error.
pub(crate) async fn start<C, P>(
    program: &Arc<Program>,
    dir: &Path,
    console: Option<PathBuf>,
    prepare: P,
) -> Result<UnconfiguredVmm<C>, BackendError>
where
    C: RestApi,
    P: Fn(&Path, &Path) -> io::Result<Command> + Clone + Send + 'static,
{
    let socket = dir.join(SOCKET);
    run_dir::socket_path_fits(&socket)
        .map_err(|why| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why))?;
    let (guard, program) = start_process(program, dir, console.clone(), prepare).await?;
    let connected = async {
        let stream = launch::wait_for_socket(&guard, &socket, REST_LISTEN_TIMEOUT).await?;
        C::over(&socket, stream, guard.pid()).await
    };
    match connected.await {
        Ok(client) => Ok(UnconfiguredVmm { guard, client, program, console }),
        Err(error) => Err(failed(guard, error, &dir.join(LOG)).await),
    }
}

async fn start_process<P>(
    program: &Arc<Program>,
    dir: &Path,
    console: Option<PathBuf>,
    prepare: P,
) -> Result<(ProcessGuard, InstalledProgram), BackendError>
where
    P: Fn(&Path, &Path) -> io::Result<Command> + Clone + Send + 'static,
{
    let console = console.unwrap_or_else(|| PathBuf::from("/dev/null"));
    // In the usual case the first task starts the process. Two obstacles need a step outside the
    // blocking task: an unknown version runs the program, and a stale socket needs a sweep, which
    // waits for processes. Each is removed once, and then the task is repeated. A third obstacle
    // means that another program interferes.
    for _ in 0..VISITS {
        let (program_of, dir_of, console, prepare) =
            (Arc::clone(program), dir.to_path_buf(), console.clone(), prepare.clone());
        let visit = tokio::task::spawn_blocking(move || {
            attempt(&program_of, &dir_of, |program| {
                rotate_log(&dir_of, LOG)?;
                Ok(Command { stdout: Some(console), ..prepare(program, &dir_of)? })
            })
        });
        match visit.await.map_err(|error| host_error(io::Error::other(error)))?? {
            StartAttempt::Started(guard, known) => return Ok((guard, known)),
            StartAttempt::UnknownVersion => drop(program.find().await?),
            StartAttempt::StaleSocket => launch::sweep(dir, &program.running_names().await).await?,
        }
    }
    let why = io::Error::other("the program, or the VM's socket, is replaced all the time");
    Err(host_error(why))
}

fn attempt(
    program: &Program,
    dir: &Path,
    prepare: impl FnOnce(&Path) -> io::Result<Command>,
) -> Result<StartAttempt, BackendError> {
    let Some(known) = program.known()? else { return Ok(StartAttempt::UnknownVersion) };
    // A path that cannot be examined counts as a stale socket, because the sweep reports the
    // reason.
    if dir.join(SOCKET).try_exists().unwrap_or(true) {
        return Ok(StartAttempt::StaleSocket);
    }
    let command = prepare(known.path()).map_err(host_error)?;
    launch::start_blocking(command).map(|guard| StartAttempt::Started(guard, known))
}

fn host_error(error: io::Error) -> BackendError {
    let message = format!("the run folder cannot be prepared: {error}; look at its room and rights");
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error)
}
