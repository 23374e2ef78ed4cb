//! The ladder that ends a VM, from a request to the guest down to SIGKILL. One for all backends, managed and attached.
//!
//! ```text
//!   ask the guest, again every 3 s ──► power off ──► end the process: SIGTERM ──► SIGKILL ──► error: still there
//!   for all the time it is given │     1.2 s + 1 s   1 s         1 s
//!                                │     └─ forced: begins here, 5 s at most ─┘
//!                                └─ the VMM has answered nothing: error, and nothing is ended
//! ```
//!
//! The time belongs to the guest. A VMM that is slow to answer, loses its connection or refuses may have passed the request on
//! all the same, so its guest gets the whole time before the next rung. The request is repeated, because a guest that is still
//! booting loses the first one.
//!
//! Without force nothing is ended that has answered nothing: the guest of such a VMM may never have been asked.
//!
//! Whatever a rung answers, only the end of the VM counts: success says that it has provably gone, and names the last rung that
//! had reached it by then.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, ContactProof, Effect, Ladder};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Process, Signal};

use crate::patience::{ENDING, REPORTING};

/// A call to a VMM that has yet to be made.
pub type Call<'a> = Pin<Box<dyn Future<Output = Result<(), BackendError>> + Send + 'a>>;

/// The pause between the answer to one request to the guest and the next request.
const ASKING_AGAIN: Duration = Duration::from_secs(3);
/// The time that a VMM has to answer the order to power off: without force, and by force.
const ORDERING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(1200));
/// The interval at which a VMM that outlives its VM is asked whether the VM has ended.
const LOOKING_AGAIN: Duration = Duration::from_millis(200);

/// The ways to end one VM.
#[async_trait]
pub trait Means: Send + Sync {
    /// Returns the VMM's process.
    fn process(&self) -> &Process;

    /// Returns a request to the guest to shut down, and the name of that rung; `None` where the guest cannot be asked. Each
    /// call makes a new request, and resumes a guest that stands still, because that one hears nothing.
    fn ask(&self) -> Option<(EndedBy, Call<'_>)>;

    /// Returns the order to the VMM to power its VM off; `None` where there is none. A VMM of somebody else's that would end
    /// itself over the order has one by force only.
    fn power_off(&self, forced: bool) -> Option<Call<'_>>;

    /// Says whether the VM has ended though its VMM lives on.
    async fn has_ended(&self) -> bool {
        false
    }

    /// Ends the process after everything gentler has failed. `reached` is the last rung that reached the VM.
    ///
    /// # Errors
    /// Fails as [`climb`] does.
    async fn end_process(&self, forced: bool, reached: EndedBy) -> Result<EndedBy, BackendError> {
        let _ = forced;
        signal_down(self.process(), reached).await
    }
}

/// Climbs down the ladder until the VM has gone, and answers with the rung that it obeyed. [`EndedBy::Guest`] says that the VM
/// ended before anything reached it.
///
/// # Errors
/// Without force: [`BackendErrorKind::Timeout`] or [`BackendErrorKind::Unreachable`] where the VMM answered nothing in all the
/// time; it lives then. [`BackendErrorKind::StillRuns`] where the process is somebody else's and nothing else has ended the VM.
///
/// [`BackendErrorKind::Timeout`] where the process outlives SIGKILL, as it does while it waits for a device of the host.
///
/// The effect is [`Effect::Unknown`] each time.
pub async fn climb(means: &dyn Means, ladder: Ladder) -> Result<EndedBy, BackendError> {
    let process = means.process();
    if process.has_ended() {
        return gone(process, EndedBy::Guest).await;
    }
    let forced = ladder.ask_guest_for.is_none();
    let mut reached = EndedBy::Guest;
    if let Some(patience) = ladder.ask_guest_for {
        match ask(means, patience).await {
            Asked::Ended(rung) => return Ok(rung),
            Asked::RunsOn(rung) => reached = rung,
            Asked::Unanswered(error) => return Err(error),
        }
    }
    if let Some(call) = means.power_off(forced) {
        let limit = if forced { ORDERING.1 } else { ORDERING.0 };
        let called = call_vmm(process, limit, call, "power the VM off").await;
        reached = if called == Called::Refused { reached } else { EndedBy::Vmm };
        point(FaultPoint::LadderOrdered);
        if ends_within(means, called.patience()).await {
            return Ok(reached);
        }
    }
    if process.has_ended() {
        return gone(process, reached).await;
    }
    means.end_process(forced, reached).await
}

/// The outcome of asking a guest to shut down.
enum Asked {
    /// The VM has ended, by this rung.
    Ended(EndedBy),
    /// The VM runs on, or cannot be asked; the rung is the last one that reached it.
    RunsOn(EndedBy),
    /// The VMM answered nothing.
    Unanswered(BackendError),
}

/// Asks the guest again and again, and waits for its end, for `patience` in all.
async fn ask(means: &dyn Means, patience: Duration) -> Asked {
    let deadline = Instant::now() + patience;
    let mut ended = std::pin::pin!(end_of(means));
    let mut reached = EndedBy::Guest;
    let mut answered = false;
    let mut last = None;
    let mut first = true;
    while let Some((rung, call)) = means.ask() {
        let answer = tokio::select! {
            biased;
            answer = call => Some(answer),
            // A VM that obeys at once ends before its VMM has answered.
            () = &mut ended => {
                if first {
                    point(FaultPoint::LadderAsked);
                }
                return Asked::Ended(rung);
            }
            () = tokio::time::sleep_until(deadline) => None,
        };
        match answer {
            Some(Ok(())) => (reached, answered) = (rung, true),
            Some(Err(error)) => {
                if error.effect != Effect::NotApplied {
                    reached = rung;
                }
                // A VMM that has said that its guest is gone has answered as well.
                answered |=
                    error.kind.contact() == ContactProof::Made || error.kind == BackendErrorKind::Gone;
                tracing::warn!(pid = means.process().pid(), %error, "the guest could not be asked to shut down");
                last = Some(error);
            }
            None => reached = rung,
        }
        if std::mem::take(&mut first) {
            point(FaultPoint::LadderAsked);
        }
        let again = (Instant::now() + ASKING_AGAIN).min(deadline);
        tokio::select! {
            biased;
            () = &mut ended => return Asked::Ended(reached),
            () = tokio::time::sleep_until(again) => {}
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    if means.process().has_ended() {
        return Asked::Ended(reached);
    }
    // A guest that cannot be asked at all has nobody to answer for it.
    if answered || first { Asked::RunsOn(reached) } else { Asked::Unanswered(unanswered(patience, last)) }
}

fn unanswered(patience: Duration, last: Option<BackendError>) -> BackendError {
    let kind = match &last {
        Some(error) if error.kind.contact() == ContactProof::Lost => error.kind,
        Some(_) | None => BackendErrorKind::Timeout,
    };
    let why = last.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
    let message = format!(
        "its VMM has answered nothing for {} s{why}, so its guest may not have been asked, and it runs on: try again, or use \
         force, which ends a VMM that does not answer",
        patience.as_secs()
    );
    let error = BackendError::new(kind, Effect::Unknown, message);
    match last {
        Some(last) => error.caused_by(last),
        None => error,
    }
}

/// Powers the VM off by its VMM's interface alone, as without force, and does not wait for the guest. A guest whose VMM has no
/// such order is asked once.
///
/// # Errors
/// Fails as [`Means::end_process`] does without force.
pub(crate) async fn order_off(means: &dyn Means) -> Result<EndedBy, BackendError> {
    let process = means.process();
    if process.has_ended() {
        return gone(process, EndedBy::Guest).await;
    }
    let order = means.power_off(false).map(|call| (EndedBy::Vmm, call)).or_else(|| means.ask());
    let mut reached = EndedBy::Guest;
    if let Some((rung, call)) = order {
        let called = call_vmm(process, ORDERING.0, call, "power the VM off").await;
        reached = if called == Called::Refused { reached } else { rung };
        point(FaultPoint::LadderOrdered);
        if ends_within(means, called.patience()).await {
            return Ok(reached);
        }
    }
    means.end_process(false, reached).await
}

/// Ends a process of ours: SIGTERM, then SIGKILL.
///
/// # Errors
/// [`BackendErrorKind::Timeout`] where the process outlives SIGKILL.
async fn signal_down(process: &Process, mut reached: EndedBy) -> Result<EndedBy, BackendError> {
    for (signal, rung) in [(Signal::TERM, EndedBy::Sigterm), (Signal::KILL, EndedBy::Sigkill)] {
        if process.has_ended() {
            return gone(process, reached).await;
        }
        match process.signal(signal) {
            Ok(()) => reached = rung,
            Err(error) => tracing::warn!(pid = process.pid(), ?signal, %error, "the VMM cannot be signalled"),
        }
        point(FaultPoint::LadderSignalled);
        if reached == rung && process.wait_for(ENDING).await.is_some() {
            return Ok(reached);
        }
    }
    Err(still_there(process))
}

/// The outcome of an order. All but the last may have reached the VM: one that obeys at once takes its VMM along before that
/// has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Called {
    /// The VMM said yes, or ended over it.
    Taken,
    /// The VMM broke off without an answer.
    Lost,
    /// The VMM said nothing in time.
    Silent,
    /// The VMM said no, or was not reached.
    Refused,
}

impl Called {
    /// Returns the time for which the end is waited for.
    fn patience(self) -> Duration {
        match self {
            Self::Taken | Self::Lost => ENDING,
            Self::Refused => REPORTING,
            // The order had its time to be answered, and the next rung needs no answer.
            Self::Silent => Duration::ZERO,
        }
    }
}

/// Makes a call to the VMM, for at most `limit`, and not beyond the end of its process: a dead VMM's socket may stay silent.
async fn call_vmm(process: &Process, limit: Duration, call: Call<'_>, what: &str) -> Called {
    let answer = tokio::select! {
        biased;
        answer = call => answer,
        _ = process.wait() => return Called::Taken,
        () = tokio::time::sleep(limit) => {
            tracing::warn!(pid = process.pid(), "the VMM does not answer the call to {what}");
            return Called::Silent;
        }
    };
    let Err(error) = answer else { return Called::Taken };
    tracing::warn!(pid = process.pid(), %error, "the VMM could not be told to {what}");
    match error.effect {
        Effect::Applied => Called::Taken,
        Effect::Unknown => Called::Lost,
        Effect::NotApplied => Called::Refused,
    }
}

/// Waits until the VM has ended: with its process, or alone where its VMM lives on.
async fn end_of(means: &dyn Means) {
    let looking = async {
        // The process may end in the middle of the question.
        while !means.has_ended().await {
            tokio::time::sleep(LOOKING_AGAIN).await;
        }
    };
    tokio::select! {
        biased;
        _ = means.process().wait() => {}
        () = looking => {}
    }
}

async fn ends_within(means: &dyn Means, limit: Duration) -> bool {
    tokio::time::timeout(limit, end_of(means)).await.is_ok() || means.process().has_ended()
}

/// The pidfd has shown the end; what remains is that the exit is published.
async fn gone(process: &Process, reached: EndedBy) -> Result<EndedBy, BackendError> {
    if process.wait_for(ENDING).await.is_some() { Ok(reached) } else { Err(still_there(process)) }
}

fn still_there(process: &Process) -> BackendError {
    let pid = process.pid();
    let message = format!(
        "the VMM's process {pid} is still there after SIGKILL; it probably waits for a device of the host: \
         look at /proc/{pid}/stack, and try again"
    );
    BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message)
}

#[cfg(test)]
mod tests;
