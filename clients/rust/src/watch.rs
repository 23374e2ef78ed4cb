//! A watch: the present states, then each change as it is made.

use anyhow::{Context as _, Result, bail};
use vmm_proto::v1 as pb;

use crate::{Client, config, delete};

pub(crate) async fn watch(client: &Client, vm_id: &str, kernel: &str) -> Result<()> {
    let mut stream = client.watch_vms(pb::WatchVmsRequest::default()).await.context("WatchVms")?;
    let mut until = async |kind: &str, of: &str| -> Result<()> {
        while let Some(event) = stream.message().await? {
            let event: pb::VmEvent = event.to_owned_message();
            if event.r#type == kind && event.vm_id == of {
                return Ok(());
            }
        }
        bail!("the stream ended before the event \"{kind}\"")
    };

    // Step 1: WatchVms sends the present states, then the event "synced".
    until("synced", "").await?;

    // Step 2: CreateVm is the event "created".
    let (name, config) = (vm_id.to_owned(), config(kernel).into());
    let request = pb::CreateVmRequest { vm_id: name, config, ..Default::default() };
    client.create_vm(request).await.context("CreateVm")?;
    until("created", vm_id).await?;

    // Step 3: DeleteVm is the event "deleted".
    delete(client, vm_id).await?;
    until("deleted", vm_id).await
}
