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
use super::config_pipe::ConfigPipe;
use super::spare::{ConfigIntake, UnconfiguredVmm};
use crate::launch;
use crate::program::{InstalledProgram, Program};

/// The most tasks of one start: the version is asked for once, and the run folder is swept once.
const VISITS: usize = 3;
/// The longest time in which a VMM must listen on its socket.
pub(crate) const REST_LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// The result of one task of blocking work.
enum StartAttempt {
    Started(StartedProcess),
    /// The version of this executable is not known yet.
    UnknownVersion,
    /// The socket of an earlier run exists, and perhaps its VMM.
    StaleSocket,
}

/// The command that starts a VMM.
pub(crate) struct PreparedStart {
    pub(crate) command: Command,
    /// The pipe from which the VMM reads its configuration, or `None` if it is configured by calls.
    pub(crate) pipe: Option<ConfigPipe>,
}

/// A process that was started, with the executable that it runs.
struct StartedProcess {
    guard: ProcessGuard,
    program: InstalledProgram,
    pipe: Option<ConfigPipe>,
}

/// Starts `program` in the run folder `dir` by the command that `prepare` makes of both. Connects to
/// a VMM that is configured by calls. `prepare` creates the files that the VMM needs, and may block.
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
    P: Fn(&Path, &Path) -> io::Result<PreparedStart> + Clone + Send + 'static,
{
    let socket = dir.join(SOCKET);
    run_dir::socket_path_fits(&socket)
        .map_err(|why| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, why))?;
    let StartedProcess { guard, program, pipe } =
        start_process(program, dir, console.clone(), prepare).await?;
    // The VMM listens only after it has read the pipe.
    if let Some(pipe) = pipe {
        return Ok(UnconfiguredVmm { guard, intake: ConfigIntake::Pipe(pipe), program, console });
    }
    let connected = async {
        let stream = launch::wait_for_socket(&guard, &socket, REST_LISTEN_TIMEOUT).await?;
        C::over(&socket, stream, guard.pid()).await
    };
    match connected.await {
        Ok(client) => Ok(UnconfiguredVmm { guard, intake: ConfigIntake::Calls(client), program, console }),
        Err(error) => Err(failed(guard, error, &dir.join(LOG)).await),
    }
}

async fn start_process<P>(
    program: &Arc<Program>,
    dir: &Path,
    console: Option<PathBuf>,
    prepare: P,
) -> Result<StartedProcess, BackendError>
where
    P: Fn(&Path, &Path) -> io::Result<PreparedStart> + Clone + Send + 'static,
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
                let PreparedStart { command, pipe } = prepare(program, &dir_of)?;
                Ok(PreparedStart { command: Command { stdout: Some(console), ..command }, pipe })
            })
        });
        match visit.await.map_err(|error| host_error(io::Error::other(error)))?? {
            StartAttempt::Started(started) => return Ok(started),
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
    prepare: impl FnOnce(&Path) -> io::Result<PreparedStart>,
) -> Result<StartAttempt, BackendError> {
    let Some(known) = program.known()? else { return Ok(StartAttempt::UnknownVersion) };
    // A path that cannot be examined counts as a stale socket, because the sweep reports the
    // reason.
    if dir.join(SOCKET).try_exists().unwrap_or(true) {
        return Ok(StartAttempt::StaleSocket);
    }
    let PreparedStart { command, pipe } = prepare(known.path()).map_err(host_error)?;
    let guard = launch::start_blocking(command)?;
    Ok(StartAttempt::Started(StartedProcess { guard, program: known, pipe }))
}

fn host_error(error: io::Error) -> BackendError {
    let message = format!("the run folder cannot be prepared: {error}; look at its room and rights");
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error)
}
