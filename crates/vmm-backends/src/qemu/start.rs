//! Starts a QEMU, and assembles the handle of one that runs.
//!
//! ```text
//!   launch ─┬─ a spare waits ──► its VM  ───┬──► connect ─► permit ─► cont ─► LaunchedVmm
//!           │     cannot, or does not read   │
//!           │             ▼ ended           │
//!           └─────────► start ──────────────┘
//! ```

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LaunchRequest, LaunchedVmm};
use vmm_core::id::VmUid;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::clock::now_ms;
use vmm_host::console_input;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Command, Process, ProcessGuard};
use vmm_host::run_dir;

use super::convert::{
    self, Accelerator, ImageKind, QMP_SOCKET, QemuInputs, QemuMachine, SpareQemuConfig, reboot_action,
};
use super::images;
use super::link::QemuLink;
use super::monitor::{QemuMonitor, QemuOwner};
use super::qmp::{Qmp, QmpEvent};
use super::spare::SpareQemu;
use super::vmm::QemuVmm;
use crate::console_input::{CONSOLE_INPUT, FifoInput};
use crate::guest_orders::GuestOrders;
use crate::launch::{early_exit_error, start_vmm, wait_for_permit, wait_for_socket};
use crate::program::{InstalledProgram, Version};
use crate::throttle::Throttle;
use crate::timeouts::KILL_TIMEOUT;

/// The log's name in the run folder.
pub(super) const LOG: &str = "qemu.log";
/// The time limit of a whole start.
const QEMU_START_TIMEOUT: Duration = Duration::from_secs(20);
/// The time limit until QEMU listens, and the time limit until its greeting.
const QEMU_LISTEN_TIMEOUT: Duration = Duration::from_secs(15);
/// The most events of QEMU that wait to be read.
const QMP_EVENTS: usize = 1024;
/// The most events that wait for the VM's owner.
const EVENTS: usize = 256;

/// Starts QEMU for `request`, or uses `spare`, and starts the guest. No process runs after an
/// error.
pub(super) async fn launch(
    program: InstalledProgram,
    accelerator: Accelerator,
    spare: Option<SpareQemu>,
    request: LaunchRequest,
) -> Result<LaunchedVmm, BackendError> {
    let machine = QemuMachine::of(&request.spec).ok_or_else(|| rejected("there is no such machine"))?;
    let socket = request.dir.join(QMP_SOCKET);
    run_dir::socket_path_fits(&socket).map_err(host_error)?;
    let log = request.dir.join(LOG);
    let start = Arc::new(QemuLaunch { request, machine, accelerator, socket, log });
    if let Some(spare) = spare
        && let Some(outcome) = start.with_spare(spare, &program).await
    {
        return outcome;
    }
    start.with_new_process(program.path().to_path_buf()).await
}

/// One launch.
struct QemuLaunch {
    request: LaunchRequest,
    machine: QemuMachine,
    accelerator: Accelerator,
    socket: PathBuf,
    log: PathBuf,
}

/// A QEMU whose guest runs.
struct ConnectedQemu {
    link: Arc<QemuLink>,
    version: Version,
    events: mpsc::Receiver<QmpEvent>,
}

impl QemuLaunch {
    async fn with_new_process(self: Arc<Self>, program: PathBuf) -> Result<LaunchedVmm, BackendError> {
        let start = Arc::clone(&self);
        let guarded = start_vmm(move || {
            let args = start.arguments()?;
            clear(&start.request.dir)?;
            Ok(Command::new(program, args, &start.log))
        })
        .await?;
        match self.start_guest(&guarded).await {
            Ok(connected) => Ok(self.launched(guarded, connected)),
            Err(error) => Err(end(guarded, error).await),
        }
    }

    /// Launches with the spare. Returns `None` if the spare cannot serve the VM or does not read
    /// it. The spare has received nothing then and has ended, so an ordinary start may follow.
    async fn with_spare(
        self: &Arc<Self>,
        spare: SpareQemu,
        program: &InstalledProgram,
    ) -> Option<Result<LaunchedVmm, BackendError>> {
        if let Some(why) = spare.unfit(program) {
            spare.end(why).await;
            return None;
        }
        // Every reason against the spare is found before the first byte is written to it, because a
        // spare that has read a part of its input cannot be used for an ordinary start any more.
        let reported = match Arc::clone(self).spare_config().await {
            Ok(reported) if spare.was_started_for(&reported) => reported,
            Ok(_) => {
                spare.end("the VM has another CPU model than the usual one, or no console").await;
                return None;
            }
            Err(why) => {
                spare.end(why).await;
                return None;
            }
        };
        let informed = spare.configure(&reported.file).await?;
        // The write succeeded as soon as the pipe had room, so a QEMU that hangs may still have
        // read nothing. In that case the guest cannot have started, and an ordinary start may
        // follow. Once QEMU has read a byte, the outcome of the connection decides.
        let outcome = tokio::select! {
            biased;
            outcome = self.start_guest(&informed.guarded) => outcome,
            unheard = informed.wait_while_unread() => Err(unheard),
        };
        match outcome {
            Ok(connected) => Some(Ok(self.launched(informed.guarded, connected))),
            // Nothing was read, so no tap or disk is in use, and the launch begins again with a new
            // process.
            Err(error) if informed.is_unconfigured() => {
                informed.end(&error).await;
                None
            }
            Err(error) => Some(Err(end(informed.guarded, error).await)),
        }
    }

    /// Returns QEMU's arguments. Blocks, because it reads the headers of the images.
    fn arguments(&self) -> Result<Vec<OsString>, BackendError> {
        let images = images::inspect(&self.request.spec).map_err(host_error)?;
        convert::arguments(&self.inputs(&images)).map_err(|error| rejected(&error.to_string()))
    }

    /// Returns the VM in the form for a spare, or the reason why there is none.
    async fn spare_config(self: Arc<Self>) -> Result<SpareQemuConfig, String> {
        if self.request.spec.disks.is_empty() {
            return convert::spare_config(&self.inputs(&[])).map_err(|error| error.to_string());
        }
        let with_images = move || {
            let images = images::inspect(&self.request.spec)?;
            convert::spare_config(&self.inputs(&images)).map_err(|error| error.to_string())
        };
        tokio::task::spawn_blocking(with_images).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    fn inputs<'a>(&'a self, images: &'a [ImageKind]) -> QemuInputs<'a> {
        QemuInputs {
            uid: self.request.uid,
            vm_id: &self.request.vm_id,
            spec: &self.request.spec,
            machine: self.machine,
            accelerator: self.accelerator,
            dir: &self.request.dir,
            console: self.request.console.as_deref(),
            taps: &self.request.taps,
            images,
        }
    }

    /// Connects to a QEMU that has its VM, and starts the guest.
    async fn start_guest(&self, process: &Process) -> Result<ConnectedQemu, BackendError> {
        let (sender, events) = mpsc::channel(QMP_EVENTS);
        let connecting = connect(process, &self.socket, &self.log, sender, &self.request.permit);
        match tokio::time::timeout(QEMU_START_TIMEOUT, connecting).await {
            Ok(connected) => connected.map(|(link, version)| ConnectedQemu { link, version, events }),
            Err(_) => {
                let message = format!(
                    "QEMU did not start within {QEMU_START_TIMEOUT:?}; look at {}",
                    self.log.display()
                );
                Err(BackendError::new(BackendErrorKind::Timeout, Effect::NotApplied, message))
            }
        }
    }

    fn launched(&self, guarded: ProcessGuard, connected: ConnectedQemu) -> LaunchedVmm {
        let process = guarded.keep();
        let run = RunRecord {
            process: process.identity().clone(),
            socket: self.socket.clone(),
            version: connected.version.to_string(),
            accelerator: self.accelerator.as_str().to_owned(),
            machine: self.machine.as_str().to_owned(),
            started_ms: now_ms(),
            claims: Vec::new(),
            taps: Vec::new(),
        };
        let parts = QemuVmmParts {
            process,
            link: connected.link,
            qmp_events: connected.events,
            taps: self.request.taps.clone(),
            log: self.log.clone(),
        };
        parts.assemble(self.request.uid, run, &self.request.spec, true)
    }
}

/// The parts of a handle and its monitor.
pub(super) struct QemuVmmParts {
    process: Process,
    pub(super) link: Arc<QemuLink>,
    qmp_events: mpsc::Receiver<QmpEvent>,
    taps: Vec<String>,
    log: PathBuf,
}

impl QemuVmmParts {
    /// Returns the parts for a running QEMU, without a connection.
    pub(super) fn of_running(process: Process, dir: &Path, taps: Vec<String>) -> Self {
        let (qmp_sender, qmp_events) = mpsc::channel(QMP_EVENTS);
        let link = Arc::new(QemuLink::new(dir.join(QMP_SOCKET), process.pid(), qmp_sender));
        Self { process, link, qmp_events, taps, log: dir.join(LOG) }
    }

    /// Returns the handle, and starts the task that watches QEMU.
    pub(super) fn assemble(self, uid: VmUid, run: RunRecord, spec: &VmSpec, runs: bool) -> LaunchedVmm {
        let (sender, events) = mpsc::channel(EVENTS);
        let guest = Arc::new(GuestOrders::new(runs));
        let reboot = reboot_action(spec);
        let (wanted, handle) = oneshot::channel();
        let monitor = QemuMonitor {
            process: self.process.clone(),
            link: Arc::clone(&self.link),
            guest: Arc::clone(&guest),
            qmp_events: self.qmp_events,
            events: sender,
            reboot,
            log: self.log,
            shutdown: None,
            handle,
            owner: QemuOwner::Us,
            throttle: Throttle::new(),
            compare_at: None,
        };
        let span = tracing::info_span!(parent: None, "qemu", %uid, pid = self.process.pid());
        tokio::spawn(monitor.run().instrument(span));
        let input = FifoInput::new(run.socket.parent().unwrap_or(Path::new("")));
        let vmm = QemuVmm {
            run,
            process: self.process,
            link: self.link,
            guest,
            reboot,
            taps: self.taps,
            input,
            _wanted: wanted,
        };
        LaunchedVmm { vmm: Arc::new(vmm), events }
    }
}

/// Removes the sockets and the log that an earlier run left in this folder, so that errors do not
/// quote an old log, and makes the files of the console. Blocks.
pub(super) fn clear(dir: &Path) -> Result<(), BackendError> {
    let log = || match std::fs::remove_file(dir.join(LOG)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    };
    let output = || match std::os::unix::fs::symlink("/dev/null", dir.join(convert::CONSOLE_OUTPUT)) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => Ok(()),
    };
    run_dir::remove_sockets(dir)
        .and_then(|()| log())
        .and_then(|()| console_input::make_fifo(&dir.join(CONSOLE_INPUT)))
        .and_then(|()| output())
        .map_err(|error| host_error(format!("the run folder cannot be cleared: {error}")).caused_by(error))
}

/// Connects to a QEMU that was just started, and starts the guest.
async fn connect(
    process: &Process,
    socket: &Path,
    log: &Path,
    events: mpsc::Sender<QmpEvent>,
    permit: &RunPermit,
) -> Result<(Arc<QemuLink>, Version), BackendError> {
    let link = Arc::new(QemuLink::new(socket.to_path_buf(), process.pid(), events.clone()));
    let connected = async {
        let stream = wait_for_socket(process, socket, QEMU_LISTEN_TIMEOUT).await?;
        let qmp = link.set(Qmp::over(stream, QEMU_LISTEN_TIMEOUT, events).await?)?;
        point(FaultPoint::LaunchConfigured);
        // QEMU is ready and its guest is stopped. The guest may run only after the VM's record is
        // durable, which grants the permit.
        wait_for_permit(permit, process).await?;
        qmp.cont().await?;
        point(FaultPoint::LaunchStarted);
        Ok::<_, BackendError>(qmp.version())
    };
    match connected.await {
        Ok(version) => Ok((link, version)),
        Err(error) if is_process_end(&error) => Err(early_exit_error(process, log, "while it started").await),
        Err(error) => Err(error),
    }
}

/// Returns true if `error` is the error of a call to a process that has ended.
fn is_process_end(error: &BackendError) -> bool {
    matches!(error.kind, BackendErrorKind::Gone | BackendErrorKind::Unreachable)
}

/// Kills a QEMU whose start failed, and returns the error of the start.
async fn end(guarded: ProcessGuard, mut error: BackendError) -> BackendError {
    match guarded.kill_and_wait(KILL_TIMEOUT).await {
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

pub(super) fn host_error(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
}
