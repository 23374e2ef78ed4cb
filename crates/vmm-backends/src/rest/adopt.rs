//! Finds the VMM that an earlier daemon started, and explains the end of one that has exited.

use std::io;
use std::path::{Path, PathBuf};

use vmm_core::backend::{AdoptRequest, BackendError, BackendErrorKind, Effect};
use vmm_core::reason::Reason;
use vmm_core::store::RunRecord;
use vmm_host::clock::now_ms;
use vmm_host::process::{Lookup, Process, ProcessExit, adopt};

use crate::launch::{self, ProcessGuard};
use crate::search::{self, UnprovenVmm};
use crate::timeouts::REAP_TIMEOUT;

/// The socket's name in the run folder. The name is short because a socket's path has at most 107
/// bytes.
pub const SOCKET: &str = "api.sock";
/// The name in the run folder of the file that receives the VMM's stderr.
pub const LOG: &str = "vmm.log";

/// The result of the search for the VMM of an earlier run.
#[derive(Debug)]
pub(crate) enum VmmSearch {
    /// The process is alive and proven to be the VMM.
    Alive(Process, Box<RunRecord>),
    /// The process is proven to have ended.
    Gone,
    /// The identity of the process cannot be proven.
    Unprovable(UnprovenVmm),
}

/// Searches the VMM of `request` by its recorded identity, or by its run folder if a launch was
/// interrupted before the identity was recorded. `names` are the names of the executable.
pub(crate) async fn find_vmm(request: &AdoptRequest, names: Vec<String>) -> VmmSearch {
    let (identity, run) = match &request.run {
        Some(run) => (run.process.clone(), run.clone()),
        None => match search::user_of(&request.dir, names).await {
            Ok(Some(user)) => {
                let run = new_run(user.identity.clone(), request.dir.join(SOCKET), String::new());
                (user.identity, run)
            }
            Ok(None) => return VmmSearch::Gone,
            Err(unproven) => return VmmSearch::Unprovable(unproven),
        },
    };
    match adopt(&identity) {
        Lookup::Alive(process) => VmmSearch::Alive(process, Box::new(run)),
        Lookup::Gone => VmmSearch::Gone,
        Lookup::Unprovable(message) => {
            VmmSearch::Unprovable(UnprovenVmm { reason: Reason::IdentityUnproven, message })
        }
    }
}

/// Returns the record of a run that begins now. The caller fills in the claims.
pub fn new_run(process: vmm_core::store::ProcessIdentity, socket: PathBuf, version: String) -> RunRecord {
    RunRecord {
        process,
        socket,
        version,
        accelerator: "kvm".to_owned(),
        machine: String::new(),
        started_ms: now_ms(),
        claims: Vec::new(),
        taps: Vec::new(),
    }
}

/// Returns the message about the end of a VMM: the exit status and the last lines of its logs.
pub async fn exit_message(exit: ProcessExit, logs: &[&Path]) -> String {
    let mut message = exit.to_string();
    for log in logs {
        let said = launch::log_tail(log).await;
        if !said.is_empty() {
            message.push_str("; last words: ");
            message.push_str(&said);
        }
    }
    message
}

/// Renames a log that an earlier run left to `<name>.1`, so that its lines are not quoted as those
/// of the next run. Blocks.
///
/// # Errors
/// Returns the kernel's error.
pub fn rotate_log(dir: &Path, name: &str) -> io::Result<()> {
    match std::fs::rename(dir.join(name), dir.join(format!("{name}.1"))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Replaces the `error` of a call by [`BackendErrorKind::Gone`] if the process of the VMM has
/// ended.
pub fn or_gone(process: &Process, error: BackendError) -> BackendError {
    match process.exit() {
        Some(exit) => {
            let message = format!("the VMM has gone ({exit}): {error}");
            BackendError::new(BackendErrorKind::Gone, error.effect, message).caused_by(error)
        }
        None => error,
    }
}

/// Returns true if the process that gave this `answer` has ended. If its socket cannot be reached,
/// waits up to 1 s for the end, because an exiting process closes its socket first.
pub async fn has_ended<T>(process: &Process, answer: &Result<T, BackendError>) -> bool {
    let lost = matches!(answer, Err(error) if error.kind == BackendErrorKind::Unreachable);
    process.exit().is_some() || (lost && process.wait_for(REAP_TIMEOUT).await.is_some())
}

/// Kills the process of a launch that failed, and returns the error of the launch. If the VMM ended
/// by itself, the error quotes the last lines of its log.
pub async fn failed(guard: ProcessGuard, error: BackendError, log: &Path) -> BackendError {
    let lost = matches!(error.kind, BackendErrorKind::Gone | BackendErrorKind::Unreachable);
    // A VMM that ended by itself explains the failure better than the broken call does. A lost
    // connection is usually the first sign of that end, so the exit gets a moment to appear.
    if guard.exit().is_some() || (lost && guard.wait_for(REAP_TIMEOUT).await.is_some()) {
        return launch::early_exit_error(guard.process(), log, "while it started").await;
    }
    match launch::kill(guard.process()).await {
        Ok(()) => BackendError { effect: Effect::NotApplied, ..error },
        Err(kept) => {
            let message = format!("{error}; and what was started is still there: {kept}");
            BackendError::new(error.kind, Effect::Unknown, message).caused_by(error)
        }
    }
}
