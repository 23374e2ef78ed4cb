//! The recovery of a VM after a restart of the daemon, by the VM's record and by its process.
//!
//! ```text
//!   no run, no intent, nothing out of reach ──► as it was; a leftover of a start is ended
//!   otherwise claim what is on record, and ask the backend:
//!     alive       ──► held; a boot stands if the guest runs, a shutdown and a reboot go on
//!                     (unfinished.rs)
//!     gone        ──► SHUTDOWN with the reason; an interrupted first boot: CREATED; a reboot boots
//!     unreachable ──► the last proven state, marked so; nothing but force touches it
//!   an interrupted delete is finished, by force only if it was forced
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{
    AdoptRequest, Adoption, BackendError, Exit, ExitCause, GuestState, LaunchedVmm, SweepPurpose,
};
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::intent::RecoveryAction;
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::state::{Observation, Phase, VmOperation, VmState, observe};
use vmm_core::store::{HostClaim, Intent, PendingProcess, PendingWork, RunRecord};
use vmm_host::process;

use super::budget::{Budget, EffectError};
use super::hold::{Hold, NextStep};
use super::record_update::{ChangeReason, RecordUpdate};
use super::supervise::RecoveryOccasion;
use super::unfinished::is_achieved;
use super::{Actor, Flow};
use crate::mailbox::OperationRequest;
use crate::operation_log::Ending;
use crate::sockets::Sockets;

/// The time that a VMM may take to prove that it is alive.
const ADOPT_LIMIT: Duration = Duration::from_secs(5);

impl Actor {
    /// Recovers the VM from its record and its process. `in_use` is true if a process may use the
    /// VM's run folder.
    pub(super) async fn recover(&mut self, in_use: bool, occasion: RecoveryOccasion) -> Flow {
        self.at_start = occasion == RecoveryOccasion::DaemonStart;
        let flow = self.recover_from_record(in_use).await;
        self.at_start = false;
        flow
    }

    async fn recover_from_record(&mut self, in_use: bool) -> Flow {
        let intent = self.record.intent.clone();
        let pending = self.record.pending_work();
        let out_of_reach = pending.process == PendingProcess::OutOfReach;
        if intent.is_none() && self.record.run.is_none() && !out_of_reach {
            self.recover_at_rest(in_use, pending).await;
            return Flow::GoOn;
        }
        // The claims come first, before any wait, because other VMs recover and start at the same
        // time. Until `find` has an answer, the VM counts as lost or as an orphan, so that only
        // force is admitted.
        self.claim_what_is_on_record();
        let ran = self.record.run.is_some() || self.record.state.is_live();
        self.hold = if ran { Hold::Lost } else { Hold::Orphan(None) };
        // A deletion goes on whether or not a process lives, because it ends the process itself.
        if let Some(leaving) = intent.as_ref().filter(|intent| intent.is_deletion()) {
            return self.go_on_deleting(leaving.clone()).await;
        }
        // No process survives a restart of the host, so that no search is necessary.
        if self.host_rebooted() {
            let exit = Exit {
                cause: ExitCause::Unknown,
                message: "the host was restarted while the VM ran".to_owned(),
            };
            self.ended_unwatched(exit, intent.as_ref(), Cause::HostReboot).await;
            return Flow::GoOn;
        }
        self.find(intent).await;
        Flow::GoOn
    }

    /// Claims what the VM's process may use: the claims of its run, and the claims of an
    /// interrupted start. Every recovery does this first. The claims come from the record and need
    /// no look at the host's files, so that a file server that does not answer leaves no time in
    /// which another VM could take a disk.
    pub(super) fn claim_what_is_on_record(&self) {
        let run = self.record.run.iter().flat_map(|run| &run.claims);
        let intent = self.record.intent.iter().flat_map(|intent| intent.claims());
        let claims: Vec<_> = run.chain(intent).cloned().collect::<HashSet<_>>().into_iter().collect();
        if let Err(taken) = self.shared.claims.exchange(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(detail = %taken, "two VMs on record have claimed the same disk or TAP");
        }
    }

    /// Recovers a VM that the last daemon left without a process that runs its guest.
    ///
    /// A process of a start that was cancelled before its VMM received any data may be left, and is
    /// ended here. Such a process is on record, or uses the run folder: the latter because the
    /// daemon died while the intent of the start was on the way to the disk. A launch of a VM that
    /// is not managed touches nothing before its intent is on record. A process that does not end
    /// is a leftover, which the next start ends.
    async fn recover_at_rest(&mut self, in_use: bool, pending: PendingWork) {
        let budget = Budget::of_own_step();
        let recorded = pending.process == PendingProcess::Leftover;
        let left = if recorded || (in_use && self.record.kind == VmKind::Managed) {
            self.sweep(budget, SweepPurpose::Clear, None).await.err()
        } else {
            None
        };
        if left.is_some() {
            self.take_hold(Hold::Leftover);
        }
        if pending.restart {
            self.resume_restart();
        }
        if left.is_none() && !recorded {
            return self.publish();
        }
        let status = match left.and_then(EffectError::backend) {
            _ if pending.restart => self.record.status.clone(),
            Some(left) => self.status(Phase::Failed).because(Reason::VmmDoesNotEnd, leftover_message(&left)),
            None => self
                .status(Phase::at_rest(self.record.state))
                .because(Reason::VmmGone, "the process of a cancelled start has ended"),
        };
        let why = self.found_by_search(Cause::VmmExited);
        self.conclude_once(budget, RecordUpdate::new(EventKind::StateChanged, why, status)).await;
    }

    /// Searches again for a lost VMM.
    pub(super) async fn search_process(&mut self) {
        self.next = NextStep::Idle;
        let intent = self.record.intent.clone();
        self.find(intent).await;
    }

    /// Searches for the VMM, and records what follows for the VM.
    ///
    /// A reboot can have died between its halves. Then the process on record is gone and a second
    /// process may exist, which the first search cannot find because the record names the old one.
    /// The function therefore forgets the old run and searches a second time.
    async fn find(&mut self, intent: Option<Intent>) {
        let mut adopted = self.adopt().await;
        // The old VMM of a reboot is gone. The record now names no run, so that the second search
        // accepts a new VMM of the VM.
        if matches!(adopted, Ok(Adoption::Gone { .. })) && self.first_half_is_done(intent.as_ref()) {
            adopted = self.adopt().await;
        }
        if let Ok(Adoption::Alive { launched, .. }) = &adopted
            && self.run_on_record().is_some_and(|run| run.process != launched.vmm.run().process)
        {
            // Some backends find a VM by its place and not by its process. They find the new VMM at
            // the first search, and the old run must still be forgotten.
            self.first_half_is_done(intent.as_ref());
        }
        match adopted {
            Ok(Adoption::Alive { launched, guest }) => self.take_over(launched, guest, intent).await,
            // Gone is a proof, so that the remains of the run may be cleared. A sweep that fails is
            // logged alone, because the process itself is gone.
            Ok(Adoption::Gone { exit }) => {
                let run = self.run_on_record();
                if let Err(EffectError::Backend(error)) =
                    self.sweep(Budget::of_own_step(), SweepPurpose::Clear, run).await
                {
                    tracing::warn!(%error, "the remains of the last run could not be removed");
                }
                self.ended_unwatched(exit, intent.as_ref(), self.cause_of_found_end()).await;
            }
            // The VMM of an interrupted start does not answer yet. It is proven to be this
            // daemon's, and no client has an answer about its start, so that it may be ended:
            // `GuestState::Ended` takes that path.
            Ok(Adoption::Unreachable { launched: Some(launched), .. })
                if self.hold.never_ran() && intent.as_ref().is_some_and(Intent::is_start) =>
            {
                self.take_over(launched, GuestState::Ended, intent).await;
            }
            Ok(Adoption::Unreachable { reason, message, launched }) => {
                self.found_unreachable(reason, message, launched).await;
            }
            Err(EffectError::Backend(error)) => {
                self.found_unreachable(Reason::VmmDoesNotAnswer, error.to_string(), None).await;
            }
            // The forced operation that pre-empted the search decides what becomes of the VM.
            Err(EffectError::Preempted(_)) => {}
        }
    }

    /// Checks that a search in the daemon's namespaces can prove the end of the VM's process. The
    /// process is that of `run`, or else that of the start whose intent is on record.
    ///
    /// # Errors
    /// Returns the reason if the process may live in another namespace, where the daemon does not
    /// see it.
    pub(super) fn can_search(&self, run: Option<&RunRecord>) -> Result<(), String> {
        let scope = match run {
            Some(run) => run.process.scope(),
            None => self.record.intent.as_ref().and_then(|intent| intent.scope.clone()),
        };
        process::can_search(scope.as_ref())
    }

    fn host_rebooted(&self) -> bool {
        match (&self.record.run, process::boot_id()) {
            (Some(run), Ok(now)) => run.process.boot_id != now,
            (Some(_) | None, _) => false,
        }
    }

    /// Returns the run on record, unless the hold on the VM's process tells that this run has
    /// ended.
    pub(super) fn run_on_record(&self) -> Option<RunRecord> {
        self.hold.run_on_record(self.record.run.clone())
    }

    /// Asks the backend for the VM's process, within [`ADOPT_LIMIT`].
    async fn adopt(&mut self) -> Result<Adoption, EffectError> {
        // The backend compares the namespaces of a recorded run itself, and may know more.
        let run = self.run_on_record();
        if run.is_none()
            && let Err(message) = self.can_search(None)
        {
            return Ok(Adoption::Unreachable { reason: Reason::IdentityUnproven, message, launched: None });
        }
        let backend = Arc::clone(&self.backend);
        let request = AdoptRequest {
            instance: self.shared.instance,
            uid: self.record.uid,
            vm_id: self.record.vm_id.clone(),
            spec: self.spec(),
            dir: self.dir(),
            run,
            kind: self.record.kind.clone(),
            imported: self.record.imported,
            changed_ms: self.record.modified_ms,
        };
        let adopting = async move { backend.adopt(request).await };
        self.interruptible(Budget::of_own_step(), ADOPT_LIMIT, adopting).await
    }

    /// Takes hold of a VMM that was found alive, or ends it.
    ///
    /// A VMM whose guest has ended is ended. A VMM of an interrupted start is ended too unless its
    /// guest runs, because the client of that start has no answer yet. Otherwise the daemon holds
    /// the VMM and carries on.
    async fn take_over(&mut self, launched: LaunchedVmm, guest: GuestState, intent: Option<Intent>) {
        let recorded = self.run_on_record();
        let started_here = recorded.is_none();
        let cut_short = started_here && intent.as_ref().is_some_and(Intent::is_start);
        if guest == GuestState::Ended || (cut_short && guest != GuestState::Running) {
            return self.end_found(launched, intent).await;
        }
        let mut run = run_of(recorded, &launched);
        // Without a run on record the claims are not on record either, so that they come from the
        // intent or from a look at the files.
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
        // A shutdown or a reboot waits for its VMM, which is found now. With no run on record the
        // intent is that of a start, or its first half is done.
        let unfinished = intent.as_ref().filter(|intent| !started_here && intent.recovery().waits_for_vmm());
        if let Some(intent) = unfinished {
            return self.take_up_unfinished(intent, observation).await;
        }
        let state = observe(self.record.state, observation);
        let phase = Phase::at_rest(state);
        let status = match &intent {
            Some(intent) if intent.recovery() != RecoveryAction::ShutdownAnswered => {
                self.status(phase).because(
                    Reason::OperationInterrupted,
                    format!("{} was interrupted; the VM is as shown", intent.request().name()),
                )
            }
            Some(_) | None => self.status(phase),
        };
        let why = self.found_by_search(Cause::ReachableAgain);
        let update = RecordUpdate::new(EventKind::Adopted, why, status).observing(observation);
        let update = if is_achieved(intent.as_ref(), observation) { update.answering() } else { update };
        let _ = self.conclude(Budget::of_own_step(), update).await;
    }

    /// Returns the reason of a change that a search recorded. A search at the start of the daemon
    /// has that start as its cause, and every other search has `later`.
    pub(super) fn found_by_search(&self, later: Cause) -> ChangeReason<'static> {
        ChangeReason::by_itself(if self.at_start { Cause::DaemonStarted } else { later })
    }

    /// Returns the cause of the end of a run that a search found.
    fn cause_of_found_end(&self) -> Cause {
        if self.at_start { Cause::VmmGoneAtStart } else { Cause::VmmExited }
    }

    /// Ends a VMM whose guest has ended, or whose start was interrupted before the guest ran.
    async fn end_found(&mut self, launched: LaunchedVmm, intent: Option<Intent>) {
        let budget = Budget::of_own_step();
        if let Err(error) = self.kill(budget, &*launched.vmm).await {
            return self.found_unreachable(Reason::VmmDoesNotEnd, error.to_string(), Some(launched)).await;
        }
        let _ = self.sweep(budget, SweepPurpose::Clear, self.run_on_record()).await;
        let exit = Exit { cause: ExitCause::Unknown, message: "the guest was no longer running".to_owned() };
        self.ended_unwatched(exit, intent.as_ref(), self.cause_of_found_end()).await;
    }

    /// Returns the claims of a VMM that runs without a run on record: those of the intent of its
    /// start. An earlier release recorded no claims, and another program may have started the VM.
    /// In these cases the VM's files show its claims.
    async fn claims_of_found(&mut self, intent: Option<&Intent>) -> Result<Vec<HostClaim>, String> {
        if let Some(intent) = intent.filter(|intent| !intent.claims().is_empty()) {
            return Ok(intent.claims().to_vec());
        }
        let Ok(Ok(facts)) = self.check_files(Budget::of_own_step(), true).await else {
            // Without its claims another VM could write to its disks, so the VM counts as
            // unreachable, and a forced operation can still find it.
            return Err(
                "the VM runs, but its files do not answer, so other VMs cannot be kept off its disks"
                    .to_owned(),
            );
        };
        let claims: Vec<_> = facts.claims.into_iter().chain(self.tap_claims()).collect();
        if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &claims) {
            tracing::error!(detail = %taken, "a running VM uses a disk or TAP that another VM has claimed");
        }
        Ok(claims)
    }

    /// Records that the run ended while no operation waited for its end, or that it never began.
    /// `cause` is the cause of the end, which the event shows.
    pub(super) async fn ended_unwatched(&mut self, exit: Exit, intent: Option<&Intent>, cause: Cause) {
        // Four cases follow each other. An interrupted reboot or restart is started again, unless
        // the host was restarted. A VM that never ran is as it was. An interrupted shutdown has its
        // result. The restart policy decides about every other end.
        let host_rebooted = cause == Cause::HostReboot;
        let why = ChangeReason::by_itself(cause);
        if !host_rebooted && self.starts_after_all(intent, why.clone()).await {
            return;
        }
        let budget = Budget::of_own_step();
        if self.hold.never_ran() {
            return self.record_interrupted_start(budget, intent, why).await;
        }
        if intent.is_some_and(|intent| intent.request() == VmOperation::Shutdown) {
            self.drop_hold_and_claims();
            let status = self
                .status(Phase::Stopped)
                .because(Reason::Shutdown, "shut down as asked; the daemon saw the end only afterwards");
            let update = RecordUpdate::new(EventKind::StateChanged, why, status)
                .observing(Observation::VmmGone)
                .answering();
            let _ = self.conclude(budget, update).await;
            return;
        }
        let mut decision = self.decide_restart(&exit);
        if host_rebooted {
            decision.status.reason = Reason::HostReboot;
        }
        self.end_of_run(budget, &exit, decision, why).await;
    }

    /// Records that a start was interrupted and that its process has provably gone. The VM is as it
    /// was before.
    async fn record_interrupted_start(
        &mut self,
        budget: Budget,
        intent: Option<&Intent>,
        why: ChangeReason<'_>,
    ) {
        // A VM that has run before keeps its TAPs, because other programs may have added addresses
        // or rules to them.
        if self.record.state == VmState::Created {
            for left in self.free_taps(budget).await {
                tracing::warn!(error = %left, "a TAP of an interrupted start could not be removed; DeleteVm removes it");
            }
        }
        self.drop_hold_and_claims();
        let (reason, message) = if intent.is_some() {
            (Reason::BootInterrupted, "the start of the VM was interrupted; nothing of that start is left")
        } else {
            (Reason::VmmGone, "no process of the VM is left")
        };
        let state = observe(self.record.state, Observation::VmmGone);
        let status = self.status(Phase::at_rest(state)).because(reason, message);
        let update = RecordUpdate::new(EventKind::StateChanged, why, status).observing(Observation::VmmGone);
        let _ = self.conclude(budget, update).await;
    }

    /// Records that the VMM may live and cannot be reached. The intent stays on record, because the
    /// search that finds the VMM needs it.
    pub(super) async fn found_unreachable(
        &mut self,
        reason: Reason,
        message: String,
        launched: Option<LaunchedVmm>,
    ) {
        let (reason, message) = match self.sockets_gone(&reason, launched.as_ref()).await {
            Some(gone) => (Reason::SocketsGone, gone),
            None => (reason, message),
        };
        let never_ran = self.hold.never_ran();
        let live = launched.map(|launched| {
            let run = run_of(self.run_on_record(), &launched);
            self.live(launched, run)
        });
        // A VM that never ran has no run on record, so its process counts as an orphan. The handle
        // of a recorded run is kept, because its VMM may answer again.
        self.take_hold(match (live, never_ran) {
            (live, true) => Hold::Orphan(live),
            (Some(live), false) => Hold::Silent(live),
            (None, false) => Hold::Lost,
        });
        // A shutdown by force needs no answer, so it continues although the VMM is silent.
        self.take_up_force();
        let status = self.status(Phase::Unreachable).because(reason, message);
        let intent = self.record.intent.clone();
        let why = self.found_by_search(Cause::VmmDoesNotAnswer);
        let mut update = RecordUpdate::new(EventKind::Unreachable, why, status).intending(intent);
        if never_ran {
            // The first half of a reboot may have ended the run that is on record.
            update = update.observing(Observation::VmmGone);
        }
        self.conclude_once(Budget::of_own_step(), update).await;
    }

    /// Returns the message about a VMM that lives and does not answer because its socket is gone.
    async fn sockets_gone(&self, reason: &Reason, launched: Option<&LaunchedVmm>) -> Option<String> {
        let silent = matches!(reason, Reason::VmmDoesNotAnswer | Reason::VmmSilent);
        let run = launched.filter(|_| silent)?.vmm.run();
        Sockets::of(&self.record, run, self.dir())?.gone().await
    }

    /// Finishes a deletion that was in progress, because its name must not stay taken. A deletion
    /// without force is finished without force: another program may have started the VM again
    /// meanwhile, and then the VM is shown as it is found.
    pub(super) async fn go_on_deleting(&mut self, intent: Intent) -> Flow {
        let force = intent.recovery() == RecoveryAction::Delete { force: true };
        let budget = if force { Budget::of_force(Instant::now()) } else { Budget::of_operation(None) };
        let operation = OperationRequest {
            request: intent.request(),
            guest_timeout: None,
            caller: intent.caller,
            update: None,
            key: self.record.keyed.clone(),
        };
        let asked = Instant::now();
        self.take_call(&operation);
        let result = self.delete(budget, &operation).await;
        let result = self.release_call(result);
        let record = self.record.share();
        let ending = Ending {
            operation: operation.request.method(),
            force,
            actor: &operation.caller,
            record: &record,
            asked,
        };
        match result {
            Ok(outcome) => {
                ending.done(&outcome);
                return Flow::End;
            }
            Err(error) => ending.failed(&error),
        }
        // The deletion failed, so the VM stays, and the search determines its state.
        if !matches!(self.hold, Hold::Quarantined { .. }) {
            let intent = self.record.intent.clone();
            self.find(intent).await;
        }
        Flow::GoOn
    }
}

/// Returns the message about a process that was started for a VM and could not be ended.
pub(super) fn leftover_message(left: &BackendError) -> String {
    format!("a process that was started for it could not be ended, and runs no guest: {left}")
}

/// Returns the run that was found: the recorded one, unless another program has started the VM
/// again since. The claims stay those of the record.
fn run_of(recorded: Option<RunRecord>, launched: &LaunchedVmm) -> RunRecord {
    let found = launched.vmm.run();
    match recorded {
        Some(recorded) if recorded.process == found.process => recorded,
        Some(recorded) => RunRecord { claims: recorded.claims, ..found.clone() },
        None => found.clone(),
    }
}
