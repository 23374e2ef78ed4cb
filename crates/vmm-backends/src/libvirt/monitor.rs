//! Watches one run of a domain, and turns libvirt's events and QEMU's process into [`VmmEvent`]s.
//!
//! ```text
//!   monitor   RESET ─► GuestReset, if the guest's; ResetFromOutside, if another client's
//!             GUEST_PANICKED ─► records the reason
//!             SHUTDOWN ─► records the reason; if QEMU does not end, wakes it, and then kills it
//!   lifecycle suspended, resumed ─► asks, compares, reports; of a flood the last state
//!             ended ─► records the end; the process follows
//!   connected again ─► asks, compares, reports
//!   process gone ─► waits a moment for libvirt's report ─► Gone(why), the end
//! ```

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};
use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_host::process::{Process, Signal};
use vmm_libvirt_wire::{DomainState, Lifecycle};

use super::domain::{QUICK_CALL_TIMEOUT, failure, guest_state};
use super::link::{DomainEvent, DomainEvents, LibvirtLink, LinkState};
use crate::guest_orders::{GuestOrders, wait_for_last_user};
use crate::qemu::exit_schedule::{ExitSchedule, ExitTimeouts, send_due_signal};
use crate::qemu::monitor::ShutdownReason;
use crate::throttle::{Throttle, wait_until};

/// The time in which a connected libvirt must report how a domain ended whose QEMU has ended.
const END_REPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// The state of the task.
pub(super) struct DomainMonitor {
    pub(super) watched: DomainEvents,
    pub(super) process: Process,
    pub(super) link: Arc<LibvirtLink>,
    pub(super) guest: Arc<GuestOrders>,
    pub(super) events: mpsc::Sender<VmmEvent>,
    /// The reason for QEMU's end, as QEMU reported it.
    pub(super) reason: Option<ShutdownReason>,
    /// The end of the domain, as libvirt reported it.
    pub(super) ended: Option<Lifecycle>,
    /// The time limits of QEMU's end, or `None` if this program must not end it.
    pub(super) exit_timeouts: Option<ExitTimeouts>,
    /// The end that QEMU has announced.
    pub(super) end: Option<ExitSchedule>,
    /// Ends when the VM's handle is dropped.
    pub(super) handle: oneshot::Receiver<()>,
    /// Limits the comparisons of a domain that is stopped and resumed without end, because each
    /// asks libvirt and may store an event.
    pub(super) throttle: Throttle,
    /// The time of the next comparison, if the throttle has delayed one.
    pub(super) compare_at: Option<Instant>,
}

/// The data of QEMU's SHUTDOWN.
#[derive(Deserialize)]
struct ShutdownData {
    reason: ShutdownReason,
}

/// The data of QEMU's RESET.
#[derive(Deserialize)]
struct ResetData {
    guest: bool,
}

impl DomainMonitor {
    /// Watches until the end of the process was reported, or until both receiver and handle are
    /// dropped.
    pub(super) async fn run(mut self) {
        let process = self.process.clone();
        loop {
            let compare_at = self.compare_at;
            // The order of the arms is the order of precedence. Events come before the end of the
            // process, because they explain that end. The signal to a hanging QEMU comes last,
            // because an event may cancel it.
            tokio::select! {
                biased;
                () = wait_until(compare_at) => self.compare_if_due().await,
                event = self.watched.events.recv() => match event {
                    Some(event) => self.on_event(event).await,
                    // Another monitor of the same domain has replaced this one.
                    None => return,
                },
                _ = process.wait() => break,
                () = wait_for_last_user(&self.events, &mut self.handle) => return,
                signal = ExitSchedule::is_due(&mut self.end) => self.signal_waited_for_qemu(signal).await,
            }
        }
        self.wait_for_end_report().await;
        let gone = VmmEvent::Gone(self.describe());
        // A dropped receiver is no error.
        let _ = self.events.send(gone).await;
    }

    async fn on_event(&mut self, event: DomainEvent) {
        self.note_end(&event);
        match event {
            DomainEvent::Monitor(name, data) if name == "RESET" => {
                match serde_json::from_str::<ResetData>(&data) {
                    Ok(reset) => self.was_reset(reset.guest),
                    Err(error) => warn!(%error, "QEMU's RESET event cannot be read"),
                }
            }
            // A change that the throttle has delayed is compared later, whatever follows until
            // then.
            DomainEvent::Lifecycle(Lifecycle::Suspended | Lifecycle::Resumed) | DomainEvent::Connected
                if self.compare_at.is_some() => {}
            DomainEvent::Lifecycle(Lifecycle::Suspended | Lifecycle::Resumed) | DomainEvent::Connected => {
                self.compare_if_due().await;
            }
            DomainEvent::Lifecycle(Lifecycle::Undefined) => {
                info!(
                    "another program undefined the domain; its guest goes on, and the next start defines the domain again"
                );
            }
            DomainEvent::Lifecycle(_) | DomainEvent::Monitor(..) => {}
        }
    }

    fn was_reset(&mut self, by_guest: bool) {
        // libvirt reboots a guest by a shutdown and a reset after it, so the announced end does not
        // follow.
        self.reason = None;
        self.ending(false);
        if by_guest {
            self.report(VmmEvent::GuestReset);
        } else if self.guest.resets.is_foreign() {
            self.report(VmmEvent::ResetFromOutside);
        }
    }

    /// Signals a QEMU that has announced its end and still runs, if libvirt waits for that end,
    /// too. The cancelling event may have been missed.
    async fn signal_waited_for_qemu(&mut self, signal: Signal) {
        // libvirt cancels an announced end for a reboot. A signal to a QEMU whose guest goes on
        // would kill a healthy VM.
        let known = self.link.look_up(self.watched.domain(), QUICK_CALL_TIMEOUT).await;
        match known.map(|domain| domain.map(|known| known.state)) {
            Ok(Some(DomainState::ShuttingDown)) => send_due_signal(&self.process, signal),
            Ok(Some(DomainState::Running | DomainState::Paused)) => self.ending(false),
            Ok(other) => debug!(?other, "QEMU has not ended, and libvirt does not wait for that"),
            Err(error) => {
                debug!(%error, "QEMU has not ended, and libvirt does not report the state of the domain")
            }
        }
    }

    /// Records whether QEMU is about to end. [`send_due_signal`](Self::signal_waited_for_qemu)
    /// follows if it does not.
    pub(super) fn ending(&mut self, ends: bool) {
        if !ends {
            self.end = None;
        } else if self.end.is_none() {
            self.end = self.exit_timeouts.map(ExitSchedule::starting_now);
        }
    }

    /// Records the reason for the domain's end. The first reason counts.
    fn note_end(&mut self, event: &DomainEvent) {
        match event {
            DomainEvent::Monitor(name, data) if name == "SHUTDOWN" => {
                let read = serde_json::from_str::<ShutdownData>(data);
                self.reason = self.reason.or(Some(read.map_or(ShutdownReason::Other, |data| data.reason)));
                self.ending(true);
            }
            // libvirt stops the guest's CPUs after a panic, and then ends QEMU by a signal.
            DomainEvent::Monitor(name, _) if name == "GUEST_PANICKED" && self.exit_timeouts.is_some() => {
                self.reason = self.reason.or(Some(ShutdownReason::GuestPanic));
            }
            DomainEvent::Lifecycle(
                how @ (Lifecycle::Stopped
                | Lifecycle::Destroyed
                | Lifecycle::Failed
                | Lifecycle::Moved
                | Lifecycle::Crashed),
            ) => self.ended = self.ended.or(Some(*how)),
            DomainEvent::Lifecycle(_) | DomainEvent::Monitor(..) | DomainEvent::Connected => {}
        }
    }

    /// Compares now, or when the throttle allows the next change.
    async fn compare_if_due(&mut self) {
        self.compare_at = self.throttle.admit().err();
        if self.compare_at.is_none() {
            self.compare().await;
        }
    }

    /// Asks for the state of the guest, and reports a difference from the last order. A guest that
    /// has panicked is not compared, because libvirt stops it before it ends QEMU, and only the end
    /// is reported.
    async fn compare(&mut self) {
        if self.reason == Some(ShutdownReason::GuestPanic) {
            return;
        }
        // The record is locked during the question. Otherwise an order of the handle could change
        // the state in between, and its own change would be reported as another client's.
        let (state, event) = {
            let change = self.guest.change().await;
            let state = match self.link.look_up(self.watched.domain(), QUICK_CALL_TIMEOUT).await {
                Ok(Some(domain)) => domain.state,
                // The end of the domain is reported by its process.
                Ok(None) => return,
                Err(error) => return debug!(%error, "libvirt does not report the guest's state"),
            };
            let event = difference(state, change.runs());
            match event {
                Some(VmmEvent::Resumed) => change.set_runs(true),
                Some(_) => change.set_runs(false),
                None => {}
            }
            (state, event)
        };
        if state == DomainState::ShuttingDown {
            self.ending(true);
        }
        if let Some(event) = event {
            self.report(event);
        }
    }

    /// Sends an event without waiting. If the receiver is full, the event is dropped and the
    /// receiver reads the state at its next sample. The end is sent by `run`, which waits for room.
    fn report(&self, event: VmmEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            warn!(?event, "an event of the VMM was dropped, because too many events wait");
        }
    }

    /// Waits after the end of QEMU until libvirt has reported how the domain ended, if libvirt is
    /// connected.
    async fn wait_for_end_report(&mut self) {
        if !matches!(self.link.state(), LinkState::Up(_)) {
            return;
        }
        let heard = tokio::time::timeout(END_REPORT_TIMEOUT, async {
            while self.ended.is_none() {
                let Some(event) = self.watched.events.recv().await else { return };
                self.note_end(&event);
            }
        });
        if heard.await.is_err() && self.reason.is_none() {
            // A QEMU that ends by itself announces it first, and libvirt passes the announcement on
            // at once. Without one QEMU has failed.
            debug!("neither libvirt nor QEMU has reported how the domain ended");
            self.ended = Some(Lifecycle::Failed);
        }
    }

    fn describe(&self) -> Exit {
        let cause =
            if self.guest.is_to_end() { ExitCause::Requested } else { exit_cause(self.reason, self.ended) };
        let message = match (cause, self.ended) {
            (ExitCause::Requested, _) if self.reason == Some(ShutdownReason::HostQmpSystemReset) => {
                "the guest was reset through libvirt, where its restart policy lets no reset go on (on_reboot is destroy)"
            }
            (ExitCause::VmmFailed, _) => {
                "QEMU failed or was killed; libvirt's log of the domain may have the cause (by default below \
                 /var/log/libvirt/qemu)"
            }
            (_, Some(Lifecycle::Destroyed)) => "the domain was destroyed through libvirt",
            (_, Some(Lifecycle::Moved)) => "the domain was saved or moved through libvirt",
            (ExitCause::Unknown, _) => "the domain ended, and libvirt reported no cause",
            (_, _) => "the domain ended",
        };
        Exit { cause, message: message.to_owned() }
    }
}

/// Returns the event for a guest in `state` that was thought to run, or not to.
fn difference(state: DomainState, thought_to_run: bool) -> Option<VmmEvent> {
    if let Some(why) = failure(state) {
        return thought_to_run.then(|| VmmEvent::GuestFailed(why.to_owned()));
    }
    match (guest_state(state), thought_to_run) {
        (GuestState::Paused, true) if state == DomainState::Paused => Some(VmmEvent::Paused),
        (GuestState::Running, false) => Some(VmmEvent::Resumed),
        (GuestState::Running, true) | (GuestState::Paused, _) | (GuestState::Ended, _) => None,
    }
}

/// Returns the cause of an end with the reason `reason` and the report `ended`.
fn exit_cause(reason: Option<ShutdownReason>, ended: Option<Lifecycle>) -> ExitCause {
    match (ended, reason) {
        // libvirt ends a QEMU by a signal, which QEMU reports as a signal of the host.
        (Some(Lifecycle::Destroyed | Lifecycle::Moved), _) => ExitCause::Requested,
        (Some(Lifecycle::Crashed), _) => ExitCause::GuestCrash,
        (_, Some(reason)) => reason.cause(),
        (Some(Lifecycle::Failed), None) => ExitCause::VmmFailed,
        (Some(_) | None, None) => ExitCause::Unknown,
    }
}

#[cfg(test)]
mod tests;
