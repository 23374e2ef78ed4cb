//! Watching one run of a domain: from libvirt's events and QEMU's process to [`VmmEvent`]s.
//!
//! ```text
//!   monitor   RESET ─► GuestReset, if the guest's; ResetFromOutside, if neither its nor ours
//!             GUEST_PANICKED ─► remembers why
//!             SHUTDOWN ─► remembers why; if nothing comes of it, wakes QEMU, and kills it in the end
//!   lifecycle suspended, resumed ─► asks, compares, tells; of a flood the last state
//!             ended ─► remembers how; the process follows
//!   connected again ─► asks, compares, tells
//!   process gone ─► waits a moment for libvirt's word ─► Gone(why), the end
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

use super::domain::{LOOKING, failure, guest_state};
use super::link::{Event, Link, State, Watched};
use crate::ordered::{Ordered, unwanted};
use crate::qemu::ending::{End, Patience, hasten};
use crate::qemu::watch::ShutdownReason;
use crate::throttle::{Throttle, due};

/// How long libvirt may take to say how a domain ended whose QEMU has gone, where it is connected.
const LAST_WORD: Duration = Duration::from_secs(3);

/// The task's state.
pub(super) struct Watch {
    pub(super) watched: Watched,
    pub(super) process: Process,
    pub(super) link: Arc<Link>,
    pub(super) guest: Arc<Ordered>,
    pub(super) events: mpsc::Sender<VmmEvent>,
    /// Why QEMU ends, in its own words.
    pub(super) reason: Option<ShutdownReason>,
    /// How the domain ended, in libvirt's.
    pub(super) ended: Option<Lifecycle>,
    /// How long QEMU may take to end after it said so; `None` where that is not ours to say.
    pub(super) patience: Option<Patience>,
    /// The end that QEMU has told of.
    pub(super) end: Option<End>,
    /// Ends when the VM's handle is dropped.
    pub(super) handle: oneshot::Receiver<()>,
    /// Keeps a domain that is stopped and resumed without end from asking libvirt, and filling the log of events, without end.
    pub(super) throttle: Throttle,
    /// The time to compare again, where the throttle has held a change up.
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

impl Watch {
    /// Watches until the process has gone and that has been told, or nobody is there to be told.
    pub(super) async fn run(mut self) {
        let process = self.process.clone();
        loop {
            let compare_at = self.compare_at;
            tokio::select! {
                biased;
                () = due(compare_at) => self.compare_if_due().await,
                event = self.watched.events.recv() => match event {
                    Some(event) => self.take(event).await,
                    // Another watch of the same domain has taken over.
                    None => return,
                },
                _ = process.wait() => break,
                () = unwanted(&self.events, &mut self.handle) => return,
                signal = End::is_due(&mut self.end) => self.hasten(signal).await,
            }
        }
        self.hear_last_word().await;
        let gone = VmmEvent::Gone(self.describe());
        // A receiver that was dropped wants to know nothing.
        let _ = self.events.send(gone).await;
    }

    async fn take(&mut self, event: Event) {
        self.note_end(&event);
        match event {
            Event::Monitor(name, data) if name == "RESET" => match serde_json::from_str::<ResetData>(&data) {
                Ok(reset) => self.was_reset(reset.guest),
                Err(error) => warn!(%error, "QEMU's RESET event cannot be read"),
            },
            // A change that is held up is looked at later, whatever comes until then.
            Event::Lifecycle(Lifecycle::Suspended | Lifecycle::Resumed) | Event::Connected
                if self.compare_at.is_some() => {}
            Event::Lifecycle(Lifecycle::Suspended | Lifecycle::Resumed) | Event::Connected => {
                self.compare_if_due().await;
            }
            Event::Lifecycle(Lifecycle::Undefined) => {
                info!(
                    "the domain was undefined from outside; it goes on, and the next start defines it again"
                );
            }
            Event::Lifecycle(_) | Event::Monitor(..) => {}
        }
    }

    fn was_reset(&mut self, by_guest: bool) {
        // libvirt reboots a guest by having it shut down and resetting it then: it goes on after all.
        self.reason = None;
        self.ending(false);
        if by_guest {
            self.tell(VmmEvent::GuestReset);
        } else if self.guest.resets.is_anothers() {
            self.tell(VmmEvent::ResetFromOutside);
        }
    }

    /// Signals a QEMU that does not come to its end, if libvirt says so too: an event may have been missed.
    async fn hasten(&mut self, signal: Signal) {
        let known = self.link.look(self.watched.domain(), LOOKING).await;
        match known.map(|domain| domain.map(|known| known.state)) {
            Ok(Some(DomainState::ShuttingDown)) => hasten(&self.process, signal),
            Ok(Some(DomainState::Running | DomainState::Paused)) => self.ending(false),
            Ok(other) => debug!(?other, "QEMU has not ended, and libvirt does not wait for that"),
            Err(error) => debug!(%error, "QEMU has not ended, and libvirt does not say whether it is to"),
        }
    }

    /// Says whether QEMU is to end now.
    pub(super) fn ending(&mut self, ends: bool) {
        if !ends {
            self.end = None;
        } else if self.end.is_none() {
            self.end = self.patience.map(End::told);
        }
    }

    /// Remembers why the domain ends. The first reason counts.
    fn note_end(&mut self, event: &Event) {
        match event {
            Event::Monitor(name, data) if name == "SHUTDOWN" => {
                let read = serde_json::from_str::<ShutdownData>(data);
                self.reason = self.reason.or(Some(read.map_or(ShutdownReason::Other, |data| data.reason)));
                self.ending(true);
            }
            // libvirt stops the guest's CPUs and ends QEMU then, by a signal.
            Event::Monitor(name, _) if name == "GUEST_PANICKED" && self.patience.is_some() => {
                self.reason = self.reason.or(Some(ShutdownReason::GuestPanic));
            }
            Event::Lifecycle(
                how @ (Lifecycle::Stopped
                | Lifecycle::Destroyed
                | Lifecycle::Failed
                | Lifecycle::Moved
                | Lifecycle::Crashed),
            ) => self.ended = self.ended.or(Some(*how)),
            Event::Lifecycle(_) | Event::Monitor(..) | Event::Connected => {}
        }
    }

    /// Compares now, or once the throttle lets a change through again.
    async fn compare_if_due(&mut self) {
        self.compare_at = self.throttle.pass().err();
        if self.compare_at.is_none() {
            self.compare().await;
        }
    }

    /// Asks what the guest is doing, and tells where that is not what was ordered. A guest that has panicked stands still until
    /// libvirt has ended QEMU, and its end is told.
    async fn compare(&mut self) {
        if self.reason == Some(ShutdownReason::GuestPanic) {
            return;
        }
        let (state, event) = {
            let change = self.guest.change().await;
            let state = match self.link.look(self.watched.domain(), LOOKING).await {
                Ok(Some(domain)) => domain.state,
                // Its end shows otherwise.
                Ok(None) => return,
                Err(error) => return debug!(%error, "libvirt does not say what the guest is doing"),
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
            self.tell(event);
        }
    }

    /// Tells without waiting: whoever falls that far behind learns the rest by asking, but never misses the end.
    fn tell(&self, event: VmmEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            warn!(?event, "an event of the VMM was dropped: too many wait");
        }
    }

    /// QEMU has gone: waits until libvirt says how, where it can.
    async fn hear_last_word(&mut self) {
        if !matches!(self.link.state(), State::Up(_)) {
            return;
        }
        let heard = tokio::time::timeout(LAST_WORD, async {
            while self.ended.is_none() {
                let Some(event) = self.watched.events.recv().await else { return };
                self.note_end(&event);
            }
        });
        if heard.await.is_err() && self.reason.is_none() {
            // A QEMU that ends by itself says so first, and libvirt passes that on at once.
            debug!("libvirt has not said how the domain ended, and QEMU neither");
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
                "QEMU failed or was killed; its last words are in libvirt's log of the domain (by default below \
                 /var/log/libvirt/qemu)"
            }
            (_, Some(Lifecycle::Destroyed)) => "the domain was destroyed through libvirt",
            (_, Some(Lifecycle::Moved)) => "the domain was saved or moved through libvirt",
            (ExitCause::Unknown, _) => "the domain ended, and libvirt has not said why",
            (_, _) => "the domain ended",
        };
        Exit { cause, message: message.to_owned() }
    }
}

/// What to tell of a guest in `state` while it was thought to run, or not to.
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

/// Why a domain ended that left these words.
fn exit_cause(reason: Option<ShutdownReason>, ended: Option<Lifecycle>) -> ExitCause {
    match (ended, reason) {
        // libvirt ends a QEMU by a signal, which QEMU reports as somebody's.
        (Some(Lifecycle::Destroyed | Lifecycle::Moved), _) => ExitCause::Requested,
        (Some(Lifecycle::Crashed), _) => ExitCause::GuestCrash,
        (_, Some(reason)) => reason.cause(),
        (Some(Lifecycle::Failed), None) => ExitCause::VmmFailed,
        (Some(_) | None, None) => ExitCause::Unknown,
    }
}

#[cfg(test)]
mod tests;
