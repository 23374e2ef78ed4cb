//! Starting a VMM's process, waiting for its socket, and clearing up after a launch that broke.
//!
//! ```text
//!   start_vmm ──► Guarded ──► wait_for_socket ──► configure ──► keep() ──► Process
//!                   │ dropped on the way: killed and reaped
//!                   ▼
//!   sweep: whatever a dead daemon's launch left, found by the run folder in its arguments
//! ```

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_host::process::{Command, Found, Lookup, Process, adopt, find_by_argument};
use vmm_host::socket::DirWatch;
use vmm_host::{files, run_dir};

pub use vmm_host::process::Guarded;

/// How long a killed VMM may take to go.
const KILLING: Duration = Duration::from_secs(1);
/// How long a VMM that broke its connection may take to be reaped, so that its exit status can be told.
const REAPING: Duration = Duration::from_secs(1);
/// How much of a VMM's log a message carries.
const LOG_BYTES: usize = 2048;
/// How many lines of a VMM's log a message carries.
const LOG_LINES: usize = 8;

/// Starts a VMM. It is killed if the answer is dropped before [`Guarded::keep`].
///
/// # Errors
/// [`BackendErrorKind::NotInstalled`] where the program cannot be run, [`BackendErrorKind::Host`] otherwise. Nothing runs then.
pub async fn start_vmm(command: Command) -> Result<Guarded, BackendError> {
    let program = command.program.clone();
    vmm_host::process::spawn_guarded(command).await.map_err(|error| {
        let missing = !program.is_file();
        let (kind, advice) = if missing {
            (BackendErrorKind::NotInstalled, "install it, or correct the configured path")
        } else {
            (BackendErrorKind::Host, "check the runtime folder, and the host's limits of processes and open files")
        };
        let message = format!("{} could not be started: {error}; {advice}", program.display());
        BackendError::new(kind, Effect::NotApplied, message).caused_by(error)
    })
}

/// Explains the end of a VMM that should have gone on: its exit status and the last lines of its log. `what` is what it was
/// doing, as in "while it started".
pub async fn died_early(process: &Process, log: &Path, what: &str) -> BackendError {
    let exit = match process.wait_for(REAPING).await {
        Some(exit) => exit.to_string(),
        None => "it closed its socket, but its process is still there".to_owned(),
    };
    let said = last_words(log).await;
    let message = if said.is_empty() {
        format!("the VMM ended {what} ({exit}) and left nothing in its log")
    } else {
        format!("the VMM ended {what} ({exit}); its last words: {said}")
    };
    BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message)
}

/// Reads the last lines of a VMM's log, for a message. Empty where there are none.
pub async fn last_words(log: &Path) -> String {
    let log = log.to_path_buf();
    let read = tokio::task::spawn_blocking(move || files::tail_lines(&log, LOG_BYTES, LOG_LINES));
    read.await.unwrap_or_default()
}

/// Connects to the socket that `process` is about to make at `path`, as soon as it listens there.
///
/// # Errors
/// [`BackendErrorKind::Gone`] as soon as the process has ended, for [`died_early`] to explain; [`BackendErrorKind::Timeout`] after
/// `within`; [`BackendErrorKind::Host`] where the socket may not be used.
pub async fn wait_for_socket(process: &Process, path: &Path, within: Duration) -> Result<UnixStream, BackendError> {
    let deadline = Instant::now() + within;
    tokio::select! {
        biased;
        connected = connect_when_there(path) => connected.map_err(|error| {
            let message = format!("the VMM's socket {} cannot be used: {error}", path.display());
            BackendError::new(BackendErrorKind::Host, Effect::Unknown, message).caused_by(error)
        }),
        exit = process.wait() => {
            let message = format!("the VMM ended before its socket {} was there: {exit}", path.display());
            Err(BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, message))
        }
        () = tokio::time::sleep_until(deadline) => {
            let message = format!("the VMM did not listen on {} within {within:?}", path.display());
            Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
        }
    }
}

/// The first and the longest pause where there is no event to wait for.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(5));

async fn connect_when_there(path: &Path) -> io::Result<UnixStream> {
    // The watch comes before the first look, so nothing falls between them. Without one (the kernel allows a user about 128)
    // there are pauses instead.
    let watch = path.parent().and_then(|dir| match DirWatch::new(dir) {
        Ok(watch) => Some(watch),
        Err(error) => {
            tracing::debug!(%error, "no watch on the run folder; asking again and again instead");
            None
        }
    });
    let mut pause = PAUSES.0;
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        match (error.kind(), &watch) {
            (io::ErrorKind::NotFound, Some(watch)) => watch.changed().await?,
            // Bound and not yet listening, or its queue is full: no event tells of the end of either.
            (io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock | io::ErrorKind::NotFound, _) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
            _ => return Err(error),
        }
    }
}

/// Ends every process that has `dir` in its arguments and runs one of the programs `executable_names`, waits until they have
/// gone, and removes the sockets in `dir` with their locks. Harmless when repeated, and where `dir` is not there.
///
/// # Errors
/// [`BackendErrorKind::Timeout`] where a process outlives SIGKILL, [`BackendErrorKind::Host`] where one is there that cannot be
/// proven or killed. The sockets stay then.
pub async fn sweep(dir: &Path, executable_names: &[&str]) -> Result<(), BackendError> {
    while let Some(found) = first_user_of(dir, executable_names).await? {
        match adopt(&found.identity) {
            Lookup::Gone => {}
            Lookup::Unprovable(why) => return Err(host_error(format!("{why}; end it by hand and try again"))),
            Lookup::Alive(process) => {
                if found.exe.is_none() {
                    return Err(host_error(format!(
                        "process {} uses {}, but its program is hidden from the daemon's user; end it by hand and try again",
                        process.pid(),
                        dir.display()
                    )));
                }
                tracing::info!(pid = process.pid(), dir = %dir.display(), "ending a VMM that nobody owns");
                process.kill_and_wait(KILLING).await.map_err(|error| {
                    BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, error.to_string()).caused_by(error)
                })?;
            }
        }
    }
    let owned = dir.to_path_buf();
    blocking(move || run_dir::remove_sockets(&owned)).await
}

/// Looks again after each process that was ended, for one of them may have just started another.
async fn first_user_of(dir: &Path, executable_names: &[&str]) -> Result<Option<Found>, BackendError> {
    let dir = dir.to_path_buf();
    let users = blocking(move || find_by_argument(&dir)).await?;
    Ok(users.into_iter().find(|user| {
        user.program_name().and_then(|name| name.to_str()).is_some_and(|name| executable_names.contains(&name))
    }))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, BackendError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(host_error(format!("the run folder's users cannot be cleared: {error}")).caused_by(error)),
        Err(error) => Err(host_error("the clearing of a run folder was broken off").caused_by(error)),
    }
}

fn host_error(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Host, Effect::Unknown, message)
}
