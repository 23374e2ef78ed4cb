"""Tests the API over gRPC, with generated stubs, and the standard services for health and reflection."""

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from vmm.v1 import vm_pb2 as pb

from api import TIMEOUT, channel, refused, vms
from checks import KERNEL, MEMORY, equal


def violations() -> None:
    """Sends two mistakes at once and reads them back from the status's google.rpc.BadRequest."""
    config = pb.VmConfig(cpu=pb.CpuConfig(vcpu_count=-1), memory=pb.MemoryConfig(size_bytes=1000))
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, vms.CreateVm, pb.CreateVmRequest(config=config))
    status = rpc_status.from_call(error)
    equal(status.message, error.details())
    fields = []
    for detail in status.details:
        request = BadRequest()
        equal(detail.Unpack(request), True)
        fields += [violation.field for violation in request.field_violations]
    for field in ("config.cpu.vcpu_count", "config.memory.size_bytes"):
        equal((field, field in fields, field in error.details()), (field, True, True))


def many_violations() -> None:
    """Names 64 disks that do not exist, many times: a client with the usual limit of 8 KiB drops larger trailers at random."""
    disks = [pb.StorageDevice(path=f"/srv/disks/of-the-tests/disk-{number}.img") for number in range(64)]
    config = pb.VmConfig(
        cpu=pb.CpuConfig(vcpu_count=1),
        memory=pb.MemoryConfig(size_bytes=MEMORY),
        boot=pb.BootConfig(kernel_path=KERNEL),
        storage=disks,
    )
    for _ in range(40):
        error = refused(grpc.StatusCode.INVALID_ARGUMENT, vms.CreateVm, pb.CreateVmRequest(config=config))
        equal("config.storage[0].path" in error.details(), True)
        equal(len(rpc_status.from_call(error).details), 1)


def large_answers() -> None:
    """Reads 100 VMs with 64 KB of labels each: a client takes 4 MiB in one answer, so there are several pages."""
    config = pb.VmConfig(
        cpu=pb.CpuConfig(vcpu_count=1),
        memory=pb.MemoryConfig(size_bytes=MEMORY),
        boot=pb.BootConfig(kernel_path=KERNEL),
        metadata={"padding": "x" * 65_000},
    )
    names = [f"python-large-{number}" for number in range(100)]
    try:
        for name in names:
            vms.CreateVm(pb.CreateVmRequest(vm_id=name, config=config), timeout=TIMEOUT)
        request, found = pb.ListVmsRequest(page_size=1000), []
        while True:
            page = vms.ListVms(request, timeout=TIMEOUT)
            equal((page.total_count, bool(page.vms)), (100, True))
            found += [vm.vm_id for vm in page.vms]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        equal(found, names)
    finally:
        for name in names:
            vms.DeleteVm(pb.DeleteVmRequest(vm_id=name, force=True), timeout=TIMEOUT)


def many_waits() -> None:
    """Waits 250 times on one connection, and is answered at once meanwhile."""
    config = pb.VmConfig(
        cpu=pb.CpuConfig(vcpu_count=1),
        memory=pb.MemoryConfig(size_bytes=MEMORY),
        boot=pb.BootConfig(kernel_path=KERNEL),
    )
    vm = {"vm_id": "python-waits"}
    vms.CreateVm(pb.CreateVmRequest(**vm, config=config), timeout=TIMEOUT)
    request = pb.WaitVmRequest(**vm, states=[pb.VM_STATE_RUNNING])
    waits = [vms.WaitVm.future(request, timeout=TIMEOUT) for _ in range(250)]
    try:
        equal(vms.GetVmInfo(pb.GetVmInfoRequest(**vm), timeout=TIMEOUT).state, pb.VM_STATE_CREATED)
        equal([wait.done() for wait in waits], [False] * 250)
    finally:
        for wait in waits:
            wait.cancel()
        vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT)


def health() -> None:
    """Checks that the health service reports the daemon and the service as serving, and an unknown service as not found."""
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "vmm.v1.VmService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        equal((service, answer.status), (service, health_pb2.HealthCheckResponse.SERVING))
    unknown = health_pb2.HealthCheckRequest(service="none.v1.Such")
    refused(grpc.StatusCode.NOT_FOUND, stub.Check, unknown)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT)
    equal(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
    watch.cancel()


def reflection() -> None:
    """Reflection (v1alpha) describes the API as the .proto file does."""
    database = ProtoReflectionDescriptorDatabase(channel)
    listed = set(database.get_services())
    equal({"vmm.v1.VmService", "grpc.health.v1.Health"} - listed, set())
    described = DescriptorPool(database).FindServiceByName("vmm.v1.VmService")
    generated = pb.DESCRIPTOR.services_by_name["VmService"]

    def shape(service: object) -> list[tuple[str, list[tuple[str, int]], list[tuple[str, int]]]]:
        def fields(message: object) -> list[tuple[str, int]]:
            return [(field.name, field.number) for field in message.fields]

        return [(method.name, fields(method.input_type), fields(method.output_type)) for method in service.methods]

    equal(shape(described), shape(generated))
