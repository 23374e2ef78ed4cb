//! After a restart of the daemon: what became of the VM, and of what was being done to it.
//!
//! ```text
//!   nothing recorded as running, nothing under way ──► as it was
//!   otherwise ask the backend:
//!     alive       ──► carry on; an interrupted delete goes on, an interrupted boot stands if the guest runs
//!     gone        ──► SHUTDOWN with the reason; a first boot that never came about: CREATED
//!     unreachable ──► the last proven state, marked so, touched by nobody but force
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{AdoptRequest, Adoption, Exit, ExitCause, GuestState, Launched};
use vmm_core::event::EventKind;
use vmm_core::state::{Observation, Phase, Request, observe};
use vmm_core::store::Intent;

use super::persist::Why;
use super::{Actor, Broken, Flow, Operation};
use crate::check;

/// How long a VMM may take to prove that it is alive.
const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// Time between two looks for a VMM that could not be reached when the daemon started.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

impl Actor {
    /// Finds out what is true of the VM.
    pub(super) async fn recover(&mut self) -> Flow {
        let intent = self.record.intent.clone();
        let lost = self.record.status.phase == Phase::Unreachable;
        if intent.is_none() && self.record.run.is_none() && !lost {
            if self.record.status.phase == Phase::Restarting {
                self.resume_restart();
            }
            return Flow::GoOn;
        }
        if let Some(run) = &self.record.run
            && let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &run.claims)
        {
            tracing::error!(taken, "two VMs on record hold the same thing");
        }
        let leaving =
            intent.as_ref().filter(|intent| matches!(intent.request, Request::Delete | Request::ForceDelete));
        if let Some(leaving) = leaving {
            return self.go_on_deleting(leaving.clone()).await;
        }
        if self.host_rebooted() {
            let exit =
                Exit { cause: ExitCause::Unknown, message: "the host was restarted while it ran".to_owned() };
            self.ended_unwatched(exit, intent.as_ref(), Some("host-reboot")).await;
            return Flow::GoOn;
        }
        self.find(intent).await;
        Flow::GoOn
    }

    /// Looks for the VMM, and says of the VM what follows.
    async fn find(&mut self, intent: Option<Intent>) {
        match self.adopt().await {
            Ok(Adoption::Alive { launched, guest }) => self.found_alive(launched, guest, intent).await,
            Ok(Adoption::Gone { exit }) => {
                if let Err(Broken::Backend(error)) = self.sweep().await {
                    tracing::warn!(%error, "what the last run left could not be cleared");
                }
                self.ended_unwatched(exit, intent.as_ref(), None).await;
            }
            // A start that was cut short before its VMM could answer: proven ours, and acknowledged to nobody.
            Ok(Adoption::Unreachable { launched: Some(launched), .. }) if self.never_ran() => {
                self.found_alive(launched, GuestState::Ended, intent).await;
            }
            Ok(Adoption::Unreachable { reason, message, launched }) => {
                self.found_unreachable(reason, message, launched).await;
            }
            Err(Broken::Backend(error)) => {
                self.found_unreachable("vmm-does-not-answer", error.to_string(), None).await;
            }
            // The forced operation that came settles it.
            Err(Broken::Preempted) => {}
        }
    }

    /// Has a VMM that may live, and of which no handle is held, looked for in a while.
    pub(super) fn look_for_it_later(&mut self) {
        self.look_at = Some(Instant::now() + LOOK_INTERVAL);
    }

    /// Looks for a lost VMM once more.
    pub(super) async fn look_for_it(&mut self) {
        self.look_at = None;
        self.find(None).await;
    }

    fn host_rebooted(&self) -> bool {
        match (&self.record.run, vmm_host::process::boot_id()) {
            (Some(run), Ok(now)) => run.process.boot_id != now,
            (Some(_) | None, _) => false,
        }
    }

    /// Whether no run of the VM was ever recorded as begun, or none since the last one ended.
    fn never_ran(&self) -> bool {
        self.record.run.is_none() && !self.record.state.is_live()
    }

    async fn adopt(&mut self) -> Result<Adoption, Broken> {
        let backend = Arc::clone(&self.backend);
        let request = AdoptRequest {
            instance: self.shared.instance,
            uid: self.record.uid,
            vm_id: self.record.vm_id.clone(),
            spec: self.spec.clone(),
            dir: self.dir(),
            run: self.record.run.clone(),
        };
        self.interruptible(ADOPT_DEADLINE, async move { backend.adopt(request).await }).await
    }

    async fn found_alive(&mut self, launched: Launched, guest: GuestState, intent: Option<Intent>) {
        let recorded = self.record.run.clone();
        let started_here = recorded.is_none();
        if guest == GuestState::Ended || (started_here && guest != GuestState::Running) {
            // A guest that has ended, or a start that was cut short before the guest ran.
            if let Err(error) = Self::kill(&*launched.vmm).await {
                return self.found_unreachable("vmm-does-not-end", error.to_string(), Some(launched)).await;
            }
            let _ = self.sweep().await;
            let exit =
                Exit { cause: ExitCause::Unknown, message: "its guest was not running any more".to_owned() };
            return self.ended_unwatched(exit, intent.as_ref(), None).await;
        }
        let mut run = recorded.unwrap_or_else(|| launched.vmm.run().clone());
        if started_here {
            let formats = self.backend.capabilities().kernel_formats;
            run.claims = check::look(self.spec.clone(), formats, true).await.claims;
            run.claims.extend(self.tap_claims());
            if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &run.claims) {
                tracing::error!(taken, "a VM found running holds what another one holds");
            }
        }
        self.hold(launched, run);
        let observation = match guest {
            GuestState::Running | GuestState::Ended => Observation::Runs,
            GuestState::Paused => Observation::StandsStill,
        };
        self.record.state = observe(self.record.state, observation);
        let phase = Phase::at_rest(self.record.state);
        self.record.status = match &intent {
            Some(intent) => self.plain(phase).because(
                "operation-interrupted",
                format!("the daemon ended during {}; the VM is as shown", intent.request.name()),
            ),
            None => self.plain(phase),
        };
        tracing::info!(state = self.record.state.name(), "found the VM's VMM, and carry on");
        let _ = self.conclude(EventKind::Adopted, Why::by_itself("daemon-started")).await;
    }

    /// The run ended while no daemon watched, or never came about.
    async fn ended_unwatched(&mut self, exit: Exit, intent: Option<&Intent>, reason: Option<&str>) {
        let interrupted = intent.map(|intent| intent.request);
        if self.never_ran() {
            for left in self.free_taps().await {
                tracing::warn!(%left, "a TAP of a start that was cut short stays until the VM is deleted");
            }
            self.let_go();
            self.record.status = self.plain(Phase::at_rest(self.record.state)).because(
                "boot-interrupted",
                "the daemon ended while the VM was being started; nothing of that start is left",
            );
            let _ = self.conclude(EventKind::StateChanged, Why::by_itself("daemon-started")).await;
            return;
        }
        if matches!(interrupted, Some(Request::Shutdown)) {
            self.let_go();
            self.record.state = observe(self.record.state, Observation::VmmGone);
            self.record.status = self
                .plain(Phase::Stopped)
                .because("shutdown", "shut down as asked, while the daemon was away");
            let _ = self.conclude(EventKind::StateChanged, Why::by_itself("daemon-started")).await;
            return;
        }
        let mut decision = self.decide_restart(&exit);
        if let Some(reason) = reason {
            reason.clone_into(&mut decision.status.reason);
        }
        self.end_of_run(&exit, decision, Why::by_itself(reason.unwrap_or("vmm-gone-at-start"))).await;
    }

    async fn found_unreachable(&mut self, reason: &str, message: String, launched: Option<Launched>) {
        tracing::warn!(reason, message, "the VM's VMM cannot be reached; the VM is left alone");
        match launched {
            Some(launched) => {
                let run = self.record.run.clone().unwrap_or_else(|| launched.vmm.run().clone());
                self.hold(launched, run);
            }
            None => {
                self.stray = true;
                self.look_for_it_later();
            }
        }
        let known = self.record.intent.is_none()
            && self.record.status.phase == Phase::Unreachable
            && self.record.status.reason == reason;
        self.record.status = self.plain(Phase::Unreachable).because(reason, message);
        if known {
            // Looked for again and found as before: shown, not recorded.
            self.publish();
            return;
        }
        let _ = self.conclude(EventKind::Unreachable, Why::by_itself("daemon-started")).await;
    }

    /// A delete that was under way is finished: its name must not stay taken.
    async fn go_on_deleting(&mut self, intent: Intent) -> Flow {
        self.stray = true;
        self.forcing = true;
        let operation = Operation { request: Request::ForceDelete, ask_guest_for: None, actor: intent.actor };
        let deleted = self.delete(&operation).await;
        self.forcing = false;
        match deleted {
            Ok(_) => Flow::End,
            Err(error) => {
                tracing::error!(%error, "an interrupted delete could not be finished");
                Flow::GoOn
            }
        }
    }
}
