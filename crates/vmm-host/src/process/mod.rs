//! Processes, and the proof of which one is meant.
//!
//! ```text
//!   spawn(Command) ──► Guarded ── keep() ──┐           our child: reaped by a task, exit status known
//!        dropped before keep(): SIGKILL    ├──► Process ── wait, signal, usage
//!   adopt(identity) ──► Alive ─────────────┘           a stranger's child: exit status unknown
//!                   ├─► Gone                           proven by boot id, pid or start time
//!                   └─► Unprovable                     touch nothing
//! ```
//!
//! A pid is only a number that the kernel uses again. A [`Process`] therefore holds a pidfd, which means one process for
//! ever: signals go through it and nowhere else, and it becomes readable when the process has ended. What survives a restart
//! of the daemon is a [`ProcessIdentity`]: pid, start time and boot id, which together belong to one process only.
//!
//! A zombie counts as gone: it runs nothing and holds neither memory nor files.

mod adopt;
mod command;
mod exit;
mod find;
mod procfs;
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

pub use adopt::{Lookup, adopt};
pub(crate) use command::close_for_good;
pub use command::{Command, Guarded, Stdin, environment, spawn, spawn_guarded, start_guarded, starting};
pub use exit::{ExitStatus, ProcessExit};
pub use find::{Found, find_by_argument, find_by_option};
pub use procfs::{Usage, age, arguments_of, boot_id, exe_of, identify, usage};

/// A handle of one process. Clones are handles of the same one; dropping them all leaves it running.
#[derive(Clone, Debug)]
pub struct Process {
    identity: Arc<ProcessIdentity>,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<ProcessExit>>,
}

/// Why a process could not be proven gone after it was told to go.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The signal was refused.
    #[error("process {pid} could not be killed; end it by hand, or give the daemon the right to signal it")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was killed, and is still there.
    #[error(
        "process {pid} was killed but is still there after {after:?}; it probably waits for a device of the host"
    )]
    StillThere {
        /// The process.
        pid: u32,
        /// How long it was waited for.
        after: Duration,
    },
}

impl Process {
    /// Puts a handle together; the sender of `exit` publishes once and only when the process has ended.
    fn new(
        identity: ProcessIdentity,
        pidfd: Arc<OwnedFd>,
        exit: watch::Receiver<Option<ProcessExit>>,
    ) -> Self {
        Self { identity: Arc::new(identity), pidfd, exit }
    }

    /// Which process this is, in a form that survives a restart of the daemon.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// The process id. For people and `/proc`; never a target of signals.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// The exit, if the process has ended.
    pub fn exit(&self) -> Option<ProcessExit> {
        *self.exit.borrow()
    }

    /// Says whether the process has ended by now, be it that its exit is not known yet.
    pub fn has_ended(&self) -> bool {
        // A pidfd that cannot be asked proves nothing.
        self.exit().is_some() || has_ended(&*self.pidfd).unwrap_or(false)
    }

    /// Waits until the process has ended. May be cancelled, and called by many at once.
    pub async fn wait(&self) -> ProcessExit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|value| *value);
        match ended {
            Some(exit) => exit,
            // The watching task went without a word: the runtime is being shut down. To say "ended" would be a lie.
            None => std::future::pending().await,
        }
    }

    /// Waits until the process has ended, at most for `limit`. `None` means that it may still be there.
    pub async fn wait_for(&self, limit: Duration) -> Option<ProcessExit> {
        tokio::time::timeout(limit, self.wait()).await.ok()
    }

    /// Sends a signal to this process and no other. A process that has already gone is no error.
    ///
    /// # Errors
    /// What the kernel says, such as a missing permission.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&*self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends SIGKILL and waits, at most for `limit`, until the process has gone.
    ///
    /// # Errors
    /// [`KillError`], after which the process may still be there.
    pub async fn kill_and_wait(&self, limit: Duration) -> Result<ProcessExit, KillError> {
        let pid = self.pid();
        self.signal(Signal::KILL).map_err(|source| KillError::Refused { pid, source })?;
        self.wait_for(limit).await.ok_or(KillError::StillThere { pid, after: limit })
    }

    /// The program that the process runs, by its real path.
    ///
    /// # Errors
    /// What the kernel says; `NotFound` where the process has ended.
    pub fn executable(&self) -> io::Result<PathBuf> {
        let executable = exe_of(self.pid())?;
        self.still_the_same()?;
        Ok(executable)
    }

    /// What the process has used of the host.
    ///
    /// # Errors
    /// What the kernel says; `NotFound` where the process has ended.
    pub fn usage(&self) -> io::Result<Usage> {
        let usage = usage(self.pid())?;
        self.still_the_same()?;
        Ok(usage)
    }

    /// What was read from `/proc` under the pid is this process's only if it has not ended by now.
    fn still_the_same(&self) -> io::Result<()> {
        if has_ended(&*self.pidfd)? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {} has ended", self.pid())));
        }
        Ok(())
    }
}

/// Says whether the process behind a pidfd has ended. True for a zombie, whose every thread has ended.
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
