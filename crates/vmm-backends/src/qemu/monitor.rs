//! Watches one QEMU, and turns its events, its connection and its process into [`VmmEvent`]s.
//!
//! ```text
//!   QMP events ──────► SHUTDOWN, and GUEST_PANICKED where    │
//!                      QEMU ends: records the reason, and    │
//!                      signals a QEMU that hangs ────────────┤
//!                      RESET:    GuestReset, if the guest's; │
//!                                else by whom it was ordered │
//!                      STOP, RESUME: asks, compares, reports;│
//!                                of a flood the last state   │
//!   connection lost ─► connects again, asks, compares        │
//!   process gone ────► reads what is left of the events ─────┴──► Gone(why), the end
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, warn};
use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_host::process::{ExitStatus, Process, ProcessExit};

use super::client::{RebootAction, RunState};
use super::exit_schedule::{ExitSchedule, ExitTimeouts, send_due_signal};
use super::link::QemuLink;
use super::qmp::{Qmp, QmpEvent};
use crate::guest_orders::{GuestOrders, wait_for_last_user};
use crate::launch::log_tail;
use crate::throttle::{Throttle, wait_until};

/// The longest wait for the end of a connection after the end of its process. The kernel closes the
/// connection at once.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The state of the task.
pub(crate) struct QemuMonitor {
    pub(crate) process: Process,
    pub(crate) link: Arc<QemuLink>,
    pub(crate) guest: Arc<GuestOrders>,
    pub(crate) qmp_events: mpsc::Receiver<QmpEvent>,
    pub(crate) events: mpsc::Sender<VmmEvent>,
    pub(crate) reboot: RebootAction,
    pub(crate) log: PathBuf,
    pub(crate) shutdown: Option<ShutdownReason>,
    /// Ends when the VM's handle is dropped.
    pub(crate) handle: oneshot::Receiver<()>,
    /// The owner of the QEMU.
    pub(crate) owner: QemuOwner,
    /// Limits the reports of a QEMU that stops and resumes its guest without end, because each
    /// report is stored.
    pub(crate) throttle: Throttle,
    /// The time of the next comparison, if the throttle has delayed one.
    pub(crate) compare_at: Option<Instant>,
}

/// The owner of the watched QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QemuOwner {
    /// This program.
    Us,
    /// Another program. Its QEMU is neither signalled nor configured, and may run on after its
    /// guest has ended.
    Another,
}

/// The reason for QEMU's end, by QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ShutdownReason {
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset itself.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
    /// `quit`.
    HostQmpQuit,
    /// `system_reset`.
    HostQmpSystemReset,
    /// SIGTERM, SIGINT or SIGHUP.
    HostSignal,
    /// A window, which this program never opens.
    HostUi,
    /// QEMU cannot go on.
    HostError,
    /// None of the others applies.
    #[serde(other)]
    Other,
}

impl ShutdownReason {
    pub(crate) const fn cause(self) -> ExitCause {
        match self {
            Self::GuestShutdown => ExitCause::GuestPowerOff,
            Self::GuestReset => ExitCause::GuestReset,
            Self::GuestPanic => ExitCause::GuestCrash,
            Self::HostQmpQuit | Self::HostQmpSystemReset | Self::HostUi => ExitCause::Requested,
            Self::HostSignal | Self::HostError => ExitCause::VmmFailed,
            Self::Other => ExitCause::Unknown,
        }
    }
}

#[derive(Deserialize)]
struct ShutdownEvent {
    reason: ShutdownReason,
}

/// The data of GUEST_PANICKED.
#[derive(Deserialize)]
struct PanicEvent {
    action: PanicAction,
}

/// The outcome of a panic for the guest.
#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum PanicAction {
    /// QEMU ends.
    Poweroff,
    /// The guest's CPUs are stopped, or the guest goes on.
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
pub(super) struct ResetEvent {
    pub(super) guest: bool,
}

impl QemuMonitor {
    /// Watches until the end of the process was reported, or until both receiver and handle are
    /// dropped.
    pub(crate) async fn run(mut self) {
        let (process, link) = (self.process.clone(), Arc::clone(&self.link));
        let mut end: Option<ExitSchedule> = None;
        loop {
            if self.shutdown.is_some() && end.is_none() && self.owner == QemuOwner::Us {
                end = Some(ExitSchedule::starting_now(ExitTimeouts::WITH_OURS));
            }
            let compare_at = self.compare_at;
            tokio::select! {
                // The order of the arms is the order of precedence. Events come before the end of
                // the process, because the event that explains the end is usually already there.
                // The connection comes last: a lost connection alone does not mean that QEMU has
                // ended, so `restored` reconnects, and then the state is compared because events
                // may have been lost in the gap.
                biased;
                () = wait_until(compare_at) => self.compare_if_due().await,
                event = self.qmp_events.recv() => match event {
                    Some(event) => self.take(event).await,
                    // Unreachable, because the link holds a sender.
                    None => break,
                },
                _ = process.wait() => break,
                () = wait_for_last_user(&self.events, &mut self.handle) => return,
                signal = ExitSchedule::is_due(&mut end) => send_due_signal(&process, signal),
                qmp = link.restored() => self.catch_up(&qmp).await,
            }
        }
        // QEMU has ended. The kernel closes its connection, and the reader delivers the remaining
        // events, so the reason for the end is known before `Gone` is sent. Only the reason matters
        // now, because a reset or a pause of an ended guest is no news.
        let exit = process.wait().await;
        if tokio::time::timeout(DRAIN_TIMEOUT, link.wait_until_drained()).await.is_err() {
            debug!(
                "QEMU has gone, but its connection has not ended; the monitor goes on without the connection"
            );
        }
        while let Ok(event) = self.qmp_events.try_recv() {
            self.note_shutdown(&event);
        }
        let gone = VmmEvent::Gone(self.describe(exit).await);
        // A dropped receiver is no error.
        let _ = self.events.send(gone).await;
    }

    async fn take(&mut self, event: QmpEvent) {
        self.note_shutdown(&event);
        match event.name.as_str() {
            "RESET" => match ResetEvent::deserialize(&event.data) {
                Ok(reset) if reset.guest => self.report(VmmEvent::GuestReset),
                // No other client speaks to a QEMU that this program started, so the reset is this
                // program's own.
                Ok(_) if self.owner == QemuOwner::Another && self.guest.resets.is_foreign() => {
                    self.report(VmmEvent::ResetFromOutside);
                }
                Ok(_) => {}
                Err(error) => warn!(%error, "QEMU's RESET event cannot be read"),
            },
            // A change that the throttle has delayed is compared later, whatever follows until
            // then.
            "STOP" | "RESUME" if self.compare_at.is_some() => {}
            "STOP" | "RESUME" => self.compare_if_due().await,
            name => debug!(name, "an event of QEMU is not used"),
        }
    }

    /// Records the reason for QEMU's end. The first reason counts.
    fn note_shutdown(&mut self, event: &QmpEvent) {
        match event.name.as_str() {
            // QEMU stops its guest's CPUs between GUEST_PANICKED and SHUTDOWN. A question about
            // that stop could make QEMU hang at its end, so the record is set before the STOP event
            // is handled.
            "SHUTDOWN" | "GUEST_PANICKED" if shutdown_reason(event).is_some() => {
                self.guest.note_shut_down(true)
            }
            "RESUME" => self.guest.note_shut_down(false),
            _ => {}
        }
        if self.shutdown.is_none() {
            self.shutdown = shutdown_reason(event);
        }
    }

    /// Returns true if a QEMU that ends with its guest has reported the guest's shutdown. Such a
    /// QEMU is not asked any more.
    fn is_ending(&self) -> bool {
        self.owner == QemuOwner::Us && self.guest.has_shut_down()
    }

    /// Restores the state after a gap in the events: sets the reboot action that an interrupted
    /// call may have changed, and compares.
    async fn catch_up(&mut self, qmp: &Qmp) {
        if self.is_ending() {
            return;
        }
        if self.owner == QemuOwner::Us
            && let Err(error) = qmp.set_reboot_action(self.reboot).await
        {
            warn!(%error, "QEMU's reboot action could not be set again");
        }
        self.compare(qmp).await;
    }

    /// Compares now, or when the throttle allows the next change.
    async fn compare_if_due(&mut self) {
        self.compare_at = self.throttle.admit().err();
        if self.compare_at.is_none()
            && !self.is_ending()
            && let Ok(qmp) = self.link.get()
        {
            self.compare(&qmp).await;
        }
    }

    /// Asks for the state of the guest, and reports a difference from the last order. The lock on
    /// the record is held during the question, so that no order of the handle changes the state in
    /// between.
    async fn compare(&mut self, qmp: &Qmp) {
        let event = {
            let change = self.guest.change().await;
            let status = match qmp.query_status().await {
                Ok(status) => status,
                // If this error is QEMU's end, the process or the connection shows it.
                Err(error) => return debug!(%error, "QEMU does not report its guest's state"),
            };
            let event = match self.owner {
                QemuOwner::Us => state_change(status, change.runs()),
                QemuOwner::Another => self.attached_state_change(status, change.runs()),
            };
            match event {
                Some(VmmEvent::Resumed) => change.set_runs(true),
                Some(_) => change.set_runs(false),
                None => {}
            }
            event
        };
        if let Some(event) = event {
            self.report(event);
        }
    }

    /// Returns the event for a QEMU that another program started, which may run on after its guest
    /// has ended.
    fn attached_state_change(&self, status: RunState, thought_to_run: bool) -> Option<VmmEvent> {
        match (status.attached_guest_state(), thought_to_run) {
            (GuestState::Ended, _) if self.guest.is_to_end() => None,
            (GuestState::Ended, _) => Some(VmmEvent::Gone(Exit {
                cause: self.shutdown.map_or(ExitCause::Unknown, ShutdownReason::cause),
                message: "the guest has ended, and its QEMU was started to live on".to_owned(),
            })),
            (GuestState::Paused, true) => Some(VmmEvent::Paused),
            (GuestState::Running, false) => Some(VmmEvent::Resumed),
            (GuestState::Running, true) | (GuestState::Paused, false) => None,
        }
    }

    /// Sends an event without waiting. If the receiver is full, the event is dropped and the
    /// receiver reads the state at its next sample. The end is sent by `run`, which waits for room.
    fn report(&self, event: VmmEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            warn!(?event, "an event of the VMM was dropped, because too many events wait");
        }
    }

    async fn describe(&self, exit: ProcessExit) -> Exit {
        let cause =
            if self.guest.is_to_end() { ExitCause::Requested } else { exit_cause(self.shutdown, exit) };
        let mut message = exit.to_string();
        let said = log_tail(&self.log).await;
        if !said.is_empty() {
            message = format!("{message}; QEMU's log ends with: {said}");
        }
        Exit { cause, message }
    }
}

/// Returns the reason for which QEMU ends, or `None` if `event` does not announce an end.
pub(super) fn shutdown_reason(event: &QmpEvent) -> Option<ShutdownReason> {
    match event.name.as_str() {
        "SHUTDOWN" => {
            let reported = ShutdownEvent::deserialize(&event.data);
            Some(reported.map_or(ShutdownReason::Other, |shutdown| shutdown.reason))
        }
        "GUEST_PANICKED" => {
            let reported = PanicEvent::deserialize(&event.data).ok()?;
            (reported.action == PanicAction::Poweroff).then_some(ShutdownReason::GuestPanic)
        }
        _ => None,
    }
}

/// Returns the event for a guest in `status` that was thought to run, or not to.
fn state_change(status: RunState, thought_to_run: bool) -> Option<VmmEvent> {
    if let Some(why) = status.failure() {
        return thought_to_run.then(|| VmmEvent::GuestFailed(why.to_owned()));
    }
    match (status.guest_state(), thought_to_run) {
        (GuestState::Paused, true) => Some(VmmEvent::Paused),
        (GuestState::Running, false) => Some(VmmEvent::Resumed),
        (GuestState::Running, true) | (GuestState::Paused, false) | (GuestState::Ended, _) => None,
    }
}

/// Returns the cause of an end with the reason `starting_now`, if there was one, and this exit
/// status.
fn exit_cause(reported: Option<ShutdownReason>, exit: ProcessExit) -> ExitCause {
    match (reported, exit.status) {
        (Some(reason), _) => reason.cause(),
        (None, Some(ExitStatus::Signal(_))) => ExitCause::VmmFailed,
        (None, Some(ExitStatus::Code(code))) if code != 0 => ExitCause::VmmFailed,
        // Exit status 0 or an unknown status, without a recorded reason.
        (None, Some(ExitStatus::Code(_)) | None) => ExitCause::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: serde_json::Value) -> QmpEvent {
        QmpEvent { name: name.to_owned(), at: Duration::ZERO, data }
    }

    #[test]
    fn known_and_unknown_shutdown_reasons_are_read() {
        let read = |reason: &str| {
            shutdown_reason(&event("SHUTDOWN", serde_json::json!({ "guest": true, "reason": reason })))
        };
        assert_eq!(read("guest-shutdown"), Some(ShutdownReason::GuestShutdown));
        assert_eq!(read("host-qmp-quit"), Some(ShutdownReason::HostQmpQuit));
        assert_eq!(read("made-up"), Some(ShutdownReason::Other));
        assert_eq!(shutdown_reason(&event("SHUTDOWN", serde_json::Value::Null)), Some(ShutdownReason::Other));
        assert_eq!(shutdown_reason(&event("STOP", serde_json::Value::Null)), None);
        let panicked =
            |action: &str| shutdown_reason(&event("GUEST_PANICKED", serde_json::json!({ "action": action })));
        assert_eq!(panicked("poweroff"), Some(ShutdownReason::GuestPanic));
        assert_eq!((panicked("pause"), panicked("run")), (None, None));
    }

    #[test]
    fn qemus_shutdown_reason_overrides_the_exit_status() {
        let exit = |status| ProcessExit { status };
        let killed = exit(Some(ExitStatus::Signal(9)));
        assert_eq!(exit_cause(Some(ShutdownReason::GuestShutdown), killed), ExitCause::GuestPowerOff);
        assert_eq!(exit_cause(None, killed), ExitCause::VmmFailed);
        assert_eq!(exit_cause(None, exit(Some(ExitStatus::Code(1)))), ExitCause::VmmFailed);
        assert_eq!(exit_cause(None, exit(Some(ExitStatus::Code(0)))), ExitCause::Unknown);
        assert_eq!(exit_cause(None, ProcessExit::UNKNOWN), ExitCause::Unknown);
    }

    #[test]
    fn only_changes_that_were_not_ordered_are_reported() {
        assert_eq!(state_change(RunState::Running, true), None);
        assert_eq!(state_change(RunState::Paused, false), None);
        assert_eq!(state_change(RunState::Paused, true), Some(VmmEvent::Paused));
        assert_eq!(state_change(RunState::Running, false), Some(VmmEvent::Resumed));
        assert_eq!(state_change(RunState::Shutdown, true), None, "its end follows");
        assert!(matches!(state_change(RunState::InternalError, true), Some(VmmEvent::GuestFailed(_))));
        assert_eq!(state_change(RunState::InternalError, false), None, "told already");
    }
}
