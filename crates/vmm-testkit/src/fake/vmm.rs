//! The handle of one machine.

use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, Exit, ExitCause, GuestState, Ladder, NetworkCounters, Reset,
    Sample, StorageCounters, Vmm,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;

use super::script::{Act, Method};
use super::world::{Machine, World};

/// How long the handle waits for a machine that is silent.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the handle waits for a killed machine to go.
const KILLING: Duration = Duration::from_secs(1);

/// The handle of one machine.
#[derive(Debug)]
pub(super) struct FakeVmm {
    world: World,
    run: RunRecord,
    single_use: bool,
}

impl FakeVmm {
    pub(super) fn new(world: World, run: RunRecord, single_use: bool) -> Self {
        Self { world, run, single_use }
    }

    fn pid(&self) -> u32 {
        self.run.process.pid
    }

    /// Asks the machine for something, as its script says, and as far as it answers.
    async fn ask<T>(&self, method: Method, what: impl FnOnce(&mut Machine) -> T) -> Result<T, BackendError> {
        let act = self.call(method);
        act.before().await?;
        self.answers().await?;
        let answer = self.machine(what)?;
        act.after().await?;
        Ok(answer)
    }

    fn call(&self, method: Method) -> Act {
        self.world.lock().scripts.call(method)
    }

    fn machine<T>(&self, what: impl FnOnce(&mut Machine) -> T) -> Result<T, BackendError> {
        self.world.lock().machines.get_mut(&self.pid()).map(what).ok_or_else(|| {
            BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, "the machine has gone")
        })
    }

    /// Fails after a while where the machine is silent.
    async fn answers(&self) -> Result<(), BackendError> {
        if !self.machine(|machine| machine.silent)? {
            return Ok(());
        }
        let _ = tokio::time::timeout(PATIENCE, self.world.gone(self.pid())).await;
        // Whether it has gone meanwhile comes first.
        self.machine(|_| ())?;
        Err(BackendError::new(
            BackendErrorKind::Timeout,
            Effect::Unknown,
            format!("it did not answer within {} s", PATIENCE.as_secs()),
        ))
    }

    /// Ends the machine, unless it cannot be killed.
    async fn finish(&self, cause: ExitCause) -> Result<(), BackendError> {
        if self.machine(|machine| machine.unkillable).unwrap_or(false) {
            tokio::time::sleep(KILLING).await;
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
        self.ask(Method::Pause, |machine| machine.guest = GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.ask(Method::Resume, |machine| machine.guest = GuestState::Running).await
    }

    async fn shutdown(&self, ladder: Ladder) -> Result<EndedBy, BackendError> {
        let act = self.call(Method::Shutdown);
        act.before().await?;
        let (silent, obeys) =
            self.machine(|machine| (machine.silent, machine.obeys && machine.guest == GuestState::Running))?;
        let mut rung = if silent { EndedBy::Sigkill } else { EndedBy::Vmm };
        match ladder.ask_guest_for {
            Some(_) if obeys && !silent => rung = EndedBy::Acpi,
            Some(time) => {
                let ended = tokio::time::timeout(time, self.world.gone(self.pid())).await.is_ok();
                if ended {
                    rung = EndedBy::Guest;
                }
            }
            None => {}
        }
        let cause = if rung == EndedBy::Acpi { ExitCause::GuestPowerOff } else { ExitCause::Requested };
        self.finish(cause).await?;
        act.after().await?;
        Ok(rung)
    }

    async fn reset(&self) -> Result<Reset, BackendError> {
        let single_use = self.single_use;
        self.ask(Method::Reset, |machine| {
            if single_use {
                return Reset::NeedsRelaunch;
            }
            machine.resets += 1;
            Reset::InPlace
        })
        .await
    }

    async fn sample(&self) -> Result<Sample, BackendError> {
        self.ask(Method::Sample, |machine| {
            machine.samples += 1;
            let count = machine.samples;
            Sample {
                cpu_time: machine.since.elapsed() / 4,
                memory_bytes: (64 << 20) + count,
                network: NetworkCounters {
                    bytes_received: 1000 * count,
                    bytes_transmitted: 500 * count,
                    packets_received: 10 * count,
                    packets_transmitted: 5 * count,
                },
                storage: StorageCounters {
                    bytes_read: 4096 * count,
                    bytes_written: 512 * count,
                    read_operations: 2 * count,
                    write_operations: count,
                },
            }
        })
        .await
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        self.ask(Method::Probe, |machine| machine.guest).await
    }

    async fn kill(&self) -> Result<(), BackendError> {
        let act = self.call(Method::Kill);
        act.before().await?;
        self.finish(ExitCause::VmmFailed).await?;
        act.after().await
    }
}
