//! Starting a QEMU, and taking one into hand that runs already.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LaunchRequest, Launched};
use vmm_core::gate::Gate;
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Command, Guarded, Process};
use vmm_host::run_dir;

use super::convert::{self, Accelerator, Inputs, Machine, QMP_SOCKET, reboot_action};
use super::images;
use super::link::Link;
use super::qmp::{QemuVersion, Qmp, QmpEvent};
use super::vmm::{Guest, KILLING, QemuVmm};
use super::watch::{Owner, Watch};
use crate::launch::{died_early, pass, start_vmm, wait_for_socket};

/// The log's name in the run folder.
const LOG: &str = "qemu.log";
/// How long a start may take in all.
const STARTING: Duration = Duration::from_secs(20);
/// How long QEMU may take until it listens, and how long until it greets.
const LISTENING: Duration = Duration::from_secs(15);
/// Events of QEMU that wait to be read.
const QMP_EVENTS: usize = 1024;
/// Events that wait for the VM's owner.
const EVENTS: usize = 256;

/// Starts QEMU for `request` and lets its guest run. Nothing runs after an error.
pub(super) async fn launch(
    program: PathBuf,
    accelerator: Accelerator,
    request: LaunchRequest,
) -> Result<Launched, BackendError> {
    let machine = Machine::of(&request.spec).ok_or_else(|| rejected("there is no such machine"))?;
    let socket = request.dir.join(QMP_SOCKET);
    for socket in [&socket, &request.dir.join(convert::CONSOLE_SOCKET)] {
        run_dir::socket_path_fits(socket).map_err(host_error)?;
    }
    let log = request.dir.join(LOG);
    let guarded = start_vmm({
        let (request, log) = (request.clone(), log.clone());
        move || {
            let args = arguments(&request, machine, accelerator)?;
            clear(&request.dir)?;
            Ok(Command::new(program, args, log))
        }
    })
    .await?;
    let (qmp_sender, qmp_events) = mpsc::channel(QMP_EVENTS);
    let connecting = connect(&guarded, &socket, &log, qmp_sender, &request.gate);
    let (link, version) = match tokio::time::timeout(STARTING, connecting).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => return Err(end(guarded, error).await),
        Err(_) => {
            let message = format!("QEMU did not start within {STARTING:?}; look at {}", log.display());
            let error = BackendError::new(BackendErrorKind::Timeout, Effect::NotApplied, message);
            return Err(end(guarded, error).await);
        }
    };
    let process = guarded.keep();
    let run = RunRecord {
        process: process.identity().clone(),
        socket,
        version: version.to_string(),
        accelerator: accelerator.as_str().to_owned(),
        machine: machine.as_str().to_owned(),
        started_ms: now_ms(),
        claims: Vec::new(),
    };
    let parts = Parts { process, link, qmp_events, taps: request.taps, log };
    Ok(parts.assemble(request.uid, run, &request.spec, true))
}

/// What a handle and its watch are made of.
pub(super) struct Parts {
    process: Process,
    pub(super) link: Arc<Link>,
    qmp_events: mpsc::Receiver<QmpEvent>,
    taps: Vec<String>,
    log: PathBuf,
}

impl Parts {
    /// For a QEMU that runs already, not connected yet.
    pub(super) fn of_running(process: Process, dir: &Path, taps: Vec<String>) -> Self {
        let (qmp_sender, qmp_events) = mpsc::channel(QMP_EVENTS);
        let link = Arc::new(Link::new(dir.join(QMP_SOCKET), process.pid(), qmp_sender));
        Self { process, link, qmp_events, taps, log: dir.join(LOG) }
    }

    /// Puts them together and begins to watch.
    pub(super) fn assemble(self, uid: VmUid, run: RunRecord, spec: &VmSpec, runs: bool) -> Launched {
        let (sender, events) = mpsc::channel(EVENTS);
        let guest = Arc::new(Guest::new(runs));
        let reboot = reboot_action(spec);
        let (wanted, handle) = oneshot::channel();
        let watch = Watch {
            process: self.process.clone(),
            link: Arc::clone(&self.link),
            guest: Arc::clone(&guest),
            qmp_events: self.qmp_events,
            events: sender,
            reboot,
            log: self.log,
            shutdown: None,
            handle,
            owner: Owner::Us,
        };
        let span = tracing::info_span!("qemu", %uid, pid = self.process.pid());
        tokio::spawn(watch.run().instrument(span));
        let vmm = QemuVmm {
            run,
            process: self.process,
            link: self.link,
            guest,
            reboot,
            taps: self.taps,
            _wanted: wanted,
        };
        Launched { vmm: Arc::new(vmm), events }
    }
}

/// Looks at the VM's images, and writes the command line. Blocks.
fn arguments(
    request: &LaunchRequest,
    machine: Machine,
    accelerator: Accelerator,
) -> Result<Vec<std::ffi::OsString>, BackendError> {
    let images = images::inspect(&request.spec).map_err(host_error)?;
    let inputs = Inputs {
        uid: request.uid,
        vm_id: &request.vm_id,
        spec: &request.spec,
        machine,
        accelerator,
        dir: &request.dir,
        console: request.console.as_deref(),
        taps: &request.taps,
        images: &images,
    };
    convert::arguments(&inputs).map_err(|error| rejected(&error.to_string()))
}

/// Removes what an earlier run in this folder left: its sockets, and its log, whose last words would be taken for this run's.
/// Blocks.
fn clear(dir: &Path) -> Result<(), BackendError> {
    let log = || match std::fs::remove_file(dir.join(LOG)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    };
    run_dir::remove_sockets(dir)
        .and_then(|()| log())
        .map_err(|error| host_error(format!("the run folder cannot be cleared: {error}")))
}

/// Connects to a QEMU that was just started, and lets its guest run.
async fn connect(
    process: &Process,
    socket: &Path,
    log: &Path,
    events: mpsc::Sender<QmpEvent>,
    gate: &Gate,
) -> Result<(Arc<Link>, QemuVersion), BackendError> {
    let link = Arc::new(Link::new(socket.to_path_buf(), process.pid(), events.clone()));
    let connected = async {
        let stream = wait_for_socket(process, socket, LISTENING).await?;
        let qmp = link.set(Qmp::over(stream, LISTENING, events).await?)?;
        point(FaultPoint::LaunchConfigured);
        pass(gate, process).await?;
        qmp.cont().await?;
        point(FaultPoint::LaunchStarted);
        Ok::<_, BackendError>(qmp.version())
    };
    match connected.await {
        Ok(version) => Ok((link, version)),
        Err(error) if ended(&error) => Err(died_early(process, log, "while it started").await),
        Err(error) => Err(error),
    }
}

/// Says whether `error` is what the end of a process looks like from outside.
fn ended(error: &BackendError) -> bool {
    matches!(error.kind, BackendErrorKind::Gone | BackendErrorKind::Unreachable)
}

/// Ends a QEMU that did not start well.
async fn end(guarded: Guarded, mut error: BackendError) -> BackendError {
    match guarded.kill_and_wait(KILLING).await {
        Ok(_) => error.effect = Effect::NotApplied,
        Err(stuck) => {
            error.effect = Effect::Unknown;
            error.message = format!("{}; and {stuck}", error.message);
        }
    }
    error
}

fn rejected(message: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message)
}

fn host_error(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
}

/// Now, in Unix milliseconds.
pub(super) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
