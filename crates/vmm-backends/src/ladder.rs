//! The ladder that ends a VM, from a request to the guest down to SIGKILL.
//!
//! ```text
//!   ask the guest ──► power off ──► SIGTERM ──► SIGKILL ──► error: still there
//!   2 s + its time    1 s + 1 s     1 s         1 s
//!                     └─ forced: begins here, 4 s at most ─┘
//! ```
//!
//! A rung that fails leads to the next one. Whatever a rung answers, only the end of the process counts: success says that it
//! has provably gone, and names the last rung that had reached it by then.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Ladder};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
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
        let called = call_vmm(process, ASKING, call, "ask the guest to shut down").await;
        reached = if called == Called::Refused { reached } else { rung };
        point(FaultPoint::LadderAsked);
        if ends_within(process, called.patience(patience, REPORTING)).await {
            return Ok(reached);
        }
    }
    if let Some(call) = power_off {
        let called = call_vmm(process, ORDERING, call, "power the VM off").await;
        reached = if called == Called::Refused { reached } else { EndedBy::Vmm };
        point(FaultPoint::LadderOrdered);
        let broken = if called == Called::Lost { ENDING } else { REPORTING };
        if ends_within(process, called.patience(ENDING, broken)).await {
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
        point(FaultPoint::LadderSignalled);
        if reached == rung && ends_within(process, ENDING).await {
            return Ok(reached);
        }
    }
    Err(still_there(process))
}

/// What became of a call. All but the last may have reached the VM: one that obeys at once takes its VMM along before that has
/// answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Called {
    /// The VMM said yes, or ended over it.
    Taken,
    /// It broke off without an answer.
    Lost,
    /// It said nothing in time.
    Silent,
    /// It said no, or was not reached.
    Refused,
}

impl Called {
    /// How long the end is waited for: `limit` where the VMM obeys, `broken` where no more is known than that it does not answer.
    pub(crate) fn patience(self, limit: Duration, broken: Duration) -> Duration {
        match self {
            Self::Taken => limit,
            Self::Lost | Self::Refused => broken,
            // It had its time to answer; who hangs passes nothing on to a guest.
            Self::Silent => Duration::ZERO,
        }
    }
}

/// Makes a call to the VMM, for at most `limit`, and not beyond the end of its process: a dead VMM's socket may stay silent.
pub(crate) async fn call_vmm(process: &Process, limit: Duration, call: Call<'_>, what: &str) -> Called {
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

#[cfg(test)]
mod tests {
    use vmm_host::process::{Command, Guarded, spawn_guarded};

    use super::*;

    const PATIENT: Ladder = Ladder { ask_guest_for: Some(Duration::from_secs(60)) };
    const HASTY: Ladder = Ladder { ask_guest_for: Some(Duration::from_millis(1)) };
    const FORCED: Ladder = Ladder { ask_guest_for: None };

    /// A stand-in for a VMM: obeys SIGUSR1 as a guest obeys its power button, SIGUSR2 as a VMM obeys its order.
    struct FakeVmm {
        guard: Guarded,
        _dir: tempfile::TempDir,
    }

    impl FakeVmm {
        /// Starts it once `traps` are set.
        async fn start(traps: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let log = dir.path().join("log");
            let script = format!("{traps}; echo ready; exec tail -f /dev/null");
            let guard = spawn_guarded(Command::new("/bin/sh", ["-c", &script], &log)).await.unwrap();
            while !std::fs::read_to_string(&log).unwrap().contains("ready") {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Self { guard, _dir: dir }
        }

        fn button(&self) -> Option<(EndedBy, Call<'_>)> {
            Some((EndedBy::Acpi, self.signal(Signal::USR1)))
        }

        fn order(&self) -> Option<Call<'_>> {
            Some(self.signal(Signal::USR2))
        }

        fn signal(&self, signal: Signal) -> Call<'_> {
            Box::pin(async move {
                self.guard.signal(signal).unwrap();
                Ok(())
            })
        }

        /// Climbs, and checks that the process has gone whenever the answer says so.
        async fn climb(
            &self,
            ladder: Ladder,
            ask: Option<(EndedBy, Call<'_>)>,
            power_off: Option<Call<'_>>,
        ) -> EndedBy {
            let ended_by = climb(&self.guard, ladder, ask, power_off).await.unwrap();
            assert!(self.guard.exit().is_some(), "the answer came before the end");
            ended_by
        }
    }

    fn failing<'a>(effect: Effect) -> Call<'a> {
        Box::pin(async move { Err(BackendError::new(BackendErrorKind::Rejected, effect, "no")) })
    }

    fn forbidden<'a>() -> Call<'a> {
        Box::pin(async { panic!("the guest was asked") })
    }

    fn never<'a>() -> Call<'a> {
        Box::pin(std::future::pending())
    }

    #[tokio::test]
    async fn a_guest_that_obeys_is_named() {
        let vmm = FakeVmm::start(":").await;
        assert_eq!(vmm.climb(PATIENT, vmm.button(), vmm.order()).await, EndedBy::Acpi);
    }

    #[tokio::test]
    async fn a_guest_that_does_not_is_powered_off() {
        let vmm = FakeVmm::start("trap '' USR1").await;
        assert_eq!(vmm.climb(HASTY, vmm.button(), vmm.order()).await, EndedBy::Vmm);
    }

    #[tokio::test]
    async fn a_question_that_fails_leads_on_at_once() {
        for effect in [Effect::NotApplied, Effect::Unknown] {
            let vmm = FakeVmm::start(":").await;
            let ask = Some((EndedBy::Acpi, failing(effect)));
            // With a minute's patience: only an asked guest is waited for.
            assert_eq!(vmm.climb(PATIENT, ask, vmm.order()).await, EndedBy::Vmm);
        }
    }

    #[tokio::test]
    async fn a_guest_that_obeys_before_its_vmm_answers_is_named() {
        let vmm = FakeVmm::start(":").await;
        let ask: Call<'_> = Box::pin(async {
            vmm.guard.signal(Signal::KILL).unwrap();
            failing(Effect::Unknown).await
        });
        assert_eq!(vmm.climb(PATIENT, Some((EndedBy::Acpi, ask)), None).await, EndedBy::Acpi);
    }

    #[tokio::test]
    async fn without_force_there_may_be_nothing_to_ask() {
        let vmm = FakeVmm::start(":").await;
        assert_eq!(vmm.climb(PATIENT, None, None).await, EndedBy::Sigterm);
    }

    #[tokio::test]
    async fn force_does_not_ask() {
        let vmm = FakeVmm::start(":").await;
        let ask = Some((EndedBy::Acpi, forbidden()));
        assert_eq!(vmm.climb(FORCED, ask, vmm.order()).await, EndedBy::Vmm);
    }

    #[tokio::test]
    async fn a_vmm_that_refuses_gets_sigterm() {
        let vmm = FakeVmm::start(":").await;
        assert_eq!(vmm.climb(FORCED, None, Some(failing(Effect::NotApplied))).await, EndedBy::Sigterm);
    }

    #[tokio::test]
    async fn a_vmm_that_obeys_without_an_answer_is_named() {
        let vmm = FakeVmm::start(":").await;
        let order: Call<'_> = Box::pin(async {
            vmm.guard.signal(Signal::USR2).unwrap();
            failing(Effect::Unknown).await
        });
        assert_eq!(vmm.climb(FORCED, None, Some(order)).await, EndedBy::Vmm);
    }

    #[tokio::test]
    async fn a_vmm_that_ignores_sigterm_is_killed() {
        let vmm = FakeVmm::start("trap '' USR2 TERM").await;
        assert_eq!(vmm.climb(FORCED, None, vmm.order()).await, EndedBy::Sigkill);
    }

    #[tokio::test]
    async fn a_stopped_vmm_that_answers_nothing_is_killed() {
        let vmm = FakeVmm::start(":").await;
        vmm.guard.signal(Signal::STOP).unwrap();
        let ask = Some((EndedBy::Acpi, never()));
        assert_eq!(vmm.climb(HASTY, ask, Some(never())).await, EndedBy::Sigkill);
    }

    #[tokio::test]
    async fn what_had_ended_was_the_guest() {
        let vmm = FakeVmm::start(":").await;
        vmm.guard.signal(Signal::KILL).unwrap();
        vmm.guard.wait().await;
        for ladder in [PATIENT, FORCED] {
            let ask = Some((EndedBy::Acpi, forbidden()));
            assert_eq!(vmm.climb(ladder, ask, None).await, EndedBy::Guest);
        }
    }

    #[tokio::test]
    async fn what_ends_before_the_question_arrives_was_the_guest() {
        let vmm = FakeVmm::start(":").await;
        // As a connection breaks: the process has ended, and nobody has reaped it yet.
        let ask: Call<'_> = Box::pin(async {
            vmm.guard.signal(Signal::KILL).unwrap();
            failing(Effect::NotApplied).await
        });
        assert_eq!(vmm.climb(PATIENT, Some((EndedBy::Acpi, ask)), None).await, EndedBy::Guest);
    }

    #[tokio::test]
    async fn an_adopted_vmm_climbs_down_as_well() {
        let vmm = FakeVmm::start("trap '' TERM").await;
        let vmm_host::process::Lookup::Alive(adopted) = vmm_host::process::adopt(vmm.guard.identity()) else {
            panic!("it is there")
        };
        assert_eq!(climb(&adopted, FORCED, None, None).await.unwrap(), EndedBy::Sigkill);
        vmm.guard.wait().await;
    }
}
