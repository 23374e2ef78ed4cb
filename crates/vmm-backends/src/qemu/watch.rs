//! Watching one QEMU: from its events, its connection and its process to [`VmmEvent`]s.
//!
//! ```text
//!   QMP events ──────► SHUTDOWN, and GUEST_PANICKED where    │
//!                      QEMU ends: remembers why, nudges ─────┤
//!                      RESET:    GuestReset, if the guest's; │
//!                                else whose it was           │
//!                      STOP, RESUME: asks, compares, tells;  │
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
use super::ending::{End, Patience, hasten};
use super::link::Link;
use super::qmp::{Qmp, QmpEvent};
use crate::launch::last_words;
use crate::ordered::{Ordered, unwanted};
use crate::throttle::{Throttle, due};

/// How long the end of a connection may take after the end of its process: as good as none, for the kernel closes it.
const DRAINING: Duration = Duration::from_secs(1);

/// The task's state.
pub(crate) struct Watch {
    pub(crate) process: Process,
    pub(crate) link: Arc<Link>,
    pub(crate) guest: Arc<Ordered>,
    pub(crate) qmp_events: mpsc::Receiver<QmpEvent>,
    pub(crate) events: mpsc::Sender<VmmEvent>,
    pub(crate) reboot: RebootAction,
    pub(crate) log: PathBuf,
    pub(crate) shutdown: Option<ShutdownReason>,
    /// Ends when the VM's handle is dropped.
    pub(crate) handle: oneshot::Receiver<()>,
    /// Whose QEMU it is.
    pub(crate) owner: Owner,
    /// Keeps a QEMU that stops and resumes its guest without end from filling the log of events.
    pub(crate) throttle: Throttle,
    /// When to compare again, where the throttle has held a change up.
    pub(crate) compare_at: Option<Instant>,
}

/// Whose QEMU is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This program's.
    Us,
    /// Somebody else's: it is neither signalled nor told how to behave, and may live on when its guest has ended.
    Another,
}

/// Why QEMU ends, in its own words.
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
    /// A window that nobody opens here.
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
struct Shutdown {
    reason: ShutdownReason,
}

/// The data of GUEST_PANICKED.
#[derive(Deserialize)]
struct Panicked {
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
pub(super) struct Reset {
    pub(super) guest: bool,
}

impl Watch {
    /// Watches until the process has gone and that has been told, or nobody is there to be told.
    pub(crate) async fn run(mut self) {
        let (process, link) = (self.process.clone(), Arc::clone(&self.link));
        let mut end: Option<End> = None;
        loop {
            if self.shutdown.is_some() && end.is_none() && self.owner == Owner::Us {
                end = Some(End::told(Patience::WITH_OURS));
            }
            let compare_at = self.compare_at;
            tokio::select! {
                biased;
                () = due(compare_at) => self.compare_if_due().await,
                event = self.qmp_events.recv() => match event {
                    Some(event) => self.take(event).await,
                    // Cannot be: the link holds a sender.
                    None => break,
                },
                _ = process.wait() => break,
                () = unwanted(&self.events, &mut self.handle) => return,
                signal = End::is_due(&mut end) => hasten(&process, signal),
                qmp = link.restored() => self.catch_up(&qmp).await,
            }
        }
        let exit = process.wait().await;
        if tokio::time::timeout(DRAINING, link.drained()).await.is_err() {
            debug!("QEMU has gone, but its connection has not ended; going on without");
        }
        while let Ok(event) = self.qmp_events.try_recv() {
            self.note_shutdown(&event);
        }
        let gone = VmmEvent::Gone(self.describe(exit).await);
        // A receiver that was dropped wants to know nothing.
        let _ = self.events.send(gone).await;
    }

    async fn take(&mut self, event: QmpEvent) {
        self.note_shutdown(&event);
        match event.name.as_str() {
            "RESET" => match Reset::deserialize(&event.data) {
                Ok(reset) if reset.guest => self.tell(VmmEvent::GuestReset),
                // Nobody else speaks to a QEMU that is ours.
                Ok(_) if self.owner == Owner::Another && self.guest.resets.is_anothers() => {
                    self.tell(VmmEvent::ResetFromOutside);
                }
                Ok(_) => {}
                Err(error) => warn!(%error, "QEMU's RESET event cannot be read"),
            },
            // One that is held up is looked at later, whatever comes until then.
            "STOP" | "RESUME" if self.compare_at.is_some() => {}
            "STOP" | "RESUME" => self.compare_if_due().await,
            name => debug!(name, "event of QEMU without meaning here"),
        }
    }

    /// Remembers why QEMU ends. The first reason counts.
    fn note_shutdown(&mut self, event: &QmpEvent) {
        match event.name.as_str() {
            // QEMU stops its guest's CPUs between GUEST_PANICKED and SHUTDOWN, and is asked nothing about that.
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

    /// Says whether QEMU, which is to end with its guest, has told that this one has shut down: then it is asked nothing more.
    fn is_ending(&self) -> bool {
        self.owner == Owner::Us && self.guest.has_shut_down()
    }

    /// After a gap in the events: sets what a broken call may have left, and looks what has changed.
    async fn catch_up(&mut self, qmp: &Qmp) {
        if self.is_ending() {
            return;
        }
        if self.owner == Owner::Us
            && let Err(error) = qmp.set_reboot_action(self.reboot).await
        {
            warn!(%error, "QEMU's reboot action could not be set again");
        }
        self.compare(qmp).await;
    }

    /// Compares now, or once the throttle lets a change through again.
    async fn compare_if_due(&mut self) {
        self.compare_at = self.throttle.pass().err();
        if self.compare_at.is_none()
            && !self.is_ending()
            && let Ok(qmp) = self.link.get()
        {
            self.compare(&qmp).await;
        }
    }

    /// Asks what the guest is doing, and tells where that is not what was ordered.
    async fn compare(&mut self, qmp: &Qmp) {
        let event = {
            let change = self.guest.change().await;
            let status = match qmp.query_status().await {
                Ok(status) => status,
                // Its end, if that is what this is, shows otherwise.
                Err(error) => return debug!(%error, "QEMU does not say what its guest is doing"),
            };
            let event = match self.owner {
                Owner::Us => difference(status, change.runs()),
                Owner::Another => self.difference_of_another(status, change.runs()),
            };
            match event {
                Some(VmmEvent::Resumed) => change.set_runs(true),
                Some(_) => change.set_runs(false),
                None => {}
            }
            event
        };
        if let Some(event) = event {
            self.tell(event);
        }
    }

    /// The same of a QEMU that somebody else started: it may hold on to a guest that has ended.
    fn difference_of_another(&self, status: RunState, thought_to_run: bool) -> Option<VmmEvent> {
        match (status.guest_state_of_another(), thought_to_run) {
            (GuestState::Ended, _) if self.guest.is_to_end() => None,
            (GuestState::Ended, _) => Some(VmmEvent::Gone(Exit {
                cause: self.shutdown.map_or(ExitCause::Unknown, ShutdownReason::cause),
                message: "its guest has ended, and its QEMU was started to live on".to_owned(),
            })),
            (GuestState::Paused, true) => Some(VmmEvent::Paused),
            (GuestState::Running, false) => Some(VmmEvent::Resumed),
            (GuestState::Running, true) | (GuestState::Paused, false) => None,
        }
    }

    /// Tells without waiting: whoever falls that far behind learns the rest by asking, but never misses the end.
    fn tell(&self, event: VmmEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            warn!(?event, "an event of the VMM was dropped: too many wait");
        }
    }

    async fn describe(&self, exit: ProcessExit) -> Exit {
        let cause =
            if self.guest.is_to_end() { ExitCause::Requested } else { exit_cause(self.shutdown, exit) };
        let mut message = exit.to_string();
        let said = last_words(&self.log).await;
        if !said.is_empty() {
            message = format!("{message}; QEMU's last words: {said}");
        }
        Exit { cause, message }
    }
}

/// Returns the reason for which QEMU ends, where `event` says that QEMU ends.
pub(super) fn shutdown_reason(event: &QmpEvent) -> Option<ShutdownReason> {
    match event.name.as_str() {
        "SHUTDOWN" => {
            let told = Shutdown::deserialize(&event.data);
            Some(told.map_or(ShutdownReason::Other, |shutdown| shutdown.reason))
        }
        "GUEST_PANICKED" => {
            let told = Panicked::deserialize(&event.data).ok()?;
            (told.action == PanicAction::Poweroff).then_some(ShutdownReason::GuestPanic)
        }
        _ => None,
    }
}

/// What to tell of a guest that is in `status` while it was thought to run, or not to.
fn difference(status: RunState, thought_to_run: bool) -> Option<VmmEvent> {
    if let Some(why) = status.failure() {
        return thought_to_run.then(|| VmmEvent::GuestFailed(why.to_owned()));
    }
    match (status.guest_state(), thought_to_run) {
        (GuestState::Paused, true) => Some(VmmEvent::Paused),
        (GuestState::Running, false) => Some(VmmEvent::Resumed),
        (GuestState::Running, true) | (GuestState::Paused, false) | (GuestState::Ended, _) => None,
    }
}

/// Why a QEMU ended that left this reason, if any, and this status.
fn exit_cause(told: Option<ShutdownReason>, exit: ProcessExit) -> ExitCause {
    match (told, exit.status) {
        (Some(reason), _) => reason.cause(),
        (None, Some(ExitStatus::Signal(_))) => ExitCause::VmmFailed,
        (None, Some(ExitStatus::Code(code))) if code != 0 => ExitCause::VmmFailed,
        // In order, but nobody heard why.
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
    fn shutdown_reasons_are_read_and_an_unknown_one_is_no_fault() {
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
    fn what_qemu_said_outweighs_its_status() {
        let exit = |status| ProcessExit { status };
        let killed = exit(Some(ExitStatus::Signal(9)));
        assert_eq!(exit_cause(Some(ShutdownReason::GuestShutdown), killed), ExitCause::GuestPowerOff);
        assert_eq!(exit_cause(None, killed), ExitCause::VmmFailed);
        assert_eq!(exit_cause(None, exit(Some(ExitStatus::Code(1)))), ExitCause::VmmFailed);
        assert_eq!(exit_cause(None, exit(Some(ExitStatus::Code(0)))), ExitCause::Unknown);
        assert_eq!(exit_cause(None, ProcessExit::UNKNOWN), ExitCause::Unknown);
    }

    #[test]
    fn only_what_was_not_ordered_is_told() {
        assert_eq!(difference(RunState::Running, true), None);
        assert_eq!(difference(RunState::Paused, false), None);
        assert_eq!(difference(RunState::Paused, true), Some(VmmEvent::Paused));
        assert_eq!(difference(RunState::Running, false), Some(VmmEvent::Resumed));
        assert_eq!(difference(RunState::Shutdown, true), None, "its end follows");
        assert!(matches!(difference(RunState::InternalError, true), Some(VmmEvent::GuestFailed(_))));
        assert_eq!(difference(RunState::InternalError, false), None, "told already");
    }
}
