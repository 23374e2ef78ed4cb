//! Finds the process of an earlier run again and proves that it is the same process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use tokio::sync::watch;
use tracing::Instrument;
use vmm_core::store::{Namespaces, ProcessIdentity, ProcessScope};

use super::{Process, ProcessExit, boot_id, has_ended, procfs};
use crate::async_fd;

/// The result of looking for a recorded process.
#[derive(Debug)]
pub enum Lookup {
    /// The process runs and is proven to be the recorded one.
    Alive(Process),
    /// The process has provably ended.
    Gone,
    /// Neither is proven, for the reason in the text. The process that has the pid now must be left
    /// alone.
    Unprovable(String),
}

/// Searches for the process that `identity` describes. Changes nothing.
///
/// Must be called inside a Tokio runtime with I/O, because a task watches the process that is
/// found.
pub fn adopt(identity: &ProcessIdentity) -> Lookup {
    // Every process of an earlier boot has ended, so a different boot id proves the end. If it is
    // equal, the rest of the proof rests on the pid and the start time.
    match boot_id() {
        Ok(boot) if boot != identity.boot_id => return Lookup::Gone,
        Ok(_) => {}
        Err(error) => return Lookup::Unprovable(format!("the host's boot id cannot be read: {error}")),
    }
    // A pid and a start time have a meaning only within their namespaces. Those are compared before
    // either number is used.
    if let Err(why) = same_namespaces(identity) {
        return Lookup::Unprovable(why);
    }
    // Process 1 is the host's init. A record that names it is damaged.
    if identity.pid <= 1 {
        return Lookup::Unprovable(format!("process id {} is never a VMM's", identity.pid));
    }
    let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
        return Lookup::Unprovable(format!("{} is no process id", identity.pid));
    };
    // The pidfd is opened before `/proc` is read, because a pidfd keeps meaning one process. The
    // kernel does not give a pid away while its process lives. So if the start time that is read
    // afterwards is the recorded one, and the process behind the pidfd still lives after that
    // reading, the pidfd means the recorded process.
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

/// Refuses an identity that was read in other namespaces, because its pid and start time mean
/// another process here, or none. Records of earlier releases carry no namespaces and are taken to
/// be of the present ones.
fn same_namespaces(identity: &ProcessIdentity) -> Result<(), String> {
    let Some(recorded) = identity.namespaces else { return Ok(()) };
    let Some(kind) = other_namespace(recorded)? else { return Ok(()) };
    Err(format!(
        "process {} was recorded in another {kind} namespace than the one the daemon is in now, so its number proves nothing \
         here; run the daemon where it ran then, or end the process by hand and use force",
        identity.pid
    ))
}

/// Returns the kind of the namespace in which the daemon is no longer, or `None` if the daemon is
/// in the recorded namespaces.
fn other_namespace(recorded: Namespaces) -> Result<Option<&'static str>, String> {
    let here =
        procfs::namespaces().map_err(|error| format!("the daemon's namespaces cannot be read: {error}"))?;
    Ok(match recorded == here {
        true => None,
        false if recorded.pid == here.pid => Some("time"),
        false => Some("PID"),
    })
}

/// Returns the scope of the processes that this daemon starts.
///
/// # Errors
/// Returns the kernel's error for `/proc/self/ns` or for the boot id.
pub fn scope() -> io::Result<ProcessScope> {
    Ok(ProcessScope { boot_id: boot_id()?, namespaces: procfs::namespaces()? })
}

/// Checks that a search of this daemon among the host's processes can prove that no process of
/// `scope` lives. `None` stands for a record of an earlier release, whose processes are taken to be
/// of the present namespaces.
///
/// # Errors
/// Returns the reason if such a process may live where this daemon does not see it.
pub fn can_search(scope: Option<&ProcessScope>) -> Result<(), String> {
    let Some(scope) = scope else { return Ok(()) };
    // Every process of an earlier boot has ended, whatever its namespace was.
    match boot_id() {
        Ok(boot) if boot != scope.boot_id => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(format!("the host's boot id cannot be read: {error}")),
    }
    let Some(kind) = other_namespace(scope.namespaces)? else { return Ok(()) };
    Err(format!(
        "its process was started in another {kind} namespace than the one the daemon is in now, so that a search here proves \
         nothing; run the daemon where it ran then, or end the process by hand and delete the VM with force"
    ))
}

/// Returns true if the process behind `pidfd` is the one that `identity` describes and still runs,
/// and false if that process has ended. An error proves neither.
fn prove(identity: &ProcessIdentity, pidfd: &OwnedFd) -> io::Result<bool> {
    match procfs::stat(identity.pid) {
        // Another process has the pid, so the recorded process has ended: its pid was given away.
        Ok(stat) if stat.start_ticks != identity.start_ticks => Ok(false),
        // The start time was read through the pid, not through the pidfd. It belongs to the process
        // behind the pidfd only if that process had not ended by then, so the end is asked for
        // last.
        Ok(_) => Ok(!has_ended(pidfd)?),
        // The process was reaped in between, or a `/proc` mounted with hidepid hides it. Only the
        // pidfd distinguishes the two.
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

/// Classifies a process for whose pid the kernel opens no pidfd: gone if no process has the pid,
/// unprovable otherwise.
fn without_pidfd(identity: &ProcessIdentity, error: Errno) -> Lookup {
    if error == Errno::SRCH {
        return Lookup::Gone;
    }
    // The number is in use as the thread id of another process. A number belongs to one task at a
    // time, so the process that had it has ended.
    if matches!(error, Errno::INVAL | Errno::NOENT)
        && let Ok(Some(group)) = procfs::thread_group(identity.pid)
        && group != identity.pid
    {
        return Lookup::Gone;
    }
    let error = io::Error::from(error);
    Lookup::Unprovable(format!("process {} cannot be opened: {error}", identity.pid))
}

/// Starts the task that publishes the end of a process that is not a child of this daemon. The task
/// ends with the process or with the last [`Process`] of it.
fn watch_exit(pidfd: OwnedFd, identity: &ProcessIdentity) -> io::Result<Process> {
    let pidfd = Arc::new(pidfd);
    let watched = async_fd::readable(Arc::clone(&pidfd))?;
    let (ended, exit) = watch::channel(None);
    let pid = identity.pid;
    let task = async move {
        let seen = tokio::select! {
            seen = watched.readable() => seen.map(drop),
            // The last handle was dropped, so no caller can ask about the process any more. This
            // task closes the pidfd.
            () = ended.closed() => return,
        };
        match seen {
            Ok(()) => {
                // Only the parent can read an exit status, and that was an earlier run of the
                // daemon.
                ended.send_replace(Some(ProcessExit::UNKNOWN));
            }
            // A runtime that ends proves nothing about the process, so no exit is published.
            Err(error) => {
                tracing::debug!(%error, "the process is no longer watched, because the runtime ends")
            }
        }
    };
    tokio::spawn(task.instrument(tracing::debug_span!(parent: None, "adopted process", pid)));
    Ok(Process::new(identity.clone(), pidfd, exit))
}
