//! The life of one VM, from its creation to its deletion.

use anyhow::{Context as _, Result, ensure};
use connectrpc::ErrorCode;
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmState;

use crate::{Client, config, delete, refused};

pub(crate) async fn lifecycle(client: &Client, vm_id: &str, kernel: &str) -> Result<()> {
    let vm_id = vm_id.to_owned();

    // Step 1: CreateVm records the VM.
    let made_by = [("made_by".to_owned(), vm_id.clone())].into();
    let config = pb::VmConfig { metadata: made_by, ..config(kernel) };
    let request = pb::CreateVmRequest { vm_id: vm_id.clone(), config: config.into(), ..Default::default() };
    let created = client.create_vm(request).await.context("CreateVm")?.into_owned();
    ensure!(created.vm_id == vm_id && created.state == VmState::Created, "CreateVm: {created:?}");
    look(client, &vm_id, kernel, VmState::Created).await?;

    // Step 2: PauseVm is refused before the boot.
    let pause = pb::PauseVmRequest { vm_id: vm_id.clone(), ..Default::default() };
    let answer = client.pause_vm(pause.clone()).await;
    refused("PauseVm before the boot", ErrorCode::FailedPrecondition, answer)?;

    // Step 3: BootVm starts the guest.
    let boot = pb::BootVmRequest { vm_id: vm_id.clone(), ..Default::default() };
    let answer = client.boot_vm(boot.clone()).await.context("BootVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Running, "BootVm: {answer:?}");

    // Step 4: BootVm of a running VM has nothing to do.
    let answer = client.boot_vm(boot.clone()).await.context("BootVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Running, "BootVm: {answer:?}");
    look(client, &vm_id, kernel, VmState::Running).await?;

    // Step 5: PauseVm stops the guest's processors.
    let answer = client.pause_vm(pause).await.context("PauseVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Paused, "PauseVm: {answer:?}");

    // Step 6: ResumeVm starts the processors again.
    let resume = pb::ResumeVmRequest { vm_id: vm_id.clone(), ..Default::default() };
    let answer = client.resume_vm(resume).await.context("ResumeVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Running, "ResumeVm: {answer:?}");

    // Step 7: RebootVm starts the guest anew.
    let reboot = pb::RebootVmRequest { vm_id: vm_id.clone(), force: true, ..Default::default() };
    let answer = client.reboot_vm(reboot).await.context("RebootVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Running, "RebootVm: {answer:?}");

    // Step 8: ShutdownVm ends the guest.
    let shutdown = pb::ShutdownVmRequest { vm_id: vm_id.clone(), force: true, ..Default::default() };
    let answer = client.shutdown_vm(shutdown).await.context("ShutdownVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Shutdown, "ShutdownVm: {answer:?}");
    look(client, &vm_id, kernel, VmState::Shutdown).await?;

    // Step 9: BootVm starts the guest again.
    let answer = client.boot_vm(boot).await.context("BootVm")?.into_owned();
    ensure!(answer.success && answer.state == VmState::Running, "BootVm: {answer:?}");

    // Step 10: DeleteVm of a running VM is refused without force.
    let request = pb::DeleteVmRequest { vm_id: vm_id.clone(), ..Default::default() };
    let answer = client.delete_vm(request).await;
    refused("DeleteVm of a running VM", ErrorCode::FailedPrecondition, answer)?;

    // Step 11: DeleteVm with force removes the VM.
    delete(client, &vm_id).await?;

    // Step 12: GetVmInfo does not find the VM.
    let answer = client.get_vm_info(pb::GetVmInfoRequest { vm_id, ..Default::default() }).await;
    refused("GetVmInfo after DeleteVm", ErrorCode::NotFound, answer)
}

/// Reads the VM by both reads.
async fn look(client: &Client, vm_id: &str, kernel: &str, state: VmState) -> Result<()> {
    let request = pb::GetVmInfoRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    let info = client.get_vm_info(request).await.context("GetVmInfo")?.into_owned();
    ensure!(info.state == state, "GetVmInfo: {info:?}");
    ensure!(info.config.memory.size_bytes == 128 << 20, "GetVmInfo: {info:?}");
    ensure!(info.config.boot.kernel_path == kernel, "GetVmInfo: {info:?}");
    let request = pb::ListVmsRequest {
        state_filter: vec![state.into()],
        metadata_filter: [("made_by".to_owned(), vm_id.to_owned())].into(),
        ..Default::default()
    };
    let list = client.list_vms(request).await.context("ListVms")?.into_owned();
    let found: Vec<_> = list.vms.iter().map(|vm| vm.vm_id.as_str()).collect();
    ensure!(list.total_count == 1 && found == [vm_id], "ListVms: {list:?}");
    Ok(())
}
