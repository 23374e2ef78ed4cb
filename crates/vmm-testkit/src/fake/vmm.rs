//! The handle of one machine of the fake hypervisor.

use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{
    BackendError, BackendErrorKind, ConsoleInput, ConsoleInputError, ConsoleInputFailure, Effect, Exit,
    ExitCause, GuestState, LadderOptions, NetworkCounters, ResetOutcome, Sample, StorageCounters, Vmm,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;

use super::script::{ScriptedMethod, ScriptedResult};
use super::world::{FakeMachine, FakeWorld};

/// The time that the handle waits for the answer of a machine that does not answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which a guest that does not obey is asked again to shut down.
const ASK_INTERVAL: Duration = Duration::from_secs(3);
/// The time that the handle waits for a killed machine to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// The handle of one machine.
#[derive(Debug)]
pub(super) struct FakeVmm {
    world: FakeWorld,
    run: RunRecord,
    single_use: bool,
}

impl FakeVmm {
    pub(super) fn new(world: FakeWorld, run: RunRecord, single_use: bool) -> Self {
        Self { world, run, single_use }
    }

    fn pid(&self) -> u32 {
        self.run.process.pid
    }

    /// Runs `what` on the machine, with the waits and failures of the script around it.
    async fn ask<T>(
        &self,
        method: ScriptedMethod,
        what: impl FnOnce(&mut FakeMachine) -> T,
    ) -> Result<T, BackendError> {
        // A real VMM fails in the same order: the call may not arrive (`before`), the VMM may not
        // answer or be gone, and the answer may be lost after the effect (`after`).
        let act = self.call(method);
        act.before().await?;
        self.answers().await?;
        let answer = self.machine(what)?;
        act.after().await?;
        Ok(answer)
    }

    fn call(&self, method: ScriptedMethod) -> ScriptedResult {
        self.world.lock().scripts.call(method)
    }

    fn machine<T>(&self, what: impl FnOnce(&mut FakeMachine) -> T) -> Result<T, BackendError> {
        self.world.lock().machines.get_mut(&self.pid()).map(what).ok_or_else(|| {
            BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, "the machine has gone")
        })
    }

    /// Returns at once if the machine answers. Fails after [`ANSWER_TIMEOUT`] if it does not.
    async fn answers(&self) -> Result<(), BackendError> {
        if !self.machine(|machine| machine.silent)? {
            return Ok(());
        }
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, self.world.gone(self.pid())).await;
        // A machine that ended meanwhile is `Gone` rather than `Timeout`, because that is certain.
        self.machine(|_| ())?;
        Err(BackendError::new(
            BackendErrorKind::Timeout,
            Effect::Unknown,
            format!("the VMM did not answer within {} s", ANSWER_TIMEOUT.as_secs()),
        ))
    }

    /// Asks the guest to end within `time`, and returns the rung of the ladder that ends the
    /// machine.
    ///
    /// # Errors
    ///
    /// [`BackendErrorKind::Timeout`] if the machine does not answer at the deadline. The machine is
    /// not ended then.
    async fn asked_to_end(&self, guest_timeout: Duration) -> Result<EndedBy, BackendError> {
        let deadline = tokio::time::Instant::now() + guest_timeout;
        loop {
            // The state is read anew in each round, because a test may stop, release or end the
            // machine meanwhile. A missing machine means that the guest ended by itself.
            let (silent, obeys) = match self
                .machine(|machine| (machine.silent, machine.obeys && machine.guest == GuestState::Running))
            {
                Ok(reported) => reported,
                Err(_) => return Ok(EndedBy::Guest),
            };
            if obeys && !silent {
                return Ok(EndedBy::Acpi);
            }
            // A machine that answers and does not obey is powered off by its VMM. A machine that
            // does not answer cannot be ordered to, and only force may kill it.
            if tokio::time::Instant::now() >= deadline {
                let unanswered = || {
                    let message = "the machine has answered nothing, use force";
                    Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message))
                };
                return if silent { unanswered() } else { Ok(EndedBy::Vmm) };
            }
            // The wait also ends with the machine, so the next round sees the end at once.
            let again = (tokio::time::Instant::now() + ASK_INTERVAL).min(deadline);
            let _ = tokio::time::timeout_at(again, self.world.gone(self.pid())).await;
        }
    }

    /// Ends the machine for `cause`.
    ///
    /// # Errors
    ///
    /// [`BackendErrorKind::Timeout`] if the machine cannot be killed.
    async fn finish(&self, cause: ExitCause) -> Result<(), BackendError> {
        if self.machine(|machine| machine.unkillable).unwrap_or(false) {
            tokio::time::sleep(KILL_TIMEOUT).await;
            return Err(BackendError::new(
                BackendErrorKind::Timeout,
                Effect::Unknown,
                format!("process {} outlives SIGKILL", self.pid()),
            ));
        }
        self.world.lock().end(self.pid(), Exit { cause, message: "ended as told".to_owned() });
        Ok(())
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.ask(ScriptedMethod::Pause, |machine| machine.guest = GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.ask(ScriptedMethod::Resume, |machine| machine.guest = GuestState::Running).await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        let act = self.call(ScriptedMethod::Shutdown);
        act.before().await?;
        // Without time for the guest the shutdown is forced: the VMM is ordered to power off, or
        // killed if it does not answer.
        let rung = match ladder.guest_timeout {
            Some(time) => self.asked_to_end(time).await?,
            None => self.machine(|machine| if machine.silent { EndedBy::Sigkill } else { EndedBy::Vmm })?,
        };
        let cause = if rung == EndedBy::Acpi { ExitCause::GuestPowerOff } else { ExitCause::Requested };
        self.finish(cause).await?;
        act.after().await?;
        Ok(rung)
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        let single_use = self.single_use;
        self.ask(ScriptedMethod::Reset, |machine| {
            // A process that can be used once has to be replaced, so nothing is counted.
            if single_use {
                return ResetOutcome::NeedsRelaunch;
            }
            machine.resets += 1;
            ResetOutcome::InPlace
        })
        .await
    }

    async fn sample(&self) -> Sample {
        let sampled = self.ask(ScriptedMethod::Sample, |machine| {
            machine.samples += 1;
            let count = machine.samples;
            Sample {
                cpu_time: Some(machine.since.elapsed() / 4),
                memory_bytes: Some((64 << 20) + count),
                network: Some(NetworkCounters {
                    bytes_received: 1000 * count,
                    bytes_transmitted: 500 * count,
                    packets_received: 10 * count,
                    packets_transmitted: 5 * count,
                }),
                storage: Some(StorageCounters {
                    bytes_read: 4096 * count,
                    bytes_written: 512 * count,
                    read_operations: 2 * count,
                    write_operations: count,
                }),
                missing: Vec::new(),
            }
        });
        let unread = |error: BackendError| Sample { missing: vec![error.message], ..Sample::default() };
        sampled.await.unwrap_or_else(unread)
    }

    async fn trim_logs(&self) {
        // The machine has no log, so that the call is only counted.
        let _ = self.call(ScriptedMethod::TrimLogs);
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        self.ask(ScriptedMethod::Probe, |machine| machine.guest).await
    }

    async fn kill(&self) -> Result<(), BackendError> {
        let act = self.call(ScriptedMethod::Kill);
        act.before().await?;
        self.finish(ExitCause::VmmFailed).await?;
        act.after().await
    }

    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        Some(self)
    }
}

#[async_trait]
impl ConsoleInput for FakeVmm {
    async fn write_console(&self, data: &[u8], within: Duration) -> Result<(), ConsoleInputError> {
        let written = self.ask(ScriptedMethod::WriteConsole, |machine| machine.typed.extend_from_slice(data));
        let cause = match tokio::time::timeout(within, written).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) if error.kind != BackendErrorKind::Timeout => ConsoleInputFailure::Failed(error),
            Ok(Err(_)) | Err(_) => ConsoleInputFailure::Unread,
        };
        Err(ConsoleInputError { taken: 0, cause })
    }
}
