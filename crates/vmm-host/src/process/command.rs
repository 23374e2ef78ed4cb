//! Starting a process that outlives the daemon.

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
use crate::named::named;
use crate::ready;

/// What a child may know of the daemon's environment. Everything else, secrets included, stays here.
const ENVIRONMENT: [&str; 7] = ["PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ"];

/// Where input is empty and output is lost.
const NOWHERE: &str = "/dev/null";

/// Held by whoever starts a process. Until it has exec'ed a child has a copy of every descriptor of the daemon, so that what the
/// daemon closes meanwhile stays open for a moment.
static STARTING: RwLock<()> = RwLock::new(());

/// Says that a process is about to be started by other means than [`spawn`]; to be kept until it has been.
pub fn starting() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Does what ends with the close of a descriptor, at a moment at which no child has a copy of it. Blocks for as long as
/// processes that are being started take to exec, some milliseconds.
pub(crate) fn close_for_good<T>(close: impl FnOnce() -> T) -> T {
    let _nobody_starts = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    close()
}

/// What to start, and where its output goes.
#[derive(Debug)]
pub struct Command {
    /// The program, by its absolute path.
    pub program: PathBuf,
    /// Its arguments, without the program's own name.
    pub args: Vec<OsString>,
    /// The file that takes stdout and stderr. Made with mode 0600 where it is missing, else appended to.
    pub log: PathBuf,
    /// Where input comes from.
    pub stdin: Stdin,
    /// Another file for stdout, treated as `log` is; `/dev/null` throws it away.
    pub stdout: Option<PathBuf>,
}

/// Where a process's input comes from.
#[derive(Debug)]
pub enum Stdin {
    /// Nowhere: it reads an end of file.
    Null,
    /// An open file, pipe or socket.
    File(OwnedFd),
}

impl Command {
    /// A process without input.
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
        }
    }
}

/// A process that is killed when this is dropped, unless it was kept.
#[derive(Debug)]
pub struct Guarded {
    process: Process,
    armed: bool,
}

impl Guarded {
    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Lets the process outlive the guard.
    pub fn keep(mut self) -> Process {
        self.armed = false;
        self.process.clone()
    }
}

impl std::ops::Deref for Guarded {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // The task that was started with it reaps it.
        if self.armed
            && let Err(error) = self.process.signal(Signal::KILL)
        {
            tracing::error!(pid = self.process.pid(), %error, "a process that nobody wants could not be killed");
        }
    }
}

/// Starts a process that outlives the daemon: own session, nothing inherited, its exit published when it comes.
///
/// # Errors
/// What opening the log or starting the program says. Nothing runs then.
pub async fn spawn(command: Command) -> io::Result<Process> {
    Ok(spawn_guarded(command).await?.keep())
}

/// As [`spawn`], but the process is killed if the answer, or this very call, is dropped.
///
/// # Errors
/// What opening the log or starting the program says. Nothing runs then.
pub async fn spawn_guarded(command: Command) -> io::Result<Guarded> {
    // Starting suspends the calling thread until the child has exec'ed, and the files may be slow.
    match tokio::task::spawn_blocking(move || start_guarded(command)).await {
        Ok(started) => started,
        Err(error) => Err(io::Error::other(error)),
    }
}

/// As [`spawn_guarded`], for whoever is on a thread for blocking work already.
///
/// # Errors
/// As [`spawn_guarded`].
///
/// # Panics
/// Where no runtime has been entered.
pub fn start_guarded(command: Command) -> io::Result<Guarded> {
    if !command.program.is_absolute() {
        let message = format!("{} is not an absolute path", command.program.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let log = append_to(&command.log)?;
    let stdout = match &command.stdout {
        // The one device that may stand where a file does.
        Some(path) if path == Path::new(NOWHERE) => OpenOptions::new().write(true).open(NOWHERE)?,
        Some(path) => append_to(path)?,
        None => log.try_clone()?,
    };
    let stdin = match command.stdin {
        Stdin::Null => OwnedFd::from(File::open(NOWHERE)?),
        Stdin::File(fd) => fd,
    };
    let child = posix_spawn(&command.program, &command.args, [&stdin, &stdout.into(), &log.into()])?;
    match watch_child(child) {
        Ok(process) => Ok(Guarded { process, armed: true }),
        Err(error) => {
            end(child);
            Err(error)
        }
    }
}

/// Makes a handle of a child that nobody has waited for: its pid cannot be another's, even if the child is a zombie by now.
fn watch_child(child: Pid) -> io::Result<Process> {
    let pidfd = rustix::process::pidfd_open(child, PidfdFlags::empty())?;
    let identity = procfs::identify(child.as_raw_nonzero().get().unsigned_abs())?;
    reap(identity, pidfd)
}

/// Kills and reaps a child that cannot be watched. No task waits for it.
fn end(child: Pid) {
    let ended = rustix::process::kill_process(child, Signal::KILL).and_then(|()| {
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))
    });
    if let Err(error) = ended {
        tracing::error!(%error, "a process that could not be watched could not be ended either");
    }
}

/// Starts `program` in a session of its own, without copying the daemon's memory as fork() would.
///
/// The session is what lets a VM outlive the daemon: where parent and child share one, the death of the parent makes the kernel
/// send SIGHUP to a child that is stopped just then.
fn posix_spawn(program: &Path, args: &[OsString], stdio: [&OwnedFd; 3]) -> io::Result<Pid> {
    let mut files = PosixSpawnFileActions::init()?;
    for (fd, target) in stdio.into_iter().zip(0..) {
        files.add_dup2(fd.as_raw_fd(), target)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    // What the daemon ignores or blocks is its own affair.
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
        let _starting = starting();
        nix::spawn::posix_spawn(program, &files, &attributes, &args, &environment)
    };
    let pid = spawned.map_err(|error| named(program, &error.into()))?;
    Pid::from_raw(pid.as_raw()).ok_or_else(|| io::Error::other("the kernel gave no process id"))
}

/// What a process that the daemon starts knows of the daemon's environment: names and values.
pub fn environment() -> impl Iterator<Item = (&'static str, OsString)> {
    ENVIRONMENT.iter().filter_map(|&name| Some((name, std::env::var_os(name)?)))
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Starts the task that reaps the child and publishes its exit.
fn reap(identity: ProcessIdentity, pidfd: OwnedFd) -> io::Result<Process> {
    let (ended, exit) = watch::channel(None);
    let pid = identity.pid;
    let pidfd = Arc::new(pidfd);
    let watched = ready::readable(Arc::clone(&pidfd))?;
    let task = async move {
        if let Err(error) = watched.readable().await {
            tracing::error!(%error, "a process can no longer be watched");
            return;
        }
        let waited = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(watched.get_ref().as_fd()), WaitIdOptions::EXITED)
        });
        let exit = match waited {
            Ok(Some(status)) => ProcessExit::from(status),
            Ok(None) => ProcessExit::UNKNOWN,
            // A daemon that was started with SIGCHLD ignored has its children reaped by the kernel.
            Err(error) => {
                tracing::warn!(%error, "the exit status of a process cannot be read");
                ProcessExit::UNKNOWN
            }
        };
        ended.send_replace(Some(exit));
    };
    tokio::spawn(task.instrument(tracing::debug_span!("child process", pid)));
    Ok(Process::new(identity, pidfd, exit))
}

/// Opens a regular file to append to. Appending keeps offsets true where the file is cut or punched meanwhile.
fn append_to(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK a FIFO in this place would hold the daemon until somebody reads it.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| named(path, &error))?;
    if !file.metadata()?.is_file() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(named(path, &error));
    }
    // The child gets an ordinary file: what it shares with us includes this flag.
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}
