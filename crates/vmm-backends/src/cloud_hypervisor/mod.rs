//! Cloud Hypervisor: one process per run, driven by REST on a unix socket.
//!
//! ```text
//!                       ┌──────────────────┐ stdout ──► the console's file, appended to
//!   api.sock, .lock ◄───│ cloud-hypervisor │ stderr ──► vmm.log
//!                       └──────────────────┘ --event-monitor ──► events
//! ```
//!
//! **Console.** Of the ways in which version 53 offers the serial port, only `Tty` keeps everything by itself: it writes to the
//! VMM's own stdout, which is the console's file, opened for appending. So the first message of the boot is there, resets in
//! place and later runs are appended, and no daemon is needed for a byte to be kept. `File` truncates at every boot; `Pty` and
//! `Socket` keep 1 MiB while nobody reads, and lose it where the VMM ends meanwhile. `Tty` takes no input.
//!
//! **Events** go to a file for the same reason.

pub(crate) mod attached;
mod check;
pub(crate) mod client;
pub mod convert;
mod describe;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod vmm;
pub(crate) mod watch;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, KernelFormat, LaunchRequest,
    Launched, SpareRequest, SweepRequest,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::report::Report;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::kvm::kvm_usable;
use vmm_host::process::{Command, Process};

use self::client::Client;
use self::convert::Config;
use self::events::{EVENTS, EventFile};
use self::vmm::{Parts, attend, explain_past};
use self::watch::Watcher;
use crate::launch;
use crate::program::{Kind, Program, Version};
use crate::rest::adopt::{LOG, SOCKET, Trace, failed, has_ended, look, new_run};
use crate::rest::options::check_taps;
use crate::rest::spare::Fresh;
use crate::rest::start::start;
use crate::search::Unproven;
use crate::spares::Spares;

/// The backend's name.
pub const NAME: &str = "cloudhypervisor";
/// The oldest Cloud Hypervisor that lets images' formats be stated, and forbids backing files unless they are asked for.
pub(crate) const OLDEST: Version = Version::new(51, 0, 0);
/// Its program.
const PROGRAM: Kind = Kind {
    backend: NAME,
    title: "Cloud Hypervisor",
    usual_name: "cloud-hypervisor",
    oldest: OLDEST,
    read_version: Version::find,
    remedy: "UNKEY_VMCP_CH_BINARY names another",
};

/// The Cloud Hypervisor backend.
#[derive(Debug)]
pub struct CloudHypervisor {
    program: Arc<Program>,
    capabilities: Capabilities,
    watcher: Watcher,
    spares: Spares<Fresh<Client>>,
}

impl CloudHypervisor {
    /// A backend that starts `program`: a name on the PATH, or a path.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: Arc::new(Program::new(program, PROGRAM)),
            capabilities: capabilities(),
            watcher: Watcher::default(),
            spares: Spares::default(),
        }
    }

    async fn start(&self, request: &LaunchRequest) -> Result<Launched, BackendError> {
        check_taps(&request.spec, &request.taps)?;
        let dir = request.dir.as_path();
        let waiting =
            self.spares.take_for(request, &self.program, async |client: &Client| client.version().await);
        let fresh = match waiting.await {
            Some(spare) => spare,
            None => self.begin(dir, request.console.clone()).await?,
        };
        let Fresh { guard, client, program, .. } = fresh;
        if let Err(error) = configure(guard.process(), &client, request).await {
            return Err(failed(guard, error, &dir.join(LOG)).await);
        }
        let process = guard.keep();
        let run = new_run(process.identity().clone(), dir.join(SOCKET), program.version.to_string());
        let events = EventFile::from_start(dir);
        let client = client.of_process(process.pid());
        let parts = Parts { run, process, client, events, dir, reset_ends: reset_ends(&request.spec) };
        Ok(attend(parts, &self.watcher))
    }

    /// Starts a VMM in the run folder `dir`, up to where it can be told what to run.
    async fn begin(&self, dir: &Path, console: Option<PathBuf>) -> Result<Fresh<Client>, BackendError> {
        let prepare = |program: &Path, dir: &Path| {
            EventFile::begin(dir)?;
            let arguments = convert::arguments(&dir.join(SOCKET), &dir.join(EVENTS));
            Ok(Command::new(program, arguments, dir.join(LOG)))
        };
        start(&self.program, dir, console, prepare, Client::over).await
    }

    async fn take_over(&self, process: Process, request: &AdoptRequest, mut parts: Parts<'_>) -> Adoption {
        let answer = async {
            let state = parts.client.state().await?;
            Ok::<_, BackendError>((state, parts.client.version().await?))
        };
        let answer = answer.await;
        if let Ok((_, version)) = &answer {
            parts.run.version.clone_from(version);
        }
        if has_ended(&process, &answer).await {
            return Adoption::Gone { exit: explain_past(&request.dir, reset_ends(&request.spec)).await };
        }
        let launched = attend(parts, &self.watcher);
        match answer {
            Ok((guest, _)) => Adoption::Alive { launched, guest },
            Err(error) => Adoption::Unreachable {
                reason: "vmm-silent",
                message: error.message,
                launched: Some(launched),
            },
        }
    }
}

/// From a VMM that has been told nothing to a guest that runs.
async fn configure(process: &Process, client: &Client, request: &LaunchRequest) -> Result<(), BackendError> {
    launch::pass(&request.gate, process).await?;
    client.create(&Config::of(&request.spec, &request.taps).with_panic_device(&request.spec)).await?;
    point(FaultPoint::LaunchConfigured);
    client.boot().await?;
    point(FaultPoint::LaunchStarted);
    Ok(())
}

/// Says whether a reset of the guest ends its run.
fn reset_ends(spec: &VmSpec) -> bool {
    spec.restart.mode == Some(RestartMode::Never)
}

#[async_trait]
impl Backend for CloudHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, spec: &VmSpec) -> Report {
        check::check(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<Launched, BackendError> {
        self.start(&request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let reset_ends = reset_ends(&request.spec);
        match look(&request, self.program.running_names().await).await {
            Trace::Alive(process, run) => {
                let dir = request.dir.as_path();
                let client = Client::new(&run.socket).of_process(process.pid());
                let events = EventFile::near_end(dir);
                let parts = Parts { run: *run, process: process.clone(), client, events, dir, reset_ends };
                Ok(self.take_over(process, &request, parts).await)
            }
            Trace::Gone => Ok(Adoption::Gone { exit: explain_past(&request.dir, reset_ends).await }),
            Trace::Unprovable(Unproven { reason, message }) => {
                Ok(Adoption::Unreachable { reason, message, launched: None })
            }
        }
    }

    async fn start_spare(&self, request: SpareRequest) -> Result<(), BackendError> {
        let fresh = self.begin(&request.dir, Some(request.console)).await?;
        self.spares.keep(request.uid, fresh);
        Ok(())
    }

    async fn dismiss_spare(&self, uid: VmUid) {
        self.spares.dismiss(uid).await;
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.spares.dismiss(request.uid).await;
        launch::sweep(&request.dir, &self.program.running_names().await).await
    }

    async fn ping(&self) -> BackendHealth {
        self.program.health(kvm_usable).await
    }
}

pub(crate) fn capabilities() -> Capabilities {
    let facts = [
        ("accelerator", "kvm"),
        ("console", "serial, without input"),
        ("cpu-time", "of the VMM's process"),
        ("disk-formats", "raw, qcow2"),
        ("disk-rate-limits", "yes"),
        ("guest-panic", "ends the run, as a failure"),
        ("guest-power-off", "ends the run"),
        ("guest-reset", "in place, or ends the run where restart_policy is NEVER"),
        ("guest-triple-fault", "as a reset"),
        ("network-rate-limits", "yes"),
        ("reboot", "in place"),
        ("shutdown", "ACPI power button"),
    ];
    let limits = [("max-devices", check::MAX_DEVICES as i64), ("max-vcpus", i64::from(check::MAX_VCPUS))];
    Capabilities {
        name: BackendName::new(NAME),
        endpoint_mode: "managed",
        default_restart_mode: RestartMode::GuestReboot,
        kernel_formats: &[KernelFormat::BzImage, KernelFormat::PvhElf],
        facts: facts.map(|(name, fact)| (name, fact.to_owned())).into_iter().collect(),
        limits: limits.into_iter().collect(),
    }
}
