//! Processes, and the proof that a process is the one that is meant.
//!
//! ```text
//!   spawn(Command) ──► ProcessGuard ── keep() ──┐    child of this daemon: reaped by a task
//!        dropped before keep(): SIGKILL         ├──► Process ── wait, signal, usage
//!   adopt(identity) ──► Alive ──────────────────┘    child of another process: exit status unknown
//!                   ├─► Gone                         proven by boot id, pid or start time
//!                   └─► Unprovable                   nothing may be changed
//! ```
//!
//! A pid is a number that the kernel uses again. A [`Process`] therefore holds a pidfd, which means
//! one process for ever: signals go through it alone, and it becomes readable when the process has
//! ended. A [`ProcessIdentity`] survives a restart of the daemon: pid, start time and boot id
//! together belong to one process only.
//!
//! A zombie counts as gone, because it runs nothing and holds neither memory nor files.

mod adopt;
mod command;
mod exit;
mod find;
mod procfs;
mod search;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
pub use rustix::process::Signal;
use tokio::sync::watch;
use vmm_core::store::ProcessIdentity;

pub use adopt::{Lookup, adopt, can_search, scope};
pub(crate) use command::close_for_good;
pub use command::{
    Command, KEPT_DESCRIPTOR, ProcessGuard, Stdin, environment, exec_guard, spawn, spawn_guarded,
    start_guarded,
};
pub use exit::{ExitStatus, ProcessExit};
pub use find::{ProcessMatch, find_by_argument, find_by_option, program_name_of};
pub use procfs::{ProcessUsage, age, arguments_of, boot_id, exe_of, identify, usage};
pub use search::{search_by_argument, search_by_option};

/// A handle of one process. Clones are handles of the same process, and dropping all of them leaves
/// the process running.
#[derive(Clone, Debug)]
pub struct Process {
    identity: Arc<ProcessIdentity>,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<ProcessExit>>,
}

/// The reason why a process is not proven gone after SIGKILL.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The kernel refused the signal.
    #[error("process {pid} could not be killed; end it by hand, or give the daemon the right to signal it")]
    Refused {
        /// The process.
        pid: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The process was killed and has not ended.
    #[error(
        "process {pid} was killed but is still there after {timeout:?}; it probably waits for a device of the host"
    )]
    StillThere {
        /// The process.
        pid: u32,
        /// The time that was waited.
        timeout: Duration,
    },
}

impl Process {
    /// Returns a handle. The sender of `exit` must publish once, and only after the process has
    /// ended.
    fn new(
        identity: ProcessIdentity,
        pidfd: Arc<OwnedFd>,
        exit: watch::Receiver<Option<ProcessExit>>,
    ) -> Self {
        Self { identity: Arc::new(identity), pidfd, exit }
    }

    /// Returns the identity of the process, which stays valid over a restart of the daemon.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Returns the process id, for messages and `/proc`. Signals never go to it.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Returns the exit; `None` while the process runs.
    pub fn exit(&self) -> Option<ProcessExit> {
        *self.exit.borrow()
    }

    /// Returns true if the process has ended by now, even if its exit is not known yet.
    pub fn has_ended(&self) -> bool {
        // An error of the pidfd proves no end.
        self.exit().is_some() || has_ended(&*self.pidfd).unwrap_or(false)
    }

    /// Waits until the process has ended and returns its exit. Can be cancelled, and called
    /// concurrently.
    pub async fn wait(&self) -> ProcessExit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|value| *value);
        match ended {
            Some(exit) => exit,
            // The watching task has ended without publishing, because the runtime is shutting down.
            // No end is proven, so none is returned.
            None => std::future::pending().await,
        }
    }

    /// Waits at most `limit` for the end of the process. `None` means that the process may still
    /// run.
    pub async fn wait_for(&self, limit: Duration) -> Option<ProcessExit> {
        tokio::time::timeout(limit, self.wait()).await.ok()
    }

    /// Sends a signal to this process and no other. A process that has already ended is no error.
    ///
    /// # Errors
    /// Returns the kernel's error, such as a missing permission.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // ESRCH means that the process was reaped already. The pidfd never means another process,
        // so a late signal reaches none.
        match rustix::process::pidfd_send_signal(&*self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends SIGKILL and waits at most `limit` for the end of the process.
    ///
    /// # Errors
    /// Returns [`KillError`]. The process may still run then.
    pub async fn kill_and_wait(&self, limit: Duration) -> Result<ProcessExit, KillError> {
        let pid = self.pid();
        self.signal(Signal::KILL).map_err(|source| KillError::Refused { pid, source })?;
        self.wait_for(limit).await.ok_or(KillError::StillThere { pid, timeout: limit })
    }

    /// Returns the real path of the program that the process runs.
    ///
    /// # Errors
    /// Returns the kernel's error: `NotFound` where the process has ended, `PermissionDenied` where
    /// the kernel hides the program.
    pub fn executable(&self) -> io::Result<PathBuf> {
        let executable = exe_of(self.pid())?;
        self.still_the_same()?;
        Ok(executable)
    }

    /// Returns the process's use of the host.
    ///
    /// # Errors
    /// Returns the kernel's error; `NotFound` where the process has ended.
    pub fn usage(&self) -> io::Result<ProcessUsage> {
        let usage = usage(self.pid())?;
        self.still_the_same()?;
        Ok(usage)
    }

    /// Fails if the process has ended. Facts that were read from `/proc` under the pid before this
    /// call belong to the process only if it has not.
    pub(crate) fn still_the_same(&self) -> io::Result<()> {
        if has_ended(&*self.pidfd)? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {} has ended", self.pid())));
        }
        Ok(())
    }
}

/// Returns true if the process behind a pidfd has ended. A zombie, whose every thread has ended,
/// has.
fn has_ended(pidfd: impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        match rustix::event::poll(&mut fds, Some(&at_once)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
