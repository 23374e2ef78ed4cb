//! Starting a process that outlives the daemon.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags};
use tokio::process::Child;
use tokio::sync::watch;
use tracing::Instrument;
use vmm_core::store::ProcessIdentity;

use super::{Process, ProcessExit, Signal, boot_id, procfs};
use crate::ready;

/// What a child may know of the daemon's environment. Everything else, secrets included, stays here.
const ENVIRONMENT: [&str; 7] = ["PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ"];

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
    /// Another file for stdout, treated as `log` is.
    pub stdout: Option<PathBuf>,
    /// Where the process lives.
    pub working_dir: PathBuf,
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
    /// A process without input that lives in the folder of its log.
    pub fn new(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        log: impl Into<PathBuf>,
    ) -> Self {
        let log = log.into();
        let working_dir = log.parent().unwrap_or(Path::new("/")).to_path_buf();
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            log,
            stdin: Stdin::Null,
            stdout: None,
            working_dir,
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

/// Starts a process that outlives the daemon: own process group, nothing inherited, its exit published when it comes.
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
    match tokio::task::spawn_blocking(move || start(command)).await {
        Ok(started) => started,
        Err(error) => Err(io::Error::other(error)),
    }
}

fn start(command: Command) -> io::Result<Guarded> {
    if !command.program.is_absolute() {
        let message = format!("{} is not an absolute path", command.program.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let boot_id = boot_id()?;
    let log = append_to(&command.log)?;
    let stdout = match &command.stdout {
        Some(path) => append_to(path)?,
        None => log.try_clone()?,
    };
    let stdin = match command.stdin {
        Stdin::Null => Stdio::null(),
        Stdin::File(fd) => Stdio::from(fd),
    };
    // Absolute program, own process group and no closure: std takes posix_spawn, which does not copy the daemon's memory.
    let mut child = tokio::process::Command::new(&command.program)
        .args(&command.args)
        .current_dir(&command.working_dir)
        .env_clear()
        .envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .stdin(stdin)
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(log))
        .process_group(0)
        .kill_on_drop(false)
        .spawn()?;
    match identify(&child, boot_id) {
        Ok((identity, pidfd)) => Ok(Guarded { process: reap(child, identity, pidfd), armed: true }),
        Err(error) => {
            // Not reaped yet, so the pid still means this child.
            if let Err(error) = child.start_kill() {
                tracing::error!(%error, "a process that could not be identified could not be killed either");
            }
            tokio::spawn(async move { child.wait().await });
            Err(error)
        }
    }
}

/// Nobody has waited for the child yet, so its pid cannot be another's, be it a zombie by now.
fn identify(child: &Child, boot_id: String) -> io::Result<(ProcessIdentity, OwnedFd)> {
    let pid = child.id().ok_or_else(|| io::Error::other("the process was reaped by somebody else"))?;
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or_else(|| io::Error::other("the process id is out of range"))?;
    let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
    let start_ticks = procfs::stat(pid)?.start_ticks;
    Ok((ProcessIdentity { pid, start_ticks, boot_id }, pidfd))
}

/// Starts the task that reaps the child and publishes its exit.
fn reap(mut child: Child, identity: ProcessIdentity, pidfd: OwnedFd) -> Process {
    let (ended, exit) = watch::channel(None);
    let pid = identity.pid;
    let pidfd = Arc::new(pidfd);
    let watched = Arc::clone(&pidfd);
    let task = async move {
        let exit = match child.wait().await {
            Ok(status) => ProcessExit::from(status),
            // Somebody else reaped it, or will: a daemon that was started with SIGCHLD ignored has its children reaped by
            // the kernel. The pidfd still tells when.
            Err(error) => {
                tracing::warn!(%error, "the exit status of a process cannot be read");
                if let Err(error) = ready::wait_readable(watched).await {
                    tracing::error!(%error, "a process can no longer be watched");
                    return;
                }
                ProcessExit::UNKNOWN
            }
        };
        ended.send_replace(Some(exit));
    };
    tokio::spawn(task.instrument(tracing::debug_span!("child process", pid)));
    Process::new(identity, pidfd, exit)
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

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
