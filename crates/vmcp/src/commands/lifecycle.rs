//! `vmcp boot`, `shutdown`, `pause`, `resume`, `reboot` and `delete`.
//!
//! Each takes several VMs, one after the other. A failure for one VM does not stop the others. The
//! exit code is that of the first failure.

use buffa::EnumValue;
use connectrpc::{ConnectError, ErrorCode};
use serde::Serialize;
use vmm_proto::v1 as pb;

use super::Session;
use crate::cli::{Delete, Names, Reboot, Shutdown};
use crate::connect::{Client, long_call, names};
use crate::failure::Failure;
use crate::output::progress::Progress;
use crate::output::{escape, problem, remark, words};

pub(super) async fn boot(session: &mut Session, names: &Names) -> Result<(), Failure> {
    let call = async |client: &Client, vm_id: &str| {
        let request = pb::BootVmRequest { vm_id: vm_id.to_owned(), ..Default::default() };
        Ok::<_, ConnectError>(client.boot_vm_with_options(request, long_call()).await?.into_owned())
    };
    each(session, names, call, |vm_id, done| line(vm_id, &done.state, "")).await
}

pub(super) async fn shutdown(session: &mut Session, arguments: &Shutdown) -> Result<(), Failure> {
    let call = async |client: &Client, vm_id: &str| {
        let request = pb::ShutdownVmRequest {
            vm_id: vm_id.to_owned(),
            force: arguments.force,
            timeout_seconds: arguments.timeout.unwrap_or_default(),
            ..Default::default()
        };
        Ok::<_, ConnectError>(client.shutdown_vm_with_options(request, long_call()).await?.into_owned())
    };
    each(session, &arguments.names, call, |vm_id, done| line(vm_id, &done.state, &done.ended_by)).await
}

pub(super) async fn pause(session: &mut Session, names: &Names) -> Result<(), Failure> {
    let call = async |client: &Client, vm_id: &str| {
        let request = pb::PauseVmRequest { vm_id: vm_id.to_owned(), ..Default::default() };
        Ok::<_, ConnectError>(client.pause_vm_with_options(request, long_call()).await?.into_owned())
    };
    each(session, names, call, |vm_id, done| line(vm_id, &done.state, "")).await
}

pub(super) async fn resume(session: &mut Session, names: &Names) -> Result<(), Failure> {
    let call = async |client: &Client, vm_id: &str| {
        let request = pb::ResumeVmRequest { vm_id: vm_id.to_owned(), ..Default::default() };
        Ok::<_, ConnectError>(client.resume_vm_with_options(request, long_call()).await?.into_owned())
    };
    each(session, names, call, |vm_id, done| line(vm_id, &done.state, "")).await
}

pub(super) async fn reboot(session: &mut Session, arguments: &Reboot) -> Result<(), Failure> {
    let call = async |client: &Client, vm_id: &str| {
        let request = pb::RebootVmRequest {
            vm_id: vm_id.to_owned(),
            force: arguments.force,
            timeout_seconds: arguments.timeout.unwrap_or_default(),
            ..Default::default()
        };
        Ok::<_, ConnectError>(client.reboot_vm_with_options(request, long_call()).await?.into_owned())
    };
    each(session, &arguments.names, call, |vm_id, done| line(vm_id, &done.state, &done.ended_by)).await
}

pub(super) async fn delete(session: &mut Session, arguments: &Delete) -> Result<(), Failure> {
    let is_for_people = !session.output.format().is_message();
    let call = async |client: &Client, vm_id: &str| {
        let request =
            pb::DeleteVmRequest { vm_id: vm_id.to_owned(), force: arguments.force, ..Default::default() };
        let done = match client.delete_vm_with_options(request, long_call()).await {
            Ok(done) => done.into_owned(),
            Err(error) if is_for_people && error.code == ErrorCode::FailedPrecondition => {
                return Err(with_remedy_of_protection(client, vm_id, error).await);
            }
            Err(error) => return Err(error),
        };
        for left in &done.left_behind {
            remark(&format!(
                "warning: left behind: {}: {}",
                escape::line(&left.field),
                escape::line(&left.message)
            ));
        }
        Ok::<_, ConnectError>(done)
    };
    each(session, &arguments.names, call, |vm_id, _| format!("{}: deleted", escape::line(vm_id))).await
}

/// Returns the refusal of a deletion, with the command that removes the VM's protection.
async fn with_remedy_of_protection(client: &Client, vm_id: &str, mut refusal: ConnectError) -> ConnectError {
    let request = pb::GetVmInfoRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    let info = client.get_vm_info(request).await;
    let is_protected = info.is_ok_and(|info| info.into_owned().config.delete_protection);
    if let Some(message) = refusal.message.as_mut().filter(|_| is_protected) {
        message.push_str(&format!("; `vmcp update {vm_id} --no-delete-protection` does it"));
    }
    refusal
}

/// Carries out `call` for each VM, and prints the answers as `line_of` shows them to people.
async fn each<M: Serialize>(
    session: &mut Session,
    names: &Names,
    call: impl AsyncFn(&Client, &str) -> Result<M, ConnectError>,
    line_of: impl Fn(&str, &M) -> String,
) -> Result<(), Failure> {
    let mut first_failure = None;
    for name in &names.names {
        match one(session, name, &call, &line_of).await {
            Ok(()) => {}
            // The last words of a single VM are printed by the caller.
            Err(failure) if names.names.len() == 1 => return Err(failure),
            // The output is closed, or the user pressed Ctrl-C.
            Err(failure @ (Failure::Output(_) | Failure::Reported(_))) => return Err(failure),
            Err(failure) => {
                let server = session.server.to_string();
                if let Some(text) = problem::text(&failure, session.output.format(), &server) {
                    remark(&text);
                }
                first_failure.get_or_insert(failure.exit_number());
            }
        }
    }
    first_failure.map_or(Ok(()), |number| Err(Failure::Reported(number)))
}

async fn one<M: Serialize>(
    session: &mut Session,
    name: &str,
    call: &impl AsyncFn(&Client, &str) -> Result<M, ConnectError>,
    line_of: &impl Fn(&str, &M) -> String,
) -> Result<(), Failure> {
    let vm_id = names::resolve(&session.client, name).await?;
    let progress = Progress::of_vm(&session.client, &vm_id);
    let outcome = progress.during(call(&session.client, &vm_id)).await;
    drop(progress);
    let answer = outcome.inspect_err(|_| print_interrupt(&vm_id))??;
    session.output.answer(&answer, &[&vm_id], |_| line_of(&vm_id, &answer))
}

/// Prints that Ctrl-C ended this program only, because the daemon completes an operation that it
/// has admitted.
fn print_interrupt(vm_id: &str) {
    let vm_id = escape::line(vm_id);
    remark(&format!("vmcp: the daemon goes on with the operation; `vmcp get {vm_id}` shows how it ends"));
}

fn line(vm_id: &str, state: &EnumValue<pb::VmState>, ended_by: &str) -> String {
    let mut line = format!("{}: {}", escape::line(vm_id), words::state(state));
    if !ended_by.is_empty() {
        line.push_str(&format!(", the guest was ended by {}", escape::line(ended_by)));
    }
    line
}
