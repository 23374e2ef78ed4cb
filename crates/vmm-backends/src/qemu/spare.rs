//! A QEMU that waits for its VM.
//!
//! ```text
//!   start ──► QEMU: linked, its types registered; reads the rest of its options from its input ─┐
//!               │                                     a pipe, whose other end the daemon has    │
//!               │   the daemon ends at any moment: end of file, no console ──► QEMU exits       │
//!               ├── end, or dropped: killed                                                     │
//!               ▼                                                                               │
//!   tell ────► the file of convert::told, end of file ◄─────────────────────────────────────────┘
//!               ▼
//!             QEMU creates the VM, and is a QEMU like any other
//! ```
//!
//! Half of the time until QEMU answers passes before QEMU reads its options, and none of that work
//! depends on the VM. The pipe is QEMU's standard input: it has no name that must be created and
//! removed, opening it blocks no process, and QEMU reads its end as soon as the daemon has ended,
//! even if QEMU had not opened it by then.
//!
//! Unread input has no effect. As long as QEMU has read nothing, an ordinary start can take its
//! place.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe::Sender;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, SpareRequest};
use vmm_host::process::{Command, ProcessGuard, Stdin};
use vmm_host::run_dir;

use super::convert::{self, Accelerator, QMP_SOCKET, SpareQemuConfig, SpareQemuInputs};
use super::start::{LOG, clear, host_error};
use crate::launch::start_blocking;
use crate::program::{InstalledProgram, Version};
use crate::timeouts::KILL_TIMEOUT;

/// The oldest version whose VMs were compared with those of an ordinary start.
const OLDEST: Version = Version::new(7, 2, 0);
/// The longest time until a spare reads its input. A spare that is not stopped takes less than a
/// millisecond.
const SPARE_READ_TIMEOUT: Duration = Duration::from_secs(2);

/// A QEMU without a VM. Killed when dropped.
#[derive(Debug)]
pub(super) struct SpareQemu {
    guarded: ProcessGuard,
    input: OwnedFd,
    /// The other end of the same pipe, by which the unread bytes are counted.
    output: OwnedFd,
    program: InstalledProgram,
    words: Vec<std::ffi::OsString>,
}

/// Starts a QEMU that waits for the VM with the uid of `request`.
pub(super) async fn start(
    program: InstalledProgram,
    accelerator: Accelerator,
    request: SpareRequest,
) -> Result<SpareQemu, BackendError> {
    if program.version < OLDEST {
        let message = format!("QEMU {} keeps no spare VMMs; they need {OLDEST} or newer", program.version);
        let kind = BackendErrorKind::Unsupported("spare VMMs");
        return Err(BackendError::new(kind, Effect::NotApplied, message));
    }
    run_dir::socket_path_fits(&request.dir.join(QMP_SOCKET)).map_err(host_error)?;
    let started = tokio::task::spawn_blocking(move || {
        let words =
            convert::spare_arguments(&SpareQemuInputs { uid: request.uid, accelerator, dir: &request.dir });
        start_waiting(program, words, &request.dir)
    });
    started.await.unwrap_or_else(|error| {
        Err(host_error(format!("the start of a spare QEMU was interrupted: {error}")).caused_by(error))
    })
}

/// Starts the process. Blocks.
fn start_waiting(
    program: InstalledProgram,
    words: Vec<std::ffi::OsString>,
    dir: &Path,
) -> Result<SpareQemu, BackendError> {
    clear(dir)?;
    let no_pipe =
        |error: io::Error| host_error(format!("no pipe for a spare QEMU: {error}")).caused_by(error);
    let (output, input) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| no_pipe(error.into()))?;
    let mut command = Command::new(program.path(), words.clone(), dir.join(LOG));
    command.stdin = Stdin::File(output.try_clone().map_err(no_pipe)?);
    Ok(SpareQemu { guarded: start_blocking(command)?, input, output, program, words })
}

impl SpareQemu {
    /// Returns the reason why this spare cannot serve a VM of `program`, or `None` if it can.
    pub(super) fn unfit(&self, program: &InstalledProgram) -> Option<&'static str> {
        if self.guarded.has_ended() {
            Some("it has ended")
        } else if self.program != *program {
            Some("the program of the VMM has been replaced")
        } else {
            None
        }
    }

    /// Returns true if the spare was started with the command line that `told` requires.
    pub(super) fn was_started_for(&self, reported: &SpareQemuConfig) -> bool {
        self.words == reported.ahead
    }

    /// Writes the VM to the spare's input. Returns `None` if the spare did not read it; the spare
    /// has been ended then.
    pub(super) async fn configure(self, file: &str) -> Option<ConfiguredSpareQemu> {
        let Self { guarded, input, output, .. } = self;
        let telling = async { Sender::from_owned_fd(input)?.write_all(file.as_bytes()).await };
        let failure = match tokio::time::timeout(SPARE_READ_TIMEOUT, telling).await {
            Ok(Ok(())) => {
                let bytes = file.len().try_into().unwrap_or(u64::MAX);
                return Some(ConfiguredSpareQemu { guarded, output, bytes });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("QEMU did not read its configuration to the end within {SPARE_READ_TIMEOUT:?}"),
        };
        // QEMU has not seen the end of the file, so it has applied nothing.
        end(guarded, &failure).await;
        None
    }

    /// Kills the spare, and waits for its end.
    pub(super) async fn end(self, why: impl Display) {
        end(self.guarded, why).await;
    }
}

/// A QEMU that has its VM in its input. Killed when dropped.
#[derive(Debug)]
pub(super) struct ConfiguredSpareQemu {
    pub(super) guarded: ProcessGuard,
    output: OwnedFd,
    bytes: u64,
}

impl ConfiguredSpareQemu {
    /// Returns true if QEMU has read nothing of its input yet.
    pub(super) fn is_unconfigured(&self) -> bool {
        rustix::io::ioctl_fionread(&self.output).is_ok_and(|unread| unread == self.bytes)
    }

    /// Returns an error if QEMU has read nothing within [`SPARE_READ_TIMEOUT`]. Otherwise never
    /// returns.
    pub(super) async fn wait_while_unread(&self) -> BackendError {
        tokio::time::sleep(SPARE_READ_TIMEOUT).await;
        if !self.is_unconfigured() {
            std::future::pending::<()>().await;
        }
        let message = format!("QEMU did not begin to read its configuration within {SPARE_READ_TIMEOUT:?}");
        BackendError::new(BackendErrorKind::Timeout, Effect::NotApplied, message)
    }

    /// Kills QEMU, and waits for its end.
    pub(super) async fn end(self, why: impl Display) {
        end(self.guarded, why).await;
    }
}

async fn end(guarded: ProcessGuard, why: impl Display) {
    let pid = guarded.pid();
    tracing::debug!(pid, detail = %why, "a spare QEMU is ended");
    if let Err(error) = guarded.kill_and_wait(KILL_TIMEOUT).await {
        // A spare runs no guest, so its late end does no harm.
        tracing::warn!(pid, %error, "a spare QEMU has not ended yet");
    }
}
