// A watch: the present states, then each change as it is made.

import assert from "node:assert/strict";
import { config, kernelPath, type Vms } from "./api.js";

export async function watch(client: Vms, vmId: string): Promise<void> {
  const stream = client.watchVms({}, { timeoutMs: 20_000 })[Symbol.asyncIterator]();
  const until = async (type: string, of: string): Promise<void> => {
    for (;;) {
      const { value: event, done } = await stream.next();
      assert.ok(!done, `the stream ended before the event "${type}"`);
      if (event.type === type && event.vmId === of) {
        return;
      }
    }
  };

  // Step 1: WatchVms sends the present states, then the event "synced".
  await until("synced", "");

  // Step 2: CreateVm is the event "created".
  await client.createVm({ vmId, config: config(kernelPath) });
  await until("created", vmId);

  // Step 3: DeleteVm is the event "deleted".
  await client.deleteVm({ vmId, force: true });
  await until("deleted", vmId);
  await stream.return?.();
}
