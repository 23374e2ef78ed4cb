// The daemon's address, the clients of all dialects, and what the steps have in common.

import assert from "node:assert/strict";
import { create } from "@bufbuild/protobuf";
import { type Client, Code, ConnectError, createClient, type Interceptor, type Transport } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { type VmConfig, VmConfigSchema, VmService } from "./gen/vmm/v1/vm_pb.js";

export type Vms = Client<typeof VmService>;

export const sizeBytes = 128n << 20n;

/** Returns a variable of the environment, which test.sh sets. */
export function variable(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set; run clients/node/test.sh`);
  return value;
}

const baseUrl = variable("VMCP_TEST_URL");
export const kernelPath = variable("VMCP_TEST_KERNEL");

/** One protocol with its encoding. */
export interface Dialect {
  name: string;
  /** The content type of unary calls. */
  sent: string;
  make(common: { baseUrl: string; interceptors: Interceptor[]; defaultTimeoutMs: number; useHttpGet: boolean }): Transport;
}

export const dialects: Dialect[] = [
  {
    name: "connect JSON, HTTP/1.1",
    sent: "application/json",
    make: (common) => createConnectTransport({ ...common, httpVersion: "1.1", useBinaryFormat: false }),
  },
  {
    name: "connect binary, HTTP/1.1",
    sent: "application/proto",
    make: (common) => createConnectTransport({ ...common, httpVersion: "1.1", useBinaryFormat: true }),
  },
  {
    name: "connect binary, h2c",
    sent: "application/proto",
    make: (common) => createConnectTransport({ ...common, httpVersion: "2", useBinaryFormat: true }),
  },
  {
    name: "gRPC, h2c",
    sent: "application/grpc+proto",
    make: (common) => createGrpcTransport(common),
  },
  {
    name: "gRPC JSON, h2c",
    sent: "application/grpc+json",
    make: (common) => createGrpcTransport({ ...common, useBinaryFormat: false }),
  },
  {
    name: "gRPC-Web, HTTP/1.1",
    sent: "application/grpc-web+proto",
    make: (common) => createGrpcWebTransport({ ...common, httpVersion: "1.1" }),
  },
  {
    name: "gRPC-Web JSON, h2c",
    sent: "application/grpc-web+json",
    make: (common) => createGrpcWebTransport({ ...common, httpVersion: "2", useBinaryFormat: false }),
  },
];

/** Returns a client of one dialect, and the content types of its unary calls. */
export function connectWith(dialect: Dialect, useHttpGet = false): { client: Vms; calls: (string | null)[] } {
  const calls: (string | null)[] = [];
  const note: Interceptor = (next) => (request) => {
    if (!request.stream) {
      calls.push(request.header.get("content-type"));
    }
    return next(request);
  };
  const transport = dialect.make({ baseUrl, interceptors: [note], defaultTimeoutMs: 60_000, useHttpGet });
  return { client: createClient(VmService, transport), calls };
}

/** Returns the smallest configuration that boots a kernel. */
export function config(kernel: string, metadata: Record<string, string> = {}): VmConfig {
  const fields = { cpu: { vcpuCount: 1 }, memory: { sizeBytes }, boot: { kernelPath: kernel }, metadata };
  return create(VmConfigSchema, fields);
}

/** Checks that a call is refused with this code and with a message, and returns the error. */
export async function refused(call: Promise<unknown>, code: Code): Promise<ConnectError> {
  const error = await call.then(
    () => assert.fail(`it was accepted; ${Code[code]} was expected`),
    (reason) => ConnectError.from(reason),
  );
  assert.equal(Code[error.code], Code[code], error.message);
  assert.notEqual(error.rawMessage, "");
  return error;
}
