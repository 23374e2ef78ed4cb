//! The backend of VMMs that another program started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    Exit, ExitCause, GuestState, LaunchRequest, LaunchedVmm, SweepPurpose, SweepRequest,
};
use vmm_core::discovery::{Discoverer, Discovery, Places};
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::reason::Reason;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::clock::now_ms;
use vmm_host::endpoint::{self, EndpointError};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::file_watch::FileWatcher;
use vmm_host::process::{Lookup, Process, adopt};

use super::console::{self, ConsoleCopy};
use super::force::KillManner;
use super::socket::{self, AttachedSocket, ScanMemory, SocketHealth};
use super::{
    AttachedHypervisor, AttachedVmFacts, AttachedVmmParts, GuestPhase, IdentifiedVmm, force, scanner,
};

/// The time that a forced end waits for the VMM to power its VM off, before it ends the process.
const FORCED_POWER_OFF_TIMEOUT: Duration = Duration::from_millis(700);
/// The time that a forced deletion waits for its turn to make the VMM forget the VM.
const FORCED_TURN_TIMEOUT: Duration = Duration::from_millis(500);

/// The VMMs of one hypervisor that another program started.
#[derive(Debug)]
pub(crate) struct AttachedBackend<H> {
    pub(super) kind: Arc<H>,
    pub(super) sockets: Vec<Arc<AttachedSocket>>,
    managed: Arc<dyn ManagedSibling>,
    interval: Duration,
    watcher: FileWatcher,
}

/// The backend that starts processes of the same hypervisor. Its rules about configurations hold
/// for an attached VMM, too.
pub(crate) trait ManagedSibling: Backend + std::fmt::Debug {}

impl<B: Backend + std::fmt::Debug> ManagedSibling for B {}

impl<H: AttachedHypervisor> AttachedBackend<H> {
    /// Returns the backend of the VMMs behind `sockets`. Each socket without a running VM is
    /// examined every `interval`. The rules of `managed` about configurations hold here, too.
    pub(crate) fn new(
        kind: H,
        sockets: impl IntoIterator<Item = PathBuf>,
        managed: impl ManagedSibling,
        interval: Duration,
    ) -> Self {
        let sockets = sockets.into_iter().map(|socket| Arc::new(AttachedSocket::new(socket))).collect();
        Self {
            kind: Arc::new(kind),
            sockets,
            managed: Arc::new(managed),
            interval,
            watcher: FileWatcher::default(),
        }
    }

    fn socket(&self, kind: &VmKind) -> Result<&Arc<AttachedSocket>, BackendError> {
        socket::find(&self.sockets, kind).ok_or_else(|| {
            let message = format!("{kind} is not among the sockets that {} names", self.kind.setting());
            BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
        })
    }

    fn is_ours(&self, holds: &AttachedVmFacts, uid: VmUid, spec: &VmSpec, dir: &Path) -> bool {
        self.kind.equals_request(holds, uid, spec, console::file(dir, spec).as_deref())
    }

    async fn start(
        &self,
        socket: &Arc<AttachedSocket>,
        request: &LaunchRequest,
    ) -> Result<LaunchedVmm, BackendError> {
        // The turn is held for the whole start. A scan in between would find a VM that no record
        // names yet, and would import it.
        let mut memory = socket.turn.lock().await;
        let met = self.identify(socket).await.map_err(|error| self.unavailable(socket, &error))?;
        let make = self.may_start(socket, &met, request)?;
        // For a VM that another program created, the VMM itself reports the file of its console.
        let anew = make || self.kind.names_console_at_start() || !console::has_begun(&request.dir);
        let console = if make || !request.imported { begin_console(request, anew).await? } else { None };
        // The start is recorded before the first change to the VMM, because the sweep after a
        // failed or dropped start finds its work by this record.
        memory.started = Some((request.uid, met.process.identity().clone()));
        point(FaultPoint::LaunchConnected);
        self.kind.start(&met, request, console.as_deref(), make).await?;
        let run = new_run(socket, &met, now_ms());
        Ok(self.kind.attend(met, self.parts(socket, run, GuestPhase::Running, &request.dir)))
    }

    /// Returns the parts of a handle other than the connection to the VMM.
    fn parts(
        &self,
        socket: &Arc<AttachedSocket>,
        run: RunRecord,
        guest: GuestPhase,
        dir: &Path,
    ) -> AttachedVmmParts {
        let console = ConsoleCopy::start(dir, &self.watcher);
        AttachedVmmParts { run, guest, dir: Some(dir.to_path_buf()), held: socket.lease(), console }
    }

    /// Returns true if a new VM must be created, and false if the VM that the VMM holds must be
    /// started. Returns an error if the VMM holds another VM.
    fn may_start(
        &self,
        socket: &Arc<AttachedSocket>,
        met: &IdentifiedVmm<H::Client>,
        request: &LaunchRequest,
    ) -> Result<bool, BackendError> {
        let refused = |kind, message| Err(BackendError::new(kind, Effect::NotApplied, message));
        match &met.holds {
            Some(holds) if holds.guest.is_live() => refused(
                BackendErrorKind::Rejected,
                format!("another program runs a VM in the VMM at {}: end that one first", socket.endpoint()),
            ),
            Some(holds)
                if request.imported || self.is_ours(holds, request.uid, &request.spec, &request.dir) =>
            {
                Ok(false)
            }
            Some(_) => refused(
                BackendErrorKind::Rejected,
                format!(
                    "the VMM at {} holds a VM that another program made, or a part of one, and that is not this VM: take it away, \
                     or end that VMM and start another there ({})",
                    socket.endpoint(),
                    self.kind.how_to_start(&socket.path)
                ),
            ),
            None => match &request.incomplete {
                None => Ok(true),
                Some(why) => refused(
                    BackendErrorKind::Rejected,
                    format!(
                        "the VM's VMM has gone, and the configuration that it reported does not suffice to make the VM again in the VMM at {} ({why}): delete this VM, and create one with the full configuration",
                        socket.endpoint()
                    ),
                ),
            },
        }
    }

    pub(super) async fn identify(
        &self,
        socket: &Arc<AttachedSocket>,
    ) -> Result<IdentifiedVmm<H::Client>, EndpointError> {
        scanner::identify(&*self.kind, socket).await.0
    }

    fn unavailable(&self, socket: &Arc<AttachedSocket>, error: &EndpointError) -> BackendError {
        let message = socket.failure(&*self.kind, error);
        let kind = match error {
            EndpointError::Nobody(_) | EndpointError::Failed(_) => BackendErrorKind::Unreachable,
            EndpointError::Refused(_) => BackendErrorKind::Host,
        };
        BackendError::new(kind, Effect::NotApplied, message)
    }

    /// Adopts a run whose process is on record.
    async fn adopt_run(
        &self,
        socket: &Arc<AttachedSocket>,
        run: RunRecord,
        request: &AdoptRequest,
    ) -> Adoption {
        // First the process on record: if it has ended, the run has ended, whoever listens on the
        // socket now. If it lives, the socket must lead to this process and to no other, because
        // another VMM may have taken the socket over. A process that lives and does not answer
        // keeps its VM, so the VM becomes unreachable and gets a handle that can still be ended by
        // force.
        let process = match adopt(&run.process) {
            Lookup::Alive(process) => process,
            Lookup::Gone => return gone("the VMM ended while no daemon watched; the cause is not known"),
            Lookup::Unprovable(message) => return unreachable(Reason::IdentityUnproven, message, None),
        };
        let error = match self.identify(socket).await {
            Ok(met) if met.process.identity() == process.identity() => {
                return self.adopt_identified(socket, run, request, met);
            }
            Ok(met) => {
                let message = format!(
                    "process {} listens on {} now, and the VM's own VMM ({}) lives on without a socket",
                    met.process.pid(),
                    socket.endpoint(),
                    process.pid()
                );
                return unreachable(Reason::SocketTaken, message, None);
            }
            Err(error) => error,
        };
        if process.has_ended() {
            return gone("the VMM has just ended");
        }
        let message = socket.failure(&*self.kind, &error);
        let met = self.kind.unanswering(&socket.path, &process);
        let parts = self.parts(socket, run, GuestPhase::Running, &request.dir);
        unreachable(Reason::VmmSilent, message, Some(self.kind.attend(met, parts)))
    }

    fn adopt_identified(
        &self,
        socket: &Arc<AttachedSocket>,
        mut run: RunRecord,
        request: &AdoptRequest,
        met: IdentifiedVmm<H::Client>,
    ) -> Adoption {
        let guest = match met.holds.as_ref().map(|holds| holds.guest) {
            Some(GuestPhase::Running) => GuestState::Running,
            Some(GuestPhase::Paused) => GuestState::Paused,
            Some(GuestPhase::AtRest) | None => {
                let message = "another client of the VMM ended the VM, and the VMM runs on".to_owned();
                return Adoption::Gone { exit: Exit { cause: ExitCause::Requested, message } };
            }
        };
        run.version.clone_from(&met.version);
        let seen = if guest == GuestState::Paused { GuestPhase::Paused } else { GuestPhase::Running };
        let parts = self.parts(socket, run, seen, &request.dir);
        Adoption::Alive { launched: self.kind.attend(met, parts), guest }
    }

    /// Adopts a run whose start was interrupted before its process was on record.
    async fn adopt_start(&self, socket: &Arc<AttachedSocket>, request: &AdoptRequest) -> Adoption {
        let met = match self.identify(socket).await {
            Ok(met) => met,
            Err(EndpointError::Nobody(_)) => return gone("no VMM listens at the VM's place"),
            Err(error) => {
                let message = socket.failure(&*self.kind, &error);
                return unreachable(Reason::VmmSilent, message, None);
            }
        };
        let ours = |holds: &AttachedVmFacts| {
            holds.guest == GuestPhase::Running
                && (request.imported || self.is_ours(holds, request.uid, &request.spec, &request.dir))
        };
        if met.holds.as_ref().is_some_and(ours) {
            let run = new_run(socket, &met, now_ms());
            return self.adopt_identified(socket, run, request, met);
        }
        gone("no process at the VM's place is this VM")
    }

    /// Undoes an interrupted start: powers off and forgets the VM that this backend created for the
    /// request.
    async fn clear(
        &self,
        socket: &Arc<AttachedSocket>,
        memory: &mut ScanMemory,
        request: &SweepRequest,
    ) -> Result<(), BackendError> {
        let Some((uid, process)) = memory.started.clone() else { return Ok(()) };
        // Only the VM of this very start is undone. Another start in between owns the VMM now, and
        // a VMM that has ended holds nothing.
        if uid != request.uid || matches!(adopt(&process), Lookup::Gone) {
            return Ok(());
        }
        let met = self.identify(socket).await.map_err(|error| self.unavailable(socket, &error))?;
        if *met.process.identity() != process {
            return Ok(());
        }
        let runs = met.holds.as_ref().is_some_and(|holds| holds.guest.is_live());
        if runs && !self.kind.power_off(&met.client).await? {
            let message = format!(
                "the start could not be undone: its guest runs on in the VMM at {}, which another program started; use force to end the VM",
                socket.endpoint()
            );
            return Err(BackendError::new(BackendErrorKind::StillRuns, Effect::Unknown, message));
        }
        if !request.imported && met.holds.is_some() {
            self.kind.forget(&met.client, request).await?;
        }
        memory.started = None;
        Ok(())
    }

    /// Ends the run on record by force: by the VMM's API, or else by its process.
    async fn end(&self, socket: &Arc<AttachedSocket>, request: &SweepRequest) -> Result<(), BackendError> {
        let Some(run) = &request.run else { return Ok(()) };
        let process = match adopt(&run.process) {
            Lookup::Alive(process) => process,
            Lookup::Gone => return Ok(()),
            Lookup::Unprovable(why) => {
                let message = format!("{why}; the process is left alone, end it by hand");
                return Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message));
            }
        };
        if self.power_off(socket, &process).await {
            return Ok(());
        }
        force::kill(&process, &socket.path, self.kind.program(), KillManner::AtOnce).await.map(drop)
    }

    async fn power_off(&self, socket: &Arc<AttachedSocket>, process: &Process) -> bool {
        let asked = async {
            let visit = endpoint::visit(&socket.path).await.ok()?;
            if visit.process.identity() != process.identity() {
                return None;
            }
            let met = self.kind.unanswering(&socket.path, process);
            self.kind.power_off(&met.client).await.ok()
        };
        let asked = tokio::time::timeout(FORCED_POWER_OFF_TIMEOUT, asked).await;
        matches!(asked, Ok(Some(true))) || process.has_ended()
    }

    /// Makes the VMM forget a VM that is deleted, if the VMM holds that VM.
    async fn forget(
        &self,
        socket: &Arc<AttachedSocket>,
        memory: &mut ScanMemory,
        request: &SweepRequest,
    ) -> Result<(), BackendError> {
        let Ok(met) = self.identify(socket).await else { return Ok(()) };
        let process = met.process.identity().clone();
        let Some(holds) = &met.holds else { return Ok(()) };
        let is_it = request.imported
            || request.spec.as_ref().is_some_and(|spec| self.is_ours(holds, request.uid, spec, &request.dir));
        if !is_it {
            // The VMM holds another VM by now, which the next scan must report.
            memory.reported = None;
            return Ok(());
        }
        if holds.guest.is_live() {
            let message = format!(
                "the VM runs again: another program has started it in the VMM at {}; shut the VM down first, or use force",
                socket.endpoint()
            );
            return Err(BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message));
        }
        if !self.kind.forget(&met.client, request).await? {
            memory.reported = Some(process);
        }
        Ok(())
    }
}

/// Creates the file that the VMM writes the console to. Returns `None` if the VM has no console.
async fn begin_console(request: &LaunchRequest, anew: bool) -> Result<Option<PathBuf>, BackendError> {
    let Some(to) = request.console.clone() else { return Ok(None) };
    let dir = request.dir.clone();
    let error = match tokio::task::spawn_blocking(move || console::begin(&dir, &to, anew)).await {
        Ok(Ok(path)) => return Ok(Some(path)),
        Ok(Err(error)) => error,
        Err(error) => std::io::Error::other(error),
    };
    let message = format!("the console cannot be prepared: {error}; look at the room and rights of its file");
    Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error))
}

/// Returns the record of a run that began at `started_ms`, as far as is known. The caller fills in
/// the claims.
pub(super) fn new_run<C>(socket: &Arc<AttachedSocket>, met: &IdentifiedVmm<C>, started_ms: i64) -> RunRecord {
    RunRecord {
        process: met.process.identity().clone(),
        socket: socket.path.clone(),
        version: met.version.clone(),
        accelerator: met.accelerator.clone(),
        machine: met.machine.clone(),
        started_ms,
        claims: Vec::new(),
        taps: Vec::new(),
    }
}

fn gone(message: &str) -> Adoption {
    Adoption::Gone { exit: Exit { cause: ExitCause::Unknown, message: message.to_owned() } }
}

fn unreachable(reason: Reason, message: String, launched: Option<LaunchedVmm>) -> Adoption {
    Adoption::Unreachable { reason, message, launched }
}

#[async_trait]
impl<H: AttachedHypervisor> Backend for AttachedBackend<H> {
    fn capabilities(&self) -> &Capabilities {
        self.kind.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        let mut report = self.managed.check(spec);
        self.kind.check(spec, &mut report);
        report
    }

    fn kernel_args(&self, spec: &VmSpec) -> String {
        self.managed.kernel_args(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        // The permit is awaited before the VMM is contacted, because the process already runs and
        // belongs to another program. There is no spare VMM whose preparation could overlap.
        request.permit.wait().await?;
        self.start(self.socket(&request.kind)?, &request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let socket = self.socket(&request.kind)?;
        let _turn = socket.turn.lock().await;
        Ok(match request.run.clone() {
            Some(run) => self.adopt_run(socket, run, &request).await,
            None => self.adopt_start(socket, &request).await,
        })
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        let socket = self.socket(&request.kind)?;
        // A forced end does not wait for its turn, because the operation that has the turn may be
        // stuck with the VMM.
        if request.purpose.is_forced() {
            self.end(socket, &request).await?;
        }
        let turn = match request.purpose {
            SweepPurpose::End => return Ok(()),
            SweepPurpose::ForceDelete => {
                tokio::time::timeout(FORCED_TURN_TIMEOUT, socket.turn.lock()).await.ok()
            }
            SweepPurpose::Clear | SweepPurpose::Delete => Some(socket.turn.lock().await),
        };
        let Some(mut memory) = turn else { return Ok(()) };
        match request.purpose {
            SweepPurpose::Clear => self.clear(socket, &mut memory, &request).await,
            SweepPurpose::End | SweepPurpose::Delete | SweepPurpose::ForceDelete => {
                self.forget(socket, &mut memory, &request).await
            }
        }
    }

    async fn ping(&self) -> BackendHealth {
        let views = self.sockets.iter().map(async |socket| match socket.health() {
            Some(view) => view,
            None => {
                let _turn = socket.turn.lock().await;
                scanner::identify(&*self.kind, socket).await.1
            }
        });
        let mut serving = None;
        let mut problems = Vec::new();
        for view in futures::future::join_all(views).await {
            match view {
                SocketHealth::Serves(version) => serving = serving.or(Some(version)),
                SocketHealth::Fails(why) => problems.push(why),
            }
        }
        match serving {
            Some(version) => BackendHealth { problems, ..BackendHealth::from(Ok(version)) },
            None => BackendHealth::from(Err(problems.join("; "))),
        }
    }

    fn places(&self) -> Places {
        // A new VM is placed where a VMM already waits, if there is one.
        let mut sockets: Vec<_> = self.sockets.iter().collect();
        sockets.sort_by_key(|socket| !matches!(socket.health(), Some(SocketHealth::Serves(_))));
        self.kind.places(sockets.into_iter().map(|socket| socket.kind()).collect())
    }

    fn discovery(&self) -> Option<&dyn Discoverer> {
        Some(self)
    }
}

#[async_trait]
impl<H: AttachedHypervisor> Discoverer for AttachedBackend<H> {
    async fn discover(&self) -> Discovery {
        scanner::begin(&self.kind, &self.sockets, self.interval).await
    }
}
