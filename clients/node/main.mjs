// Tests the API from Node, over every protocol of connect-es.
//
// The environment gives the daemon's address (VMCP_TEST_URL) and its default kernel (VMCP_TEST_KERNEL). The program
// prints "ok NAME" or "FAIL NAME: WHY", and ends with status 1 if something failed.

import assert from "node:assert/strict";
import { subscribe } from "node:diagnostics_channel";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { BadRequestSchema } from "./gen/google/rpc/error_details_pb.js";
import { VmService, VmState } from "./gen/vmm/v1/vm_pb.js";

const baseUrl = process.env.VMCP_TEST_URL;
const kernelPath = process.env.VMCP_TEST_KERNEL;
const sizeBytes = 128n << 20n;

/** One way to speak to the daemon. `sent` is the content type of its unary calls. */
const dialects = [
  { name: "connect JSON, HTTP/1.1", make: createConnectTransport, options: { httpVersion: "1.1", useBinaryFormat: false }, sent: "application/json" },
  { name: "connect binary, HTTP/1.1", make: createConnectTransport, options: { httpVersion: "1.1", useBinaryFormat: true }, sent: "application/proto" },
  { name: "connect binary, h2c", make: createConnectTransport, options: { httpVersion: "2", useBinaryFormat: true }, sent: "application/proto" },
  { name: "gRPC, h2c", make: createGrpcTransport, options: {}, sent: "application/grpc+proto" },
  { name: "gRPC JSON, h2c", make: createGrpcTransport, options: { useBinaryFormat: false }, sent: "application/grpc+json" },
  { name: "gRPC-Web, HTTP/1.1", make: createGrpcWebTransport, options: { httpVersion: "1.1" }, sent: "application/grpc-web+proto" },
  { name: "gRPC-Web JSON, h2c", make: createGrpcWebTransport, options: { httpVersion: "2", useBinaryFormat: false }, sent: "application/grpc-web+json" },
];

/** The verbs of all HTTP/1.1 requests so far, some noted twice by Node. Interceptors do not see that a call becomes a GET. */
const verbs = [];
subscribe("http.client.request.start", ({ request }) => verbs.push(request.method));

/** A client of one dialect, and the list of its calls as content types. */
function connectWith(dialect, more = {}) {
  const calls = [];
  const note = (next) => (request) => {
    calls.push(request.header.get("content-type"));
    return next(request);
  };
  const transport = dialect.make({ baseUrl, interceptors: [note], defaultTimeoutMs: 60_000, ...dialect.options, ...more });
  return { client: createClient(VmService, transport), calls };
}

/** Checks that a call is refused with this code, and returns the error. */
async function refused(call, code) {
  const error = await call.then(
    () => assert.fail(`it was accepted; ${Code[code]} was expected`),
    (reason) => ConnectError.from(reason),
  );
  assert.equal(Code[error.code], Code[code], error.message);
  assert.notEqual(error.rawMessage, "");
  return error;
}

/** Takes one VM from its creation to its deletion. */
async function lifecycle(client, vmId) {
  const expect = (answer, state) => {
    assert.equal(answer.success, true);
    assert.equal(VmState[answer.state], VmState[state]);
  };
  const look = async (state) => {
    const info = await client.getVmInfo({ vmId });
    assert.equal(VmState[info.state], VmState[state]);
    assert.equal(info.config.memory.sizeBytes, sizeBytes);
    assert.equal(info.config.boot.kernelPath, kernelPath);
    const list = await client.listVms({ stateFilter: [state], metadataFilter: { made_by: vmId } });
    assert.deepEqual([list.totalCount, list.vms.map((vm) => vm.vmId)], [1, [vmId]]);
  };
  const created = await client.createVm({
    vmId,
    config: { cpu: { vcpuCount: 1 }, memory: { sizeBytes }, boot: { kernelPath }, metadata: { made_by: vmId } },
  });
  assert.deepEqual([created.vmId, VmState[created.state]], [vmId, "CREATED"]);
  await look(VmState.CREATED);
  await refused(client.pauseVm({ vmId }), Code.FailedPrecondition);
  expect(await client.bootVm({ vmId }), VmState.RUNNING);
  expect(await client.bootVm({ vmId }), VmState.RUNNING);
  await look(VmState.RUNNING);
  expect(await client.pauseVm({ vmId }), VmState.PAUSED);
  expect(await client.resumeVm({ vmId }), VmState.RUNNING);
  expect(await client.rebootVm({ vmId, force: true }), VmState.RUNNING);
  expect(await client.shutdownVm({ vmId, force: true }), VmState.SHUTDOWN);
  await look(VmState.SHUTDOWN);
  expect(await client.bootVm({ vmId }), VmState.RUNNING);
  await refused(client.deleteVm({ vmId }), Code.FailedPrecondition);
  assert.equal((await client.deleteVm({ vmId, force: true })).success, true);
  await refused(client.getVmInfo({ vmId }), Code.NotFound);
}

/** Sends two mistakes at once and reads them back from the error's google.rpc.BadRequest. */
async function violations(client) {
  const wrong = { config: { cpu: { vcpuCount: -1 }, memory: { sizeBytes: 1000n } } };
  const error = await refused(client.createVm(wrong), Code.InvalidArgument);
  const fields = error.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations.map(({ field }) => field));
  for (const field of ["config.cpu.vcpu_count", "config.memory.size_bytes"]) {
    assert.ok(fields.includes(field), `${field} is not in the details: ${fields}`);
    assert.ok(error.rawMessage.includes(field), error.rawMessage);
  }
}

/** Reads a watch up to the event that ends the present states. */
async function stream(client) {
  for await (const event of client.watchVms({}, { timeoutMs: 20_000 })) {
    if (event.type === "synced") {
      return;
    }
  }
  assert.fail("the stream ended before it was synced");
}

/** Reads the console of a guest from its first message on, types a line, and reads the guest's echo. */
async function readAndType(client, vmId) {
  await client.createVm({
    vmId,
    config: { cpu: { vcpuCount: 1 }, memory: { sizeBytes }, boot: { kernelPath: process.env.VMCP_TEST_ECHO_KERNEL } },
  });
  try {
    await client.bootVm({ vmId });
    let output = "";
    let step = "the first message";
    for await (const { data } of client.streamConsole({ vmId, follow: true }, { timeoutMs: 30_000 })) {
      output += Buffer.from(data).toString("latin1");
      if (step === "the first message" && output.includes("kind=echo")) {
        step = "the echo";
        await client.writeConsole({ vmId, data: Buffer.from("hello from Node\r") });
      } else if (step === "the echo" && output.includes("hello from Node")) {
        step = "the end of the VM";
        await client.deleteVm({ vmId, force: true });
      }
    }
    assert.equal(step, "the end of the VM", output);
  } finally {
    await client.deleteVm({ vmId, force: true }).catch(() => {});
  }
}

/** Makes both reads, and checks that they went as GET. */
async function readsByGet(dialect) {
  const { client } = connectWith(dialect, { useHttpGet: true });
  const { vmId } = await client.createVm({ config: { cpu: { vcpuCount: 1 }, memory: { sizeBytes } } });
  try {
    verbs.length = 0;
    assert.equal((await client.getVmInfo({ vmId })).config.boot.kernelPath, kernelPath);
    assert.ok((await client.listVms({ stateFilter: [VmState.CREATED] })).vms.some((vm) => vm.vmId === vmId));
    assert.deepEqual([...new Set(verbs)], ["GET"]);
  } finally {
    await client.deleteVm({ vmId, force: true });
  }
}

let failed = false;
/** Runs one check. */
async function check(name, run) {
  try {
    await run();
    console.log(`ok ${name}`);
  } catch (error) {
    failed = true;
    console.log(`FAIL ${name}: ${error.stack}`);
  }
}

for (const [index, dialect] of dialects.entries()) {
  const { client, calls } = connectWith(dialect);
  await check(`lifecycle over ${dialect.name}`, () => lifecycle(client, `node-${index}`));
  await check(`violations over ${dialect.name}`, () => violations(client));
  await check(`it was ${dialect.name}`, () => assert.deepEqual([...new Set(calls)], [dialect.sent]));
  await check(`a stream over ${dialect.name}`, () => stream(client));
  await check(`a console over ${dialect.name}`, () => readAndType(client, `node-console-${index}`));
}
for (const dialect of dialects.slice(0, 2)) {
  await check(`reads by GET over ${dialect.name}`, () => readsByGet(dialect));
}
// Connections that are kept for the next call would keep the program alive.
process.exit(failed ? 1 : 0);
