// The life of one VM, from its creation to its deletion.

import assert from "node:assert/strict";
import { Code } from "@connectrpc/connect";
import { config, kernelPath, refused, sizeBytes, type Vms } from "./api.js";
import { VmState } from "./gen/vmm/v1/vm_pb.js";

export async function lifecycle(client: Vms, vmId: string): Promise<void> {
  // Step 1: CreateVm records the VM.
  const created = await client.createVm({ vmId, config: config(kernelPath, { made_by: vmId }) });
  assert.deepEqual([created.vmId, VmState[created.state]], [vmId, "CREATED"]);
  await look(client, vmId, VmState.CREATED);

  // Step 2: PauseVm is refused before the boot.
  await refused(client.pauseVm({ vmId }), Code.FailedPrecondition);

  // Step 3: BootVm starts the guest.
  expect(await client.bootVm({ vmId }), VmState.RUNNING);

  // Step 4: BootVm of a running VM has nothing to do.
  expect(await client.bootVm({ vmId }), VmState.RUNNING);
  await look(client, vmId, VmState.RUNNING);

  // Step 5: PauseVm stops the guest's processors.
  expect(await client.pauseVm({ vmId }), VmState.PAUSED);

  // Step 6: ResumeVm starts the processors again.
  expect(await client.resumeVm({ vmId }), VmState.RUNNING);

  // Step 7: RebootVm starts the guest anew.
  expect(await client.rebootVm({ vmId, force: true }), VmState.RUNNING);

  // Step 8: ShutdownVm ends the guest.
  expect(await client.shutdownVm({ vmId, force: true }), VmState.SHUTDOWN);
  await look(client, vmId, VmState.SHUTDOWN);

  // Step 9: BootVm starts the guest again.
  expect(await client.bootVm({ vmId }), VmState.RUNNING);

  // Step 10: DeleteVm of a running VM is refused without force.
  await refused(client.deleteVm({ vmId }), Code.FailedPrecondition);

  // Step 11: DeleteVm with force removes the VM.
  assert.equal((await client.deleteVm({ vmId, force: true })).success, true);

  // Step 12: GetVmInfo does not find the VM.
  await refused(client.getVmInfo({ vmId }), Code.NotFound);
}

/** Checks the answer of an operation that changes the state. */
function expect(answer: { success: boolean; state: VmState }, state: VmState): void {
  assert.deepEqual([answer.success, VmState[answer.state]], [true, VmState[state]]);
}

/** Reads the VM by both reads. */
async function look(client: Vms, vmId: string, state: VmState): Promise<void> {
  const info = await client.getVmInfo({ vmId });
  assert.equal(VmState[info.state], VmState[state]);
  assert.equal(info.config?.memory?.sizeBytes, sizeBytes);
  assert.equal(info.config?.boot?.kernelPath, kernelPath);
  const list = await client.listVms({ stateFilter: [state], metadataFilter: { made_by: vmId } });
  assert.deepEqual([list.totalCount, list.vms.map((vm) => vm.vmId)], [1, [vmId]]);
}
