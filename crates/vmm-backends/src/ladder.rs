//! Ends a VM by a ladder of steps, from a request to the guest down to SIGKILL. All backends,
//! managed and attached, use this one ladder.
//!
//! ```text
//!   ask the guest, again every 3 s ──► power off ──► SIGTERM ──► SIGKILL ──► error: still there
//!   for all the time it is given │     1.2 s + 1 s   1 s         1 s
//!                                │     └─ forced: begins here, 5 s at most ─┘
//!                                └─ the VMM answered no request: error, and the VM runs on
//! ```
//!
//! The time limit belongs to the guest. A VMM that answers late, loses its connection or refuses
//! may still have passed the request on, so its guest gets the whole time before the next rung. The
//! request is repeated because a guest that is still booting loses the first one.
//!
//! Without force the VM is not ended if its VMM answered no request, because its guest may never
//! have been asked.
//!
//! Only the end of the VM counts as success, whatever the rungs returned. Success means that the VM
//! is proven to have ended. The result names the last rung that had reached the VM by then.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, ContactProof, Effect, LadderOptions};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Process, Signal};

use crate::timeouts::{END_TIMEOUT, EXIT_REPORT_TIMEOUT};

/// A call to a VMM that was not made yet.
pub type UnsentCall<'a> = Pin<Box<dyn Future<Output = Result<(), BackendError>> + Send + 'a>>;

/// The pause between the answer to one request to the guest and the next request.
const ASK_INTERVAL: Duration = Duration::from_secs(3);
/// The longest wait for the answer to the order to power off, without force.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest wait for the answer to the order to power off, with force.
const FORCED_ORDER_TIMEOUT: Duration = Duration::from_millis(1200);
/// The interval at which a VMM that outlives its VM is asked whether the VM has ended.
const END_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The ways to end one VM.
#[async_trait]
pub trait LadderRungs: Send + Sync {
    /// Returns the VMM's process.
    fn process(&self) -> &Process;

    /// Returns a request to the guest to shut down with the name of its rung, or `None` if the
    /// guest cannot be asked. Each call returns a new request. The request first resumes a paused
    /// guest, because a paused guest does not react.
    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)>;

    /// Returns the order to the VMM to power the VM off, or `None` if there is no such order. An
    /// attached VMM that would exit after the order offers the order by force only.
    fn power_off(&self, forced: bool) -> Option<UnsentCall<'_>>;

    /// Returns true if the VM has ended while its VMM runs on.
    async fn has_ended(&self) -> bool {
        false
    }

    /// Ends the process after all earlier rungs have failed. `reached` is the last rung that
    /// reached the VM.
    ///
    /// # Errors
    /// Fails as [`climb`] does.
    async fn end_process(&self, forced: bool, reached: EndedBy) -> Result<EndedBy, BackendError> {
        let _ = forced;
        end_by_signals(self.process(), reached).await
    }
}

/// Ends the VM by the rungs of the ladder, in order, and returns the rung that ended it.
/// [`EndedBy::Guest`] means that the VM ended before any rung reached it.
///
/// # Errors
/// Without force: [`BackendErrorKind::Timeout`] or [`BackendErrorKind::Unreachable`] if the VMM
/// answered no request within the whole time; the VM runs on. [`BackendErrorKind::StillRuns`] if
/// another program started the process and no other rung has ended the VM.
///
/// [`BackendErrorKind::Timeout`] if the process outlives SIGKILL, as it does while it waits for a
/// device of the host.
///
/// The effect of each error is [`Effect::Unknown`].
pub async fn climb(means: &dyn LadderRungs, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
    let process = means.process();
    // A process that has ended already is checked first, because a call to its socket would wait in
    // vain and would be taken for a VMM that does not answer.
    if process.has_ended() {
        return gone(process, EndedBy::Guest).await;
    }
    let forced = ladder.guest_timeout.is_none();
    let mut reached = EndedBy::Guest;
    // Rung 1: ask the guest, for as long as the caller gives it. If the VMM answered no request,
    // the ladder stops with an error, because the guest may never have been asked and the next
    // rungs would take its power away. Force begins at rung 2 instead.
    if let Some(guest_timeout) = ladder.guest_timeout {
        match ask(means, guest_timeout).await {
            AskOutcome::Ended(rung) => return Ok(rung),
            AskOutcome::RunsOn(rung) => reached = rung,
            AskOutcome::Unanswered(error) => return Err(error),
        }
    }
    // Rung 2: order the VMM to power off. A refused order leaves `reached` unchanged, because the
    // VM did not receive it. Every other outcome may have reached the VM, so an end that follows is
    // attributed to this rung. The wait depends on the outcome, see `CallOutcome::exit_timeout`.
    if let Some(call) = means.power_off(forced) {
        let limit = if forced { FORCED_ORDER_TIMEOUT } else { ORDER_TIMEOUT };
        let called = call_vmm(process, limit, call, "power the VM off").await;
        reached = if called == CallOutcome::Refused { reached } else { EndedBy::Vmm };
        point(FaultPoint::LadderOrdered);
        if ends_within(means, called.exit_timeout()).await {
            return Ok(reached);
        }
    }
    // The VM may have ended between the last wait and this line. Without this check the next rung
    // would signal a process that is gone and report a rung that did nothing.
    if process.has_ended() {
        return gone(process, reached).await;
    }
    means.end_process(forced, reached).await
}

/// The outcome of the requests to a guest to shut down.
enum AskOutcome {
    /// The VM has ended. The rung is the last one that had reached it.
    Ended(EndedBy),
    /// The VM runs on, or its guest cannot be asked. The rung is the last one that reached the VM.
    RunsOn(EndedBy),
    /// The VMM answered no request.
    Unanswered(BackendError),
}

/// Asks the guest repeatedly and waits for the end of the VM, for `guest_timeout` in all.
async fn ask(means: &dyn LadderRungs, guest_timeout: Duration) -> AskOutcome {
    // `ended` is one future for the whole function, because it polls the VMM and a new one for each
    // request would start its interval again.
    let deadline = Instant::now() + guest_timeout;
    let mut ended = std::pin::pin!(end_of(means));
    let mut reached = EndedBy::Guest;
    let mut answered = false;
    let mut last = None;
    let mut first = true;
    while let Some((rung, call)) = means.ask() {
        let answer = tokio::select! {
            biased;
            answer = call => Some(answer),
            // This arm is polled second, because a VM that obeys at once ends before its VMM has
            // answered, and the answer would then be an error although the request succeeded.
            () = &mut ended => {
                if first {
                    point(FaultPoint::LadderAsked);
                }
                return AskOutcome::Ended(rung);
            }
            () = tokio::time::sleep_until(deadline) => None,
        };
        match answer {
            Some(Ok(())) => (reached, answered) = (rung, true),
            Some(Err(error)) => {
                // An error whose effect is unknown may have reached the guest, so an end that
                // follows is attributed to this rung.
                if error.effect != Effect::NotApplied {
                    reached = rung;
                }
                // A VMM that reports its guest as gone has answered, too.
                answered |=
                    error.kind.contact() == ContactProof::Made || error.kind == BackendErrorKind::Gone;
                tracing::warn!(pid = means.process().pid(), %error, "the guest could not be asked to shut down");
                last = Some(error);
            }
            // The deadline passed during the call. The request may still reach the guest.
            None => reached = rung,
        }
        if std::mem::take(&mut first) {
            point(FaultPoint::LadderAsked);
        }
        // The next request follows 3 s after this answer, or the deadline ends the wait earlier.
        // The end of the VM is watched during the pause, so a guest that obeys is not asked again.
        let again = (Instant::now() + ASK_INTERVAL).min(deadline);
        tokio::select! {
            biased;
            () = &mut ended => return AskOutcome::Ended(reached),
            () = tokio::time::sleep_until(again) => {}
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    if means.process().has_ended() {
        return AskOutcome::Ended(reached);
    }
    // A guest that cannot be asked at all (`ask` returned `None` at once) has a VMM that was never
    // called, so a missing answer means nothing there.
    if answered || first {
        AskOutcome::RunsOn(reached)
    } else {
        AskOutcome::Unanswered(unanswered_error(guest_timeout, last))
    }
}

fn unanswered_error(guest_timeout: Duration, last: Option<BackendError>) -> BackendError {
    let kind = match &last {
        Some(error) if error.kind.contact() == ContactProof::Lost => error.kind,
        Some(_) | None => BackendErrorKind::Timeout,
    };
    let why = last.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
    let message = format!(
        "the VMM has not answered for {} s{why}, so the guest may not have been asked, and the VM runs on: try again, or use \
         force, which ends a VMM that does not answer",
        guest_timeout.as_secs()
    );
    let error = BackendError::new(kind, Effect::Unknown, message);
    match last {
        Some(last) => error.caused_by(last),
        None => error,
    }
}

/// Powers the VM off by the VMM's interface, without force and without waiting for the guest. If
/// the VMM has no such order, the guest is asked once.
///
/// # Errors
/// Fails as [`LadderRungs::end_process`] does without force.
pub(crate) async fn power_off(means: &dyn LadderRungs) -> Result<EndedBy, BackendError> {
    let process = means.process();
    if process.has_ended() {
        return gone(process, EndedBy::Guest).await;
    }
    let order = means.power_off(false).map(|call| (EndedBy::Vmm, call)).or_else(|| means.ask());
    let mut reached = EndedBy::Guest;
    if let Some((rung, call)) = order {
        let called = call_vmm(process, ORDER_TIMEOUT, call, "power the VM off").await;
        reached = if called == CallOutcome::Refused { reached } else { rung };
        point(FaultPoint::LadderOrdered);
        if ends_within(means, called.exit_timeout()).await {
            return Ok(reached);
        }
    }
    means.end_process(false, reached).await
}

/// Ends a process that this program started: SIGTERM, then SIGKILL.
///
/// # Errors
/// [`BackendErrorKind::Timeout`] where the process outlives SIGKILL.
async fn end_by_signals(process: &Process, mut reached: EndedBy) -> Result<EndedBy, BackendError> {
    for (signal, rung) in [(Signal::TERM, EndedBy::Sigterm), (Signal::KILL, EndedBy::Sigkill)] {
        if process.has_ended() {
            return gone(process, reached).await;
        }
        // A signal that the kernel refuses does not count as a rung, and the loop goes on at once
        // to the next signal.
        match process.signal(signal) {
            Ok(()) => reached = rung,
            Err(error) => tracing::warn!(pid = process.pid(), ?signal, %error, "the VMM cannot be signalled"),
        }
        point(FaultPoint::LadderSignalled);
        if reached == rung && process.wait_for(END_TIMEOUT).await.is_some() {
            return Ok(reached);
        }
    }
    Err(still_there(process))
}

/// The outcome of an order. Every variant except [`Self::Refused`] may have reached the VM, because
/// a VM that obeys at once ends together with its VMM before the VMM has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallOutcome {
    /// The VMM accepted the order, or ended during the call.
    Accepted,
    /// The connection broke without an answer.
    Lost,
    /// The VMM did not answer in time.
    Silent,
    /// The VMM refused the order, or was not reached.
    Refused,
}

impl CallOutcome {
    /// Returns the time to wait for the end of the VM after this outcome.
    fn exit_timeout(self) -> Duration {
        match self {
            Self::Accepted | Self::Lost => END_TIMEOUT,
            Self::Refused => EXIT_REPORT_TIMEOUT,
            // The wait for the answer was also a wait for the end, and the next rung needs no
            // answer.
            Self::Silent => Duration::ZERO,
        }
    }
}

/// Makes a call to the VMM and waits for the answer for at most `limit`, or until the process ends,
/// because the socket of a dead VMM may stay silent. `what` completes the log line "does not answer
/// the call to …".
async fn call_vmm(process: &Process, limit: Duration, call: UnsentCall<'_>, what: &str) -> CallOutcome {
    let answer = tokio::select! {
        biased;
        answer = call => answer,
        _ = process.wait() => return CallOutcome::Accepted,
        () = tokio::time::sleep(limit) => {
            tracing::warn!(pid = process.pid(), call = what, "the VMM does not answer a call");
            return CallOutcome::Silent;
        }
    };
    let Err(error) = answer else { return CallOutcome::Accepted };
    tracing::warn!(pid = process.pid(), call = what, %error, "the VMM refused a call");
    match error.effect {
        Effect::Applied => CallOutcome::Accepted,
        Effect::Unknown => CallOutcome::Lost,
        Effect::NotApplied => CallOutcome::Refused,
    }
}

/// Waits until the VM has ended, either together with its process or alone while its VMM runs on.
async fn end_of(means: &dyn LadderRungs) {
    let looking = async {
        // The process may end during the question, so both are awaited side by side.
        while !means.has_ended().await {
            tokio::time::sleep(END_POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        _ = means.process().wait() => {}
        () = looking => {}
    }
}

async fn ends_within(means: &dyn LadderRungs, limit: Duration) -> bool {
    tokio::time::timeout(limit, end_of(means)).await.is_ok() || means.process().has_ended()
}

/// Waits until the exit of an ended process is published, because the pidfd shows the end of a
/// process before its exit status is known. Returns `reached`.
async fn gone(process: &Process, reached: EndedBy) -> Result<EndedBy, BackendError> {
    if process.wait_for(END_TIMEOUT).await.is_some() { Ok(reached) } else { Err(still_there(process)) }
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
