"""Tests the API over gRPC, with generated stubs, and the standard services for health and reflection."""

from urllib.parse import urlsplit

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from vmm.v1 import vm_pb2 as pb
from vmm.v1 import vm_pb2_grpc

from checks import ECHO_KERNEL, KERNEL, MEMORY, URL, equal

channel = grpc.insecure_channel(urlsplit(URL).netloc)
vms = vm_pb2_grpc.VmServiceStub(channel)
TIMEOUT = 60  # seconds


def refused(code: grpc.StatusCode, method: grpc.UnaryUnaryMultiCallable, request: object) -> grpc.RpcError:
    """Calls a method that must fail, and returns the error."""
    try:
        answer = method(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        equal((error.code(), bool(error.details())), (code, True))
        return error
    raise AssertionError(f"it was accepted: {answer}; {code} was expected")


def expect(method: grpc.UnaryUnaryMultiCallable, request: object, state: int) -> None:
    """Calls a method that changes the state, and checks its answer and the reads after it."""
    answer = method(request, timeout=TIMEOUT)
    equal((answer.success, answer.state), (True, state))
    equal(vms.GetVmInfo(pb.GetVmInfoRequest(vm_id=request.vm_id), timeout=TIMEOUT).state, state)


def lifecycle() -> None:
    """Takes one VM from its creation to its deletion."""
    vm = {"vm_id": "python-grpc"}
    config = pb.VmConfig(
        cpu=pb.CpuConfig(vcpu_count=1),
        memory=pb.MemoryConfig(size_bytes=MEMORY),
        boot=pb.BootConfig(kernel_path=KERNEL),
        metadata={"made_by": "python-grpc"},
    )
    created = vms.CreateVm(pb.CreateVmRequest(**vm, config=config), timeout=TIMEOUT)
    equal((created.vm_id, created.state), ("python-grpc", pb.VM_STATE_CREATED))
    refused(grpc.StatusCode.FAILED_PRECONDITION, vms.PauseVm, pb.PauseVmRequest(**vm))
    expect(vms.BootVm, pb.BootVmRequest(**vm), pb.VM_STATE_RUNNING)
    expect(vms.PauseVm, pb.PauseVmRequest(**vm), pb.VM_STATE_PAUSED)
    expect(vms.ResumeVm, pb.ResumeVmRequest(**vm), pb.VM_STATE_RUNNING)
    expect(vms.RebootVm, pb.RebootVmRequest(**vm, force=True), pb.VM_STATE_RUNNING)
    info = vms.GetVmInfo(pb.GetVmInfoRequest(**vm), timeout=TIMEOUT)
    equal((info.config.memory.size_bytes, info.config.boot.kernel_path), (MEMORY, KERNEL))
    request = pb.ListVmsRequest(state_filter=[pb.VM_STATE_RUNNING], metadata_filter={"made_by": "python-grpc"})
    found = vms.ListVms(request, timeout=TIMEOUT)
    equal((found.total_count, [vm.vm_id for vm in found.vms]), (1, ["python-grpc"]))
    expect(vms.ShutdownVm, pb.ShutdownVmRequest(**vm, force=True), pb.VM_STATE_SHUTDOWN)
    expect(vms.BootVm, pb.BootVmRequest(**vm), pb.VM_STATE_RUNNING)
    refused(grpc.StatusCode.FAILED_PRECONDITION, vms.DeleteVm, pb.DeleteVmRequest(**vm))
    equal(vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT).success, True)
    refused(grpc.StatusCode.NOT_FOUND, vms.GetVmInfo, pb.GetVmInfoRequest(**vm))


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


def stream() -> None:
    """Reads a watch up to the event that ends the present states."""
    for event in vms.WatchVms(pb.WatchVmsRequest(), timeout=20):
        if event.type == "synced":
            return
    raise AssertionError("the stream ended before it was synced")


def console() -> None:
    """Reads the console of a guest from its first message on, types a line, and reads the guest's echo."""
    vm = {"vm_id": "python-console"}
    config = pb.VmConfig(
        cpu=pb.CpuConfig(vcpu_count=1),
        memory=pb.MemoryConfig(size_bytes=MEMORY),
        boot=pb.BootConfig(kernel_path=ECHO_KERNEL),
    )
    vms.CreateVm(pb.CreateVmRequest(**vm, config=config), timeout=TIMEOUT)
    try:
        vms.BootVm(pb.BootVmRequest(**vm), timeout=TIMEOUT)
        output, typed, deleted = b"", False, False
        for message in vms.StreamConsole(pb.StreamConsoleRequest(**vm, follow=True), timeout=TIMEOUT):
            output += message.data
            if not typed and b"kind=echo" in output:
                vms.WriteConsole(pb.WriteConsoleRequest(**vm, data=b"hello from Python\r"), timeout=TIMEOUT)
                typed = True
            if not deleted and b"hello from Python" in output:
                vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT)
                deleted = True
        equal((deleted, output), (True, output))  # the stream ends with the VM, and without an error
    finally:
        if vm["vm_id"] in [left.vm_id for left in vms.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT).vms]:
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
