//! `vmcp update`: changes the parts of a configuration that flags or a file name.

use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::v1 as pb;

use super::Session;
use super::create::warn;
use crate::cli::Update;
use crate::connect::names;
use crate::failure::Failure;
use crate::input::changes::{ChangeFile, ConfigChange, by_flags};
use crate::output::{escape, remark, words};

pub(super) async fn run(session: &mut Session, arguments: &Update) -> Result<(), Failure> {
    let file = arguments.file.as_deref().map(ChangeFile::read).transpose()?;
    let vm = names::read(&session.client, &arguments.name).await?;
    let mut wanted_generation = arguments.if_generation.unwrap_or_default();
    let change = match file {
        Some(file) => {
            check_backend(&file, &vm)?;
            if wanted_generation == 0 {
                wanted_generation = file.if_generation;
            }
            file.into_change()
        }
        None => by_flags(&arguments.changes, &vm.config, &session.server)?,
    };
    if change.parts.is_empty() {
        return Err(Failure::input("there is nothing to change").with_remedy(
            "name a change as --memory 1GiB, or a file with -f; `vmcp edit NAME` opens the configuration in an editor",
        ));
    }
    if change.is_merged {
        if wanted_generation != 0 && wanted_generation != vm.generation {
            return Err(other_generation(&vm, wanted_generation).into());
        }
        wanted_generation = vm.generation;
    }
    let answer = send(session, &vm, &change, wanted_generation).await.inspect_err(|error| {
        if error.code == ErrorCode::Aborted && !session.output.format().is_message() {
            remark("vmcp: nothing was changed; `vmcp get` shows the VM, and the same command makes the change on top");
        }
    })?;
    print(session, &vm, &answer)
}

/// Sends a change of `vm`.
///
/// # Errors
///
/// `aborted` if the VM has another generation than `if_generation`, and the server's other errors.
pub(super) async fn send(
    session: &Session,
    vm: &pb::GetVmInfoResponse,
    change: &ConfigChange,
    if_generation: i64,
) -> Result<pb::UpdateVmResponse, ConnectError> {
    let request = pb::UpdateVmRequest {
        vm_id: vm.vm_id.clone(),
        config: change.config.clone().into(),
        fields: change.parts.clone(),
        if_generation,
        ..Default::default()
    };
    Ok(session.client.update_vm(request).await?.into_owned())
}

/// Prints the answer to a change of `vm`.
///
/// # Errors
///
/// The output cannot be written.
pub(super) fn print(
    session: &mut Session,
    vm: &pb::GetVmInfoResponse,
    answer: &pb::UpdateVmResponse,
) -> Result<(), Failure> {
    if !session.output.format().is_message() {
        warn(&answer.warnings);
    }
    session.output.answer(answer, &[&vm.vm_id], |_| line(vm, answer))
}

fn line(vm: &pb::GetVmInfoResponse, answer: &pb::UpdateVmResponse) -> String {
    let (vm_id, generation) = (escape::line(&vm.vm_id), answer.generation);
    if generation == vm.generation {
        return format!("{vm_id}: has these values already, generation {generation}");
    }
    format!("{vm_id}: updated, {}, generation {generation}", words::state(&answer.state))
}

fn check_backend(file: &ChangeFile, vm: &pb::GetVmInfoResponse) -> Result<(), Failure> {
    if file.backend.is_empty() || file.backend == vm.backend {
        return Ok(());
    }
    let fault =
        format!("backend: VM \"{}\" is on {}, and the file names {}", vm.vm_id, vm.backend, file.backend);
    Err(Failure::input(fault).with_remedy("a VM stays on its backend; create another VM there"))
}

fn other_generation(vm: &pb::GetVmInfoResponse, wanted: i64) -> ConnectError {
    ConnectError::aborted(format!(
        "VM \"{}\" has generation {} and not {wanted}: it has changed since it was read; nothing was changed",
        vm.vm_id, vm.generation
    ))
}
