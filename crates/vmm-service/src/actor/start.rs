//! The start of a VMM: one path for first boot, boot after shutdown, reboot and restart by policy.
//!
//! ```text
//!   reserve ─► ReservedPhase       undo: release the claims ─► NotBegun
//!      │ provide the TAPs
//!      ▼
//!   TapsProvidedPhase              undo: remove the TAPs ─► NotBegun
//!      │ commit the intent
//!      ▼
//!   IntendedPhase                  undo: sweep ─► NotBegun, or NotBegun with a Leftover
//!      │ launch
//!      ▼
//!   LaunchedPhase                  undo: kill ─► TakenBack or LeftSomething
//! ```
//!
//! Each phase is a value that only the phase before it can make, and that the undo of the phase
//! ([`undo`]) consumes. [`StartError`] describes what a failed start has left, because callers
//! decide by it: a restart policy counts only starts that launched a process, and nothing is
//! launched beside a process that may live.

mod undo;

use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};
use vmm_core::backend::{LaunchedVmm, SweepPurpose};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::NamedFiles;
use vmm_core::state::{EndedBy, Observation, Phase, VmOperation};
use vmm_core::store::{HostClaim, IntentKind, RunRecord};
use vmm_host::descriptors;
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::hold::Hold;
use super::launch::LaunchInProgress;
use super::record_update::{ChangeReason, RecordUpdate};
use super::restart::LastEnd;
use crate::check::{self, FILE_CHECK_TIMEOUT, FileCheckPurpose, FileCheckTerms, FileFindings, FilesTimedOut};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::failure::{BootObstacle, Failure};
use crate::mailbox::OperationOutcome;
use crate::spares;

/// The time limit of a launch. A boot with its look and its sweep fails within 30 s.
const LAUNCH_LIMIT: Duration = Duration::from_secs(25);

/// The error of a start that failed, by what the start has left.
pub(super) enum StartError {
    /// The start launched nothing.
    NotBegun(ServiceError),
    /// The start launched a VMM, or may have, and nothing of it is left.
    TakenBack(ServiceError),
    /// The start may have left a process. The VM is unreachable.
    LeftSomething(ServiceError),
}

impl StartError {
    /// Returns the error for the client.
    pub(super) const fn error(&self) -> &ServiceError {
        match self {
            Self::NotBegun(error) | Self::TakenBack(error) | Self::LeftSomething(error) => error,
        }
    }

    /// Returns the error for the client.
    pub(super) fn into_error(self) -> ServiceError {
        match self {
            Self::NotBegun(error) | Self::TakenBack(error) | Self::LeftSomething(error) => error,
        }
    }
}

/// The operation that starts the VM, and its caller.
#[derive(Clone, Copy)]
pub(super) struct StartRequest<'a> {
    /// BootVm, or RebootVm for its second half.
    pub(super) request: VmOperation,
    pub(super) caller: &'a Caller,
    /// The rung that ended the run before, if RebootVm ended it.
    pub(super) ended_by: Option<EndedBy>,
    /// The end of the last run, if the restart policy starts the VM again because of it.
    pub(super) after: Option<&'a LastEnd>,
}

impl<'a> StartRequest<'a> {
    pub(super) const fn new(request: VmOperation, caller: &'a Caller) -> Self {
        Self { request, caller, ended_by: None, after: None }
    }
}

/// The phase in which the disks and TAPs of the VM are claimed.
pub(super) struct ReservedPhase {
    pub(super) claims: Vec<HostClaim>,
    /// The file descriptors that the start may open.
    _room: descriptors::StartDescriptors,
}

/// The phase in which every TAP exists besides.
struct TapsProvidedPhase {
    reserved: ReservedPhase,
    /// The names of the TAPs that this start has made.
    made: Vec<String>,
}

/// The phase in which a launch is in progress and its intent is on record.
struct IntendedPhase {
    taps: TapsProvidedPhase,
    launching: LaunchInProgress,
}

/// The phase in which a VMM runs the guest.
struct LaunchedPhase {
    taps: TapsProvidedPhase,
    launched: LaunchedVmm,
}

impl Actor {
    /// Carries out BootVm. The intent of the start resets the count of restarts. A launch cancels
    /// the wait for a restart, so that a start which launches nothing leaves the VM waiting.
    pub(super) async fn boot(
        &mut self,
        budget: Budget,
        caller: &Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        match self.start(budget, StartRequest::new(VmOperation::Boot, caller)).await {
            Ok(()) => Ok(self.outcome(None)),
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Claims what the VM needs, and starts the VMM and its guest.
    pub(super) async fn start(&mut self, budget: Budget, start: StartRequest<'_>) -> Result<(), StartError> {
        let reserved = match self.prepare(budget).await {
            Ok(reserved) => reserved,
            Err(error) => return Err(StartError::NotBegun(self.refused_start(budget, start, error).await)),
        };
        self.start_reserved(budget, start, reserved).await
    }

    /// Takes the first step of a start: nothing of an earlier start is left, and what the VM needs
    /// is claimed.
    async fn prepare(&mut self, budget: Budget) -> Result<ReservedPhase, ServiceError> {
        self.clear_leftover(budget).await?;
        let reserved = self.reserve(budget).await?;
        self.take_reserved(&reserved)?;
        Ok(reserved)
    }

    /// Starts the VMM and its guest under the claims of `reserved`. A reboot's intent is on record.
    ///
    /// The start of the process and the commit of the intent run at the same time, because each
    /// takes time and neither needs the other. The permit of the launch makes this safe: until the
    /// permit is granted, the process has received nothing of the VM, writes no disk and uses no
    /// TAP. If the daemon dies before the intent is durable, the next daemon finds the process by
    /// its run folder and ends it, and no guest has run. The permit is therefore granted only after
    /// the commit of the intent has succeeded. An issuer that is dropped cancels the launch.
    pub(super) async fn start_reserved(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        reserved: ReservedPhase,
    ) -> Result<(), StartError> {
        point(FaultPoint::StartReserved);
        // An error returns before a process exists. `provide` has removed the TAPs then.
        let taps = self.provide(budget, start, reserved).await?;
        point(FaultPoint::StartTapsProvided);
        // From here on a process may start, but its guest waits for the permit. The `?` below drops
        // `issuer`, so that a refused intent cancels the launch. `record_intent` drops the launch
        // itself before its sweep.
        let (issuer, permit) = RunPermit::pending();
        let launching = self.begin_launch(permit);
        let mut intended = self.record_intent(budget, start, taps, launching).await?;
        // The intent is durable, so the next daemon knows what the guest may use.
        issuer.grant();
        let limit = budget.at_most_before_wind_up(LAUNCH_LIMIT);
        // Three results are possible. The launch succeeds. The launch fails or its time passes. A
        // forced operation pre-empts it. In the last two cases a process may exist, so that
        // `launch_failed` sweeps before it releases anything. The limit leaves time for that sweep.
        match self.interruptible(budget, limit, &mut intended.launching).await {
            Ok(launched) => {
                point(FaultPoint::StartLaunched);
                self.started(budget, start, LaunchedPhase { taps: intended.taps, launched }).await
            }
            Err(broken) => Err(self.launch_failed(budget, start, intended, broken).await),
        }
    }

    /// Removes the rest of a start that was cancelled before its VMM received any data.
    async fn clear_leftover(&mut self, budget: Budget) -> Result<(), ServiceError> {
        if !matches!(self.hold, Hold::Leftover) {
            return Ok(());
        }
        match self.sweep(budget, SweepPurpose::Clear, None).await {
            Ok(()) => {
                // A restart that is due stays due, because this start may launch nothing.
                self.hold = Hold::Nothing;
                self.shared.claims.release(self.record.uid);
                Ok(())
            }
            Err(broken) => Err(self.error_of(VmOperation::Boot, VmOperation::Boot, &broken)),
        }
    }

    /// Checks the configuration again, as CreateVm does, because the backend or its host may have
    /// changed since the VM was created. The configuration of an imported VM comes from its VMM and
    /// is not checked.
    fn check_again(&self) -> Result<(), ServiceError> {
        let report = self.backend.check(&self.spec());
        if report.is_ok() || self.record.imported {
            return Ok(());
        }
        Err(self.cannot_boot(BootObstacle::Config(report.into_violations())))
    }

    /// Looks at the host's files again, and returns what the VM must claim.
    ///
    /// A forced operation can interrupt the look, because a file may be on a server that does not
    /// answer.
    pub(super) async fn reserve(&mut self, budget: Budget) -> Result<ReservedPhase, ServiceError> {
        self.check_again()?;
        let room = descriptors::StartDescriptors::reserve()
            .map_err(|full| self.cannot_boot(BootObstacle::Descriptors(full)))?;
        let mut facts = match self.check_files(budget, self.record.owns_console_output).await {
            Ok(Ok(facts)) => facts,
            Ok(Err(silent)) => return Err(self.cannot_boot(BootObstacle::FilesTimedOut(silent))),
            Err(broken) => return Err(self.error_of(VmOperation::Boot, VmOperation::Boot, &broken)),
        };
        if let Some(limit) = facts.limit {
            return Err(self.cannot_boot(BootObstacle::HostLimit(limit)));
        }
        // Only its VMM knows the files of an imported VM. This program may not see them.
        if !facts.report.is_ok() && !self.record.imported {
            return Err(self.cannot_boot(BootObstacle::Files(facts.report.into_violations())));
        }
        facts.claims.extend(self.tap_claims());
        Ok(ReservedPhase { claims: facts.claims, _room: room })
    }

    /// Looks at the VM's files, unless a forced operation comes.
    pub(super) async fn check_files(
        &mut self,
        budget: Budget,
        owns_output: bool,
    ) -> Result<Result<FileFindings, FilesTimedOut>, EffectError> {
        let terms = FileCheckTerms {
            owns_output,
            ..FileCheckTerms::of(FileCheckPurpose::Boot, Some(self.backend.capabilities()))
        };
        let look = self.shared.file_checks.check(NamedFiles::of(&self.spec()), terms);
        let slot = self.slot.take();
        let looking = async move { Ok(check::without_slot_if_slow(slot, look).await) };
        // The look has a deadline of its own, which is shorter.
        let answered = self.answered;
        let looked = self.interruptible(budget, 2 * FILE_CHECK_TIMEOUT, looking).await;
        // The files have answered, and not the VMM, so its last answer is restored.
        self.answered = answered;
        let (found, slot) = looked?;
        self.slot = slot.flatten();
        Ok(found)
    }

    /// Claims what a start needs, in place of the VM's present claims.
    pub(super) fn take_reserved(&self, reserved: &ReservedPhase) -> Result<(), ServiceError> {
        let vm_id = &self.record.vm_id;
        self.shared
            .claims
            .exchange(self.record.uid, vm_id, &reserved.claims)
            .map_err(|taken| self.cannot_boot(BootObstacle::Claimed(taken)))
    }

    fn cannot_boot(&self, why: BootObstacle) -> ServiceError {
        Failure::CannotBoot { vm_id: self.record.vm_id.clone(), why }.into()
    }

    /// Provides the TAPs: the step from Reserved to TapsProvided.
    async fn provide(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        reserved: ReservedPhase,
    ) -> Result<TapsProvidedPhase, StartError> {
        let mut made = Vec::new();
        let Err(broken) = self.provide_taps(budget, &mut made).await else {
            return Ok(TapsProvidedPhase { reserved, made });
        };
        let error = self.error_of(VmOperation::Boot, start.request, &broken);
        let wind_up = broken.wind_up(budget);
        self.undo_taps(wind_up, TapsProvidedPhase { reserved, made }).await;
        // A reboot has its intent on record, which this commit ends.
        let error = self.refused_start(wind_up, start, error).await;
        Err(StartError::NotBegun(error))
    }

    /// Records the intent of a BootVm: the step from TapsProvided to Intended.
    async fn record_intent(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        taps: TapsProvidedPhase,
        mut launching: LaunchInProgress,
    ) -> Result<IntendedPhase, StartError> {
        if start.request != VmOperation::Boot {
            return Ok(IntendedPhase { taps, launching });
        }
        let mut status = self.status(Phase::Starting);
        if start.after.is_none() {
            status.restarts = 0;
        }
        let kind = IntentKind::Boot { claims: taps.reserved.claims.clone() };
        let mut failed = None;
        let intended = {
            let intending = pin!(self.intend(budget, kind, status, start.caller));
            // Both futures must be polled, because the launch makes progress only while it is
            // polled.
            match select(intending, &mut launching).await {
                Either::Left((intended, _)) => intended,
                // A launch can only fail before the permit is granted. The failure is reported
                // after its intent is on record.
                Either::Right((early, intending)) => {
                    failed = Some(early);
                    intending.await
                }
            }
        };
        if let Some(failed) = failed {
            launching = Box::pin(std::future::ready(failed));
        }
        match intended {
            Ok(()) => Ok(IntendedPhase { taps, launching }),
            Err(error) => {
                drop(launching);
                Err(StartError::NotBegun(self.call_off(budget, start, taps, error.into()).await))
            }
        }
    }

    /// Records a launch. A VM that is not on record must not run, because a crash would lose it.
    async fn started(
        &mut self,
        budget: Budget,
        start: StartRequest<'_>,
        launch: LaunchedPhase,
    ) -> Result<(), StartError> {
        let LaunchedPhase { taps, launched } = launch;
        let mut run = launched.vmm.run().clone();
        run.claims.clone_from(&taps.reserved.claims);
        run.started_ms = now_ms();
        let mut live = self.live(launched, run);
        live.quiet_since = tokio::time::Instant::now();
        self.take_hold(Hold::Vmm(live));
        let why = ChangeReason::asked(start.request, start.caller).ended_by(start.ended_by);
        let mut status = self.status(Phase::Running);
        if let Some(end) = start.after {
            status = end.shown_in(status);
        }
        let update = RecordUpdate::new(EventKind::StateChanged, why, status)
            .observing(Observation::Runs)
            .ending(None)
            .answering();
        if let Err(error) = self.try_to_conclude(budget, update).await {
            return Err(self.undo_launch(budget, start, taps, error.into(), false).await);
        }
        point(FaultPoint::outcome_committed(start.request));
        spares::refill(&self.shared, &self.backend);
        Ok(())
    }

    /// Returns the run that is held, or else the run on record. It identifies the process to end.
    pub(super) fn known_run(&self) -> Option<RunRecord> {
        self.hold.run().cloned().or_else(|| self.run_on_record())
    }
}
