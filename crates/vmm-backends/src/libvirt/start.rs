//! Starts a domain: defines it, starts it with stopped CPUs, finds its process, and resumes it.
//!
//! ```text
//!   by uuid ── running ─────────────────► taken over: another client has started it
//!      │ off, or none
//!   by name ── of another client ─────────► refused, naming it
//!      │ free
//!   define ─► start ─► find its QEMU ─► resume      any failure: destroyed again
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, LaunchRequest, LaunchedVmm, Vmm as _};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::Process;
use vmm_host::run_dir;
use vmm_libvirt_wire::{Call, Domain, DomainState};

use super::convert::{self, DomainInputs};
use super::domain::{DomainOwner, END_POLL_INTERVAL, QUICK_CALL_TIMEOUT, is_active, owner};
use super::link::{CallError, DomainEvents};
use super::process::{Sought, unproven};
use super::run::{DomainRunFacts, assemble};
use super::{LibvirtBackend, domain_of};
use crate::qemu::convert::Accelerator;
use crate::qemu::images;

/// The time limit of the connection to libvirt. The whole start stays below the service's limit.
const START_CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time limit of libvirt for a definition or a start. libvirt examines a QEMU again that was
/// replaced.
const START_CALL_TIMEOUT: Duration = Duration::from_secs(18);
/// The time in which libvirt must notice the end of the QEMU of the run before.
const START_NOTICE_TIMEOUT: Duration = Duration::from_secs(5);
/// The file in the run folder with the last definition.
const DEFINITION: &str = "domain.xml";
/// The folders into which QEMU's packages install qboot.
const FIRMWARE: [&str; 3] =
    ["/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom", "/usr/local/share/qemu/qboot.rom"];

/// Starts the domain of `request`. No QEMU of it runs after an error, unless the error reports one.
pub(super) async fn launch(
    backend: &LibvirtBackend,
    request: LaunchRequest,
) -> Result<LaunchedVmm, BackendError> {
    request.permit.wait().await?;
    let up = backend.link.ready(START_CONNECT_TIMEOUT).await?;
    let choice = backend.options.kvm.choose();
    if !request.imported {
        choice.log();
    }
    let facts = backend.facts(&request, up.hypervisor, choice.accelerator);
    // The subscription begins before the domain is defined or started, because a guest may end
    // within milliseconds and discovery would otherwise take its events for those of another
    // client.
    let watched = backend.link.subscribe(facts.domain);
    clear(&request.dir).await?;
    // libvirt may not have noticed the end of the last run yet, and would refuse a new start then.
    let known = wait_for_domain_end(backend, sought(&facts)).await?;
    if let Some(domain) = &known
        && !request.imported
        && owner(domain) != DomainOwner::Instance(request.instance)
    {
        return Err(rejected(format!(
            "libvirt has a domain with this VM's UUID ({}) and without this daemon's mark in its <metadata>, so it is left alone: \
             undefine it (virsh undefine {}), and try again",
            domain.uuid, domain.name
        )));
    }
    if let Some(domain) = &known
        && is_active(domain.state)
    {
        return take_over(backend, watched, facts, domain.state).await;
    }
    point(FaultPoint::LaunchConnected);
    if request.imported {
        if known.is_none() {
            let message = format!(
                "libvirt has no domain {} any more; delete this VM, or define the domain again",
                facts.domain
            );
            return Err(rejected(message));
        }
    } else {
        define(backend, &request, choice.accelerator, known).await?;
    }
    point(FaultPoint::LaunchConfigured);
    start(backend, watched, facts).await
}

/// Starts a defined domain, and returns its handle.
async fn start(
    backend: &LibvirtBackend,
    watched: DomainEvents,
    facts: DomainRunFacts,
) -> Result<LaunchedVmm, BackendError> {
    let uuid = facts.domain;
    let begun = async {
        backend.link.order(Call::Start { uuid }, START_CALL_TIMEOUT).await.map_err(explain_slow_call)?;
        point(FaultPoint::LaunchSpawned);
        qemu_of(backend, sought(&facts)).await
    };
    let process = match begun.await {
        Ok(process) => process,
        // The call may have timed out at the daemon and succeeded at libvirt, so the domain is
        // ended after every error.
        Err(error) => return Err(undo(backend, sought(&facts), error).await),
    };
    let facts = facts.with_live_taps(&backend.link).await;
    let run = facts.record(&process);
    let imported = facts.imported;
    let (vmm, launched) = assemble(&backend.link, watched, process.clone(), facts, run, DomainState::Paused);
    if let Err(error) = vmm.resume().await {
        let sought = Sought { domain: uuid, imported, recorded: Some(process.identity()) };
        return Err(undo(backend, sought, error).await);
    }
    point(FaultPoint::LaunchStarted);
    Ok(launched)
}

/// Takes over a domain that another client has started meanwhile, because a running domain is the
/// requested result.
async fn take_over(
    backend: &LibvirtBackend,
    watched: DomainEvents,
    facts: DomainRunFacts,
    state: DomainState,
) -> Result<LaunchedVmm, BackendError> {
    let process = qemu_of(backend, sought(&facts)).await?;
    tracing::debug!(domain = %facts.domain, "the domain runs already and is taken over");
    let facts = facts.with_live_taps(&backend.link).await;
    let run = facts.record(&process);
    let (vmm, launched) = assemble(&backend.link, watched, process, facts, run, state);
    vmm.resume().await?;
    Ok(launched)
}

/// Returns the search for the QEMU of a run that is not on record.
const fn sought(facts: &DomainRunFacts) -> Sought<'static> {
    Sought { domain: facts.domain, imported: facts.imported, recorded: None }
}

async fn qemu_of(backend: &LibvirtBackend, sought: Sought<'_>) -> Result<Process, BackendError> {
    let host = |message: String| BackendError::new(BackendErrorKind::Host, Effect::Applied, message);
    match backend.find_qemu(sought, QUICK_CALL_TIMEOUT).await {
        Ok(Some(process)) => Ok(process),
        Ok(None) => Err(host(
            "libvirt has started the domain, but the daemon sees no such process: libvirtd and the daemon must share the host's processes"
                .to_owned(),
        )),
        Err(why) => Err(host(format!("libvirt has started the domain, but {why}"))),
    }
}

/// Ends the domain of a start that failed, and returns the error of the start.
async fn undo(backend: &LibvirtBackend, sought: Sought<'_>, mut error: BackendError) -> BackendError {
    error.effect = match backend.end(sought, Duration::from_secs(2)).await {
        Ok(()) => Effect::NotApplied,
        Err(stuck) => {
            error.message = format!("{}; and what it left could not be ended: {stuck}", error.message);
            Effect::Unknown
        }
    };
    error
}

/// Returns the domain once libvirt has noticed the end of its last QEMU.
pub(super) async fn wait_for_domain_end(
    backend: &LibvirtBackend,
    sought: Sought<'_>,
) -> Result<Option<Domain>, BackendError> {
    let deadline = Instant::now() + START_NOTICE_TIMEOUT;
    loop {
        let known = backend.link.look_up(sought.domain, QUICK_CALL_TIMEOUT).await?;
        let Some(domain) = &known else { return Ok(None) };
        let is_ending = is_active(domain.state)
            && (domain.state == DomainState::ShuttingDown
                || matches!(backend.find_qemu(sought, QUICK_CALL_TIMEOUT).await, Ok(None)));
        if !is_ending || Instant::now() > deadline {
            return Ok(known);
        }
        tokio::time::sleep(END_POLL_INTERVAL).await;
    }
}

/// Defines the domain of `request`. A domain of another owner with the same name stays.
async fn define(
    backend: &LibvirtBackend,
    request: &LaunchRequest,
    accelerator: Accelerator,
    known: Option<Domain>,
) -> Result<(), BackendError> {
    let uuid = *request.uid.as_uuid();
    let name = request.vm_id.as_str();
    if let Some(domain) = &known
        && domain.name != name
    {
        // Another client has renamed the domain. A new definition cannot change the name of an
        // existing domain.
        backend.link.order(Call::Undefine { uuid, everything: true }, QUICK_CALL_TIMEOUT).await?;
    }
    // libvirt identifies domains by UUID and requires unique names. A running or foreign namesake
    // is not touched. A stopped one with this instance's mark belongs to a VM that does not exist
    // any more.
    let namesake = backend.link.look_by_name(name).await?.filter(|domain| domain.uuid != uuid);
    if let Some(namesake) = namesake {
        let ours = owner(&namesake) == DomainOwner::Instance(request.instance);
        if !ours || is_active(namesake.state) {
            let whose = if ours {
                "which this program made for a VM that is gone"
            } else {
                "which is not this program's"
            };
            return Err(rejected(format!(
                "libvirt has a domain of the name {name} ({}), {whose}: rename it (virsh domrename), undefine it (virsh \
                 undefine), or create the VM under another vm_id",
                namesake.uuid
            )));
        }
        // The namesake is left of a VM that was deleted while libvirt could not be reached.
        backend
            .link
            .order(Call::Undefine { uuid: namesake.uuid, everything: true }, QUICK_CALL_TIMEOUT)
            .await?;
    }
    let xml = xml_of(backend, request, accelerator).await?;
    note_definition(&request.dir, &xml).await?;
    backend.link.order(Call::Define { xml }, START_CALL_TIMEOUT).await.map_err(explain_slow_call)
}

/// Adds the known reason if libvirt takes seconds for a call that takes milliseconds elsewhere.
fn explain_slow_call(error: CallError) -> BackendError {
    let is_silent = matches!(error, CallError::Silent { .. });
    let mut error = BackendError::from(error);
    if is_silent {
        error.message.push_str(
            "; where libvirtd may open /dev/kvm and QEMU's user (libvirt-qemu) may not, it examines QEMU at every call: let \
             that user open it too",
        );
    }
    error
}

/// Writes the definition to the run folder, for people and for a deletion without libvirt.
async fn note_definition(dir: &Path, xml: &str) -> Result<(), BackendError> {
    let (file, xml) = (dir.join(DEFINITION), xml.to_owned());
    match tokio::task::spawn_blocking(move || std::fs::write(file, xml)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let message = format!("{DEFINITION} cannot be written to the run folder: {error}");
            Err(host_error(message).caused_by(error))
        }
        Err(error) => Err(host_error(error.to_string())),
    }
}

/// Returns true if a domain may have been defined for the run folder.
pub(super) fn was_defined(dir: &Path) -> bool {
    dir.join(DEFINITION).exists()
}

async fn xml_of(
    backend: &LibvirtBackend,
    request: &LaunchRequest,
    accelerator: Accelerator,
) -> Result<String, BackendError> {
    let (spec, socket) = (request.spec.clone(), request.dir.join(convert::CONSOLE_SOCKET));
    run_dir::socket_path_fits(&socket).map_err(host_error)?;
    let looked = tokio::task::spawn_blocking(move || Ok((images::inspect(&spec)?, firmware()?)));
    let (images, firmware) = match looked.await {
        Ok(looked) => looked.map_err(|error: String| host_error(error))?,
        Err(error) => return Err(host_error(error.to_string())),
    };
    let emulator = &backend.options.emulator;
    let inputs = DomainInputs {
        instance: request.instance,
        uid: request.uid,
        vm_id: &request.vm_id,
        spec: &request.spec,
        accelerator,
        // libvirt resolves a bare name, because it may be allowed to start its own choice only.
        emulator: emulator.is_absolute().then_some(emulator),
        firmware: &firmware,
        label: backend.label,
        dir: &request.dir,
        console: request.console.as_deref(),
        taps: &request.taps,
        images: &images,
    };
    convert::domain(&inputs).map_err(|error| rejected(error.to_string()))
}

/// Looks for the firmware of a domain.
///
/// # Errors
/// Returns the missing file and its package.
pub(super) async fn look_for_firmware() -> Result<(), String> {
    let looked = tokio::task::spawn_blocking(firmware).await;
    looked.unwrap_or_else(|error| Err(error.to_string())).map(drop)
}

/// Returns the path of the firmware. Blocks.
fn firmware() -> Result<PathBuf, String> {
    let known = FIRMWARE.iter().map(PathBuf::from).find(|path| path.is_file());
    known.ok_or_else(|| {
        format!(
            "qboot.rom is in none of {}; install QEMU's data (Debian: qemu-system-data)",
            FIRMWARE.join(", ")
        )
    })
}

/// Removes the sockets of an earlier run in this folder.
pub(super) async fn clear(dir: &Path) -> Result<(), BackendError> {
    let dir = dir.to_path_buf();
    match tokio::task::spawn_blocking(move || run_dir::remove_sockets(&dir)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            Err(host_error(format!("the run folder cannot be cleared: {error}")).caused_by(error))
        }
        Err(error) => Err(host_error(error.to_string())),
    }
}

fn rejected(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message)
}

fn host_error(message: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message)
}

impl LibvirtBackend {
    fn facts(&self, request: &LaunchRequest, version: String, accelerator: Accelerator) -> DomainRunFacts {
        DomainRunFacts {
            domain: domain_of(&request.kind, request.uid),
            socket: self.socket.clone(),
            version,
            accelerator: accelerator.as_str().to_owned(),
            machine: "q35".to_owned(),
            restarts: convert::restarts(&request.spec.restart),
            imported: request.imported,
            taps: request.taps.clone(),
            console: (!request.imported).then(|| request.dir.join(convert::CONSOLE_SOCKET)),
        }
    }

    /// Ends a domain by libvirt, or else its proven process. Returns once no QEMU of it runs.
    pub(super) async fn end(&self, sought: Sought<'_>, timeout: Duration) -> Result<(), BackendError> {
        // libvirt ends the domain properly and frees what it holds for it. The process is killed
        // only if it still runs afterwards, whatever libvirt answered.
        let uuid = sought.domain;
        let ended = self.link.order(Call::Destroy { uuid }, timeout).await;
        if let Err(error) = &ended {
            tracing::debug!(%error, domain = %uuid, "libvirt did not end the domain");
        }
        match self.find_qemu(sought, timeout).await {
            Ok(None) => Ok(()),
            Ok(Some(process)) => {
                process.kill_and_wait(Duration::from_secs(1)).await.map(|_| ()).map_err(|error| {
                    BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, error.to_string())
                        .caused_by(error)
                })
            }
            Err(why) => Err(unproven(why)),
        }
    }
}
