//! The last rung for a VMM that another program started. Without force it is an error. With force
//! it is SIGTERM and SIGKILL, if the process is proven to be the VM's VMM.

use std::path::Path;
use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LadderOptions};
use vmm_core::state::EndedBy;
use vmm_host::endpoint::{self, EndpointError};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Process, Signal};

use crate::timeouts::{END_TIMEOUT, EXIT_REPORT_TIMEOUT, KILL_TIMEOUT};

/// The way to end a VM.
#[derive(Clone, Copy, Debug)]
pub(crate) enum EndMethod {
    /// The whole ladder.
    Ladder(LadderOptions),
    /// The VMM's interface alone, without waiting for the guest.
    OrderOff,
}

/// Ends the process by force, or returns [`BackendErrorKind::StillRuns`] without force. `program`
/// is the beginning of the file name that the executable must have for force to kill the process.
pub(crate) async fn end_process(
    process: &Process,
    socket: &Path,
    program: &str,
    forced: bool,
) -> Result<EndedBy, BackendError> {
    if forced {
        kill(process, socket, program, KillManner::Gently).await
    } else {
        Err(still_runs(process, socket))
    }
}

/// The way to end a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KillManner {
    /// SIGTERM first, then SIGKILL.
    Gently,
    /// SIGKILL at once, because the milder ways were tried or the VMM does not answer.
    AtOnce,
}

/// Ends the process, which must be proven to be the VMM at `socket` and to run `program`.
///
/// # Errors
/// [`BackendErrorKind::Host`] if the proof fails; no signal was sent. [`BackendErrorKind::Timeout`]
/// if the process outlives SIGKILL.
pub(super) async fn kill(
    process: &Process,
    socket: &Path,
    program: &str,
    manner: KillManner,
) -> Result<EndedBy, BackendError> {
    // A process that is exiting has closed its socket and hides its executable, so the proof fails
    // although nothing is wrong. It gets a moment to end before the error counts.
    if let Err(IdentityProofError { error, exit_timeout }) = prove(process, socket, program).await {
        return process.wait_for(exit_timeout).await.map(|_| EndedBy::Sigkill).ok_or(error);
    }
    let rungs =
        [(Signal::TERM, END_TIMEOUT, EndedBy::Sigterm), (Signal::KILL, KILL_TIMEOUT, EndedBy::Sigkill)];
    let skipped = if manner == KillManner::AtOnce { 1 } else { 0 };
    for (signal, limit, rung) in rungs.into_iter().skip(skipped) {
        if let Err(error) = process.signal(signal) {
            tracing::warn!(pid = process.pid(), ?signal, %error, "the VMM cannot be signalled");
            continue;
        }
        tracing::debug!(pid = process.pid(), ?signal, "force: signalled a VMM that another program started");
        point(FaultPoint::LadderSignalled);
        if process.wait_for(limit).await.is_some() {
            return Ok(rung);
        }
    }
    let pid = process.pid();
    let message =
        format!("process {pid} is still there after SIGKILL, or may not be signalled: end it by hand");
    Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
}

/// The failed proof of a process's identity.
struct IdentityProofError {
    error: BackendError,
    /// The time to wait for the end of the process in case it is exiting, because an exiting
    /// process shows neither its executable nor its socket.
    exit_timeout: Duration,
}

/// Proves that `process`, which a pidfd holds, listens on `socket` and runs an executable whose
/// name begins with `program`.
async fn prove(process: &Process, socket: &Path, program: &str) -> Result<(), IdentityProofError> {
    let unproven_for = |exit_timeout: Duration, why: String| {
        let message = format!(
            "process {} was not killed: {why}; it was started by another program, so it is ended only where it is proven to be \
             the VM's VMM. End it by hand",
            process.pid()
        );
        let error = BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message);
        IdentityProofError { error, exit_timeout }
    };
    let unproven = |why: String| unproven_for(Duration::ZERO, why);
    if process.pid() <= 1 {
        return Err(unproven("that is no VMM's process id".to_owned()));
    }
    let runs = executable(process).await.map_err(|error| {
        let is_leaving = error.kind() == std::io::ErrorKind::NotFound;
        let exit_timeout = if is_leaving { KILL_TIMEOUT } else { Duration::ZERO };
        unproven_for(exit_timeout, format!("its program cannot be read ({error})"))
    })?;
    if !runs.starts_with(program) {
        return Err(unproven(format!("it runs {runs}, not {program}")));
    }
    match endpoint::visit(socket).await {
        Ok(visit) if visit.process.identity() == process.identity() => Ok(()),
        Ok(visit) => {
            Err(unproven(format!("process {} listens on {}", visit.process.pid(), socket.display())))
        }
        Err(EndpointError::Nobody(place)) => {
            Err(unproven_for(EXIT_REPORT_TIMEOUT, format!("no process listens on {place} any more")))
        }
        Err(EndpointError::Refused(why)) => Err(unproven(why)),
        // A paused QEMU may refuse one more connection, so a failed connection proves nothing
        // against it. That this process listens on the socket was proven when it was met, and the
        // pidfd still names the same process.
        Err(EndpointError::Failed(_)) => Ok(()),
    }
}

async fn executable(process: &Process) -> std::io::Result<String> {
    let process = process.clone();
    let path =
        tokio::task::spawn_blocking(move || process.executable()).await.map_err(std::io::Error::other)??;
    Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

fn still_runs(process: &Process, socket: &Path) -> BackendError {
    let message = format!(
        "the VM still runs: neither its guest nor its VMM obeyed, and another program started process {} behind {}. Try again, or use force, which ends the VMM's process",
        process.pid(),
        socket.display()
    );
    BackendError::new(BackendErrorKind::StillRuns, Effect::Unknown, message)
}
