//! Adopts the domain of an earlier run.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;
use vmm_core::backend::{AdoptRequest, Adoption, BackendError, BackendErrorKind, Exit, ExitCause, Vmm as _};
use vmm_core::reason::Reason;
use vmm_host::process::{self, Lookup, Process};
use vmm_libvirt_wire::{Call, Domain, DomainState};

use super::convert::{CONSOLE_SOCKET, restarts};
use super::domain::{DomainOwner, END_POLL_INTERVAL, is_active, owner};
use super::link::CallError;
use super::process::Sought;
use super::run::{DomainRunFacts, assemble, live_taps};
use super::{LibvirtBackend, domain_of};

/// The time limits of the connection to libvirt and of its answer. The service waits five seconds
/// for all of an adoption.
const ADOPT_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ADOPT_CALL_TIMEOUT: Duration = Duration::from_millis(1500);
/// The time in which libvirt must notice the end of a QEMU.
const ADOPT_NOTICE_TIMEOUT: Duration = Duration::from_secs(1);
/// The time in which a QEMU must end that libvirt reports as ended.
const ADOPT_EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// Adopts the domain of `request`. Ends no process.
pub(super) async fn adopt(backend: &LibvirtBackend, request: AdoptRequest) -> Adoption {
    let domain = domain_of(&request.kind, request.uid);
    // The subscription begins before the first lookup, so that no event falls between the two.
    let watched = backend.link.subscribe(domain);
    let recorded = request.run.as_ref().map(|run| &run.process);
    let sought = Sought { domain, imported: request.imported, recorded };
    let process = match backend.find_qemu(sought, ADOPT_CALL_TIMEOUT).await {
        Ok(process) => process,
        Err(why) => return unreachable(Reason::IdentityUnproven, why),
    };
    let connected = backend.link.ready(ADOPT_CONNECT_TIMEOUT).await;
    let version = match (&connected, &request.run) {
        (Ok(up), _) => up.hypervisor.clone(),
        (Err(_), Some(run)) => run.version.clone(),
        (Err(_), None) => String::new(),
    };
    let taps = match &connected {
        Ok(_) if request.imported => live_taps(&backend.link, domain, ADOPT_CALL_TIMEOUT).await,
        Ok(_) | Err(_) => None,
    };
    // The run on record has the accelerator that it was started with. The host may offer another
    // one by now.
    let accelerator = match &request.run {
        Some(run) => run.accelerator.clone(),
        None => backend.accelerator().as_str().to_owned(),
    };
    let facts = DomainRunFacts {
        domain,
        socket: backend.socket.clone(),
        version,
        accelerator,
        machine: "q35".to_owned(),
        restarts: restarts(&request.spec.restart),
        imported: request.imported,
        taps: taps.unwrap_or_else(|| known_taps(&request)),
        console: (!request.imported).then(|| request.dir.join(CONSOLE_SOCKET)),
    };
    // Two sources are compared: libvirt's state of the domain, and the QEMU process with the
    // domain's UUID. The domain runs, or has ended, only if both agree. A process of which libvirt
    // does not know gets a handle that can end it. A running domain without a process is
    // unreachable, because the daemon may not see the host's processes.
    let known = match connected {
        Ok(_) => find_domain(backend, domain, process.is_none()).await.map_err(BackendError::from),
        Err(down) => Err(down.into()),
    };
    let found = DomainAdoption { backend, request: &request, facts, watched };
    match (known, process) {
        (Ok(known), Some(process)) => found.with_process(known, process).await,
        (Ok(Some(known)), None) if is_active(known.state) => unreachable(
            Reason::IdentityUnproven,
            "libvirt reports that the domain runs, but this host shows no such process",
        ),
        (Ok(_), None) => gone("libvirt reports that the domain does not run"),
        (Err(error), Some(process)) => {
            found.unreachable_with_handle(Reason::LibvirtUnreachable, error, process)
        }
        (Err(error), None) => without_libvirt(&request, &error),
    }
}

/// Returns the TAPs of a run without libvirt's help: those on record, or those that follow from the
/// configuration of a VM that this program created.
fn known_taps(request: &AdoptRequest) -> Vec<String> {
    if request.imported {
        return request.run.as_ref().map(|run| run.taps.clone()).unwrap_or_default();
    }
    request.spec.tap_names(request.uid)
}

/// Asks libvirt for the domain. With `gone`, the QEMU has ended, and libvirt gets a moment to
/// notice.
async fn find_domain(
    backend: &LibvirtBackend,
    domain: Uuid,
    gone: bool,
) -> Result<Option<Domain>, CallError> {
    let deadline = Instant::now() + ADOPT_NOTICE_TIMEOUT;
    loop {
        let known = backend.link.look_up(domain, ADOPT_CALL_TIMEOUT).await?;
        let lags_behind = gone && known.as_ref().is_some_and(|known| is_active(known.state));
        if !lags_behind || Instant::now() > deadline {
            return Ok(known);
        }
        tokio::time::sleep(END_POLL_INTERVAL).await;
    }
}

/// An adoption for which a QEMU was found.
struct DomainAdoption<'a> {
    backend: &'a LibvirtBackend,
    request: &'a AdoptRequest,
    facts: DomainRunFacts,
    watched: super::link::DomainEvents,
}

impl DomainAdoption<'_> {
    /// Adopts a QEMU whose domain libvirt has reported.
    async fn with_process(self, known: Option<Domain>, process: Process) -> Adoption {
        let Some(known) = known.filter(|known| is_active(known.state)) else {
            // Either the QEMU is about to end, or libvirt has lost the domain.
            if process.wait_for(ADOPT_EXIT_TIMEOUT).await.is_some() {
                return gone("libvirt reports that the domain does not run");
            }
            let lost =
                "the domain's QEMU runs, but libvirt reports that it does not; restarting libvirtd may help";
            let error =
                BackendError::new(BackendErrorKind::Unreachable, vmm_core::backend::Effect::NotApplied, lost);
            return self.unreachable_with_handle(Reason::LibvirtLostIt, error, process);
        };
        let ours = owner(&known) == DomainOwner::Instance(self.request.instance);
        if !ours && !self.request.imported {
            return unreachable(
                Reason::DomainNotOurs,
                "the domain bears this VM's UUID, but not this program's mark",
            );
        }
        let (backend, restarts, uuid) = (self.backend, self.facts.restarts, self.facts.domain);
        let run = self.run(&process);
        let facts = self.facts;
        let (vmm, launched) = assemble(&backend.link, self.watched, process, facts, run, known.state);
        let asked = async {
            // The probe reaches QEMU as well, because libvirt answers for a QEMU that hangs.
            let guest = vmm.probe().await?;
            if ours {
                // A daemon that ended during a reset may have left the other action.
                backend.link.order(Call::OnReboot { uuid, restart: restarts }, ADOPT_CALL_TIMEOUT).await?;
            }
            Ok::<_, BackendError>(guest)
        };
        match asked.await {
            Ok(guest) => Adoption::Alive { launched, guest },
            Err(error) if error.kind == BackendErrorKind::Gone => gone("the domain ended just now"),
            Err(error) => Adoption::Unreachable {
                reason: Reason::VmmDoesNotAnswer,
                message: error.message,
                launched: Some(launched),
            },
        }
    }

    /// Returns an unreachable adoption with a handle, by which the QEMU can still be ended.
    fn unreachable_with_handle(self, reason: Reason, error: BackendError, process: Process) -> Adoption {
        let run = self.run(&process);
        let (_, launched) =
            assemble(&self.backend.link, self.watched, process, self.facts, run, DomainState::Running);
        Adoption::Unreachable { reason, message: error.message, launched: Some(launched) }
    }

    /// Returns the record of the run: the stored one, or a new one if the domain was started anew
    /// since.
    fn run(&self, process: &Process) -> vmm_core::store::RunRecord {
        let recorded = self.request.run.clone();
        match recorded.filter(|run| run.process == *process.identity()) {
            Some(run) => run,
            None => self.facts.record(process),
        }
    }
}

/// Returns the adoption if libvirt does not answer and no QEMU bears the domain's UUID.
fn without_libvirt(request: &AdoptRequest, error: &BackendError) -> Adoption {
    match request.run.as_ref().map(|run| process::adopt(&run.process)) {
        None | Some(Lookup::Gone) => gone("no QEMU of the domain runs"),
        Some(Lookup::Alive(_)) => {
            unreachable(Reason::IdentityUnproven, "the domain's process is no longer a QEMU of libvirt")
        }
        Some(Lookup::Unprovable(why)) => unreachable(Reason::IdentityUnproven, format!("{why}; and {error}")),
    }
}

fn gone(message: &str) -> Adoption {
    Adoption::Gone { exit: Exit { cause: ExitCause::Unknown, message: message.to_owned() } }
}

fn unreachable(reason: Reason, message: impl Into<String>) -> Adoption {
    Adoption::Unreachable { reason, message: message.into(), launched: None }
}
