//! Starting a VMM: the one path for first boot, boot after shutdown, reboot and restart by policy.
//!
//! ```text
//!   reserve ─► Reserved ─► provide TAPs ─► TapsProvided ─► intent ─► Intended ─► launch ─► Launched ─► outcome
//!                 │ undo: claims given back    │ undo: TAPs removed    │ undo: swept      │ undo: killed, swept
//!                 ▼                            ▼                       ▼                  ▼
//!              NotBegun                     NotBegun            NotBegun, Leftover   TakenBack, LeftSomething
//! ```
//!
//! Each phase is a value that only the phase before it makes, and that its way back takes. What a failed start has left is its
//! result, [`NotStarted`], because callers decide by it: a restart policy counts starts that launched something, and nobody
//! launches beside a process that may live.

use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, Launched, Sweep};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::gate::Gate;
use vmm_core::reason::Reason;
use vmm_core::spec::NamedFiles;
use vmm_core::state::{EndedBy, Observation, Phase, Request, observe};
use vmm_core::store::{HostClaim, Intent, IntentKind, RunRecord};
use vmm_host::descriptors;
use vmm_host::fault::{FaultPoint, point};

use super::Actor;
use super::budget::{Broken, Budget};
use super::hold::{Hold, Next};
use super::journal::{Turn, Why};
use super::launch::{Launching, launched_nothing};
use crate::check::{self, FilesSilent, HostFacts, LOOK_DEADLINE, Purpose, Terms};
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::mailbox::Outcome;
use crate::spares;

/// No launch may take longer. With the look before it and the sweep after it, a boot fails within 30 s.
const LAUNCH_LIMIT: Duration = Duration::from_secs(25);

/// Why a VM was not started, and what the start has left.
pub(super) enum NotStarted {
    /// Nothing was launched.
    NotBegun(ServiceError),
    /// A VMM was launched, or may have been, and nothing of it is left.
    TakenBack(ServiceError),
    /// A process may be left: the VM is unreachable, and looked for.
    LeftSomething(ServiceError),
}

impl NotStarted {
    /// Returns what a client is told.
    pub(super) fn into_error(self) -> ServiceError {
        match self {
            Self::NotBegun(error) | Self::TakenBack(error) | Self::LeftSomething(error) => error,
        }
    }
}

/// The caller who starts the VM, and the operation.
#[derive(Clone, Copy)]
pub(super) struct Start<'a> {
    /// BootVm, or RebootVm for its second half.
    pub(super) request: Request,
    pub(super) caller: &'a Caller,
    /// What ended the run before, if RebootVm ended it.
    pub(super) ended_by: Option<EndedBy>,
}

impl<'a> Start<'a> {
    pub(super) const fn new(request: Request, caller: &'a Caller) -> Self {
        Self { request, caller, ended_by: None }
    }
}

/// The disks and TAPs of the VM are claimed.
pub(super) struct Reserved {
    pub(super) claims: Vec<HostClaim>,
    /// The descriptors that the start may open.
    _room: descriptors::Start,
}

/// Besides, every TAP exists.
struct TapsProvided {
    reserved: Reserved,
    /// The TAPs that this start has made.
    made: Vec<String>,
}

/// Besides, a launch is under way, and what it is for is on record.
struct Intended {
    taps: TapsProvided,
    launching: Launching,
}

/// A VMM runs the guest.
struct Launch {
    taps: TapsProvided,
    launched: Launched,
}

impl Actor {
    /// BootVm: a start that a client asked for ends any count of restarts, and any wait for one.
    pub(super) async fn boot_as_asked(
        &mut self,
        budget: Budget,
        caller: &Caller,
    ) -> Result<Outcome, ServiceError> {
        let waiting = std::mem::replace(&mut self.next, Next::Idle);
        let restarts = self.record.status.restarts;
        self.count_from(0);
        let Err(failure) = self.start(budget, Start::new(Request::Boot, caller)).await else {
            return Ok(self.outcome(None));
        };
        if let NotStarted::NotBegun(_) = failure {
            self.count_from(restarts);
            if self.record.status.phase == Phase::Restarting {
                // Nothing is recorded of this start, so the policy's own start is still to come.
                self.next = waiting;
            }
        }
        Err(failure.into_error())
    }

    /// Starts the VMM and its guest. Everything is claimed here.
    pub(super) async fn start(&mut self, budget: Budget, start: Start<'_>) -> Result<(), NotStarted> {
        self.clear_leftover(budget).await.map_err(NotStarted::NotBegun)?;
        let reserved = self.reserve(budget).await.map_err(NotStarted::NotBegun)?;
        if let Err(error) = self.take_reserved(&reserved) {
            return Err(NotStarted::NotBegun(error));
        }
        self.start_reserved(budget, start, reserved).await
    }

    /// Starts the VMM and its guest, for which everything is claimed. A reboot has recorded its intent already.
    ///
    /// To start the VMM's process and to put the intent on the disk take their time, and neither needs the other, so both are
    /// under way at once. What keeps this safe is the gate in the launch: before it opens, the process has been told nothing of
    /// the VM, writes no disk and uses no TAP. If the daemon dies before the intent is durable, the next one finds the process
    /// by its run folder and ends it, and no guest has noticed. So the gate opens after the intent has answered, and not
    /// before; a keeper that is dropped calls the launch off.
    pub(super) async fn start_reserved(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        reserved: Reserved,
    ) -> Result<(), NotStarted> {
        point(FaultPoint::StartReserved);
        let taps = self.provide(budget, start, reserved).await?;
        point(FaultPoint::StartTapsProvided);
        let (keeper, gate) = Gate::shut();
        let launching = self.begin_launch(gate);
        let mut intended = self.record_intent(budget, start, taps, launching).await?;
        keeper.open();
        let limit = budget.at_most_before_wind_up(LAUNCH_LIMIT);
        match self.interruptible(budget, limit, &mut intended.launching).await {
            Ok(launched) => {
                point(FaultPoint::StartLaunched);
                self.started(budget, start, Launch { taps: intended.taps, launched }).await
            }
            Err(broken) => Err(self.launch_failed(budget, start, intended, broken).await),
        }
    }

    /// Makes sure that nothing is left of a start that was called off before its VMM was told anything.
    async fn clear_leftover(&mut self, budget: Budget) -> Result<(), ServiceError> {
        if !matches!(self.hold, Hold::Leftover) {
            return Ok(());
        }
        match self.sweep(budget, Sweep::Clear, None).await {
            Ok(()) => {
                self.let_go_and_release();
                Ok(())
            }
            Err(broken) => Err(self.error_of("boot", Request::Boot, &broken)),
        }
    }

    /// Refuses a configuration that the VM's backend does not take, as CreateVm does. The backend or its host may have changed
    /// since the VM was created. Of an imported VM the configuration is what its VMM says, and is not checked.
    fn check_again(&self) -> Result<(), ServiceError> {
        let report = self.backend.check(&self.spec());
        if report.is_ok() || self.record.imported {
            return Ok(());
        }
        let problems = ServiceError::Invalid(report.into_violations());
        Err(ServiceError::precondition(format!("VM \"{}\" cannot boot: {problems}", self.record.vm_id)))
    }

    /// Looks at the host once more, and returns what the VM needs for itself.
    ///
    /// The look can be interrupted, because a file may be on a server that does not answer.
    pub(super) async fn reserve(&mut self, budget: Budget) -> Result<Reserved, ServiceError> {
        self.check_again()?;
        let room = descriptors::Start::reserve().map_err(|full| {
            ServiceError::exhausted(format!("VM \"{}\" cannot boot: {full}", self.record.vm_id))
        })?;
        let mut facts = match self.look(budget, self.record.owns_console_output).await {
            Ok(Ok(facts)) => facts,
            Ok(Err(silent)) => {
                let text = format!("VM \"{}\" cannot boot: {silent}", self.record.vm_id);
                return Err(ServiceError::unavailable(text));
            }
            Err(broken) => return Err(self.error_of("boot", Request::Boot, &broken)),
        };
        if let Some(limit) = facts.limit {
            let text = format!("VM \"{}\" cannot boot: {}", self.record.vm_id, limit.advice());
            return Err(ServiceError::exhausted(text));
        }
        // Of what somebody else made, its VMM knows the files: they may not be where this program sees them.
        if !facts.report.is_ok() && !self.record.imported {
            let problems = ServiceError::Invalid(facts.report.into_violations());
            return Err(ServiceError::precondition(format!(
                "VM \"{}\" cannot boot as the host is now: {problems}",
                self.record.vm_id
            )));
        }
        facts.claims.extend(self.tap_claims());
        Ok(Reserved { claims: facts.claims, _room: room })
    }

    /// Looks at the VM's files, unless a forced operation comes.
    pub(super) async fn look(
        &mut self,
        budget: Budget,
        owns_output: bool,
    ) -> Result<Result<HostFacts, FilesSilent>, Broken> {
        let terms = Terms { owns_output, ..Terms::of(Purpose::Boot, Some(self.backend.capabilities())) };
        let look = check::look(NamedFiles::of(&self.spec()), terms);
        let slot = self.slot.take();
        let looking = async move { Ok(check::without_slot_if_slow(slot, look).await) };
        // The look keeps a deadline of its own, which is the shorter one.
        let answered = self.answered;
        let looked = self.interruptible(budget, 2 * LOOK_DEADLINE, looking).await;
        // The files have answered, and not the VMM.
        self.answered = answered;
        let (found, slot) = looked?;
        self.slot = slot.flatten();
        Ok(found)
    }

    /// Claims what a start needs, in place of what the VM holds.
    pub(super) fn take_reserved(&self, reserved: &Reserved) -> Result<(), ServiceError> {
        let vm_id = &self.record.vm_id;
        self.shared
            .claims
            .exchange(self.record.uid, vm_id, &reserved.claims)
            .map_err(|taken| ServiceError::precondition(format!("VM \"{vm_id}\" cannot boot: {taken}")))
    }

    /// Reserved → TapsProvided.
    async fn provide(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        reserved: Reserved,
    ) -> Result<TapsProvided, NotStarted> {
        let mut made = Vec::new();
        let Err(broken) = self.provide_taps(budget, &mut made).await else {
            return Ok(TapsProvided { reserved, made });
        };
        let error = self.error_of("boot", start.request, &broken);
        let wind_up = broken.wind_up(budget);
        self.undo_taps(wind_up, TapsProvided { reserved, made }).await;
        // A reboot has its intent on record, which ends with this.
        let error = self.refused_start(wind_up, start, error).await;
        Err(NotStarted::NotBegun(error))
    }

    /// TapsProvided → Intended.
    async fn record_intent(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        taps: TapsProvided,
        mut launching: Launching,
    ) -> Result<Intended, NotStarted> {
        if start.request != Request::Boot {
            return Ok(Intended { taps, launching });
        }
        let kind = IntentKind::Boot { claims: taps.reserved.claims.clone() };
        let mut failed = None;
        let intended = {
            let intending = pin!(self.intend(budget, kind, Phase::Starting, start.caller));
            match select(intending, &mut launching).await {
                Either::Left((intended, _)) => intended,
                // Before the gate is open a launch can only fail. The failure is told when its intent is on record.
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
            Ok(()) => Ok(Intended { taps, launching }),
            Err(error) => {
                drop(launching);
                Err(NotStarted::NotBegun(self.call_off(budget, start, taps, error).await))
            }
        }
    }

    /// The intent could not be recorded, so the VMM is told nothing, and goes again. Where that cannot be proven, the process is
    /// a leftover: it runs no guest, so the VM is not out of reach, and the next operation ends the process first.
    async fn call_off(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        taps: TapsProvided,
        error: ServiceError,
    ) -> ServiceError {
        let Err(Broken::Backend(left)) = self.sweep(budget, Sweep::Clear, None).await else {
            self.undo_taps(budget, taps).await;
            return error;
        };
        tracing::error!(error = %left, "what a start left that could not be recorded could not be ended");
        self.take_hold(Hold::Leftover);
        let message =
            format!("a process that was started for it could not be ended, and runs no guest: {left}");
        let status = self.status(Phase::Failed).because(Reason::VmmDoesNotEnd, message);
        let why = Why::asked(start.request, start.caller);
        let _ = self.conclude(budget, Turn::new(EventKind::OperationFailed, why, status)).await;
        error
    }

    /// The way back from TapsProvided, and with it from Reserved.
    async fn undo_taps(&mut self, budget: Budget, taps: TapsProvided) {
        for left in self.remove_taps(budget, taps.made).await {
            tracing::warn!(%left, "a TAP of a start that failed stays until the VM is deleted");
        }
        self.shared.claims.release(self.record.uid);
    }

    /// A start was refused that had changed nothing of its own. A reboot has an intent on record, and its VM is down.
    pub(super) async fn refused_start(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        error: ServiceError,
    ) -> ServiceError {
        if start.request == Request::Reboot {
            self.record_failed_start(budget, start, &error, false).await;
        }
        error
    }

    /// Records why there is no VMM. `ran` says that the guest may have run, however briefly: then the VM is not as it was created.
    async fn record_failed_start(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        error: &ServiceError,
        ran: bool,
    ) {
        let aborted = matches!(error, ServiceError::Aborted(_));
        let began = if ran { observe(self.record.state, Observation::Runs) } else { self.record.state };
        let at_rest = Phase::at_rest(observe(began, Observation::VmmGone));
        let (phase, reason) =
            if aborted { (at_rest, Reason::Aborted) } else { (Phase::Failed, Reason::BootFailed) };
        let status = self.status(phase).because(reason, error.to_string());
        let why = Why::asked(start.request, start.caller);
        let mut turn = Turn::new(EventKind::OperationFailed, why, status);
        if ran {
            turn = turn.observing(Observation::Runs);
        }
        let _ = self.conclude(budget, turn.observing(Observation::VmmGone)).await;
    }

    /// Launched → on record. A VM that is not on record must not run, because nobody would find it after a crash.
    async fn started(&mut self, budget: Budget, start: Start<'_>, launch: Launch) -> Result<(), NotStarted> {
        let Launch { taps, launched } = launch;
        let mut run = launched.vmm.run().clone();
        run.claims.clone_from(&taps.reserved.claims);
        run.started_ms = now_ms();
        let mut live = self.live(launched, run);
        live.quiet_since = tokio::time::Instant::now();
        self.take_hold(Hold::Vmm(live));
        let why = Why::asked(start.request, start.caller).ended_by(start.ended_by);
        let turn = Turn::new(EventKind::StateChanged, why, self.status(Phase::Running))
            .observing(Observation::Runs)
            .ending(None);
        if let Err(error) = self.try_to_conclude(budget, turn).await {
            return Err(self.take_back(budget, start, taps, error.into(), false).await);
        }
        point(FaultPoint::outcome_committed(start.request));
        spares::refill(&self.shared, &self.backend);
        Ok(())
    }

    async fn launch_failed(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        intended: Intended,
        broken: Broken,
    ) -> NotStarted {
        let Intended { taps, launching } = intended;
        // From here on nothing more is started: a process that was under way is found by the sweep.
        drop(launching);
        let error = self.error_of("boot", start.request, &broken);
        let wind_up = broken.wind_up(budget);
        let preempted = matches!(broken, Broken::Preempted(_));
        let never_launched = broken.backend().is_some_and(|error| launched_nothing(&error));
        match self.take_back(wind_up, start, taps, error, preempted).await {
            NotStarted::TakenBack(error) if never_launched => NotStarted::NotBegun(error),
            other => other,
        }
    }

    /// The way back from Launched and from Intended: takes back everything that a start has done, and records why there is no
    /// VMM.
    ///
    /// The order is the reverse of the start's. First the VMM: by its handle where there is one, and in any case by its run
    /// folder where that is not proof enough. Only a sweep that succeeds proves that no process is left, and only then may the
    /// TAPs be removed and the claims be given back, because a process that lives uses both. Where the sweep fails everything
    /// stays claimed, and the VM is an orphan's.
    async fn take_back(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        taps: TapsProvided,
        error: ServiceError,
        ran: bool,
    ) -> NotStarted {
        let killed = match self.hold.vmm() {
            Some(vmm) => self.kill(budget, &*vmm).await,
            None => Err(BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, "no handle is held")),
        };
        if killed.is_err() {
            let run = self.hold.run().cloned();
            if let Err(Broken::Backend(left)) = self.sweep(budget, Sweep::Clear, run).await {
                return self.leave_orphan(budget, start, taps.reserved, error, &left).await;
            }
        }
        self.let_go_keeping_claims();
        self.undo_taps(budget, taps).await;
        self.record_failed_start(budget, start, &error, ran).await;
        NotStarted::TakenBack(error)
    }

    /// Nothing proves that the process of a start has gone, so the claims of the start stay.
    ///
    /// The intent stays on record as that of a boot, also where a reboot has failed in its second half: it says what the process
    /// may use, to the next daemon too, and a look that finds the process goes on from there as after an interrupted boot.
    async fn leave_orphan(
        &mut self,
        budget: Budget,
        start: Start<'_>,
        reserved: Reserved,
        error: ServiceError,
        left: &BackendError,
    ) -> NotStarted {
        tracing::error!(error = %left, "what a broken start left could not be ended; it is looked for again");
        let handle = match std::mem::replace(&mut self.hold, Hold::Nothing) {
            Hold::Vmm(live) | Hold::Silent(live) => Some(live),
            _ => None,
        };
        self.take_hold(Hold::Orphan(handle));
        self.next = Next::look();
        let kind = IntentKind::Boot { claims: reserved.claims };
        let intent = Intent { kind, caller: start.caller.clone(), since_ms: now_ms() };
        let status = self.status(Phase::Unreachable).because(Reason::VmmDoesNotEnd, left.to_string());
        let why = Why::asked(start.request, start.caller);
        let turn = Turn::new(EventKind::OperationFailed, why, status)
            .observing(Observation::VmmGone)
            .intending(Some(intent));
        let _ = self.conclude(budget, turn).await;
        NotStarted::LeftSomething(error)
    }

    /// Returns what an earlier run or start is known by, for those that end its process.
    pub(super) fn known_run(&self) -> Option<RunRecord> {
        self.hold.run().or(self.record.run.as_ref()).cloned()
    }
}
