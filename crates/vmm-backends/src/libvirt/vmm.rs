//! The handle of one run of a domain.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use uuid::Uuid;
use vmm_core::backend::{
    BackendError, BackendErrorKind, ConsoleInput, Effect, GuestState, LadderOptions, ResetOutcome, Sample,
    StorageCounters, Vmm,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::Process;
use vmm_libvirt_wire::{Call, CallFailureKind, CallResult};

use super::domain::{QUICK_CALL_TIMEOUT, guest_state, is_active, unexpected_answer};
use super::link::{CallError, LibvirtLink};
use crate::console_input::SocketInput;
use crate::counters;
use crate::guest_orders::GuestOrders;
use crate::ladder::{self, LadderRungs};
use crate::timeouts::END_TIMEOUT;

/// The time limit of a libvirt call that needs QEMU. QEMU answers in milliseconds, libvirtd on a
/// busy host in a second or two.
const QEMU_CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The time limit of the call that finds out whether QEMU answers.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_millis(2500);
/// The time limit of libvirt for a forced end, which must complete within two seconds.
const FORCED_DESTROY_TIMEOUT: Duration = Duration::from_millis(900);
/// The time in which libvirt cleans up after the end of a QEMU.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(800);

/// The handle of one domain.
#[derive(Debug)]
pub(super) struct LibvirtVmm {
    pub(super) domain: Uuid,
    pub(super) run: RunRecord,
    pub(super) process: Process,
    pub(super) link: Arc<LibvirtLink>,
    pub(super) guest: Arc<GuestOrders>,
    /// True if a guest that resets itself starts again.
    pub(super) restarts: bool,
    /// True if another client created the domain. Then only libvirt ends the domain, except by
    /// force.
    pub(super) imported: bool,
    pub(super) taps: Vec<String>,
    /// The input of the console, unless another client created the domain.
    pub(super) input: Option<SocketInput>,
    /// The monitor notices the drop of this sender, which is dropped together with the handle.
    pub(super) _wanted: oneshot::Sender<()>,
}

#[async_trait]
impl Vmm for LibvirtVmm {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.guest.order_runs(false, self.order(Call::Suspend { uuid: self.domain })).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.guest.order_runs(true, self.order(Call::Resume { uuid: self.domain })).await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.guest.order_end(true);
        let ended = ladder::climb(self, ladder).await;
        match &ended {
            Ok(EndedBy::Vmm) => self.settle().await,
            Ok(_) => {}
            Err(_) => self.guest.order_end(false),
        }
        ended
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        let uuid = self.domain;
        if self.restarts {
            self.guest.resets.order(self.order(Call::Reset { uuid })).await?;
            return Ok(ResetOutcome::InPlace);
        }
        self.order(Call::OnReboot { uuid, restart: true }).await?;
        point(FaultPoint::ResetPrepared);
        let reset = self.guest.resets.order(self.order(Call::Reset { uuid })).await;
        point(FaultPoint::ResetOrdered);
        // QEMU uses the action that is set when the reset is requested, so the action may be
        // restored now.
        let restored = self.order(Call::OnReboot { uuid, restart: false }).await;
        reset?;
        restored.map_err(|error| BackendError { effect: Effect::Applied, ..error })?;
        Ok(ResetOutcome::InPlace)
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, Some(&self.taps)).await;
        sample.storage = counters::or_missing(&mut sample, "disks", self.block_stats().await);
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        // libvirt answers from its memory of the domain's state. Only a call that reaches QEMU
        // shows that QEMU answers.
        self.block_stats().await?;
        match self.link.look_up(self.domain, QUICK_CALL_TIMEOUT).await {
            Ok(Some(domain)) => Ok(guest_state(domain.state)),
            Ok(None) => Ok(GuestState::Ended),
            Err(error) => Err(self.explain(error)),
        }
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.end(FORCED_DESTROY_TIMEOUT).await.map(drop)
    }

    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        self.input.as_ref().map(|input| input as &dyn ConsoleInput)
    }
}

#[async_trait]
impl LadderRungs for LibvirtVmm {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, ladder::UnsentCall<'_>)> {
        Some((EndedBy::Acpi, Box::pin(self.order(Call::Shutdown { uuid: self.domain }))))
    }

    fn power_off(&self, forced: bool) -> Option<ladder::UnsentCall<'_>> {
        (forced || !self.imported)
            .then(|| Box::pin(self.order(Call::Destroy { uuid: self.domain })) as ladder::UnsentCall<'_>)
    }

    /// Kills QEMU's process, of an imported domain by force only. The user of the process and the
    /// UUID in its arguments have proven the process, and the pidfd still names it.
    async fn end_process(&self, forced: bool, _reached: EndedBy) -> Result<EndedBy, BackendError> {
        if self.imported && !forced {
            let message = "the guest has not shut down, and another program made the domain: use force to have libvirt end it";
            return Err(BackendError::new(BackendErrorKind::StillRuns, Effect::NotApplied, message));
        }
        self.kill_process().await
    }
}

impl LibvirtVmm {
    /// Waits until libvirt has cleaned up after a domain that it has ended, because the next call
    /// would wait for that.
    async fn settle(&self) {
        let cleared = async {
            // libvirt may answer only after its clean-up. A call that exceeds its own limit marks
            // the connection as hanging, so the call gets the usual limit and is dropped from
            // outside.
            while let Ok(Some(domain)) = self.link.look_up(self.domain, QUICK_CALL_TIMEOUT).await
                && is_active(domain.state)
            {
                tokio::time::sleep(SETTLE_TIMEOUT / 20).await;
            }
        };
        let _ = tokio::time::timeout(SETTLE_TIMEOUT, cleared).await;
    }

    /// Ends the domain by libvirt within `timeout`, or else kills its QEMU. Returns once QEMU has
    /// ended.
    async fn end(&self, timeout: Duration) -> Result<EndedBy, BackendError> {
        if self.process.has_ended() {
            return self.gone_by(EndedBy::Guest).await;
        }
        self.guest.order_end(true);
        let mut ordered =
            std::pin::pin!(self.link.order(Call::Destroy { uuid: self.domain }, timeout + SETTLE_TIMEOUT));
        // The end of the process counts, not libvirt's answer: libvirt may hang, and it may answer
        // before or after the end. The call outlives `timeout` by the time of the clean-up,
        // because a call that expires marks the connection as hanging.
        let answered = tokio::select! {
            biased;
            answer = &mut ordered => Some(answer),
            _ = self.process.wait() => {
                point(FaultPoint::LadderOrdered);
                // libvirt cleans up now. The next call would wait for that.
                let _ = tokio::time::timeout(SETTLE_TIMEOUT, ordered).await;
                return Ok(EndedBy::Vmm);
            }
            () = tokio::time::sleep(timeout) => None,
        };
        point(FaultPoint::LadderOrdered);
        match answered {
            // libvirt has ended the domain, so only the kernel's report is missing.
            Some(Ok(())) if self.process.wait_for(END_TIMEOUT).await.is_some() => return Ok(EndedBy::Vmm),
            Some(Err(error)) => tracing::warn!(%error, "libvirt did not end the domain"),
            Some(Ok(())) | None => tracing::warn!("libvirt has not ended the domain in time"),
        }
        self.kill_process().await
    }

    async fn kill_process(&self) -> Result<EndedBy, BackendError> {
        let killed =
            self.process.kill_and_wait(END_TIMEOUT).await.map(|_| EndedBy::Sigkill).map_err(|error| {
                BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, error.to_string())
                    .caused_by(error)
            });
        point(FaultPoint::LadderSignalled);
        killed
    }

    /// Waits until the exit of an ended process is published. Returns `rung`.
    async fn gone_by(&self, rung: EndedBy) -> Result<EndedBy, BackendError> {
        self.process.wait_for(END_TIMEOUT).await.map(|_| rung).ok_or_else(|| {
            BackendError::new(
                BackendErrorKind::Timeout,
                Effect::Unknown,
                "QEMU's end is not reported by the kernel",
            )
        })
    }

    async fn block_stats(&self) -> Result<StorageCounters, BackendError> {
        match self.link.call(Call::BlockStats { uuid: self.domain }, PROBE_TIMEOUT).await {
            Ok(CallResult::Block { read_bytes, written_bytes, reads, writes }) => Ok(StorageCounters {
                bytes_read: read_bytes,
                bytes_written: written_bytes,
                read_operations: reads,
                write_operations: writes,
            }),
            Ok(other) => Err(self.explain(unexpected_answer(&other))),
            Err(error) => Err(self.explain(error)),
        }
    }

    async fn order(&self, call: Call) -> Result<(), BackendError> {
        if self.process.exit().is_some() {
            return Err(self.gone(Effect::NotApplied));
        }
        self.link.order(call, QEMU_CALL_TIMEOUT).await.map_err(|error| self.explain(error))
    }

    /// Replaces the error of a call by [`BackendErrorKind::Gone`] if the domain has ended.
    fn explain(&self, error: CallError) -> BackendError {
        let refusal = error.refusal();
        let error = BackendError::from(error);
        if self.process.has_ended() {
            return self.gone(error.effect).caused_by(error);
        }
        match refusal {
            // libvirt has ended the domain, and the kernel is about to report the end.
            Some(CallFailureKind::NoDomain) => self.gone(error.effect).caused_by(error),
            Some(_) | None => error,
        }
    }

    fn gone(&self, effect: Effect) -> BackendError {
        BackendError::new(BackendErrorKind::Gone, effect, "the domain has ended")
    }
}
