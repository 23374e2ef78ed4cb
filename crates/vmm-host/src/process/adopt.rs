//! Finding the process of an earlier run again, and proving that it is the same.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use tokio::sync::watch;
use tracing::Instrument;
use vmm_core::store::ProcessIdentity;

use super::{Process, ProcessExit, boot_id, has_ended, procfs};
use crate::ready;

/// What became of a process that was recorded earlier.
#[derive(Debug)]
pub enum Lookup {
    /// It is there, and is the same.
    Alive(Process),
    /// It has provably ended.
    Gone,
    /// Nothing proves either; the text says why. Whatever has that pid is to be left alone.
    Unprovable(String),
}

/// Looks for the process that `identity` means. Touches nothing.
///
/// Must be called inside a Tokio runtime with I/O: a task of it watches the process that is found.
pub fn adopt(identity: &ProcessIdentity) -> Lookup {
    match boot_id() {
        Ok(boot) if boot != identity.boot_id => return Lookup::Gone,
        Ok(_) => {}
        Err(error) => return Lookup::Unprovable(format!("the host's boot id cannot be read: {error}")),
    }
    if let Err(why) = same_namespaces(identity) {
        return Lookup::Unprovable(why);
    }
    if identity.pid <= 1 {
        return Lookup::Unprovable(format!("process id {} is never a VMM's", identity.pid));
    }
    let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
        return Lookup::Unprovable(format!("{} is no process id", identity.pid));
    };
    // The pidfd comes first: it holds on to one process, so what is read after it and matches is about that one.
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => return without_pidfd(identity, error),
    };
    match prove(identity, &pidfd) {
        Ok(true) => {}
        Ok(false) => return Lookup::Gone,
        Err(error) => {
            return Lookup::Unprovable(format!("process {} cannot be examined: {error}", identity.pid));
        }
    }
    match watch_exit(pidfd, identity) {
        Ok(process) => Lookup::Alive(process),
        Err(error) => Lookup::Unprovable(format!("process {} cannot be watched: {error}", identity.pid)),
    }
}

/// Refuses an identity that was read in other namespaces: a pid and a start time mean another process here, or nobody. Records
/// of earlier releases do not tell, and are taken for ours.
fn same_namespaces(identity: &ProcessIdentity) -> Result<(), String> {
    let Some(recorded) = identity.namespaces else { return Ok(()) };
    let here =
        procfs::namespaces().map_err(|error| format!("the daemon's namespaces cannot be read: {error}"))?;
    if recorded == here {
        return Ok(());
    }
    let kind = if recorded.pid == here.pid { "time" } else { "PID" };
    Err(format!(
        "process {} was recorded in another {kind} namespace than the one the daemon is in now, so its number proves nothing \
         here; run the daemon where it ran then, or end the process by hand and use force",
        identity.pid
    ))
}

/// Says whether the process behind `pidfd` is the one that `identity` means, and goes on.
fn prove(identity: &ProcessIdentity, pidfd: &OwnedFd) -> io::Result<bool> {
    match procfs::stat(identity.pid) {
        Ok(stat) if stat.start_ticks != identity.start_ticks => Ok(false),
        Ok(_) => Ok(!has_ended(pidfd)?),
        // Reaped in between, or hidden from us by a /proc mounted with hidepid: only the pidfd knows which.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if has_ended(pidfd)? {
                Ok(false)
            } else {
                Err(error)
            }
        }
        Err(error) => Err(error),
    }
}

/// Tells a pid that nobody has from one that cannot be opened.
fn without_pidfd(identity: &ProcessIdentity, error: Errno) -> Lookup {
    if error == Errno::SRCH {
        return Lookup::Gone;
    }
    // The number is in use as a thread of another process, so the process that had it has ended.
    if matches!(error, Errno::INVAL | Errno::NOENT)
        && let Ok(Some(group)) = procfs::thread_group(identity.pid)
        && group != identity.pid
    {
        return Lookup::Gone;
    }
    let error = io::Error::from(error);
    Lookup::Unprovable(format!("process {} cannot be opened: {error}", identity.pid))
}

/// Starts the task that publishes the end of a process which is not our child. The task ends with the process, or with the last
/// handle of it.
fn watch_exit(pidfd: OwnedFd, identity: &ProcessIdentity) -> io::Result<Process> {
    let pidfd = Arc::new(pidfd);
    let watched = ready::readable(Arc::clone(&pidfd))?;
    let (ended, exit) = watch::channel(None);
    let pid = identity.pid;
    let task = async move {
        let seen = tokio::select! {
            seen = watched.readable() => seen.map(drop),
            // The last handle is gone, and the pidfd goes with this task.
            () = ended.closed() => return,
        };
        match seen {
            Ok(()) => {
                ended.send_replace(Some(ProcessExit::UNKNOWN));
            }
            Err(error) => tracing::debug!(%error, "the runtime ends; the process is no longer watched"),
        }
    };
    tokio::spawn(task.instrument(tracing::debug_span!("adopted process", pid)));
    Ok(Process::new(identity.clone(), pidfd, exit))
}
