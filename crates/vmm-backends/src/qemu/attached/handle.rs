//! The handle of a VM in a QEMU that another program started.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;
use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, GuestState, LadderOptions, LaunchedVmm, ResetOutcome, Sample, Vmm,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;
use vmm_host::process::{Process, arguments_of};

use super::super::client::RebootAction;
use super::super::link::QemuLink;
use super::super::monitor::{QemuMonitor, QemuOwner};
use super::super::orders::{self, Commands};
use super::super::qmp::{Qmp, QmpError, QmpEvent};
use crate::attached::force::{self, EndMethod};
use crate::attached::socket::SocketLease;
use crate::attached::{AttachedVmmParts, GuestPhase};
use crate::counters;
use crate::guest_orders::GuestOrders;
use crate::ladder::{self, LadderRungs, UnsentCall};
use crate::rest::adopt::or_gone;
use crate::throttle::Throttle;
use crate::timeouts::EXIT_REPORT_TIMEOUT;

/// The most events that wait for the VM's owner.
const EVENTS: usize = 64;

/// The handle of one VM.
#[derive(Debug)]
struct AttachedQemuVmm {
    run: RunRecord,
    process: Process,
    program: &'static str,
    link: Arc<QemuLink>,
    guest: Arc<GuestOrders>,
    held: SocketLease,
    /// Dropped together with the handle, which the monitor notices.
    _wanted: oneshot::Sender<()>,
}

/// Returns the handle of a VM in QEMU, and starts the task that watches QEMU.
pub(super) fn attend(
    link: Arc<QemuLink>,
    qmp_events: mpsc::Receiver<QmpEvent>,
    process: Process,
    program: &'static str,
    parts: AttachedVmmParts,
) -> LaunchedVmm {
    let (sender, events) = mpsc::channel(EVENTS);
    let guest = Arc::new(GuestOrders::new(parts.guest == GuestPhase::Running));
    let (wanted, handle) = oneshot::channel();
    let span = tracing::info_span!(parent: None, "attached-qemu", pid = process.pid());
    let monitor = QemuMonitor {
        process: process.clone(),
        link: Arc::clone(&link),
        guest: Arc::clone(&guest),
        qmp_events,
        events: sender,
        reboot: RebootAction::Reset,
        log: PathBuf::new(),
        shutdown: None,
        handle,
        owner: QemuOwner::Another,
        throttle: Throttle::new(),
        compare_at: None,
    };
    tokio::spawn(monitor.run().instrument(span));
    let handle =
        AttachedQemuVmm { run: parts.run, process, program, link, guest, held: parts.held, _wanted: wanted };
    LaunchedVmm { vmm: Arc::new(handle), events }
}

impl Commands for AttachedQemuVmm {
    fn guest(&self) -> &GuestOrders {
        &self.guest
    }

    fn qmp(&self) -> Result<Arc<Qmp>, BackendError> {
        self.link.get().map_err(|error| or_gone(&self.process, error))
    }

    fn explain(&self, error: QmpError) -> BackendError {
        or_gone(&self.process, error.into())
    }
}

impl AttachedQemuVmm {
    async fn guest_state(&self) -> Result<GuestState, BackendError> {
        let status = self.qmp()?.query_status().await.map_err(|error| self.explain(error))?;
        Ok(status.attached_guest_state())
    }

    async fn end(&self, how: EndMethod) -> Result<EndedBy, BackendError> {
        self.guest.order_end(true);
        let ended = match how {
            EndMethod::Ladder(ladder) => ladder::climb(self, ladder).await,
            EndMethod::OrderOff => ladder::power_off(self).await,
        };
        if ended.is_err() {
            self.guest.order_end(false);
        }
        if self.process.has_ended() {
            self.held.ended();
        }
        ended
    }

    /// Returns an error if QEMU's command line shows that a reset would end QEMU.
    async fn reset_is_harmless(&self) -> Result<(), BackendError> {
        let process = self.process.clone();
        // Reads of a process's arguments wait for the lock on its memory map, so they block.
        let read = tokio::task::spawn_blocking(move || arguments_of(&process));
        let started_so = read.await.ok().and_then(Result::ok).unwrap_or_default();
        let ends = |word: &str| {
            matches!(word, "-no-reboot" | "--no-reboot")
                || word.split(',').any(|part| part == "reboot=shutdown")
        };
        let Some(word) = started_so.iter().filter_map(|word| word.to_str()).find(|word| ends(word)) else {
            return Ok(());
        };
        let message = format!(
            "QEMU was started with {word}, so a reset would end it, and this program may not start another: shut the VM down, \
             start QEMU again, and it is imported"
        );
        Err(BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message))
    }
}

#[async_trait]
impl LadderRungs for AttachedQemuVmm {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        let call: UnsentCall<'_> = Box::pin(async {
            let qmp = self.qmp()?;
            // A paused guest does not react to its power button, so it is resumed first.
            if qmp.query_status().await?.guest_state() == GuestState::Paused {
                qmp.cont().await?;
            }
            Ok(qmp.system_powerdown().await?)
        });
        Some((EndedBy::Acpi, call))
    }

    fn power_off(&self, forced: bool) -> Option<UnsentCall<'_>> {
        // `quit` ends QEMU's process, which belongs to another program, so it is offered by force
        // only.
        forced.then(|| -> UnsentCall<'_> { Box::pin(async { Ok(self.qmp()?.quit().await?) }) })
    }

    async fn has_ended(&self) -> bool {
        // QEMU reports the end of its guest by an event and is not asked, because a command in
        // progress while QEMU (7.2) ends makes it hang in its own clean-up.
        if !self.guest.has_shut_down() || self.process.wait_for(EXIT_REPORT_TIMEOUT).await.is_some() {
            return self.process.has_ended();
        }
        matches!(self.guest_state().await, Ok(GuestState::Ended))
    }

    async fn end_process(&self, forced: bool, _reached: EndedBy) -> Result<EndedBy, BackendError> {
        force::end_process(&self.process, &self.run.socket, self.program, forced).await
    }
}

#[async_trait]
impl Vmm for AttachedQemuVmm {
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
        self.end(EndMethod::Ladder(ladder)).await
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        self.reset_is_harmless().await?;
        let qmp = self.qmp()?;
        self.guest.resets.order(qmp.system_reset()).await.map_err(|error| self.explain(error))?;
        Ok(ResetOutcome::InPlace)
    }

    async fn reboot(&self, _ladder: LadderOptions) -> Result<ResetOutcome, BackendError> {
        // A guest that obeys its power button ends QEMU as well.
        self.reset().await
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, None).await;
        sample.storage = counters::or_missing(&mut sample, "disks", orders::block_counters(self).await);
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        // As in `has_ended`, a QEMU that is ending is not asked.
        if self.guest.has_shut_down() {
            let _ = self.process.wait_for(EXIT_REPORT_TIMEOUT).await;
        }
        let reported = self.guest_state().await;
        self.held.answered(&self.run.version, &reported);
        reported
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.end(EndMethod::OrderOff).await.map(drop)
    }
}
