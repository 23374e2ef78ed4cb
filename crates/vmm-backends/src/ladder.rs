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

/// Climbs down the ladder until `process` has gone, and answers with the rung that it obeyed.
///
/// `ask` is how the guest is asked, with the name of that rung; it is left out where `ladder` does not ask. `power_off` is the
/// order to the VMM itself. [`EndedBy::Guest`] says that the process had ended before anything was asked of it.
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
    if process.exit().is_some() {
        return Ok(EndedBy::Guest);
    }
    if let Some(patience) = ladder.ask_guest_for
        && let Some((rung, call)) = ask
        && let Some(ended_by) = ask_guest(process, patience, rung, call).await
    {
        return Ok(ended_by);
    }
    if let Some(call) = power_off
        && order(process, call).await
    {
        return Ok(EndedBy::Vmm);
    }
    for (signal, rung) in [(Signal::TERM, EndedBy::Sigterm), (Signal::KILL, EndedBy::Sigkill)] {
        if let Err(error) = process.signal(signal) {
            tracing::warn!(pid = process.pid(), ?signal, %error, "the VMM could not be signalled");
        } else if process.wait_for(ENDING).await.is_some() {
            return Ok(rung);
        }
    }
    Err(BackendError::new(
        BackendErrorKind::Timeout,
        Effect::Unknown,
        format!(
            "the VMM's process {} is still there after SIGKILL; it probably waits for a device of the host: \
             look at /proc/{}/stack, and try again",
            process.pid(),
            process.pid()
        ),
    ))
}

/// Asks the guest and gives it its time. `None` means that the next rung is due.
async fn ask_guest(process: &Process, patience: Duration, rung: EndedBy, call: Call<'_>) -> Option<EndedBy> {
    match until_gone(process, ASKING, call).await {
        Called::Gone => Some(rung),
        Called::Answered(Ok(())) => process.wait_for(patience).await.map(|_| rung),
        Called::Answered(Err(error)) => {
            // A VMM that has ended refuses every call: then nobody was asked.
            if process.exit().is_some() {
                return Some(EndedBy::Guest);
            }
            tracing::warn!(pid = process.pid(), %error, "the guest could not be asked to shut down");
            None
        }
        Called::TimedOut => {
            tracing::warn!(pid = process.pid(), "the VMM did not pass the request to shut down on to its guest");
            None
        }
    }
}

/// Orders the VMM to power off. Answers whether it has gone.
async fn order(process: &Process, call: Call<'_>) -> bool {
    match until_gone(process, ORDERING, call).await {
        Called::Gone => return true,
        Called::Answered(Ok(())) | Called::TimedOut => {}
        Called::Answered(Err(error)) => {
            tracing::warn!(pid = process.pid(), %error, "the VMM refused to power off");
            // An order whose answer was lost, because the VMM obeyed too fast, may still work; one that was not taken will not.
            if error.effect == Effect::NotApplied {
                return process.exit().is_some();
            }
        }
    }
    process.wait_for(ENDING).await.is_some()
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
