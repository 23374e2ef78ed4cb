// Asks the daemon's reflection service for the API's descriptors and runs protoc-gen-es on them: neither protoc nor buf is
// needed, and the use of reflection tests it.
//
//   daemon ── grpc.reflection.v1 ──► descriptors ──► protoc-gen-es ──► gen/vmm/v1/vm_pb.ts, gen/google/rpc/…_pb.ts
//
// Usage: VMCP_TEST_URL=http://127.0.0.1:PORT node generate.mjs

import { spawnSync } from "node:child_process";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { create, createFileRegistry, fromBinary, fromJson, toBinary } from "@bufbuild/protobuf";
import {
  CodeGeneratorRequestSchema,
  CodeGeneratorResponseSchema,
  FileDescriptorProtoSchema,
  FileDescriptorSetSchema,
} from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

const here = import.meta.dirname;
const out = join(here, "gen");

// The part of grpc/reflection/v1/reflection.proto that is needed to ask for the file of a symbol.
const field = (name, number, type, more) => ({ name, number, type, label: "LABEL_OPTIONAL", ...more });
const reflection = createFileRegistry(
  fromJson(FileDescriptorSetSchema, {
    file: [
      {
        name: "grpc/reflection/v1/reflection.proto",
        package: "grpc.reflection.v1",
        syntax: "proto3",
        messageType: [
          { name: "ServerReflectionRequest", field: [field("file_containing_symbol", 4, "TYPE_STRING")] },
          {
            name: "ServerReflectionResponse",
            field: [
              field("file_descriptor_response", 4, "TYPE_MESSAGE", { typeName: ".grpc.reflection.v1.FileDescriptorResponse" }),
              field("error_response", 7, "TYPE_MESSAGE", { typeName: ".grpc.reflection.v1.ErrorResponse" }),
            ],
          },
          {
            name: "FileDescriptorResponse",
            field: [field("file_descriptor_proto", 1, "TYPE_BYTES", { label: "LABEL_REPEATED" })],
          },
          { name: "ErrorResponse", field: [field("error_message", 2, "TYPE_STRING")] },
        ],
        service: [
          {
            name: "ServerReflection",
            method: [
              {
                name: "ServerReflectionInfo",
                inputType: ".grpc.reflection.v1.ServerReflectionRequest",
                outputType: ".grpc.reflection.v1.ServerReflectionResponse",
                clientStreaming: true,
                serverStreaming: true,
              },
            ],
          },
        ],
      },
    ],
  }),
);

/** Asks for the files that define these symbols, and for those they import; returns them by path. */
async function describe(symbols) {
  const transport = createGrpcTransport({ baseUrl: process.env.VMCP_TEST_URL });
  const client = createClient(reflection.getService("grpc.reflection.v1.ServerReflection"), transport);
  async function* questions() {
    for (const symbol of symbols) {
      yield { fileContainingSymbol: symbol };
    }
  }
  const files = new Map();
  for await (const answer of client.serverReflectionInfo(questions(), { timeoutMs: 20_000 })) {
    if (!answer.fileDescriptorResponse) {
      throw new Error(`reflection: ${answer.errorResponse?.errorMessage ?? "an answer without a file"}`);
    }
    for (const bytes of answer.fileDescriptorResponse.fileDescriptorProto) {
      const file = fromBinary(FileDescriptorProtoSchema, bytes);
      files.set(file.name, file);
    }
  }
  return files;
}

/** Orders files so that each comes after those it imports, as plugins expect. */
function inOrder(files) {
  const done = new Map();
  const visit = (path) => {
    const file = files.get(path);
    if (!file) {
      throw new Error(`reflection gave no ${path}, which is imported`);
    }
    file.dependency.filter((imported) => !done.has(imported)).forEach(visit);
    done.set(path, file);
  };
  [...files.keys()].forEach(visit);
  return [...done.values()];
}

const files = inOrder(await describe(["vmm.v1.VmService", "google.rpc.BadRequest"]));
const request = create(CodeGeneratorRequestSchema, {
  // What google/protobuf/ holds comes with the library.
  fileToGenerate: files.map((file) => file.name).filter((name) => !name.startsWith("google/protobuf/")),
  parameter: "target=ts,import_extension=js",
  protoFile: files,
});
const plugin = spawnSync(process.execPath, [join(here, "node_modules/@bufbuild/protoc-gen-es/bin/protoc-gen-es")], {
  input: toBinary(CodeGeneratorRequestSchema, request),
  maxBuffer: 64 << 20,
  stdio: ["pipe", "pipe", "inherit"],
});
if (plugin.status !== 0) {
  throw new Error(`protoc-gen-es ended with status ${plugin.status}`);
}
const response = fromBinary(CodeGeneratorResponseSchema, plugin.stdout);
if (response.error) {
  throw new Error(`protoc-gen-es: ${response.error}`);
}
rmSync(out, { recursive: true, force: true });
for (const file of response.file) {
  const path = join(out, file.name);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, file.content);
}
// The connection to the daemon would keep the program alive.
process.exit(0);
