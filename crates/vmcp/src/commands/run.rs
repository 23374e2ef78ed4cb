//! `vmcp run`: creates a VM, boots it and shows its console until the guest ends.

use std::time::Duration;

use connectrpc::ErrorCode;
use vmm_proto::v1 as pb;

use super::Session;
use super::console::{ConsoleView, Left, attach};
use super::create::{record, warn};
use super::signals::EndSignals;
use crate::cli::Run;
use crate::connect::wait::{self, TURN_INTERVAL};
use crate::connect::{Client, long_call};
use crate::failure::Failure;
use crate::output::progress::Progress;
use crate::output::{escape, remark, words};

/// The phase of a VM that the daemon is about to start again.
const RESTARTING: &str = "restarting";
/// The pause before the state of a VM is asked for again, while a restart or the server is awaited.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

pub(super) async fn run(session: &mut Session, arguments: &Run) -> Result<(), Failure> {
    // A signal that comes while the VM is created is obeyed behind that, because only then the VM can
    // be deleted.
    let mut signals = EndSignals::new()?;
    let created = record(session, arguments.name.as_deref(), &arguments.config).await?;
    warn(&created.warnings);
    let vm_id = created.vm_id;
    let outcome = boot_and_attach(session, &vm_id, arguments, &mut signals).await;
    if arguments.rm {
        let removed = remove(session, &vm_id).await;
        // The first failure explains the other.
        return outcome.and(removed);
    }
    let shown = escape::line(&vm_id);
    match &outcome {
        Ok(()) => {}
        // A signal ended this program alone.
        Err(Failure::Reported(_)) => remark(&runs_on(&shown)),
        Err(_) => remark(&format!(
            "vmcp: {shown} stays on record; `vmcp get {shown}` shows it, `vmcp delete {shown}` removes it"
        )),
    }
    outcome
}

async fn boot_and_attach(
    session: &mut Session,
    vm_id: &str,
    arguments: &Run,
    signals: &mut EndSignals,
) -> Result<(), Failure> {
    let progress = Progress::of_vm(&session.client, vm_id);
    let request = pb::BootVmRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    let boot = progress.during(session.client.boot_vm_with_options(request, long_call()));
    let booted = tokio::select! {
        booted = boot => booted,
        code = signals.next() => Err(Failure::Reported(code)),
    };
    drop(progress);
    booted??;
    let view = ConsoleView { tail: 0, follow: true, takes_input: true, escape: arguments.escape.key };
    let end = guest_end(session.client.clone(), vm_id.to_owned());
    match attach(session, vm_id, view, signals, end).await? {
        Left::BySignal(code) => return Err(Failure::Reported(code)),
        Left::ByKey if !arguments.rm => {
            remark(&runs_on(&escape::line(vm_id)));
        }
        Left::ByKey => {}
        Left::AtEnd => tell_end(session, vm_id).await?,
    }
    Ok(())
}

fn runs_on(shown: &str) -> String {
    format!("vmcp: {shown} runs on; `vmcp console {shown}` shows its console again")
}

/// Waits until the guest has ended and is not started again, or until the VM is deleted.
async fn guest_end(client: Client, vm_id: String) {
    loop {
        match wait::turn(&client, &vm_id, &[pb::VmState::Shutdown], TURN_INTERVAL).await {
            Ok(answer) if answer.status.phase != RESTARTING => return,
            Err(error) if error.code == ErrorCode::NotFound => return,
            // The guest runs on, and the call's own time is over.
            Err(error) if error.code == ErrorCode::DeadlineExceeded => {}
            // A loss of the server is the matter of the output, which tells of it.
            Ok(_) | Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}

/// Says how the guest ended.
///
/// # Errors
///
/// The VM failed: the end of its guest was not the guest's own.
async fn tell_end(session: &Session, vm_id: &str) -> Result<(), Failure> {
    let request = pb::GetVmInfoRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    let info = match session.client.get_vm_info(request).await {
        Ok(info) => info.into_owned(),
        // Another client deleted the VM.
        Err(error) if error.code == ErrorCode::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    remark(&format!("vmcp: {}", words::vm(vm_id, &info.state, &info.status)));
    if info.status.phase == "failed" {
        return Err(Failure::Local(info.status.message.clone()));
    }
    Ok(())
}

async fn remove(session: &Session, vm_id: &str) -> Result<(), Failure> {
    let request = pb::DeleteVmRequest { vm_id: vm_id.to_owned(), force: true, ..Default::default() };
    match session.client.delete_vm_with_options(request, long_call()).await {
        Ok(_) => Ok(()),
        Err(error) if error.code == ErrorCode::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}
