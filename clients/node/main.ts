// Tests the API from Node, over every protocol of connect-es.
//
// The environment gives the daemon's address (VMCP_TEST_URL) and the kernels of two guests (VMCP_TEST_KERNEL, VMCP_TEST_ECHO_KERNEL). The
// program prints "ok NAME" or "FAIL NAME: WHY", and ends with status 1 if something failed.

import assert from "node:assert/strict";
import { subscribe } from "node:diagnostics_channel";
import { Code } from "@connectrpc/connect";
import { connectWith, type Dialect, dialects, kernelPath, refused, sizeBytes, type Vms } from "./api.js";
import { readAndType } from "./console.js";
import { BadRequestSchema } from "./gen/google/rpc/error_details_pb.js";
import { VmState } from "./gen/vmm/v1/vm_pb.js";
import { lifecycle } from "./lifecycle.js";
import { watch } from "./watch.js";

/** The verbs of all HTTP/1.1 requests so far, some noted twice by Node. Interceptors do not see that a call becomes a GET. */
const verbs: string[] = [];
subscribe("http.client.request.start", (message) => verbs.push((message as { request: { method: string } }).request.method));

/** Sends two mistakes at once and reads them back from the error's google.rpc.BadRequest. */
async function violations(client: Vms): Promise<void> {
  const wrong = { config: { cpu: { vcpuCount: -1 }, memory: { sizeBytes: 1000n } } };
  const error = await refused(client.createVm(wrong), Code.InvalidArgument);
  const fields = error.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations.map(({ field }) => field));
  for (const field of ["config.cpu.vcpu_count", "config.memory.size_bytes"]) {
    assert.ok(fields.includes(field), `${field} is not in the details: ${fields}`);
    assert.ok(error.rawMessage.includes(field), error.rawMessage);
  }
}

/** Makes both reads, and checks that they went as GET. */
async function readsByGet(dialect: Dialect): Promise<void> {
  const { client } = connectWith(dialect, true);
  const { vmId } = await client.createVm({ config: { cpu: { vcpuCount: 1 }, memory: { sizeBytes } } });
  try {
    verbs.length = 0;
    assert.equal((await client.getVmInfo({ vmId })).config?.boot?.kernelPath, kernelPath);
    assert.ok((await client.listVms({ stateFilter: [VmState.CREATED] })).vms.some((vm) => vm.vmId === vmId));
    assert.deepEqual([...new Set(verbs)], ["GET"]);
  } finally {
    await client.deleteVm({ vmId, force: true });
  }
}

let failed = false;
/** Runs one check. */
async function check(name: string, run: () => Promise<void> | void): Promise<void> {
  try {
    await run();
    console.log(`ok ${name}`);
  } catch (error) {
    failed = true;
    console.log(`FAIL ${name}: ${error instanceof Error ? error.stack : error}`);
  }
}

for (const [index, dialect] of dialects.entries()) {
  const { client, calls } = connectWith(dialect);
  await check(`lifecycle over ${dialect.name}`, () => lifecycle(client, `node-${index}`));
  await check(`a watch over ${dialect.name}`, () => watch(client, `node-watch-${index}`));
  await check(`a console over ${dialect.name}`, () => readAndType(client, `node-console-${index}`));
  await check(`violations over ${dialect.name}`, () => violations(client));
  await check(`it was ${dialect.name}`, () => assert.deepEqual([...new Set(calls)], [dialect.sent]));
}
for (const dialect of dialects.slice(0, 2)) {
  await check(`reads by GET over ${dialect.name}`, () => readsByGet(dialect));
}
// Connections that are kept for the next call would keep the program alive.
process.exit(failed ? 1 : 0);
