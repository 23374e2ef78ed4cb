//! Starts processes that outlive the daemon.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags};
use nix::sys::signal::SigSet;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions};
use tokio::sync::watch;
use tracing::Instrument;
use vmm_core::store::ProcessIdentity;

use super::{Process, ProcessExit, Signal, procfs};
use crate::async_fd;
use crate::path_errors::named;

/// The variables of the daemon's environment that a child gets. All others stay out, because they
/// may hold secrets.
const ENVIRONMENT: [&str; 7] = ["PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ"];

/// The number of [`Command::kept`] in the process.
pub const KEPT_DESCRIPTOR: i32 = 3;

/// The device that reads as empty and discards writes.
const NOWHERE: &str = "/dev/null";

/// Held for reading while a process is being started. Until its exec the child has a copy of every
/// descriptor of the daemon, so a descriptor that the daemon closes meanwhile stays open in the
/// child.
static STARTING: RwLock<()> = RwLock::new(());

/// Announces that a process is about to be started by other means than [`spawn`]. The caller keeps
/// the guard until the process has exec'ed.
pub fn exec_guard() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `close`, which closes a descriptor, at a moment at which no child has a copy of that
/// descriptor. Blocks until all processes that are being started have exec'ed, some milliseconds.
pub(crate) fn close_for_good<T>(close: impl FnOnce() -> T) -> T {
    let _nobody_starts = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    close()
}

/// A program to start, with its arguments and the files for its input and output.
#[derive(Debug)]
pub struct Command {
    /// The program, by its absolute path.
    pub program: PathBuf,
    /// The program's arguments, without its own name.
    pub args: Vec<OsString>,
    /// The file that takes stdout and stderr. A missing file is created with mode 0600; output is
    /// appended to one that exists.
    pub log: PathBuf,
    /// The source of stdin.
    pub stdin: Stdin,
    /// Another file for stdout, created and appended to like `log`; `/dev/null` discards the
    /// output.
    pub stdout: Option<PathBuf>,
    /// A file that the process holds open as [`KEPT_DESCRIPTOR`] and does not use.
    pub kept: Option<OwnedFd>,
}

/// The source of a process's stdin.
#[derive(Debug)]
pub enum Stdin {
    /// The process reads an end of file.
    Null,
    /// The process reads this open file, pipe or socket.
    File(OwnedFd),
}

impl Command {
    /// Returns a command without input that writes stdout and stderr to `log`.
    pub fn new(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        log: impl Into<PathBuf>,
    ) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            log: log.into(),
            stdin: Stdin::Null,
            stdout: None,
            kept: None,
        }
    }
}

/// A process that is killed when the guard is dropped, unless [`ProcessGuard::keep`] was called.
#[derive(Debug)]
pub struct ProcessGuard {
    process: Process,
    armed: bool,
}

impl ProcessGuard {
    /// Returns the process. The guard keeps it.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Disarms the guard and returns the process, which then outlives it.
    pub fn keep(mut self) -> Process {
        self.armed = false;
        self.process.clone()
    }
}

impl std::ops::Deref for ProcessGuard {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        // The task that was started with the process reaps it.
        if self.armed
            && let Err(error) = self.process.signal(Signal::KILL)
        {
            tracing::error!(pid = self.process.pid(), %error, "a process whose start was called off could not be killed");
        }
    }
}

/// Starts a process that outlives the daemon. The process has a session of its own, inherits
/// nothing but its standard streams and [`Command::kept`], and its exit is published in the returned handle.
///
/// # Errors
/// Returns the error of opening a file or of starting the program. No process runs then.
pub async fn spawn(command: Command) -> io::Result<Process> {
    Ok(spawn_guarded(command).await?.keep())
}

/// Starts a process like [`spawn`]. The process is killed if the guard, or the future of this call,
/// is dropped.
///
/// # Errors
/// Returns the error of opening a file or of starting the program. No process runs then.
pub async fn spawn_guarded(command: Command) -> io::Result<ProcessGuard> {
    // posix_spawn(3) suspends the calling thread until the child has exec'ed, and opening the files
    // may block. If this future is dropped, the closure still runs to its end and drops the guard,
    // which kills the process.
    match tokio::task::spawn_blocking(move || start_guarded(command)).await {
        Ok(started) => started,
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Starts a process like [`spawn_guarded`]. The caller is on a thread for blocking work.
///
/// # Errors
/// Fails as [`spawn_guarded`] does.
///
/// # Panics
/// Panics outside a Tokio runtime.
pub fn start_guarded(command: Command) -> io::Result<ProcessGuard> {
    // A relative path would depend on the daemon's working directory.
    if !command.program.is_absolute() {
        let message = format!("{} is not an absolute path", command.program.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let log = append_to(&command.log)?;
    let stdout = match &command.stdout {
        // /dev/null is the only device that is accepted; `append_to` refuses all others.
        Some(path) if path == Path::new(NOWHERE) => OpenOptions::new().write(true).open(NOWHERE)?,
        Some(path) => append_to(path)?,
        None => log.try_clone()?,
    };
    let stdin = match command.stdin {
        Stdin::Null => OwnedFd::from(File::open(NOWHERE)?),
        Stdin::File(fd) => fd,
    };
    // Every file is open by now, so an error up to here leaves no process behind.
    let child = posix_spawn(
        &command.program,
        &command.args,
        [&stdin, &stdout.into(), &log.into()],
        command.kept.as_ref(),
    )?;
    match watch_child(child) {
        Ok(process) => Ok(ProcessGuard { process, armed: true }),
        // Without a pidfd and an identity the process could never be adopted or ended safely.
        Err(error) => {
            end(child);
            Err(error)
        }
    }
}

/// Makes a handle of a child that was not waited for. The pid means this child, because the
/// kernel keeps the number of a zombie until its parent waits.
fn watch_child(child: Pid) -> io::Result<Process> {
    let pidfd = rustix::process::pidfd_open(child, PidfdFlags::empty())?;
    let identity = procfs::identify(child.as_raw_nonzero().get().unsigned_abs())?;
    reap(identity, pidfd)
}

/// Kills and reaps a child that cannot be watched and that no task waits for.
fn end(child: Pid) {
    let ended = rustix::process::kill_process(child, Signal::KILL).and_then(|()| {
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))
    });
    if let Err(error) = ended {
        tracing::error!(%error, "a started process that cannot be watched could not be killed");
    }
}

/// Starts `program` in a session of its own and returns its pid. posix_spawn(3) does not copy the
/// daemon's memory, as fork(2) would.
///
/// The session lets a VM outlive the daemon: when a parent dies in a session that it shares with
/// its child, the kernel sends SIGHUP to a child that is stopped at that moment.
fn posix_spawn(
    program: &Path,
    args: &[OsString],
    stdio: [&OwnedFd; 3],
    kept: Option<&OwnedFd>,
) -> io::Result<Pid> {
    let mut files = PosixSpawnFileActions::init()?;
    // The copies made by dup2 are not close-on-exec, so the child keeps these descriptors. All other
    // descriptors of the daemon are close-on-exec. The kept descriptor follows the standard streams
    // as KEPT_DESCRIPTOR, and comes last, because its number may be that of another one's original.
    for (fd, target) in stdio.into_iter().chain(kept).zip(0..) {
        files.add_dup2(fd.as_raw_fd(), target)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    // A child inherits ignored and blocked signals. They are reset, because a VMM that ignored
    // SIGTERM could not be asked to end.
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    let own_session = PosixSpawnFlags::from_bits_retain(nix::libc::POSIX_SPAWN_SETSID.into());
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | own_session,
    )?;
    let args = std::iter::once(program.as_os_str())
        .chain(args.iter().map(OsString::as_os_str))
        .map(c_string)
        .collect::<io::Result<Vec<_>>>()?;
    let environment = environment()
        .map(|(name, value)| {
            let mut entry = OsString::from(format!("{name}="));
            entry.push(value);
            c_string(&entry)
        })
        .collect::<io::Result<Vec<_>>>()?;
    let spawned = {
        // The guard ends when posix_spawn returns, and posix_spawn returns after the exec.
        let _starting = exec_guard();
        nix::spawn::posix_spawn(program, &files, &attributes, &args, &environment)
    };
    let pid = spawned.map_err(|error| named(program, &error.into()))?;
    Pid::from_raw(pid.as_raw()).ok_or_else(|| io::Error::other("the kernel gave no process id"))
}

/// Returns the names and values of the environment that a started process gets.
pub fn environment() -> impl Iterator<Item = (&'static str, OsString)> {
    ENVIRONMENT.iter().filter_map(|&name| Some((name, std::env::var_os(name)?)))
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Starts the task that reaps the child and publishes its exit. Takes the pidfd of the child.
fn reap(identity: ProcessIdentity, pidfd: OwnedFd) -> io::Result<Process> {
    let (ended, exit) = watch::channel(None);
    let pid = identity.pid;
    let pidfd = Arc::new(pidfd);
    let watched = async_fd::readable(Arc::clone(&pidfd))?;
    let task = async move {
        // The pidfd becomes readable when the process has ended. The zombie keeps the pid until
        // waitid has taken the exit status, so no other process can get the pid before.
        if let Err(error) = watched.readable().await {
            // Nothing is published, because the process may still run.
            tracing::error!(%error, "a process can no longer be watched");
            return;
        }
        let waited = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(watched.get_ref().as_fd()), WaitIdOptions::EXITED)
        });
        let exit = match waited {
            Ok(Some(status)) => ProcessExit::from(status),
            Ok(None) => ProcessExit::UNKNOWN,
            // waitid fails where the daemon was started with SIGCHLD ignored, because the kernel
            // then reaps children itself. The readable pidfd proves the end even so.
            Err(error) => {
                tracing::warn!(%error, "the exit status of a process cannot be read");
                ProcessExit::UNKNOWN
            }
        };
        ended.send_replace(Some(exit));
    };
    tokio::spawn(task.instrument(tracing::debug_span!(parent: None, "child process", pid)));
    Ok(Process::new(identity, pidfd, exit))
}

/// Opens a regular file for appending. O_APPEND keeps the child's writes at the end of the file
/// when the daemon truncates or punches the file meanwhile.
fn append_to(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK the open of a FIFO would block until another process reads it.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| named(path, &error))?;
    // The check is made on the open file, so the file cannot be exchanged after the check.
    if !file.metadata()?.is_file() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(named(path, &error));
    }
    // The flags belong to the open file, which the child shares. O_NONBLOCK is taken off, because
    // the child expects an ordinary file.
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}
