use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_host::process::{Command, ProcessGuard, spawn_guarded};

use super::*;

const PATIENT: LadderOptions = LadderOptions { guest_timeout: Some(Duration::from_secs(60)) };
const HASTY: LadderOptions = LadderOptions { guest_timeout: Some(Duration::from_millis(1)) };
const FORCED: LadderOptions = LadderOptions { guest_timeout: None };

/// The behaviour of a fake VMM during a call.
#[derive(Clone, Copy, Debug)]
enum Play {
    /// Sends the signal to the process, and answers.
    Obeys(Signal),
    /// Answers without an effect.
    Loses,
    /// Fails with this error.
    Fails(BackendErrorKind, Effect),
    /// Ends the process, and fails with this effect.
    EndsOver(Effect),
    /// Does not answer.
    Hangs,
    /// Fails the test if it is called.
    Forbidden,
    /// Offers no such call.
    Missing,
}

use Play::{EndsOver, Fails, Forbidden, Hangs, Loses, Missing, Obeys};

/// The signal by which the fake guest obeys its power button, and the one by which the fake VMM
/// obeys its order.
const BUTTON: Play = Obeys(Signal::USR1);
const ORDER: Play = Obeys(Signal::USR2);

/// A stand-in for a VMM.
struct FakeVmm {
    guard: ProcessGuard,
    /// The behaviour at each request to the guest. The last one holds for all later requests.
    asked: Vec<Play>,
    order: Play,
    requests: AtomicUsize,
    _dir: tempfile::TempDir,
}

impl FakeVmm {
    /// Starts the process once `traps` are set.
    async fn start(traps: &str, asked: &[Play], order: Play) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = format!("{traps}; echo ready; exec tail -f /dev/null");
        let guard = spawn_guarded(Command::new("/bin/sh", ["-c", &script], &log)).await.unwrap();
        while !std::fs::read_to_string(&log).unwrap().contains("ready") {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Self { guard, asked: asked.to_vec(), order, requests: AtomicUsize::new(0), _dir: dir }
    }

    fn play(&self, play: Play) -> Option<UnsentCall<'_>> {
        if matches!(play, Missing) {
            return None;
        }
        Some(Box::pin(async move {
            let failing = |kind, effect| Err(BackendError::new(kind, effect, "no"));
            match play {
                Obeys(signal) => self.guard.signal(signal).unwrap(),
                Loses | Missing => {}
                Fails(kind, effect) => return failing(kind, effect),
                EndsOver(effect) => {
                    self.guard.signal(Signal::KILL).unwrap();
                    return failing(BackendErrorKind::Unreachable, effect);
                }
                Hangs => std::future::pending().await,
                Forbidden => panic!("it was called"),
            }
            Ok(())
        }))
    }

    /// Climbs the ladder, and checks that the process has ended if and only if the result is a
    /// success.
    async fn climb(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        let ended_by = climb(self, ladder).await;
        assert_eq!(self.guard.exit().is_some(), ended_by.is_ok());
        ended_by
    }
}

#[async_trait]
impl LadderRungs for FakeVmm {
    fn process(&self) -> &Process {
        self.guard.process()
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        let count = self.requests.fetch_add(1, Ordering::Relaxed);
        let play = self.asked.get(count).or(self.asked.last()).copied().unwrap_or(Missing);
        Some((EndedBy::Acpi, self.play(play)?))
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        self.play(self.order)
    }
}

#[tokio::test]
async fn a_guest_that_obeys_is_recorded_with_its_rung() {
    let vmm = FakeVmm::start(":", &[BUTTON], Forbidden).await;
    assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Acpi);
}

#[tokio::test]
async fn a_shutdown_request_is_repeated() {
    let vmm = FakeVmm::start(":", &[Loses, BUTTON], Forbidden).await;
    assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Acpi);
    assert_eq!(vmm.requests.into_inner(), 2);
}

#[tokio::test]
async fn a_guest_that_ignores_the_requests_is_powered_off() {
    let vmm = FakeVmm::start("trap '' USR1", &[BUTTON], ORDER).await;
    assert_eq!(vmm.climb(HASTY).await.unwrap(), EndedBy::Vmm);
}

#[tokio::test]
async fn a_failed_request_does_not_shorten_the_guest_timeout() {
    use BackendErrorKind::{Rejected, Timeout, Unreachable};
    for failure in [
        Fails(Unreachable, Effect::NotApplied),
        Fails(Timeout, Effect::Unknown),
        Fails(Rejected, Effect::NotApplied),
    ] {
        let vmm = FakeVmm::start(":", &[failure, BUTTON], Forbidden).await;
        assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Acpi, "{failure:?}");
    }
}

#[tokio::test]
async fn a_guest_that_ends_before_the_answer_is_recorded_with_its_rung() {
    let vmm = FakeVmm::start(":", &[EndsOver(Effect::Unknown)], Forbidden).await;
    assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Acpi);
}

#[tokio::test]
async fn a_shutdown_without_force_fails_if_no_request_exists() {
    let vmm = FakeVmm::start(":", &[], Missing).await;
    assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Sigterm);
}

#[tokio::test]
async fn force_skips_the_requests_to_the_guest() {
    let vmm = FakeVmm::start(":", &[Forbidden], ORDER).await;
    assert_eq!(vmm.climb(FORCED).await.unwrap(), EndedBy::Vmm);
}

#[tokio::test]
async fn a_vmm_that_refuses_the_power_off_gets_sigterm() {
    let refuses = Fails(BackendErrorKind::Rejected, Effect::NotApplied);
    for ladder in [HASTY, FORCED] {
        let vmm = FakeVmm::start(":", &[refuses], refuses).await;
        assert_eq!(vmm.climb(ladder).await.unwrap(), EndedBy::Sigterm, "a refusal is an answer");
    }
}

#[tokio::test]
async fn a_vmm_that_ends_without_an_answer_is_recorded_with_its_rung() {
    let vmm = FakeVmm::start(":", &[], EndsOver(Effect::Unknown)).await;
    assert_eq!(vmm.climb(FORCED).await.unwrap(), EndedBy::Vmm);
}

#[tokio::test]
async fn a_vmm_that_ignores_sigterm_is_killed() {
    let vmm = FakeVmm::start("trap '' USR2 TERM", &[Forbidden], ORDER).await;
    assert_eq!(vmm.climb(FORCED).await.unwrap(), EndedBy::Sigkill);
}

#[tokio::test]
async fn a_silent_vmm_is_ended_by_force_only() {
    let lost = |kind| Fails(kind, Effect::NotApplied);
    for (silence, kind) in [
        (Hangs, BackendErrorKind::Timeout),
        (lost(BackendErrorKind::Unreachable), BackendErrorKind::Unreachable),
        (lost(BackendErrorKind::Protocol), BackendErrorKind::Protocol),
        (lost(BackendErrorKind::Host), BackendErrorKind::Timeout),
    ] {
        let mut vmm = FakeVmm::start(":", &[silence], Forbidden).await;
        vmm.guard.signal(Signal::STOP).unwrap();
        let error = vmm.climb(HASTY).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (kind, Effect::Unknown), "{silence:?}");
        assert!(error.message.contains("use force"), "{error}");
        vmm.order = Hangs;
        assert_eq!(vmm.climb(FORCED).await.unwrap(), EndedBy::Sigkill, "{silence:?}");
    }
}

#[tokio::test]
async fn a_run_that_ended_before_the_ladder_is_ended_by_the_guest() {
    let vmm = FakeVmm::start(":", &[Forbidden], Forbidden).await;
    vmm.guard.signal(Signal::KILL).unwrap();
    vmm.guard.wait().await;
    for ladder in [PATIENT, FORCED] {
        assert_eq!(vmm.climb(ladder).await.unwrap(), EndedBy::Guest);
    }
}

#[tokio::test]
async fn a_run_that_ends_before_the_request_arrives_is_ended_by_the_guest() {
    // A connection breaks like this if the process has ended and was not reaped yet.
    let vmm = FakeVmm::start(":", &[EndsOver(Effect::NotApplied)], Forbidden).await;
    assert_eq!(vmm.climb(PATIENT).await.unwrap(), EndedBy::Guest);
}

/// An adopted process that offers signals only.
struct Adopted(Process);

#[async_trait]
impl LadderRungs for Adopted {
    fn process(&self) -> &Process {
        &self.0
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        None
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        None
    }
}

#[tokio::test]
async fn the_ladder_ends_an_adopted_vmm() {
    let vmm = FakeVmm::start("trap '' TERM", &[], Missing).await;
    let vmm_host::process::Lookup::Alive(adopted) = vmm_host::process::adopt(vmm.guard.identity()) else {
        panic!("it is there")
    };
    assert_eq!(climb(&Adopted(adopted), FORCED).await.unwrap(), EndedBy::Sigkill);
    vmm.guard.wait().await;
}
