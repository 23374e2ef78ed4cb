// The console of a guest: its output from the first message on, and a line that is typed.

import assert from "node:assert/strict";
import { config, variable, type Vms } from "./api.js";

export async function readAndType(client: Vms, vmId: string): Promise<void> {
  // Step 1: BootVm starts a guest that echoes its input.
  await client.createVm({ vmId, config: config(variable("VMCP_TEST_ECHO_KERNEL")) });
  try {
    await client.bootVm({ vmId });

    // Step 2: StreamConsole sends the output from the first message on.
    const stream = client.streamConsole({ vmId, follow: true }, { timeoutMs: 30_000 })[Symbol.asyncIterator]();
    let output = "";
    const until = async (text: string): Promise<void> => {
      while (!output.includes(text)) {
        const { value: message, done } = await stream.next();
        assert.ok(!done, `"${text}" did not come before the end of the stream: ${output}`);
        output += Buffer.from(message.data).toString("latin1");
      }
    };
    await until("kind=echo");

    // Step 3: WriteConsole types a line, and the guest echoes the line.
    await client.writeConsole({ vmId, data: Buffer.from("hello from TypeScript\r") });
    await until("hello from TypeScript");

    // Step 4: DeleteVm ends the stream, without an error.
    await client.deleteVm({ vmId, force: true });
    while (!(await stream.next()).done) {}
  } finally {
    await client.deleteVm({ vmId, force: true }).catch(() => {});
  }
}
