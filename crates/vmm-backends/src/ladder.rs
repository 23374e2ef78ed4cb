//! The ladder that ends a VM, from a request to the guest down to SIGKILL.
//!
//! ```text
//!   ask the guest ──► power off ──► SIGTERM ──► SIGKILL ──► error: still there
//!   2 s + its time    1 s + 1 s     1 s         1 s
//!                     └─ forced: begins here, 4 s at most ─┘
//! ```
//!
//! A rung that fails leads to the next at once. Whatever a rung answers, only the end of the process counts: success says that
//! it has provably gone, and which rung it obeyed.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Ladder};
use vmm_core::state::EndedBy;
use vmm_host::process::{Process, Signal};

/// A call to a VMM that has yet to be made.
pub type Call<'a> = Pin<Box<dyn Future<Output = Result<(), BackendError>> + Send + 'a>>;

/// How long a VMM may take to pass a request on to its guest.
const ASKING: Duration = Duration::from_secs(2);
/// How long a VMM may take to answer the order to power off.
const ORDERING: Duration = Duration::from_secs(1);
/// How long a process may take to end after each of the lower rungs.
const ENDING: Duration = Duration::from_secs(1);
/// How long the kernel may take to report an end that a broken connection has shown already.
const REPORTING: Duration = Duration::from_millis(100);

/// Climbs down the ladder until `process` has gone, and answers with the rung that it obeyed.
///
/// `ask` is how the guest is asked, with the name of that rung; it is left out where `ladder` does not ask. `power_off` is the
/// order to the VMM itself. [`EndedBy::Guest`] says that the process ended before anything reached it.
///
/// # Errors
/// [`BackendErrorKind::Timeout`] with [`Effect::Unknown`] where the process outlives SIGKILL, as it does while it waits for a
/// device of the host.
pub async fn climb(
    process: &Process,
    ladder: Ladder,
    ask: Option<(EndedBy, Call<'_>)>,
    power_off: Option<Call<'_>>,
) -> Result<EndedBy, BackendError> {
    // The last rung that reached the process: whatever ends it before the next one does is this rung's work.
    let mut reached = EndedBy::Guest;
    if process.has_ended() {
        return gone(process, reached).await;
    }
    if let Some(patience) = ladder.ask_guest_for
        && let Some((rung, call)) = ask
    {
        let wait = call_vmm(process, ASKING, patience, call, "ask the guest to shut down").await;
        reached = if wait.is_some() { rung } else { reached };
        if ends_within(process, wait.unwrap_or(REPORTING)).await {
            return Ok(reached);
        }
    }
    if let Some(call) = power_off {
        let wait = call_vmm(process, ORDERING, ENDING, call, "power the VM off").await;
        reached = if wait.is_some() { EndedBy::Vmm } else { reached };
        if ends_within(process, wait.unwrap_or(REPORTING)).await {
            return Ok(reached);
        }
    }
    for (signal, rung) in [(Signal::TERM, EndedBy::Sigterm), (Signal::KILL, EndedBy::Sigkill)] {
        if process.has_ended() {
            return gone(process, reached).await;
        }
        match process.signal(signal) {
            Ok(()) => reached = rung,
            Err(error) => tracing::warn!(pid = process.pid(), ?signal, %error, "the VMM cannot be signalled"),
        }
        if reached == rung && ends_within(process, ENDING).await {
            return Ok(reached);
        }
    }
    Err(still_there(process))
}

/// Makes a call to the VMM, for at most `limit`. Answers how long to wait for the end of the process now: `patience` where the
/// call reached the VMM or may have, `None` where it did not.
async fn call_vmm(
    process: &Process,
    limit: Duration,
    patience: Duration,
    call: Call<'_>,
    what: &str,
) -> Option<Duration> {
    match until_gone(process, limit, call).await {
        Called::Gone | Called::Answered(Ok(())) => Some(patience),
        Called::TimedOut => {
            tracing::warn!(pid = process.pid(), "the VMM does not answer the call to {what}");
            // It has had its time; a VMM that hangs will not pass anything on to a guest.
            Some(Duration::ZERO)
        }
        Called::Answered(Err(error)) => {
            tracing::warn!(pid = process.pid(), %error, "the VMM could not be told to {what}");
            match error.effect {
                // It did as told and broke the connection over it.
                Effect::Applied => Some(patience),
                Effect::Unknown | Effect::NotApplied => None,
            }
        }
    }
}
/// What came first of a call.
enum Called {
    Answered(Result<(), BackendError>),
    Gone,
    TimedOut,
}

/// Makes a call, for at most `limit`, and not beyond the end of the process: a dead VMM's socket may stay silent for ever.
async fn until_gone(process: &Process, limit: Duration, call: Call<'_>) -> Called {
    tokio::select! {
        biased;
        answer = call => Called::Answered(answer),
        _ = process.wait() => Called::Gone,
        () = tokio::time::sleep(limit) => Called::TimedOut,
    }
}

async fn ends_within(process: &Process, limit: Duration) -> bool {
    process.wait_for(limit).await.is_some()
}

/// The pidfd has shown the end; what remains is that the exit is published.
async fn gone(process: &Process, reached: EndedBy) -> Result<EndedBy, BackendError> {
    if ends_within(process, ENDING).await { Ok(reached) } else { Err(still_there(process)) }
}

fn still_there(process: &Process) -> BackendError {
    let pid = process.pid();
    let message = format!(
        "the VMM's process {pid} is still there after SIGKILL; it probably waits for a device of the host: \
         look at /proc/{pid}/stack, and try again"
    );
    BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message)
}
