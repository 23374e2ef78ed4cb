//! The way back to a VMM that an earlier daemon started, and the last words of one that has gone.

use std::io;
use std::path::{Path, PathBuf};

use vmm_core::backend::{AdoptRequest, BackendError, BackendErrorKind, Effect};
use vmm_core::store::RunRecord;
use vmm_host::clock::now_ms;
use vmm_host::process::{Lookup, Process, ProcessExit, adopt};

use crate::launch::{self, Guarded};
use crate::patience::REAPING;
use crate::search::{self, Unproven};

/// The socket's name in the run folder; short, because a socket's path ends at 107 bytes.
pub const SOCKET: &str = "api.sock";
/// The name in the run folder of what the VMM writes to its stderr.
pub const LOG: &str = "vmm.log";

/// What was found of an earlier run.
#[derive(Debug)]
pub(crate) enum Trace {
    /// Its process, proven.
    Alive(Process, Box<RunRecord>),
    /// It has provably gone.
    Gone,
    /// Nothing can be proven.
    Unprovable(Unproven),
}

/// Looks for the VMM of `request`: by its recorded identity, or by its run folder where a launch was interrupted.
pub(crate) async fn look(request: &AdoptRequest, names: Vec<String>) -> Trace {
    let (identity, run) = match &request.run {
        Some(run) => (run.process.clone(), run.clone()),
        None => match search::user_of(&request.dir, names).await {
            Ok(Some(user)) => {
                let run = new_run(user.identity.clone(), request.dir.join(SOCKET), String::new());
                (user.identity, run)
            }
            Ok(None) => return Trace::Gone,
            Err(unproven) => return Trace::Unprovable(unproven),
        },
    };
    match adopt(&identity) {
        Lookup::Alive(process) => Trace::Alive(process, Box::new(run)),
        Lookup::Gone => Trace::Gone,
        Lookup::Unprovable(message) => Trace::Unprovable(Unproven { reason: "identity-unproven", message }),
    }
}

/// The record of a run that begins now. Its claims are the caller's to fill in.
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

/// What is said of an end: the exit status, and the last lines of the VMM's logs.
pub async fn exit_message(exit: ProcessExit, logs: &[&Path]) -> String {
    let mut message = exit.to_string();
    for log in logs {
        let said = launch::last_words(log).await;
        if !said.is_empty() {
            message.push_str("; last words: ");
            message.push_str(&said);
        }
    }
    message
}

/// Sets a log aside as `<name>.1`, where an earlier run left one, so that its words are not taken for those of the next.
/// Blocks.
///
/// # Errors
/// Returns the kernel's error.
pub fn set_aside(dir: &Path, name: &str) -> io::Result<()> {
    match std::fs::rename(dir.join(name), dir.join(format!("{name}.1"))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Says of an error which a call to a VMM had, that the VMM has gone, if it has.
pub fn or_gone(process: &Process, error: BackendError) -> BackendError {
    match process.exit() {
        Some(exit) => {
            let message = format!("the VMM has gone ({exit}): {error}");
            BackendError::new(BackendErrorKind::Gone, error.effect, message).caused_by(error)
        }
        None => error,
    }
}

/// Says whether a process that gave this `answer` has ended by now. One that shows no socket any more may be on its way out, and
/// is given a moment.
pub async fn has_ended<T>(process: &Process, answer: &Result<T, BackendError>) -> bool {
    let lost = matches!(answer, Err(error) if error.kind == BackendErrorKind::Unreachable);
    process.exit().is_some() || (lost && process.wait_for(REAPING).await.is_some())
}

/// Ends a launch that failed, so that nothing of it runs on, and says why it failed: in the VMM's last words where it died
/// by itself.
pub async fn failed(guard: Guarded, error: BackendError, log: &Path) -> BackendError {
    let lost = matches!(error.kind, BackendErrorKind::Gone | BackendErrorKind::Unreachable);
    if guard.exit().is_some() || (lost && guard.wait_for(REAPING).await.is_some()) {
        return launch::died_early(guard.process(), log, "while it started").await;
    }
    match launch::kill(guard.process()).await {
        Ok(()) => BackendError { effect: Effect::NotApplied, ..error },
        Err(kept) => {
            let message = format!("{error}; and what was started is still there: {kept}");
            BackendError::new(error.kind, Effect::Unknown, message).caused_by(error)
        }
    }
}
