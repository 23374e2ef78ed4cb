//! Adopts the QEMU that an earlier daemon started.

use std::path::PathBuf;

use vmm_core::backend::{AdoptRequest, Adoption, Exit, ExitCause};
use vmm_core::reason::Reason;
use vmm_core::store::{ProcessIdentity, RunRecord};
use vmm_host::clock::now_ms;
use vmm_host::process::{self, Lookup, Process, ProcessMatch};

use super::convert::{Accelerator, QMP_SOCKET, QemuMachine, reboot_action};
use super::start::QemuVmmParts;
use crate::search::{self, UnprovenVmm};

/// Adopts the QEMU of `request`: by its recorded identity, or by its run folder among the programs
/// `names` if a launch was interrupted. Ends no process.
pub(super) async fn adopt(request: AdoptRequest, names: Vec<String>, accelerator: Accelerator) -> Adoption {
    let (identity, run) = match &request.run {
        Some(run) => (run.process.clone(), run.clone()),
        // The launch was interrupted before its record. The run folder in the arguments finds its
        // QEMU.
        None => match search::user_of(&request.dir, names).await {
            Ok(Some(found)) => (found.identity.clone(), reconstructed(&request, &found, accelerator)),
            Ok(None) => return gone("no QEMU uses the run folder"),
            Err(UnprovenVmm { reason, message }) => {
                return Adoption::Unreachable { reason, message, launched: None };
            }
        },
    };
    match process::adopt(&identity) {
        Lookup::Gone => gone(&gone_because(&identity)),
        Lookup::Unprovable(message) => {
            Adoption::Unreachable { reason: Reason::IdentityUnproven, message, launched: None }
        }
        Lookup::Alive(process) => take_over(request, process, run).await,
    }
}

fn gone(message: &str) -> Adoption {
    Adoption::Gone { exit: Exit { cause: ExitCause::Unknown, message: message.to_owned() } }
}

fn gone_because(identity: &ProcessIdentity) -> String {
    match process::boot_id() {
        Ok(boot) if boot != identity.boot_id => "the host has been booted since".to_owned(),
        Ok(_) | Err(_) => format!("QEMU (process {}) ended while no daemon watched it", identity.pid),
    }
}

/// Connects to a QEMU whose identity is proven.
async fn take_over(request: AdoptRequest, process: Process, mut run: RunRecord) -> Adoption {
    let spec = &request.spec;
    let parts = QemuVmmParts::of_running(process.clone(), &request.dir, spec.tap_names(request.uid));
    // A QEMU that does not answer keeps its handle, because force can still end it by its process.
    let asked = async {
        let qmp = parts.link.connect().await?;
        // A daemon that ended during a reset may have left the other action.
        qmp.set_reboot_action(reboot_action(spec)).await?;
        Ok::<_, vmm_core::backend::BackendError>((qmp.version(), qmp.query_status().await?.guest_state()))
    };
    match asked.await {
        Ok((version, guest)) => {
            run.version = version.to_string();
            let runs = guest == vmm_core::backend::GuestState::Running;
            Adoption::Alive { launched: parts.assemble(request.uid, run, spec, runs), guest }
        }
        Err(error) => match process.exit() {
            Some(_) => gone(&gone_because(process.identity())),
            None => Adoption::Unreachable {
                reason: Reason::VmmDoesNotAnswer,
                message: error.message,
                launched: Some(parts.assemble(request.uid, run, spec, true)),
            },
        },
    }
}

/// Returns the record of a run whose launch was interrupted before its record was written.
fn reconstructed(request: &AdoptRequest, found: &ProcessMatch, configured: Accelerator) -> RunRecord {
    // The launch's record is lost, so its facts are read from the arguments of the process.
    let after = |flag: &str| {
        let mut args = found.args.iter().skip_while(|arg| arg.as_os_str() != flag);
        args.nth(1).map(|value| value.to_string_lossy().into_owned())
    };
    let machine = QemuMachine::of(&request.spec).unwrap_or(QemuMachine::Q35);
    let socket: PathBuf = request.dir.join(QMP_SOCKET);
    RunRecord {
        process: found.identity.clone(),
        socket,
        version: String::new(),
        accelerator: after("-accel").unwrap_or_else(|| configured.as_str().to_owned()),
        machine: machine.as_str().to_owned(),
        // The true start was not recorded. The launch was in progress when the earlier daemon
        // ended.
        started_ms: now_ms(),
        claims: Vec::new(),
        taps: Vec::new(),
    }
}
