//! The handle of one run in QEMU.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;
use vmm_core::backend::{
    BackendError, BackendErrorKind, ConsoleInput, Effect, GuestState, LadderOptions, ResetOutcome, Sample,
    Vmm,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::Process;

use super::client::RebootAction;
use super::exit_schedule::EXIT_LIMIT;
use super::link::QemuLink;
use super::orders::{self, Commands};
use super::qmp::{Qmp, QmpError};
use super::start::LOG;
use crate::console_input::FifoInput;
use crate::counters;
use crate::guest_orders::GuestOrders;
use crate::ladder::{self, LadderRungs, UnsentCall};
use crate::launch;

/// The handle of one QEMU.
#[derive(Debug)]
pub(super) struct QemuVmm {
    pub(super) run: RunRecord,
    pub(super) process: Process,
    pub(super) link: Arc<QemuLink>,
    pub(super) guest: Arc<GuestOrders>,
    pub(super) reboot: RebootAction,
    pub(super) taps: Vec<String>,
    pub(super) input: FifoInput,
    /// Dropped together with the handle, which ends the monitor.
    pub(super) _wanted: oneshot::Sender<()>,
}

#[async_trait]
impl Vmm for QemuVmm {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        orders::pause(self).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        orders::resume(self).await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.guest.order_end(true);
        let ended = ladder::climb(self, ladder).await;
        if ended.is_err() {
            self.guest.order_end(false);
        }
        ended
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        match self.reboot {
            RebootAction::Reset => {
                self.qmp()?.system_reset().await.map_err(|error| self.explain(error))?;
            }
            RebootAction::Shutdown => self.reset_despite_shutdown().await?,
        }
        Ok(ResetOutcome::InPlace)
    }

    async fn trim_logs(&self) {
        counters::trim_logs(vec![self.run.socket.with_file_name(LOG)]).await;
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, Some(&self.taps)).await;
        sample.storage = counters::or_missing(&mut sample, "disks", orders::block_counters(self).await);
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        if self.guest.has_shut_down() {
            // The end of this QEMU is near and is reported by the monitor, so a missing answer is
            // no failure.
            let _ = self.process.wait_for(EXIT_LIMIT).await;
        }
        let status = self.qmp()?.query_status().await.map_err(|error| self.explain(error))?;
        Ok(status.guest_state())
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.guest.order_end(true);
        launch::kill(&self.process).await
    }

    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        Some(&self.input)
    }
}

#[async_trait]
impl LadderRungs for QemuVmm {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        Some((EndedBy::Acpi, Box::pin(async { Ok(self.qmp()?.system_powerdown().await?) })))
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        Some(Box::pin(async { Ok(self.qmp()?.quit().await?) }))
    }
}

impl Commands for QemuVmm {
    fn guest(&self) -> &GuestOrders {
        &self.guest
    }

    fn qmp(&self) -> Result<Arc<Qmp>, BackendError> {
        if self.process.exit().is_some() {
            return Err(self.gone(Effect::NotApplied));
        }
        if self.guest.has_shut_down() {
            // A command in progress while QEMU (7.2) ends makes QEMU hang in its own clean-up.
            return Err(ending(Effect::NotApplied));
        }
        self.link.get()
    }

    /// Replaces the error of a command by [`BackendErrorKind::Gone`] if QEMU has ended or is about
    /// to.
    fn explain(&self, error: QmpError) -> BackendError {
        let error = BackendError::from(error);
        match self.process.exit() {
            Some(_) => self.gone(error.effect).caused_by(error),
            None if self.guest.has_shut_down() => ending(error.effect).caused_by(error),
            None => error,
        }
    }
}

impl QemuVmm {
    /// Resets a guest whose own resets end QEMU.
    async fn reset_despite_shutdown(&self) -> Result<(), BackendError> {
        // With `reboot=shutdown` QEMU would end at any reset, also at an ordered one. So the action
        // is changed for the moment of this reset. If the daemon ends in between, the adoption sets
        // the action of the VM's policy again.
        let qmp = self.qmp()?;
        qmp.set_reboot_action(RebootAction::Reset).await.map_err(|error| self.explain(error))?;
        point(FaultPoint::ResetPrepared);
        let reset = qmp.system_reset().await;
        point(FaultPoint::ResetOrdered);
        // QEMU uses the action that is set when the reset is requested, so the action may be
        // restored now.
        let restored = qmp.set_reboot_action(RebootAction::Shutdown).await;
        reset.map_err(|error| self.explain(error))?;
        restored.map_err(|error| BackendError { effect: Effect::Applied, ..self.explain(error) })
    }

    fn gone(&self, effect: Effect) -> BackendError {
        let exit = self.process.exit().map_or_else(String::new, |exit| format!(": {exit}"));
        BackendError::new(BackendErrorKind::Gone, effect, format!("QEMU has ended{exit}"))
    }
}

/// Returns the error of a command to a QEMU that has announced its shutdown.
fn ending(effect: Effect) -> BackendError {
    BackendError::new(BackendErrorKind::Gone, effect, "QEMU's guest has shut down, and QEMU ends with it")
}
