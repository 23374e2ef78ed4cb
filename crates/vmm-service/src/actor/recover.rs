//! After a restart of the daemon: what became of the VM, and of what was being done to it.
//!
//! ```text
//!   nothing recorded as running, nothing under way, no process that uses its folder ──► as it was
//!   otherwise claim what is on record, and ask the backend:
//!     alive       ──► carry on; an interrupted boot stands if the guest runs, a shutdown and a reboot go on (unfinished)
//!     gone        ──► SHUTDOWN with the reason; a first boot that never came about: CREATED; a reboot boots
//!     unreachable ──► the last proven state, marked so, touched by nobody but force, an interrupted one included
//!   an interrupted delete is finished, by force only if it was forced
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{AdoptRequest, Adoption, Exit, ExitCause, GuestState, Launched, Sweep};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::intent::Recovery;
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::state::{Observation, Phase, Request, VmState, observe};
use vmm_core::store::{HostClaim, Intent, IntentKind, RunRecord};

use super::budget::{Broken, Budget};
use super::hold::{Hold, Next};
use super::journal::{Turn, Why};
use super::{Actor, Flow};
use crate::clock::now_ms;
use crate::mailbox::Operation;

/// How long a VMM may take to prove that it is alive.
const ADOPT_LIMIT: Duration = Duration::from_secs(5);

impl Actor {
    /// Finds out what is true of the VM. `in_use` says that a process may use its run folder.
    pub(super) async fn recover(&mut self, in_use: bool) -> Flow {
        let intent = self.record.intent.clone();
        let lost = self.record.status.phase == Phase::Unreachable;
        if intent.is_none() && self.record.run.is_none() && !lost {
            if in_use {
                self.clear_unrecorded_start().await;
            }
            self.publish();
            if self.record.status.phase == Phase::Restarting {
                self.resume_restart();
            }
            return Flow::GoOn;
        }
        self.claim_what_is_on_record();
        self.hold = if self.record.run.is_some() { Hold::Lost } else { Hold::Orphan(None) };
        if let Some(leaving) = intent.as_ref().filter(|intent| intent.is_deletion()) {
            return self.go_on_deleting(leaving.clone()).await;
        }
        if self.host_rebooted() {
            let exit =
                Exit { cause: ExitCause::Unknown, message: "the host was restarted while it ran".to_owned() };
            self.ended_unwatched(exit, intent.as_ref(), Some(Reason::HostReboot)).await;
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
        if let Err(taken) = self.shared.claims.exchange(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(taken, "two VMs on record hold the same thing");
        }
    }

    /// Ends a VMM that was started while the intent was on its way to the disk, and never got there. It was told nothing of the
    /// VM yet, so the VM is as it was.
    async fn clear_unrecorded_start(&mut self) {
        if self.record.kind != VmKind::Managed {
            // There a launch touches nothing before its intent is on record.
            return;
        }
        if let Err(Broken::Backend(error)) = self.sweep(Budget::of_own_step(), Sweep::Clear, None).await {
            self.found_unreachable(Reason::VmmDoesNotEnd, error.to_string(), None).await;
        }
    }

    /// Looks for a lost VMM once more.
    pub(super) async fn look_for_it(&mut self) {
        self.next = Next::Idle;
        let intent = self.record.intent.clone();
        self.find(intent).await;
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
                let run = self.record.run.clone();
                if let Err(Broken::Backend(error)) =
                    self.sweep(Budget::of_own_step(), Sweep::Clear, run).await
                {
                    tracing::warn!(%error, "what the last run left could not be cleared");
                }
                self.ended_unwatched(exit, intent.as_ref(), None).await;
            }
            // A start that was cut short before its VMM could answer: proven ours, and acknowledged to nobody.
            Ok(Adoption::Unreachable { launched: Some(launched), .. })
                if self.never_ran() && intent.as_ref().is_some_and(Intent::is_start) =>
            {
                self.found_alive(launched, GuestState::Ended, intent).await;
            }
            Ok(Adoption::Unreachable { reason, message, launched }) => {
                self.found_unreachable(reason, message, launched).await;
            }
            Err(Broken::Backend(error)) => {
                self.found_unreachable(Reason::VmmDoesNotAnswer, error.to_string(), None).await;
            }
            // The forced operation that came settles it.
            Err(Broken::Preempted(_)) => {}
        }
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

    /// The run on record has ended. What follows is recorded with it.
    pub(super) fn forget_run_and_state(&mut self) {
        let record = Arc::make_mut(&mut self.record);
        record.run = None;
        record.state = observe(record.state, Observation::VmmGone);
    }

    async fn adopt(&mut self) -> Result<Adoption, Broken> {
        let backend = Arc::clone(&self.backend);
        let request = AdoptRequest {
            instance: self.shared.instance,
            uid: self.record.uid,
            vm_id: self.record.vm_id.clone(),
            spec: self.spec(),
            dir: self.dir(),
            run: self.record.run.clone(),
            kind: self.record.kind.clone(),
            imported: self.record.imported,
            changed_ms: self.record.modified_ms,
        };
        let adopting = async move { backend.adopt(request).await };
        self.interruptible(Budget::of_own_step(), ADOPT_LIMIT, adopting).await
    }

    async fn found_alive(&mut self, launched: Launched, guest: GuestState, intent: Option<Intent>) {
        let recorded = self.record.run.clone();
        let started_here = recorded.is_none();
        let cut_short = started_here && intent.as_ref().is_some_and(Intent::is_start);
        if guest == GuestState::Ended || (cut_short && guest != GuestState::Running) {
            return self.end_found(launched, intent).await;
        }
        let mut run = run_of(recorded, &launched);
        if started_here {
            match self.claims_of_found(intent.as_ref()).await {
                Ok(claims) => run.claims = claims,
                Err(message) => return self.found_unreachable(Reason::FilesDoNotAnswer, message, None).await,
            }
        }
        let observation = match guest {
            GuestState::Running | GuestState::Ended => Observation::Runs,
            GuestState::Paused => Observation::StandsStill,
        };
        let live = self.live(launched, run);
        self.take_hold(Hold::Vmm(live));
        let unfinished = intent.as_ref().filter(|intent| !started_here && intent.recovery().waits_for_vmm());
        if let Some(intent) = unfinished {
            return self.take_up_unfinished(intent, observation).await;
        }
        let state = observe(self.record.state, observation);
        let phase = Phase::at_rest(state);
        let status = match &intent {
            Some(intent) if intent.recovery() != Recovery::ShutdownAnswered => self.status(phase).because(
                Reason::OperationInterrupted,
                format!("the daemon ended during {}; the VM is as shown", intent.request().name()),
            ),
            Some(_) | None => self.status(phase),
        };
        tracing::info!(state = state.name(), "found the VM's VMM, and carry on");
        let turn =
            Turn::new(EventKind::Adopted, Why::by_itself("daemon-started"), status).observing(observation);
        let _ = self.conclude(Budget::of_own_step(), turn).await;
    }

    /// Ends a VMM whose guest has ended, or whose start was cut short before the guest ran.
    async fn end_found(&mut self, launched: Launched, intent: Option<Intent>) {
        let budget = Budget::of_own_step();
        if let Err(error) = self.kill(budget, &*launched.vmm).await {
            return self.found_unreachable(Reason::VmmDoesNotEnd, error.to_string(), Some(launched)).await;
        }
        let _ = self.sweep(budget, Sweep::Clear, self.record.run.clone()).await;
        let exit =
            Exit { cause: ExitCause::Unknown, message: "its guest was not running any more".to_owned() };
        self.ended_unwatched(exit, intent.as_ref(), None).await;
    }

    /// Returns what a VMM holds that runs without a run on record: what the intent of its start says. An earlier release has
    /// recorded no claims, and somebody else may have started the VM: then its files say what it uses.
    async fn claims_of_found(&mut self, intent: Option<&Intent>) -> Result<Vec<HostClaim>, String> {
        if let Some(intent) = intent.filter(|intent| !intent.claims().is_empty()) {
            return Ok(intent.claims().to_vec());
        }
        let Ok(Ok(facts)) = self.look(Budget::of_own_step(), true).await else {
            // Without its claims another VM might write its disks, so it counts as not found; and force finds it.
            return Err(
                "it runs, but the files that it uses do not answer, so nothing can keep others off them"
                    .to_owned(),
            );
        };
        let claims: Vec<_> = facts.claims.into_iter().chain(self.tap_claims()).collect();
        if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(taken, "a VM found running holds what another one holds");
        }
        Ok(claims)
    }

    /// The run ended while no daemon watched, or never came about.
    pub(super) async fn ended_unwatched(
        &mut self,
        exit: Exit,
        intent: Option<&Intent>,
        reason: Option<Reason>,
    ) {
        if reason.is_none() && self.starts_after_all(intent).await {
            return;
        }
        let budget = Budget::of_own_step();
        if self.never_ran() {
            return self.start_never_came_about(budget, intent).await;
        }
        if intent.is_some_and(|intent| intent.request() == Request::Shutdown) {
            self.let_go_and_release();
            let status = self
                .status(Phase::Stopped)
                .because(Reason::Shutdown, "shut down as asked, which was seen only when it had ended");
            let turn = Turn::new(EventKind::StateChanged, Why::by_itself("daemon-started"), status)
                .observing(Observation::VmmGone);
            let _ = self.conclude(budget, turn).await;
            return;
        }
        let mut decision = self.decide_restart(&exit);
        let why = Why::by_itself(reason.as_ref().map_or("vmm-gone-at-start", Reason::as_str));
        if let Some(reason) = &reason {
            decision.status.reason.clone_from(reason);
        }
        self.end_of_run(budget, &exit, decision, why).await;
    }

    /// A start was cut short, and its process has provably gone: the VM is as it was before.
    async fn start_never_came_about(&mut self, budget: Budget, intent: Option<&Intent>) {
        // One that has run before keeps its TAPs, and what others have put on them.
        if self.record.state == VmState::Created {
            for left in self.free_taps(budget).await {
                tracing::warn!(%left, "a TAP of a start that was cut short stays until the VM is deleted");
            }
        }
        self.let_go_and_release();
        let (reason, message) = if intent.is_some() {
            (
                Reason::BootInterrupted,
                "the VM's start was not carried to its end; nothing of that start is left",
            )
        } else {
            (Reason::VmmGone, "no process of the VM is left")
        };
        let status = self.status(Phase::at_rest(self.record.state)).because(reason, message);
        let turn = Turn::new(EventKind::StateChanged, Why::by_itself("daemon-started"), status);
        let _ = self.conclude(budget, turn).await;
    }

    /// The VMM may live, and cannot be reached. The intent stays on record, because the look that finds the VMM needs it.
    pub(super) async fn found_unreachable(
        &mut self,
        reason: Reason,
        message: String,
        launched: Option<Launched>,
    ) {
        tracing::warn!(%reason, detail = message, "the VM's VMM cannot be reached; the VM is left alone");
        let known = self.record.status.phase == Phase::Unreachable && self.record.status.reason == reason;
        let never_ran = self.never_ran();
        let live = launched.map(|launched| {
            let run = run_of(self.record.run.clone(), &launched);
            self.live(launched, run)
        });
        self.take_hold(match (live, never_ran) {
            (live, true) => Hold::Orphan(live),
            (Some(live), false) => Hold::Silent(live),
            (None, false) => Hold::Lost,
        });
        self.take_up_force();
        let status = self.status(Phase::Unreachable).because(reason, message);
        let intent = self.record.intent.clone();
        let turn =
            Turn::new(EventKind::Unreachable, Why::by_itself("daemon-started"), status).intending(intent);
        if known {
            // Looked for again and found as before: shown, not recorded.
            self.show(turn);
        } else {
            let _ = self.conclude(Budget::of_own_step(), turn).await;
        }
    }

    /// Returns the intent of a start whose process may live, where another intent has taken its place.
    pub(super) fn orphan_intent(&self, caller: Option<&Caller>) -> Option<Intent> {
        let claims = self.shared.claims.held_by(self.record.uid);
        let caller = caller.cloned().unwrap_or_else(|| Caller::named("unknown"));
        Some(Intent { kind: IntentKind::Boot { claims }, caller, since_ms: now_ms() })
    }

    /// Finishes a deletion that was under way, because its name must not stay taken. A deletion that was asked for without force
    /// is finished without force: meanwhile somebody may have started the VM again, and then the VM is shown as it is found.
    pub(super) async fn go_on_deleting(&mut self, intent: Intent) -> Flow {
        let force = intent.recovery() == Recovery::Delete { force: true };
        let budget = if force { Budget::of_force(Instant::now()) } else { Budget::of_operation(None) };
        let operation = Operation { request: intent.request(), ask_guest_for: None, caller: intent.caller };
        let Err(error) = self.delete(budget, &operation).await else { return Flow::End };
        tracing::error!(%error, "an interrupted delete could not be finished");
        if !matches!(self.hold, Hold::Quarantined { .. }) {
            let intent = self.record.intent.clone();
            self.find(intent).await;
        }
        Flow::GoOn
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
