//! Starting a VMM: the one path for first boot, boot after shutdown, reboot and restart by policy.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Either, ready, select};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LaunchRequest, Launched, Sweep};
use vmm_core::caller::Caller;
use vmm_core::event::EventKind;
use vmm_core::gate::Gate;
use vmm_core::id::VmUid;
use vmm_core::spec::{Console, VmSpec};
use vmm_core::state::{Observation, Phase, Request, VmState, observe};
use vmm_core::store::{HostClaim, Intent, IntentKind};
use vmm_host::descriptors::Start;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::run_dir::{self, SpareMark};

use super::persist::Why;
use super::{Actor, Broken};
use crate::check;
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::run_folders::{KEPT_CONSOLE, touch};
use crate::service::Outcome;
use crate::spares;

/// No start may take longer. With the look before it and the sweep after it, a boot fails within 30 s.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(25);
/// No look at the host's files may take longer, before a start may begin.
pub(super) const LOOK_DEADLINE: Duration = Duration::from_secs(3);

impl Actor {
    /// BootVm: a start that a client asked for ends any count of restarts, and any wait for one.
    pub(super) async fn boot_as_asked(&mut self, caller: &Caller) -> Result<Outcome, ServiceError> {
        let waiting = (self.restart_at.take(), std::mem::take(&mut self.record.status.restarts));
        if let Err(error) = self.start(Request::Boot, caller).await {
            if self.record.status.phase == Phase::Restarting {
                // Nothing was begun, so the policy's own start is still to come.
                (self.restart_at, self.record.status.restarts) = waiting;
            }
            return Err(error);
        }
        Ok(self.outcome(None))
    }

    /// Starts the VMM and its guest. A reboot has recorded its intent already.
    pub(super) async fn start(&mut self, request: Request, caller: &Caller) -> Result<(), ServiceError> {
        let (claims, _room) = match self.reserve(request).await {
            Ok(reserved) => reserved,
            Err(error) if request == Request::Reboot => {
                return Err(self.not_started(request, caller, error).await);
            }
            Err(error) => return Err(error),
        };
        point(FaultPoint::StartReserved);
        let (keeper, gate) = Gate::shut();
        let mut launching = self.begin_launch(gate).await;
        let mut failed = None;
        if request == Request::Boot {
            let intended = {
                let kind = IntentKind::Boot { claims: claims.clone() };
                let intending = pin!(self.intend(kind, Phase::Starting, caller));
                match select(intending, &mut launching).await {
                    Either::Left((intended, _)) => intended,
                    // Before the gate is open a launch can only fail; that is told when its intent is on record.
                    Either::Right((early, intending)) => {
                        failed = Some(early);
                        intending.await
                    }
                }
            };
            if let Err(error) = intended {
                drop(launching);
                return Err(self.not_begun(error).await);
            }
        }
        keeper.open();
        let launched = match failed {
            Some(failed) => failed.map_err(Broken::Backend),
            None => self.interruptible(LAUNCH_DEADLINE, launching).await,
        };
        match launched {
            Ok(launched) => self.started(request, caller, launched, claims).await,
            Err(broken) => {
                let error = self.boot_error(request, broken);
                Err(self.not_started(request, caller, error).await)
            }
        }
    }

    fn boot_error(&self, request: Request, broken: Broken) -> ServiceError {
        match broken {
            Broken::Preempted => ServiceError::Aborted(format!(
                "{} of VM \"{}\" was pre-empted by a forced operation",
                request.name(),
                self.record.vm_id
            )),
            Broken::Backend(error) => ServiceError::from_backend("boot", &self.record.vm_id, &error),
        }
    }

    /// Looks at the host once more and takes what the VM needs for itself.
    ///
    /// The look can be interrupted: a file may be on a server that does not answer.
    async fn reserve(&mut self, request: Request) -> Result<(Vec<HostClaim>, Start), ServiceError> {
        let room = Start::reserve().map_err(|full| {
            ServiceError::Exhausted(format!("VM \"{}\" cannot boot: {full}", self.record.vm_id))
        })?;
        self.check_again()?;
        let formats = self.backend.capabilities().kernel_formats;
        let look = check::look(self.spec.clone(), formats, self.record.owns_console_output);
        let mut facts = match self.interruptible(LOOK_DEADLINE, async move { Ok(look.await) }).await {
            Ok(facts) => facts,
            Err(broken) => return Err(self.boot_error(request, broken)),
        };
        // Of what somebody else made, its VMM knows the files: they may not be where this program sees them.
        if !facts.report.is_ok() && !self.record.imported {
            let problems = ServiceError::Invalid(facts.report.violations);
            return Err(ServiceError::Precondition(format!(
                "VM \"{}\" cannot boot as the host is now: {problems}",
                self.record.vm_id
            )));
        }
        facts.claims.extend(self.tap_claims());
        self.shared.claims.exchange(self.record.uid, &self.record.vm_id, &facts.claims).map_err(|taken| {
            ServiceError::Precondition(format!("VM \"{}\" cannot boot: {taken}", self.record.vm_id))
        })?;
        Ok((facts.claims, room))
    }

    /// Refuses a configuration that the VM's backend does not take, as CreateVm does. The backend or its host may have changed
    /// since the VM was created. Of an imported VM the configuration is what its VMM says, and is not checked.
    fn check_again(&self) -> Result<(), ServiceError> {
        let report = self.backend.check(&self.spec);
        if report.is_ok() || self.record.imported {
            return Ok(());
        }
        let problems = ServiceError::Invalid(report.violations);
        Err(ServiceError::Precondition(format!("VM \"{}\" cannot boot: {problems}", self.record.vm_id)))
    }

    /// What to start, and why that does not suffice to make the VM anew, where it does not.
    fn what_to_start(&self) -> (VmSpec, Option<String>) {
        if !self.record.imported {
            return (self.spec.clone(), None);
        }
        match VmSpec::parse(&self.record.config) {
            Err(report) => (self.spec.clone(), Some(ServiceError::Invalid(report.violations).to_string())),
            Ok(spec) if self.record.untold.is_empty() => (spec, None),
            Ok(spec) => (spec, Some(format!("it also had {}", self.record.untold.join(", ")))),
        }
    }

    /// Begins a start: the TAPs, then a VMM whose guest waits behind `gate`. Everything that is made before that bears the VM's
    /// uid, which is on record since its creation, so the recovery finds it with or without an intent.
    async fn begin_launch(&mut self, gate: Gate) -> BoxFuture<'static, Result<Launched, BackendError>> {
        if let Err(error) = self.provide_taps().await {
            return Box::pin(ready(Err(error)));
        }
        point(FaultPoint::StartTapsProvided);
        self.stray = true;
        let name = self.backend.capabilities().name.clone();
        self.shared.spares.forget(&name, self.record.uid);
        let dir = self.dir();
        let (spec, incomplete) = self.what_to_start();
        let console = match &spec.console {
            Console::Off => None,
            Console::Kept => Some(dir.join(KEPT_CONSOLE)),
            Console::File(path) => Some(path.clone()),
        };
        // A file of the client's own is this VM's from the moment that the intent says so.
        let waits = matches!(spec.console, Console::File(_)) && !self.record.owns_console_output;
        let request = LaunchRequest {
            instance: self.shared.instance,
            uid: self.record.uid,
            vm_id: self.record.vm_id.clone(),
            taps: self.taps().into_iter().map(|(name, _)| name).collect(),
            spec,
            dir,
            console: console.clone(),
            gate: gate.clone(),
            kind: self.record.kind.clone(),
            imported: self.record.imported,
            incomplete,
        };
        let backend = Arc::clone(&self.backend);
        let (runtime_dir, uid) = (self.shared.settings.runtime_dir.clone(), self.record.uid);
        let mark = SpareMark { instance: self.shared.instance, backend: name };
        Box::pin(async move {
            if waits {
                gate.passed().await?;
            }
            prepare(runtime_dir, uid, console, mark).await?;
            point(FaultPoint::StartFolderMade);
            backend.launch(request).await
        })
    }

    /// The intent could not be recorded: what was begun meanwhile goes again.
    async fn not_begun(&mut self, error: ServiceError) -> ServiceError {
        if self.stray
            && let Err(Broken::Backend(left)) = self.sweep(Sweep::Clear).await
        {
            tracing::error!(error = %left, "what a start left that could not be recorded could not be ended; the next operation tries again");
            return error;
        }
        self.take_back_taps().await;
        self.shared.claims.release(self.record.uid);
        error
    }

    async fn started(
        &mut self,
        request: Request,
        caller: &Caller,
        launched: Launched,
        claims: Vec<HostClaim>,
    ) -> Result<(), ServiceError> {
        point(FaultPoint::StartLaunched);
        let mut run = launched.vmm.run().clone();
        run.claims = claims;
        run.started_ms = now_ms();
        let was = self.record.state;
        self.hold(launched, run);
        self.quiet_since = Some(tokio::time::Instant::now());
        self.record.state = observe(self.record.state, Observation::Runs);
        self.record.status = self.plain(Phase::Running);
        self.record.ended_by = None;
        if let Err(error) = self.conclude(EventKind::StateChanged, Why::asked(request, caller)).await {
            // A VM that is not on record must not run: nobody would find it after a crash.
            self.record.state = was;
            return Err(self.not_started(request, caller, error.into()).await);
        }
        point(FaultPoint::outcome_committed(request));
        self.made_taps.clear();
        spares::refill(&self.shared, &self.backend);
        Ok(())
    }

    /// Takes back everything that a start had done, and records why there is no VMM.
    async fn not_started(&mut self, request: Request, caller: &Caller, error: ServiceError) -> ServiceError {
        if let Some(vmm) = self.vmm()
            && let Err(error) = self.kill(&*vmm).await
        {
            tracing::error!(%error, "a VMM whose start is taken back could not be killed");
            self.stray = true;
        }
        if self.stray
            && let Err(Broken::Backend(left)) = self.sweep(Sweep::Clear).await
        {
            return self.start_left_something(request, caller, error, &left).await;
        }
        self.take_back_taps().await;
        self.let_go();
        let aborted = matches!(error, ServiceError::Aborted(_));
        if aborted && self.record.state == VmState::Created {
            // A VMM was started and ended by force: the VM has run, however briefly.
            self.record.state = VmState::Shutdown;
        }
        let (phase, reason) = if aborted {
            (Phase::at_rest(self.record.state), "aborted")
        } else {
            (Phase::Failed, "boot-failed")
        };
        self.record.status = self.plain(phase).because(reason, error.to_string());
        let _ = self.conclude(EventKind::OperationFailed, Why::asked(request, caller)).await;
        error
    }

    /// A start did not come about, and whether its process has gone cannot be proven: what it may hold stays claimed.
    async fn start_left_something(
        &mut self,
        request: Request,
        caller: &Caller,
        error: ServiceError,
        left: &BackendError,
    ) -> ServiceError {
        tracing::error!(error = %left, "what a broken start left could not be ended; it is looked for again");
        self.live = None;
        self.made_taps.clear();
        self.record.run = None;
        self.record.status = self.plain(Phase::Unreachable).because("vmm-does-not-end", left.to_string());
        self.look_for_it_later();
        // The intent stays on record as that of a start: it says what the process may use, also to the next daemon, and a look
        // that finds the process goes on from there.
        let claims = self.shared.claims.held_by(self.record.uid);
        let since_ms = now_ms();
        self.record.intent =
            Some(Intent { kind: IntentKind::Boot { claims }, caller: caller.clone(), since_ms });
        if let Err(error) = self.commit(EventKind::OperationFailed, Why::asked(request, caller)).await {
            tracing::error!(%error, "a start that left a process could not be recorded");
            self.publish();
        }
        error
    }
}

/// Makes the run folder and the console's file. If a spare VMM waits there it will be told what to run: its mark goes.
async fn prepare(
    runtime_dir: PathBuf,
    uid: VmUid,
    console: Option<PathBuf>,
    mark: SpareMark,
) -> Result<(), BackendError> {
    let made = tokio::task::spawn_blocking(move || {
        let dir = run_dir::create(&runtime_dir, uid).map_err(|error| (runtime_dir, error))?;
        mark.take_off(&dir).map_err(|error| (dir, error))?;
        match console {
            Some(console) => touch(&console).map_err(|error| (console, error)),
            None => Ok(()),
        }
    })
    .await;
    let failed = |text: String| BackendError::new(BackendErrorKind::Host, Effect::NotApplied, text);
    match made {
        Ok(Ok(())) => Ok(()),
        Ok(Err((path, error))) => Err(failed(format!("{} could not be made: {error}", path.display()))),
        Err(error) => Err(failed(format!("the run folder could not be made: {error}"))),
    }
}
