//! Starts a VMM's process, waits for its socket, and ends the processes that an interrupted launch
//! left.
//!
//! ```text
//!   start_vmm ─► ProcessGuard ─► wait_for_socket ─► configure ─► keep() ─► Process
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
use vmm_core::run_permit::RunPermit;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Command, KillError, Lookup, Process, ProcessMatch, adopt, search_by_argument};
use vmm_host::socket::DirWatch;
use vmm_host::{files, run_dir};

pub use vmm_host::process::ProcessGuard;

use crate::timeouts::{KILL_TIMEOUT, REAP_TIMEOUT, SWEEP_KILL_TIMEOUT};

/// The most processes that one sweep ends. More of them mean that another program starts new ones.
const SWEPT_AT_MOST: usize = 16;
/// The most bytes of a VMM's log that a message quotes.
const LOG_BYTES: usize = 2048;
/// The most lines of a VMM's log that a message quotes.
const LOG_LINES: usize = 8;

/// Starts a VMM by the command that `prepare` returns. `prepare` may block. The process is killed
/// if the returned guard is dropped before [`ProcessGuard::keep`].
///
/// # Errors
/// Returns the error of `prepare`; [`BackendErrorKind::NotInstalled`] if the program does not
/// exist; [`BackendErrorKind::Host`] if the program exists and cannot be run. No process runs after
/// an error.
pub async fn start_vmm<P>(prepare: P) -> Result<ProcessGuard, BackendError>
where
    P: FnOnce() -> Result<Command, BackendError> + Send + 'static,
{
    match tokio::task::spawn_blocking(move || start_blocking(prepare()?)).await {
        Ok(guard) => guard,
        Err(error) => Err(BackendError::new(
            BackendErrorKind::Host,
            Effect::NotApplied,
            format!("the start of the VMM was interrupted: {error}"),
        )),
    }
}

/// Starts a VMM as [`start_vmm`] does, on the calling thread. Blocks.
pub(crate) fn start_blocking(command: Command) -> Result<ProcessGuard, BackendError> {
    let program = command.program.clone();
    let started = vmm_host::process::start_guarded(command).map_err(|error| {
        let (kind, advice) = if program.is_file() {
            let advice = "check that the daemon's user may run it and write the runtime folder, and the host's limits of \
                          processes and open files";
            (BackendErrorKind::Host, advice)
        } else {
            let advice = "install it, or set UNKEY_VMCP_CH_BINARY, UNKEY_VMCP_FC_BINARY or UNKEY_VMCP_QEMU_BINARY to where \
                          it is";
            (BackendErrorKind::NotInstalled, advice)
        };
        let message = format!("{} could not be started: {error}; {advice}", program.display());
        BackendError::new(kind, Effect::NotApplied, message).caused_by(error)
    })?;
    point(FaultPoint::LaunchSpawned);
    Ok(started)
}

/// Returns the error for a VMM that ended too early: its exit status and the last lines of its log.
/// `what` names the moment of the end, as in "while it started".
pub async fn early_exit_error(process: &Process, log: &Path, what: &str) -> BackendError {
    let exit = match process.wait_for(REAP_TIMEOUT).await {
        Some(exit) => exit.to_string(),
        None => "the VMM closed its socket, but its process is still there".to_owned(),
    };
    let said = log_tail(log).await;
    let message = if said.is_empty() {
        format!("the VMM ended {what} ({exit}) and left nothing in its log")
    } else {
        format!("the VMM ended {what} ({exit}); its log ends with: {said}")
    };
    BackendError::refused(Effect::NotApplied, message)
}

/// Returns the last lines of a VMM's log for a message, or an empty text if there is no log.
pub async fn log_tail(log: &Path) -> String {
    let log = log.to_path_buf();
    let read = tokio::task::spawn_blocking(move || files::tail_lines(&log, LOG_BYTES, LOG_LINES));
    read.await.unwrap_or_default()
}

/// Connects to the socket that `process` is about to create at `path`, as soon as the process
/// listens there.
///
/// # Errors
/// [`BackendErrorKind::Gone`] as soon as the process has ended, so that the caller calls
/// [`early_exit_error`]; [`BackendErrorKind::Timeout`] after `timeout`; [`BackendErrorKind::Host`]
/// if the socket cannot be used.
pub async fn wait_for_socket(
    process: &Process,
    path: &Path,
    timeout: Duration,
) -> Result<UnixStream, BackendError> {
    let deadline = Instant::now() + timeout;
    // The arms are polled in this order. A process that listened and ended at once is still
    // reported as connected here, and the first call on the connection fails with the cause. The
    // exit comes before the deadline because it is the better explanation if both have happened.
    tokio::select! {
        biased;
        connected = connect_when_ready(path) => connected.inspect(|_| point(FaultPoint::LaunchConnected)).map_err(|error| {
            let message = format!("the VMM's socket {} cannot be used: {error}", path.display());
            BackendError::new(BackendErrorKind::Host, Effect::Unknown, message).caused_by(error)
        }),
        exit = process.wait() => {
            let message = format!("the VMM ended before its socket {} was there: {exit}", path.display());
            Err(BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, message))
        }
        () = tokio::time::sleep_until(deadline) => {
            let message = format!("the VMM did not listen on {} within {timeout:?}", path.display());
            Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
        }
    }
}

/// Waits until `permit` is open or `process` has ended. A spare VMM may end during this wait.
///
/// # Errors
/// Returns the error of [`RunPermit::wait`]; [`BackendErrorKind::Gone`] if the process has ended,
/// so that the caller calls [`early_exit_error`].
pub async fn wait_for_permit(permit: &RunPermit, process: &Process) -> Result<(), BackendError> {
    tokio::select! {
        biased;
        passed = permit.wait() => passed,
        exit = process.wait() => {
            let message = format!("the VMM ended before it received its configuration: {exit}");
            Err(BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, message))
        }
    }
}

/// The first pause between two attempts to connect, if no event announces the socket.
const FIRST_CONNECT_DELAY: Duration = Duration::from_micros(50);
/// The longest pause between two such attempts.
const MAX_CONNECT_DELAY: Duration = Duration::from_millis(5);
/// The resolution of the runtime's timers. A sleep of the runtime takes this long or longer.
const TIMER_RESOLUTION: Duration = Duration::from_millis(1);

async fn connect_when_ready(path: &Path) -> io::Result<UnixStream> {
    // The watch begins before the first attempt, because a socket that appears between an attempt
    // and a later watch would cause no event. If the kernel refuses the watch (it allows a user
    // about 128), the loop retries after pauses of 0.05 ms to 5 ms instead.
    let watch = path.parent().and_then(|dir| match DirWatch::new(dir) {
        Ok(watch) => Some(watch),
        Err(error) => {
            tracing::debug!(%error, "the run folder cannot be watched; retrying the connection at intervals instead");
            None
        }
    });
    let mut pause = FIRST_CONNECT_DELAY;
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        match (error.kind(), &watch) {
            (io::ErrorKind::NotFound, Some(watch)) => watch.changed().await?,
            // The socket is bound and the VMM does not listen yet, or the queue of the socket is
            // full. The kernel reports no event at the end of either state, so the loop pauses.
            (io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock | io::ErrorKind::NotFound, _) => {
                sleep_for(pause).await;
                pause = (pause * 2).min(MAX_CONNECT_DELAY);
            }
            _ => return Err(error),
        }
    }
}

/// Sleeps for `pause`, also if that is shorter than the resolution of the runtime's timers.
///
/// A VMM listens at once after it has bound its socket. With a timer of the runtime, each boot that
/// meets the moment between the two would wait for 1 to 2 ms.
pub(crate) async fn sleep_for(pause: Duration) {
    if pause >= TIMER_RESOLUTION {
        return tokio::time::sleep(pause).await;
    }
    #[expect(clippy::disallowed_methods, reason = "the thread is no executor thread")]
    let sleep = move || std::thread::sleep(pause);
    // The only error is the end of the runtime, which drops the caller as well.
    let _ = tokio::task::spawn_blocking(sleep).await;
}

/// Ends every process that has `dir` among its arguments and runs one of the programs
/// `executable_names`, waits for the end of each, and removes the sockets in `dir` with their
/// locks. A repeated call, or a missing `dir`, does no harm.
///
/// # Errors
/// [`BackendErrorKind::Timeout`] if a process outlives SIGKILL; [`BackendErrorKind::Host`] if a
/// process cannot be identified or killed. The sockets stay after an error.
pub async fn sweep(dir: &Path, executable_names: &[impl AsRef<str> + Sync]) -> Result<(), BackendError> {
    let mut swept = 0;
    // The processes are searched again after each end, because a process may have started another
    // one just before it ended. The number is limited, because a program that starts new ones
    // faster would keep the sweep busy for ever.
    while let Some(found) = first_user_of(dir, executable_names).await? {
        if swept == SWEPT_AT_MOST {
            let message = format!(
                "new processes that use {} are started all the time; end the program that starts them",
                dir.display()
            );
            return Err(host_error(message));
        }
        swept += 1;
        end(&found, dir).await?;
    }
    // The sockets are removed last. A socket that is removed while its VMM lives would leave a VMM
    // that no daemon can reach.
    let owned = dir.to_path_buf();
    blocking(move || run_dir::remove_sockets(&owned)).await
}

/// Ends one process that uses a run folder, if the identity that was found still names the same
/// process.
async fn end(found: &ProcessMatch, dir: &Path) -> Result<(), BackendError> {
    let process = match adopt(&found.identity) {
        Lookup::Alive(process) => process,
        Lookup::Gone => return Ok(()),
        Lookup::Unprovable(why) => return Err(host_error(format!("{why}; end it by hand and try again"))),
    };
    tracing::info!(pid = process.pid(), dir = %dir.display(), "an orphaned VMM is ended");
    kill_within(&process, SWEEP_KILL_TIMEOUT).await
}

/// Kills a VMM and waits until the process has ended.
///
/// # Errors
/// [`BackendErrorKind::Host`] if the signal is refused; [`BackendErrorKind::Timeout`] if the
/// process outlives SIGKILL.
pub(crate) async fn kill(process: &Process) -> Result<(), BackendError> {
    kill_within(process, KILL_TIMEOUT).await
}

async fn kill_within(process: &Process, limit: Duration) -> Result<(), BackendError> {
    match process.kill_and_wait(limit).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let kind = match error {
                KillError::Refused { .. } => BackendErrorKind::Host,
                KillError::StillThere { .. } => BackendErrorKind::Timeout,
            };
            Err(BackendError::new(kind, Effect::Unknown, error.to_string()).caused_by(error))
        }
    }
}

/// Returns the first process that uses `dir`. The search is repeated after each process that was
/// ended, because that process may have started another one.
async fn first_user_of(
    dir: &Path,
    executable_names: &[impl AsRef<str>],
) -> Result<Option<ProcessMatch>, BackendError> {
    let users = search_by_argument(dir.to_path_buf()).await.map_err(not_cleared)?;
    Ok(users.into_iter().find(|user| user.runs_one_of(executable_names)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, BackendError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(not_cleared(error)),
        Err(error) => Err(host_error("the clearing of a run folder was interrupted").caused_by(error)),
    }
}

fn not_cleared(error: io::Error) -> BackendError {
    host_error(format!("the run folder's users cannot be cleared: {error}")).caused_by(error)
}

fn host_error(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Host, Effect::Unknown, message)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::PathBuf;

    use tokio::net::UnixListener;
    use vmm_host::process::ExitStatus;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sh(dir: &Path, script: &str) -> Command {
        Command::new("/bin/sh", ["-c", script], dir.join("log"))
    }

    async fn start(command: Command) -> Result<ProcessGuard, BackendError> {
        start_vmm(move || Ok(command)).await
    }

    /// Starts a process that has `argument` among its arguments.
    async fn tail(dir: &Path, argument: &Path) -> ProcessGuard {
        let args: [OsString; 2] = ["-f".into(), argument.into()];
        start(Command::new(tail_program(), args, dir.join("tail.log"))).await.unwrap()
    }

    fn tail_program() -> PathBuf {
        vmm_host::path::find_program("tail", Some("/usr/bin:/bin".as_ref())).unwrap()
    }

    #[tokio::test]
    async fn a_dropped_process_guard_kills_the_vmm() {
        let dir = tempfile::tempdir().unwrap();
        let guard = start(sh(dir.path(), "exec sleep 600")).await.unwrap();
        let process = guard.process().clone();
        drop(guard);
        assert_eq!(process.wait().await.status, Some(ExitStatus::Signal(9)));

        let kept = start(sh(dir.path(), "read never; exit 7")).await.unwrap().keep();
        assert_eq!(kept.wait().await.status, Some(ExitStatus::Code(7)));
    }

    #[tokio::test]
    async fn a_missing_program_differs_from_a_failing_program() {
        let dir = tempfile::tempdir().unwrap();
        let start = |program: &str, log: &str| start(Command::new(program, ["x"], dir.path().join(log)));
        let missing = start("/nowhere/vmm", "log").await.unwrap_err();
        assert_eq!((missing.kind, missing.effect), (BackendErrorKind::NotInstalled, Effect::NotApplied));
        let no_log = start("/bin/sh", "no/folder/log").await.unwrap_err();
        assert_eq!((no_log.kind, no_log.effect), (BackendErrorKind::Host, Effect::NotApplied));
        assert!(no_log.message.contains("no/folder/log"), "{no_log}");
    }

    #[tokio::test]
    async fn an_early_exit_is_explained_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let process = start(sh(dir.path(), "echo no such disk >&2; exit 2")).await.unwrap().keep();
        let error = early_exit_error(&process, &dir.path().join("log"), "while it started").await;
        assert_eq!(error.kind, BackendErrorKind::Rejected);
        assert_eq!(
            error.message,
            "the VMM ended while it started (exit status 2); its log ends with: no such disk"
        );
        let silent = early_exit_error(&process, &dir.path().join("none"), "while it started").await;
        assert!(silent.message.ends_with("left nothing in its log"), "{silent}");
    }

    #[tokio::test]
    async fn a_socket_is_used_as_soon_as_it_exists() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let vmm = start(sh(dir.path(), "exec sleep 600")).await.unwrap();
        // The first poll of the wait finds no socket, and then the socket appears.
        let (connected, _listener) = tokio::join!(wait_for_socket(&vmm, &path, LONG), async {
            std::fs::write(dir.path().join("another"), "").unwrap();
            tokio::task::yield_now().await;
            UnixListener::bind(&path).unwrap()
        });
        connected.unwrap();
        wait_for_socket(&vmm, &path, LONG).await.unwrap();
    }

    #[tokio::test]
    async fn the_launch_waits_for_a_socket_to_listen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let vmm = start(sh(dir.path(), "exec sleep 600")).await.unwrap();
        // A socket without a listener looks the same before and after its listener exists.
        drop(UnixListener::bind(&path).unwrap());
        let (connected, _listener) = tokio::join!(wait_for_socket(&vmm, &path, LONG), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            std::fs::remove_file(&path).unwrap();
            UnixListener::bind(&path).unwrap()
        });
        connected.unwrap();
    }

    #[tokio::test]
    async fn an_exit_of_the_process_ends_the_wait_for_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = start(sh(dir.path(), "exit 1")).await.unwrap();
        let error = wait_for_socket(&vmm, &dir.path().join("s"), LONG).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Gone, Effect::NotApplied));
        assert!(error.message.ends_with("exit status 1"), "{error}");
    }

    #[tokio::test]
    async fn the_wait_for_a_socket_has_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = start(sh(dir.path(), "exec sleep 600")).await.unwrap();
        let error =
            wait_for_socket(&vmm, &dir.path().join("s"), Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Timeout);
    }

    #[tokio::test]
    async fn a_sweep_ends_only_vmms_of_the_run_folder() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("0a");
        std::fs::create_dir(&dir).unwrap();
        let (socket, log, console) = (dir.join("api.sock"), dir.join("log"), dir.join("console"));
        let neighbour = base.path().join("0ab");
        drop(UnixListener::bind(&socket).unwrap());
        std::fs::write(dir.join("api.sock.lock"), "").unwrap();
        for file in [&log, &console, &neighbour] {
            std::fs::write(file, "").unwrap();
        }
        let (one, two) = (tail(base.path(), &log).await, tail(base.path(), &console).await);
        let neighbour = tail(base.path(), &neighbour).await;

        sweep(&dir, &["some-other-program"]).await.unwrap();
        assert!(!one.has_ended() && !two.has_ended(), "an operator may look at the log with any program");
        assert!(!socket.exists() && !dir.join("api.sock.lock").exists());

        drop(UnixListener::bind(&socket).unwrap());
        let name = vmm_host::path::real_name(&tail_program()).unwrap();
        sweep(&dir, &["some-other-program", &name]).await.unwrap();
        assert!(one.has_ended() && two.has_ended());
        assert!(!neighbour.has_ended());
        assert!(!socket.exists() && log.exists());

        sweep(&dir, &[&name]).await.unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        sweep(&dir, &[&name]).await.unwrap();
        assert!(!neighbour.has_ended());
    }
}
