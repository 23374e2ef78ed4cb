"""The client over gRPC, and the common part of its steps."""

from urllib.parse import urlsplit

import grpc
from vmm.v1 import vm_pb2 as pb
from vmm.v1 import vm_pb2_grpc

from checks import MEMORY, URL, equal

channel = grpc.insecure_channel(urlsplit(URL).netloc)
vms = vm_pb2_grpc.VmServiceStub(channel)
TIMEOUT = 60  # seconds


def config(kernel: str, **more: object) -> pb.VmConfig:
    """Returns the smallest configuration that boots a kernel."""
    cpu, memory = pb.CpuConfig(vcpu_count=1), pb.MemoryConfig(size_bytes=MEMORY)
    return pb.VmConfig(cpu=cpu, memory=memory, boot=pb.BootConfig(kernel_path=kernel), **more)


def refused(code: grpc.StatusCode, method: grpc.UnaryUnaryMultiCallable, request: object) -> grpc.RpcError:
    """Calls a method that must fail, and returns the error."""
    try:
        answer = method(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        equal((error.code(), bool(error.details())), (code, True))
        return error
    raise AssertionError(f"it was accepted: {answer}; {code} was expected")
