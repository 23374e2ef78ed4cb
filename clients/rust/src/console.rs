//! The console of a guest: its output from the first message on, and a line that is typed.

use anyhow::{Context as _, Result, bail};
use vmm_proto::v1 as pb;

use crate::{Client, config, delete};

pub(crate) async fn console(client: &Client, vm_id: &str, kernel: &str) -> Result<()> {
    let vm_id = vm_id.to_owned();

    // Step 1: BootVm starts a guest that echoes its input.
    let config = config(kernel).into();
    let request = pb::CreateVmRequest { vm_id: vm_id.clone(), config, ..Default::default() };
    client.create_vm(request).await.context("CreateVm")?;
    let boot = pb::BootVmRequest { vm_id: vm_id.clone(), ..Default::default() };
    client.boot_vm(boot).await.context("BootVm")?;

    // Step 2: StreamConsole sends the output from the first message on.
    let request = pb::StreamConsoleRequest { vm_id: vm_id.clone(), follow: true, ..Default::default() };
    let mut stream = client.stream_console(request).await.context("StreamConsole")?;
    let mut output = String::new();
    let mut until = async |text: &str| -> Result<()> {
        while !output.contains(text) {
            let Some(message) = stream.message().await? else {
                bail!("\"{text}\" did not come before the end of the stream: {output:?}");
            };
            let message: pb::StreamConsoleResponse = message.to_owned_message();
            output.push_str(&String::from_utf8_lossy(&message.data));
        }
        Ok(())
    };
    until("kind=echo").await?;

    // Step 3: WriteConsole types a line, and the guest echoes the line.
    let data = b"hello from Rust\r".to_vec().into();
    let request = pb::WriteConsoleRequest { vm_id: vm_id.clone(), data, ..Default::default() };
    client.write_console(request).await.context("WriteConsole")?;
    until("hello from Rust").await?;

    // Step 4: DeleteVm ends the stream, without an error.
    delete(client, &vm_id).await?;
    while stream.message::<pb::StreamConsoleResponse>().await.context("after the end of the VM")?.is_some() {}
    Ok(())
}
