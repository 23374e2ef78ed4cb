//! After a restart of the daemon: what became of the VM, and of what was being done to it.
//!
//! ```text
//!   nothing recorded as running, nothing under way, no process that uses its folder ──► as it was
//!   otherwise ask the backend:
//!     alive       ──► carry on; an interrupted boot stands if the guest runs, a shutdown and a reboot go on (unfinished)
//!     gone        ──► SHUTDOWN with the reason; a first boot that never came about: CREATED; a reboot boots
//!     unreachable ──► the last proven state, marked so, touched by nobody but force, an interrupted one included
//!   an interrupted delete is finished, whatever there is
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{AdoptRequest, Adoption, Exit, ExitCause, GuestState, Launched, Sweep};
use vmm_core::event::EventKind;
use vmm_core::intent::Recovery;
use vmm_core::kind::VmKind;
use vmm_core::state::{Observation, Phase, Request, VmState, observe};
use vmm_core::store::{Intent, RunRecord};

use super::boot::LOOK_DEADLINE;
use super::deadlines::FORCE_LIMIT;
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
            if self.stray {
                self.clear_unrecorded_start().await;
            }
            if self.record.status.phase == Phase::Restarting {
                self.resume_restart();
            }
            return Flow::GoOn;
        }
        self.claim_what_is_on_record();
        if let Some(leaving) = intent.as_ref().filter(|intent| intent.is_deletion()) {
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

    /// Claims what the VM's process may use, as the first act of every recovery: what its run holds, and what a start that was
    /// cut short had claimed. Nothing needs to look at the host's files for that, so a file server that does not answer leaves
    /// no gap in which another VM could take a disk.
    pub(super) fn claim_what_is_on_record(&self) {
        let run = self.record.run.iter().flat_map(|run| &run.claims);
        let intent = self.record.intent.iter().flat_map(|intent| intent.claims());
        let claims: Vec<_> = run.chain(intent).cloned().collect::<HashSet<_>>().into_iter().collect();
        if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(taken, "two VMs on record hold the same thing");
        }
    }

    /// Ends a VMM that was started while the intent was on its way to the disk, and never got there. It was told nothing of the
    /// VM yet, so the VM is as it was.
    async fn clear_unrecorded_start(&mut self) {
        if self.record.kind != VmKind::Managed {
            // There a launch touches nothing before its intent is on record.
            self.stray = false;
            return;
        }
        if let Err(Broken::Backend(error)) = self.sweep(Sweep::Clear).await {
            self.found_unreachable("vmm-does-not-end", error.to_string(), None).await;
        }
    }

    /// Looks for the VMM, and says of the VM what follows.
    async fn find(&mut self, intent: Option<Intent>) {
        let mut adopted = self.adopt().await;
        if matches!(adopted, Ok(Adoption::Gone { .. })) && self.first_half_is_done(intent.as_ref()) {
            adopted = self.adopt().await;
        }
        if let Ok(Adoption::Alive { launched, .. }) = &adopted
            && self.record.run.as_ref().is_some_and(|run| run.process != launched.vmm.run().process)
        {
            // Where a VM is not found by its process, a reboot's second half shows at once.
            self.first_half_is_done(intent.as_ref());
        }
        match adopted {
            Ok(Adoption::Alive { launched, guest }) => self.found_alive(launched, guest, intent).await,
            Ok(Adoption::Gone { exit }) => {
                if let Err(Broken::Backend(error)) = self.sweep(Sweep::Clear).await {
                    tracing::warn!(%error, "what the last run left could not be cleared");
                }
                self.ended_unwatched(exit, intent.as_ref(), None).await;
            }
            // A start that was cut short before its VMM could answer: proven ours, and acknowledged to nobody.
            Ok(Adoption::Unreachable { launched: Some(launched), .. })
                if self.never_ran() && intent.as_ref().is_some_and(is_start) =>
            {
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
        let interrupted = self.interrupted();
        self.find(interrupted).await;
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
            kind: self.record.kind.clone(),
            imported: self.record.imported,
        };
        self.interruptible(ADOPT_DEADLINE, async move { backend.adopt(request).await }).await
    }

    async fn found_alive(&mut self, launched: Launched, guest: GuestState, intent: Option<Intent>) {
        let recorded = self.record.run.clone();
        let started_here = recorded.is_none();
        let start_cut_short = started_here && intent.as_ref().is_some_and(is_start);
        if guest == GuestState::Ended || (start_cut_short && guest != GuestState::Running) {
            // A guest that has ended, or a start that was cut short before the guest ran.
            if let Err(error) = self.kill(&*launched.vmm).await {
                return self.found_unreachable("vmm-does-not-end", error.to_string(), Some(launched)).await;
            }
            let _ = self.sweep(Sweep::Clear).await;
            let exit =
                Exit { cause: ExitCause::Unknown, message: "its guest was not running any more".to_owned() };
            return self.ended_unwatched(exit, intent.as_ref(), None).await;
        }
        let mut run = run_of(recorded, &launched);
        if let Some(intent) = intent.as_ref().filter(|intent| started_here && !intent.claims().is_empty()) {
            run.claims = intent.claims().to_vec();
        } else if started_here {
            // An earlier release has recorded no claims, or somebody else has started the VM: its files say what it uses.
            let formats = self.backend.capabilities().kernel_formats;
            let look = check::look(self.spec.clone(), formats, true);
            match self.interruptible(LOOK_DEADLINE, async move { Ok(look.await) }).await {
                Ok(facts) => run.claims = facts.claims,
                Err(_) => {
                    // Without its claims another VM might write its disks, so it counts as not found; and force finds it.
                    let message = "it runs, but the files that it uses do not answer, so nothing can keep others off them";
                    return self.found_unreachable("files-do-not-answer", message.to_owned(), None).await;
                }
            }
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
        if !started_here
            && let Some(intent) = intent.as_ref().filter(|intent| intent.recovery().waits_for_vmm())
        {
            return self.take_up_unfinished(intent).await;
        }
        let phase = Phase::at_rest(self.record.state);
        self.record.status = match &intent {
            Some(intent) => self.plain(phase).because(
                "operation-interrupted",
                format!("the daemon ended during {}; the VM is as shown", intent.request().name()),
            ),
            None => self.plain(phase),
        };
        tracing::info!(state = self.record.state.name(), "found the VM's VMM, and carry on");
        let _ = self.conclude(EventKind::Adopted, Why::by_itself("daemon-started")).await;
    }

    /// The run ended while no daemon watched, or never came about.
    pub(super) async fn ended_unwatched(
        &mut self,
        exit: Exit,
        intent: Option<&Intent>,
        reason: Option<&str>,
    ) {
        if reason.is_none() && self.starts_after_all(intent).await {
            return;
        }
        if self.never_ran() {
            // One that has run before keeps its TAPs, and what others have put on them.
            if self.record.state == VmState::Created {
                for left in self.free_taps().await {
                    tracing::warn!(%left, "a TAP of a start that was cut short stays until the VM is deleted");
                }
            }
            self.let_go();
            self.record.status = self.plain(Phase::at_rest(self.record.state)).because(
                "boot-interrupted",
                "the daemon ended while the VM was being started; nothing of that start is left",
            );
            let _ = self.conclude(EventKind::StateChanged, Why::by_itself("daemon-started")).await;
            return;
        }
        if intent.is_some_and(|intent| intent.request() == Request::Shutdown) {
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
                let run = run_of(self.record.run.clone(), &launched);
                self.hold(launched, run);
            }
            None => {
                self.stray = true;
                self.look_for_it_later();
            }
        }
        let goes_on = self.interrupted().is_some();
        let known = (goes_on || self.record.intent.is_none())
            && self.record.status.phase == Phase::Unreachable
            && self.record.status.reason == reason;
        self.record.status = self.plain(Phase::Unreachable).because(reason, message);
        if goes_on {
            self.take_up_force();
        }
        let why = Why::by_itself("daemon-started");
        if known {
            // Looked for again and found as before: shown, not recorded.
            self.publish();
        } else if !goes_on {
            let _ = self.conclude(EventKind::Unreachable, why).await;
        } else if let Err(error) = self.commit(EventKind::Unreachable, why).await {
            tracing::error!(%error, "what was found could not be recorded");
            self.publish();
        }
    }

    /// Finishes a deletion that was under way, because its name must not stay taken. A deletion that was asked for without force
    /// is finished without force: meanwhile somebody may have started the VM again, and then the VM is shown as it is found.
    pub(super) async fn go_on_deleting(&mut self, intent: Intent) -> Flow {
        self.stray = true;
        let force = intent.recovery() == Recovery::Delete { force: true };
        self.force_until = force.then(|| Instant::now() + FORCE_LIMIT);
        let operation = Operation { request: intent.request(), ask_guest_for: None, caller: intent.caller };
        let deleted = self.delete(&operation).await;
        self.force_until = None;
        let Err(error) = deleted else { return Flow::End };
        tracing::error!(%error, "an interrupted delete could not be finished");
        if self.untaken.is_none() {
            self.find(None).await;
        }
        Flow::GoOn
    }
}

/// Says whether an intent is that of a start.
fn is_start(intent: &Intent) -> bool {
    match intent.recovery() {
        Recovery::Start { .. } | Recovery::Reboot { .. } => true,
        Recovery::AsFound
        | Recovery::Shutdown { .. }
        | Recovery::ShutdownAnswered
        | Recovery::Delete { .. } => false,
    }
}

/// The run that was found: as it was recorded, unless somebody has started the VM anew since. It holds what it held.
fn run_of(recorded: Option<RunRecord>, launched: &Launched) -> RunRecord {
    let found = launched.vmm.run();
    match recorded {
        Some(recorded) if recorded.process == found.process => recorded,
        Some(recorded) => RunRecord { claims: recorded.claims, ..found.clone() },
        None => found.clone(),
    }
}
